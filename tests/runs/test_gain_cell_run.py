"""A whole run onto gain cells: plan, attention transfer of the scalers, LoRA, report, and the repository left."""

import copy

import pytest
import torch
from tiny_models import make_gpt2, make_teacher
from tiny_runs import make_teacher_directory, tiny_config, write_text
from transformers import AutoModelForCausalLM

import linearize
from linearize.errors import UserError
from linearize.runs import engine

SMALL = {"tile": 8, "score_saturation": 20.0, "output_saturation": 10.0}
TEACHERS = {"llama": make_teacher, "gpt2": make_gpt2}


@pytest.fixture
def settings(request, tmp_path):
    make = TEACHERS[getattr(request, "param", "llama")]
    teacher = make_teacher_directory(tmp_path / "teacher", make=make)
    config = tiny_config(teacher, write_text(tmp_path / "text.jsonl"), tmp_path / "out", tmp_path / "cache")
    config["attention"] = {"type": "gain_cell", "window": 16, "cell": SMALL, "cell_kind": "linear"}
    config["stages"]["transfer"]["branch"] = "mixed"
    return config


@pytest.mark.parametrize("settings", TEACHERS, indirect=True)
def test_a_run_leaves_a_repository(settings, tmp_path):
    linearize.run(copy.deepcopy(settings))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final", trust_remote_code=True)
    assert model.config.mixers["gain_cell"]["cell"]["tile"] == 8
    start = linearize.convert(
        settings["model_name_or_path"], linearize.GainCellAttentionConfig(**settings["attention"])
    )
    before, after = start.mixer_state_dict(), model.mixer_state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before if "scaler.scale" in name)
    tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] <= 7
    card = (tmp_path / "out" / "final" / "README.md").read_text()
    assert "with gain-cell attention" in card and "2409.19315" in card


def test_the_plan_counts_the_scalers_and_forecasts_nothing(settings):
    transfer = engine.plan(settings).of("transfer")
    assert transfer.forecast is None and transfer.trained == {"mechanism": 2 * 2 * (4 + 2 + 2 + 4)}


def test_branches_that_are_not_there_are_named(settings):
    settings["stages"]["transfer"]["branch"] = "both"
    with pytest.raises(UserError, match="set transfer.branch to mixed"):
        linearize.run(settings)
