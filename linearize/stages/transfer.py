"""Stage 1, attention transfer: the mechanism's own parameters learn to give each layer's softmax output.

Teacher and student are one set of weights. The loop is bare: each process runs its micro-batches with the immediate
backward of `transfer_loss.LayerLosses`, then one all-reduce averages the mechanism's gradients (no DDP, whose hooks
belong to a wrapped forward).
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import get_scheduler

from linearize.config.settings import TransferConfig, changed
from linearize.errors import UserError
from linearize.paths import user_path
from linearize.stages.identity import base_identity, data_identity, require_same_run
from linearize.stages.transfer_loss import LayerLosses, branch_weights, model_inputs
from linearize.training.checkpointing import Checkpoint, checkpoint_to_resume, save_checkpoint
from linearize.training.log import TrainingLog, check_finite, plot_transfer, read_log, tracker_names
from linearize.training.loop import (
    SCHEDULERS,
    Batches,
    Interrupt,
    PeakMemory,
    average_gradients,
    exact_plan,
    make_accelerator,
    place_model,
    readable_memory_errors,
    stop_of,
)

if TYPE_CHECKING:
    from linearize.data.sequences import TokenBlocks

logger = logging.getLogger(__name__)

STAGE = "attention transfer"
RATES = {
    "maps": "learning_rate",
    "scalers": "learning_rate",
    "window": "window_learning_rate",
    "gate": "gate_learning_rate",
    "gate_bias": "window_learning_rate",
}
"""The setting that gives a group of the mechanism's parameters its learning rate."""
Record = dict[str, Any]


@dataclass
class TransferResult:
    """What stage 1 leaves beside the trained model."""

    losses_per_layer: list[list[float]]
    """One row per line of the log (those before a resume included), one loss per converted layer in it."""
    steps: int
    """Optimiser steps of the whole stage."""
    tokens: int
    """Tokens of the whole stage, over all processes."""
    seconds: float
    """Wall-clock seconds of this call."""
    peak_memory_bytes: int | None
    """Peak of this process's GPU; None on a CPU."""
    log_path: Path
    tokens_per_second: float | None
    """Over all processes, without this call's first step, checkpoints and validation; None for a single step."""


def check_transfers(kind: str) -> None:
    """Refuse attention transfer of a mechanism that it cannot train.

    Raises:
        UserError: one sentence.
    """
    from linearize.modeling.registry import mechanism

    if not mechanism(kind).transfers:
        raise UserError(
            f"{kind} attention has nothing to train layer by layer: set transfer to none, and train its model as a "
            "whole."
        )


def with_branch(config: TransferConfig, mixers: Collection[Mapping[str, Any]]) -> TransferConfig:
    """The settings with the branch to train, where they leave it to the mechanisms.

    `both` for linear attention that has two branches, else `mixed`: beside a window cosine attention's gain is fitted
    to the keys outside it, and learning to give the whole output alone would undo that.

    Args:
        mixers: the settings of each mechanism, with its `type`.
    """
    from linearize.modeling.registry import mechanism

    if config.branch is not None:
        return config
    linear = [mechanism(mixer["type"]).config(**mixer) for mixer in mixers if mixer["type"] == "linear"]
    both = len(linear) == len(mixers) and any(settings.window + settings.sinks for settings in linear)
    return changed(config, branch="both" if both else "mixed")


def check_branch(config: TransferConfig, arms: Sequence[str]) -> None:
    """Refuse to train an arm that an attention does not have.

    Args:
        config: with its branch.

    Raises:
        UserError: one sentence.
    """
    assert config.branch is not None, "see with_branch"
    if absent := [arm for arm in branch_weights(config.branch) if arm not in arms]:
        raise UserError(
            f"{config.section}.branch is {config.branch!r}, which trains the {absent[0]} arm, and this attention has "
            f"none: set {config.section}.branch to mixed."
        )
    if any(config.window_dropout_schedule) and "linear" not in arms:
        raise UserError(
            f"{config.section}.window_dropout is {config.window_dropout}, and this attention has no window that it "
            f"could hide: set {config.section}.window_dropout to 0."
        )


