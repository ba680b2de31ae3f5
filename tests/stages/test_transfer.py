"""Attention transfer: what its gradients reach, what it computes, and how it goes on after every kind of stop."""

import errno
import os
import signal
import weakref

import pytest
import torch
from tiny_models import make_student, make_teacher, perturb
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.config.settings import TransferConfig
from linearize.data.sequences import TokenBlocks
from linearize.errors import UserError
from linearize.stages.transfer import hides_window, mixer_parameters, transfer_attention
from linearize.stages.transfer_loss import LOSSES, LayerLosses, branch_weights
from linearize.training import checkpointing
from linearize.training.checkpointing import latest_checkpoint, step_directories
from linearize.training.log import TrainingDiverged, read_log
from linearize.training.loop import Batches, Interrupt

LENGTH = 24
TIMES = ("seconds", "tokens_per_second")


@pytest.fixture
def blocks():
    return TokenBlocks(torch.randint(3, 97, (10, LENGTH), generator=torch.Generator().manual_seed(5)))


def settings(**changes):
    values = {"max_steps": 6, "batch_size": 2, "tokens_per_step": 4 * LENGTH, "logging_steps": 1, "save_steps": 100}
    return TransferConfig(**{**values, **changes})


def gradients(model, immediate=True, loss="relative_mse", branch="both"):
    ids = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(6))
    with LayerLosses(model, loss, immediate=immediate) as losses:
        losses.run(ids, weights=branch_weights(branch), gradient_factor=1.0)
        means = losses.means(torch.device("cpu"))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, means


def without_times(path):
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_log(path)]


def test_gradients_reach_only_the_mechanism_and_the_hidden_flow_is_the_stock_models(
    teacher, student, blocks, tmp_path
):
    flow = {}

    def record(name):
        return lambda module, inputs, output: flow.setdefault(name, []).append(output)

    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    for name, model in (("stock", teacher), ("transfer", student)):
        for layer in model.model.layers:
            layer.register_forward_hook(record(name))
    student.train()
    reached = set()
    for name, parameter in student.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: reached.add(name))
    transfer_attention(student, blocks, settings(max_steps=1, tokens_per_step=2 * LENGTH), output_dir=tmp_path)

    order = Batches(blocks, 2, 1, seed=0).indices(0)[0]
    with torch.no_grad():
        teacher.model(blocks[order]["input_ids"], use_cache=False)
    assert len(flow["stock"]) == len(flow["transfer"]) == 3
    for stock, ours in zip(flow["stock"], flow["transfer"], strict=True):
        assert torch.equal(stock, ours) and not ours.requires_grad

    mixers = {name for name in before if ".mixer." in name}
    assert reached == mixers
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == mixers
    assert student.training and all(p.requires_grad and p.grad is None for p in student.parameters())
    assert all(a.arm == "mixed" and a.observer is None for a in student.mixer_attentions())


@pytest.mark.parametrize("loss", list(LOSSES))
def test_immediate_backward_equals_the_summed_loss(student, loss):
    student.requires_grad_(False)
    for group in mixer_parameters(student).values():
        for parameter in group.values():
            parameter.requires_grad_(True)
    immediate, means = gradients(student, True, loss)
    student.zero_grad()
    summed, summed_means = gradients(student, False, loss)
    assert immediate.keys() == summed.keys() == {n for n, _ in student.named_parameters() if ".mixer." in n}
    for name in immediate:
        assert immediate[name].abs().max() > 0
        torch.testing.assert_close(immediate[name], summed[name], rtol=1e-6, atol=0)
    assert all(torch.equal(means[arm], summed_means[arm]) for arm in ("mixed", "linear"))


