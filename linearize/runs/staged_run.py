"""What runs of several trained stages share: their directory, the stages, and the figures at the end.

Each stage is a directory of the run; one that is there is not made again, so a stopped run goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from linearize.config.evaluation import LengthConfig
from linearize.config.pretraining import PretrainConfig, PretrainingConfig
from linearize.config.settings import DataConfig, DistillationConfig, RunSettings
from linearize.config.yaml_io import to_values
from linearize.failures import stage
from linearize.runs.directory import CONFIG, FINAL, RunDirectory
from linearize.runs.pretraining import CHECKPOINTS, pretrain
from linearize.stages.identity import StageState

if TYPE_CHECKING:
    from linearize.evaluation.by_length import LengthReport, LengthText

REPORT = "report.json"
TEACHER = "teacher, trained on the same tokens"


@dataclass
class StagedRunConfig(RunSettings):
    """What runs of stages have in common; each declares its model, its attention and its stages."""

    overwrite: bool = False
    """Replace a run that `output_dir` already holds."""
    resume_from_checkpoint: bool = False
    """Continue the run in `output_dir`, in the stage where it stopped."""
    seed: int = 0
    """Seed of the order of the data, and of what is drawn in training."""
    device: Literal["auto", "cpu"] = "auto"
    """The process's GPU, else the CPU; or the CPU."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation text."""
    train_teacher: bool = True
    """Train the teacher first, on as many tokens as all stages: the fair yardstick."""
    distillation: DistillationConfig | None = field(default_factory=DistillationConfig)
    """In the trained stages, learn from a teacher as well; `teacher` none: the one that was trained first, else the
    untouched one. None: the labels alone, as published."""
    evaluation: LengthConfig | None = field(default_factory=LengthConfig)
    """The last model's perplexity by length; none: not measured."""
    report_to: list[str] = field(default_factory=lambda: ["none"])
    """Trackers: trackio, wandb, tensorboard, all or none. Each stage is a run of the project linearize."""


class StagedDirectory(RunDirectory):
    """The directory of a run of stages.

    Attributes:
        stages: names of the stages' directories, in the order of the run.
        sections: as in `RunDirectory`. Once the teacher has begun, which trains as long as all stages, their lengths
            are settled.
    """

    stages: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        cls.contents = (CONFIG, *cls.stages, "logs", "checkpoints", "plots", FINAL, REPORT)

    def stage_states(self) -> dict[str, StageState]:
        """How far each stage of the run that lies there is."""
        states = super().stage_states()
        if self._has_begun(checkpoints_of("teacher")):
            trained = [name for name in states if isinstance(getattr(self.config, name, None), PretrainingConfig)]
            states |= {name: StageState.SETTLED for name in trained if states[name] is not StageState.CLOSED}
        return states

    def has_ended(self) -> bool:
        """Whether the run that lies there has ended."""
        return self.final.is_dir() and (self.path / REPORT).is_file()


def checkpoints_of(stage: str) -> str:
    """Where the checkpoints of a stage lie, a directory of its own."""
    return f"{stage}/{CHECKPOINTS.as_posix()}"


@dataclass
class Row:
    """One model of the report: its name, the tokens it was trained on here, and its held-out perplexity."""

    name: str
    tokens: int
    perplexity: float | None


@dataclass(frozen=True)
class Curve:
    """One line of the plot: the stage whose validation it shows, its label, and the row that it starts from."""

    stage: str
    label: str
    start: str


