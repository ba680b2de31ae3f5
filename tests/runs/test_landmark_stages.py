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
from linearize.config.presets import all_presets
from linearize.config.record import read_record
from linearize.evaluation.by_length import MATCHED
from linearize.runs.settings import resolve_run, run_values

BEFORE, FITTED, TRAINED = "student after conversion", "student after calibration", "student after landmark"
TEACHER = "teacher + training on the same tokens"
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
        "attention": {"type": "landmark", "block_size": 8, "top_k": 3, "block_dropout": 0.8},
        "sliding_window": "lift",
        "data": data,
        "yardstick": "same_tokens",
        "stages": {
            "calibrate": {"kind": "calibrate", "sequences": 64},
            "landmark": {
                "kind": "train", "weights": "all", "teacher": "yardstick",
                "max_steps": 6, "batch_size": 4, "tokens_per_step": 256, "learning_rate": 3e-3, "warmup_steps": 1,
                "eval_steps": 3, "eval_tokens": 1024, "save_steps": 3,
            },
        },
        "evaluation": {"max_tokens": 1024},
    }  # fmt: skip


def untrained(settings):
    """What the runs here start from, its keys not fitted."""
    torch.manual_seed(0)
    return linearize.convert(settings["model_name_or_path"], LandmarkAttentionConfig(**settings["attention"]))


def test_all_weights(settings, tmp_path, capsys):
    out = linearize.run(settings).output_dir
    report = json.loads((out / "report.json").read_text())
    rows = report["evaluation"]["rows"]
    assert [row["name"] for row in rows] == ["teacher", BEFORE, TEACHER, FITTED, "student"]
    tokens = {"yardstick": 1536, "calibrate": 0, "landmark": 1536}
    assert {name: done["tokens"] for name, done in report["stages"].items()} == tokens
    found = {row["name"]: row["perplexity"] for row in rows}
    assert found["student"] < found[FITTED] and found[TEACHER] < found["teacher"]
    assert (out / "plots" / "perplexity.png").stat().st_size > 5000
    start = untrained(settings).state_dict()
    final = AutoModelForCausalLM.from_pretrained(out / "final", trust_remote_code=True)
    assert final.config.mixer(0).block_dropout == 0.8 and final.config.sliding_window is None
    moved = {name for name, weight in final.state_dict().items() if not torch.equal(weight, start[name])}
    assert {"model.mixer.embedding", "model.layers.0.self_attn.q_proj.weight"} <= moved
    shown = capsys.readouterr().out
    lengths = report["evaluation"]["by_length"]
    assert {figure["name"] for figure in lengths["figures"]} == {TEACHER, f"{TEACHER}, {MATCHED}", "student"}
    assert {figure["times"] for figure in lengths["figures"]} >= {1, 4} and lengths["reference"] == TEACHER
    for where in (shown, (out / "final" / "README.md").read_text()):
        assert "Perplexity by length, trained at" in where
    assert FITTED in shown and (out / "plots" / "evaluation_by_length.png").is_file()
    with pytest.raises(UserError, match="already holds a run"):
        linearize.run(settings)

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
    settings["attention"]["block_weight"] = "tokens"
    settings["stages"]["landmark"]["teacher"] = "base"
    settings["stages"]["fitted"] = {"kind": "calibrate", "sequences": 64}
    settings |= {"yardstick": None}
    out = linearize.run(settings).output_dir
    assert capsys.readouterr().out.count("calibration: ") == 2
    rows = json.loads((out / "report.json").read_text())["evaluation"]["rows"]
    assert [row["name"] for row in rows] == ["teacher", BEFORE, "student after calibrate", TRAINED, "student"]
    trained, final = (linearize.load_student(out / name).state_dict() for name in ("landmark", "final"))
    without = {"calibrate": settings["stages"]["calibrate"]}  # as the first run was before anything trained
    start = linearize.run({**settings, "stages": without, "output_dir": f"{out}-start", "dtype": "float32"}).final
    start = linearize.load_student(start).state_dict()
    for name in final:
        again = ".mixer.keys." in name
        assert torch.equal(final[name], trained[name]) is not again, name
        assert not again or torch.equal(trained[name], start[name]), name
    assert read_record(out / "final")["calibration"]["sequences"] == 64
    (out / "report.json").unlink()
    linearize.run({**settings, "resume_from_checkpoint": True})
    assert json.loads((out / "report.json").read_text())["evaluation"]["rows"][-1] == rows[-1]


