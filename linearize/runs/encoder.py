"""A pretrained encoder onto another attention: convert, transfer, train, measure its sentence embeddings, save.

    result = linearize.run_encoder("minilm_linear")        # a preset, a YAML file, a dictionary or an EncoderRunConfig

config.yaml                                 every setting, resolved
logs/{transfer,mlm,distillation}.jsonl      losses
checkpoints/{transfer,mlm,distillation}/step-N
report.json                                 figures of each stage, on held-out sentences
final/                                      the converted repository, for sentence-transformers where the teacher is

A stage that was complete is not run again by a resumed run: its last checkpoint is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from linearize.config.encoder import EncoderRunConfig
from linearize.config.settings import StageSettings
from linearize.config.yaml_io import resolve, to_values
from linearize.errors import UserError
from linearize.failures import smaller, stage
from linearize.runs.directory import CONFIG, FINAL, TRANSFERRED, RunDirectory

REPORT = "report.json"
CONVERTED, CALIBRATED, STUDENT = "student after conversion", "student after calibration", "student"
AFTER = {
    "transfer": "student after attention transfer",
    "mlm": "student after masked language modelling",
    "distillation": "student after distillation",
}
ARMS = {"softmax": "student, window and sinks alone", "linear": "student, linear branch alone"}
CALIBRATION_BATCH = 32
"""Rows that the calibration looks at together."""
VALIDATION_ROWS = 64
"""Held-out rows for the losses of attention transfer."""


class EncoderDirectory(RunDirectory):
    """The directory of an encoder's run."""

    contents = (CONFIG, "logs", "plots", "checkpoints", TRANSFERRED, FINAL, REPORT)
    sections: ClassVar[Mapping[str, str]] = {
        "transfer": "checkpoints/transfer",
        "mlm": "checkpoints/mlm",
        "distillation": "checkpoints/distillation",
    }

    def has_ended(self) -> bool:
        """Whether the run that lies there has ended."""
        return self.final.is_dir() and (self.path / REPORT).is_file()


@dataclass
class EncoderRunResult:
    """What a run leaves; on the other processes of a launcher no report."""

    output_dir: Path
    final: Path
    """The converted repository."""
    report: dict[str, Any] = field(default_factory=dict)
    """The contents of report.json."""


def run_encoder(config: EncoderRunConfig | Mapping[str, Any] | str | PathLike[str]) -> EncoderRunResult:
    """Run all stages, measure after each, and save the student.

    Args:
        config: Settings, a mapping of them, a YAML file, or the name of a shipped preset.

    Raises:
        UserError: Input that the user can mend; nothing half-written is left, checkpoints stay.
        KeyboardInterrupt: After Ctrl-C in training, with a checkpoint left.
    """
    from linearize.runs.plan import complete_attention

    return _EncoderRun(complete_attention(resolve(config, settings=EncoderRunConfig))).run()


