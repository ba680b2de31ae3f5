"""The tokenizer of a published landmark checkpoint, with its landmark taken out."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from linearize.conversion.sources import Source
from linearize.conversion.students import load_tokenizer
from linearize.errors import UserError

LANDMARK = "<landmark>"
FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.jinja")
FROM_BASE = "give one with --tokenizer, that of the base model for example"


def published_tokenizer(source: Source, name: str | None, mem_id: int, declared: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer and take the landmark token out; every other token keeps its id.

    Args:
        source: The checkpoint.
        name: Directory or Hub id of another tokenizer to take; it may have no landmark.
        mem_id: The landmark's id.
        declared: Whether the checkpoint's config or the user says that there is a landmark.

    Raises:
        UserError: There is no tokenizer, or the id is not the landmark's, or ids would have to move.
    """
    tokenizer = load_tokenizer(name) if name is not None else _own_tokenizer(source)
    ids: dict[str, int] = tokenizer.get_vocab()
    where = name or source.name
    if (own := ids.get(LANDMARK)) is not None and own != mem_id:
        raise UserError(f"{LANDMARK} is {own} in the tokenizer of {where} and not {mem_id}: give --mem_id {own}")
    if own is None:
        if not declared:
            raise UserError(
                f"nothing in {source.name} says that it has a landmark (mem_id in config.json, {LANDMARK} in the "
                "tokenizer): give its id with --mem_id"
            )
        if taken := [word for word, number in ids.items() if number == mem_id]:
            raise UserError(f"{mem_id} is {taken[0]!r} in the tokenizer of {where}, no landmark: give --mem_id")
    if behind := sorted((number, word) for word, number in ids.items() if number > mem_id):
        raise UserError(
            f"{LANDMARK} ({mem_id}) is not the last token, {behind[0][1]!r} ({behind[0][0]}) is behind it and would "
            "have to change its id: only a landmark behind all other tokens is supported"
        )
    return tokenizer if own is None else _without_landmark(tokenizer, where)


def _own_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Loaded from a copy of its files: the checkpoint's own config names a model type that transformers has not."""
    with tempfile.TemporaryDirectory() as folder:
        for pattern in FILES:
            for file in source.path.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, Path(folder, file.name))
        Path(folder, "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
        try:
            return load_tokenizer(folder)
        except UserError as error:
            raise UserError(f"{source.name} has no tokenizer that can be read: {FROM_BASE}") from error


def _without_landmark(tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
    """transformers has no way to take a token out of a tokenizer, so it is done in what it saves."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in Path(folder).glob("*.json"):
            contents = json.loads(file.read_text(encoding="utf-8"))
            if file.name == "tokenizer.json":
                contents["added_tokens"] = _pruned(contents["added_tokens"])
            else:
                contents = _pruned(contents)
            file.write_text(json.dumps(contents, ensure_ascii=False, indent=2), encoding="utf-8")
        pruned = load_tokenizer(folder)
    if LANDMARK in pruned.get_vocab():
        raise UserError(f"{LANDMARK} was not added to the tokenizer of {where} but is part of its model: {FROM_BASE}")
    return pruned


def _pruned(value: Any) -> Any:
    """JSON without the landmark: as an element, as an entry's name or value, and as what an entry describes."""
    if isinstance(value, dict):
        return {name: _pruned(item) for name, item in value.items() if name != LANDMARK and not _is_landmark(item)}
    if isinstance(value, list):
        return [_pruned(item) for item in value if not _is_landmark(item)]
    return value


def _is_landmark(value: Any) -> bool:
    return value == LANDMARK or (isinstance(value, dict) and value.get("content") == LANDMARK)
