"""A saved student carries its code: it loads where linearize is not installed, and gives the same logits."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_models import WITHOUT_PACKAGE, make_gpt2, make_gptj, make_mistral, make_student, make_teacher, perturb

LOAD = (
    WITHOUT_PACKAGE
    + """
import json, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = torch.arange(3, 43)[None]
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
    if set(model.config.mixer_types) == {"linear"}:
        with model.captured_decoding():
            assert model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist() == tokens
    with torch.no_grad():
        logits = model(ids).logits
    torch.save(logits, folder + "/logits.pt")
    model.save_pretrained(folder + "/again")
    print(json.dumps({"class": type(model).__module__, "tokens": tokens}))
"""
)


@pytest.mark.slow
@torch.no_grad()
def test_loads_without_the_package(tmp_path):
    linear = {"linear": {"type": "linear", "window": 5, "sinks": 2}}
    gated = {"linear": {**linear["linear"], "map_input": "projections", "gate": "token", "gate_bias": 1.0}}
    pure = {"type": "cosine", "window": 0, "sinks": 0, "scale_side": "key"}
    cosine = {"cosine": {"type": "cosine", "window": 5, "sinks": 2, "feature_map": "softmax"}, "pure": pure}
    some, both = ["linear", "softmax", "linear"], ["cosine", "pure", "cosine"]
    forgets = {"directions": "projections", "gate": "token", "gate_bias": 1.0}
    gated_cosine = {"cosine": {**cosine["cosine"], **forgets}}
    layouts = {
        "all": (make_teacher, linear, None),
        "some": (make_teacher, linear, some),
        "gated": (make_teacher, gated, None),
        "gptj-gated": (make_gptj, gated, None),
        "gpt2": (make_gpt2, linear, None),
        "gptj": (make_gptj, linear, None),
        "gptj-some": (make_gptj, linear, some),
        "mistral": (make_mistral, linear, None),
        "mistral-some": (make_mistral, linear, some),  # its softmax layer has a sliding window
        "cosine": (make_teacher, cosine, both),
        "cosine-gated": (make_teacher, gated_cosine, None),
        "gpt2-cosine": (make_gpt2, cosine, both),
        "gptj-cosine": (make_gptj, cosine, both),
        "mistral-cosine": (make_mistral, cosine, both),
    }
    expected = {}
    for name, (make, mixers, mixer_types) in layouts.items():
        student = make_student(make(), mixers, mixer_types)
        perturb(student)
        student.save_pretrained(tmp_path / name)
        ids = torch.arange(3, 43)[None]
        expected[name] = (student(ids).logits, student.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist())
    folders = [str(tmp_path / name) for name in layouts]
    done = subprocess.run([sys.executable, "-c", LOAD, *folders], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, line in zip(layouts, done.stdout.splitlines(), strict=True):
        loaded = json.loads(line)
        assert loaded["class"].startswith("transformers_modules.")
        assert loaded["tokens"] == expected[name][1]
        logits = torch.load(tmp_path / name / "logits.pt", weights_only=True)
        assert (logits - expected[name][0]).abs().max() <= 1e-5
        backbone = name.split("-")[0] if name.startswith(("gpt2", "gptj", "mistral")) else "llama"
        assert (tmp_path / name / "again" / f"modeling_{backbone}.py").is_file()
        assert not list((tmp_path / name).glob("*.bin"))
