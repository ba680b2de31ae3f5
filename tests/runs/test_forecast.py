"""What a run says before its first step: it is said before anything trains, and of random weights too."""

import pytest
from tiny_runs import make_teacher_directory, write_text

from linearize.runs.engine import RunOfStages, rehearse, run
from linearize.runs.plan import RunPlan

STAGE = {"kind": "train", "weights": "all", "max_steps": 1, "batch_size": 1, "tokens_per_step": 64}


@pytest.fixture
def settings(tmp_path):
    teacher, text = make_teacher_directory(tmp_path / "teacher"), write_text(tmp_path / "text.jsonl")
    return {
        "model_name_or_path": str(teacher),
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
        "attention": {"type": "gain_cell", "window": 64, "cell_kind": "linear"},
        "data": {
            "dataset": str(text),
            "sequence_length": 64,
            "validation_documents": 6,
            "cache_dir": str(tmp_path / "cache"),
        },
        "stages": {"linear": {**STAGE, "teacher": "yardstick"}},
        "yardstick": "same_tokens",
        "evaluation": None,
    }


def test_the_plan_is_shown_before_the_yardstick_trains(settings, monkeypatch):
    """The teacher's training takes as long as the student's: it is in what the plan says, and comes after it."""
    said, trains = [], RunOfStages._train_whole_yardstick
    monkeypatch.setattr(RunPlan, "show", lambda plan: said.append(plan.forecast.headline()))

    def train(self, *arguments):
        assert said, "the yardstick trains before the plan is shown"
        said.append("yardstick")
        return trains(self, *arguments)

    monkeypatch.setattr(RunOfStages, "_train_whole_yardstick", train)
    result = run(settings)
    assert said[0].startswith("About") and said[1:] == ["yardstick"]
    assert (result.output_dir / "yardstick" / "config.json").is_file()


def test_the_yardstick_is_timed(settings):
    assert rehearse(settings).forecast.seconds.keys() == {"linear", "yardstick"}


def test_random_weights_are_timed(settings):
    del settings["yardstick"], settings["model_name_or_path"]
    settings["architecture"] = {"type": "llama", "n_layer": 1, "n_head": 2, "n_embd": 32}
    settings["tokenizer"] = {"source": "train", "vocab_size": 300}
    settings["stages"] = {"linear": STAGE}
    forecast = rehearse(settings).forecast
    assert forecast.seconds.keys() == {"linear"} and forecast.headline() and forecast.disk
