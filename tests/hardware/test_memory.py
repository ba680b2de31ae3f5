"""The forecast of the memory against peaks that the profiler sees on the CPU, where the same tensors live as on a
GPU."""

import gc
import types

import pytest
import torch
from tiny_models import make_gpt2, make_gptj, make_student, make_teacher
from torch.profiler import ProfilerActivity, profile

from linearize import UserError
from linearize.config.settings import FinetuneConfig, TransferConfig, changed
from linearize.hardware import memory
from linearize.hardware.shape import Shape
from linearize.kernels import triton_support
from linearize.runs import plan as run_plan
from linearize.runs.settings import RunConfig, resolve_run
from linearize.stages.adapters import add_adapters
from linearize.stages.finetuning_trainer import Objective
from linearize.stages.transfer_loss import LayerLosses, branch_weights
from linearize.training.losses import LossWeights

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
    "maps before position": (LARGE, {"map_input": "projections", "feature_dim": 32}),
    "gate": (LARGE, {"gate": "token", "map_input": "projections"}),
    "gate, wide window": (LARGE, {"gate": "key", "window": 192, "feature_dim": 16}),
    "no sharing of heads, relu": ({**LARGE, "num_key_value_heads": 6}, {"feature_map": "relu", "sinks": 0}),
}


def resolve(changes) -> RunConfig:
    """Settings of a run of no stages, with these among them."""
    return resolve_run({"model_name_or_path": "a/teacher", "dtype": "bfloat16", "stages": {}, **changes})


def peak_bytes(work) -> int:
    """Most bytes that live at once beyond those that were there."""
    gc.collect()  # garbage of earlier tests, freed meanwhile, would count as bytes given back
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def stage_peaks(teacher, mixers, length: int, backend: str, branch: str = "both") -> tuple[int, int]:
    """Peaks of one step of each stage on one sequence, beyond weights, gradients and optimiser."""
    tokens = torch.randint(0, 97, (1, length), generator=torch.Generator().manual_seed(0))
    student = make_student(teacher, mixers)
    student.set_op_backend(backend)
    student.requires_grad_(False)
    for attention_module in student.mixer_attentions():
        for parameter in attention_module.mixer.parameters():
            parameter.requires_grad_(True)
            parameter.grad = torch.zeros_like(parameter)
    with LayerLosses(student, "relative_mse") as losses:
        weights = branch_weights(branch)
        transfer = peak_bytes(lambda: losses.run(tokens, weights=weights, gradient_factor=1.0))

    student = make_student(teacher, mixers)
    student.set_op_backend(backend)
    adapted = add_adapters(student, FinetuneConfig(), train_mixers=True).train()
    for parameter in adapted.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    objective = Objective(LossWeights(), 1024)
    finetuning = peak_bytes(lambda: objective(adapted, tokens, tokens, torch.tensor(float(length)))[0].backward())
    return transfer, finetuning


def stage_forecasts(teacher, attention, length: int, fused: bool) -> tuple[int, int]:
    """What is expected of `stage_peaks`."""
    config = resolve({"dtype": "float32", "attention": attention, "data": {"sequence_length": length}})
    stages = TransferConfig(batch_size=1, tokens_per_step=length), FinetuneConfig(gradient_checkpointing=False)
    transfer = memory.forecast_transfer(teacher.config, config, stages[0], fused=fused)
    finetuning = memory.forecast_finetune(teacher.config, config, stages[1], fused=fused)
    return transfer.activations, finetuning.activations + finetuning.logits


@pytest.mark.parametrize("name", SHAPES)
def test_forecast_is_close_to_the_peak(name):
    changes, attention = SHAPES[name]
    teacher = make_teacher(max_position_embeddings=1024, **changes)
    measured = stage_peaks(teacher, {"linear": {"type": "linear", **attention}}, 512, "chunked")
    assert stage_forecasts(teacher, attention, 512, fused=False) == pytest.approx(measured, rel=0.15)
    config = resolve({"attention": {"type": "linear", **attention}})
    student = make_student(teacher, {"linear": {"type": "linear", **attention}})
    counted = sum(parameter.numel() for x in student.mixer_attentions() for parameter in x.mixer.parameters())
    shape = Shape.of(teacher.config)
    assert memory.mechanism_of(shape, config).parameters == run_plan.mixer_parameter_count(shape, config) == counted


