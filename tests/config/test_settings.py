"""The settings: conversion of values, cross-checks, YAML, presets, and flags over YAML."""

import dataclasses

import pytest
import yaml

from linearize.cli.flags import field_help, normalise, setting_parameters, stage_parameters
from linearize.config.architecture import ArchitectureConfig, TokenizerConfig
from linearize.config.evaluation import EvaluationConfig
from linearize.config.presets import all_presets
from linearize.config.selection import SelectConfig
from linearize.config.settings import DataConfig, FinetuneConfig, TransferConfig, changed
from linearize.config.yaml_io import differences, read_values, to_values, write_config
from linearize.errors import UserError
from linearize.runs.settings import OLD, RunConfig, flat_names, make_stages, resolve_run, run_values, stage_types
from linearize.stages.kinds import KINDS

SECTIONS = (RunConfig, ArchitectureConfig, TokenizerConfig, SelectConfig, DataConfig, EvaluationConfig)
STAGES = {
    "calibrate": {"kind": "calibrate"},
    "transfer": {"kind": "transfer", "tokens": "1M"},
    "finetune": {"kind": "train", "weights": "lora", "tokens": "1M"},
}


def resolved(values=None, overrides=None):
    """Settings of a run of the default stages on some teacher."""
    return resolve_run({"model_name_or_path": "some/teacher", "stages": STAGES, **(values or {})}, overrides)


def test_values_mean_the_same_wherever_they_are_written():
    finetune = {"kind": "train", "learning_rate": "1e-4", "tokens": "2e7", "lora_targets": "q_proj,v_proj"}
    config = resolved(
        {
            "stages": {"transfer": "none", "finetune": finetune},
            "softmax_layers": "[1, 2]",
            "data": {"dataset": ["a.txt", "b.txt"], "completion_only": "false"},
        }
    )
    assert list(config.stages) == ["finetune"]
    finetune = config.stages["finetune"]
    assert finetune.learning_rate == 1e-4 and finetune.tokens == 20_000_000
    assert finetune.lora_targets == ["q_proj", "v_proj"]
    assert config.softmax_layers == [1, 2]
    assert config.data.dataset == ["a.txt", "b.txt"] and config.data.completion_only is False


def train(teacher=None):
    return {"kind": "train", "weights": "all", "teacher": teacher, "max_steps": 1}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sequence_length": 5}, "Unknown setting sequence_length; known are model_name_or_path"),
        ({"data": {"sequnce": 5}}, "in section data; known are dataset"),
        ({"seed": "one"}, "seed is 'one', but it must be an integer"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"dtype": "int8"}, "one of auto, bfloat16, float16, float32"),
        ({"overwrite": "maybe"}, "overwrite is 'maybe', but it must be a boolean"),
        ({"stages": 3}, "stages must be names with settings"),
        ({"stages": {"transfer": 3}}, "stages.transfer must be a section"),
        ({"stages": {"transfer": {}}}, "Stage transfer has no kind; known are adapt, calibrate, train, transfer"),
        ({"stages": {"a": {"kind": "tune"}}}, "Stage a is of kind 'tune'; known are"),
        (
            {"stages": {"a": {"kind": "train", "weights": "some"}}},
            "with weights some; there is weights all or mechanism or attention",
        ),
        ({"stages": {"a": {"kind": "train"}}}, "Stage a does not say how long it trains: give a.tokens, such as 20M"),
        ({"stages": {"a": {"kind": "transfer", "token": 1}}}, "Unknown setting token in stage a; known are tokens"),
        ({"stages": {"seed": {"kind": "calibrate"}}}, "A stage is called 'seed'"),
        ({"stages": {"final": {"kind": "calibrate"}}}, "A stage is called 'final'"),
        ({"stages": {"warm": {"kind": "transfer", "tokens": 0}}}, "warm.tokens is 0"),
        ({"transfer.window_dropout": [0.5, 2]}, "transfer.window_dropout holds 2.0"),
        ({"transfer.loss": "l1"}, "one of relative_mse, mse, cosine"),
        ({"finetune.ce_weight": 0}, "both 0"),
        ({"finetune.lora_dropout": 1.0}, "finetune.lora_dropout is 1.0"),
        ({"stages": {"a": train("b"), "b": train()}}, "a.teacher is b, which comes after it: name an earlier stage"),
        ({"stages": {"a": train("yardstick")}}, "set yardstick to same_tokens, or a.teacher to base"),
        ({"stages": {}, "yardstick": "same_tokens"}, "no stage trains weights: leave it out"),
        ({"model_name_or_path": None}, "model_name_or_path is empty"),
        ({"model_name_or_path": None, "stages": {}, "architecture": {}, "yardstick": "same_tokens"}, "yardstick"),
        ({"architecture": {}}, "leave one out"),
        ({"tokenizer": {"vocab_size": 300}}, "tokenizer is set"),
        ({"attention": "none", "softmax_layers": [0]}, "without attention all layers have softmax"),
        ({"data": {"sequence_length": 1}}, "data.sequence_length is 1"),
        ({"evaluation": {"limit": 0}}, "evaluation.limit is 0"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "choose one"),
        ({"overwrite": True, "resume_from_checkpoint": True}, "choose one"),
        ({"push_to_hub": "a/b/c"}, "OWNER/NAME"),
    ],
)
def test_wrong_values_are_named(values, says):
    flags = {name: value for name, value in values.items() if "." in name}
    with pytest.raises(UserError) as error:
        resolved({name: value for name, value in values.items() if name not in flags}, flags)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", OLD)
