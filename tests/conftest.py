"""Tiny random models and tokenizers made on the spot, and the real checkpoints that `make test` fetches."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if not torch.cuda.is_available():  # read when triton is first imported: kernels then run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from tiny_models import make_student, make_teacher, perturb


@pytest.fixture
def teacher():
    return make_teacher()


@pytest.fixture
def student(teacher):
    """Window 5 and 2 sinks, its maps moved off the identity so that every parameter matters."""
    model = make_student(teacher, {"linear": {"type": "linear", "window": 5, "sinks": 2}})
    perturb(model)
    return model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real Llama checkpoint; `make test` fetches it during set-up, so it must be there."""
    root = Path(__file__).parents[1]
    path = Path(os.environ.get("LINEARIZE_SMOLLM2", root / ".cache" / "smollm2-135m-instruct"))
    assert (path / "config.json").is_file(), f"{path} is missing: run `make test`, or python scripts/fetch_smollm2.py"
    return path


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real BERT checkpoint; `make test` fetches it during set-up, so it must be there."""
    root = Path(__file__).parents[1]
    path = Path(os.environ.get("LINEARIZE_MINILM", root / ".cache" / "all-minilm-l6-v2"))
    assert (path / "config.json").is_file(), f"{path} is missing: run `make test`, or python scripts/fetch_minilm.py"
    return path
