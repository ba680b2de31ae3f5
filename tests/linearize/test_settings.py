"""The settings: conversion of values, cross-checks, YAML, presets, and flags over YAML."""

import dataclasses

import pytest
import yaml

from linearize.cli.flags import field_help, normalise, setting_parameters
from linearize.config.selection import SelectConfig
from linearize.config.settings import DataConfig, EvaluationConfig, FinetuneConfig, RunConfig, TransferConfig
from linearize.config.yaml_io import (
    differences,
    flat_names,
    preset_names,
    read_values,
    resolve,
    to_values,
    write_config,
)
from linearize.errors import UserError

SECTIONS = (RunConfig, SelectConfig, DataConfig, TransferConfig, FinetuneConfig, EvaluationConfig)


def test_values_mean_the_same_wherever_they_are_written():
    config = resolve(
        {
            "transfer": "none",
            "finetune": {"learning_rate": "1e-4", "tokens": "2e7", "lora_targets": "q_proj,v_proj"},
            "softmax_layers": "[1, 2]",
            "data": {"dataset": ["a.txt", "b.txt"], "completion_only": "false"},
        }
    )
    assert config.transfer is None
    assert config.finetune.learning_rate == 1e-4 and config.finetune.tokens == 20_000_000
    assert config.finetune.lora_targets == ["q_proj", "v_proj"]
    assert config.softmax_layers == [1, 2]
    assert config.data.dataset == ["a.txt", "b.txt"] and config.data.completion_only is False


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sequence_length": 5}, "Unknown setting sequence_length; known are model_name_or_path"),
        ({"data": {"sequnce": 5}}, "in section data; known are dataset"),
        ({"seed": "one"}, "seed is 'one', but it must be an integer"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"dtype": "int8"}, "one of bfloat16, float16, float32"),
        ({"overwrite": "maybe"}, "overwrite is 'maybe', but it must be a boolean"),
        ({"transfer": 3}, "transfer must be a section"),
        ({"transfer": {"tokens": 0}}, "transfer.tokens is 0"),
        ({"transfer": {"window_dropout": [0.5, 2]}}, "window_dropout holds 2.0"),
        ({"transfer": {"loss": "l1"}}, "one of relative_mse, mse, cosine"),
        ({"finetune": {"ce_weight": 0}}, "both 0"),
        ({"finetune": {"lora_dropout": 1.0}}, "lora_dropout is 1.0"),
        ({"data": {"sequence_length": 1}}, "data.sequence_length is 1"),
        ({"evaluation": {"limit": 0}}, "evaluation.limit is 0"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "choose one"),
        ({"overwrite": True, "resume_from_checkpoint": True}, "choose one"),
        ({"push_to_hub": "a/b/c"}, "OWNER/NAME"),
    ],
)
def test_wrong_values_are_named(values, says):
    with pytest.raises(UserError) as error:
        resolve(values)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_goes_through_yaml_unchanged(tmp_path):
    config = resolve(
        {"transfer": None, "data": {"dataset": ["ä.txt"]}, "attention": {"window": 32}, "softmax_layers": [3]}
    )
    write_config(config, tmp_path / "config.yaml")
    assert resolve(tmp_path / "config.yaml") == config
    assert set(yaml.safe_load((tmp_path / "config.yaml").read_text())) == {
        field.name for field in dataclasses.fields(RunConfig)
    }


def test_every_preset_is_valid():
    names = preset_names()
    assert {"llama3_8b_linear", "llama3_8b_lolcats", "mistral_7b", "smollm2_135m"} <= set(names)
    for name in names:
        kinds = {"gain_cell": "gain_cell", "landmark": "landmark", "cosine": "cosine"}
        kinds |= {"constant": "salient", "hybrid": "salient"}
        kind = next((kind for word, kind in kinds.items() if word in name), "linear")
        assert resolve(name).attention["type"] == kind


def test_our_preset_is_the_defaults_of_the_mechanism():
    from linearize.modeling import LinearAttentionConfig

    settings = resolve("llama3_8b_linear").attention
    assert dataclasses.asdict(LinearAttentionConfig(**settings)) == dataclasses.asdict(
        LinearAttentionConfig(feature_dim=64)
    )


def test_the_preset_of_mistral_is_the_published_one_of_llama():
    """The authors' configs differ in the teacher alone."""
    llama, mistral = (to_values(resolve(name)) for name in ("llama3_8b_lolcats", "mistral_7b"))
    assert {name for name in llama if llama[name] != mistral[name]} == {"model_name_or_path", "output_dir"}
    assert mistral["model_name_or_path"] == "mistralai/Mistral-7B-v0.1" and mistral["sliding_window"] == "keep"


