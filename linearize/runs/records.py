"""The record of a model between the stages of a run, and what it says of the run's settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linearize.config.record import loaded_commit, make_record, stages_of
from linearize.config.selection import OF_THE_CONVERSION
from linearize.config.yaml_io import to_values

if TYPE_CHECKING:
    from linearize.runs.engine import RunOfStages
    from linearize.stages.kinds.base import Outcome, Stage


def record_of(run: RunOfStages, current: Stage | None = None, outcome: Outcome | None = None) -> dict[str, Any]:
    """The record of a run's model.

    Args:
        run: So far.
        current: The stage that it comes from; None: no stage.
        outcome: What the stage left.
    """
    source, more = run.config.model_name_or_path, dict(outcome.record) if outcome else {}
    by_stage: dict[str, Any] = {}
    if current is not None and outcome is not None:
        name = current.name
        by_stage["trained"] = {name: current.what}
        if outcome.steps:
            by_stage |= {
                "tokens": {name: outcome.tokens},
                "seconds": {name: outcome.seconds},
                "peak_memory_bytes": {name: outcome.peak_memory_bytes},
            }
    record = make_record(
        source,
        earlier=run.record,
        revision=None if source is None else loaded_commit(source, run.config.revision),
        recipe=recipe(run),
        selection=run.models.selection.summary() if run.models.selection else None,
        calibration=more.pop("calibration", None),
        **by_stage,
    )
    return record | more


def recipe(run: RunOfStages) -> dict[str, Any]:
    """The settings of a run; of a model converted before, its attention and the stages that it went through."""
    settings, earlier = to_values(run.asked), (run.record or {}).get("recipe") or {}
    if run.plan.start.converted:
        for name in OF_THE_CONVERSION:
            settings[name] = earlier.get(name)
        settings["stages"] = {**stages_of(earlier), **settings["stages"]}
        if "imported" in earlier:
            settings["imported"] = earlier["imported"]
    return settings
