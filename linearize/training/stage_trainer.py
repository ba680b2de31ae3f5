"""transformers' Trainer as the training stages use it: the order of the data, exact normalisation, checkpoints, and
stopping. A stage says what its losses and its parameter groups are."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from linearize.config.settings import StageSettings, StepPlan
from linearize.files import move_into_place, readable_write_errors
from linearize.modeling.counter_draws import draw_words
from linearize.modeling.landmark_tokens import LandmarkTokens
from linearize.training.checkpointing import Checkpoint, prune_checkpoints, write_state
from linearize.training.launcher import check_launcher, check_precision, settings_decide_precision
from linearize.training.log import TrainingLog, check_finite, tracker_names
from linearize.training.loop import SCHEDULERS, Interrupt, exact_plan, stop_of
from linearize.training.losses import supervised_tokens
from linearize.training.mixed_precision import leave_mixed_precision


def row_numbers(args: TrainingArguments, step: int, micro_batch: int, rows: int) -> Tensor:
    """Places `(rows,)` in the order of `RunSampler` of the sequences that this process has in a micro-batch of a
    step."""
    batch = (step * args.gradient_accumulation_steps + micro_batch) * args.world_size + args.process_index
    return batch * rows + torch.arange(rows)


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
        from linearize.data.sequences import epoch_order

        given, epoch = 0, 0
        while given < self.num_samples:
            yield from epoch_order(self.num_blocks, self.seed, epoch)[: self.num_samples - given].tolist()
            given += self.num_blocks
            epoch += 1


def stage_arguments(
    config: StageSettings,
    section: str,
    sequence_length: int,
    checkpoints: Path,
    seed: int,
    report_to: str | Sequence[str],
    device: str | None,
    **changes: Any,
) -> tuple[TrainingArguments, StepPlan]:
    """The Trainer's arguments that all stages share, and the steps that they amount to.

    Args:
        config: The stage's settings.
        section: Their name in messages.
        sequence_length: Tokens of a training sequence.
        checkpoints: The folder of the stage's checkpoints.
        seed: Of the order of the data and the dropout.
        report_to: Trackers, which the stage's log serves: the Trainer would make each stage a run of its own.
        device: "cpu" keeps to the CPU; None takes the process's GPU where there is one.
        changes: Arguments of this stage; they win.
    """
    check_launcher(device)
    tracker_names(report_to)
    # The Trainer resets accelerate's state: an earlier stage's choice of the CPU must be handed on.
    state = PartialState(cpu=device == "cpu")
    on_cpu = state.device.type == "cpu"
    plan = exact_plan(config, sequence_length, state.num_processes, section)
    settings: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "max_steps": plan.steps,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": SCHEDULERS[config.schedule],
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "logging_steps": config.logging_steps,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        # The Trainer would delete old checkpoints before the new one is in its place: `_save_checkpoint` does it
        # after.
        "save_total_limit": None,
        "seed": seed,
        "report_to": "none",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "ddp_broadcast_buffers": False,
    }
    with settings_decide_precision():
        arguments = TrainingArguments(**{**settings, **changes})
    # One process drives one GPU: the Trainer would otherwise wrap the model in DataParallel on a machine with several.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments, plan


class StageTrainer(Trainer):
    """Trains a model on token blocks.

    A stage gives `losses` and `parameter_groups`.

    Args:
        model: What trains.
        args: As `stage_arguments` makes them.
        config: The stage's settings.
        train_dataset: Token blocks: `input_ids` and `labels`, `[T]` each.
        interrupt: Ctrl-C, held back to the end of the step.
        log: Gets a record every `logging_steps`; closed at the end.
        run: What a checkpoint must agree on to be continued.
        window: Losses since the last record, from the checkpoint.
        others: Arguments of the Trainer.
    """

    STAGE: ClassVar[str]
    """Name of the stage in messages."""
    LOSS_NAMES: ClassVar[tuple[str, ...]] = ("loss",)
    """Of what `losses` gives, in its order."""

    # The losses are divided by the tokens of the whole accumulated batch; transformers 5.17 reads
    # `model_accepts_loss_kwargs` instead.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        config: StageSettings,
        train_dataset: Any,
        interrupt: Interrupt,
        log: TrainingLog | None,
        run: dict[str, Any],
        window: list[list[float]],
        **others: Any,
    ) -> None:
        self.trained, self.config, self.interrupt = model, config, interrupt
        self.records, self.run, self.window = log, run, window
        self.step_losses: list[float] = []
        self._sums: Tensor | None = None
        self._norm, self._rate = 0.0, 0.0
        self._micro_batch = 0
        self._landmarks = [module for module in model.modules() if isinstance(module, LandmarkTokens)]
        self.stopped: type[KeyboardInterrupt] | None = None
        use_cache = self.plain_model().config.use_cache
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, callbacks=[_StopAfterStep(self)], **others
        )
        check_precision(self.accelerator.mixed_precision, "bf16" if args.bf16 else "no")
        self.model_accepts_loss_kwargs = True
        # The Trainer switches the cache off for good: that would be saved with the model and slow down its generation.
        self.plain_model().config.use_cache = use_cache

    def advice(self) -> str:
        """What to change when a loss is not finite."""
        return f"lower {self.config.section}.learning_rate"

    def losses(self, model: nn.Module, inputs: dict[str, Any], denominator: Any) -> Sequence[Tensor]:
        """The losses of a micro-batch.

        Args:
            model: What trains, as the Trainer wrapped it.
            inputs: `input_ids` and `labels`, `[B, T]`.
            denominator: Supervised tokens of the whole global batch.

        Returns:
            Scalars, one of each of `LOSS_NAMES`: summed over this micro-batch and divided by the denominator. The
                first is differentiated.
        """
        raise NotImplementedError

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The optimiser's groups."""
        raise NotImplementedError

    def prepare_batches(self, batches: list[Any]) -> list[Any]:
        """A step's micro-batches as `losses` gets them."""
        return batches

    def counted(self, batch: Any) -> Tensor:
        """What a micro-batch adds to the denominator of the losses: its supervised tokens."""
        return supervised_tokens(batch["labels"])

    def plain_model(self) -> Any:
        """The transformers model inside what trains."""
        return self.trained

    def shown_losses(self) -> tuple[str, ...]:
        """Names of the losses that the progress bar and the trackers show."""
        return self.LOSS_NAMES

    def run_stage(self, checkpoint: Checkpoint | None) -> list[float]:
        """Trains to the end of the stage, from the checkpoint if there is one, and leaves the model outside mixed
        precision.

        Returns:
            The loss of each step that this call ran.

        Raises:
            KeyboardInterrupt: After Ctrl-C, with a checkpoint left.
        """
        try:
            if self.args.max_steps == 0:
                return []
            self.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        finally:
            leave_mixed_precision(self.trained)
            if self.records is not None:
                self.records.close()
            # The Trainer leaves its bar open after an error, and what is printed next would run into it.
            for callback in self.callback_handler.callbacks:
                if (bar := getattr(callback, "training_bar", None)) is not None:
                    bar.close()
        if self.stopped is not None:
            raise self.stopped
        self.trained.eval()
        return self.step_losses

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
        """Takes a step's micro-batches and counts the supervised tokens (or what `counted` says) of all processes.

        Counted here because the Trainer's own count takes the first label of each sequence along on some versions,
        depending on the class name.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = self.prepare_batches(batches)
        count = torch.stack([self.counted(batch) for batch in batches]).sum().to(device)
        if self.args.world_size > 1:
            count = self.accelerator.reduce(count, reduction="sum")
        return batches, count.clamp(min=1)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the stage's groups."""
        if self.optimizer is None:
            optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args)
            groups = self.parameter_groups(self.trained if model is None else model)
            self.optimizer = optimizer([group for group in groups if group["params"]], **settings)
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads their states, but the learning rates are those of the settings, which may have been lowered."""
        optimizer, scheduler = self.optimizer, self.lr_scheduler
        assert optimizer is not None and scheduler is not None
        rates = [group["initial_lr"] for group in optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        scheduler.base_lrs = rates
        scheduler._last_lr = [
            rate * factor(scheduler.last_epoch) for rate, factor in zip(rates, scheduler.lr_lambdas, strict=True)
        ]
        for group, initial, rate in zip(optimizer.param_groups, rates, scheduler._last_lr, strict=True):
            group["initial_lr"], group["lr"] = initial, rate

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The first of the losses, times the number of processes because DDP averages their gradients."""
        losses = self.losses(model, inputs, num_items_in_batch)
        sums = torch.stack([loss.detach() for loss in losses])
        self._sums = sums if self._sums is None else self._sums + sums
        return losses[0] * self.args.world_size

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """A micro-batch; after a step's last one its losses and gradients are checked before the optimiser sees
        them."""
        self._seed_rows(len(inputs["input_ids"]))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro_batch += 1
        if self.accelerator.sync_gradients:
            self._micro_batch = 0
            self._check_step(inputs["input_ids"])
        return loss

    def _seed_rows(self, rows: int) -> None:
        """What landmark attention draws for a row follows from the run's seed and the row's number alone, so that it
        is the same on any number of processes and in micro-batches of any size."""
        for tokens in self._landmarks:
            numbers = row_numbers(self.args, self.state.global_step, self._micro_batch, rows)
            tokens.row_seeds = draw_words(torch.tensor(self.args.seed), numbers)

    def _check_step(self, input_ids: Tensor) -> None:
        """Gathers the step's losses and Ctrl-C over the processes, so that all of them decide alike; aborts on what is
        not finite."""
        assert self._sums is not None
        facts = torch.cat([self._sums, self._sums.new_tensor(self.interrupt.flags())])
        if self.args.world_size > 1:
            facts = self.accelerator.reduce(facts, reduction="sum")
        self._sums = None
        *losses, stop, terminated = facts.tolist()
        gradients = [parameter.grad for parameter in self.trained.parameters() if parameter.grad is not None]
        self._norm = float(torch.nn.utils.get_total_norm(gradients))
        step = self.state.global_step + 1
        found = {"the loss": losses[0], "the gradient norm": self._norm}
        if not torch.isfinite(torch.tensor(list(found.values()))).all():
            origin = find_non_finite(self.trained, self.plain_model(), input_ids)
            named = {f"{name} (first seen in {origin})" if origin else name: value for name, value in found.items()}
            check_finite(self.STAGE, step, named, f"{self.advice()}, or look at the data of that step")
        self.stopped = stop_of(stop, terminated)
        self._rate = self._get_learning_rate()
        self.step_losses.append(losses[0])
        self.window.append(losses)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Reports the mean losses since the last report, split into their parts, to the log file, the progress bar and
        the trackers."""
        if "loss" in logs and self.window:
            means = [sum(values) / len(self.window) for values in zip(*self.window, strict=True)]
            logs.update(zip(self.shown_losses(), means, strict=False))
            logs["grad_norm"], logs["learning_rate"] = self._norm, self._rate
            self.window.clear()
            if self.records is not None:
                tokens = self.state.global_step * self.config.tokens_per_step
                record = {
                    "step": self.state.global_step,
                    "tokens": tokens,
                    **dict(zip(self.LOSS_NAMES, means, strict=True)),
                }
                self.records.write({**record, "grad_norm": self._norm, "learning_rate": self._rate})
        elif self.records is not None:
            self.records.track(self.state.global_step, logs)
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
                    write_state(partial, {"step": self.state.global_step, "run": self.run, "window": self.window})
                    move_into_place(partial, target)
                    prune_checkpoints(root, self.config.save_total_limit, target)
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
    """Ctrl-C or SIGTERM: the step is complete, so save and stop. The last step is logged, however long since the last
    record."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.trainer.stopped is not None:
            control.should_save = control.should_training_stop = True
        if state.global_step == args.max_steps:
            control.should_log = True
        return control


def find_non_finite(model: nn.Module, plain: Any, input_ids: Tensor) -> str:
    """Where NaN or infinity appears first: a parameter, else a layer's output, else a gradient (from the top layer
    down); "" if nowhere.

    Args:
        model: What trains, after the backward pass of the step that went wrong.
        plain: The transformers model inside it.
        input_ids: `[B, T]` of its last micro-batch.
    """
    trained = [(_short(name), parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in trained:
        if not parameter.isfinite().all():
            return f"the parameter {name}"
    output = _first_non_finite_output(plain, input_ids)
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
