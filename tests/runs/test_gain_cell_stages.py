"""The two-stage chain onto gain cells, at toy size on the demo text: stages, figures, resuming, refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import make_gpt2
from tiny_runs import make_teacher_directory
from transformers import AutoModelForCausalLM

import linearize
from linearize import UserError
from linearize.cli import main
from linearize.config.presets import all_presets
from linearize.runs.settings import resolve_run, run_values
from linearize.stages.adaptation import load_statistics

DEMO_TEXT = Path(linearize.__file__).parent / "demo_text"


@pytest.fixture
def settings(tmp_path):
    teacher = make_teacher_directory(tmp_path / "teacher", make=make_gpt2, n_positions=64)
    training = {
        "kind": "train", "weights": "all", "teacher": "yardstick",
        "max_steps": 6, "batch_size": 4, "tokens_per_step": 256, "learning_rate": 3e-3, "warmup_steps": 1,
        "eval_steps": 3, "eval_tokens": 1024, "save_steps": 3,
    }  # fmt: skip
    refining = {"weights": "mechanism", "teacher": "linear", "labels_weight": 0}
    cell = {"tile": 8, "score_saturation": 20.0, "output_saturation": 10.0}
    return {
        "model_name_or_path": str(teacher),
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
        "attention": {"type": "gain_cell", "window": 32, "cell": cell, "cell_kind": "linear"},
        "data": {
            "dataset": str(DEMO_TEXT / "train.jsonl.gz"),
            "validation": str(DEMO_TEXT / "validation.jsonl.gz"),
            "sequence_length": 64,
            "max_tokens": 20_000,
            "cache_dir": str(tmp_path / "cache"),
        },
        "yardstick": "same_tokens",
        "stages": {
            "scalers": {"kind": "calibrate", "sequences": 8},
            "transfer": {
                **{"kind": "transfer", "branch": "mixed"},
                **{"max_steps": 2, "tokens_per_step": 256, "batch_size": 4},
            },
            "linear": training,
            "adapted": {
                **{"kind": "adapt", "attention": {"cell_kind": "nonlinear"}},
                **{"sequences": 8, "batch_size": 8, "iterations": 12},
            },
            "refined": {**training, **refining, "max_steps": 4, "learning_rate": 1e-2},
            "nonlinear": training,
        },
        "evaluation": {"max_tokens": 1024},
    }


ROWS = [
    "teacher",
    "student after conversion",
    "teacher + training on the same tokens",
    "student after calibration",
    "student after attention transfer",
    "student after linear",
    "student after adapted, before its scalers change",
    "student after adapted",
    "student after refined",
    "student",
]
TOKENS = {"scalers": 0, "transfer": 512, "linear": 1536, "adapted": 0, "refined": 1024, "nonlinear": 1536}


def test_the_stages_leave_figures_and_a_repository(settings, tmp_path, capsys):
    out = linearize.run(settings).output_dir
    report = json.loads((out / "report.json").read_text())
    rows = report["evaluation"]["rows"]
    assert [row["name"] for row in rows] == ROWS
    assert {name: done["tokens"] for name, done in report["stages"].items()} == {"yardstick": 4096, **TOKENS}
    found = {row["name"]: row["perplexity"] for row in rows}
    assert found["student after linear"] < found["student after attention transfer"]
    assert found["student"] < found["student after adapted"]
    assert report["stages"]["adapted"]["residuals"][0] > min(report["stages"]["adapted"]["residuals"])
    assert all((out / "plots" / f"{name}.png").stat().st_size > 5000 for name in ("adapted", "perplexity"))
    assert set(load_statistics(out / "adapted")) >= {"0.query_scaler", "1.output_scaler"}
    adapted, refined = (linearize.load_student(out / name).state_dict() for name in ("adapted", "refined"))
    moved = {name for name, weight in adapted.items() if not torch.equal(weight, refined[name])}
    assert moved and all("_scaler." in name for name in moved)
    final = AutoModelForCausalLM.from_pretrained(out / "final", trust_remote_code=True)
    assert final.config.mixer(0).cell_kind == "nonlinear" and final.config.mixer(0).window == 32
    start = linearize.load_student(out / "transfer")
    assert start.config.mixer(0).cell_kind == "linear"
    weights = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(start.state_dict()[weights], final.state_dict()[weights])
    assert "student after refined" in capsys.readouterr().out
    with pytest.raises(UserError, match="already holds a run"):
        linearize.run(settings)

    # A run that lost its last stages goes on and gives the same figures.
    for name in (
        "refined",
        "yardstick",
        "final",
        *(f"checkpoints/{x}" for x in ("refined", "nonlinear", "yardstick")),
    ):
        shutil.rmtree(out / name)
    (out / "report.json").unlink()
    linearize.run({**settings, "resume_from_checkpoint": True})
    again = json.loads((out / "report.json").read_text())
    for before, after in zip(rows, again["evaluation"]["rows"], strict=True):
        assert after["perplexity"] == pytest.approx(before["perplexity"], rel=1e-4), before["name"]
    teachers = [dict(x["stages"]["yardstick"]["validation"]) for x in (report, again)]
    assert teachers[1] == pytest.approx(teachers[0], rel=1e-4)


def test_presets_are_valid():
    kinds = {preset.name: run_values(preset.name) for preset in all_presets() if preset.command == "run"}
    chains = {
        name for name, values in kinds.items()
        if any((stage or {}).get("kind") == "adapt" for stage in values["stages"].values())
    }  # fmt: skip
    assert chains == {"gpt2_gain_cell", "gpt2_mini_gain_cell", "gpt2_published", "smollm2_gain_cell"}
    for name in chains:
        config = resolve_run(name)
        before = linearize.GainCellAttentionConfig(**config.attention)
        changes = [stage.attention for stage in config.stages.values() if stage.kind == "adapt"]
        assert before.cell_kind == "linear" and changes == [{"cell_kind": "nonlinear"}]
        linearize.GainCellAttentionConfig(**{**config.attention, **changes[0]})
    published = resolve_run("gpt2_published")
    assert published.stages["linear"].tokens_per_step == 1920 * 1024
    assert list(published.stages) == ["scalers", "linear", "adapted", "nonlinear"] and published.yardstick is None
    assert published.stages["linear"].teacher is None and published.stages["nonlinear"].teacher is None


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--attention.type", "linear"], "Unknown setting attention.cell"),
        (["--attention", '{"type": "linear"}'], "adapts the scalers of gain_cell attention"),
        (["--attention.cell_kind", "nonlinear"], "makes cells nonlinear, which they are"),
        (["--transfer.branch", "both"], "set transfer.branch to mixed"),
        (["--scalers.sequences", "0"], "at least 1"),
        (["--refined.teacher", "nonlinear"], "comes after it"),
        (["--refined.weights", "lora"], "Unknown setting teacher"),
        (["--adapted.damping", "2"], "at most 1"),
        (["--linear.colour", "1"], "colour"),
        (["--yardstick", "none"], "but none is trained"),
    ],
)
def test_bad_input_is_one_sentence(flags, sentence, settings, tmp_path, capsys):
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    assert main(["run", str(tmp_path / "chain.yaml"), *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error and not (tmp_path / "out").exists()
