"""What makes a repository a sentence-transformers model: small files beside the encoder, carried over as they are.

`modules.json` lists the modules in order (transformer, pooling, normalisation, dense layers), each but the first with
a folder of its own; `sentence_bert_config.json` has the longest text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

from linearize.errors import UserError

logger = logging.getLogger(__name__)

MODULES = "modules.json"
BESIDE = ("sentence_bert_config.json", "config_sentence_transformers.json")
OF_A_MODULE = ("config.json", "model.safetensors")
PICKLED = "pytorch_model.bin"

Reader = Callable[[str], bytes | None]


def sentence_transformer_files(
    source: str, *, revision: str | None = None, token: str | None = None
) -> dict[str, bytes]:
    """The files of a teacher that its student takes over: path -> contents; none where it has no `modules.json`.

    Args:
        source: Hub id or local directory.
        revision, token: of the Hub repository.

    Raises:
        UserError: `modules.json` is damaged, or a module's weights are pickled.
    """
    if Path(source).exists():
        read: Reader = partial(_read_local, Path(source))
    else:
        read = partial(_read_hub, source, revision, token)
    modules = read(MODULES)
    if modules is None:
        return {}
    names = [*BESIDE]
    for folder in _folders(source, modules):
        names += [f"{folder}/{name}" for name in OF_A_MODULE]
        if read(f"{folder}/{OF_A_MODULE[1]}") is None and read(f"{folder}/{PICKLED}") is not None:
            raise UserError(
                f"{source}/{folder} keeps its weights in {PICKLED}, a pickle, which no converted repository holds: "
                "save the model again with a present sentence-transformers, which writes safetensors."
            )
    found = {name: content for name in names if (content := read(name)) is not None}
    return {MODULES: modules, **found}


def _folders(source: str, modules: bytes) -> list[str]:
    try:
        paths = [str(module["path"]) for module in json.loads(modules)]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{source}/{MODULES} is damaged: restore it, or delete it to go on without it.") from error
    for path in paths:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise UserError(f"{source}/{MODULES} names the folder {path}, which lies outside the repository.")
    return [path for path in paths if path]


def _read_local(folder: Path, name: str) -> bytes | None:
    path = folder / name
    return path.read_bytes() if path.is_file() else None


def _read_hub(source: str, revision: str | None, token: str | None, name: str) -> bytes | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(source, name, revision=revision, token=token)).read_bytes()
    except EntryNotFoundError:  # not there, or (its subclass) neither cached nor to be reached
        return None