def test_a_file_of_before_stages_is_told_how_it_is_written_now(name):
    with pytest.raises(UserError) as error:
        resolve_run({"model_name_or_path": "some/teacher", "seed": 1, name: {"tokens": 5}})
    said = str(error.value)
    assert said.startswith(f"{name} is of an older version") and OLD[name] in said and "\n" not in said


def test_without_stages_a_run_has_the_default_ones():
    with pytest.raises(UserError, match="Stage transfer does not say how long it trains"):
        resolve_run({"model_name_or_path": "some/teacher"})
    lengths = {"transfer.tokens": "1M", "finetune.max_steps": 3}
    stages = resolve_run({"model_name_or_path": "some/teacher"}, lengths).stages
    assert {name: (stage.kind, stage.section) for name, stage in stages.items()} == {
        "calibrate": ("calibrate", "calibrate"),
        "transfer": ("transfer", "transfer"),
        "finetune": ("train", "finetune"),
    }
    assert resolve_run({"model_name_or_path": "some/teacher", "stages": {}}).stages == {}


def test_a_stage_is_found_by_kind_weights_and_objective():
    ours = {
        "one": {"kind": "train", "max_steps": 1},
        "two": {"kind": "train", "weights": "all", "max_steps": 1},
        "three": {"kind": "train", "weights": "mechanism", "max_steps": 1},
        "four": {"kind": "train", "weights": "attention", "objective": "masked", "max_steps": 1},
        "five": {"kind": "train", "weights": "all", "objective": "embeddings", "max_steps": 1},
        "six": {"kind": "adapt"},
    }
    kinds = {kind.settings: kind.__name__ for kind in KINDS}
    found = {name: kinds[type(stage)] for name, stage in make_stages(ours).items()}
    assert list(found.values()) == ["TrainLora", "TrainAll", "TrainAll", "TrainAll", "TrainEmbeddings", "Adapt"]


def test_a_changed_stage_keeps_its_name():
    stage = make_stages({"second": {"kind": "transfer", "max_steps": 1}})["second"]
    assert changed(stage, batch_size=2).section == "second" and stage.batch_size == 1
    with pytest.raises(UserError, match="second.batch_size is 0"):
        changed(stage, batch_size=0)


def test_the_yardstick_trains_as_long_as_all_stages_that_train_weights():
    two = {"first": {**train(), "max_steps": 2, "tokens_per_step": 2048}, "second": {**train("first"), "max_steps": 4}}
    two["second"] |= {"tokens_per_step": 1024, "learning_rate": 1e-5}
    config = resolved({"stages": two, "yardstick": "same_tokens", "data": {"sequence_length": 64}})
    settings = config.yardstick_settings()
    assert (settings.tokens, settings.max_steps, settings.teacher) == (2 * 2048 + 4 * 1024, None, None)
    assert settings.learning_rate == 1e-5 and settings.section == "yardstick"


