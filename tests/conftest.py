"""Tiny random models and tokenizers made on the spot, and the real checkpoints that `make test` fetches."""

import gc
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

LONGEST = (
    "tests/recipes/test_recipes.py",
    "tests/test_readme.py",
    "tests/test_contributing.py",
    "tests/modeling/test_students.py",
    "tests/runs/test_resume_killed.py",
    "tests/stages/test_encoder_training.py",
    "tests/stages/test_pretraining_models.py",
    "tests/evaluation/test_glue.py",
    "tests/kernels/test_hybrid_linear_fused.py",
    "tests/stages/test_pairs.py",
    "tests/hub/test_hub.py",
    "tests/hub/test_weight_diff.py",
    "tests/conversion/test_landmark_import.py",
    "tests/runs/test_landmark_stages.py",
    "tests/kernels/test_cosine_fused.py",
    "tests/stages/test_calibration.py",
    "tests/runs/test_distributed.py",
    "tests/kernels/test_hybrid_linear_decode.py",
    "tests/kernels/test_salient_decode.py",
    "tests/kernels/test_landmark_fused.py",
    "tests/test_packaging.py",
    "tests/evaluation/test_minilm.py",
    "tests/modeling/test_smollm2.py",
    "tests/evaluation/test_evaluation_demo.py",
)
"""Files that take more than about 20 seconds. They come first, so that none of them runs alone at the end."""


def pytest_collection_modifyitems(config, items):
    places = {config.rootpath / name: place for place, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in places), "LONGEST in tests/conftest.py names a file that is not there"
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage():
    """Every Trainer asks for a full collection: half a second or more over what torch and transformers have imported,
    unless the collector is told to leave it out."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


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
