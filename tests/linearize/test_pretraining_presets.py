"""Presets of pretraining: the published shapes, batches and schedules."""

import dataclasses

import pytest
import torch
from test_pretraining_models import VALID

from linearize.config.pretraining import PretrainConfig
from linearize.config.yaml_io import preset_names, resolve
from linearize.conversion.pretraining_model import check_model, random_model

PUBLISHED = {"cosine_300m": 313.1e6, "cosine_1b": 1213.4e6, "cosine_bert_base": 108.3e6, "cosine_bert_base_512": None}
"""Preset -> parameters of its softmax twin."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_presets(name):
    """Each as it is where its mechanism exists, and with every other one that its architecture takes."""
    config = resolve(name, settings=PretrainConfig)
    for processes in (1, 8, 16):
        plan = config.training.plan(config.data.sequence_length, processes)
        if name == "cosine_1b" or processes <= 8:
            assert plan.tokens_per_step == config.training.tokens_per_step
    training = config.training
    assert (training.weight_decay, training.adam_epsilon, training.schedule) == (0.01, 1e-7, "linear")
    assert (training.adam_beta1, training.adam_beta2, training.max_grad_norm) == (0.9, 0.999, 0)
    if PUBLISHED[name] is None:
        assert config.attention is None and config.model_name_or_path == "out_cosine_bert_base/final"
        return
    assert config.attention["type"] == "cosine"
    entries = 28_996 if config.model.encoder else 50_400

    class Vocabulary:
        bos_token_id = eos_token_id = pad_token_id = None

        def __len__(self):
            return entries

        def get_vocab(self):
            return {"last": entries - 1}

    with torch.device("meta"):
        model = random_model(resolve(config, {"attention": None}, settings=PretrainConfig), Vocabulary())
    assert model.num_parameters() == pytest.approx(PUBLISHED[name], rel=2e-4 if config.model.type == "gptj" else 5e-3)
    for kind, mechanism in VALID:
        if kind == config.model.type and mechanism != "softmax":
            own = config.attention if mechanism == "cosine" else {"type": mechanism}
            check_model(resolve(config, {"attention": own}, settings=PretrainConfig))


def test_the_two_phases_of_bert_are_one_line():
    first, last = (resolve(f"cosine_bert_base{end}", settings=PretrainConfig) for end in ("", "_512"))
    assert first.training.max_steps + last.training.max_steps == 1_000_000
    assert last.training.learning_rate == pytest.approx(1e-4 * 100_000 / 990_000, rel=1e-3)
    assert first.training.learning_rate * first.training.min_lr_ratio == pytest.approx(last.training.learning_rate)
    assert first.model.n_positions == last.data.sequence_length == 512
    for config in (first, last):
        assert config.training.tokens_per_step == 256 * config.data.sequence_length


@pytest.mark.parametrize("name", ["cosine_300m", "cosine_1b"])
def test_published_decoders_do_not_follow_the_defaults(name):
    attention = resolve(name, settings=PretrainConfig).attention
    assert (attention["directions"], attention["gate"]) == ("rotated", "none")


def test_all_presets_name_known_settings():
    assert set(PUBLISHED) <= set(preset_names(PretrainConfig))
    for name in preset_names(PretrainConfig):
        assert dataclasses.asdict(resolve(name, settings=PretrainConfig))["model"]["n_layer"] > 0
