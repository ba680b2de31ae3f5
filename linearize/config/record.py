"""`linearize.json`, the record of how a converted model was made: what is in it, and how it is read.

The card that shows it is `linearize/hub/card.py`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from linearize.errors import UserError
from linearize.paths import user_path

RECORD_FILE = "linearize.json"
CARD_FILE = "README.md"
FINAL = "final"
"""The repository in a run directory."""
OF_THE_MECHANISM = ("transfer", "scalers", "mechanism", "nothing")
"""Stages of old records that train nothing else, and what a stage trains that leaves the other weights alone."""
FILES = "files"
"""Part of a pushed record: the files that the push left, which the next one may delete."""
EXTENT = ("nothing", "mechanism", "lora", "all")
"""What a stage trains, from the least on."""
BEFORE_STAGES = ("transfer", "finetune", "training", "linear", "adaptation", "refinement", "nonlinear", "mlm")
"""Settings of stages in the recipe of old records, which had no section `stages`."""
OF_THESE_WEIGHTS = ("evaluation", "tasks", "embeddings", "validation", "glue", FILES)
"""Parts of a record that say nothing of other weights: what was measured on its own, and where they went."""
VERSIONED = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "huggingface_hub")
PRIVATE_SETTINGS = ("output_dir", "overwrite", "resume_from_checkpoint", "push_to_hub", "cache_dir", "include_path")
"""Settings that say where a run lived and not what it was: they stay out of a repository that may be published."""


def library_versions() -> dict[str, str]:
    """Versions of the libraries that shaped the result, those that are installed."""
    import linearize

    versions = {"linearize": linearize.__version__}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def published_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the places of one machine: private fields dropped, local paths cut to their last name."""
    published: dict[str, Any] = {}
    for name, value in values.items():
        if name in PRIVATE_SETTINGS:
            continue
        if isinstance(value, Mapping):
            published[name] = published_settings(value)
        elif isinstance(value, list):
            published[name] = [published_name(item) for item in value]
        else:
            published[name] = published_name(value)
    return published


def published_name(value: Any) -> Any:
    """A local path's last component; everything else as it is."""
    if (
        isinstance(value, str)
        and value
        and (os.path.isabs(value) or value.startswith((".", "~")) or os.path.exists(value))
    ):
        return os.path.basename(os.path.abspath(value))
    return value


def loaded_commit(source: str | os.PathLike[str], revision: str | None = None) -> str | None:
    """Commit of the Hub repository that a load has just put in the cache; None for a local path."""
    from huggingface_hub import try_to_load_from_cache

    name = os.fspath(source)
    if os.path.exists(name):
        return None
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else None