def test_a_config_goes_through_yaml_unchanged(tmp_path):
    stages = {"zero": STAGES["transfer"], "again": {**STAGES["transfer"], "loss": "mse"}, "finetune": None}
    values = {"stages": stages, "data": {"dataset": ["ä.txt"]}, "attention": {"window": 32}, "softmax_layers": [3]}
    config = resolved(values)
    write_config(config, tmp_path / "config.yaml")
    again = resolve_run(tmp_path / "config.yaml")
    assert again == config
    assert {name: stage.section for name, stage in again.stages.items()} == {"zero": "zero", "again": "again"}
    assert set(yaml.safe_load((tmp_path / "config.yaml").read_text())) == {
        field.name for field in dataclasses.fields(RunConfig)
    }


def test_every_preset_is_valid():
    names = [preset.name for preset in all_presets() if preset.command == "run"]
    assert {"llama3_8b_linear", "llama3_8b_lolcats", "mistral_7b", "smollm2_135m"} <= set(names)
    kinds = {"gain_cell": "gain_cell", "landmark": "landmark", "cosine": "cosine", "pretrain": None}
    kinds |= {"constant": "salient", "hybrid": "salient", "gpt2_published": "gain_cell"}
    for name in names:
        config = resolve_run(name)
        assert config.stages and all(stage.section == key for key, stage in config.stages.items())
        kind = next((kind for word, kind in kinds.items() if word in name), "linear")
        if name != "cosine_bert_base_512":  # goes on with a converted model
            assert (config.attention and config.attention["type"]) == kind


def test_our_preset_is_the_defaults_of_the_mechanism():
    from linearize.modeling import LinearAttentionConfig

    settings = resolve_run("llama3_8b_linear").attention
    assert dataclasses.asdict(LinearAttentionConfig(**settings)) == dataclasses.asdict(
        LinearAttentionConfig(feature_dim=64)
    )


def test_the_preset_of_mistral_is_the_published_one_of_llama():
    """The authors' configs differ in the teacher alone."""
    llama, mistral = (to_values(resolve_run(name)) for name in ("llama3_8b_lolcats", "mistral_7b"))
    assert {name for name in llama if llama[name] != mistral[name]} == {"model_name_or_path", "output_dir"}
    assert mistral["model_name_or_path"] == "mistralai/Mistral-7B-v0.1" and mistral["sliding_window"] == "keep"


def test_the_published_preset_quotes_the_published_numbers():
    config = resolve_run("llama3_8b_lolcats")
    attention = {"window": 64, "sinks": 0, "feature_dim": 64, "window_reference": "max", "window_shift": None}
    assert attention.items() <= config.attention.items()
    assert config.attention["window_weight"] == 0.1 and config.attention["window_weight_form"] == "sigmoid"
    assert not config.attention["magnitude"] and config.attention["initialization"] == "identity_first"
    assert (config.attention["map_input"], config.attention["gate"]) == ("rotated", "none")
    assert list(config.stages) == ["transfer", "finetune"]
    transfer, finetune = config.stages.values()
    assert (transfer.loss, transfer.loss_scale, transfer.branch) == ("mse", 1000.0, "mixed")
    assert transfer.learning_rate == transfer.window_learning_rate == 1e-2
    assert (finetune.lora_rank, finetune.lora_alpha, finetune.learning_rate) == (8, 16, 1e-4)
    assert not finetune.train_mixers
    assert transfer.tokens == finetune.tokens == 20_000_000
    assert transfer.plan(1024).tokens_per_step == 8192


def test_a_missing_config_names_the_presets():
    with pytest.raises(UserError, match="did you mean .*llama3_8b_linear"):
        read_values("llama4")


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "just words"])
def test_a_broken_yaml_file_is_one_sentence(tmp_path, text):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        resolve_run(tmp_path / "broken.yaml")
    assert "broken.yaml" in str(error.value) and "\n" not in str(error.value)


