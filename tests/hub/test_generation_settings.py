"""Settings of a teacher's generation that a student must not inherit."""

import json

import pytest
import torch
from tiny_models import make_gpt2, make_gptj, make_mistral, make_teacher

import linearize

ODD = {"use_cache": False, "cache_implementation": "static", "prompt_lookup_num_tokens": 3}


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("make", [make_teacher, make_mistral, make_gpt2, make_gptj])
def test_a_teacher_without_a_cache_has_a_student_with_one(make, saved, tmp_path):
    make().save_pretrained(tmp_path / "teacher")
    files = {"config.json": {"use_cache": False}, "generation_config.json": ODD}
    for name, changes in files.items():
        path = tmp_path / "teacher" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    if not saved:
        (tmp_path / "teacher" / "generation_config.json").unlink()
    student = linearize.convert(tmp_path / "teacher")
    assert student.config.use_cache is True
    student.save_pretrained(tmp_path / "student")
    settings = json.loads((tmp_path / "student" / "generation_config.json").read_text())
    assert not {name for name in ODD if settings.get(name)} and settings.get("use_cache") is not False
    for model in (student, linearize.load_student(tmp_path / "student")):
        seen = []
        layer = model.decoder_layers()[0]
        layer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].shape[1]))
        model.generate(torch.randint(3, 60, (1, 7)), max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert seen == [7, 1, 1, 1]
