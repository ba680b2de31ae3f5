"""Uses what a guide of CONTRIBUTING.md has added to the copy that this file lies in: `test_contributing.py` runs it.

    python tests/contributing_worker.py stage|attention|backbone COMMAND...

The commands are the guide's; they run here, in this process, which has imported all of it.
"""

import contextlib
import io
import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import make_teacher
from tiny_runs import make_teacher_directory, without_package, write_text
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

import linearize
from linearize.cli import main
from linearize.hardware.shape import Shape
from linearize.hub.card import architecture
from linearize.modeling import ATTENTIONS, BACKBONES, backbone_of

ROOT = Path(__file__).resolve().parents[1]
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
ids = torch.arange(3, 43)[None]
with torch.no_grad():
    torch.save(model(ids).logits, sys.argv[1] + "/logits.pt")
    model.generate(ids, max_new_tokens=4, do_sample=False)
model.save_pretrained(sys.argv[1] + "/again")
"""
SMALL = {
    "device": "cpu",
    "data.sequence_length": 32,
    "data.validation_documents": 6,
    "evaluation.max_tokens": 256,
    "evaluation.length_tokens": 0,
}
STEPS = {"tokens_per_step": 64, "logging_steps": 1}


def command(line):
    """One command of a guide; gives what it prints."""
    words, printed = shlex.split(line), io.StringIO()
    with contextlib.redirect_stdout(printed):
        if words[0] == "linearize":
            code = main(words[1:])
        elif words[0] == "python":
            runpy.run_path(words[1], run_name="__main__")
            code = 0
        else:
            assert words[0] == "pytest", line
            code = pytest.main(["-q", "-p", "no:cacheprovider", *words[1:]])
    assert code == 0, f"{line}\n{printed.getvalue()}"
    return printed.getvalue()


def text_and_teacher(make=make_teacher):
    """What the guides' runs start from: `teacher` and `text.jsonl`."""
    write_text(Path("text.jsonl"))
    return make_teacher_directory(Path("teacher"), make=make)


