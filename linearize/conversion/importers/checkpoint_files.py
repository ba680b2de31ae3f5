"""Weights of a published checkpoint, in safetensors or as PyTorch's pickles, mapped from the disk and not read into
memory.

Of a pickle nothing but tensors and plain values is loaded (`weights_only=True`); none of its code runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from linearize.config.record import loaded_commit, published_name
from linearize.conversion.sources import Origin, Source
from linearize.conversion.tensor_files import CHUNK_BYTES, INDEX, SAFETENSORS, is_plain_path, some, weight_file_names
from linearize.errors import UserError
from linearize.load_errors import explained

BIN = "pytorch_model.bin"
BIN_INDEX = f"{BIN}.index.json"
SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
"""What is fetched first: the settings, the tokenizer, and the index that names the weights."""
SMALL_PARTS = (
    "config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
"""What makes a local checkpoint the one it is, beside its weights."""
WHOLE_BYTES = 2 << 30
SAMPLE_BYTES, SAMPLE_EVERY = 1 << 12, 1 << 20


def find_checkpoint(name: str | os.PathLike[str], revision: str | None = None) -> Source:
    """The local directory of a checkpoint; of one on the Hub, settings, tokenizer and one set of weights are fetched.

    Args:
        name: A directory or a Hub id.
        revision: Of the Hub repository.

    Raises:
        UserError: There is no such checkpoint, or it cannot be fetched.
    """
    source = os.fspath(name)
    if Path(source).is_dir():
        return Source(source, Path(source), Origin(published_name(source), on_hub=False, revision=None))
    with explained(source):
        path = _fetch(source, revision)
    return Source(source, path, Origin(source, on_hub=True, revision=path.name))


def _fetch(name: str, revision: str | None) -> Path:
    """Repositories often hold their weights twice: safetensors come before pickles, as transformers chooses."""
    from huggingface_hub import snapshot_download

    def fetch(files: list[str], commit: str | None) -> Path:
        return Path(snapshot_download(name, revision=commit, allow_patterns=files, dry_run=False))

    path = fetch(SMALL_FILES, revision)
    if not (path / f"model{INDEX}").is_file():
        fetch([f"model{SAFETENSORS}"], path.name)
        if not (path / f"model{SAFETENSORS}").is_file() and not (path / BIN_INDEX).is_file():
            return fetch([BIN], path.name)
    return fetch(weight_names(path, name), path.name)


def weight_names(directory: Path, source: str) -> list[str]:
    """Names of the files that hold the weights.

    Args:
        directory: Of the checkpoint.
        source: What the user called it, for the sentences.

    Raises:
        UserError: There are none, or their index cannot be read.
    """
    if (directory / f"model{SAFETENSORS}").is_file() or (directory / f"model{INDEX}").is_file():
        return weight_file_names(directory, source)
    if (directory / BIN).is_file():
        return [BIN]
    index = directory / BIN_INDEX
    if not index.is_file():
        raise UserError(f"{source} has no model{SAFETENSORS} and no {BIN}, in one file or in shards: complete it")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of weight files: restore it") from error
    if strange := [name for name in names if not is_plain_path(name) or not name.endswith(".bin")]:
        raise UserError(f"{index} names {strange[0]!r}, which is no .bin file: restore the index")
    return names


def checkpoint_digest(source: str, revision: str | None = None) -> str:
    """What tells a checkpoint from another of the same name.

    Args:
        source: A directory, a GGUF file, or a Hub id whose config was loaded before.
        revision: Of the Hub repository.

    Returns:
        Of a directory a hash of its settings, tokenizer and weights, names and contents, where files of more than
            `WHOLE_BYTES` together count by their sizes and `SAMPLE_BYTES` of every `SAMPLE_EVERY`; of a repository on
            the Hub its commit.

    Raises:
        UserError: There are no weights, or a file cannot be read.
    """
    path = Path(source)
    if path.is_file():
        path, names = path.parent, [path.name]
    elif path.is_dir():
        names = [name for name in SMALL_PARTS if (path / name).is_file()] + weight_names(path, source)
    else:
        return f"commit {loaded_commit(source, revision)}"
    digest = hashlib.sha256()
    sampled = sum((path / name).stat().st_size for name in names if (path / name).is_file()) > WHOLE_BYTES
    for name in names:
        try:
            with open(path / name, "rb") as stream:
                size = (path / name).stat().st_size
                digest.update(f"{name} {size}\n".encode())
                for chunk in _samples(stream, size) if sampled else iter(partial(stream.read, CHUNK_BYTES), b""):
                    digest.update(chunk)
        except OSError as error:
            raise UserError(f"{path / name} cannot be read ({error.strerror}): complete the checkpoint.") from error
    return f"sha256 {digest.hexdigest()[:32]}"


def _samples(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """Parts of a file that would take minutes to read; every matrix of a large model has some."""
    for start in range(0, size, SAMPLE_EVERY):
        stream.seek(start)
        yield stream.read(SAMPLE_BYTES)


def map_weights(source: Source) -> dict[str, Tensor]:
    """All tensors by name. They lie in the page cache of the system, which gives them up when memory is short; only
    pickles of PyTorch before 1.6 are read into memory.

    Raises:
        UserError: A file is missing, damaged, or holds more than tensors.
    """
    names = weight_names(source.path, source.name)
    if missing := [name for name in names if not (source.path / name).is_file()]:
        raise UserError(f"{source.name} lacks {some(missing)}, which its index names: complete the checkpoint")
    weights: dict[str, Tensor] = {}
    for name in names:
        with explained(source.name):
            found = (_map_safetensors if name.endswith(SAFETENSORS) else _map_pickle)(source.path / name)
        if twice := weights.keys() & found.keys():
            raise UserError(f"{source.name} holds {min(twice)} in two files: save the model again")
        weights |= found
    return weights


def _map_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _map_pickle(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # pickle and zip errors of many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} cannot be read as a file of tensors ({reason}): download it again") from error
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"{path} holds other things than tensors by name: give what save_pretrained wrote")
    return dict(found)


def published_config(source: Source, kinds: Collection[str], supported: str) -> dict[str, Any]:
    """`config.json` of a published checkpoint.

    Args:
        kinds: values of `model_type` that can be imported. supported: what can be, in words.

    Raises:
        UserError: there is none, it cannot be read, or it is of another kind or of quantised weights.
    """
    path = source.path / "config.json"
    if not path.is_file():
        raise UserError(f"{source.name} holds no config.json: {supported}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"the config.json of {source.name} is not valid JSON ({error}): restore it") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in kinds:
        raise UserError(f"{source.name} is a {kind} model: {supported}, model_type {' or '.join(kinds)}")
    if config.get("quantization_config"):
        raise UserError(f"{source.name} holds quantised weights: import the checkpoint that they were made from")
    return config
