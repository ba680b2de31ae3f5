"""Runs onto landmark attention, at toy size on the demo text: all weights, LoRA, and how far the result reads."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import make_gpt2, make_mistral, make_teacher
from tiny_runs import make_teacher_directory
from transformers import AutoModelForCausalLM

import linearize
from linearize import LandmarkAttentionConfig, UserError
from linearize.cli import main
from linearize.config.record import read_record
from linearize.config.settings import RunConfig
from linearize.config.yaml_io import preset_names, resolve
from linearize.evaluation.by_length import MATCHED
from linearize.runs.landmark import AFTER, BEFORE, CALIBRATED, FITTED, LandmarkRunConfig, run_landmark
from linearize.runs.staged_run import TEACHER

DEMO_TEXT = Path(linearize.__file__).parent / "demo_text"


@pytest.fixture
def data(tmp_path):
    return {
        "dataset": str(DEMO_TEXT / "train.jsonl.gz"),
        "validation": str(DEMO_TEXT / "validation.jsonl.gz"),
        "sequence_length": 64,
        "max_tokens": 20_000,
        "cache_dir": str(tmp_path / "cache"),
    }


@pytest.fixture
def settings(tmp_path, data):
    return {
        "model_name_or_path": str(make_teacher_directory(tmp_path / "teacher", make=make_mistral)),
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
        "attention": {"block_size": 8, "top_k": 3, "block_dropout": 0.8},
        "data": data,
        "training": {
            "max_steps": 6, "batch_size": 4, "tokens_per_step": 256, "learning_rate": 3e-3, "warmup_steps": 1,
            "eval_steps": 3, "eval_tokens": 1024, "save_steps": 3,
        },
    }  # fmt: skip


def test_all_weights(settings, tmp_path, capsys):
    out = run_landmark(settings)
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert [(row["name"], row["tokens"]) for row in rows] == [
        ("teacher", 0),
        (TEACHER, 1536),
        (BEFORE, 0),
        (CALIBRATED, 0),
        (AFTER, 1536),
    ]
    found = {row["name"]: row["perplexity"] for row in rows}
    assert found[AFTER] < found[CALIBRATED] and found[TEACHER] < found["teacher"]
    assert (out / "plots" / "perplexity.png").stat().st_size > 5000
    start = linearize.load_student(out / "start").state_dict()
    final = AutoModelForCausalLM.from_pretrained(out / "final", trust_remote_code=True)
    assert final.config.mixer(0).block_dropout == 0.8 and final.config.sliding_window is None
    moved = {name for name, weight in final.state_dict().items() if not torch.equal(weight, start[name])}
    assert {"model.mixer.embedding", "model.layers.0.self_attn.q_proj.weight"} <= moved
    shown = capsys.readouterr().out
    lengths = json.loads((out / "report.json").read_text())["by_length"]
    assert {figure["name"] for figure in lengths["figures"]} == {TEACHER, f"{TEACHER}, {MATCHED}", "student"}
    assert {figure["times"] for figure in lengths["figures"]} >= {1, 4} and lengths["reference"] == TEACHER
    for where in (shown, (out / "final" / "README.md").read_text()):
        assert "Perplexity by length, trained at" in where
    assert AFTER in shown and (out / "plots" / "evaluation_by_length.png").is_file()
    with pytest.raises(UserError, match="already holds a run"):
        run_landmark(settings)

    # How far it reads: prompts of 200 tokens are 29 blocks, of which it reads 3.
    arguments = [
        "--passkey",
        "200",
        "--natural",
        "200",
        "--trials",
        "4",
        "--depths",
        "2",
        "--output",
        str(tmp_path / "far"),
    ]
    assert main(["evaluate", str(out / "final"), *arguments]) == 0
    assert json.loads((tmp_path / "far" / "passkey.json").read_text())


def test_keys_are_fitted_again_where_nothing_trains_them(settings, capsys):
    attention = {**settings["attention"], "block_weight": "tokens"}
    out = run_landmark({**settings, "attention": attention, "train_teacher": False})
    assert capsys.readouterr().out.count("calibration: ") == 2
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert [(row["name"], row["tokens"]) for row in rows][-2:] == [(AFTER, 1536), (FITTED, 1536)]
    trained = linearize.load_student(out / "landmark" / "final").state_dict()
    start, final = (linearize.load_student(out / name).state_dict() for name in ("start", "final"))
    for name in final:
        again = ".mixer.keys." in name
        assert torch.equal(final[name], trained[name]) is not again, name
        assert not again or torch.equal(trained[name], start[name]), name
    assert read_record(out / "final")["calibration"]["sequences"] == 64
    (out / "report.json").unlink()
    run_landmark({**settings, "attention": attention, "train_teacher": False, "resume_from_checkpoint": True})
    assert json.loads((out / "report.json").read_text())["rows"][-1] == rows[-1]


def test_published_labels(settings):
    attention = {**settings["attention"], "include_landmark_in_loss": True, "landmark_key": "token"}
    out = run_landmark({**settings, "attention": attention, "distillation": None, "train_teacher": False})
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher", BEFORE, AFTER]
    assert rows[2]["perplexity"] < rows[1]["perplexity"]
    final = linearize.load_student(out / "final").state_dict()
    start = linearize.load_student(out / "start").state_dict()
    assert not torch.equal(final["model.mixer.output"], start["model.mixer.output"])


def test_lora_and_the_landmark(tmp_path, data):
    """The recipe of an 8B model on a tiny one: no transfer; adapters and the landmark's embedding train."""
    teacher = make_teacher_directory(tmp_path / "teacher", make=make_teacher)
    flags = {
        "model_name_or_path": teacher, "output_dir": tmp_path / "out", "dtype": "float32", "device": "cpu",
        "attention.block_size": 8, "data.dataset": data["dataset"], "data.validation": data["validation"],
        "data.sequence_length": 64, "data.max_tokens": 20_000, "data.cache_dir": data["cache_dir"],
        "finetune.tokens": 1024, "finetune.tokens_per_step": 256, "finetune.mixer_learning_rate": 0.1,
        "evaluation.max_tokens": 1024,
    }  # fmt: skip
    arguments = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    assert main(["run", "--config", "llama3_8b_landmark", *arguments]) == 0
    student = linearize.load_student(tmp_path / "out" / "final")
    embeddings = student.get_input_embeddings().weight
    assert not torch.allclose(student.model.mixer.embedding, embeddings.float().mean(0), atol=1e-3)
    assert student.config.mixer(0).block_size == 8