def test_flags_lie_over_yaml(tmp_path):
    stages = "stages: {transfer: {kind: transfer, tokens: 5, loss: mse}, finetune: {kind: train, tokens: 6}}"
    (tmp_path / "my.yaml").write_text(f"model_name_or_path: a/b\n{stages}\nattention: {{window: 32}}\n")
    flags = {"transfer.tokens": "7", "attention.sinks": 1, "output_dir": "here", "finetune": "none"}
    config = resolve_run(tmp_path / "my.yaml", flags)
    transfer = config.stages["transfer"]
    assert (transfer.tokens, transfer.loss, config.output_dir) == (7, "mse", "here")
    assert config.attention == {"type": "linear", "window": 32, "sinks": 1}
    assert list(config.stages) == ["transfer"]
    assert resolve_run(tmp_path / "my.yaml", {"finetune.tokens": "9"}).stages["finetune"].tokens == 9
    assert config == resolve_run(config)
    with pytest.raises(UserError, match="Unknown setting tune"):
        resolve_run(tmp_path / "my.yaml", {"tune.tokens": "9"})


START = "model_name_or_path: some/teacher\nstages: {}\n"


def test_another_dataset_leaves_what_a_file_says_of_its_own_one(tmp_path):
    (tmp_path / "my.yaml").write_text(
        START + "data: {dataset: a/b, split: test, validation: held.jsonl, text_field: body}\n"
    )
    data = resolve_run(tmp_path / "my.yaml", {"data.dataset": "text.jsonl"}).data
    assert (data.split, data.validation, data.text_field) == ("train", "held.jsonl", "body")
    for flags in ({"data.dataset": "a/b"}, {"data.text_field": "text"}):  # the same one, or none
        assert resolve_run(tmp_path / "my.yaml", flags).data.split == "test"
    named = {"data.dataset": "text.jsonl", "data.split": "test"}
    assert resolve_run(tmp_path / "my.yaml", named).data.split == "test"
    (tmp_path / "my.yaml").write_text(START + "data: {validation: dev, split: test}\n")  # of no dataset: as the flag's
    data = resolve_run(tmp_path / "my.yaml", {"data.dataset": "c/d"}).data
    assert (data.split, data.validation) == ("test", "dev")


def test_every_field_has_a_docstring_and_a_flag():
    for settings in (*SECTIONS, *(kind.settings for kind in KINDS)):
        assert set(field_help(settings)) == {field.name for field in dataclasses.fields(settings)}
    values = run_values("minilm_linear")
    parameters = setting_parameters([field.name for field in dataclasses.fields(RunConfig)], RunConfig)
    parameters += stage_parameters(stage_types(values), values["stages"])
    flags = {parameter.name.replace("__dot__", ".") for parameter in parameters}
    asked = {f"{stage}.{name}" for stage in ("transfer", "distillation") for name in ("kind", "objective")}
    assert set(flat_names(values)) - {"data", "select", "tokenizer"} - asked <= flags
    assert flags.isdisjoint(asked)
    assert {"attention.window", "attention.feature_dim", "attention.window_shift"} <= flags


def test_switches_take_values_too():
    words = ["--overwrite", "true", "--load_in_4bit=false", "--finetune.train_mixers", "no", "--seed", "1"]
    assert normalise(words, flat_names(run_values(None))) == [
        "--overwrite",
        "--no_load_in_4bit",
        "--finetune.no_train_mixers",
        "--seed",
        "1",
    ]


def test_differences_name_what_changed():
    one = resolved({"seed": 1}, {"finetune": None, "transfer.loss": "mse"})
    other = resolved({"seed": 2, "data": {"split": "test"}})
    assert set(differences(one, other)) == {"seed", "data.split", "finetune", "transfer.loss"}
    turned = resolved({"stages": {name: STAGES[name] for name in reversed(STAGES)}})
    assert differences(resolved(), turned) == ["stages"]


@pytest.mark.parametrize(
    ("processes", "accumulation", "tokens"), [(1, 8, 8192), (2, 4, 8192), (8, 1, 8192), (3, 3, 9216)]
)
def test_steps_follow_from_tokens(processes, accumulation, tokens):
    plan = TransferConfig(tokens=100_000).plan(1024, processes)
    assert (plan.accumulation, plan.tokens_per_step) == (accumulation, tokens)
    assert (plan.steps - 1) * tokens < 100_000 <= plan.steps * tokens
    assert FinetuneConfig(max_steps=5).plan(1024).steps == 5