def transfer_attention(
    model: Any,
    train: TokenBlocks,
    config: TransferConfig,
    *,
    output_dir: str | Path,
    seed: int = 0,
    resume: bool | str | Path = False,
    report_to: str | Sequence[str] = ("none",),
    validation: TokenBlocks | None = None,
    on_log: Callable[[Record], None] | None = None,
    device: str | None = None,
) -> TransferResult:
    """Trains the mechanism of every converted layer, in place; nothing else of the model changes.

    Writes `logs/NAME.jsonl`, `plots/NAME_loss.png` and `checkpoints/NAME/step-N` under `output_dir`, by the
    name of the stage (`config.section`).
    Ctrl-C ends the step at hand, leaves a checkpoint and raises `KeyboardInterrupt`.

    Args:
        model: a converted model. Its dtype is the dtype of the arithmetic; the mechanism's parameters are float32.
        train: the training sequences; every token counts, prompts included, but for padding where rows have an
            `attention_mask`.
        config: the settings of the stage.
        output_dir: run directory.
        seed: of the data's order and of window dropout. No other randomness enters.
        resume: True goes on from the latest checkpoint (if there is one), a path from that one.
        report_to: trackers of accelerate: trackio, wandb, tensorboard, ...; "none" for none.
        validation: sequences to take the losses on every `eval_steps` steps and at the end.
        on_log: called with each record of the log, on the main process.
        device: "cpu" keeps to the CPU; None takes the process's GPU where there is one.

    Raises:
        UserError: settings that do not fit each other or the checkpoint, a full disk, or no GPU memory left.
        TrainingDiverged: a loss or gradient is not finite; names the layer and the step.
    """
    if not model.mixer_attentions():
        raise UserError("the model has no converted layer to train: choose fewer softmax_layers")
    for settings in model.config.mixers.values():
        check_transfers(settings["type"])
    config = with_branch(config, model.config.mixers.values())
    check_branch(config, model.arms())
    run = _Transfer(model, train, config, Path(user_path(output_dir)), seed, report_to, validation, on_log, device)
    with readable_memory_errors(STAGE, config.section, config, run.sequence_length, "set load_in_4bit"):
        return run.train(checkpoint_to_resume(run.checkpoint_dir, resume))