def make_record(
    teacher: str | os.PathLike[str] | None,
    *,
    earlier: Mapping[str, Any] | None = None,
    revision: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    tokens: Mapping[str, int] | None = None,
    trained: Mapping[str, str] | None = None,
    seconds: Mapping[str, float] | None = None,
    peak_memory_bytes: Mapping[str, int | None] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    tasks: Mapping[str, Any] | None = None,
    embeddings: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    selection: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The contents of `linearize.json`.

    Args:
        teacher: Hub id or path of the teacher; of a path only the last name is kept. None: there was none, the
            model was trained from random weights.
        earlier: Record of the converted model that this one goes on from (`read_record`; empty where it has none):
            teacher, recipe, calibration and selection are its own unless given, tokens, seconds and peaks go on from
            it, and what was measured on its weights is left out. None: the model was converted from the teacher.
        revision: Commit of the teacher's repository, where there is one.
        recipe: The settings of the run.
        tokens: Training tokens by stage.
        trained: What each stage trained: nothing, mechanism, lora or all.
        seconds: Seconds by stage.
        peak_memory_bytes: Peak accelerator memory by stage, bytes.
        evaluation: `evaluation.Report.to_dict()`.
        tasks: `evaluation.TaskReport.to_dict()`.
        embeddings: `evaluation.embeddings.EmbeddingReport.to_dict()`, of an encoder.
        calibration: `stages.calibration_report.CalibrationReport.summary()`.
        selection: `stages.select.Selection.summary()`.
    """
    before = {name: value for name, value in (earlier or {}).items() if name not in OF_THESE_WEIGHTS}
    start = {} if before else _origin(teacher, revision, unrecorded=earlier is not None)
    measured = {"embeddings": embeddings, "calibration": calibration, "selection": selection}
    return {
        **before,
        **start,
        "recipe": published_settings(recipe) if recipe is not None else before.get("recipe") or {},
        "tokens": _by_stage(before.get("tokens"), tokens, sum),
        "trained": _by_stage(before.get("trained"), trained, lambda kinds: max(kinds, key=EXTENT.index)),
        "seconds": _by_stage(before.get("seconds"), seconds, lambda values: round(sum(values), 1)),
        "peak_memory_bytes": _by_stage(before.get("peak_memory_bytes"), peak_memory_bytes, _largest),
        "evaluation": dict(evaluation) if evaluation else None,
        "tasks": dict(tasks) if tasks else None,
        **{part: dict(values) for part, values in measured.items() if values},
        "versions": library_versions(),
    }


def _origin(teacher: str | os.PathLike[str] | None, revision: str | None, *, unrecorded: bool) -> dict[str, Any]:
    """What a model was made from; `unrecorded`: it goes on from a model of which nothing says that."""
    name = None if teacher is None else os.fspath(teacher)
    origin = {
        "teacher": published_name(name),
        "teacher_revision": revision,
        "teacher_on_hub": name is not None and not os.path.exists(name),
    }
    return {**origin, "unrecorded": True} if unrecorded else origin


def _by_stage(
    before: Mapping[str, Any] | None, now: Mapping[str, Any] | None, joined: Callable[[list[Any]], Any]
) -> dict[str, Any]:
    """Figures of the stages of all runs that made a model, those of one name `joined`."""
    parts = [before or {}, now or {}]
    return {stage: joined([part[stage] for part in parts if stage in part]) for stage in {**parts[0], **parts[1]}}


def stages_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of each stage that a recipe has, of an old record's too."""
    if recipe.get("stages") is not None:
        return dict(recipe["stages"])
    return {name: recipe[name] for name in BEFORE_STAGES if isinstance(recipe.get(name), Mapping)}


def _largest(values: list[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def read_record(
    source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> dict[str, Any]:
    """`linearize.json` of any source: a converted repository's directory, a run's, or a Hub id.

    Args:
        source: Where the model was or will be loaded from; a `Path` is always local.
        revision, token: Of the Hub repository.

    Returns:
        An empty record where the source has none.

    Raises:
        UserError: The file is damaged, or whether there is one cannot be found out.
    """
    if isinstance(source, Path) or os.path.exists(source):
        places = [Path(source) / RECORD_FILE, Path(source) / FINAL / RECORD_FILE]
        path = next((place for place in places if place.is_file()), None)
    else:
        path = _fetched_record(os.fspath(source), revision, token)
    if path is None:
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is damaged ({error}): restore it, or delete it to go on without the record."
        ) from error
    return record if isinstance(record, dict) else {}


def _fetched_record(source: str, revision: str | None, token: str | None) -> Path | None:
    """Where the record of a Hub repository lies in the cache."""
    from transformers.utils import cached_file

    from linearize.load_errors import explained

    with explained(source, what="record"):
        found = cached_file(
            source, RECORD_FILE, revision=revision, token=token, _raise_exceptions_for_missing_entries=False
        )
    return None if found is None else Path(found)


def base_is_teacher(record: Mapping[str, Any]) -> bool:
    """Whether the weights beside the mechanism's are the teacher's: the record says where they come from, and nothing
    but the mechanism has trained since."""
    if not record or record.get("unrecorded") or (record.get("recipe") or {}).get("imported"):
        return False
    trained = record.get("trained") or {}
    counts = (record.get("tokens") or {}).items()
    return not any(count for stage, count in counts if trained.get(stage, stage) not in OF_THE_MECHANISM)


def find_converted(directory: str | os.PathLike[str]) -> Path:
    """The path of a local converted repository, or of the one in a run directory.

    Raises:
        UserError: The directory is missing or holds no converted model.
    """
    path = Path(user_path(directory))
    if not path.is_dir():
        raise UserError(f"There is no directory {path}: give the directory of a converted model, e.g. out/final.")
    if not (path / "config.json").is_file() and (path / FINAL).is_dir():
        path = path / FINAL
    if not is_converted(path):
        raise UserError(f"{path} holds no converted model: make one with `linearize convert MODEL OUT`.")
    return path


def is_converted(path: str | os.PathLike[str]) -> bool:
    """Whether a local path is the directory of a converted model."""
    config = Path(path) / "config.json"
    if not config.is_file():
        return False
    try:
        return "mixer_types" in json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config} is not valid JSON ({error}): save the model again.") from error
