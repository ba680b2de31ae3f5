"""The script that measures known shapes, end to end on a tiny one; its teacher decodes what the stock model does."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from linearize.modeling.cache_names import named

SCRIPTS = str(Path(__file__).parents[2] / "scripts")


@pytest.fixture
def scripts(monkeypatch):
    """Imports a script as `python scripts/x.py` finds its siblings."""
    monkeypatch.syspath_prepend(SCRIPTS)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if "llama_shapes" in name:
            del sys.modules[name]


def run(scripts, tmp_path, *arguments):
    rows = scripts("measure_llama_shapes").main(
        ["--shape", "tiny", "--device", "cpu", "--steps", "2", "--output_dir", str(tmp_path), *arguments]
    )
    (path,) = tmp_path.glob("llama-tiny-*.json")
    assert json.loads(path.read_text())["rows"] == rows
    assert not [row for row in rows if "error" in row]
    return rows


def test_stage_one(scripts, tmp_path):
    rows = run(
        scripts, tmp_path, "--part", "stage1", "--lengths", "16,64", "--tokens_per_step", "64", "--warm_up", "1"
    )
    steps = [(row["length"], row["batch"], row["branch"]) for row in rows if row["part"] == "stage1"]
    assert steps == [(16, 4, "mixed"), (16, 4, "both"), (64, 1, "mixed"), (64, 1, "both")]
    for row in rows:
        if row["part"] == "stage1":
            assert 0 < row["ratio"] == pytest.approx(row["tokens_per_second"] / row["teacher_tokens_per_second"], 1e-2)
        if row["part"] == "stage1 by layer":
            parts = row["ms_per_layer"]
            assert parts["all of stage 1"] >= parts["student's forward"] + parts["loss"] + parts["backward"] > 0


def test_decode(scripts, tmp_path):
    rows = run(scripts, tmp_path, "--part", "decode", "--context", "80")
    kinds = {(row["model"], row["kind"], row["batch"]) for row in rows if row["part"] == "decode"}
    assert kinds == {
        (model, kind, batch) for model in ("student", "teacher") for kind in ("captured", "eager") for batch in (1, 2)
    }


def test_the_models_start_as_a_conversion_does_and_share_their_weights(scripts):
    shapes = scripts("llama_shapes")
    config = shapes.student_config("tiny", layers=1)
    student = shapes.random_student(config, "cpu")
    twin = shapes.stock_twin(student, config)
    ids = torch.randint(3, 97, (1, 40))
    with torch.no_grad(), student.use_arm("teacher"):
        torch.testing.assert_close(student(ids).logits, twin(ids).logits)
    assert twin.model.layers[0].mlp.up_proj.weight.data_ptr() == student.model.layers[0].mlp.up_proj.weight.data_ptr()
    mixer = student.mixer_attentions()[0].mixer
    assert torch.equal(mixer.feature_map_q.weight[0], torch.eye(16)) and mixer.feature_map_q.magnitude.eq(0).all()
    assert mixer.window_mix.window_weight().allclose(torch.tensor(16.0))


def test_the_fixed_cache_gives_the_stock_step(scripts):
    shapes, decode = scripts("llama_shapes"), scripts("llama_shapes_decode")
    config = shapes.student_config("tiny")
    teacher = shapes.stock_twin(shapes.random_student(config, "cpu"), config)
    ids = torch.randint(3, 97, (2, 12))
    with torch.no_grad():
        cache = DynamicCache()
        teacher(ids[:, :-1], **named(cache))
        layers = []
        for layer in cache.layers:
            room = torch.zeros_like(layer.keys[:, :, :1])
            layers.append(
                decode.FullLayer(torch.cat([layer.keys, room], dim=2), torch.cat([layer.values, room], dim=2))
            )
        fixed = teacher(ids[:, -1:], position_ids=torch.tensor([[11]]), **named(Cache(layers=layers)))
        torch.testing.assert_close(fixed.logits, teacher(ids).logits[:, -1:])
