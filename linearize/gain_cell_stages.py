"""A pretrained model onto gain cells in two trained stages, as Leroux et al. 2025 (arXiv 2409.19315) do it.

    teacher    the yardstick: the softmax teacher trained on the same tokens as both stages
    start      the linear cell, its scalers from the teacher's moments, then attention transfer of the scalers
    linear     stage A: all weights train with the linear cell
    adapted    the nonlinear cell, its scalers solved for until their statistics are stage A's
    refined    the same, the scalers alone trained to give what stage A's model gives
    nonlinear  stage B: all weights train with the nonlinear cell

Each is a directory of the run; one that is there is not made again, so a stopped run goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal

from linearize.failures import stage
from linearize.pretraining import PretrainConfig, PretrainingConfig, pretrain
from linearize.run_directory import CONFIG, FINAL, RunDirectory
from linearize.settings import AdaptationConfig, DataConfig, DistillationConfig, RunSettings, TransferConfig
from linearize.settings_io import resolve
from linearize.settings_values import convert_fields, require

REPORT = "report.json"
STAGES = ("teacher", "start", "linear", "adapted", "refined", "nonlinear")


TRAINED = {
    "teacher": "teacher, trained on the same tokens",
    "linear": "linear cell, after stage A",
    "refined": "nonlinear cell, adapted and refined",
    "nonlinear": "nonlinear cell, after stage B",
}
"""Names of the report's rows, by stage."""


def _transfer() -> TransferConfig:
    return TransferConfig(tokens=262_144, branch="mixed")


@dataclass
class RefinementConfig(PretrainingConfig):
    """Training of the scalers alone, after their statistics match: equal moments are not yet equal outputs."""

    tokens: int = 2_097_152
    tokens_per_step: int = 16_384
    learning_rate: float = 3e-3
    warmup_steps: int = 5
    train: Literal["all", "scalers"] = "scalers"


@dataclass
class GainCellRunConfig(RunSettings):
    """A whole run onto gain cells."""

    preset_folder: ClassVar[str] = "gain_cell"

    model_name_or_path: str = "openai-community/gpt2"
    """The teacher: a Hub id or a local directory."""
    output_dir: str = "out_gain_cell"
    """The run directory: config.yaml, a directory for each stage, plots, report.json and final."""
    overwrite: bool = False
    """Replace a run that `output_dir` already holds."""
    resume_from_checkpoint: bool = False
    """Continue the run in `output_dir`, in the stage where it stopped."""
    seed: int = 0
    """Seed of the order of the data."""
    device: Literal["auto", "cpu"] = "auto"
    """The process's GPU, else the CPU; or the CPU."""
    attention: dict[str, Any] = field(default_factory=lambda: {"type": "gain_cell"})
    """Settings of gain-cell attention: window, cell, gradient; `cell_kind` is each stage's own."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation text."""
    transfer: TransferConfig | None = field(default_factory=_transfer)
    """Attention transfer of the linear cell's scalers before stage A; none leaves it out."""
    linear: PretrainingConfig = field(default_factory=PretrainingConfig)
    """Stage A."""
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    """From the linear to the nonlinear cell."""
    refinement: RefinementConfig | None = field(default_factory=RefinementConfig)
    """After the adaptation, the scalers alone learn from stage A's model; none leaves it out."""
    nonlinear: PretrainingConfig = field(default_factory=PretrainingConfig)
    """Stage B."""
    statistics_sequences: int = 32
    """Training sequences that moments and statistics are taken over."""
    train_teacher: bool = True
    """Train the teacher first, on as many tokens as all stages: the fair yardstick."""
    distillation: DistillationConfig | None = field(default_factory=DistillationConfig)
    """In both stages, learn from a teacher as well; `teacher` none: the one that was trained first, else the untouched
    one. None: the labels alone, as published."""
    report_to: list[str] = field(default_factory=lambda: ["none"])
    """Trackers of transformers' Trainer: trackio, wandb, tensorboard, all or none."""

    def __post_init__(self) -> None:
        convert_fields(self, "")
        self._check_run()
        require(
            self.attention.get("type", "gain_cell") == "gain_cell",
            f"attention.type is {self.attention.get('type')!r}, but this run trains gain_cell attention.",
        )
        require(
            "cell_kind" not in self.attention,
            "attention.cell_kind is set, but each stage has its own: leave it out.",
        )
        require(
            self.statistics_sequences >= 1,
            f"statistics_sequences is {self.statistics_sequences}, but it must be at least 1.",
        )
        require(
            self.refinement is None or self.refinement.train == "scalers",
            "refinement.train must be scalers: all weights train in the stage after it.",
        )
        require(
            self.transfer is None or self.transfer.branch == "mixed",
            "transfer.branch must be mixed: gain-cell attention has no branches.",
        )

    def attention_of(self, kind: str) -> dict[str, Any]:
        """The mechanism's settings with this kind of cell."""
        return {**self.attention, "type": "gain_cell", "cell_kind": kind}


