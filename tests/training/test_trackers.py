"""Trackers: one project and one run for all stages of a run directory, their names as prefixes."""

import json
import math

import pytest
import torch
from accelerate import tracking
from tiny_models import make_student, make_teacher

from linearize.config.settings import FinetuneConfig, TransferConfig
from linearize.data.sequences import TokenBlocks
from linearize.errors import UserError
from linearize.stages.finetuning import finetune
from linearize.stages.transfer import transfer_attention
from linearize.training.log import TrainingLog, read_log

LENGTH = 16
STEPS = {"batch_size": 2, "tokens_per_step": 2 * LENGTH, "logging_steps": 1, "save_steps": 100}
BLOCKS = TokenBlocks(torch.randint(3, 97, (8, LENGTH), generator=torch.Generator().manual_seed(5)))


@pytest.fixture
def calls(monkeypatch):
    """What trackers are told, in order."""
    told = []

    class Recorder(tracking.GeneralTracker):
        requires_logging_directory, tracker = False, None

        def __init__(self, project, **options):
            super().__init__()
            told.append((self.name, "start", project, options))

        def store_init_configuration(self, values):
            json.dumps(values)
            told.append((self.name, "settings", values))

        def log(self, values, step=None, **kwargs):
            told.append((self.name, "log", step, values))

        def finish(self):
            told.append((self.name, "finish"))

    class InFolder(Recorder):
        requires_logging_directory = True

    for name, kind in (("wandb", Recorder), ("trackio", Recorder), ("tensorboard", InFolder)):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, type(name, (kind,), {"name": name}))
    kinds = [tracking.LoggerType(name) for name in ("wandb", "trackio", "tensorboard")]
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: kinds)
    return told


def student():
    torch.manual_seed(0)
    return make_student(make_teacher(), {"linear": {"type": "linear", "window": 4, "sinks": 1}})


def train(path, kinds, transfer_steps=3, finetune_steps=2, **options):
    model = student()
    config = TransferConfig(max_steps=transfer_steps, **STEPS)
    transfer_attention(model, BLOCKS, config, output_dir=path, report_to=kinds, **options)
    finetune(model, BLOCKS, FinetuneConfig(max_steps=finetune_steps, **STEPS), output_dir=path, report_to=kinds)


def test_the_stages_are_one_run(calls, tmp_path):
    train(tmp_path / "mine", "wandb")
    starts = [call[2:] for call in calls if call[1] == "start"]
    assert len(starts) == 2 and starts[0] == starts[1]
    project, options = starts[0]
    assert project == "linearize" and options["id"].startswith("mine-") and options["resume"] == "allow"
    assert [call[1] for call in calls].count("finish") == 2 and calls[-1][1] == "finish"
    logged = [(step, values) for _, what, step, values in (call for call in calls if call[1] == "log")]
    steps = [step for step, values in logged if any(name.endswith("/loss") for name in values)]
    assert steps == [1, 2, 3, 4, 5]
    assert [step for step, values in logged if "finetune/train_loss" in values] == [5]  # what no log file has
    assert {name.split("/")[0] for step, values in logged if step > 3 for name in values} == {"finetune"}
    for stage, first in (("transfer", 0), ("finetune", 3)):
        for record in read_log(tmp_path / "mine" / "logs" / f"{stage}.jsonl"):
            (found,) = (v for step, v in logged if step == first + record["step"] and f"{stage}/loss" in v)
            numbers = {f"{stage}/{key}": x for key, x in record.items() if isinstance(x, (int, float))}
            assert found == numbers and math.isfinite(found[f"{stage}/loss"])
    settings = [call[2] for call in calls if call[1] == "settings"]
    assert settings[0]["transfer/max_steps"] == 3 and settings[1]["finetune/max_steps"] == 2


def test_a_resumed_stage_goes_on_in_its_run(calls, tmp_path):
    train(tmp_path, "trackio")
    config = TransferConfig(max_steps=3, **STEPS)
    transfer_attention(student(), BLOCKS, config, output_dir=tmp_path, report_to="trackio", resume=True)
    names = [call[3]["name"] for call in calls if call[1] == "start"]
    assert len(names) == 3 and len(set(names)) == 1
    longer = FinetuneConfig(max_steps=3, **STEPS)
    finetune(student(), BLOCKS, longer, output_dir=tmp_path, report_to="trackio", resume=True)
    assert [call[2] for call in calls if call[1] == "log" and "finetune/loss" in call[3]] == [4, 5, 6]
    train(tmp_path / "other", "trackio", 1, 1)
    assert calls[-1][1] == "finish" and len({call[3]["name"] for call in calls if call[1] == "start"}) == 2


def test_every_tracker_is_told(calls, tmp_path):
    log = TrainingLog(tmp_path / "logs" / "a" / "b.jsonl", report_to="all", settings={"rate": 0.1, "shares": [1, 2]})
    log.write({"step": 2, "loss": 1.0, "layer_losses": [1.0], "note": None})
    log.close()
    for name in ("wandb", "trackio", "tensorboard"):
        told = [call[1:] for call in calls if call[0] == name]
        assert told[-2:] == [("log", 2, {"a/b/step": 2, "a/b/loss": 1.0}), ("finish",)]
        assert told[0][2].get("logging_dir") == (str(tmp_path / "logs") if name == "tensorboard" else None)
    settings = {call[0]: call[2] for call in calls if call[1] == "settings"}
    assert settings == dict.fromkeys(("wandb", "trackio"), {"a/b/rate": 0.1, "a/b/shares": "[1, 2]"})


def test_a_stage_of_no_steps_ends_its_trackers(calls, tmp_path):
    train(tmp_path, "wandb", 0, 0)
    assert [call[1] for call in calls] == ["start", "settings", "finish"] * 2


@pytest.mark.parametrize("stage", [transfer_attention, finetune])
def test_unknown_trackers_are_refused_before_anything_is_written(stage, tmp_path):
    config = (TransferConfig if stage is transfer_attention else FinetuneConfig)(max_steps=1, **STEPS)
    with pytest.raises(UserError, match="unknown tracker 'crayon'"):
        stage(student(), BLOCKS, config, output_dir=tmp_path / "out", report_to="crayon")
    assert not (tmp_path / "out").exists()
