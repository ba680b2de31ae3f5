"""A run: what it starts from, its stages in order, and what is measured between them.

    result = linearize.run("llama3_8b_linear", data={"dataset": "text.jsonl"}, output_dir="out")
    result = linearize.run({"model_name_or_path": "my/llama", "stages": {...}, "output_dir": "out"})

Each process of a launcher calls it; the main one alone prints and writes. What lies in the run directory:
`linearize/runs/directory.py`. A stage that is not the last leaves its repository, from which a resumed run goes on;
inside a stage its checkpoints do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.failures import stage
from linearize.files import write_file
from linearize.processes import from_main_process
from linearize.runs.attention import complete
from linearize.runs.checks import check_memory
from linearize.runs.directory import CONVERTED, DONE, YARDSTICK, StagesDirectory, stages_done
from linearize.runs.records import record_of
from linearize.runs.settings import RunConfig, resolve_run
from linearize.stages.kinds import make_stage
from linearize.stages.kinds.base import Context, Outcome, Stage

if TYPE_CHECKING:
    from accelerate import PartialState

    from linearize.evaluation import TaskReport
    from linearize.runs.plan import RunPlan


@dataclass
class RunResult:
    """What a run leaves. On the other processes of a launcher the measurements are None."""

    output_dir: Path
    final: Path
    """The repository after the last stage."""
    record: dict[str, Any] = field(default_factory=dict)
    """The contents of its `linearize.json`; empty of a stock model."""
    stages: dict[str, Outcome] = field(default_factory=dict)
    """What each stage of this call did; without the models."""
    report: Any = None
    """Figures: `evaluation.Report`, or of an encoder `evaluation.embeddings.EmbeddingReport`."""
    tasks: TaskReport | None = None


def run(
    config: RunConfig | Mapping[str, Any] | str | PathLike[str], overrides: Mapping[str, Any] | None = None
) -> RunResult:
    """Run all stages of a run.

    Args:
        config: Settings, a mapping of them, a YAML file, or the name of a shipped preset.
        overrides: Other values of some settings, by their dotted names, such as `{"data.dataset": "text.jsonl"}`.

    Raises:
        UserError: Input that the user can mend; nothing half-written is left, checkpoints stay.
        KeyboardInterrupt: After Ctrl-C in a training stage, with a checkpoint left.
    """
    return RunOfStages(complete(resolve_run(config, overrides))).run()


def rehearse(
    config: RunConfig | Mapping[str, Any] | str | PathLike[str], overrides: Mapping[str, Any] | None = None
) -> RunPlan:
    """`plan`, with the text and the time: a part of the text is tokenised, the model is loaded, and a micro-batch of
    each stage is measured; nothing is written."""
    return RunOfStages(complete(resolve_run(config, overrides))).rehearse()


def plan(
    config: RunConfig | Mapping[str, Any] | str | PathLike[str], overrides: Mapping[str, Any] | None = None
) -> RunPlan:
    """Check a run and work out its steps and memory; nothing is loaded or written."""
    from linearize.runs.plan import make_plan

    settings = complete(resolve_run(config, overrides))
    StagesDirectory(settings).check()
    return make_plan(settings)


class RunOfStages:
    """One call of `run`, step by step."""

    def __init__(self, config: RunConfig) -> None:
        from accelerate import PartialState

        self.asked, self.config = config, config
        self.directory = StagesDirectory(config)
        self.state: PartialState = PartialState(cpu=config.device == "cpu")
        self.result = RunResult(self.directory.path, self.directory.final)
        self.record: dict[str, Any] | None = None
        self.repository: Path | str | None = None
        """Where the model as it is now lies, if anywhere."""
        self.figures: dict[str, dict[str, Any]] = {}

    def run(self) -> RunResult:
        """The steps of a run, in order."""
        from linearize.runs.plan import make_plan
        from linearize.stages.identity import mark_base

        config, directory = self.config, self.directory
        directory.check()
        from_main_process(self._check_push)
        if config.resume_from_checkpoint and directory.is_complete():
            return self._complete()
        self.plan = make_plan(config, self.state.num_processes)
        self.config = self.plan.config
        check_memory(self.plan, self.state)
        self._prepare_data()
        self._select()
        done = from_main_process(lambda: stages_done(self.plan, self.directory))
        model = self._load(done)  # what cannot be read is refused before anything is written
        self._prepare_directory()
        measures = self._measures(done)
        self._forecast(model, done, self.texts.train)
        if self.state.is_main_process:
            self.plan.show()
        if (whole := self._waiting_yardstick()) is not None:
            del model  # all weights of the teacher train in its place in memory
            self._train_whole_yardstick(whole, measures)
            model = self._load(done)
        mark_base(model, self.base)
        if measures is not None:
            self._measure(lambda: self._measure_start(measures, model, done))
        if done < len(self.plan.stages):
            self._train_lora_yardstick(model, measures)
        for place, current in enumerate(self.plan.stages):
            if place >= done:
                model = self._run_stage(current, model, measures)
        if self.state.is_main_process:
            from linearize.runs.ending import finish, keep

            model = keep(self, model)  # a quantised base goes, before the full weights need its place
            finish(self, model, measures)
        self.state.wait_for_everyone()
        return self.result

    def rehearse(self) -> RunPlan:
        """The plan with what a trial on this machine tells."""
        from linearize.conversion.own_tokenizers import make_tokenizer
        from linearize.conversion.students import load_model_tokenizer
        from linearize.data.estimate import estimate_tokens
        from linearize.runs.models import RunModels
        from linearize.runs.plan import make_plan

        self.directory.check()
        self.plan = make_plan(self.config, self.state.num_processes)
        self.config = config = self.plan.config
        check_memory(self.plan, self.state)
        tokenizer = None
        with stage("reading the data"):
            if config.architecture is None:
                tokenizer = load_model_tokenizer(config.source, revision=config.revision)
            elif config.tokenizer.source == "load":
                tokenizer = make_tokenizer(config, self.plan.start.encoder)
            known = None if tokenizer is None else estimate_tokens(config.data, tokenizer)
        self.plan.forecast.tokens, self.plan.forecast.exact = known if known is not None else (None, False)
        self.models = RunModels(self.plan, self.directory, self.state.device, tokenizer)
        layers = None if self.plan.selection is None else self.plan.start.forecast_settings.layers()
        with stage("loading the model", "load the base in 4 bit with load_in_4bit, or choose a smaller dtype"):
            model = self.models.first(layers=layers)
        self._forecast(model, 0)
        return self.plan

    # --- before the stages

    def _forecast(self, model: Any, done: int, rows: Any = None) -> None:
        """Time, text and disk of what is left.

        Args:
            rows: What it trains on, where that is tokenised.
        """
        from linearize.runs.forecast import disk_bytes, free_bytes, time_stages

        forecast = self.plan.forecast
        if rows is not None:
            forecast.tokens, forecast.exact = len(rows) * rows.sequence_length, True
        teacher = self._yardstick() if done == 0 and not self.directory.yardstick.is_dir() else None
        forecast.seconds = time_stages(self.plan, model, self.directory.path, done, teacher)
        forecast.disk, forecast.free = disk_bytes(self.plan), free_bytes(self.directory.path)

    def _complete(self) -> RunResult:
        from linearize.config.record import read_record

        self.say(f"The run in {self.directory.path} is complete: {self.directory.final}")
        if self.state.is_main_process:
            self.push()
        self.result.record = read_record(self.directory.final)
        return self.result

    def _check_push(self) -> None:
        """Ask the Hub who we are before hours of training, not after them."""
        if self.config.push_to_hub is not None:
            from linearize.hub.repository import check_token

            check_token(self.config.push_to_hub)

    def _prepare_data(self) -> None:
        """Tokenizer and text."""
        from linearize.runs.models import RunModels
        from linearize.runs.texts import prepare_texts

        self.texts = prepare_texts(self.plan, self.state)
        self.tokenizer = self.texts.tokenizer
        self.models = RunModels(self.plan, self.directory, self.state.device, self.tokenizer)
        if self.texts.train is not None:
            what = "rows" if self.plan.start.encoder else "sequences"
            self.say(f"{len(self.texts.train):,} training {what}, {len(self.texts.validation):,} for validation")

    def _select(self) -> None:
        """Choose windows and softmax layers by measuring, where the settings leave them to it."""
        if self.plan.selection is None:
            return
        from linearize.stages.select import select

        earlier = self.directory.path if self.config.resume_from_checkpoint else None

        def load(attention: dict[str, Any]) -> Any:
            return self.models.first(layers={"attention": attention})

        with stage("the selection", "lower select.sequence_length or select.batch_size, or set load_in_4bit"):
            self.models.selection = select(self.plan.selection, self.texts.train, load, earlier)
        self.say(self.models.selection.sentence())

    def _prepare_directory(self) -> None:
        """Make the directory, if it may be this run's."""
        from linearize.stages.identity import data_identity, source_identity

        config, train, inputs = self.config, self.texts.train, {}
        self.base = "random weights"
        if config.model_name_or_path is not None:
            self.base = inputs["base"] = source_identity(config.source, config.revision)
        if train is not None:
            inputs["data"] = data_identity(train)
            if self.plan.start.encoder:
                inputs["validation"] = data_identity(self.texts.validation)
        keeps = train is not None or config.evaluation is not None
        from_main_process(lambda: self.directory.prepare(inputs if keeps else None))
        if (earlier := self.directory.path / DONE).is_file() and config.resume_from_checkpoint:
            self.figures = json.loads(earlier.read_text(encoding="utf-8"))
        if self.models.selection is not None and self.state.is_main_process:
            self.models.selection.save(self.directory.path)

    def _measures(self, done: int) -> Any:
        """What measures the models; None on the other processes or when there is nothing to measure."""
        from linearize.runs.texts import make_measures

        if self.config.evaluation is None or not self.state.is_main_process:
            return None
        ended = done == len(self.plan.stages) and self.directory.final.is_dir()
        measures = make_measures(self.plan, self.texts, self.directory, ended=ended)
        if measures is not None and self.models.selection is not None:
            if (note := self.models.selection.sentence()) not in measures.report.notes:
                measures.report.notes.append(note)
        return measures

    def _load(self, done: int) -> Any:
        """The model as the stages that are done left it."""
        from linearize.config.record import read_record

        config = self.config
        if self.plan.start.converted:
            self.record = read_record(config.source, revision=config.revision)
            self.repository = config.model_name_or_path
        with stage("loading the model", "load the base in 4 bit with load_in_4bit, or choose a smaller dtype"):
            if not done:
                model = self.models.first()
            else:
                last = done == len(self.plan.stages) and self.directory.final.is_dir()
                self.repository = place = (
                    self.directory.final if last else self.directory.of_stage(self.plan.stages[done - 1].name)
                )
                self.record = read_record(place) or None
                model = self.models.after(place)
        return model

    def _measure_start(self, measures: Any, model: Any, done: int) -> None:
        """The references. Of a run that goes on later they are there, but for an encoder's teacher, and perhaps the
        model after the stage that was the last one done."""
        from linearize.config.record import base_is_teacher

        if not done:
            known = self.record is None or base_is_teacher(self.record)
            measures.before_training(model, base_is_teacher=known, yardstick=self.config.yardstick is not None)
            if (self.directory.yardstick / "config.json").is_file():
                measures.after_yardstick(self.models.of_yardstick(), " + training on the same tokens")
        elif self.plan.start.encoder:
            measures.before_training(self.models.placed(self.models.teacher("base")))
        if 0 < done < len(self.plan.stages):
            measures.after_stage(self._label(self.plan.stages[done - 1]), model)

    # --- the yardstick

    def _yardstick(self) -> Stage | None:
        """The stage that trains the teacher, if the run has one."""
        settings = self.config.yardstick_settings() if self.config.yardstick is not None else None
        return None if settings is None else make_stage(YARDSTICK, settings)

    def _waiting_yardstick(self) -> Stage | None:
        """The stage that trains all weights of the teacher, if the run has one that is still to come."""
        current = self._yardstick()
        there = (self.directory.yardstick / "config.json").is_file()
        return None if current is None or current.trained == "lora" or there else current

    def _train_whole_yardstick(self, current: Stage, measures: Any) -> None:
        """All weights of the softmax teacher."""
        from linearize.stages.identity import mark_base

        teacher = self.models.placed(self.models.teacher("base"))
        mark_base(teacher, self.base)
        outcome = self._work(current, teacher, self._context(measures))
        self._note(current, outcome)
        if self.state.is_main_process:
            from linearize.hub.repository import save_stock

            with stage("saving the model"):
                save_stock(outcome.model, self.tokenizer, self.directory.yardstick)
        self.state.wait_for_everyone()
        outcome.model = None

    def _train_lora_yardstick(self, model: Any, measures: Any) -> None:
        """The same adapters on the softmax teacher's arm, measured and taken off again."""
        current = self._yardstick()
        if current is None or current.trained != "lora":
            return
        context = self._context(measures)
        context.arm = "teacher"
        outcome = self._work(current, model, context)
        self._note(current, outcome)
        if measures is not None:
            self._measure(lambda: measures.after_yardstick(outcome.model, " + the same LoRA steps"))
        outcome.model.unload()

    # --- the stages

    def _context(self, measures: Any) -> Context:
        def measure(name: str, model: Any) -> None:
            if measures is not None:
                measures.after_stage(name, model)

        return Context(
            config=self.config,
            path=self.directory.path,
            state=self.state,
            tokenizer=self.tokenizer,
            train=self.texts.train,
            validation=self.texts.validation,
            encoder=self.plan.start.encoder,
            load_teacher=self.models.teacher,
            save=self._base_of_adapter,
            measure=measure,
        )

    def _work(self, current: Stage, model: Any, context: Context) -> Outcome:
        title = current.name if current.label == current.name else f"{current.name} ({current.label})"
        with stage(title, current.advice(self.config.data.sequence_length)):
            return current.run(model, context)

    def _run_stage(self, current: Stage, model: Any, measures: Any) -> Any:
        """One stage: its work, its figures, its repository; the model after it."""
        from linearize.stages.identity import mark_base

        outcome = self._work(current, model, self._context(measures))
        self._note(current, outcome)
        last = current is self.plan.stages[-1]
        model = outcome.model
        if last:
            return model
        base = self.repository or self.config.model_name_or_path or ""
        self.repository = None
        adapted, quantized = hasattr(model, "peft_config"), self.models.quantizes
        if current.keeps:
            place = self.directory.of_stage(current.name)
            if adapted and not quantized:
                model = self.models.whole(model, base)
            if self.state.is_main_process:
                self._save(self.models.whole(model, base), place, outcome.files)
            self.state.wait_for_everyone()
            self.repository = place
            if adapted and quantized:
                model = self.models.after(place)
        mark_base(model, self.base)
        if measures is not None:
            self._measure(lambda: measures.after_stage(self._label(current), model))
        return model

    def _label(self, current: Stage) -> str:
        """What its row is called: by the kind of the stage, and where there are several of it by its name."""
        return current.name if [x.label for x in self.plan.stages].count(current.label) > 1 else current.label

    def _note(self, current: Stage, outcome: Outcome) -> None:
        """Say what a stage did, and keep it for record and report."""
        from linearize.runs.report import stage_line

        planned = self.plan.of(current.name)
        if outcome.steps:
            self.say(stage_line(current.label, outcome, planned.forecast if planned else None))
        self.figures[current.name] = {
            "kind": current.values.kind,
            "trained": current.what,
            "steps": outcome.steps,
            "tokens": outcome.tokens,
            "seconds": round(outcome.seconds, 1),
            "peak_memory_bytes": outcome.peak_memory_bytes,
            **outcome.figures,
        }
        if self.state.is_main_process:
            write_file(self.directory.path / DONE, (json.dumps(self.figures, indent=1) + "\n").encode())
        self.result.stages[current.name] = outcome
        if current.name != YARDSTICK:
            self.record = record_of(self, current, outcome)

    def _base_of_adapter(self, model: Any) -> tuple[str, str | None]:
        """The repository that adapters on a model belong on, which is saved for them unless it is there."""
        if self.repository is None:
            place = self.directory.path / CONVERTED
            if not (place / "config.json").is_file():
                whole = self.models.whole(model, self.config.source)
                if self.state.is_main_process:
                    self._save(whole, place)
                self.state.wait_for_everyone()
            self.repository = place
        own = self.repository == self.config.model_name_or_path
        return str(self.repository), self.config.revision if own else None

    def _save(self, model: Any, place: Path, files: Mapping[str, bytes] | None = None) -> None:
        """Leave a repository of the stages so far: the main process."""
        from linearize.runs.ending import save

        with stage("saving the model"):
            save(self, model, place, files)

    # --- what the main process does

    def push(self) -> None:
        """Upload the repository, if asked to; a push that failed is made good by resuming."""
        if self.config.push_to_hub is not None:
            from linearize.hub.repository import push

            self.say(f"Pushed to {push(self.directory.final, self.config.push_to_hub)}")

    def say(self, text: str) -> None:
        """Print on the main process."""
        if self.state.is_main_process:
            print(text, flush=True)

    def _measure(self, work: Callable[[], None]) -> None:
        """Measure on the main process; the others go on and wait for it in the next stage."""
        with stage("evaluation", "lower evaluation.batch_size or evaluation.length_tokens"):
            work()