def test_a_layers_graph_is_gone_before_the_next_layer():
    """Tensors saved for backward at one time: one layer's, however many layers there are."""

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # a node that keeps its own output would never go

    def most_saved(layers, immediate):
        model = make_student(make_teacher(num_hidden_layers=layers))
        live, most = weakref.WeakSet(), [0]

        def pack(tensor):
            saved = Saved(tensor)
            live.add(saved)
            most[0] = max(most[0], len(live))
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            gradients(model, immediate)
        assert len(live) == 0
        return most[0]

    one = most_saved(1, True)
    assert most_saved(4, True) == one
    assert most_saved(4, False) > 3 * one


def test_no_tokens_by_tokens_tensor():
    length = 600

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    assert sum(size >= length for size in tensor.shape) < 2, f"{function}: {tuple(tensor.shape)}"
            return result

    model = make_student(make_teacher(num_hidden_layers=1, max_position_embeddings=length))
    ids = torch.randint(3, 97, (1, length))
    with Watch(), LayerLosses(model, "relative_mse") as losses:
        losses.run(ids, weights=branch_weights("both"), gradient_factor=1.0)


def test_losses_are_those_of_the_formulas_on_real_tokens():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)
    error = (student - teacher).square()
    assert torch.isclose(LOSSES["mse"](student, teacher, None).mean(), error.mean())
    assert torch.isclose(LOSSES["relative_mse"](student, teacher, None).mean(), error.mean() / teacher.square().mean())
    cosine = 1 - functional.cosine_similarity(student, teacher, dim=-1)
    assert torch.isclose(LOSSES["cosine"](student, teacher, None).mean(), cosine.mean())

    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    noisy = [x.masked_fill(mask[:, None, :, None] == 0, float("nan")).requires_grad_() for x in (student, teacher)]
    real = [torch.cat([x[0, :, 2:], x[1, :, :4]], dim=1)[None] for x in (student, teacher)]
    for name, loss in LOSSES.items():
        value = loss(*noisy, mask).mean()
        assert torch.isclose(value, loss(*real, None).mean()), name
        assert torch.autograd.grad(value, noisy[0])[0].isfinite().all(), name
    half = LOSSES["mse"](student.bfloat16(), teacher.bfloat16(), None).mean()
    assert half.dtype == torch.float32


@pytest.mark.parametrize("name", ["relative_mse", "mse"])
@pytest.mark.parametrize("padded", [False, True])
def test_half_precision_outputs_are_never_copied_to_float32(name, padded):
    """The squared losses of bf16 outputs: within rounding of float64's, the gradient in the outputs' own layout."""
    torch.manual_seed(0)
    teacher = torch.randn(2, 64, 3, 16).bfloat16().transpose(1, 2)
    student = (teacher.float() + 0.1 * torch.randn(2, 3, 64, 16)).bfloat16().requires_grad_()
    mask = torch.arange(64)[None] >= torch.tensor([[5], [0]]) if padded else None
    exact = student.detach().double().requires_grad_()
    expected = LOSSES[name](exact, teacher.double(), mask).mean()
    (expected_gradient,) = torch.autograd.grad(expected, exact)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                wide = isinstance(tensor, torch.Tensor) and tensor.numel() >= student.numel()
                assert not wide or tensor.dtype in (torch.bfloat16, torch.bool), function
            return result

    with Watch():
        loss = LOSSES[name](student, teacher, mask).mean()
        (gradient,) = torch.autograd.grad(loss * 3.0, student)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-4, atol=0)
    assert gradient.dtype == torch.bfloat16
    assert (gradient / 3.0 - expected_gradient).norm() <= 4e-3 * expected_gradient.norm()


