"""What every stage with a Trainer does before its first step: places, arguments, the checkpoint it goes on from, log.

opened = open_stage(config, rows, model, output_dir, seed=0, resume=True, facts={...})
with Interrupt() as interrupt:
    trainer = opened.trainer(FullTrainer, model, interrupt)
    losses = trainer.run_stage(opened.checkpoint)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from linearize.config.settings import StepPlan
from linearize.paths import user_path
from linearize.stages.identity import base_identity, data_identity, require_same_run
from linearize.training.checkpointing import Checkpoint, checkpoint_to_resume
from linearize.training.log import TrainingLog
from linearize.training.stage_trainer import stage_arguments


@dataclass
class OpenStage:
    """A stage that is about to train."""

    config: Any
    rows: Any
    name: str
    """Of its files."""
    output: Path
    """The run directory."""
    arguments: TrainingArguments
    plan: StepPlan
    run: dict[str, Any]
    """What a checkpoint must agree on to be continued."""
    checkpoint: Checkpoint | None
    """That it goes on from."""
    log: TrainingLog | None
    """Of the main process."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.arguments.process_index == 0

    @property
    def log_path(self) -> Path:
        """`logs/NAME.jsonl`."""
        return log_of(self.output, self.name)

    @property
    def tokens(self) -> int:
        """Tokens of the whole stage, over all processes."""
        return self.plan.steps * self.plan.tokens_per_step

    def trainer(self, kind: Any, model: Any, interrupt: Any, **others: Any) -> Any:
        """The Trainer of the stage.

        Args:
            kind: A `StageTrainer`, or what makes one of the same arguments.
            model: What trains.
            interrupt: Ctrl-C, held back to the end of the step.
            others: What the kind takes beside.
        """
        return kind(
            model,
            self.arguments,
            config=self.config,
            train_dataset=self.rows,
            interrupt=interrupt,
            log=self.log,
            run=self.run,
            window=list(self.checkpoint.state["window"]) if self.checkpoint else [],
            **others,
        )


def log_of(output: Path, name: str) -> Path:
    """The log of a stage in a run directory."""
    return output / "logs" / f"{name}.jsonl"


def open_stage(
    config: Any,
    rows: Any,
    model: Any,
    output_dir: str | os.PathLike[str],
    *,
    seed: int,
    resume: bool | str | os.PathLike[str],
    report_to: str | Sequence[str],
    device: str | None,
    facts: Mapping[str, Any],
    **changes: Any,
) -> OpenStage:
    """Work out the steps, and read the checkpoint that the stage goes on from.

    Args:
        config: Settings of the stage, a `StageSettings`; its `section` names the files.
        rows: What it trains on, with `sequence_length`.
        model: What trains, or its base.
        output_dir: The run directory.
        seed, report_to, device: As in `stage_arguments`.
        resume: True goes on from the latest checkpoint of this stage, if there is one; a path from that one.
        facts: What else a checkpoint must agree on; None is what an absent fact is.
        changes: Other arguments of the Trainer.

    Raises:
        UserError: The settings do not fit the data, the processes or the checkpoint.
    """
    length = rows.sequence_length

    def all_facts(plan: StepPlan) -> dict[str, Any]:
        return {
            "sequence_length": length,
            "tokens_per_step": plan.tokens_per_step,
            "num_rows": len(rows),
            "seed": seed,
            "data": data_identity(rows),
            "base": base_identity(model),
            **facts,
        }

    where: dict[str, Any] = {"seed": seed, "resume": resume, "report_to": report_to, "device": device}
    return open_named(config.section, config, rows, length, output_dir, all_facts, **where, **changes)


def open_named(
    name: str,
    config: Any,
    rows: Any,
    length: int,
    output_dir: str | os.PathLike[str],
    facts: Callable[[StepPlan], dict[str, Any]],
    *,
    seed: int,
    resume: bool | str | os.PathLike[str],
    report_to: str | Sequence[str],
    device: str | None,
    section: str | None = None,
    **changes: Any,
) -> OpenStage:
    """As `open_stage`, of a stage whose files and facts are its own.

    Args:
        name: Of its checkpoints and its log.
        length: Tokens of a row.
        facts: All that a checkpoint must agree on, by the steps that there are.
        section: What its settings are called in messages; default as its files.
    """
    output = Path(user_path(output_dir))
    checkpoints = output / "checkpoints" / name
    arguments, plan = stage_arguments(config, section or name, length, checkpoints, seed, report_to, device, **changes)
    run = facts(plan)
    checkpoint = checkpoint_to_resume(checkpoints, resume)
    if checkpoint is not None:
        require_same_run(checkpoint, run, plan.steps)
    log = None
    if arguments.process_index == 0:
        after = checkpoint.step if checkpoint else None
        log = TrainingLog(log_of(output, name), after, report_to, asdict(config))
    return OpenStage(config, rows, name, output, arguments, plan, run, checkpoint, log)