def hides_window(config: TransferConfig, step: int, steps: int, seed: int) -> bool:
    """Whether window dropout hides the softmax window in a step (from 0): the same on every process and resume."""
    schedule = config.window_dropout_schedule
    probability = schedule[min(step * len(schedule) // max(steps, 1), len(schedule) - 1)]
    return random.Random(f"window dropout {seed} {step}").random() < probability


def mixer_parameters(model: Any) -> dict[str, dict[str, nn.Parameter]]:
    """The mechanism's parameters by learning-rate group ("maps", "window"), each by `layer.name`."""
    groups: dict[str, dict[str, nn.Parameter]] = {}
    for attention in model.mixer_attentions():
        for name, parameter in attention.mixer.named_parameters():
            group = attention.mixer.parameter_group(name)
            groups.setdefault(group, {})[f"{attention.layer_idx}.{name}"] = parameter
    return groups


@contextlib.contextmanager
def training_only(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside the block only these parameters require gradients, and the model is in evaluation mode (no dropout)."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    was_training = model.training
    model.eval()
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for parameter in parameters:
            parameter.grad = None
        model.train(was_training)


class _Transfer:
    """One call of `transfer_attention`: its steps, its log and its checkpoints."""

    def __init__(
        self,
        model: Any,
        train: TokenBlocks,
        config: TransferConfig,
        output_dir: Path,
        seed: int,
        report_to: str | Sequence[str],
        validation: TokenBlocks | None,
        on_log: Callable[[Record], None] | None,
        device: str | None,
    ) -> None:
        self.model, self.config, self.seed, self.validation, self.on_log = model, config, seed, validation, on_log
        assert config.branch is not None, "see with_branch"
        self.branch: str = config.branch
        self.output_dir = output_dir
        self.checkpoint_dir = output_dir / "checkpoints" / config.section
        self.log_path = output_dir / "logs" / f"{config.section}.jsonl"
        self.report_to = tracker_names(report_to)
        self.accelerator = make_accelerator(device)
        self.device = place_model(model, self.accelerator.device)
        self.sequence_length = len(train[0]["input_ids"]) if len(train) else 0
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        batch_size = config.batch_size
        self.plan = exact_plan(config, max(self.sequence_length, 1), self.world, config.section)
        self.batches = Batches(train, batch_size, self.plan.accumulation, seed, self.rank, self.world)
        self.losses = LayerLosses(model, config.loss, config.loss_scale)
        groups = mixer_parameters(model)
        self.parameters = {name: p for group in groups.values() for name, p in group.items()}
        rates = {name: getattr(config, RATES[name]) for name in groups}
        named = " and ".join(f"{config.section}.{setting}" for setting in sorted({RATES[name] for name in groups}))
        self.advice = f"lower {named}, or load the base in another dtype"
        self.learning_rates = [rates[name] for name in groups]
        self.optimizer = torch.optim.AdamW(
            [{"params": list(group.values()), "lr": rates[name]} for name, group in groups.items()],
            weight_decay=config.weight_decay,
            # One pass over the states; the default on a GPU makes about ten.
            fused=True if all(parameter.is_cuda for parameter in self.parameters.values()) else None,
        )
        schedule = SCHEDULERS[config.schedule]
        # Its function of the step alone: a resumed run may have other rates and other steps than its checkpoint.
        self.factor = get_scheduler(schedule, self.optimizer, config.warmup_steps, self.plan.steps).lr_lambdas[0]
        self.run_identity = {
            "sequence_length": self.sequence_length,
            "tokens_per_step": self.plan.tokens_per_step,
            "num_blocks": len(train),
            "seed": seed,
            "layers": self.losses.layers,
            "data": data_identity(train),
            "base": base_identity(model),
        }
        self.completed = 0
        self.updating = False
        self.records: list[Record] = []
        self.since_log: list[dict[str, list[float]]] = []
        self.timed_steps, self.timed_seconds = 0, 0.0

    def train(self, checkpoint: Checkpoint | None) -> TransferResult:
        """The stage, from the start or from a checkpoint."""
        started = time.perf_counter()
        memory = PeakMemory(self.device)
        if checkpoint is not None:
            self._restore(checkpoint)
            self.records = [r for r in read_log(self.log_path) if r["step"] <= self.completed]
        self.accelerator.wait_for_everyone()  # All have read the log before the main process rewrites it.
        self.log = None
        if self.accelerator.is_main_process:
            after_step, settings = self.completed if checkpoint else None, {**asdict(self.config), "seed": self.seed}
            self.log = TrainingLog(self.log_path, after_step, self.report_to, settings)
        try:
            with training_only(self.model, list(self.parameters.values())), self.losses, Interrupt() as interrupt:
                self._steps(interrupt, started)
        finally:
            if self.log is not None:
                self.log.close()
        self.accelerator.wait_for_everyone()
        return TransferResult(
            losses_per_layer=[record["layer_losses"] for record in self.records],
            steps=self.completed,
            tokens=self.completed * self.plan.tokens_per_step,
            seconds=time.perf_counter() - started,
            peak_memory_bytes=memory.bytes(),
            log_path=self.log_path,
            tokens_per_second=self._tokens_per_second(),
        )

    def _steps(self, interrupt: Interrupt, started: float) -> None:
        from tqdm.auto import tqdm

        saved, warm = self.completed, False
        bar = tqdm(
            total=self.plan.steps,
            initial=self.completed,
            desc=STAGE,
            unit="step",
            dynamic_ncols=True,
            disable=not self.accelerator.is_main_process,
        )
        try:
            while self.completed < self.plan.steps:
                before = time.perf_counter()
                step = self._step(self.completed, interrupt)
                if warm:
                    self.timed_steps += 1
                    self.timed_seconds += time.perf_counter() - before
                warm = True
                bar.set_postfix_str(f"loss {statistics.fmean(step['loss']):.4g}", refresh=False)
                bar.update()
                last = self.completed == self.plan.steps
                if last or self.completed % self.config.logging_steps == 0 or self._validates():
                    self._log(step, started)
                if last or step["stop"] is not None or self.completed % self.config.save_steps == 0:
                    self._save()
                    saved = self.completed
                if step["stop"] is not None:
                    raise step["stop"]
        except KeyboardInterrupt as stop:
            if self.completed > saved and not self.updating:
                self._save()
            raise type(stop)(
                f"{STAGE} stopped after step {self.completed} of {self.plan.steps}; resume continues from there"
            ) from None
        finally:
            bar.close()

    def _step(self, step: int, interrupt: Interrupt) -> Record:
        """One optimiser step. Returns the losses by layer ("loss"), the norm of the gradients, and "stop"."""
        hidden = hides_window(self.config, step, self.plan.steps, self.seed)
        weights = branch_weights(self.branch, hidden)
        for batch in self.batches.step(step, self.device):
            self.losses.run(**model_inputs(batch), weights=weights, gradient_factor=1.0)
        totals = self._take_together()
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        values, norm_value, stop = self._shared_figures(totals, norm, interrupt)
        for arm, by_layer in values.items():
            names = [f"the {arm} loss of layer {layer}" for layer in self.losses.layers]
            check_finite(STAGE, step + 1, dict(zip(names, by_layer, strict=True)), self.advice)
        if not math.isfinite(norm_value):
            grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
            norms = {f"the gradient of layer {name}": float(gradient.norm()) for name, gradient in grads.items()}
            check_finite(STAGE, step + 1, norms | {"the norm of all gradients": norm_value}, self.advice)
        self.updating = True
        self._update(step, norm)
        self.completed = step + 1
        total = [sum(weights[arm] * values[arm][i] for arm in values) for i in range(len(self.losses.layers))]
        self.since_log.append({"loss": total, **values})
        self.updating = False
        return {"loss": total, "norm": norm_value, "stop": stop}

    def _take_together(self) -> dict[str, torch.Tensor]:
        """Makes the gradients of all micro-batches and processes one gradient: that of the loss over the whole step.

        Returns:
            Errors and scales by arm, `(2, layers)`, over all processes; of the step's loss.
        """
        first, own = self.losses.first_scales(self.device), self.losses.totals(self.device)
        arms = list(own)
        summed = self.accelerator.reduce(torch.stack(list(own.values())), reduction="sum")
        totals = dict(zip(arms, summed, strict=True))
        # Arms have the teacher's scale in common. The all-reduce after this averages.
        factors = self.world * first / totals[arms[0]][1]
        if self.world * self.plan.accumulation > 1:
            for factor, attention in zip(factors, self.losses.attentions, strict=True):
                for gradient in [p.grad for p in attention.mixer.parameters() if p.grad is not None]:
                    gradient.mul_(factor.to(gradient))
        average_gradients(self.parameters.values(), self.accelerator)
        return totals

    def _shared_figures(
        self, totals: dict[str, torch.Tensor], norm: torch.Tensor, interrupt: Interrupt
    ) -> tuple[dict[str, list[float]], float, type[KeyboardInterrupt] | None]:
        """What a step tells, averaged over micro-batches and processes; the only place where it waits for the GPU.

        Returns:
            Losses by arm and layer; the norm of the gradients, which is the same on every process; what stops the
            training, if any process was interrupted.
        """
        means = {arm: error / scale for arm, (error, scale) in totals.items()}
        stop = torch.tensor(interrupt.flags(), dtype=torch.float64, device=self.device)
        figures = torch.cat([*means.values(), norm.to(stop).view(1), stop])
        shared = self.accelerator.reduce(figures, reduction="mean").tolist()
        layers = len(self.losses.layers)
        values = {arm: shared[i * layers : (i + 1) * layers] for i, arm in enumerate(means)}
        return values, shared[-3], stop_of(shared[-2], shared[-1])

    def _update(self, step: int, norm: torch.Tensor) -> None:
        """Clips the gradients by their norm over all layers, and updates."""
        for group, rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = rate * self.factor(step)
        if self.config.max_grad_norm:
            nn.utils.clip_grads_with_norm_(list(self.parameters.values()), self.config.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _log(self, step: Record, started: float) -> None:
        """Writes the means since the last record; validates when it is time to."""
        record: Record = {"step": self.completed, "tokens": self.completed * self.plan.tokens_per_step}
        names = {"loss": "layer_losses", "mixed": "mixed_layer_losses", "linear": "linear_layer_losses"}
        for kind, name in names.items():
            rows = [losses[kind] for losses in self.since_log if kind in losses]
            if rows:
                record[name] = [statistics.fmean(column) for column in zip(*rows, strict=True)]
                record["loss" if kind == "loss" else f"{kind}_loss"] = statistics.fmean(record[name])
        self.since_log = []
        record |= {"grad_norm": step["norm"], "learning_rate": self.optimizer.param_groups[0]["lr"]}
        record |= {"seconds": time.perf_counter() - started, "tokens_per_second": self._tokens_per_second()}
        if self._validates():
            record |= self._validate()
        self.records.append(record)
        if self.log is not None:
            self.log.write(record)
            if self.on_log is not None:
                self.on_log(record)

    def _validates(self) -> bool:
        """Whether the validation losses are due."""
        if not self.validation:
            return False
        every = self.config.eval_steps
        return self.completed == self.plan.steps or (every is not None and self.completed % every == 0)

    def _validate(self) -> Record:
        """Mean losses on the validation sequences, which the processes share out."""
        assert self.validation is not None
        weights = branch_weights(self.branch)
        sums = torch.zeros(len(weights) + 1, dtype=torch.float64, device=self.device)
        for first in range(0, len(self.validation), self.world):
            # A sharded base gathers its weights in every forward, so that no process may leave one out.
            index = min(first + self.rank, len(self.validation) - 1)
            row = {name: tensor[None].to(self.device) for name, tensor in self.validation[index].items()}
            self.losses.run(**model_inputs(row), weights=weights, gradient_factor=None)
            means = torch.stack([values.mean() for values in self.losses.means(self.device).values()])
            if index == first + self.rank:
                sums[1:] += means
                sums[0] += 1
        count, *totals = self.accelerator.reduce(sums, reduction="sum").tolist()
        arms = {arm: total / count for arm, total in zip(weights, totals, strict=True)}
        record = {f"validation_{arm}_loss": value for arm, value in arms.items()}
        return record | {"validation_loss": sum(weights[arm] * value for arm, value in arms.items())}

    def _tokens_per_second(self) -> float | None:
        return self.plan.tokens_per_step * self.timed_steps / self.timed_seconds if self.timed_steps else None

    def _save(self) -> None:
        """Leaves a checkpoint of the completed steps, and the plot so far (main process)."""
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.checkpoint_dir,
                self.completed,
                tensors={"mixers": self.model.mixer_state_dict()},
                optimizer=self.optimizer.state_dict(),
                state={"run": self.run_identity, "steps": self.plan.steps, "since_log": self.since_log},
                limit=self.config.save_total_limit,
            )
            plot_transfer(
                self.records, self.losses.layers, self.output_dir / "plots" / f"{self.config.section}_loss.png"
            )

    def _restore(self, checkpoint: Checkpoint) -> None:
        require_same_run(checkpoint, self.run_identity, self.plan.steps)
        if checkpoint.state["steps"] != self.plan.steps:
            logger.warning(
                "the run had %d steps and has %d: the learning rate goes on along the new schedule",
                checkpoint.state["steps"],
                self.plan.steps,
            )
        try:
            self.model.load_mixer_state_dict(checkpoint.tensors["mixers"])
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"cannot resume from {checkpoint.path}: its mechanism has other settings than the model's; set the "
                "attention's settings back, or start a new run in another output directory"
            ) from error
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.completed = checkpoint.step
        self.since_log = checkpoint.state["since_log"]
