"""What the training loops share: devices, batches in a fixed order, schedules, Ctrl-C, and running out of memory."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from linearize.errors import Terminated, UserError
from linearize.failures import smaller
from linearize.training.launcher import check_launcher, settings_decide_precision

if TYPE_CHECKING:
    from accelerate import Accelerator

    from linearize.config.settings import StepPlan
    from linearize.data.sequences import TokenBlocks

SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""Schedule of the settings -> transformers' name; its warm-up rises from 0, which is the rate of the first step."""


class StageConfig(Protocol):
    """The fields of `TransferConfig` and `FinetuneConfig` that the helpers here read."""

    batch_size: int
    tokens_per_step: int

    def plan(self, sequence_length: int, num_processes: int = 1) -> StepPlan: ...


def make_accelerator(device: str | torch.device | None) -> Accelerator:
    """The accelerator of a stage: process group and device. Nothing is wrapped by it.

    Mixed precision is not used: the dtype that the model was loaded in is the dtype of its arithmetic.

    Args:
        device: "cpu" keeps a machine's GPUs out of it; None and "auto" take what accelerate finds.
    """
    from accelerate import Accelerator

    check_launcher(str(device))
    with settings_decide_precision():
        return Accelerator(cpu=str(device) == "cpu")


def place_model(model: nn.Module, device: torch.device) -> torch.device:
    """Moves a model that lies on the CPU to the device; one that its loader or its owner has placed stays there.

    Returns:
        The device that its inputs belong on.
    """
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    placed = getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False)
    if not placed and embeddings.weight.device.type == "cpu":
        model.to(device)
    return embeddings.weight.device


def shard_frozen_base(model: Any, device: torch.device) -> None:
    """Shards the base weights over the processes (FSDP2), for a teacher that does not fit on one GPU.

    For stage 1 alone: call it before `transfer_attention`, which needs no other change. The mechanism's parameters are
    left whole on every process, so they are trained, averaged and saved as ever. The sharding is for good: for stage 2
    load the student anew and give it the `mixers` of the last checkpoint.

    Args:
        model: a converted model, not quantised. Its output head, which stage 1 does not use, stays where it is.
        device: of this process.
    """
    from torch.distributed import get_world_size, is_initialized
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not is_initialized() or get_world_size() == 1:
        return
    mesh = init_device_mesh(device.type, (get_world_size(),))
    mixers = {parameter for attention in model.mixer_attentions() for parameter in attention.mixer.parameters()}
    for layer in model.decoder_layers():
        fully_shard(layer, mesh=mesh, ignored_params=mixers)
    fully_shard(model.base_model, mesh=mesh, ignored_params=mixers)
    for parameter in mixers:
        parameter.data = parameter.data.to(device)


def exact_plan(config: StageConfig, sequence_length: int, num_processes: int, section: str) -> StepPlan:
    """The stage's steps, when `tokens_per_step` divides exactly into micro-batches.

    Raises:
        UserError: with the numbers, when it does not.
    """
    plan = config.plan(sequence_length, num_processes)
    if plan.tokens_per_step != config.tokens_per_step:
        raise UserError(
            f"{section}.tokens_per_step is {config.tokens_per_step}, but it must be a multiple of processes x "
            f"batch_size x sequence_length = {num_processes} x {config.batch_size} x {sequence_length} = "
            f"{num_processes * config.batch_size * sequence_length}; the next one is {plan.tokens_per_step}"
        )
    return plan


class Batches:
    """Which sequences each step of each process takes: a function of seed, step and rank alone.

    The epochs' permutations follow each other without a gap, and global micro-batch g is sequences
    `[g * batch_size, (g + 1) * batch_size)` of that stream. Micro-batch i of step s on rank r is global micro-batch
    `s * accumulation * num_processes + i * num_processes + r`: two processes take what one process takes in twice the
    accumulation, and a resumed run what the interrupted one would have taken.

    Args:
        blocks: the sequences.
        batch_size: sequences in a micro-batch.
        accumulation: micro-batches per process and step.
        seed: of the permutations.
        rank: this process.
        num_processes: all processes.
    """

    def __init__(
        self, blocks: TokenBlocks, batch_size: int, accumulation: int, seed: int, rank: int = 0, num_processes: int = 1
    ) -> None:
        if len(blocks) == 0:
            raise UserError("the training data has no whole sequence: lower data.sequence_length or give more text")
        self.blocks, self.batch_size, self.accumulation = blocks, batch_size, accumulation
        self.seed, self.rank, self.num_processes = seed, rank, num_processes
        self._epoch = -1
        self._order: list[int] = []

    def indices(self, step: int) -> list[list[int]]:
        """The sequences of each micro-batch of a step (steps count from 0)."""
        first = step * self.accumulation * self.num_processes + self.rank
        return [
            [self._index((first + i * self.num_processes) * self.batch_size + j) for j in range(self.batch_size)]
            for i in range(self.accumulation)
        ]

    def step(self, step: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
        """The micro-batches of a step: what a sequence has, such as `input_ids` and `labels`, each `(batch_size,
        L)`; padded rows cut to the longest."""
        from linearize.data.rows import collate

        for indices in self.indices(step):
            batch = collate([self.blocks[index] for index in indices])
            yield {key: to_device(tensor, device) for key, tensor in batch.items()}

    def _index(self, position: int) -> int:
        from linearize.data.sequences import epoch_order

        epoch, place = divmod(position, len(self.blocks))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self.blocks), self.seed, epoch).tolist()
        return self._order[place]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies to a device; to a GPU without waiting for the work that it still has to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Averages the gradients over the processes, by one all-reduce per device and dtype.

    Which parameters have a gradient must be the same on every process.
    """
    if accelerator.num_processes == 1:
        return
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault((parameter.grad.device, parameter.grad.dtype), []).append(parameter.grad)
    for gradients in groups.values():
        mean = accelerator.reduce(torch.cat([gradient.reshape(-1) for gradient in gradients]), reduction="mean")
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def stop_of(requested: float, terminated: float) -> type[KeyboardInterrupt] | None:
    """What ends a training after the step at hand, from the sums of `Interrupt.flags` over the processes."""
    if not requested:
        return None
    return Terminated if terminated else KeyboardInterrupt


class Interrupt:
    """Ctrl-C or SIGTERM, held back until the step is complete: `with Interrupt() as interrupt`, then ask
    `interrupt.requested`.

    A second one, two seconds later or more, stops at once and without a checkpoint. (Under torchrun the terminal
    and the launcher both pass on the first.) Outside the main thread, where Python delivers no signals, nothing is
    held back.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._terminated = False
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether Ctrl-C was pressed or SIGTERM came."""
        return self._since is not None

    def flags(self) -> list[float]:
        """Whether to stop, and whether SIGTERM asked for it: 0 or 1, to be summed over the processes."""
        return [float(self.requested), float(self._terminated)]

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._terminated = self._terminated or number == signal.SIGTERM
        if self._since is None:
            self._since = time.monotonic()
        elif time.monotonic() - self._since >= 2.0:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def readable_memory_errors(stage: str, section: str, config: StageConfig, length: int, *others: str) -> Iterator[None]:
    """Turns running out of memory into a sentence that names the stage and what to lower.

    Args:
        section: of the settings. length: of a sequence. others: as in `failures.smaller`.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU ran out of memory in {stage} (batch_size {config.batch_size}, sequence_length {length}): "
            f"{smaller(f'{section}.batch_size', config.batch_size, length, *others)}"
        ) from error


class PeakMemory:
    """Peak memory of the GPU from here on; None on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int | None:
        """Highest number of bytes that tensors have held at once."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
