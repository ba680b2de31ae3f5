"""The two-stage run onto gain cells, at toy size on the demo text: stages, figures, resuming, refusals."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import make_gpt2
from tiny_runs import make_teacher_directory
from transformers import AutoModelForCausalLM

import linearize
from linearize import UserError
from linearize.cli import main
from linearize.config.yaml_io import preset_names, resolve
from linearize.runs.gain_cell import GainCellRunConfig, run_gain_cell
from linearize.stages.adaptation import load_statistics

DEMO_TEXT = Path(linearize.__file__).parent / "demo_text"


@pytest.fixture
def settings(tmp_path):
    teacher = make_teacher_directory(tmp_path / "teacher", make=make_gpt2, n_positions=64)
    training = {
        "max_steps": 6, "batch_size": 4, "tokens_per_step": 256, "learning_rate": 3e-3, "warmup_steps": 1,
        "eval_steps": 3, "eval_tokens": 1024, "save_steps": 3,
    }  # fmt: skip
    return {
        "model_name_or_path": str(teacher),
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
        "attention": {"window": 32, "cell": {"tile": 8, "score_saturation": 20.0, "output_saturation": 10.0}},
        "data": {
            "dataset": str(DEMO_TEXT / "train.jsonl.gz"),
            "validation": str(DEMO_TEXT / "validation.jsonl.gz"),
            "sequence_length": 64,
            "max_tokens": 20_000,
            "cache_dir": str(tmp_path / "cache"),
        },
        "transfer": {"max_steps": 2, "tokens_per_step": 256, "batch_size": 4, "branch": "mixed"},
        "linear": training,
        "refinement": {**training, "max_steps": 4, "learning_rate": 1e-2},
        "nonlinear": training,
        "adaptation": {"iterations": 12, "batch_size": 8},
        "statistics_sequences": 8,
    }


ROWS = [
    ("teacher", 0),
    ("teacher, trained on the same tokens", 4096),
    ("linear cell, before stage A", 0),
    ("linear cell, after stage A", 1536),
    ("nonlinear cell, not adapted", 1536),
    ("nonlinear cell, adapted", 1536),
    ("nonlinear cell, adapted and refined", 2560),
    ("nonlinear cell, after stage B", 4096),
]


def test_the_stages_leave_figures_and_a_repository(settings, tmp_path, capsys):
    out = run_gain_cell(settings)
    report = json.loads((out / "report.json").read_text())
    assert [(row["name"], row["tokens"]) for row in report["rows"]] == ROWS
    found = {row["name"]: row["perplexity"] for row in report["rows"]}
    assert found["linear cell, after stage A"] < found["linear cell, before stage A"]
    assert found["nonlinear cell, after stage B"] < found["nonlinear cell, adapted"]
    assert report["adaptation"]["residuals"][0] > min(report["adaptation"]["residuals"])
    assert all((out / "plots" / f"{name}.png").stat().st_size > 5000 for name in ("adaptation", "perplexity"))
    assert set(load_statistics(out / "adapted")) >= {"0.query_scaler", "1.output_scaler"}
    adapted, refined = (linearize.load_student(out / name).state_dict() for name in ("adapted", "refined/final"))
    moved = {name for name, weight in adapted.items() if not torch.equal(weight, refined[name])}
    assert moved and all("_scaler." in name for name in moved)
    final = AutoModelForCausalLM.from_pretrained(out / "final", trust_remote_code=True)
    assert final.config.mixer(0).cell_kind == "nonlinear" and final.config.mixer(0).window == 32
    start = linearize.load_student(out / "start")
    assert start.config.mixer(0).cell_kind == "linear"
    weights = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(start.state_dict()[weights], final.state_dict()[weights])
    assert "nonlinear cell, after stage B" in capsys.readouterr().out
    with pytest.raises(UserError, match="already holds a run"):
        run_gain_cell(settings)

    # A run that lost its last stages goes on and gives the same figures.
    import shutil

    for name in ("nonlinear", "refined", "teacher", "final"):
        shutil.rmtree(out / name)
    (out / "report.json").unlink()
    run_gain_cell({**settings, "resume_from_checkpoint": True})
    again = json.loads((out / "report.json").read_text())
    for before, after in zip(report["rows"], again["rows"], strict=True):
        assert after["perplexity"] == pytest.approx(before["perplexity"], rel=1e-4), before["name"]


def test_presets_are_valid():
    names = set(preset_names(GainCellRunConfig))
    assert names == {"gpt2_gain_cell", "gpt2_mini_gain_cell", "gpt2_published", "smollm2_gain_cell"}
    for name in names:
        config = resolve(name, settings=GainCellRunConfig)
        linearize.GainCellAttentionConfig(**config.attention_of("linear"))
    published = resolve("gpt2_published", settings=GainCellRunConfig)
    assert published.linear.tokens_per_step == 1920 * 1024
    assert published.transfer is None and published.refinement is None and published.distillation is None


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--attention.type", "linear"], "gain_cell"),
        (["--attention.cell_kind", "linear"], "each stage"),
        (["--transfer.branch", "both"], "no branches"),
        (["--statistics_sequences", "0"], "at least 1"),
        (["--refinement.train", "all"], "must be scalers"),
        (["--adaptation.damping", "2"], "at most 1"),
        (["--linear.colour", "1"], "colour"),
    ],
)
def test_bad_input_is_one_sentence(flags, sentence, tmp_path, capsys):
    assert main(["gain-cell", "--output_dir", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error and not (tmp_path / "out").exists()
