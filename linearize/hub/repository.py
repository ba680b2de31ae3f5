"""A converted repository on disk and on the Hub.

A repository is complete by itself: weights in safetensors, the flat model code with `auto_map`, tokenizer, generation
config, a model card and `linearize.json`, the record of how it was made. Loading it with its Auto class, such as
`AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True)`, needs nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.config.record import CARD_FILE, FILES, RECORD_FILE, find_converted, read_record
from linearize.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_SHARD_SIZE = "5GB"


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
    from linearize.files import write_file
    from linearize.hub.card import model_card

    folder = Path(directory)
    record_text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    for file, text in ((RECORD_FILE, record_text), (CARD_FILE, model_card(name or folder.name, record, config))):
        write_file(folder / file, text.encode("utf-8"))
    if record.get("selection"):
        from linearize.config.selection import PLOT
        from linearize.evaluation.placement import plot_placement

        plot_placement(record["selection"], folder / PLOT)


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
    from linearize.files import atomic_directory

    with atomic_directory(directory) as partial:
        model.save_pretrained(partial, max_shard_size=MAX_SHARD_SIZE)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for name, content in (files or {}).items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        write_record(partial, record, model.config, name=Path(directory).name)
    return Path(directory)


def save_stock(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, directory: str | os.PathLike[str]
) -> None:
    """Write a model that is not converted, with its tokenizer; a directory that exists is replaced as a whole."""
    from linearize.files import atomic_directory

    with atomic_directory(Path(directory)) as target:
        model.save_pretrained(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)


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

    from linearize.hub.push_files import card_for, stale_files

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
