"""GLUE: what a resumed run runs again, what it goes on with, and what it refuses."""

import json
import shutil
import signal

import pytest
from glue_toys import examples, make_inputs, settings, write_rows
from safetensors.torch import load_file, save_file

from linearize.conversion.importers.checkpoint_files import checkpoint_digest
from linearize.errors import UserError
from linearize.runs.glue import run_glue
from linearize.stages.glue_training import GlueTrainer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("glue"))


def trained(monkeypatch):
    """Which finetunings run from here on."""
    keys, train = [], GlueTrainer.run_stage

    def noted(self, checkpoint):
        keys.append((self.task.name, self.args.seed, self.args.learning_rate))
        return train(self, checkpoint)

    monkeypatch.setattr(GlueTrainer, "run_stage", noted)
    return keys


@pytest.mark.slow
def test_a_resumed_run_runs_what_is_missing(inputs, tmp_path, monkeypatch, capsys):
    out, models = tmp_path / "out", [str(inputs / "student")]
    shutil.copytree(inputs / "files", tmp_path / "files")
    own = {"data__dataset": str(tmp_path / "files"), "models": models}
    first = run_glue(settings(inputs, out, seeds=[0, 1], **own)).report
    with pytest.raises(UserError, match="already holds a run"):
        run_glue(settings(inputs, out, **own))
    (out / "results" / "student" / "sst2" / "lr2e-05-seed1.json").unlink()
    runs = trained(monkeypatch)
    resume = {"resume_from_checkpoint": True, **own}
    again = run_glue(settings(inputs, out, seeds=[0, 1], **resume)).report
    assert runs == [("SST-2", 1, 2e-5)]
    assert [r.scores for r in again.results] == [r.scores for r in first.results]
    runs.clear()
    capsys.readouterr()
    run_glue(settings(inputs, out, seeds=[0, 1], **resume))
    assert not runs and "2 of 2 finetunings are finished" in capsys.readouterr().out

    # Seeds, tasks and models may be added; other settings may not change.
    run_glue(settings(inputs, out, tasks=["sst2", "rte"], seeds=[1, 2], **resume))
    assert runs == [("SST-2", 2, 2e-5), ("RTE", 1, 2e-5), ("RTE", 2, 2e-5)]
    with pytest.raises(UserError, match="other settings \\(training.epochs\\)"):
        run_glue(settings(inputs, out, training__epochs=2, **resume))
    changed = {**resume, "models": [str(inputs / "teacher")], "names": ["student"]}
    with pytest.raises(UserError, match="under the name student"):
        run_glue(settings(inputs, out, **changed))
    write_rows(tmp_path / "files" / "sst2" / "train.tsv", examples("sst2", 41))
    with pytest.raises(UserError, match="examples of SST-2 are others"):
        run_glue(settings(inputs, out, seeds=[0, 7], **resume))
    path = out / "results" / "student" / "sst2" / "lr2e-05-seed1.json"
    path.write_text("{")
    with pytest.raises(UserError, match="is damaged: delete it"):
        run_glue(settings(inputs, out, seeds=[1], **resume))


def overwrite_weights(directory):
    """Other weights of the same shapes and sizes in place of a model's own."""
    path = directory / "model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def stop_after(step, config, monkeypatch):
    """A run that Ctrl-C stops in a step."""
    losses, calls = GlueTrainer.losses, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return losses(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GlueTrainer, "losses", interrupted)
        run_glue(config)


def test_other_weights_are_no_longer_the_model(inputs, tmp_path, monkeypatch, capsys):
    """Neither for what is finished nor for a checkpoint, whatever the directory is called."""
    model, size = tmp_path / "model", {"tasks": ["stsb"], "training__max_steps": 4}
    shutil.copytree(inputs / "student", model)
    out, one = tmp_path / "out", {**size, "models": [str(model)]}
    first = run_glue(settings(inputs, out, **one)).report.results[0]
    assert first.weights.startswith("sha256 ")
    resume = {"resume_from_checkpoint": True, **one}
    (model / "README.md").write_text("Another card is no other model.")
    run_glue(settings(inputs, out, **resume))
    stop_after(2, settings(inputs, tmp_path / "stopped", **one), monkeypatch)
    overwrite_weights(model)
    with pytest.raises(UserError, match="The weights of .*model are others than those of .*lr2e-05-seed0.json: give"):
        run_glue(settings(inputs, out, **resume))
    with pytest.raises(UserError, match="trained with weights sha256 "):
        run_glue(settings(inputs, tmp_path / "stopped", **resume))
    other = {"models": [str(inputs / "teacher")], "names": ["model"], "training__learning_rates": [2e-5 + 1e-12]}
    with pytest.raises(UserError, match="trained with model .*, weights .*, learning_rate 2e-05"):
        run_glue(settings(inputs, tmp_path / "stopped", **{**resume, **other}))
    shutil.rmtree(model)
    run_glue(settings(inputs, out, **resume))
    assert f"{model} cannot be read now: its results are taken as they are" in capsys.readouterr().out


def test_a_commit_tells_repositories_apart(tmp_path, monkeypatch):
    files = "linearize.conversion.importers.checkpoint_files"
    monkeypatch.setattr(f"{files}.loaded_commit", lambda source, revision: f"{source}@{revision}")
    assert checkpoint_digest("me/encoder", "main") == "commit me/encoder@main"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no model.safetensors"):
        checkpoint_digest(str(tmp_path))


def test_an_interrupted_finetuning_goes_on_bit_for_bit(inputs, tmp_path, monkeypatch):
    changes = {"models": [str(inputs / "student")], "tasks": ["stsb"], "training__max_steps": 6}
    whole = run_glue(settings(inputs, tmp_path / "whole", **changes)).report
    stop_after(4, settings(inputs, tmp_path / "parts", **changes), monkeypatch)
    place = tmp_path / "parts" / "checkpoints" / "student" / "stsb" / "lr2e-05-seed0"
    assert (place / "step-4").is_dir() and not (tmp_path / "parts" / "results").exists()
    parts = run_glue(settings(inputs, tmp_path / "parts", resume_from_checkpoint=True, **changes)).report
    assert parts.results[0].scores == whole.results[0].scores and not place.exists()
    logs = [tmp_path / name / "logs/student/stsb/lr2e-05-seed0.jsonl" for name in ("whole", "parts")]
    assert logs[0].read_text() == logs[1].read_text()


def test_a_smaller_call_keeps_the_report_whole(inputs, tmp_path, capsys):
    """What is finished stays in the report, and models that were not kept are said to be none."""
    out, one = tmp_path / "out", {"models": [str(inputs / "student")]}
    run_glue(settings(inputs, out, tasks=["sst2", "stsb"], seeds=[0, 1], **one))
    before = json.loads((out / "report.json").read_text())
    capsys.readouterr()
    call = {"tasks": ["stsb"], "seeds": [1], "resume_from_checkpoint": True, "save_models": True}
    run_glue(settings(inputs, out, **call, **one))
    said = capsys.readouterr().out
    assert "1 of 1 finetunings are finished" in said and "also has 3 finetunings" in said
    assert "1 finished finetunings left no model" in said and "first student/stsb/lr2e-05-seed1.json" in said
    after = json.loads((out / "report.json").read_text())
    assert after["scores"] == before["scores"] and len(after["results"]) == 4
    more = {**call, "models": [str(inputs / "teacher")], "save_models": False}
    report = run_glue(settings(inputs, out, **more)).report
    assert report.models == ["teacher", "student"] and len(report.results) == 5
    assert "save_models" not in capsys.readouterr().out