def test_the_published_preset_quotes_the_published_numbers():
    config = resolve("llama3_8b_lolcats")
    attention = {"window": 64, "sinks": 0, "feature_dim": 64, "window_reference": "max", "window_shift": None}
    assert attention.items() <= config.attention.items()
    assert config.attention["window_weight"] == 0.1 and config.attention["window_weight_form"] == "sigmoid"
    assert not config.attention["magnitude"] and config.attention["initialization"] == "identity_first"
    assert (config.attention["map_input"], config.attention["gate"]) == ("rotated", "none")
    assert (config.transfer.loss, config.transfer.loss_scale, config.transfer.branch) == ("mse", 1000.0, "mixed")
    assert config.transfer.learning_rate == config.transfer.window_learning_rate == 1e-2
    assert (config.finetune.lora_rank, config.finetune.lora_alpha, config.finetune.learning_rate) == (8, 16, 1e-4)
    assert not config.finetune.train_mixers
    assert config.transfer.tokens == config.finetune.tokens == 20_000_000
    assert config.transfer.plan(1024).tokens_per_step == 8192


def test_a_missing_config_names_the_presets():
    with pytest.raises(UserError, match="did you mean .*llama3_8b_linear"):
        read_values("llama4")


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "just words"])
def test_a_broken_yaml_file_is_one_sentence(tmp_path, text):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        resolve(tmp_path / "broken.yaml")
    assert "broken.yaml" in str(error.value) and "\n" not in str(error.value)


def test_flags_lie_over_yaml(tmp_path):
    (tmp_path / "my.yaml").write_text("transfer: {tokens: 5, loss: mse}\nfinetune: none\nattention: {window: 32}\n")
    flags = {"transfer.tokens": "7", "attention.sinks": 1, "output_dir": "here"}
    config = resolve(tmp_path / "my.yaml", flags)
    assert (config.transfer.tokens, config.transfer.loss, config.output_dir) == (7, "mse", "here")
    assert config.attention == {"type": "linear", "window": 32, "sinks": 1}
    assert config.finetune is None
    assert resolve(tmp_path / "my.yaml", {"finetune.tokens": "9"}).finetune.tokens == 9


def test_another_dataset_leaves_what_a_file_says_of_its_own_one(tmp_path):
    (tmp_path / "my.yaml").write_text("data: {dataset: a/b, split: test, validation: held.jsonl, text_field: body}\n")
    data = resolve(tmp_path / "my.yaml", {"data.dataset": "text.jsonl"}).data
    assert (data.split, data.validation, data.text_field) == ("train", "held.jsonl", "body")
    for flags in ({"data.dataset": "a/b"}, {"data.text_field": "text"}):  # the same one, or none
        assert resolve(tmp_path / "my.yaml", flags).data.split == "test"
    named = {"data.dataset": "text.jsonl", "data.split": "test"}
    assert resolve(tmp_path / "my.yaml", named).data.split == "test"
    (tmp_path / "my.yaml").write_text("data: {validation: dev, split: test}\n")  # of no dataset: as the flag's
    data = resolve(tmp_path / "my.yaml", {"data.dataset": "c/d"}).data
    assert (data.split, data.validation) == ("test", "dev")


def test_every_field_has_a_docstring_and_a_flag():
    for settings in SECTIONS:
        assert set(field_help(settings)) == {field.name for field in dataclasses.fields(settings)}
    flags = {parameter.name.replace("__dot__", ".") for parameter in setting_parameters(list(to_values(RunConfig())))}
    assert set(flat_names()) - {"data", "select"} <= flags
    assert {"attention.window", "attention.feature_dim", "attention.window_shift"} <= flags


def test_switches_take_values_too():
    words = ["--overwrite", "true", "--load_in_4bit=false", "--finetune.train_mixers", "no", "--seed", "1"]
    assert normalise(words) == ["--overwrite", "--no_load_in_4bit", "--finetune.no_train_mixers", "--seed", "1"]


def test_differences_name_what_changed():
    one = resolve({"seed": 1, "finetune": None})
    other = resolve({"seed": 2, "data": {"split": "test"}})
    assert set(differences(one, other)) == {"seed", "data.split", "finetune"}


@pytest.mark.parametrize(
    ("processes", "accumulation", "tokens"), [(1, 8, 8192), (2, 4, 8192), (8, 1, 8192), (3, 3, 9216)]
)
def test_steps_follow_from_tokens(processes, accumulation, tokens):
    plan = TransferConfig(tokens=100_000).plan(1024, processes)
    assert (plan.accumulation, plan.tokens_per_step) == (accumulation, tokens)
    assert (plan.steps - 1) * tokens < 100_000 <= plan.steps * tokens
    assert FinetuneConfig(max_steps=5).plan(1024).steps == 5