@pytest.mark.parametrize(
    "attention",
    [
        {},
        {"window": 0, "sinks": 0},
        {"window": 0, "sinks": 0, "scale_side": "key"},
        {"window": 96, "feature_map": "relu", "feature_dim": 48},
        {"directions": "projections", "gate": "token"},
        {"window": 0, "sinks": 0, "scale_side": "key", "gate": "key"},
    ],
    ids=["default", "pure", "key", "map", "gate", "key, gate"],
)
def test_forecast_of_cosine_attention_is_close_to_the_peak(attention):
    teacher = make_teacher(max_position_embeddings=1024, **LARGE)
    measured = stage_peaks(teacher, {"cosine": {"type": "cosine", **attention}}, 512, "chunked", branch="mixed")
    attention = {"type": "cosine", **attention}
    assert stage_forecasts(teacher, attention, 512, fused=False) == pytest.approx(measured, rel=0.15)
    config = resolve({"attention": attention})
    counted = run_plan.mixer_parameter_count(Shape.of(teacher.config), config)
    assert memory.mechanism_of(Shape.of(teacher.config), config).parameters == counted


def test_forecast_of_a_gpt2_is_close_to_the_peak():
    teacher = make_gpt2(n_embd=256, n_positions=512)
    measured = stage_peaks(teacher, {"linear": {"type": "linear"}}, 512, "chunked")
    assert stage_forecasts(teacher, {}, 512, fused=False) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("length", [256, 1024])
def test_forecast_of_a_gptj_is_close_to_the_peak(length):
    """The longer one is that of the teacher's scores, which it holds as the stock model does."""
    teacher = make_gptj(n_embd=192, n_head=6, n_inner=384, rotary_dim=16, n_positions=1024)
    measured = stage_peaks(teacher, {"linear": {"type": "linear"}}, length, "chunked")
    assert stage_forecasts(teacher, {}, length, fused=False) == pytest.approx(measured, rel=0.15)


@pytest.mark.skipif(not triton_support.interpreting(), reason="on the CPU the kernels run in Triton's interpreter")
def test_forecast_of_the_fused_path_is_close_to_the_peak():
    teacher = make_teacher(**{**LARGE, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2})
    attention = {"feature_dim": 32}
    measured = stage_peaks(teacher, {"linear": {"type": "linear", **attention}}, 128, "triton")
    transfer, finetuning = stage_forecasts(teacher, attention, 128, fused=True)
    assert 0.97 < transfer / measured[0] < 1.15
    assert 0.97 < finetuning / measured[1] < 1.3


LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def stage_one(batch: int, length: int, **changes) -> tuple[RunConfig, TransferConfig]:
    transfer = TransferConfig(batch_size=batch, tokens_per_step=batch * length)
    return resolve({"data": {"sequence_length": length}, **changes}), transfer


@pytest.mark.parametrize(
    "shape, batch, length, measured",
    [(LLAMA_8B, 8, 1024, 17.32), (LLAMA_8B, 1, 8192, 17.33), (SMOLLM2, 8, 1024, 0.52)],
)
def test_forecast_of_the_fused_path_is_close_to_peaks_on_a_gpu(shape, batch, length, measured):
    """Allocator peaks of stage 1 on an H100 in bfloat16, in 1e9 bytes; then without the weights and the optimiser."""
    teacher = types.SimpleNamespace(**shape)
    forecast = memory.forecast_transfer(teacher, *stage_one(batch, length), fused=True)
    assert 0.97 < forecast.total / (measured * 1e9) < 1.15
    constant = forecast.weights + forecast.mixers
    assert 0.97 < (forecast.total - constant) / (measured * 1e9 - constant) < 1.15