def test_published_labels(settings):
    settings["attention"] |= {"include_landmark_in_loss": True, "landmark_key": "token"}
    settings["stages"]["landmark"]["teacher"] = None
    out = linearize.run({**settings, "yardstick": None}).output_dir
    rows = json.loads((out / "report.json").read_text())["evaluation"]["rows"]
    assert [row["name"] for row in rows] == ["teacher", BEFORE, "student"]
    assert rows[2]["perplexity"] < rows[1]["perplexity"]
    final, start = linearize.load_student(out / "final").state_dict(), untrained(settings).state_dict()
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


def test_attention_transfer_is_refused(settings, tmp_path):
    stages = {"transfer": {"kind": "transfer", "max_steps": 2, "tokens_per_step": 256}, **settings["stages"]}
    with pytest.raises(UserError, match="set transfer to none"):
        linearize.run({**settings, "stages": stages})
    assert not (tmp_path / "out").exists()


def test_landmarks_count_among_learned_positions(settings, tmp_path):
    teacher = make_teacher_directory(tmp_path / "gpt2", make=make_gpt2, n_positions=64)
    with pytest.raises(UserError, match="data.sequence_length is 64, but .* 56 tokens with its landmarks"):
        linearize.run({**settings, "model_name_or_path": str(teacher)})
    assert not (tmp_path / "out").exists()


def test_presets_are_valid():
    names = [preset.name for preset in all_presets() if preset.command == "run"]
    attention = {name: run_values(name).get("attention") for name in names}
    found = {name for name, given in attention.items() if isinstance(given, dict) and given.get("type") == "landmark"}
    whole = {"mistral_7b_landmark_full", "landmark_published", "smollm2_landmark"}
    assert found == {"llama3_8b_landmark", "mistral_7b_landmark", *whole}
    for name in found:
        preset = resolve_run(name)
        linearize.LandmarkAttentionConfig(**preset.attention)
        trained = {stage.weights for stage in preset.stages.values() if stage.kind == "train"}
        assert trained == {"all" if name in whole else "lora"}
        assert "transfer" not in {stage.kind for stage in preset.stages.values()}
    published = resolve_run("landmark_published").stages["landmark"]
    assert published.max_steps * published.tokens_per_step == 15_000 * 128 * 512


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--attention.top_k", "0"], "at least 1 block"),
        (["--attention.block_size", "1"], "at least 2"),
        (["--attention.max_blocks", "2"], "at least top_k"),
        (["--attention.include_landmark_in_loss", "true"], "set landmark.teacher to none"),
        (["--sliding_window", "halve"], "sliding_window"),
    ],
)
def test_bad_input_is_one_sentence(flags, sentence, settings, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    assert main(["run", str(tmp_path / "run.yaml"), *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error and not (tmp_path / "out").exists()


COMMAND = re.compile(r"(?:linearize run|linearize_landmark\.py) ((?:.*\\\n)*.*)")


def printed_commands():
    """Preset and settings of each command that trains landmark attention in README and results."""
    root = Path(__file__).parents[2]
    for page in ("README.md", "docs/results.md"):
        for command in COMMAND.findall((root / page).read_text()):
            words = shlex.split(command.replace("\\\n", " "), comments=True)
            if "landmark" in " ".join(words[:2]):
                given = [] if words[0].startswith("--") else [words.pop(0)]
                if words and not words[0].startswith("--"):
                    given.append(words.pop(0))
                flags = dict(zip(words[::2], words[1::2], strict=True))
                flags |= dict(zip(("--config", "--model_name_or_path"), given, strict=False))
                yield {name.removeprefix("--"): yaml.safe_load(value) for name, value in flags.items()}


def test_printed_commands_can_be_run():
    """What the present presets make of them, up to the attention of the student."""
    commands = list(printed_commands())
    assert len(commands) >= 3
    for flags in commands:
        if "data" in flags:
            flags["data.dataset"] = flags.pop("data")
        config = resolve_run(flags.pop("config"), flags)
        LandmarkAttentionConfig(**config.attention)


def test_the_published_preset_is_the_published_training():
    """On any model: landmarks' own keys and labels, every block open, no teacher."""
    config = resolve_run("landmark_published", {"model_name_or_path": "any", "landmark.max_steps": 294})
    attention = LandmarkAttentionConfig(**config.attention)
    assert attention.landmark_key == "token" and attention.include_landmark_in_loss
    assert attention.block_dropout == 0 and attention.block_weight == "landmark"
    assert config.stages["landmark"].teacher is None and config.yardstick is None