class StagedRun:
    """One call of a run of stages; a subclass says which, in `run`.

    Args:
        settings: of the run, a `StagedRunConfig` with `model_name_or_path` and `attention`.
        directory: checked.
        eval_tokens: of the validation text to score models on that no stage has scored.

    Attributes:
        labels: name of the report's row of each trained stage. batch_size: sequences to measure at once.
        rows: the report so far, filled on the main process.
    """

    labels: ClassVar[Mapping[str, str]]
    batch_size = 1

    def __init__(self, settings: Any, directory: StagedDirectory, eval_tokens: int) -> None:
        from accelerate import PartialState

        from linearize.conversion.pretraining_model import refuse_quantized_teacher
        from linearize.conversion.students import load_model_tokenizer
        from linearize.data.sequences import main_process_first, prepare_data
        from linearize.stages.identity import data_identity, source_identity
        from linearize.training.launcher import check_launcher

        check_launcher(settings.device)
        refuse_quantized_teacher(settings.distillation)
        self.settings, self.directory, self.path = settings, directory, directory.path
        self.state = PartialState(cpu=settings.device == "cpu")
        self._check_memory()
        with stage("preparing the data"):
            self.tokenizer = load_model_tokenizer(settings.model_name_or_path)
            self.train, validation = prepare_data(settings.data, self.tokenizer)
        shown = max(1, eval_tokens // settings.data.sequence_length)
        self.validation = [validation[i] for i in range(min(shown, len(validation)))]
        self.length_texts = self._length_texts(validation)
        self.rows: list[Row] = []
        inputs = {"base": source_identity(settings.model_name_or_path), "data": data_identity(self.train)}
        main_process_first(lambda: directory.prepare(inputs) if self.state.is_main_process else None)

    def _check_memory(self) -> None:
        """Refuse stages of all weights that cannot fit, before the first of them: the student has the teacher's shape,
        and learns from a model of its own size or the one that the settings name."""
        from linearize.conversion.students import load_config
        from linearize.hardware.memory_full import check_full_training

        source, distillation = self.settings.model_name_or_path, self.settings.distillation
        config = load_config(source)
        teacher = load_config(distillation.teacher or source) if distillation is not None else None
        check_full_training(source, config, self.state, teacher=teacher)

    def _length_texts(self, validation: Any) -> list[LengthText]:
        """What the main process scores by length, if anything."""
        from linearize.evaluation.by_length import run_texts

        chosen = self.settings.evaluation
        if chosen is None or not len(validation) or not self.state.is_main_process:
            return []
        with stage("preparing the data"):
            return run_texts(chosen, self.settings.data, validation, self.tokenizer, self.state.device)

    def _train(self, name: str, start: Path, training: PretrainingConfig) -> Path:
        """A stage of training, on from `start`; the directory of what comes out."""
        settings = self.settings
        result = pretrain(
            PretrainConfig(
                output_dir=str(self.path / name),
                resume_from_checkpoint=settings.resume_from_checkpoint,
                seed=settings.seed,
                device=settings.device,
                model_name_or_path=str(start),
                tokenizer_name_or_path=settings.model_name_or_path,
                data=settings.data,
                training=training,
                distillation=self._distillation(name),
                report_to=settings.report_to,
            )
        )
        if result.report is not None:
            tokens = self._tokens_before(name) + result.report.tokens
            self.rows.append(Row(self.labels[name], tokens, result.report.perplexity))
        return result.final

    def _distillation(self, name: str) -> DistillationConfig | None:
        """What a stage learns from: the teacher that was trained first, else the untouched one."""
        config, trained = self.settings.distillation, self.path / "teacher" / FINAL
        if name == "teacher" or config is None:
            return None
        if config.teacher is not None:
            return config
        return replace(config, teacher=str(trained if trained.is_dir() else self.settings.model_name_or_path))

    def _tokens_before(self, name: str) -> int:
        """Tokens that the model a stage starts from was trained on here."""
        return 0

    def _train_teacher(self, stages: Sequence[PretrainingConfig | None]) -> None:
        """The softmax teacher, by the last stage's schedule over the tokens of all."""
        tokens = sum(map(self._tokens_of, filter(None, stages)))
        schedule = replace(next(filter(None, reversed(stages))), tokens=tokens, max_steps=None)
        self._train("teacher", Path(self.settings.model_name_or_path), schedule)

    def _tokens_of(self, training: PretrainingConfig) -> int:
        """Tokens that a stage trains on."""
        plan = training.plan(self.settings.data.sequence_length, self.state.num_processes)
        return plan.steps * plan.tokens_per_step

    def _save(
        self,
        student: Any,
        path: Path,
        *,
        earlier: Mapping[str, Any] | None = None,
        transferred: Any = None,
        calibration: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Save a model between stages.

        Args:
            earlier: record of the model that it goes on from; None: it was converted from the teacher.
            transferred: `TransferResult` of the attention transfer that trained it, if one has.
            calibration: what the record says of it.
            files: more files of the repository, by name.
        """
        from linearize.config.record import loaded_commit, make_record
        from linearize.hub.repository import save_final

        if self.state.is_main_process:
            source, done = self.settings.model_name_or_path, {"transfer": transferred} if transferred else {}
            record = make_record(
                source,
                earlier=earlier,
                revision=loaded_commit(source),
                recipe=to_values(self.settings) if earlier is None else None,
                tokens={name: outcome.tokens for name, outcome in done.items()},
                seconds={name: outcome.seconds for name, outcome in done.items()},
                peak_memory_bytes={name: outcome.peak_memory_bytes for name, outcome in done.items()},
                calibration=calibration,
            )
            save_final(student, self.tokenizer, path, record, files)
        self.state.wait_for_everyone()

    def _measure(self, name: str, tokens: int, model: Any) -> None:
        """Held-out perplexity, in float32 and on the main process."""
        if not self.validation or not self.state.is_main_process:
            return
        from linearize.evaluation import perplexity
        from linearize.evaluation.arms import is_student

        model = model.to(self.state.device).float()
        arm = "mixed" if is_student(model) else None
        result = perplexity(model, self.validation, arm=arm, batch_size=self.batch_size, description=name)
        self.rows.append(Row(name, tokens, result.perplexity))

    def _by_length(self, final: Path) -> LengthReport | None:
        """The last model between its controls: the teacher that was trained, else the untouched one, and the same with
        a plain window of as many bytes."""
        from linearize.conversion.students import convert_like, load_student
        from linearize.evaluation.by_length import measure_controls, measure_student, start_report

        if not self.length_texts:
            return None
        trained = self.path / "teacher" / FINAL
        source, name = (trained, TEACHER) if trained.is_dir() else (self.settings.model_name_or_path, "teacher")
        report = start_report(self.length_texts, self.settings.data.sequence_length)
        student: Any = load_student(final, dtype="float32")
        control: Any = convert_like(source, student.config, dtype="float32")
        options: dict[str, Any] = {"batch_size": self.batch_size}
        measure_controls(report, control.to(self.state.device), self.length_texts, name, **options)
        del control  # before the student takes its place
        measure_student(report, student.to(self.state.device), self.length_texts, **options)
        return report

    def _finish(self, final: Path, curves: Sequence[Curve], **values: Any) -> None:
        """On the main process: copy the last model to `final`; write, plot and print the figures."""
        import shutil

        from linearize.files import atomic_directory, write_file

        with stage("saving the model"):
            with atomic_directory(self.directory.final) as target:
                shutil.copytree(final, target, dirs_exist_ok=True)
            self._plot(curves)
        with stage("evaluation", "lower evaluation.length_tokens"):
            lengths = self._by_length(final)
            self._record(lengths)
            content = {"rows": [asdict(row) for row in self.rows], **values}
            if lengths is not None:
                content["by_length"] = asdict(lengths)
            write_file(self.path / REPORT, (json.dumps(content, indent=1) + "\n").encode())
        for row in self.rows:
            figure = "-" if row.perplexity is None else f"{row.perplexity:.2f}"
            print(f"{row.name:40s} {row.tokens:>14,} tokens   perplexity {figure}", flush=True)
        if lengths is not None:
            lengths.show()
        print(f"Saved {self.directory.final}", flush=True)
        if lengths is not None:
            lengths.warn()

    def _record(self, lengths: LengthReport | None) -> None:
        """Add the figures by length to the record and card of the last model, and draw them."""
        from linearize.config.record import read_record
        from linearize.conversion.students import load_config
        from linearize.evaluation.plots import plot_by_length
        from linearize.evaluation.report import Report
        from linearize.hub.repository import write_record

        if lengths is None or not lengths.figures:
            return
        final = self.directory.final
        record = read_record(final) | {"evaluation": Report(reference=lengths.reference, by_length=lengths).to_dict()}
        write_record(final, record, load_config(str(final)))
        plot_by_length(lengths, self.path / "plots" / "evaluation_by_length.png")

    def _plot(self, curves: Sequence[Curve]) -> None:
        """Perplexity over tokens: the curves of the training stages, one after the other, beside the teacher's."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

        from linearize.training.log import write_figure

        known = {row.name: row.perplexity for row in self.rows}
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for line in curves:
            path = self.path / line.stage / REPORT
            if not path.is_file():
                continue
            report = json.loads(path.read_text(encoding="utf-8"))
            before, each = self._tokens_before(line.stage), report["tokens"] / max(report["steps"], 1)
            first = known.get(line.start)
            curve: list[tuple[float, float]] = [] if first is None else [(before, first)]
            curve += [(before + step * each, value) for step, value in report["validation"]]
            axes.plot([x / 1e6 for x, _ in curve], [y for _, y in curve], marker=".", label=line.label)
        axes.set(xlabel="tokens, millions", ylabel="held-out perplexity", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.grid(alpha=0.3, axis="y")
        axes.legend(frameon=False)
        write_figure(figure, self.path / "plots" / "perplexity.png")
