"""transformers' Trainer for stage 2: the objective, the order of the data, exact normalisation, checkpoints, and
stopping."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from linearize.adapters import AdaptedModel, is_mixer_parameter
from linearize.checkpointing import STATE_FILE, prune_checkpoints, readable_write_errors, write_file
from linearize.losses import LossWeights, language_model_loss, supervised_tokens
from linearize.settings import FinetuneConfig
from linearize.training_log import TrainingLog, check_finite
from linearize.training_loop import Interrupt

STAGE = "finetuning"
LOSS_NAMES = ("loss", "cross_entropy", "kl")


class RunSampler(Sampler[int]):
    """The sequences of a whole run in the order of training, epoch after epoch without a gap.

    The Trainer sees one long epoch, so no step is ever cut short at the end of the data, and a resumed run goes on
    where the other stopped.

    Args:
        num_blocks: Sequences in the data.
        seed: Of the permutations.
        num_samples: Sequences of the run: steps x sequences per step.
    """

    def __init__(self, num_blocks: int, seed: int, num_samples: int) -> None:
        self.num_blocks, self.seed, self.num_samples = num_blocks, seed, num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        from linearize.data import epoch_order

        given, epoch = 0, 0
        while given < self.num_samples:
            yield from epoch_order(self.num_blocks, self.seed, epoch)[: self.num_samples - given].tolist()
            given += self.num_blocks
            epoch += 1


@dataclass(frozen=True)
class Objective:
    """Cross-entropy and distillation of one micro-batch, on hidden states."""

    weights: LossWeights
    logits_chunk: int
    """Tokens whose logits exist at once."""

    def __call__(
        self, model: AdaptedModel, input_ids: Tensor, labels: Tensor, denominator: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The losses of a micro-batch.

        Args:
            model: Adapters on a converted model; the student's arm is the one that is set.
            input_ids: `[B, T]`, no padding.
            labels: `[B, T]`, -100 where there is no loss.
            denominator: Supervised tokens of the whole global batch.

        Returns:
            Scalars: what is differentiated, the cross-entropy, the divergence; each summed over this micro-batch and
                divided by the denominator.
        """
        base: Any = model.get_base_model()
        teacher = teacher_hidden_states(model, input_ids) if self.weights.kl_weight else None
        hidden = base.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        sums = language_model_loss(
            hidden,
            labels,
            base.get_output_embeddings(),
            weights=self.weights,
            teacher_hidden_states=teacher,
            denominator=denominator,
            logits_chunk=self.logits_chunk,
        )
        return sums.total, sums.cross_entropy, sums.divergence


def teacher_hidden_states(model: AdaptedModel, input_ids: Tensor) -> Tensor:
    """The teacher's last hidden states `[B, T, E]` from the same weights: adapters and mechanism off, no dropout, no
    gradient."""
    base: Any = model.get_base_model()
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), model.disable_adapter(), base.use_arm("teacher"):
            return base.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    finally:
        model.train(training)