def test_padded_rows_count_their_real_tokens(student):
    ids = torch.randint(3, 97, (1, LENGTH))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(LENGTH + 5) >= 5).long()[None]
    values = []
    with LayerLosses(student, "mse", loss_scale=1000.0) as losses:
        for tokens, attention_mask in ((ids, None), (padded, mask)):
            losses.run(tokens, attention_mask, weights=branch_weights("both"), gradient_factor=None)
            values.append(losses.means(torch.device("cpu")))
    for arm in ("mixed", "linear"):
        torch.testing.assert_close(values[0][arm], values[1][arm], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"branch": "mixed", "loss": "mse", "loss_scale": 1000.0, "schedule": "constant"},
        {"branch": "linear", "loss": "cosine", "schedule": "cosine", "max_grad_norm": 0},
        {"window_dropout": [1.0, 0.5, 0.0], "warmup_steps": 3},
    ],
    ids=["default", "published", "linear-cosine", "window-dropout"],
)
def test_losses_fall(options, blocks, tmp_path):
    student = make_student(make_teacher(), {"linear": {"type": "linear", "window": 4, "sinks": 1}})
    result = transfer_attention(
        student, blocks, settings(max_steps=24, logging_steps=4, **options), output_dir=tmp_path, validation=blocks
    )
    records = read_log(result.log_path)
    branch = options.get("branch", "both")
    for arm in ("mixed", "linear") if branch == "both" else (branch,):
        values = [record[f"{arm}_loss"] for record in records if f"{arm}_loss" in record]
        assert values[-1] < 0.97 * values[0], arm
        assert records[-1][f"validation_{arm}_loss"] > 0
    assert records[-1]["learning_rate"] < 0.2 * settings().learning_rate or options.get("schedule") == "constant"
    assert result.losses_per_layer == [record["layer_losses"] for record in records]
    assert (len(records), len(result.losses_per_layer[0])) == (6, 3)
    assert (result.steps, result.tokens) == (24, 24 * 4 * LENGTH)
    assert result.tokens_per_second > 0 and result.peak_memory_bytes is None and result.seconds > 0
    assert (tmp_path / "plots" / "transfer_loss.png").read_bytes().startswith(b"\x89PNG")


def test_softmax_layers_and_learning_rate_groups(blocks, tmp_path):
    student = make_student(
        make_teacher(), {"linear": {"type": "linear", "window": 4}}, ["linear", "softmax", "linear"]
    )
    groups = mixer_parameters(student)
    assert {name.split(".")[0] for name in groups["maps"]} == {"0", "2"}
    assert {name.split(".", 1)[1] for name in groups["window"]} == {"window_mix.weight", "window_mix.shift"}
    start = {name: p.detach().clone() for group in groups.values() for name, p in group.items()}
    transfer_attention(student, blocks, settings(max_steps=1), output_dir=tmp_path)
    for rate, group in ((1e-2, "maps"), (3e-2, "window")):
        moved = torch.cat([(p.detach() - start[name]).abs().flatten() for name, p in groups[group].items()])
        torch.testing.assert_close(moved.max(), torch.tensor(rate), rtol=1e-3, atol=0)  # Adam's first step
    assert len(read_log(tmp_path / "logs" / "transfer.jsonl")[0]["layer_losses"]) == 2


def test_model_without_converted_layers_is_refused(blocks, tmp_path):
    student = make_student(make_teacher(), {"linear": {"type": "linear"}}, ["softmax"] * 3)
    with pytest.raises(UserError, match="no converted layer"):
        transfer_attention(student, blocks, settings(), output_dir=tmp_path)


def test_window_dropout_is_a_schedule_over_equal_parts():
    config = settings(window_dropout=[0.9, 0.75, 0.5])
    hidden = [hides_window(config, step, 3000, seed=0) for step in range(3000)]
    shares = [sum(hidden[i : i + 1000]) / 1000 for i in (0, 1000, 2000)]
    assert all(abs(share - asked) < 0.05 for share, asked in zip(shares, (0.9, 0.75, 0.5), strict=True))
    assert hidden == [hides_window(config, step, 3000, seed=0) for step in range(3000)]
    assert hidden != [hides_window(config, step, 3000, seed=1) for step in range(3000)]
    assert not hides_window(settings(), 0, 1, seed=0)
    assert branch_weights("both") == {"mixed": 1.0, "linear": 1.0}
    assert branch_weights("both", hide_window=True) == {"linear": 2.0}
    assert branch_weights("mixed", hide_window=True) == branch_weights("linear") == {"linear": 1.0}


