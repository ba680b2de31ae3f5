"""Every kind of training: SIGTERM, a full disk, and other data or another base under the same names."""

import contextlib
import copy
import resource
import shutil
import signal
from pathlib import Path

import pytest
from glue_toys import make_inputs
from glue_toys import settings as glue_settings
from safetensors.torch import load_file, save_file
from tiny_models import make_gpt2
from tiny_runs import make_bert_directory, make_teacher_directory, write_text
from transformers import BertForMaskedLM

from linearize import failures, files
from linearize.config.yaml_io import to_values
from linearize.runs.engine import run
from linearize.runs.glue import run_glue
from linearize.training.log import TrainingLog
from linearize.training.stage_trainer import StageTrainer

LITTLE = 40_000
"""Bytes of a file on a disk that is nearly full: less than any file of weights here."""


def common(root, **changes):
    write_text(root / "text.jsonl", documents=30)
    data = {"dataset": str(root / "text.jsonl"), "validation_documents": 4, "sequence_length": 32}
    return {
        "model_name_or_path": str(root / "teacher"),
        "output_dir": str(root / "out"),
        "device": "cpu",
        "data": {**data, "cache_dir": str(root / "cache")},
        "evaluation": None,
        **changes,
    }


STEPS = {
    "max_steps": 3,
    "batch_size": 2,
    "tokens_per_step": 64,
    "logging_steps": 1,
    "save_steps": 1,
}
FULL = {"kind": "train", "weights": "all", **STEPS, "warmup_steps": 0}


def pretraining(root):
    make_teacher_directory(root / "teacher", make=make_gpt2)
    return run, common(root, attention=None, stages={"training": FULL}), "checkpoints/training"


def encoder(root):
    make_bert_directory(root / "teacher", kind=BertForMaskedLM)
    attention = {"type": "linear", "window": 3, "sinks": 1}
    stages = {"transfer": {"kind": "transfer", **STEPS, "max_steps": 1}, "mlm": {**FULL, "objective": "masked"}}
    return run, common(root, attention=attention, stages=stages), "checkpoints/mlm"


def landmark(root):
    make_teacher_directory(root / "teacher")
    attention = {"type": "landmark", "block_size": 8, "top_k": 2}
    stages = {"calibrate": {"kind": "calibrate", "sequences": 2}, "landmark": {**FULL, "teacher": "base"}}
    return run, common(root, attention=attention, stages=stages), "checkpoints/landmark"


def glue(root):
    inputs = make_inputs(root)
    own = {"tasks": ["stsb"], "models": [str(inputs / "student")], "training__max_steps": 3}
    return run_glue, to_values(glue_settings(inputs, root / "out", **own)), "checkpoints/student/stsb/lr2e-05-seed0"


KINDS = [pretraining, encoder, landmark, glue]


@pytest.fixture
def call(capsys):
    """A kind of run with settings, as the command line does it; exit code and sentence."""

    def run(function, settings, **changes):
        capsys.readouterr()
        code = failures.guarded(function, {**copy.deepcopy(settings), **changes})
        return code, "".join(x for x in capsys.readouterr().err.splitlines() if x.startswith("linearize: "))

    return run


def steps(root, checkpoints):
    return sorted(path.name for path in (root / "out" / checkpoints).iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_sigterm_saves_and_leaves_with_143(kind, tmp_path, call, monkeypatch):
    function, settings, checkpoints = kind(tmp_path)
    write = TrainingLog.write

    def terminated(log, record):
        write(log, record)
        if record["step"] == 2 and "loss" in record and log.path.stem != "transfer":
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLog, "write", terminated)
        code, sentence = call(function, settings)
    assert code == 143 and sentence.startswith("linearize: terminated")
    assert steps(tmp_path, checkpoints)[-1] in ("step-2", "step-3")
    assert call(function, settings, resume_from_checkpoint=True)[0] == 0


@contextlib.contextmanager
def little_space():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LITTLE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_full_disk_at_a_checkpoint_and_at_the_end(kind, tmp_path, call, monkeypatch):
    """One sentence, nothing half-written and nothing lost: the run goes on where there is space again."""
    function, settings, checkpoints = kind(tmp_path)
    save, whole = StageTrainer._save_checkpoint, files.atomic_directory

    def at_step_2(self, *arguments, **options):
        with little_space() if self.state.global_step == 2 else contextlib.nullcontext():
            save(self, *arguments, **options)

    @contextlib.contextmanager
    def at_the_end(target):
        with whole(target) as partial, little_space() if Path(target).name == "final" else contextlib.nullcontext():
            yield partial

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "_save_checkpoint", at_step_2)
        code, sentence = call(function, settings)
    assert code == 2 and ("cannot write" in sentence or "no space left" in sentence) and "step-2" in sentence
    assert steps(tmp_path, checkpoints) == ["step-1"]
    with monkeypatch.context() as patch:
        patch.setattr(files, "atomic_directory", at_the_end)
        code, sentence = call(function, settings, resume_from_checkpoint=True)
    assert code == 2 and "final" in sentence and ("cannot write" in sentence or "no space left" in sentence)
    assert steps(tmp_path, checkpoints)[-1] == "step-3"
    assert not list((tmp_path / "out").rglob("*final*"))
    assert call(function, settings, resume_from_checkpoint=True)[0] == 0


@pytest.mark.parametrize("kind", KINDS[:3])
def test_other_data_and_another_base_under_the_same_names(kind, tmp_path, call, monkeypatch):
    function, settings, checkpoints = kind(tmp_path)
    assert call(function, settings)[0] == 0
    shutil.rmtree(tmp_path / "out" / "final")
    text, weights = tmp_path / "text.jsonl", tmp_path / "teacher" / "model.safetensors"
    own = text.read_text()
    write_text(text, documents=30, seed=1)
    code, sentence = call(function, settings, resume_from_checkpoint=True)
    assert code == 2 and "other training data" in sentence
    text.write_text(own)
    other = {name: tensor * 1.01 for name, tensor in load_file(weights).items()}
    save_file(other, weights, metadata={"format": "pt"})
    code, sentence = call(function, settings, resume_from_checkpoint=True)
    assert code == 2 and "another base model" in sentence
