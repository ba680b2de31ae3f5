"""Presets of pretraining: the published shapes, batches and schedules."""

import pytest
import torch
from test_pretraining_models import VALID

from linearize.config.presets import all_presets, find_preset
from linearize.conversion.random_models import random_configs, random_model
from linearize.runs.attention import complete
from linearize.runs.settings import resolve_run

PUBLISHED = {"cosine_300m": 313.1e6, "cosine_1b": 1213.4e6, "cosine_bert_base": 108.3e6, "cosine_bert_base_512": None}
"""Preset -> parameters of its softmax twin."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_presets(name):
    """Each as it is where its mechanism exists, and with every other one that its architecture takes."""
    config = resolve_run(name)
    training = config.stages["training"]
    for processes in (1, 8, 16):
        plan = training.plan(config.data.sequence_length, processes)
        if name == "cosine_1b" or processes <= 8:
            assert plan.tokens_per_step == training.tokens_per_step
    assert (training.weight_decay, training.adam_epsilon, training.schedule) == (0.01, 1e-7, "linear")
    assert (training.adam_beta1, training.adam_beta2, training.max_grad_norm) == (0.9, 0.999, 0)
    if PUBLISHED[name] is None:
        assert config.model_name_or_path == "out_cosine_bert_base/final"
        assert "attention" not in find_preset(name).values()  # it stays that of the first phase
        return
    assert config.attention["type"] == "cosine"
    assert (training.objective == "masked") == config.architecture.encoder
    entries = 28_996 if config.architecture.encoder else 50_400

    class Vocabulary:
        bos_token_id = eos_token_id = pad_token_id = None

        def __len__(self):
            return entries

        def get_vocab(self):
            return {"last": entries - 1}

    with torch.device("meta"):
        model = random_model(resolve_run(config, {"attention": None}), Vocabulary())
    near = 2e-4 if config.architecture.type == "gptj" else 5e-3
    assert model.num_parameters() == pytest.approx(PUBLISHED[name], rel=near)
    for kind, mechanism in VALID:
        if kind == config.architecture.type and mechanism != "softmax":
            own = config.attention if mechanism == "cosine" else {"type": mechanism}
            random_configs(complete(resolve_run(config, {"attention": own})))


def test_the_two_phases_of_bert_are_one_line():
    phases = [resolve_run(f"cosine_bert_base{end}") for end in ("", "_512")]
    first, last = (config.stages["training"] for config in phases)
    assert first.max_steps + last.max_steps == 1_000_000
    assert last.learning_rate == pytest.approx(1e-4 * 100_000 / 990_000, rel=1e-3)
    assert first.learning_rate * first.min_lr_ratio == pytest.approx(last.learning_rate)
    assert phases[0].architecture.n_positions == phases[1].data.sequence_length == 512
    for config in phases:
        assert config.stages["training"].tokens_per_step == 256 * config.data.sequence_length


@pytest.mark.parametrize("name", ["cosine_300m", "cosine_1b"])
def test_published_decoders_do_not_follow_the_defaults(name):
    attention = resolve_run(name).attention
    assert (attention["directions"], attention["gate"]) == ("rotated", "none")


def test_all_presets_name_known_settings():
    names = {preset.name for preset in all_presets() if "architecture" in preset.values()}
    assert {name for name in PUBLISHED if PUBLISHED[name] is not None} <= names
    for name in names:
        assert resolve_run(name).architecture.n_layer > 0
