"""Finetuning of encoders on GLUE: each model on each task with each seed, and a table of them side by side.

    result = linearize.run_glue({"models": ["google-bert/bert-base-uncased", "out_bert"], "output_dir": "out"})

config.yaml                                     every setting, resolved
results/MODEL/TASK/lrRATE-seedSEED.json         one finetuning each
logs/MODEL/TASK/lrRATE-seedSEED.jsonl           its losses
checkpoints/                                    of the finetuning that runs
models/MODEL/TASK/lrRATE-seedSEED               repositories, with save_models
report.json, report.md                          `GlueReport`, after each finetuning

What has a result is not run again by a resumed run; the report has all results that are there, those of models and
tasks that the call does not name too.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from linearize.config.yaml_io import resolve, to_values
from linearize.errors import UserError
from linearize.evaluation.glue.report import GlueReport, Result, make_report
from linearize.evaluation.glue.settings import GlueRunConfig
from linearize.evaluation.glue.tasks import TASKS, shown_score
from linearize.failures import smaller, stage
from linearize.runs.directory import CONFIG, FREE_TO_CHANGE, RunDirectory

REPORT, TABLE = "report.json", "report.md"


class GlueDirectory(RunDirectory):
    """The directory of a run on GLUE."""

    fixed = ("training.batch_size", "training.precision")  # the batch of a step; all results of a table are made alike
    free_to_change = (
        *FREE_TO_CHANGE,
        *("models", "names", "revisions", "tasks", "seeds", "metrics", "save_models"),
        "training.learning_rates",
    )

    @property
    def contents(self) -> tuple[str, ...]:
        """What the benchmark writes."""
        return CONFIG, "results", "logs", "checkpoints", "models", REPORT, TABLE


@dataclass
class GlueRunResult:
    """What a run leaves."""

    output_dir: Path
    report: GlueReport


def run_glue(config: GlueRunConfig | Mapping[str, Any] | str | PathLike[str]) -> GlueRunResult:
    """Finetune every model on every task with every seed, and report.

    Args:
        config: Settings, a mapping of them, a YAML file, or the name of a shipped preset.

    Raises:
        UserError: Input that the user can mend; what is finished stays.
        KeyboardInterrupt: After Ctrl-C in training, with a checkpoint left.
    """
    return _GlueRun(resolve(config, settings=GlueRunConfig)).run()


class _GlueRun:
    """One call of `run_glue`."""

    def __init__(self, settings: GlueRunConfig) -> None:
        from accelerate import PartialState

        self.settings, self.directory = settings, GlueDirectory(settings)
        self.path = self.directory.path
        self.state = PartialState(cpu=settings.device == "cpu")
        self.keys: list[str] = []
        self.results: dict[str, Result] = {}
        self.metrics: Any = None

    def run(self) -> GlueRunResult:
        from linearize.data.sequences import main_process_first
        from linearize.evaluation.glue.data import load_task

        settings = self.settings
        self.directory.check()
        runs = self._finetunings()
        self.keys = [run.key for run in runs]
        if not settings.overwrite:
            self.results = self._read_results()
        waiting = [run for run in runs if run.key not in self.results]
        self._check(waiting)
        self._check_same_models(runs, waiting)
        tasks = list(dict.fromkeys(run.task for run in waiting))
        with stage("preparing the data"):
            data = main_process_first(lambda: {task: load_task(task, settings.data) for task in tasks})
        for task in tasks:
            self._check_same_data(task, data[task].identity())
        main_process_first(lambda: self.directory.prepare() if self.state.is_main_process else None)
        self._announce(len(runs), len(waiting))
        for task in tasks:
            for model in dict.fromkeys(run.model for run in waiting if run.task == task):
                self._finetune([run for run in waiting if (run.task, run.model) == (task, model)], data[task])
            del data[task]
        report = self._report()
        if self.state.is_main_process:
            report.show()
            self._say(f"Saved {self.path / REPORT} and {TABLE}")
        self.state.wait_for_everyone()
        return GlueRunResult(self.path, report)

    def _finetunings(self) -> list[Any]:
        """All of the run, in their order."""
        from linearize.stages.glue_training import Finetuning, find_model

        settings = self.settings
        sources = [
            (name, find_model(source), settings.revision(number))
            for number, (name, source) in enumerate(zip(settings.model_names(), settings.models, strict=True))
        ]
        return [
            Finetuning(name, source, revision, task, rate, seed)
            for task in settings.tasks
            for name, source, revision in sources
            for rate in settings.training.learning_rates
            for seed in settings.seeds
        ]

    def _check(self, waiting: list[Any]) -> None:
        """Refuse now what would fail after hours."""
        from linearize.conversion.students import load_model_tokenizer
        from linearize.evaluation.glue.metrics import GlueMetrics
        from linearize.runs.checks import check_device
        from linearize.stages.glue_training import check_model
        from linearize.training.launcher import check_launcher
        from linearize.training.log import tracker_names

        settings = self.settings
        check_launcher(settings.device)
        check_device(settings.device)
        tracker_names(settings.report_to)
        settings.training.stage(1, settings.data.sequence_length, 0.0, self.state.num_processes)
        for source, revision in dict.fromkeys((run.source, run.revision) for run in waiting):
            check_model(source, revision, settings.data.sequence_length)
            load_model_tokenizer(source, revision=revision)
        if waiting:
            self.metrics = GlueMetrics()

    def _check_same_models(self, runs: list[Any], waiting: list[Any]) -> None:
        """Note what tells each model's weights from others, and refuse results of others under its name."""
        needed = {(run.source, run.revision) for run in waiting}
        digests = {
            where: self._digest(*where, needed=where in needed)
            for where in dict.fromkeys((run.source, run.revision) for run in runs)
        }
        for run in runs:
            run.weights = digests[run.source, run.revision]
        models = {run.model: run for run in runs}
        for key, result in self.results.items():
            run = models.get(result.model)
            if run is None:
                continue
            if (result.source, result.revision) != (run.source, run.revision):
                raise UserError(
                    f"{self.path} has results of {result.source} under the name {run.model}, which now is "
                    f"{run.source}: give it another name with names."
                )
            if run.weights and result.weights != run.weights:
                raise UserError(
                    f"The weights of {run.source} are others than those of {self._result_path(key)}: give the same, "
                    "delete that file, or name another output_dir."
                )

    def _digest(self, source: str, revision: str | None, *, needed: bool) -> str:
        """What tells a model's weights from others; "" where all its results are there, and it is not any more."""
        from linearize.conversion.importers.checkpoint_files import checkpoint_digest
        from linearize.stages.glue_training import check_model

        try:
            check_model(source, revision, self.settings.data.sequence_length)
            return checkpoint_digest(source, revision)
        except UserError:
            if needed:
                raise
            self._say(f"{source} cannot be read now: its results are taken as they are")
            return ""

    def _check_same_data(self, task: str, identity: str) -> None:
        for key, result in self.results.items():
            if result.task == task and result.data != identity:
                raise UserError(
                    f"The examples of {TASKS[task].name} are others than those of {self._result_path(key)}: give the "
                    "same, delete that file, or name another output_dir."
                )

    # --- results

    def _result_path(self, key: str) -> Path:
        return self.path / "results" / f"{key}.json"

    def _read_results(self) -> dict[str, Result]:
        """What all finished finetunings left, those of an earlier call too."""
        root = self.path / "results"
        paths = sorted(root.glob("*/*/*.json"))
        return {path.relative_to(root).with_suffix("").as_posix(): self._read_result(path) for path in paths}

    def _read_result(self, path: Path) -> Result:
        """What a finished finetuning left.

        Raises:
            UserError: The file is damaged, or has not what a result has.
        """
        try:
            return Result(**json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise UserError(f"{path} is damaged: delete it, and that finetuning is run again.") from error
        except TypeError as error:
            raise UserError(
                f"{path} was not written by this version: delete it, and that finetuning is run again."
            ) from error

    def _report(self) -> GlueReport:
        """The report of what is finished, written by the main process."""
        from linearize.files import write_file

        settings = self.settings
        others = [key for key in self.results if key not in self.keys]
        results = [self.results[key] for key in [*self.keys, *others] if key in self.results]
        models = dict.fromkeys([*settings.model_names(), *(result.model for result in results)])
        report = make_report(results, list(models), to_values(settings.data))
        if self.state.is_main_process:
            write_file(self.path / REPORT, (report.to_json() + "\n").encode())
            write_file(self.path / TABLE, report.markdown("##").encode())
        return report

    # --- one task of one model

    def _finetune(self, runs: list[Any], data: Any) -> None:
        """The finetunings of one model on one task."""
        from linearize.conversion.students import load_model_tokenizer
        from linearize.evaluation.glue.data import tokenize
        from linearize.stages.glue_training import finetune_on

        settings, first = self.settings, runs[0]
        tokenizer = load_model_tokenizer(first.source, revision=first.revision)
        length, identity = settings.data.sequence_length, data.identity()
        rows = tokenize(data.train, tokenizer, length)
        validation = {name: tokenize(split, tokenizer, length) for name, split in data.validation.items()}
        for run in runs:
            training = settings.training
            own = training.own_examples(self.state.num_processes)
            lower = smaller("training.micro_batch_size", own, length)
            with stage(f"finetuning {run.model} on {TASKS[run.task].name}", lower):
                tuned = finetune_on(run, settings, rows, identity, self.path)
                if self.state.is_main_process:
                    result = self._measure(run, tuned, len(rows), validation, identity)
                    if settings.save_models:
                        self._save(run, tuned.model, tokenizer, result)
                    self._keep(run, result)
            self.state.wait_for_everyone()
            if not self.state.is_main_process:
                self.results[run.key] = self._read_result(self._result_path(run.key))
            del tuned
            gc.collect()

    def _measure(self, run: Any, tuned: Any, examples: int, validation: dict[str, Any], identity: str) -> Result:
        import torch

        from linearize.evaluation.glue.tasks import score_name
        from linearize.stages.glue_training import predict

        scores: dict[str, float] = {}
        for name, rows in validation.items():
            found = predict(tuned.model, rows, self.settings.training.eval_batch_size)
            of_split = self.metrics.scores(run.task, found, rows.labels)
            scores |= {score_name(metric, name): value for metric, value in of_split.items()}
        device = tuned.model.device
        return Result(
            model=run.model,
            source=run.source,
            revision=run.revision,
            weights=run.weights,
            architecture=type(tuned.model).__name__,
            task=run.task,
            learning_rate=run.learning_rate,
            seed=run.seed,
            scores=scores,
            train_examples=examples,
            validation_examples=sum(map(len, validation.values())),
            steps=tuned.steps,
            seconds=round(tuned.seconds, 2),
            peak_memory_bytes=tuned.peak_memory_bytes,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            fresh=tuned.fresh,
            data=identity,
            metrics=self.metrics.source,
        )

    def _keep(self, run: Any, result: Result) -> None:
        """Write a result, which makes its finetuning a finished one, and the report so far."""
        from linearize.files import write_file

        text = json.dumps(dataclasses.asdict(result), indent=1, allow_nan=False) + "\n"
        write_file(self._result_path(run.key), text.encode())
        self.results[run.key] = result
        shutil.rmtree(self.path / "checkpoints" / run.key, ignore_errors=True)
        self._report()
        figures = ", ".join(f"{shown_score(name)} {100 * value:.2f}" for name, value in result.scores.items())
        self._say(
            f"{TASKS[run.task].name}, {run.model}, learning rate {run.learning_rate:g}, seed {run.seed}: {figures} "
            f"({result.steps:,} steps, {result.seconds:.0f} s)"
        )

    def _save(self, run: Any, model: Any, tokenizer: Any, result: Result) -> None:
        """The finetuned model as a repository."""
        from linearize.config.record import make_record, published_settings, read_record
        from linearize.evaluation.arms import is_student
        from linearize.files import atomic_directory
        from linearize.hub.repository import save_final

        target = self.path / "models" / run.key
        if not is_student(model):
            with atomic_directory(target) as partial:
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
            return
        earlier = read_record(run.source, revision=run.revision)
        places = result.steps * self.settings.training.batch_size * self.settings.data.sequence_length
        record = make_record(run.source, earlier=earlier, tokens={f"finetuning on {TASKS[run.task].name}": places})
        glue = {"task": run.task, "seed": run.seed, "learning_rate": run.learning_rate, "scores": result.scores}
        glue["training"] = published_settings(to_values(self.settings.training))
        save_final(model, tokenizer, target, {**record, "glue": glue})

    def _announce(self, runs: int, waiting: int) -> None:
        """What is not run again, and what that leaves out."""
        if runs > waiting:
            self._say(f"{runs - waiting} of {runs} finetunings are finished and not run again")
        others = len(set(self.results) - set(self.keys))
        if others:
            self._say(f"The report also has {others} finetunings of {self.path} that are not asked for now")
        kept = self.path / "models"
        lost = [key for key in self.keys if key in self.results and not (kept / key).is_dir()]
        if self.settings.save_models and lost:
            self._say(
                f"save_models keeps what trains now, and {len(lost)} finished finetunings left no model: to have "
                f"these too, delete their files in {self.path / 'results'}, first {lost[0]}.json"
            )

    def _say(self, text: str) -> None:
        if self.state.is_main_process:
            print(text, flush=True)