@pytest.mark.parametrize("loss", list(LOSSES))
def test_the_cut_into_micro_batches_has_no_part_in_the_result(tmp_path, loss):
    """Losses and mechanism after three steps, rows of different lengths among them; 1 sequence at once against 4."""

    class Padded(TokenBlocks):
        def __getitem__(self, index):
            length = 6 + 2 * index if index < 9 else LENGTH
            ids = super().__getitem__(index)["input_ids"]
            return {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) < length).long()}

    ids = torch.randint(3, 97, (10, LENGTH), generator=torch.Generator().manual_seed(5))
    found = []
    for size in (4, 1, 2):
        student = make_student(make_teacher(), {"linear": {"type": "linear", "window": 4, "sinks": 1}}).double()
        config = settings(max_steps=3, batch_size=size, loss=loss)
        result = transfer_attention(student, Padded(ids), config, output_dir=tmp_path / str(size))
        found.append((result.losses_per_layer, student.mixer_state_dict()))
    for losses, mixers in found[1:]:
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(found[0][0]), rtol=1e-9, atol=0)
        for name, tensor in mixers.items():
            torch.testing.assert_close(tensor, found[0][1][name], rtol=1e-7, atol=1e-9)


def test_processes_share_the_order_of_one(blocks):
    one = Batches(blocks, 2, 2, seed=3)
    two = [Batches(blocks, 2, 1, seed=3, rank=rank, num_processes=2) for rank in (0, 1)]
    steps = [one.indices(step) for step in range(5)]
    assert steps == [[batches.indices(step)[0] for batches in two] for step in range(5)]
    seen = [index for step in steps for micro_batch in step for index in micro_batch]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert Batches(blocks, 2, 2, seed=3).indices(4) == steps[4]


def test_ctrl_c_leaves_a_checkpoint_and_resume_is_bit_equal(blocks, tmp_path):
    config = settings(max_steps=9, logging_steps=2, window_dropout=0.3)
    whole = make_student(make_teacher())
    expected = transfer_attention(whole, blocks, config, output_dir=tmp_path / "whole")

    stopped = make_student(make_teacher())

    def interrupt(record):
        if record["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="attention transfer stopped after step 5 of 9"):
        transfer_attention(stopped, blocks, config, output_dir=tmp_path / "parts", on_log=interrupt)
    assert signal.getsignal(signal.SIGINT) == before
    assert [path.name for path in step_directories(tmp_path / "parts" / "checkpoints" / "transfer")] == ["step-5"]

    resumed = make_student(make_teacher())
    result = transfer_attention(resumed, blocks, config, output_dir=tmp_path / "parts", resume=True)
    assert result.losses_per_layer == expected.losses_per_layer
    assert without_times(result.log_path) == without_times(expected.log_path)
    for name, tensor in whole.mixer_state_dict().items():
        assert torch.equal(tensor, resumed.mixer_state_dict()[name]), name

    again = make_student(make_teacher())
    finished = transfer_attention(again, blocks, config, output_dir=tmp_path / "parts", resume=True)
    assert finished.losses_per_layer == expected.losses_per_layer and finished.tokens_per_second is None
    assert all(torch.equal(t, again.mixer_state_dict()[name]) for name, t in whole.mixer_state_dict().items())


def test_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        os.kill(os.getpid(), signal.SIGINT)  # The launcher's echo of the first.
        interrupt._since -= 3
        os.kill(os.getpid(), signal.SIGINT)


def test_nan_names_layer_and_step_and_keeps_the_last_good_checkpoint(blocks, tmp_path):
    student = make_student(make_teacher())

    def poison(record):
        if record["step"] == 3:
            student.model.layers[1].self_attn.mixer.feature_map_q.weight.data.fill_(float("nan"))

    with pytest.raises(
        TrainingDiverged,
        match="the mixed loss of layer 1 is nan at step 4; lower transfer.gate_learning_rate and "
        "transfer.learning_rate and transfer.window_learning_rate",
    ):
        transfer_attention(student, blocks, settings(save_steps=2), output_dir=tmp_path, on_log=poison)
    checkpoint = latest_checkpoint(tmp_path / "checkpoints" / "transfer")
    assert checkpoint.name == "step-2"
    tensors = checkpointing.load_checkpoint(checkpoint).tensors["mixers"]
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_gradient_that_overflows_is_named(blocks, tmp_path):
    student = make_student(make_teacher())
    student.model.layers[2].self_attn.mixer.window_mix.shift.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingDiverged, match=r"the gradient of layer 2.window_mix.shift is (inf|nan) at step 1"):
        transfer_attention(student, blocks, settings(), output_dir=tmp_path)