def test_attention_transfer_is_refused(tmp_path, data, capsys):
    teacher = make_teacher_directory(tmp_path / "teacher", make=make_teacher)
    arguments = ["--model_name_or_path", str(teacher), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    arguments += ["--attention.type", "landmark", "--data.dataset", data["dataset"], "--data.sequence_length", "64"]
    assert main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert "set transfer to none" in error and "Traceback" not in error and not (tmp_path / "out").exists()


def test_landmarks_count_among_learned_positions(settings, tmp_path):
    teacher = make_teacher_directory(tmp_path / "gpt2", make=make_gpt2, n_positions=64)
    with pytest.raises(UserError, match="no text above 56 tokens fits the 64 positions"):
        run_landmark({**settings, "model_name_or_path": str(teacher)})
    assert not (tmp_path / "out").exists()


def test_presets_are_valid():
    assert set(preset_names(LandmarkRunConfig)) == {"mistral_7b_full", "published", "smollm2_landmark"}
    for name in preset_names(LandmarkRunConfig):
        linearize.LandmarkAttentionConfig(**resolve(name, settings=LandmarkRunConfig).attention)
    published = resolve("published", settings=LandmarkRunConfig)
    assert published.training.max_steps * published.training.tokens_per_step == 15_000 * 128 * 512
    for name in ("llama3_8b_landmark", "mistral_7b_landmark"):
        preset = resolve(name, settings=RunConfig)
        assert preset.transfer is None and preset.attention["type"] == "landmark"


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--attention.type", "linear"], "trains landmark attention"),
        (["--attention.top_k", "0"], "at least 1 block"),
        (["--attention.block_size", "1"], "at least 2"),
        (["--attention.max_blocks", "3"], "at least top_k"),
        (["--attention.include_landmark_in_loss", "true"], "set distillation to none"),
        (["--sliding_window", "halve"], "sliding_window"),
    ],
)
def test_bad_input_is_one_sentence(flags, sentence, tmp_path, capsys):
    teacher = make_teacher_directory(tmp_path / "teacher", make=make_teacher)
    arguments = ["--model_name_or_path", str(teacher), "--output_dir", str(tmp_path / "out"), *flags]
    assert main(["landmark", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error and not (tmp_path / "out").exists()


COMMAND = re.compile(r"(?:linearize landmark|linearize_landmark\.py) ((?:.*\\\n)*.*)")


def printed_commands():
    """The settings of each command that trains landmark attention in README and results."""
    root = Path(__file__).parents[2]
    for page in ("README.md", "docs/results.md"):
        for command in COMMAND.findall((root / page).read_text()):
            words = shlex.split(command.replace("\\\n", " "), comments=True)
            flags = dict(zip(words[::2], words[1::2], strict=True))
            yield {name.removeprefix("--"): yaml.safe_load(value) for name, value in flags.items()}


def test_printed_commands_can_be_run():
    """What the present presets make of them, up to the attention of the student."""
    commands = list(printed_commands())
    assert len(commands) >= 3
    for flags in commands:
        config = resolve(flags.pop("config"), flags, settings=LandmarkRunConfig)
        LandmarkAttentionConfig(**config.attention)


def test_the_published_preset_is_the_published_training():
    """On any model: landmarks' own keys and labels, every block open, no teacher."""
    config = resolve("published", {"model_name_or_path": "any", "training.max_steps": 294}, settings=LandmarkRunConfig)
    attention = LandmarkAttentionConfig(**config.attention)
    assert attention.landmark_key == "token" and attention.include_landmark_in_loss
    assert attention.block_dropout == 0 and attention.block_weight == "landmark"
    assert config.distillation is None and not config.train_teacher
