"""A converted repository on disk and on the Hub.

A repository is complete by itself: weights in safetensors, the flat model code with `auto_map`, tokenizer, generation
config, a model card and `linearize.json`, the record of how it was made. Loading it with its Auto class, such as
`AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True)`, needs nothing else.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import UserError
from linearize.paths import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECORD_FILE = "linearize.json"
CARD_FILE = "README.md"
FINAL = "final"
"""The repository in a run directory."""
OF_THE_MECHANISM = ("transfer", "scalers")
"""Stages that train nothing else."""
FILES = "files"
"""Part of a pushed record: the files that the push left, which the next one may delete."""
MAX_SHARD_SIZE = "5GB"
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
        seconds: Seconds by stage.
        peak_memory_bytes: Peak accelerator memory by stage, bytes.
        evaluation: `evaluation.Report.to_dict()`.
        tasks: `evaluation.TaskReport.to_dict()`.
        embeddings: `evaluation.embeddings.EmbeddingReport.to_dict()`, of an encoder.
        calibration: `calibration.CalibrationReport.summary()`.
        selection: `stages.select.Selection.summary()`.
    """
    before = {name: value for name, value in (earlier or {}).items() if name not in OF_THESE_WEIGHTS}
    if before:
        start = {}
    else:
        name = None if teacher is None else os.fspath(teacher)
        start = {
            "teacher": published_name(name),
            "teacher_revision": revision,
            "teacher_on_hub": name is not None and not os.path.exists(name),
        }
        if earlier is not None:
            start["unrecorded"] = True
    measured = {"embeddings": embeddings, "calibration": calibration, "selection": selection}
    return {
        **before,
        **start,
        "recipe": published_settings(recipe) if recipe is not None else before.get("recipe") or {},
        "tokens": _by_stage(before.get("tokens"), tokens, sum),
        "seconds": _by_stage(before.get("seconds"), seconds, lambda values: round(sum(values), 1)),
        "peak_memory_bytes": _by_stage(before.get("peak_memory_bytes"), peak_memory_bytes, _largest),
        "evaluation": dict(evaluation) if evaluation else None,
        "tasks": dict(tasks) if tasks else None,
        **{part: dict(values) for part, values in measured.items() if values},
        "versions": library_versions(),
    }


def _by_stage(
    before: Mapping[str, Any] | None, now: Mapping[str, Any] | None, joined: Callable[[list[Any]], Any]
) -> dict[str, Any]:
    """Figures of the stages of all runs that made a model, those of one name `joined`."""
    parts = [before or {}, now or {}]
    return {stage: joined([part[stage] for part in parts if stage in part]) for stage in {**parts[0], **parts[1]}}


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


def write_record(
    directory: str | os.PathLike[str], record: Mapping[str, Any], config: Any, *, name: str | None = None
) -> None:
    """Write the record of a saved model, the card that shows it, and the plot of its selection if there was one.

    Args:
        directory: Of the repository.
        record: See `make_record`.
        config: The model's.
        name: What the card's quick start loads; default: the directory's name.
    """
    from linearize.checkpointing import write_file
    from linearize.model_card import model_card

    folder = Path(directory)
    record_text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    for file, text in ((RECORD_FILE, record_text), (CARD_FILE, model_card(name or folder.name, record, config))):
        write_file(folder / file, text.encode("utf-8"))
    if record.get("selection"):
        from linearize.config.selection import PLOT
        from linearize.evaluation.placement import plot_placement

        plot_placement(record["selection"], folder / PLOT)


def base_is_teacher(record: Mapping[str, Any]) -> bool:
    """Whether the weights beside the mechanism's are the teacher's: the record says where they come from, and nothing
    but the mechanism has trained since."""
    if not record or record.get("unrecorded") or (record.get("recipe") or {}).get("imported"):
        return False
    return not any(count for stage, count in (record.get("tokens") or {}).items() if stage not in OF_THE_MECHANISM)


