"""What each mechanism and each op owes: a paper, a preset, tests, both kernel files' contracts."""

import importlib
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

import linearize
from linearize.modeling import ATTENTIONS, BACKBONES
from linearize.modeling.registry import mechanism

ROOT = Path(__file__).parents[2]
OPS = sorted(folder.name for folder in (ROOT / "kernels").iterdir() if (folder / "__init__.py").is_file())


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_mechanism_is_complete(name):
    entry = ATTENTIONS[name]
    assert {entry.attention.__name__, entry.config.__name__} <= set(linearize.__all__)
    assert entry.paper.startswith("https://arxiv.org/") and entry.title
    assert is_dataclass(entry.config) and {"type", "contract"} <= {field.name for field in fields(entry.config)}
    assert entry.config().type == name
    assert (ROOT / "modeling" / f"attention_{name}.py").is_file()
    presets = [yaml.safe_load(path.read_text()) for path in (ROOT / "recipes" / "configs").rglob("*.yaml")]
    given = [preset["attention"] for preset in presets if isinstance(preset.get("attention"), dict)]  # or none
    assert any(attention.get("type") == name for attention in given)


def test_unknown_mechanism_lists_the_known():
    with pytest.raises(ValueError, match="linear"):
        mechanism("fourier")


@pytest.mark.parametrize("name", OPS)
def test_every_kernel_folder_has_its_op_and_tests(name):
    kernel = importlib.import_module(f"linearize.kernels.{name}")
    op = importlib.import_module(f"linearize.modeling.op_{name}")
    assert kernel.CONTRACT == op.CONTRACT
    assert callable(kernel.reference) and callable(kernel.unsupported)
    assert (ROOT / "tests" / "kernels" / f"test_{name}.py").is_file()


@pytest.mark.parametrize("name", OPS)
def test_every_fused_kernel_has_tests_a_derivation_and_a_benchmark(name):
    if "fused" not in importlib.import_module(f"linearize.kernels.{name}").__all__:
        return
    assert (ROOT / "kernels" / name / "README.md").is_file()
    assert (ROOT / "tests" / "kernels" / f"test_{name}_fused.py").is_file()
    assert list((ROOT / "tests" / "gpu").glob(f"test_{name}*.py"))
    assert name in (ROOT / "scripts" / "kernel_peers.py").read_text()


def test_there_are_ops_to_check():
    assert {"cosine", "hybrid_linear"} <= set(OPS)


@pytest.mark.parametrize("name", BACKBONES)
def test_students_register_under_their_own_type(name):
    from transformers import CONFIG_MAPPING

    backbone = BACKBONES[name]
    assert backbone.config.model_type == f"linearized_{name}"
    assert CONFIG_MAPPING[backbone.config.model_type] is backbone.config
