"""The forecast of the memory against peaks that the profiler sees on the CPU, where the same tensors live as on a
GPU."""

import pytest
import torch
from tiny_models import make_student, make_teacher
from torch.profiler import ProfilerActivity, profile

from linearize import memory
from linearize.adapters import add_adapters
from linearize.finetuning_trainer import Objective
from linearize.losses import LossWeights
from linearize.settings import FinetuneConfig
from linearize.settings_io import resolve
from linearize.transfer_loss import LayerLosses, branch_weights

LARGE = {
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
SHAPES = {
    "default": (LARGE, {}),
    "wide window, few features": (LARGE, {"window": 128, "feature_dim": 16, "magnitude": False}),
    "no sharing of heads, relu": ({**LARGE, "num_key_value_heads": 6}, {"feature_map": "relu", "sinks": 0}),
}


def peak_bytes(work) -> int:
    """Most bytes that live at once beyond those that were there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("name", SHAPES)
def test_forecast_is_close_to_the_peak(name):
    changes, attention = SHAPES[name]
    teacher = make_teacher(max_position_embeddings=1024, **changes)
    mixers = {"linear": {"type": "linear", **attention}}
    values = {"dtype": "float32", "attention": attention, "data": {"sequence_length": 512}}
    config = resolve({**values, "finetune": {"gradient_checkpointing": False}})
    tokens = torch.randint(0, 97, (1, 512), generator=torch.Generator().manual_seed(0))

    student = make_student(teacher, mixers)
    student.requires_grad_(False)
    for attention_module in student.mixer_attentions():
        for parameter in attention_module.mixer.parameters():
            parameter.requires_grad_(True)
            parameter.grad = torch.zeros_like(parameter)
    with LayerLosses(student, "relative_mse") as losses:
        weights = branch_weights("both")
        measured = peak_bytes(lambda: losses.run(tokens, weights=weights, gradient_factor=1.0))
    assert memory.forecast_transfer(teacher.config, config).activations == pytest.approx(measured, rel=0.15)

    adapted = add_adapters(make_student(teacher, mixers), FinetuneConfig(), train_mixers=True).train()
    for parameter in adapted.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    objective = Objective(LossWeights(), 1024)
    measured = peak_bytes(lambda: objective(adapted, tokens, tokens, torch.tensor(512.0))[0].backward())
    forecast = memory.forecast_finetune(teacher.config, config)
    assert forecast.activations + forecast.logits == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    "attention", [{}, {"window_shift": None, "bias": True}, {"share_key_map": True, "feature_dim": 8}]
)
def test_parameters_are_counted_exactly(attention):
    teacher = make_teacher()
    types = ["softmax", "linear", "linear"]
    student = make_student(teacher, {"linear": {"type": "linear", **attention}}, types)
    shape = memory.Shape.of(teacher.config)
    parameters = dict(student.named_parameters())
    mixers = sum(parameter.numel() for name, parameter in parameters.items() if ".mixer." in name)
    assert memory.Mechanism.of(shape, attention, [0]).parameters == mixers
    everything = sum(parameter.numel() for parameter in parameters.values())
    assert shape.linear_parameters + shape.other_parameters == everything - mixers
    adapted = add_adapters(student, FinetuneConfig(lora_rank=3), train_mixers=False)
    lora = sum(parameter.numel() for name, parameter in adapted.named_parameters() if "lora_" in name)
    assert memory.adapter_parameters(shape, resolve({"finetune": {"lora_rank": 3}})) == lora


def test_what_lowers_the_forecast():
    teacher = make_teacher().config
    whole = resolve({"finetune": {"gradient_checkpointing": False}})
    assert (
        memory.forecast_finetune(teacher, resolve("llama3_8b_linear")).total
        < memory.forecast_finetune(teacher, whole).total
    )
    small = resolve({"load_in_4bit": True})
    shape = memory.Shape.of(make_teacher(hidden_size=512, intermediate_size=64).config)
    assert memory.weight_bytes(shape, small) < memory.weight_bytes(shape, whole)


def test_bytes_as_a_person_reads_them():
    assert memory.format_bytes(3 * 2**20) == "3 MiB"
    assert memory.format_bytes(17.25 * 2**30) == "17.2 GiB"