class GainCellDirectory(RunDirectory):
    """The directory of a run onto gain cells."""

    contents = (CONFIG, *STAGES, "logs", "checkpoints", "plots", FINAL, REPORT)

    def is_complete(self) -> bool:
        """Whether the run that lies there has ended."""
        return self.final.is_dir() and (self.path / REPORT).is_file()


@dataclass
class Row:
    """One model of the report: its name, the tokens it was trained on here, and its held-out perplexity."""

    name: str
    tokens: int
    perplexity: float | None


def run_gain_cell(config: GainCellRunConfig | Mapping[str, Any] | str | PathLike[str]) -> Path:
    """Run all stages, measure each model on the validation text, and save the last one.

    Args:
        config: Settings, a mapping of them, a YAML file, or the name of a shipped preset.

    Returns:
        The run directory; `final` in it is the converted repository, `report.json` has the figures.

    Raises:
        UserError: Input that the user can mend; what is done stays.
        KeyboardInterrupt: After Ctrl-C in training, with a checkpoint left.
    """
    settings = resolve(config, settings=GainCellRunConfig)
    directory = GainCellDirectory(settings)
    directory.check()
    return _Stages(settings, directory).run()


class _Stages:
    """One call of `run_gain_cell`."""

    def __init__(self, settings: GainCellRunConfig, directory: GainCellDirectory) -> None:
        from accelerate import PartialState

        from linearize.conversion import load_tokenizer
        from linearize.data import main_process_first, prepare_data

        self.settings, self.directory, self.path = settings, directory, directory.path
        self.state = PartialState(cpu=settings.device == "cpu")
        with stage("preparing the data"):
            self.tokenizer = load_tokenizer(settings.model_name_or_path)
            self.train, validation = prepare_data(settings.data, self.tokenizer)
        shown = max(1, settings.linear.eval_tokens // settings.data.sequence_length)
        self.validation = [validation[i] for i in range(min(shown, len(validation)))]
        mine = range(self.state.process_index, len(self.train), self.state.num_processes)
        self.measured_on = [self.train[i] for i in mine[: settings.statistics_sequences]]
        self.rows: list[Row] = []
        self.adaptation: dict[str, Any] | None = None
        main_process_first(lambda: directory.prepare() if self.state.is_main_process else None)

    def run(self) -> Path:
        from linearize.conversion import load_model

        settings = self.settings
        self._measure("teacher", 0, load_model(settings.model_name_or_path))
        if settings.train_teacher:
            self._train_teacher()
        self._make_start()
        linear = self._train("linear", self.path / "start", settings.linear)
        adapted = self._adapt(linear)
        if settings.refinement is not None:
            adapted = self._train("refined", adapted, settings.refinement)
        final = self._train("nonlinear", adapted, settings.nonlinear)
        if self.state.is_main_process:
            self._finish(final)
        self.state.wait_for_everyone()
        return self.path

    def _make_start(self) -> None:
        """The linear cell with fitted scalers."""
        from linearize.adaptation import start_from_moments
        from linearize.conversion import convert, load_student

        start = self.path / "start"
        if (start / "config.json").is_file():
            self._measure("linear cell, before stage A", 0, load_student(start))
            return
        settings = self.settings
        student = convert(settings.model_name_or_path, settings.attention_of("linear"), dtype="float32")
        student.to(self.state.device)
        with stage("fitting the scalers to the teacher's moments"):
            start_from_moments(student, self.measured_on, self.settings.adaptation.batch_size)
        if settings.transfer is not None:
            from linearize.transfer import transfer_attention

            transfer_attention(
                student, self.train, settings.transfer, output_dir=self.path, seed=settings.seed,
                resume=settings.resume_from_checkpoint, report_to=settings.report_to,
                device="cpu" if settings.device == "cpu" else None,
            )  # fmt: skip
        self._measure("linear cell, before stage A", 0, student)
        self._save(student, start)

    def _train(self, name: str, start: Path, training: PretrainingConfig) -> Path:
        """All weights, on from `start`; the directory of what comes out."""
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
            before = self._tokens_before(name)
            self.rows.append(Row(TRAINED[name], before + result.report.tokens, result.report.perplexity))
        return result.final

    def _distillation(self, name: str) -> DistillationConfig | None:
        """What a stage learns from."""
        config, trained = self.settings.distillation, self.path / "teacher" / FINAL
        if name == "teacher":
            return None
        if name == "refined":
            return DistillationConfig(teacher=str(self.path / "linear" / FINAL), labels_weight=0.0)
        if config is None or config.teacher is not None:
            return config
        return replace(config, teacher=str(trained if trained.is_dir() else self.settings.model_name_or_path))

    def _tokens_before(self, name: str) -> int:
        earlier = {"refined": ("linear",), "nonlinear": ("refined", "linear")}.get(name, ())
        known = {row.name: row.tokens for row in self.rows}
        return next((known[TRAINED[other]] for other in earlier if TRAINED[other] in known), 0)

    def _train_teacher(self) -> None:
        """The softmax teacher, by stage B's schedule over the tokens of all stages."""
        settings, tokens = self.settings, 0
        for training in (settings.linear, settings.refinement, settings.nonlinear):
            if training is not None:
                plan = training.plan(settings.data.sequence_length, self.state.num_processes)
                tokens += plan.steps * plan.tokens_per_step
        schedule = replace(settings.nonlinear, tokens=tokens, max_steps=None)
        self._train("teacher", Path(settings.model_name_or_path), schedule)

    def _adapt(self, linear: Path) -> Path:
        """The nonlinear cell with stage A's weights and statistics."""
        from linearize.adaptation import adapt_scalers, collect_statistics, plot_adaptation, save_statistics
        from linearize.conversion import load_student

        adapted, log = self.path / "adapted", self.path / "logs" / "adaptation.json"
        tokens = self._tokens_before("refined")
        student: Any = load_student(linear, dtype="float32").to(self.state.device)
        with stage("adapting the scalers to the nonlinear cell"):
            size = self.settings.adaptation.batch_size
            targets = collect_statistics(student, self.measured_on, size)
            nonlinear = self._as_nonlinear(student)
            self._measure("nonlinear cell, not adapted", tokens, nonlinear)
            if (adapted / "config.json").is_file():
                nonlinear = load_student(adapted, dtype="float32").to(self.state.device)
                self.adaptation = json.loads(log.read_text(encoding="utf-8"))
            else:
                report = adapt_scalers(nonlinear, targets, self.measured_on, self.settings.adaptation)
                self.adaptation = report.to_dict()
                if self.state.is_main_process:
                    plot_adaptation(report, self.path / "plots" / "adaptation.png")
                    log.parent.mkdir(parents=True, exist_ok=True)
                    log.write_text(json.dumps(self.adaptation, indent=1), encoding="utf-8")
                self._save(nonlinear, adapted)
                if self.state.is_main_process:
                    save_statistics(targets, adapted)
        self._measure("nonlinear cell, adapted", tokens, nonlinear)
        return adapted

    def _as_nonlinear(self, student: Any) -> Any:
        """The same weights with the other kind of cell."""
        config = type(student.config).from_dict(student.config.to_dict())
        for settings in config.mixers.values():
            settings["cell_kind"] = "nonlinear"
        config.prepare_mixers()
        other = type(student)(config).to(self.state.device)
        other.load_state_dict(student.state_dict())
        other.generation_config = student.generation_config
        return other.eval()

    def _save(self, student: Any, path: Path) -> None:
        from linearize.hub import make_record, save_final

        if self.state.is_main_process:
            recipe = {"attention": self.settings.attention}
            save_final(student, self.tokenizer, path, make_record(self.settings.model_name_or_path, recipe=recipe))
        self.state.wait_for_everyone()

    def _measure(self, name: str, tokens: int, model: Any) -> None:
        """Held-out perplexity, in float32 and on the main process."""
        if not self.validation or not self.state.is_main_process:
            return
        from linearize.evaluation import perplexity
        from linearize.evaluation.arms import is_student

        model = model.to(self.state.device).float()
        arm, size = "mixed" if is_student(model) else None, self.settings.adaptation.batch_size
        result = perplexity(model, self.validation, arm=arm, batch_size=size, description=name)
        self.rows.append(Row(name, tokens, result.perplexity))

    def _finish(self, final: Path) -> None:
        """Copy the last model to `final`; write, plot and print the figures."""
        import shutil

        from linearize.checkpointing import atomic_directory, write_file

        with stage("saving the model"):
            with atomic_directory(self.directory.final) as target:
                shutil.copytree(final, target, dirs_exist_ok=True)
            values = {"rows": [asdict(row) for row in self.rows], "adaptation": self.adaptation}
            self._plot()
            write_file(self.path / REPORT, (json.dumps(values, indent=1) + "\n").encode())
        for row in self.rows:
            figure = "-" if row.perplexity is None else f"{row.perplexity:.2f}"
            print(f"{row.name:40s} {row.tokens:>14,} tokens   perplexity {figure}", flush=True)
        print(f"Saved {self.directory.final}", flush=True)

    def _plot(self) -> None:
        """Perplexity over tokens: the curves of the training stages, one after the other, beside the teacher's."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

        known = {row.name: row.perplexity for row in self.rows}
        last = TRAINED["refined"] if TRAINED["refined"] in known else "nonlinear cell, adapted"
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, label, start in (
            ("linear", "linear cell", "linear cell, before stage A"),
            ("nonlinear", "nonlinear cell", last),
            ("teacher", "teacher", "teacher"),
        ):
            path = self.path / name / REPORT
            if not path.is_file():
                continue
            report = json.loads(path.read_text(encoding="utf-8"))
            before, each = self._tokens_before(name), report["tokens"] / max(report["steps"], 1)
            first = known.get(start)
            curve: list[tuple[float, float]] = [] if first is None else [(before, first)]
            curve += [(before + step * each, value) for step, value in report["validation"]]
            axes.plot([x / 1e6 for x, _ in curve], [y for _, y in curve], marker=".", label=label)
        axes.set(xlabel="tokens, millions", ylabel="held-out perplexity", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.grid(alpha=0.3, axis="y")
        axes.legend(frameon=False)
        (self.path / "plots").mkdir(parents=True, exist_ok=True)
        figure.savefig(self.path / "plots" / "perplexity.png", dpi=130)