def test_fused_kernels_hold_less_than_the_chunked_path():
    teacher = types.SimpleNamespace(**LLAMA_8B)
    config, transfer = stage_one(8, 1024)
    published = stage_one(8, 1024, attention={"map_input": "rotated", "gate": "none"})
    assert memory.forecast_transfer(teacher, *published).total == 19_882_405_068  # as before there was a fused path
    assert (
        memory.forecast_transfer(teacher, config, transfer, fused=True).activations
        < memory.forecast_transfer(teacher, config, transfer).activations / 3
    )
    for checkpointing in (True, False):
        finetune = FinetuneConfig(batch_size=8, gradient_checkpointing=checkpointing)
        fused = memory.forecast_finetune(teacher, config, finetune, fused=True)
        assert fused.activations < memory.forecast_finetune(teacher, config, finetune).activations


def test_what_else_can_be_the_fullest_moment_of_stage_one_on_the_fused_path():
    config, transfer = stage_one(8, 1024)
    usual = memory.forecast_transfer(types.SimpleNamespace(**LLAMA_8B), config, transfer, fused=True).activations
    wide = types.SimpleNamespace(**{**LLAMA_8B, "intermediate_size": 10 * 4096})
    assert memory.forecast_transfer(wide, config, transfer, fused=True).activations > usual
    cosine = changed(transfer, loss="cosine")
    assert memory.forecast_transfer(types.SimpleNamespace(**LLAMA_8B), config, cosine, fused=True).activations > usual


def test_chunks_are_those_of_the_kernels():
    from linearize.kernels.hybrid_linear.function import choose_tiles

    for name, chunk in memory.FUSED_CHUNK.items():
        product, _ = triton_support.product_precision(getattr(torch, name))
        assert product.itemsize == memory.FUSED_BYTES[name]
        for widest in (64, 128):
            tiles = choose_tiles(product, widest)
            assert (tiles.chunk, tiles.query.block) == (chunk, memory.FUSED_QUERIES)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of compute capability 9.0, as far as the questions before a run go."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_support, "INTERPRETING", False)
    monkeypatch.setattr(triton_support, "_capability", lambda index: (9, 0))
    monkeypatch.delenv("LINEARIZE_OP_BACKEND", raising=False)


@pytest.mark.parametrize(
    "changes, fused",
    [
        ({}, True),
        ({"op_backend": "triton", "dtype": "float32"}, True),
        ({"load_in_4bit": True, "attention": {"feature_dim": 128}}, True),
        ({"op_backend": "chunked"}, False),
        ({"op_backend": "reference"}, False),
        ({"device": "cpu"}, False),
        ({"attention": {"sinks": 65}}, False),
        ({"attention": {"feature_dim": 129}}, False),
        ({"attention": {"feature_dim": 65}, "dtype": "float16"}, False),
        ({"attention": {"feature_dim": 128, "feature_map": "relu"}, "dtype": "float16"}, True),
    ],
)
def test_which_runs_are_fused(gpu, changes, fused):
    assert memory.runs_fused(make_teacher().config, resolve(changes)) is fused


@pytest.mark.parametrize(
    ("attention", "reason"),
    [({"sinks": 65}, "at most 64 sinks"), ({"feature_dim": 129}, "feature count of at most 256")],
    ids=["sinks", "features"],
)
def test_settings_that_the_kernels_do_not_take_are_refused_before_anything_is_loaded(gpu, attention, reason):
    teacher = make_teacher().config
    for backend, given in (("auto", attention), ("chunked", attention), ("triton", {})):
        run_plan.check_triton_takes(teacher, resolve({"op_backend": backend, "attention": given}))
    with pytest.raises(UserError, match=f"op_backend is triton, but .*{reason}"):
        run_plan.check_triton_takes(teacher, resolve({"op_backend": "triton", "attention": attention}))


def test_the_kernels_are_asked_with_what_settings_give_them(gpu, monkeypatch):
    """Maps before position and a gate reach `unsupported` as arguments of the op, in the shapes that it has."""
    import linearize.kernels.hybrid_linear as kernel

    seen = {}
    monkeypatch.setattr(kernel, "unsupported", lambda *args, **options: seen.update(options))
    attention = {"map_input": "projections", "gate": "token", "share_key_map": True}
    assert memory.why_not_fused(make_teacher().config, resolve({"attention": attention})) is None
    assert seen["map_query"].shape == (1, 4, 1, 16) and seen["map_key"].shape == seen["log_decay"].shape + (16,)
    seen.clear()
    published = {"map_input": "rotated", "gate": "none"}
    memory.why_not_fused(make_teacher().config, resolve({"attention": published}))
    assert not set(seen) & {"map_query", "map_key", "log_decay"}