def parameter_groups(model: nn.Module, config: FinetuneConfig) -> list[dict[str, Any]]:
    """What trains: the adapters at their learning rate with weight decay, the mechanism's parameters at theirs
    without."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapters = [parameter for name, parameter in trained if not is_mixer_parameter(name)]
    mixers = [parameter for name, parameter in trained if is_mixer_parameter(name)]
    groups = [
        {"params": adapters, "lr": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": mixers, "lr": config.mixer_learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class FinetuningTrainer(Trainer):
    """Trains an `AdaptedModel` on token blocks.

    Args:
        model: Adapters on a converted model.
        args: As `finetune` makes them.
        config: The stage's settings.
        train_dataset: Token blocks: `input_ids` and `labels`, `[T]` each.
        interrupt: Ctrl-C, held back to the end of the step.
        log: Gets a record every `logging_steps`.
        run: What a checkpoint must agree on to be continued.
        window: Losses since the last record, from the checkpoint.
    """

    # The objective divides by the tokens of the whole accumulated batch; transformers 5.17 reads
    # `model_accepts_loss_kwargs` instead.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: AdaptedModel,
        args: TrainingArguments,
        *,
        config: FinetuneConfig,
        train_dataset: Any,
        interrupt: Interrupt,
        log: TrainingLog | None,
        run: dict[str, Any],
        window: list[list[float]],
    ) -> None:
        self.adapted, self.config, self.interrupt = model, config, interrupt
        self.records, self.run, self.window = log, run, window
        self.objective: Objective = Objective(
            LossWeights(config.ce_weight, config.kl_weight, config.temperature), config.logits_chunk
        )
        self.step_losses: list[float] = []
        self._sums: Tensor | None = None
        self._norm, self._rate = 0.0, 0.0
        self.stopped = False
        super().__init__(model=model, args=args, train_dataset=train_dataset, callbacks=[_StopAfterStep(self)])
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """The order of `data.epoch_order` instead of the Trainer's random one."""
        blocks: Any = self.train_dataset if train_dataset is None else train_dataset
        sequences = (
            self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        )
        return RunSampler(len(blocks), self.args.seed, self.args.max_steps * sequences)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Takes a step's micro-batches and counts the supervised tokens of all processes.

        Counted here because the Trainer's own count takes the first label of each sequence along on some versions,
        depending on the class name.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.stack([supervised_tokens(batch["labels"]) for batch in batches]).sum().to(device)
        if self.args.world_size > 1:
            count = self.accelerator.reduce(count, reduction="sum")
        return batches, count.clamp(min=1)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with one group for the adapters and one for the mechanism."""
        if self.optimizer is None:
            optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer(
                parameter_groups(self.adapted if model is None else model, self.config), **settings
            )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The objective, times the number of processes because DDP averages their gradients."""
        losses = model(
            objective=self.objective,
            input_ids=inputs["input_ids"],
            labels=inputs["labels"],
            denominator=num_items_in_batch,
        )
        sums = torch.stack([loss.detach() for loss in losses])
        self._sums = sums if self._sums is None else self._sums + sums
        return losses[0] * self.args.world_size

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """A micro-batch; after a step's last one its losses and gradients are checked before the optimiser sees
        them."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._check_step(inputs["input_ids"])
        return loss

    def _check_step(self, input_ids: Tensor) -> None:
        """Gathers the step's losses and Ctrl-C over the processes, so that all of them decide alike; aborts on what is
        not finite."""
        assert self._sums is not None
        facts = torch.cat([self._sums, self._sums.new_tensor([float(self.interrupt.requested)])])
        if self.args.world_size > 1:
            facts = self.accelerator.reduce(facts, reduction="sum")
        self._sums = None
        *losses, stop = facts.tolist()
        gradients = [parameter.grad for parameter in self.adapted.parameters() if parameter.grad is not None]
        self._norm = float(torch.nn.utils.get_total_norm(gradients))
        step = self.state.global_step + 1
        found = {"the loss": losses[0], "the gradient norm": self._norm}
        if not torch.isfinite(torch.tensor(list(found.values()))).all():
            origin = find_non_finite(self.adapted, input_ids)
            named = {f"{name} (first seen in {origin})" if origin else name: value for name, value in found.items()}
            check_finite(
                STAGE,
                step,
                named,
                "lower finetune.learning_rate or finetune.mixer_learning_rate, or look at the data of that step",
            )
        self.stopped, self._rate = stop > 0, self._get_learning_rate()
        self.step_losses.append(losses[0])
        self.window.append(losses)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Reports the mean losses since the last report, split into their parts, to the log file, the progress bar and
        the trackers."""
        if "loss" in logs and self.window:
            means = [sum(values) / len(self.window) for values in zip(*self.window, strict=True)]
            shown = LOSS_NAMES if self.config.kl_weight else LOSS_NAMES[:1]
            logs.update(zip(shown, means, strict=False))
            logs["grad_norm"], logs["learning_rate"] = self._norm, self._rate
            self.window.clear()
            if self.records is not None:
                tokens = self.state.global_step * self.config.tokens_per_step
                record = {
                    "step": self.state.global_step,
                    "tokens": tokens,
                    **dict(zip(LOSS_NAMES, means, strict=True)),
                }
                self.records.write({**record, "grad_norm": self._norm, "learning_rate": self._rate})
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Lets the Trainer write its folder, then gives it its place `step-N` in one move: a checkpoint is whole or
        absent."""
        root = Path(str(self.args.output_dir))
        partial, target = root / f"checkpoint-{self.state.global_step}", root / f"step-{self.state.global_step}"
        try:
            with readable_write_errors(target):
                _with_disk_errors(super()._save_checkpoint, model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    state = {"step": self.state.global_step, "run": self.run, "window": self.window}
                    write_file(partial / STATE_FILE, json.dumps(state, indent=1).encode())
                    shutil.rmtree(target, ignore_errors=True)
                    os.replace(partial, target)
                    prune_checkpoints(root, self.config.save_total_limit)
                    for leftover in root.glob("checkpoint-*"):  # of a process that was killed while saving
                        shutil.rmtree(leftover, ignore_errors=True)
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()


def _with_disk_errors(write: Any, *arguments: Any) -> None:
    """`torch.save` reports a full disk as a RuntimeError of its archive writer; this makes it the OSError it is."""
    try:
        write(*arguments)
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "No space left" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


class _StopAfterStep(TrainerCallback):
    """Ctrl-C: the step is complete, so save and stop. The last step is logged, however long since the last record."""

    def __init__(self, trainer: FinetuningTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.trainer.stopped:
            control.should_save = control.should_training_stop = True
        if state.global_step == args.max_steps:
            control.should_log = True
        return control


def find_non_finite(model: AdaptedModel, input_ids: Tensor) -> str:
    """Where NaN or infinity appears first: a parameter, else a layer's output, else a gradient (from the top layer
    down); "" if nowhere.

    Args:
        model: After the backward pass of the step that went wrong.
        input_ids: `[B, T]` of its last micro-batch.
    """
    trained = [(_short(name), parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in trained:
        if not parameter.isfinite().all():
            return f"the parameter {name}"
    output = _first_non_finite_output(model.get_base_model(), input_ids)
    if output:
        return f"the output of {output}"
    for name, parameter in reversed(trained):
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}"
    return ""


@torch.no_grad()
def _first_non_finite_output(base: Any, input_ids: Tensor) -> str:
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(first, Tensor) and not first.isfinite().all():
                found.append(name)

        return hook

    watched = [(name, module) for name, module in base.base_model.named_modules() if name]
    hooks = [module.register_forward_hook(watch(name)) for name, module in watched]
    try:
        base.base_model(input_ids=input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return _short(found[0]) if found else ""


def _short(name: str) -> str:
    """A parameter's name without what peft puts around it."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".default", "")
