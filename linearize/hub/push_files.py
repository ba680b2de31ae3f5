"""What a push does to the files of a repository that is there already: another model's are deleted where transformers,
peft, sentence-transformers or a serving engine would load them in place of ours, by name; all others stay."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from linearize.config.record import CARD_FILE, read_record

LOADED_BY_NAME = (
    # weights, ours being safetensors: other shards, other formats, adapters (whose base would be loaded), quantised
    # copies' settings
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    *("adapter_config.json", "adapter_model*.bin", "consolidated*.pth", "params.json", "consolidated*.pt"),
    *("tf_model*.h5", "tf_model.h5.index.json", "flax_model*.msgpack", "flax_model*.msgpack.index.json"),
    *("quantize_config.json", "quant_config.json", "hf_quant_config.json"),
    # how text becomes tokens, and what a model generates with
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "sentencepiece*.model", "tekken.json", "chat_template*", "generation_config.json"),
    *("processor_config.json", "preprocessor_config.json", "*_preprocessor_config.json"),
    # sentence-transformers
    *("modules.json", "sentence_*_config.json", "config_sentence_transformers.json"),
)
"""Patterns of such names, in the folder that is loaded."""
TEMPLATES = "additional_chat_templates"
"""A tokenizer's further templates: a folder of its own that is loaded along."""
QUICK_START = re.compile(r'"([^"\n]+)", trust_remote_code=True')
"""Where a card names what its reader loads."""


def stale_files(present: Iterable[str], ours: Collection[str], earlier: Collection[str]) -> list[str]:
    """Files of a repository that a push deletes.

    Args:
        present: All that it holds.
        ours: What the push writes.
        earlier: What an earlier push wrote.
    """
    folders = {str(PurePosixPath(name).parent) for name in ours} | {TEMPLATES}
    return [name for name in present if name not in ours and (name in earlier or _is_loaded(name, folders))]


def _is_loaded(name: str, folders: Collection[str]) -> bool:
    """Whether a file would be loaded along with a model whose files lie in these folders."""
    path = PurePosixPath(name)
    if str(path.parent) == TEMPLATES:
        return True
    return str(path.parent) in folders and any(fnmatch(path.name, pattern) for pattern in LOADED_BY_NAME)


def card_for(directory: Path, repo_id: str) -> str:
    """The card of a model with the name of the repository that it goes to.

    The card is rendered anew, unless it was edited by hand: then what its quick start loads is renamed.
    """
    from linearize.conversion.students import load_config
    from linearize.hub.card import model_card

    record, config = read_record(directory), load_config(str(directory))
    path = directory / CARD_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    name = found[1] if (found := QUICK_START.search(text)) else directory.name
    if not text or text == model_card(name, record, config):
        return model_card(repo_id, record, config)
    return text.replace(f'"{name}"', f'"{repo_id}"')