def load_without_package(model, folder):
    """A saved model in a process without linearize: the logits of its remote code."""
    model.save_pretrained(folder)
    done = subprocess.run([*without_package(LOAD), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(f"{folder}/logits.pt", weights_only=True)


def token_ids(rows, length):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(0))


def close(found, expected, bound=1e-5):
    assert (found - expected).abs().max() <= bound


@torch.no_grad()
def check_inference(model):
    """Prefill in pieces and decoding, packed texts, left padding and generation give what the whole text gives."""
    ids = token_ids(2, 23)
    whole = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    parts = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split([13, 1, 1, 7, 1], 1)]
    close(torch.cat(parts, 1), whole)
    short = ids[1:, :9]
    padded = torch.cat([torch.zeros(1, 14, dtype=torch.long), short], 1)
    batch, mask = torch.cat([ids[:1], padded]), torch.ones(2, 23, dtype=torch.long)
    mask[1, :14] = 0
    found = model(batch, attention_mask=mask).logits
    close(found[:1], whole[:1])
    close(found[1:, 14:], model(short).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(batch, attention_mask=mask, **options)[:, 23:]
    alone = model.generate(short, **options)[:, 9:]
    assert torch.equal(together[1, : alone.shape[1]], alone[0])
    assert torch.equal(together, model.generate(batch, attention_mask=mask, use_cache=False, **options)[:, 23:])
    places = torch.cat([torch.arange(10), torch.arange(13)])[None]
    packed = model(ids[:1], position_ids=places, use_cache=False).logits
    close(packed[:, 10:], model(ids[:1, 10:]).logits)
    return cache


def stage(commands):
    text_and_teacher()
    dry, run, resumed, tests = commands
    command(tests)
    printed = command(dry)
    assert "counted" in printed and "4 heads counted" in printed and not Path("counting").exists()
    assert "counted: 4 heads\n" in command(run)
    report = json.loads(Path("counting/report.json").read_text())
    assert list(report["stages"]) == ["transfer", "counted", "finetune"]
    assert report["stages"]["counted"]["heads"] == 4 and report["stages"]["counted"]["trained"] == "nothing"
    assert "counted" in Path("counting/report.md").read_text()
    assert any("counted" in row["name"] for row in report["evaluation"]["rows"])
    for place in ("counted", "final"):
        record = json.loads(Path("counting", place, "linearize.json").read_text())
        assert record["heads"] == 4 and record["trained"]["counted"] == "nothing"
    assert yaml.safe_load(Path("counting/config.yaml").read_text())["stages"]["counted"]["every"] == 2
    steps = report["stages"]["finetune"]["steps"]
    assert "counted: 4 heads" not in command(resumed)  # its repository is there
    report = json.loads(Path("counting/report.json").read_text())
    assert report["stages"]["counted"]["heads"] == 4 and report["stages"]["finetune"]["steps"] == steps + 1
    for flags, sentence in (
        (["--counted.every", "0"], "counted.every is 0, but it must be at least 1"),
        (["--counted.every", "9"], "counted.every is 9, but the model has 4 heads"),
        (["--counted.evry", "2"], "--counted.evry"),
    ):
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            assert main(["run", "counting.yaml", "--output_dir", "other", *flags]) == 2
        assert sentence in errors.getvalue() and not Path("other").exists()


def attention(commands):
    teacher = text_and_teacher()
    assert main(["convert", str(teacher), "student", "--attention.type", "average", "--attention.gain", "0.5"]) == 0
    model = linearize.load_student("student")
    gains = {name: value for name, value in model.state_dict().items() if ".mixer." in name}
    assert all(torch.equal(value, torch.full((4,), 0.5)) for value in gains.values()) and len(gains) == 2
    with torch.no_grad():
        for number, value in enumerate(gains.values()):
            value.copy_(torch.linspace(0.2, 1.0 + number, 4))
    cache = check_inference(model)
    settings = model.config.mixer(0)
    assert cache.layers[0].nbytes() == 2 * ATTENTIONS["average"].state_bytes(settings, 4, 2, 16, 23, 4)
    close(load_without_package(model, "saved"), model(torch.arange(3, 43)[None]).logits.detach())
    assert {"op_average.py", "attention_average.py"} <= {path.name for path in Path("saved/again").iterdir()}
    steps = {f"transfer.{name}": value for name, value in {**STEPS, "max_steps": 8}.items()}
    start = {"model_name_or_path": str(teacher), "data.dataset": "text.jsonl", "output_dir": "out"}
    done = linearize.run("smollm2_135m_average", {**SMALL, **start, **steps, "finetune": None})
    losses = [sum(row) for row in done.stages["transfer"].figures["losses_per_layer"]]
    assert losses[-1] < losses[0]
    before, after = linearize.convert(teacher, {"type": "average"}).state_dict(), linearize.load_student(done.final)
    moved = {name for name, value in after.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == gains.keys()
    for line in commands:
        command(line)
    assert "\n| average | " in Path("README.md").read_text()


def backbone(commands):
    from tiny_models import make_qwen2

    teacher = text_and_teacher(make_qwen2)
    stock = AutoModelForCausalLM.from_pretrained(teacher)
    ids = token_ids(2, 23)
    for kept in ([], [0]):
        model = linearize.convert(teacher, {"type": "linear", "window": 5, "sinks": 2}, softmax_layers=kept)
        with torch.no_grad(), model.use_arm("teacher"):
            assert torch.equal(model(ids).logits, stock(ids).logits)
        check_inference(model)
    shape, entry = Shape.of(stock.config), BACKBONES["qwen2"]
    assert shape.linear_parameters + shape.other_parameters == stock.num_parameters()
    assert entry.model(["Qwen2ForSequenceClassification"]) is entry.models[AutoModelForSequenceClassification]
    assert backbone_of(model.config) is entry
    close(load_without_package(model, "saved"), model(torch.arange(3, 43)[None]).logits.detach())
    assert torch.equal(linearize.load_student("saved")(ids).logits, model(ids).logits)
    stages = {
        "transfer": {"kind": "transfer", **STEPS, "max_steps": 2},
        "finetune": {"kind": "train", "weights": "lora", **STEPS, "max_steps": 2},
    }
    start = {"model_name_or_path": str(teacher), "output_dir": "out", "data": {"dataset": "text.jsonl"}}
    done = linearize.run({**start, "dtype": "float32", "stages": stages}, SMALL)
    before, after = model.state_dict(), linearize.load_student(done.final).state_dict()
    moved = {name.rsplit(".", 2)[-2] for name in before if not torch.equal(before[name], after[name])}
    assert moved >= set(entry.lora_targets) and "embed_tokens" not in moved
    assert architecture(model.config) == "Qwen2"
    windowed = Path("windowed")
    make_teacher_directory(windowed, make=make_qwen2, use_sliding_window=True, max_window_layers=1)
    with pytest.raises(linearize.errors.UserError, match="use_sliding_window is true"):
        linearize.convert(windowed)
    for line in commands:
        command(line)
    assert " | qwen2 | " in Path("README.md").read_text()


if __name__ == "__main__":
    assert Path(linearize.__file__).is_relative_to(ROOT), linearize.__file__
    {"stage": stage, "attention": attention, "backbone": backbone}[sys.argv[1]](sys.argv[2:])