def test_full_disk_keeps_the_previous_checkpoint(blocks, tmp_path, monkeypatch):
    write = checkpointing.write_bytes

    def failing(path, data):
        if ".step-4" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpointing, "write_bytes", failing)
    student = make_student(make_teacher())
    with pytest.raises(UserError, match="no space left on the disk while writing .*step-4"):
        transfer_attention(student, blocks, settings(save_steps=2), output_dir=tmp_path)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints" / "transfer").iterdir()] == ["step-2"]
    resumed = transfer_attention(make_student(make_teacher()), blocks, settings(), output_dir=tmp_path, resume=True)
    assert resumed.steps == 6 and len(resumed.losses_per_layer) == 6


def test_gpu_memory_error_says_stage_and_remedy(student, blocks, tmp_path, monkeypatch):
    def forward(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(student.model, "forward", forward)
    with pytest.raises(
        UserError, match=r"attention transfer \(batch_size 2, sequence_length 24\): lower transfer.batch_size"
    ):
        transfer_attention(student, blocks, settings(), output_dir=tmp_path)
    assert all(a.arm == "mixed" and a.observer is None for a in student.mixer_attentions())


def test_settings_that_do_not_fit(student, blocks, tmp_path):
    with pytest.raises(
        UserError, match=r"tokens_per_step is 100, but it must be a multiple .* 1 x 2 x 24 = 48; the next one is 144"
    ):
        transfer_attention(student, blocks, settings(tokens_per_step=100), output_dir=tmp_path)
    with pytest.raises(UserError, match="no whole sequence"):
        transfer_attention(student, TokenBlocks(torch.zeros(0, LENGTH)), settings(), output_dir=tmp_path)
    assert not any(tmp_path.iterdir())
    transfer_attention(student, blocks, settings(max_steps=1), output_dir=tmp_path)
    with pytest.raises(UserError, match="already holds checkpoints"):
        transfer_attention(student, blocks, settings(max_steps=1), output_dir=tmp_path)
    with pytest.raises(UserError, match=r"trained with tokens_per_step 96 \(now 48\), seed 0 \(now 7\)"):
        transfer_attention(student, blocks, settings(tokens_per_step=48), output_dir=tmp_path, resume=True, seed=7)
    other = make_student(make_teacher(), {"linear": {"type": "linear", "feature_dim": 4}})
    with pytest.raises(UserError, match="its mechanism has other settings"):
        transfer_attention(other, blocks, settings(), output_dir=tmp_path, resume=True)
    nothing = transfer_attention(student, blocks, settings(max_steps=0), output_dir=tmp_path / "none")
    assert (nothing.steps, nothing.tokens, nothing.losses_per_layer) == (0, 0, [])


def test_bfloat16_base_trains_float32_mixers(teacher, blocks, tmp_path):
    student = make_student(teacher.bfloat16())
    student.to(torch.bfloat16)
    for attention in student.mixer_attentions():
        attention.mixer.float()
    perturb(student)
    result = transfer_attention(student, blocks, settings(max_steps=2), output_dir=tmp_path)
    assert all(tensor.dtype == torch.float32 for tensor in student.mixer_state_dict().values())
    assert all(value > 0 for value in result.losses_per_layer[-1])