def test_what_else_keeps_a_run_from_the_fused_kernels(gpu, monkeypatch):
    teacher, config = make_teacher().config, resolve({})
    monkeypatch.setenv("LINEARIZE_OP_BACKEND", "chunked")
    assert not memory.runs_fused(teacher, config)
    assert memory.runs_fused(teacher, resolve({"op_backend": "triton"}))
    monkeypatch.delenv("LINEARIZE_OP_BACKEND")
    monkeypatch.setattr(triton_support, "_capability", lambda index: (7, 5))
    assert not memory.runs_fused(teacher, config)
    monkeypatch.setattr(triton_support, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(triton_support, "_installed", lambda: False)
    assert not memory.runs_fused(teacher, config)
    monkeypatch.setattr(triton_support, "_installed", lambda: True)
    assert memory.runs_fused(teacher, config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not memory.runs_fused(teacher, config)


@pytest.mark.parametrize("fused", [True, False])
def test_the_plan_forecasts_the_path_that_will_run(gpu, tmp_path, fused):
    teacher = make_teacher().config
    teacher.save_pretrained(tmp_path)
    transfer = {"kind": "transfer", "branch": "both", "max_steps": 9}
    stages = {"transfer": transfer, "finetune": {"kind": "train", "max_steps": 9}}
    backend = "auto" if fused else "chunked"
    run = {"model_name_or_path": str(tmp_path), "data": {"sequence_length": 128}, "stages": stages}
    config = resolve({**run, "op_backend": backend, "evaluation": None})
    plan, (transfer, finetune) = run_plan.make_plan(config), config.stages.values()
    assert plan.of("transfer").forecast == memory.forecast_transfer(teacher, config, transfer, fused=fused)
    assert plan.of("finetune").forecast == memory.forecast_finetune(teacher, config, finetune, fused=fused)


@pytest.mark.parametrize(
    "attention", [{}, {"window_shift": None, "bias": True}, {"share_key_map": True, "feature_dim": 8}]
)
def test_parameters_are_counted_exactly(attention):
    teacher = make_teacher()
    types = ["softmax", "linear", "linear"]
    student = make_student(teacher, {"linear": {"type": "linear", **attention}}, types)
    shape = Shape.of(teacher.config)
    parameters = dict(student.named_parameters())
    mixers = sum(parameter.numel() for name, parameter in parameters.items() if ".mixer." in name)
    assert memory.Mechanism.of(shape, attention, [0]).parameters == mixers
    everything = sum(parameter.numel() for parameter in parameters.values())
    assert shape.linear_parameters + shape.other_parameters == everything - mixers
    adapted = add_adapters(student, FinetuneConfig(lora_rank=3), train_mixers=False)
    lora = sum(parameter.numel() for name, parameter in adapted.named_parameters() if "lora_" in name)
    assert memory.adapter_parameters(shape, FinetuneConfig(lora_rank=3)) == lora


def test_what_lowers_the_forecast():
    teacher = make_teacher().config
    preset, whole = resolve_run("llama3_8b_linear", {"dtype": "bfloat16"}), resolve({})
    assert (
        memory.forecast_finetune(teacher, preset, preset.stages["finetune"]).total
        < memory.forecast_finetune(teacher, whole, FinetuneConfig(gradient_checkpointing=False)).total
    )
    small = resolve({"load_in_4bit": True})
    shape = Shape.of(make_teacher(hidden_size=512, intermediate_size=64).config)
    assert memory.weight_bytes(shape, small) < memory.weight_bytes(shape, whole)


def test_bytes_as_a_person_reads_them():
    assert memory.format_bytes(3 * 2**20) == "3 MiB"
    assert memory.format_bytes(17.25 * 2**30) == "17.2 GiB"