class _EncoderRun:
    """One call of `run_encoder`."""

    def __init__(self, settings: EncoderRunConfig) -> None:
        from accelerate import PartialState

        self.settings, self.directory = settings, EncoderDirectory(settings)
        self.path = self.directory.path
        self.state = PartialState(cpu=settings.device == "cpu")
        self.result = EncoderRunResult(self.path, self.directory.final)
        self.outcomes: dict[str, Any] = {}
        self.evaluation: Any = None
        self.masking: Any = None
        self.calibration: dict[str, Any] | None = None

    def run(self) -> EncoderRunResult:
        from linearize.data.rows import prepare_rows
        from linearize.data.sequences import main_process_first
        from linearize.stages.calibration import calibrates
        from linearize.stages.identity import data_identity, source_identity

        settings, directory = self.settings, self.directory
        directory.check()
        self._check_push()
        if settings.resume_from_checkpoint and directory.is_complete():
            self._say(f"The run in {directory.path} is complete: {directory.final}")
            self._push()
            self.result.report = json.loads((self.path / REPORT).read_text(encoding="utf-8"))
            return self.result
        self._load_student()
        with stage("preparing the data"):
            self.train, self.validation = prepare_rows(settings.data, self.tokenizer)
            self._start_evaluation()
        self._say(f"{len(self.train):,} training rows, {len(self.validation):,} for validation")
        base = source_identity(settings.model_name_or_path, settings.revision)
        inputs = {"base": base, "data": data_identity(self.train), "validation": data_identity(self.validation)}
        main_process_first(lambda: directory.prepare(inputs) if self.state.is_main_process else None)
        if settings.evaluation is not None and settings.evaluation.controls:
            self._measure(CONVERTED, "mixed")
        if settings.calibration_sequences and calibrates(self.student.config):
            self._calibrate()
        if settings.transfer is not None:
            self._transfer()
        if settings.mlm is not None:
            self._mask()
        if settings.distillation is not None:
            self._distill()
        if self.state.is_main_process:
            self._finish()
        self.state.wait_for_everyone()
        return self.result

    def _load_student(self) -> None:
        """The untrained student and its tokenizer, checked against the settings."""
        import torch

        from linearize.conversion.students import convert, load_config, load_model_tokenizer
        from linearize.data.masking import Masking
        from linearize.modeling import is_encoder
        from linearize.stages.encoder_training import check_masked_head
        from linearize.stages.transfer import check_branch, check_transfers
        from linearize.training.launcher import check_launcher
        from linearize.training.log import tracker_names
        from linearize.training.loop import exact_plan

        settings = self.settings
        source, length = settings.model_name_or_path, settings.data.sequence_length
        config: Any = load_config(source, revision=settings.revision)
        if not is_encoder(config):
            raise UserError(f"{source} is a {config.model_type} model, which is no encoder: use `linearize run`.")
        if length > config.max_position_embeddings:
            raise UserError(
                f"data.sequence_length is {length}, but the teacher has {config.max_position_embeddings} positions: "
                "lower it."
            )
        check_launcher(settings.device)
        tracker_names(settings.report_to)
        for name in AFTER:  # refused now, not after the stages before
            if (section := getattr(settings, name)) is not None:
                exact_plan(section, length, self.state.num_processes, name)
        self.tokenizer = load_model_tokenizer(source, revision=settings.revision)
        torch.manual_seed(settings.seed)
        where: dict[str, Any] = {"softmax_layers": settings.softmax_layers, "revision": settings.revision}
        with stage("loading the model"):
            student: Any = convert(source, settings.attention, **where, dtype=torch.float32)
            self.student = student.to(self.state.device)
        if settings.transfer is not None:
            check_transfers(settings.attention["type"])
            check_branch(settings.transfer, self.student.arms())
        self.student.set_op_backend(settings.op_backend)
        if settings.mlm is not None:
            check_masked_head(self.student)
            self.masking = Masking.of(self.tokenizer, settings.mlm.mask_probability)

    # --- measurements

    def _start_evaluation(self) -> None:
        """The held-out sentences, and the teacher's figures."""
        from linearize.data.rows import held_out_documents, read_documents
        from linearize.data.sequences import refuse_training_files
        from linearize.evaluation.embeddings import TEACHER, EmbeddingEvaluation

        settings, wanted = self.settings, self.settings.evaluation
        if wanted is None:
            return
        if wanted.texts is not None:
            refuse_training_files(settings.data.dataset, wanted.texts)
            documents = read_documents(wanted.texts, settings.data.text_field)
        else:
            documents = held_out_documents(settings.data)
        sizes = {"pairs": wanted.pairs, "batch_size": wanted.batch_size, "max_length": settings.data.sequence_length}
        evaluation = EmbeddingEvaluation(documents, self.tokenizer, **sizes)
        if self.state.is_main_process:
            self.evaluation = evaluation
            self._measure(TEACHER, "teacher")  # before training the student's weights are the teacher's

    def _measure(self, name: str, arm: str) -> None:
        """Add an arm to the report, on the main process; the others go on to the next stage and wait there."""
        if self.evaluation is None:
            return
        from linearize.evaluation.masked import masked_perplexity

        with stage("evaluation", "lower evaluation.batch_size"):
            masked, size = None, self.evaluation.batch_size
            if self.masking is not None and len(self.validation):
                masked = masked_perplexity(self.student, self.validation, self.masking, arm=arm, batch_size=size)
            row = self.evaluation.measure(name, self.student, arm, masked)
        figures = f"cosine {row.cosine:.4f}, recall@1 {row.recall:.4f}"
        self._say(f"{name}: {figures}" + (f", masked perplexity {masked:.2f}" if masked is not None else ""))

    # --- stages

    def _calibrate(self) -> None:
        """Fit the mechanism's numbers per head, and measure the student with them."""
        from linearize.stages.calibration import calibrate, save_calibration

        settings = self.settings
        with stage("calibration", "lower data.sequence_length"):
            report = calibrate(self.student, self.train, settings.calibration_sequences, CALIBRATION_BATCH)
        self.calibration = report.summary()
        if self.state.is_main_process:
            save_calibration(report, self.path)
        self._say(report.sentence())
        if settings.evaluation is not None and settings.evaluation.controls:
            self._measure(CALIBRATED, "mixed")

    def _common(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "output_dir": self.path,
            "seed": settings.seed,
            "resume": settings.resume_from_checkpoint,
            "report_to": settings.report_to,
            "device": "cpu" if settings.device == "cpu" else None,
        }

    def _smaller(self, settings: StageSettings, section: str) -> str:
        return smaller(f"{section}.batch_size", settings.batch_size, self.settings.data.sequence_length)

    def _transfer(self) -> None:
        from torch.utils.data import Subset

        from linearize.stages.transfer import transfer_attention

        settings = self.settings.transfer
        assert settings is not None
        rows: Any = Subset(self.validation, range(min(VALIDATION_ROWS, len(self.validation))))
        train: Any = self.train
        with stage("stage 1 (attention transfer)", self._smaller(settings, "transfer")):
            outcome = transfer_attention(self.student, train, settings, validation=rows, **self._common())
        self._ended("transfer", outcome)

    def _mask(self) -> None:
        from linearize.stages.encoder_training import train_masked

        settings = self.settings.mlm
        assert settings is not None
        with stage("masked language modelling", self._smaller(settings, "mlm")):
            outcome = train_masked(self.student, self.tokenizer, self.train, settings, **self._common())
        self._ended("mlm", outcome)

    def _distill(self) -> None:
        from linearize.conversion.students import load_encoder
        from linearize.stages.encoder_training import distill_embeddings

        settings = self.settings.distillation
        assert settings is not None
        teacher: Any = load_encoder(self.settings.model_name_or_path, revision=self.settings.revision)
        self._say(f"embedding distillation: {teacher.num_parameters():,} frozen parameters of the teacher in memory")
        with stage("embedding distillation", self._smaller(settings, "distillation")):
            outcome = distill_embeddings(self.student, teacher, self.train, settings, **self._common())
        self._ended("distillation", outcome)

    def _ended(self, name: str, outcome: Any) -> None:
        """Note what a stage did, and measure the student after it."""
        self.outcomes[name] = outcome
        self.student.to(self.state.device)
        self._say(f"{name}: {outcome.steps:,} steps, {outcome.tokens:,} tokens, {outcome.seconds:.0f} s")
        stages = [key for key in AFTER if getattr(self.settings, key) is not None]
        if name == stages[-1]:
            return
        self._measure(AFTER[name], "mixed")
        if name == "transfer" and self.state.is_main_process:
            with stage("saving the model"):
                self._save(self.directory.transferred)

    def _finish(self) -> None:
        """Measure, save, report and push: the main process, while the others wait."""
        from linearize.evaluation.arms import has_branches
        from linearize.files import write_file

        settings, embeddings = self.settings, None
        self._measure(STUDENT, "mixed")
        if settings.evaluation is not None and settings.evaluation.controls and has_branches(self.student):
            for arm, name in ARMS.items():
                self._measure(name, arm)
        if self.evaluation is not None:
            embeddings = self.evaluation.report.to_dict()
            self.evaluation.report.show()
        with stage("saving the model"):
            record = self._save(self.directory.final, embeddings)
            names = ("tokens", "seconds", "peak_memory_bytes", "versions")
            self.result.report = {"embeddings": embeddings, **{name: record[name] for name in names}}
            write_file(self.path / REPORT, (json.dumps(self.result.report, indent=1) + "\n").encode())
        self._push()
        self._say(f"Saved {self.directory.final}")

    def _save(self, directory: Path, embeddings: dict[str, Any] | None = None) -> dict[str, Any]:
        """Leave the converted repository of the stages so far; its record."""
        from linearize.config.record import loaded_commit, make_record
        from linearize.hub.repository import save_final
        from linearize.hub.sentence_files import sentence_transformer_files

        source, revision = self.settings.model_name_or_path, self.settings.revision
        done = self.outcomes.items()
        record = make_record(
            source,
            revision=loaded_commit(source, revision),
            recipe=to_values(self.settings),
            tokens={name: outcome.tokens for name, outcome in done},
            seconds={name: outcome.seconds for name, outcome in done},
            peak_memory_bytes={name: outcome.peak_memory_bytes for name, outcome in done},
            embeddings=embeddings,
            calibration=self.calibration,
        )
        files = sentence_transformer_files(source, revision=revision)
        save_final(self.student, self.tokenizer, directory, record, files)
        return record

    def _check_push(self) -> None:
        """Ask the Hub who we are before the training, not after it."""
        if self.settings.push_to_hub is not None and self.state.is_main_process:
            from linearize.hub.repository import check_token

            check_token(self.settings.push_to_hub)

    def _push(self) -> None:
        if self.settings.push_to_hub is not None and self.state.is_main_process:
            from linearize.hub.repository import push

            self._say(f"Pushed to {push(self.directory.final, self.settings.push_to_hub)}")

    def _say(self, text: str) -> None:
        if self.state.is_main_process:
            print(text, flush=True)
