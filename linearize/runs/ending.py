"""The end of a run: the repository, the figures, the plots, the push; the main process, while the others wait."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.config.yaml_io import write_config
from linearize.failures import stage
from linearize.files import write_file
from linearize.runs.directory import ENDED, REPORT, TABLES, YARDSTICK
from linearize.runs.records import record_of

if TYPE_CHECKING:
    from linearize.runs.engine import RunOfStages


def save(run: RunOfStages, model: Any, place: Path, files: Mapping[str, bytes] | None = None) -> None:
    """Leave the repository of a model, converted with its record and card, or stock."""
    from linearize.evaluation.arms import is_student
    from linearize.hub.repository import save_final, save_stock
    from linearize.hub.sentence_files import sentence_transformer_files

    if not is_student(model):
        save_stock(model, run.tokenizer, place)
        return
    more, source = dict(files or {}), run.config.model_name_or_path
    if run.plan.start.encoder and source is not None:
        more |= sentence_transformer_files(source, revision=run.config.revision)
    save_final(model, run.tokenizer, place, run.record or record_of(run), more)


def keep(run: RunOfStages, model: Any) -> Any:
    """Save the model after the last stage, and give it in full weights."""
    run.record = run.record or record_of(run)
    base = run.repository or run.config.model_name_or_path or ""
    last = run.plan.stages[-1].name if run.plan.stages else None
    outcome = run.result.stages.get(last) if last else None
    with stage("saving the model"):
        model = run.models.whole(model, base)
        if run.repository != run.directory.final:  # else a run goes on at its evaluation
            save(run, model, run.directory.final, outcome.files if outcome else None)
            write_config(run.directory.config, run.directory.path / ENDED)
    for done in run.result.stages.values():
        done.model = None
    return model


def finish(run: RunOfStages, model: Any, measures: Any) -> None:
    """Measure, report and push.

    Args:
        model: As `keep` gives it.
    """
    if measures is not None:
        _evaluate(run, model, measures)
    with stage("saving the report"):
        write_report(run, measures)
    run.result.record = run.record or {}
    run.push()
    run.say(f"Saved {run.directory.final}")
    lengths = getattr(measures.report, "by_length", None) if measures is not None else None
    if lengths is not None:
        lengths.warn()


def _evaluate(run: RunOfStages, model: Any, measures: Any) -> None:
    """Measure the saved model, and add the figures to its record and card."""
    from linearize.evaluation.arms import is_student
    from linearize.hub.repository import write_record
    from linearize.runs.report import run_tasks_of

    settings, directory = run.config.evaluation, run.directory
    assert settings is not None and run.record is not None
    lower = (
        f"lower evaluation.batch_size (now {settings.batch_size}) or evaluation.length_tokens; the model is saved in "
        f"{directory.final}"
    )
    with stage("evaluation", lower):
        model = run.models.measured(model)
        report = run.result.report = measures.finish(model)
        report.show()
        part = "embeddings" if run.plan.start.encoder else "evaluation"
        run.record[part] = report.to_dict()
        if hasattr(report, "draw"):
            report.draw(directory.path / "plots")
        if is_student(model):
            write_record(directory.final, run.record, model.config)
        if settings.tasks:
            run.result.tasks = run_tasks_of(settings, model, run.tokenizer, directory.path)
            run.record["tasks"] = run.result.tasks.to_dict()
            write_record(directory.final, run.record, model.config)


def write_report(run: RunOfStages, measures: Any) -> None:
    """`report.json` and `report.md`: what the run was, what its stages did and what was measured, with plots."""
    from linearize.config.record import library_versions
    from linearize.runs.curves import plot_curves
    from linearize.runs.page import page

    path = run.directory.path
    done = run.figures
    order = [YARDSTICK, *(current.name for current in run.plan.stages)]
    content: dict[str, Any] = {
        "stages": {name: done[name] for name in order if name in done},
        "versions": library_versions(),
    }
    if measures is not None:
        name = "embeddings" if run.plan.start.encoder else "evaluation"
        content[name] = measures.report.to_dict()
    plot_curves(content["stages"], path, hidden=run.plan.start.encoder)
    figures = "" if measures is None else measures.report.markdown()
    write_file(path / TABLES, page(run.plan, content["stages"], figures, path).encode())
    # Last: where it is, the run has ended.
    write_file(path / REPORT, (json.dumps(content, indent=1) + "\n").encode())
