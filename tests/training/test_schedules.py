"""Learning rates over a run: transformers' schedules in every stage, with the same warm-up."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_student, make_teacher
from transformers import get_scheduler

from linearize.config.settings import FinetuneConfig, TransferConfig
from linearize.data.sequences import TokenBlocks
from linearize.stages.finetuning import finetune
from linearize.stages.transfer import transfer_attention
from linearize.training.log import read_log
from linearize.training.loop import SCHEDULERS

LENGTH, STEPS = 16, 6
RATES = {"linear": {"type": "linear", "window": 4, "sinks": 1}}


def old_factor(step, steps, schedule):
    """The formula that stage 1 had before, without warm-up."""
    progress = step / max(1, steps)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def factor(schedule, steps, warmup_steps=0):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return get_scheduler(SCHEDULERS[schedule], optimizer, warmup_steps, steps).lr_lambdas[0]


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 7, 100, 999])
def test_without_warm_up_the_rates_are_those_of_the_old_formula(schedule, steps):
    found, old = factor(schedule, steps), [old_factor(step, steps, schedule) for step in range(steps)]
    if schedule == "linear":  # (n - i) / n for 1 - i / n: float64's last bit, which an optimiser in float32 rounds off
        assert [found(step) for step in range(steps)] == pytest.approx(old, rel=0, abs=2**-53)
    else:
        assert [found(step) for step in range(steps)] == old
    for rate in (1e-2, 3e-2, 3e-3):
        updates = [
            torch.tensor([rate * value(step) / (1 - 0.9 ** (step + 1)) for step in range(steps)], dtype=torch.float32)
            for value in (found, old.__getitem__)
        ]
        assert torch.equal(*updates)


def blocks():
    return TokenBlocks(torch.randint(3, 97, (8, LENGTH), generator=torch.Generator().manual_seed(5)))


def settings(kind, **changes):
    values = {"max_steps": STEPS, "batch_size": 2, "tokens_per_step": 2 * LENGTH, "logging_steps": 1}
    return kind(**{**values, "save_steps": 100, "learning_rate": 1e-3, **changes})


def student():
    torch.manual_seed(0)
    return make_student(make_teacher(), RATES)


@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_stage_1_without_warm_up_trains_to_the_weights_of_the_old_formula(schedule, tmp_path, monkeypatch):
    def train(name):
        model = student()
        transfer_attention(model, blocks(), settings(TransferConfig, schedule=schedule), output_dir=tmp_path / name)
        return model.mixer_state_dict()

    weights = [train("new")]
    old = SimpleNamespace(lr_lambdas=[lambda step: old_factor(step, STEPS, schedule)])
    monkeypatch.setattr("linearize.stages.transfer.get_scheduler", lambda *_: old)
    weights.append(train("old"))
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    before = student().mixer_state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_the_stages_have_the_same_warm_up(schedule, tmp_path):
    changes = {"schedule": schedule, "warmup_steps": 2}
    transfer_attention(student(), blocks(), settings(TransferConfig, **changes), output_dir=tmp_path)
    finetune(student(), blocks(), settings(FinetuneConfig, **changes), output_dir=tmp_path)
    rates = [
        [record["learning_rate"] for record in read_log(tmp_path / "logs" / f"{stage}.jsonl")]
        for stage in ("transfer", "finetune")
    ]
    assert rates[0] == pytest.approx(rates[1], rel=1e-12) and len(rates[0]) == STEPS
    assert rates[0][:3] == pytest.approx([0.0, 0.5e-3, 1e-3])
