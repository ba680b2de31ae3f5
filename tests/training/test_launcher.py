"""What `accelerate launch` says in the environment does not change what the settings of a run mean."""

import os

import pytest
import torch
from finetuning_toys import settings, stock_llama, student, token_blocks
from tiny_runs import make_teacher_directory, write_text

import linearize
from linearize import UserError
from linearize.config.settings import FinetuneConfig
from linearize.stages.finetuning import finetune
from linearize.training.launcher import CPU, DEVICE, PRECISION, check_launcher, check_precision, in_bfloat16
from linearize.training.loop import make_accelerator
from linearize.training.stage_trainer import stage_arguments

REFUSED = {
    "ACCELERATE_USE_FSDP": ("true", "FSDP"),
    "ACCELERATE_USE_DEEPSPEED": ("true", "DeepSpeed"),
    "ACCELERATE_USE_MEGATRON_LM": ("1", "Megatron-LM"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("true", "parallelism config"),
    "ACCELERATE_DYNAMO_BACKEND": ("INDUCTOR", "compiles"),
}


@pytest.mark.parametrize("found", ["bf16", "fp16", "fp8"])
def test_the_precision_of_a_stage_is_its_settings(tmp_path, monkeypatch, found):
    monkeypatch.setenv(PRECISION, found)
    for changes, wanted in (({}, "no"), ({"bf16": True}, "bf16")):
        config = FinetuneConfig(tokens_per_step=32, max_steps=1)
        arguments, _ = stage_arguments(config, "finetune", 32, tmp_path, 0, "none", "cpu", **changes)
        assert arguments.mixed_precision == wanted
    assert make_accelerator("cpu").mixed_precision != "fp8"
    assert os.environ[PRECISION] == found


def test_float32_trains_in_float32_under_a_launcher_of_bfloat16(tmp_path, monkeypatch):
    teacher, text = make_teacher_directory(tmp_path / "teacher"), write_text(tmp_path / "text.jsonl")
    common = {
        "model_name_or_path": str(teacher), "device": "cpu", "attention": None, "evaluation": None,
        "data": {"dataset": str(text), "sequence_length": 32, "cache_dir": str(tmp_path / "cache")},
    }  # fmt: skip
    training = {"max_steps": 2, "batch_size": 1, "tokens_per_step": 32, "learning_rate": 1e-2, "logging_steps": 1}
    training |= {"kind": "train", "weights": "all"}

    def losses(name, precision):
        stages = {"training": {**training, "precision": precision}}
        result = linearize.run({**common, "output_dir": str(tmp_path / name), "stages": stages})
        return result.stages["training"].figures["losses"]

    expected, half = losses("plain", "float32"), losses("half", "bfloat16")
    monkeypatch.setenv(PRECISION, "bf16")
    assert losses("launched", "float32") == expected != half
    monkeypatch.setenv(PRECISION, "no")
    assert losses("launched half", "bfloat16") == half


def test_lora_trains_in_the_type_of_the_weights(tmp_path, monkeypatch):
    stock = stock_llama(tmp_path)
    expected = finetune(student(stock), token_blocks(), settings(), output_dir=tmp_path / "plain").losses
    monkeypatch.setenv(PRECISION, "bf16")
    assert finetune(student(stock), token_blocks(), settings(), output_dir=tmp_path / "launched").losses == expected


@pytest.mark.parametrize("variable", REFUSED)
def test_what_would_split_or_compile_the_model_is_refused_first(tmp_path, monkeypatch, variable):
    value, sign = REFUSED[variable]
    nothing = {"model_name_or_path": str(tmp_path / "nothing"), "output_dir": str(tmp_path / "out"), "device": "cpu"}
    model = make_teacher_directory(tmp_path / "teacher")
    monkeypatch.setenv(variable, value)
    all_weights = {"stages": {"training": {"kind": "train", "weights": "all", "max_steps": 1}}, "attention": None}
    random = {"architecture": {}, "output_dir": str(tmp_path / "out"), "device": "cpu"}
    runs = [
        (linearize.run, {**nothing, "stages": {"transfer": {"kind": "transfer", "max_steps": 1}}}),
        (linearize.run, {**nothing, **all_weights}),
        (linearize.run, {**random, **all_weights}),
        (linearize.run, {**nothing, **all_weights, "model_name_or_path": str(model)}),
        (linearize.run_glue, {"models": [str(tmp_path / "nothing")], "output_dir": str(tmp_path / "out")}),
    ]
    for run, given in runs:
        with pytest.raises(UserError, match=sign):
            run(given)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv(variable, "no" if "DYNAMO" in variable else "false")
    check_launcher()


def test_a_gpu_that_the_launcher_switches_off(monkeypatch):
    monkeypatch.setenv(CPU, "true")
    check_launcher("auto")
    with pytest.raises(UserError, match="keeps to the CPU"):
        check_launcher("cuda")


@pytest.mark.parametrize(("device", "chosen"), [("cpu", "cuda:1"), ("cuda", "cpu"), ("cuda", "xpu")])
def test_another_device_than_the_settings_ask_for(monkeypatch, device, chosen):
    monkeypatch.setenv(DEVICE, chosen)
    check_launcher("auto")
    with pytest.raises(UserError, match=f"device is {device}, but ACCELERATE_TORCH_DEVICE is {chosen}"):
        check_launcher(device)
    monkeypatch.setenv(DEVICE, device)
    check_launcher(device)


def test_float32_is_not_tf32(monkeypatch):
    expected = {("auto", False): True, ("auto", True): False, ("bfloat16", True): True, ("float32", False): False}
    assert {how: in_bfloat16(how[0], on_cpu=how[1]) for how in expected} == expected
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert in_bfloat16("auto", on_cpu=False) and not in_bfloat16("float32", on_cpu=True)
    with pytest.raises(UserError, match="TF32"):
        in_bfloat16("float32", on_cpu=False)


def test_another_precision_is_never_trained_in():
    check_precision("bf16", "bf16")
    with pytest.raises(UserError, match="mixed precision fp16, but the settings of this stage amount to no"):
        check_precision("fp16", "no")
