"""A measured micro-batch of a stage, before it starts: how long it will take on this machine.

The weights stay as they are, and so does the state of the random numbers. What a step does once (the optimiser, the
average over processes, checkpoints) is not in it, nor is torch.compile: a compiled stage is faster than its trial.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from linearize.evaluation.arms import is_student
from linearize.training.losses import LossWeights, language_model_loss

WARM_UP, MEASURED = 1, 2
"""Micro-batches before and within the measurement: the first one compiles kernels and fills caches."""


def seconds_of(micro_batch: Callable[[], None], device: torch.device) -> float:
    """Seconds of one micro-batch, the mean of a few after the first."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        for _ in range(WARM_UP):
            micro_batch()
        _wait(device)
        start = time.perf_counter()
        for _ in range(MEASURED):
            micro_batch()
        _wait(device)
    return (time.perf_counter() - start) / MEASURED


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_rows(model: Any, rows: int, length: int) -> Tensor:
    """Token ids `(rows, length)` on the model's device: a text of any content takes as long."""
    table = model.get_input_embeddings().weight
    draws = torch.Generator().manual_seed(0)
    return torch.randint(table.shape[0], (rows, length), generator=draws).to(table.device)


def transfer_seconds(model: Any, settings: Any, length: int) -> float:
    """Of attention transfer.

    Args:
        settings: `TransferConfig`, its branch chosen. length: tokens of a sequence.
    """
    from linearize.stages.transfer import mixer_parameters, training_only
    from linearize.stages.transfer_loss import LayerLosses, branch_weights

    ids = random_rows(model, settings.batch_size, length)
    parameters = [parameter for group in mixer_parameters(model).values() for parameter in group.values()]
    losses, weights = LayerLosses(model, settings.loss, settings.loss_scale), branch_weights(settings.branch)
    with training_only(model, parameters), losses:

        def micro_batch() -> None:
            losses.run(ids, weights=weights, gradient_factor=1.0)
            losses.totals(ids.device)

        return seconds_of(micro_batch, ids.device)


def lora_seconds(model: Any, settings: Any, length: int) -> float:
    """Of LoRA: all layers' backward, without the gradients of frozen weights; adapters are small beside it.

    Args:
        settings: `FinetuneConfig`. length: tokens of a sequence.
    """
    from linearize.stages.finetuning import gradient_checkpointing
    from linearize.stages.transfer import mixer_parameters, training_only

    ids = random_rows(model, settings.batch_size, length)
    mixers = mixer_parameters(model) if settings.train_mixers else {}
    parameters = [parameter for group in mixers.values() for parameter in group.values()]
    weights = LossWeights(settings.ce_weight, settings.kl_weight, settings.temperature)

    def micro_batch() -> None:
        teacher = None
        if settings.kl_weight:
            with torch.no_grad(), model.use_arm("teacher"):
                teacher = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        sums = language_model_loss(
            hidden,
            ids,
            model.get_output_embeddings(),
            weights=weights,
            teacher_hidden_states=teacher,
            logits_chunk=settings.logits_chunk,
        )
        sums.total.backward()

    checkpointing = gradient_checkpointing(model, settings.gradient_checkpointing)
    with training_only(model, parameters), _with_input_gradients(model), checkpointing:
        return seconds_of(micro_batch, ids.device)


def full_seconds(model: Any, settings: Any, length: int, *, hides: bool = False) -> float:
    """Of training by the model's own loss, with as long again as a forward where there is a teacher.

    Args:
        settings: `FullTrainingConfig`. length: tokens of a sequence.
        hides: an encoder's: the loss is that of the hidden tokens.
    """
    from linearize.stages.full_training import trained_parameters
    from linearize.stages.transfer import training_only
    from linearize.training.launcher import in_bfloat16

    ids = random_rows(model, settings.batch_size, length)
    device = ids.device
    half = in_bfloat16(settings.precision, on_cpu=device.type == "cpu")
    options = {} if hides else {"use_cache": False}

    def micro_batch() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            if settings.teacher is not None:
                with torch.no_grad(), _teacher(model):
                    model(input_ids=ids, **options)
            model(input_ids=ids, labels=ids, **options).loss.backward()

    with training_only(model, trained_parameters(model, settings)):
        return seconds_of(micro_batch, device)


def embedding_seconds(model: Any, settings: Any, length: int) -> float:
    """Of an encoder that learns its teacher's embeddings.

    Args:
        settings: `EmbeddingConfig`. length: tokens of a row.
    """
    from linearize.stages.transfer import training_only
    from linearize.training.launcher import in_bfloat16

    ids, base = random_rows(model, settings.batch_size, length), model.base_model
    half = in_bfloat16(settings.precision, on_cpu=ids.device.type == "cpu")

    def micro_batch() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=half):
            with torch.no_grad(), _teacher(model):
                base(input_ids=ids)
            base(input_ids=ids).last_hidden_state.float().square().mean().backward()

    with training_only(model, list(base.parameters())):
        return seconds_of(micro_batch, ids.device)


def _teacher(model: Any) -> contextlib.AbstractContextManager[Any]:
    """The teacher's pass: the same shape."""
    return model.use_arm("teacher") if is_student(model) else contextlib.nullcontext()


@contextlib.contextmanager
def _with_input_gradients(model: nn.Module) -> Iterator[None]:
    """The embeddings' output has a gradient, so that the backward pass goes through all layers."""

    def require(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.requires_grad_(True)

    handle = model.get_input_embeddings().register_forward_hook(require)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()
