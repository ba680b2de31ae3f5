"""The script that scores students by length, on tiny ones of several mechanisms."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny_models import make_student, make_teacher, perturb
from tiny_runs import make_tokenizer

from linearize.data import load_text_blocks
from linearize.evaluation import perplexity

SCRIPT = Path(__file__).parents[2] / "scripts" / "measure_length.py"
STUDENTS = {
    "cosine": ({"type": "cosine", "window": 4, "sinks": 1, "gate": "head", "gate_bias": 1.0}, 3),
    "gain_cell": ({"type": "gain_cell", "window": 64}, 1),
}


@pytest.fixture
def script():
    specification = importlib.util.spec_from_file_location("measure_length", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_length_scores_the_same_tokens_in_every_arm(script, tmp_path):
    for name, (settings, _) in STUDENTS.items():
        student = make_student(make_teacher(vocab_size=512), {name: settings})
        perturb(student)
        student.save_pretrained(tmp_path / "students" / name)
        make_tokenizer().save_pretrained(tmp_path / "students" / name)
    text = tmp_path / "text.jsonl"
    lines = [{"text": "".join(chr(97 + (i * j) % 26) for j in range(40))} for i in range(30)]
    text.write_text("\n".join(map(json.dumps, lines)))
    output = tmp_path / "figures.json"
    script.main(
        [str(tmp_path / "students"), "--texts", str(text), "--length", "16", "--max_tokens", "256",
         "--device", "cpu", "--output", str(output)]
    )  # fmt: skip
    figures = json.loads(output.read_text())
    for name, (_, arms) in STUDENTS.items():
        own = [x for x in figures if x["student"] == name]
        assert len(own) == 3 * arms and [x["times"] for x in own[:3]] == [1, 4, 8]
        assert [x["tokens"] for x in own[:3]] == [256 - 16, 256 - 4, 256 - 2]  # all but the first of each piece
    blocks = load_text_blocks(text, make_tokenizer(), 64, 256)
    with torch.no_grad():
        expected = perplexity(script.load_student(tmp_path / "students" / "cosine"), blocks, arm="softmax").perplexity
    (found,) = [x for x in figures if (x["student"], x["arm"], x["times"]) == ("cosine", "softmax", 4)]
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_a_folder_without_students_is_refused(script, tmp_path):
    with pytest.raises(SystemExit, match="holds no converted model"):
        script.main([str(tmp_path), "--texts", "text.txt", "--length", "16"])
    with pytest.raises(SystemExit):  # 3 does not divide 8: other tokens would be scored
        script.main([str(tmp_path), "--texts", "text.txt", "--length", "16", "--times", "3", "8"])
