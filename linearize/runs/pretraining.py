"""A model from scratch on text, with transformers' Trainer: GPT-2, Llama or BERT, softmax or any mechanism.

Softmax makes a stock model, such as a teacher for the conversion; a mechanism makes a converted repository. Decoders
learn the next token, encoders hidden ones.

    result = linearize.pretrain("gpt2_mini_pretrain")         # a preset, a YAML file, a dictionary or a PretrainConfig
    result = linearize.pretrain({"tokenizer": "train", "data": {"dataset": "text.jsonl"}, "output_dir": "out"})

The run directory:

config.yaml                                 every setting, resolved
logs/{pretrain,validation}.jsonl            losses; perplexities
checkpoints/pretrain/step-N
final/                                      the model and its tokenizer, an ordinary repository
report.json                                 `PretrainReport`
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from linearize.config.pretraining import PretrainConfig
from linearize.config.record import FINAL, library_versions
from linearize.config.yaml_io import resolve, to_values
from linearize.errors import UserError
from linearize.failures import smaller, stage
from linearize.runs.directory import CONFIG, RunDirectory

CHECKPOINTS = Path("checkpoints", "pretrain")
LOG, VALIDATION = Path("logs", "pretrain.jsonl"), Path("logs", "validation.jsonl")
REPORT = "report.json"


@dataclass
class PretrainReport:
    """What a pretraining measured; `report.json`."""

    architecture: str
    """Class of the model."""
    parameters: int
    """Parameters, tied ones once."""
    vocab_size: int
    """Entries of the vocabulary."""
    train_sequences: int
    """Training sequences there were; more tokens than they hold were seen more than once."""
    steps: int
    """Steps of the whole run, those before a resume included."""
    tokens: int
    """Tokens of the whole run."""
    seconds: float
    """Duration of the last call's training, checkpoints included and validation not."""
    tokens_per_second: float | None
    """Of the last call; None if it had no step left to run."""
    losses: list[tuple[int, float]]
    """Step, and the mean training loss since the line before it, in nats per token (per hidden one of an encoder)."""
    validation: list[tuple[int, float]]
    """Step, and the perplexity of the validation text after it."""
    perplexity: float | None
    """Of the validation text at the end, in float32; None without validation text."""
    perplexity_tokens: int | None
    """Tokens that it was taken over."""
    peak_memory_bytes: int | None
    """Highest number of bytes that tensors held on the GPU; None on a CPU."""
    device: str
    """Name of the GPU, or cpu."""
    versions: dict[str, str]
    """Of the libraries."""
    accuracy: float | None = None
    """Share of the hidden tokens of the validation text that an encoder finds; None of a decoder."""


@dataclass
class PretrainResult:
    """What a pretraining leaves."""

    output_dir: Path
    final: Path
    """The repository."""
    report: PretrainReport | None
    """None on the other processes of a launcher."""


class PretrainDirectory(RunDirectory):
    """The directory of a pretraining."""

    contents = (CONFIG, "logs", "checkpoints", FINAL, REPORT)
    sections: ClassVar[Mapping[str, str]] = {"training": CHECKPOINTS.as_posix()}

    def has_ended(self) -> bool:
        """Whether the run that lies there has ended."""
        return self.final.is_dir() and (self.path / REPORT).is_file()

    def read_report(self) -> PretrainReport:
        """The report of a complete run."""
        return PretrainReport(**json.loads((self.path / REPORT).read_text(encoding="utf-8")))


def pretrain(config: PretrainConfig | Mapping[str, Any] | str | PathLike[str]) -> PretrainResult:
    """Train all weights of a model, from scratch or from a checkpoint, measure it and save it.

    Args:
        config: Settings, a mapping of them, a YAML file, or the name of a shipped preset.

    Raises:
        UserError: Input that the user can mend; nothing half-written is left, checkpoints stay.
        KeyboardInterrupt: After Ctrl-C in training, with a checkpoint left.
    """
    settings = _completed(resolve(config, settings=PretrainConfig))
    directory = PretrainDirectory(settings)
    directory.check()

    from accelerate import PartialState

    state = PartialState(cpu=settings.device == "cpu")
    if settings.resume_from_checkpoint and directory.is_complete():
        if state.is_main_process:
            print(f"The run in {directory.path} is complete: {directory.final}", flush=True)
        return PretrainResult(directory.path, directory.final, directory.read_report())
    return _Pretraining(settings, directory, state).run()


def _completed(settings: PretrainConfig) -> PretrainConfig:
    """With every setting of the mechanisms, checked."""
    from linearize.runs.plan import complete_attention

    if settings.attention is None and settings.mixers is None:
        return settings
    return complete_attention(settings)