def save_final(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: str | os.PathLike[str],
    record: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a complete converted repository; a directory that exists is replaced as a whole, and only at the end.

    Args:
        model: The converted model, adapters merged, weights not quantised.
        tokenizer: Its tokenizer, chat template included.
        directory: Where to.
        record: See `make_record`.
        files: More files, path -> contents, such as a sentence-transformers teacher's.

    Raises:
        UserError: The disk is full or the directory cannot be written; what was there is untouched.
    """
    from linearize.checkpointing import atomic_directory

    with atomic_directory(directory) as partial:
        model.save_pretrained(partial, max_shard_size=MAX_SHARD_SIZE)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for name, content in (files or {}).items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        write_record(partial, record, model.config, name=Path(directory).name)
    return Path(directory)


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


@contextlib.contextmanager
def readable_hub_errors(repository: str, action: str) -> Iterator[None]:
    """Turn the Hub's failures into one sentence.

    Args:
        repository: Hub id, for the sentence.
        action: What was tried, as in `cannot ACTION me/model`.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"{repository!r} is not a repository name: write NAME or OWNER/NAME.") from error
    except errors.LocalTokenNotFoundError as error:
        raise UserError(
            f"Cannot {action} {repository} without a token: run `hf auth login` or set HF_TOKEN."
        ) from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"Cannot {action} {repository}: the repository is gated; ask for access on its page and log in with "
            "`hf auth login`."
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise UserError(
            f"Cannot {action} {repository}: HF_HUB_OFFLINE is set; unset it to use the network."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HfHubHTTPError) as error:
        raise UserError(f"Cannot {action} {repository}: {_status_sentence(error)}") from error
    except Exception as error:
        if not _is_connection_error(error):
            raise
        raise UserError(
            f"Cannot {action} {repository}: no connection to the Hub ({_cause(error)}); check the network."
        ) from error


def _is_connection_error(error: BaseException) -> bool:
    """Whether the network failed; by name, because huggingface_hub speaks through httpx in 1.x and httpx2 in 2.x."""
    names = [kind.__name__ for kind in type(error).__mro__]
    return isinstance(error, (ConnectionError, TimeoutError)) or "TransportError" in names


def _status_sentence(error: Any) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the Hub refuses the token; check the name and run `hf auth login`, or set HF_TOKEN to a valid token."
    if status == 403:
        return "the token may not write there; use a token with write access to this owner."
    if status == 404:
        return "there is no such repository, or the token may not see it; check the name and the token."
    return f"the Hub answers {status or 'nothing'} ({_cause(error)}); try again later."


def _cause(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def check_token(repo_id: str, token: str | None = None) -> str:
    """The name of the account that a push to the repository would use.

    Raises:
        UserError: There is no token, the Hub refuses it, or there is no network.
    """
    from huggingface_hub import HfApi, get_token

    if (token or get_token()) is None:
        raise UserError(f"Cannot push to {repo_id} without a token: run `hf auth login` or set HF_TOKEN.")
    with readable_hub_errors(repo_id, "push to"):
        return str(HfApi(token=token).whoami()["name"])


def push(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a converted repository.

    Args:
        directory: What `save_final` wrote.
        repo_id: NAME or OWNER/NAME; made if it does not exist.
        private: Visibility of a repository that is made; None leaves it to the owner's default.
        token: Access token; None takes the one of `hf auth login` or HF_TOKEN.
        message: Commit message.

    Returns:
        The address of the repository.

    Raises:
        UserError: The directory holds no converted model, there is no token or a wrong one, no such owner, or no
            network.
    """
    from huggingface_hub import HfApi

    path = find_converted(directory)
    check_token(repo_id, token)
    api = HfApi(token=token)
    with readable_hub_errors(repo_id, "push to"):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        present = api.list_repo_files(url.repo_id)
        earlier = read_record(url.repo_id, token=token) if RECORD_FILE in present else {}
        api.create_commit(
            url.repo_id,
            _operations(path, url.repo_id, present, earlier),
            commit_message=message or "Upload a model converted with linearize",
        )
    return str(url)


def _operations(
    directory: Path, repo_id: str, present: list[str], earlier: Mapping[str, Any] | None = None
) -> list[Any]:
    """One commit after which a repository loads as this model, and keeps what is not of it.

    Args:
        directory: Of the model.
        repo_id: The repository's whole name.
        present: Its files.
        earlier: The record that it holds.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    from linearize.push_files import card_for, stale_files

    found = {file.relative_to(directory).as_posix(): file for file in directory.rglob("*") if file.is_file()}
    files: dict[str, Any] = {name: file for name, file in found.items() if not name.startswith(".")}
    record = {**(read_record(directory) or {"unrecorded": True}), FILES: sorted({*files, RECORD_FILE, CARD_FILE})}
    files[RECORD_FILE] = (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    files[CARD_FILE] = card_for(directory, repo_id).encode("utf-8")
    stale = stale_files(present, files, (earlier or {}).get(FILES, ()))
    operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in stale]
    return operations + [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in sorted(files.items())
    ]