class _Pretraining:
    """One call of `pretrain`."""

    def __init__(self, settings: PretrainConfig, directory: PretrainDirectory, state: Any) -> None:
        self.settings, self.directory, self.state = settings, directory, state
        self.masking: Any = None

    def run(self) -> PretrainResult:
        """Prepare, train, measure and save."""
        from linearize.data.sequences import main_process_first
        from linearize.stages.identity import DIGESTS, require_same_run
        from linearize.stages.pretraining_trainer import pretraining_arguments
        from linearize.training.checkpointing import checkpoint_to_resume
        from linearize.training.loop import PeakMemory

        settings, directory, state = self.settings, self.directory, self.state
        self.arguments, self.plan = pretraining_arguments(settings, directory.path / CHECKPOINTS)
        self._prepare()
        run = self._identity()
        resume, checkpoint = settings.resume_from_checkpoint, None
        if resume:
            checkpoint = checkpoint_to_resume(directory.path / CHECKPOINTS, resume)
        if checkpoint is not None:
            require_same_run(checkpoint, run, self.plan.steps)
        digests = {name: run[name] for name in DIGESTS if run.get(name) is not None}
        main_process_first(lambda: directory.prepare(digests) if state.is_main_process else None)
        self._announce()
        memory = PeakMemory(self.arguments.device)
        with stage("pretraining", self._smaller()):
            trainer = self._trainer(run, checkpoint)
            losses, seconds = self._train(trainer, checkpoint)
            measured = trainer.measure(self.plan.steps)
        report = None
        if state.is_main_process:
            report = self._report(losses, seconds, measured, memory.bytes())
            with stage("saving the model"):
                _save(settings, directory, self.model, self.tokenizer, report)
        state.wait_for_everyone()
        return PretrainResult(directory.path, directory.final, report)

    def _prepare(self) -> None:
        """Tokenizer, text and model, checked against each other."""
        from linearize.conversion.pretraining_model import check_model, trains_encoder
        from linearize.conversion.pretraining_tokenizer import make_tokenizer
        from linearize.data.masking import Masking
        from linearize.data.rows import prepare_rows
        from linearize.data.sequences import prepare_data
        from linearize.evaluation.arms import is_student
        from linearize.hardware.memory_full import check_pretraining
        from linearize.stages.pretraining_start import build_distiller, build_model

        settings, data = self.settings, self.settings.data
        self.encoder = trains_encoder(settings)
        check_model(settings)
        check_pretraining(settings, self.state)
        with stage("preparing the data"):
            self.tokenizer = make_tokenizer(settings, self.encoder)
            prepare: Any = prepare_rows if self.encoder else prepare_data
            self.train, self.validation = prepare(data, self.tokenizer)
        if settings.training.eval_steps is not None and not len(self.validation):
            raise UserError("training.eval_steps is set, but there is no validation text: give data.validation.")
        self.model = build_model(settings, self.tokenizer)
        self.distiller = build_distiller(settings, self.model)
        if self.encoder:
            self.masking = Masking.of(self.tokenizer, data.mask_probability)
        if is_student(self.model):
            self.model.set_op_backend(settings.op_backend)
            # Texts within the window leave the feature maps without a gradient.
            self.arguments.ddp_find_unused_parameters = True

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be continued."""
        from linearize.data.documents import tokenizer_identity
        from linearize.stages.identity import base_identity, data_identity

        teacher = None if self.distiller is None else base_identity(self.distiller.teacher)
        return {
            "sequence_length": self.train.sequence_length,
            "tokens_per_step": self.plan.tokens_per_step,
            "num_blocks": len(self.train),
            "data": data_identity(self.train),
            "base": None if self.settings.model_name_or_path is None else base_identity(self.model),
            "teacher": teacher,
            "seed": self.settings.seed,
            "tokenizer": tokenizer_identity(self.tokenizer)[:12],
        }

    def _announce(self) -> None:
        if not self.state.is_main_process:
            return
        model, train, plan = self.model, self.train, self.plan
        print(
            f"{type(model).__name__}, {model.num_parameters():,} parameters; {len(train):,} training sequences of "
            f"{train.sequence_length} tokens, {len(self.validation):,} for validation; {plan.steps:,} steps of "
            f"{plan.tokens_per_step:,} tokens",
            flush=True,
        )

    def _smaller(self) -> str:
        """What to do where memory does not last."""
        settings = self.settings
        return smaller("training.batch_size", settings.training.batch_size, settings.data.sequence_length)

    def _trainer(self, run: dict[str, Any], checkpoint: Any) -> Any:
        from linearize.data.rows import collate
        from linearize.stages.pretraining_trainer import (
            DistillationTrainer,
            MaskedPretrainingTrainer,
            PretrainingTrainer,
        )
        from linearize.training.log import TrainingLog
        from linearize.training.loop import Interrupt

        kind: Any = PretrainingTrainer
        others: dict[str, Any] = {}
        if self.encoder:
            kind, others = partial(MaskedPretrainingTrainer, self.masking), {"data_collator": collate}
        elif self.distiller is not None:
            kind = partial(DistillationTrainer, self.distiller)
        after = checkpoint.step if checkpoint else None
        log = validation_log = None
        if self.state.is_main_process:
            settings, path = self.settings, self.directory.path
            log = TrainingLog(path / LOG, after, settings.report_to, dataclasses.asdict(settings.training))
            validation_log = TrainingLog(path / VALIDATION, after)
        return kind(
            self.model,
            self.arguments,
            config=self.settings.training,
            train_dataset=self.train,
            validation=self.validation,
            interrupt=Interrupt(),
            log=log,
            validation_log=validation_log,
            run=run,
            window=list(checkpoint.state["window"]) if checkpoint else [],
            **others,
        )

    def _train(self, trainer: Any, checkpoint: Any) -> tuple[list[float], float]:
        """The losses of the steps, and the seconds without measuring."""
        from linearize.modeling.compiled import compiled_training

        start = time.perf_counter()
        with trainer.interrupt, compiled_training() if self.settings.training.compile else nullcontext():
            losses = trainer.run_stage(checkpoint)
        return losses, time.perf_counter() - start - trainer.measuring_seconds

    def _report(self, losses: list[float], seconds: float, measured: Any, peak: int | None) -> PretrainReport:
        import torch

        model, plan, path, device = self.model, self.plan, self.directory.path, self.arguments.device
        return PretrainReport(
            architecture=type(model).__name__,
            parameters=model.num_parameters(),
            vocab_size=model.config.vocab_size,
            train_sequences=len(self.train),
            steps=plan.steps,
            tokens=plan.steps * plan.tokens_per_step,
            seconds=seconds,
            tokens_per_second=len(losses) * plan.tokens_per_step / seconds if losses else None,
            losses=_curve(path / LOG, "loss"),
            validation=_curve(path / VALIDATION, "perplexity"),
            perplexity=measured.perplexity if measured else None,
            perplexity_tokens=measured.tokens if measured else None,
            peak_memory_bytes=peak,
            device=torch.cuda.get_device_name() if device.type == "cuda" else device.type,
            versions=library_versions(),
            accuracy=measured.accuracy if measured and self.encoder else None,
        )


def _curve(log: Path, name: str) -> list[tuple[int, float]]:
    """Step and value of each record of a log, one a step: a run that was resumed at its end measures again."""
    from linearize.training.log import read_log

    return list({record["step"]: record[name] for record in read_log(log)}.items())


def _save(
    settings: PretrainConfig, directory: PretrainDirectory, model: Any, tokenizer: Any, report: PretrainReport
) -> None:
    from linearize.evaluation.arms import is_student
    from linearize.files import atomic_directory, write_file
    from linearize.hub.repository import save_final

    if is_student(model):
        save_final(model, tokenizer, directory.final, _record(settings, report))
    else:
        with atomic_directory(directory.final) as final:
            model.save_pretrained(final)
            tokenizer.save_pretrained(final)
    write_file(directory.path / REPORT, (json.dumps(dataclasses.asdict(report), indent=1) + "\n").encode())
    speed = f", {report.tokens_per_second:,.0f} tokens/s" if report.tokens_per_second else ""
    quality = f", validation perplexity {report.perplexity:.2f}" if report.perplexity else ""
    quality += f", accuracy {report.accuracy:.1%}" if report.accuracy is not None else ""
    print(f"pretraining: {report.steps:,} steps, {report.tokens:,} tokens{speed}{quality}", flush=True)
    print(f"Saved {directory.final}", flush=True)


def _record(settings: PretrainConfig, report: PretrainReport) -> dict[str, Any]:
    """The contents of linearize.json: of random weights a new record, of a checkpoint its own with these tokens."""
    from linearize.config.record import make_record, read_record

    what = "all weights" if settings.training.train == "all" else settings.training.train
    source, recipe, earlier = settings.model_name_or_path, to_values(settings), None
    if source is not None:
        earlier = read_record(source)
        of_this_run = {name: recipe[name] for name in ("data", "training", "distillation")}
        recipe = {**(earlier.get("recipe") or {}), **of_this_run}
    record = make_record(
        source,
        earlier=earlier,
        recipe=recipe,
        tokens={what: report.tokens},
        seconds={what: report.seconds},
        peak_memory_bytes={what: report.peak_memory_bytes},
    )
    measured = {"perplexity": report.perplexity, "tokens": report.perplexity_tokens, "accuracy": report.accuracy}
    return {**record, "parameters": report.parameters, "validation": measured}
