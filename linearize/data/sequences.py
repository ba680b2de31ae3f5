"""Training and validation sequences from text: read, tokenise once, pack, cache.

Documents are laid end to end, each as BOS (if the tokenizer starts its texts with one), its tokens and EOS, and the
stream is cut into sequences of exactly `sequence_length` tokens that need no padding. As in LoLCATs
(https://arxiv.org/abs/2410.10254), a sequence may hold parts of several documents, attention crosses their borders,
and the tokens of prompts carry the label -100. With `data.isolate_documents` attention stays within a document, and
with `data.packing` bfd whole documents are fitted into padded sequences (`texts.py`).

Which files do what: `sources.py` reads records, `documents.py` makes tokens of them, `data.packing.py`
caches, splits and packs.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from linearize.data import documents as data_documents
from linearize.data import packing as data_packing
from linearize.data.chat import check_chat_template
from linearize.data.documents import Format
from linearize.data.packing import Documents
from linearize.data.sources import Source, expand, is_local, open_files, open_source
from linearize.data.texts import FittedRows
from linearize.data.vocabulary import vocabulary_size
from linearize.errors import UserError
from linearize.paths import user_path

if TYPE_CHECKING:
    from linearize.config.settings import DataConfig

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(eq=False, repr=False)
class TokenBlocks(Dataset):
    """Packed sequences of equal length, a map-style dataset; memory-mapped if they come from the cache.

    `blocks[i]` is `{"input_ids": (L,), "labels": (L,)}`, int64 tensors of their own, with `position_ids` where
    documents are kept apart and an `attention_mask` where rows are padded; a slice or a sequence of indices gives
    (n, L). Labels are those of the same position (transformers' models shift them).
    """

    input_ids: Any
    """(N, L) array or tensor of token ids."""
    labels: Any = None
    """(N, L) array or tensor of token ids, -100 where no loss is taken; none: the token ids."""
    identity: str = ""
    """Key of the cache's entry, which text, tokenizer and settings decide; "" of what comes from no cache."""
    positions: Any = None
    """(N, L) array, positions that start again with each document, where documents are kept apart; else none."""
    lengths: Any = None
    """(N,) array, tokens of each row without its padding on the right; none: no row is padded."""
    contiguous: bool = True
    """Whether each row goes on where the one before it ends: no row in between was left out."""

    def __post_init__(self) -> None:
        if self.labels is None:
            self.labels = self.input_ids

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int | slice | Sequence[int] | torch.Tensor) -> dict[str, torch.Tensor]:
        if isinstance(index, torch.Tensor):
            index = index.tolist()
        rows = {"input_ids": _int64(self.input_ids[index]), "labels": _int64(self.labels[index])}
        if self.positions is not None:
            rows["position_ids"] = _int64(self.positions[index])
        if self.lengths is not None:
            real = np.arange(self.sequence_length) < np.asarray(self.lengths[index])[..., None]
            rows["attention_mask"] = _int64(real)
        return rows

    def __repr__(self) -> str:
        return f"TokenBlocks({len(self)} x {self.sequence_length} tokens)"

    @property
    def sequence_length(self) -> int:
        """Tokens in a sequence."""
        return self.input_ids.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens in all sequences together."""
        return len(self) * self.sequence_length


def _int64(rows: Any) -> torch.Tensor:
    if isinstance(rows, torch.Tensor):
        return rows.to(torch.int64, copy=True)
    return torch.from_numpy(np.array(rows, dtype=np.int64))


def prepare_data(config: "DataConfig", tokenizer: Any, *, seed: int = 0) -> tuple[TokenBlocks, TokenBlocks]:
    """Return the training and the validation sequences, from the cache where it has them.

    In a distributed run the main process builds and the others wait. An entry of the cache is used only if the data,
    the tokenizer and every setting that matters are those it was made from.

    Args:
        seed: The run's seed, which has no part in this: the order of training is `epoch_order`'s, and the documents
            carved off for validation are drawn with a fixed seed (`data.packing.VALIDATION_SEED`).

    Raises:
        UserError: The data are missing, unreadable, of another format, or too few.
    """
    del seed
    _check_length(config.sequence_length)
    return main_process_first(lambda: _prepare(config, tokenizer))


def load_text_blocks(
    paths: str | Path | Sequence[str | Path],
    tokenizer: Any,
    sequence_length: int,
    max_tokens: int | None = None,
    *,
    text_field: str = "text",
) -> TokenBlocks:
    """Return the text of local files as sequences for evaluation: packed as in training, nothing cached.

    Args:
        max_tokens: Reading stops there; none: everything.
        text_field: The records' field that holds the text.

    Raises:
        UserError: The files are missing or unreadable, or do not fill one sequence.
    """
    _check_length(sequence_length)
    source = open_files([paths] if isinstance(paths, str | Path) else list(paths), text_field)
    data_documents.resolve_format(source, "text", text_field, "")
    parts, total = [], 0
    for segment in data_documents.tokenize_records(source.records(), tokenizer, "text", text_field=text_field):
        parts.append(segment.ids)
        total += len(segment.ids)
        if max_tokens is not None and total >= max_tokens:
            total = max_tokens
            break
    count = total // sequence_length
    if not count:
        limit = f" (of which {max_tokens} are asked for)" if total == max_tokens else ""
        raise UserError(
            f"{source.name} holds {total} tokens{limit}, fewer than one sequence of {sequence_length}: give more "
            "text, or lower the sequence length."
        )
    ids = np.concatenate(parts)[: count * sequence_length]
    return TokenBlocks(torch.from_numpy(ids.reshape(count, sequence_length)))


def refuse_training_files(dataset: str | list[str], texts: str | list[str], setting: str = "evaluation.texts") -> None:
    """Refuse to call text held out that the run trains on.

    Args:
        dataset: As in `DataConfig`; a Hub dataset is not compared.
        texts: Local files to evaluate on.
        setting: That names them.

    Raises:
        UserError: A file of `texts` has the contents of one of the dataset's files.
    """
    trained, held_out = ([names] if isinstance(names, str) else names for names in (dataset, texts))
    known = {open_files([file]).identity for name in trained if is_local(name) for file in expand(name)}
    for file in (file for name in held_out for file in expand(name)):
        if open_files([file]).identity in known:
            raise UserError(
                f"{setting}: {file} is part of the training data; give other text, or leave {setting} out to evaluate "
                "on the documents held out."
            )


def epoch_order(num_blocks: int, seed: int, epoch: int) -> torch.Tensor:
    """The order in which an epoch visits the sequences: (num_blocks,) int64, the same in every process."""
    state = np.random.SeedSequence([seed % 2**64, epoch]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
    return torch.randperm(num_blocks, generator=generator)


def _check_length(sequence_length: int) -> None:
    if sequence_length < 2:
        raise UserError(
            f"The sequence length is {sequence_length}, but a sequence needs at least 2 tokens to learn from."
        )


def _prepare(config: "DataConfig", tokenizer: Any) -> tuple[TokenBlocks, TokenBlocks]:
    root = cache_root(config.cache_dir)
    train_source, validation_source = open_data(config)
    identity = data_documents.tokenizer_identity(tokenizer)
    train_key, train_documents = _tokenized(root, train_source, config, tokenizer, identity)
    held_out_key, held_out_documents = "", None
    if validation_source is not None:
        held_out_key, held_out_documents = _tokenized(root, validation_source, config, tokenizer, identity)

    def build(folder: Path) -> dict[str, Any]:
        return _pack(folder, config, train_source, train_documents, held_out_documents)

    key = data_packing.cache_key(
        kind="sequences",
        train=train_key,
        validation=held_out_key or config.validation_documents,
        validation_seed=data_packing.VALIDATION_SEED,
        sequence_length=config.sequence_length,
        # Left out where they are as ever: those entries stay valid.
        **({"isolate": True} if config.isolate_documents else {}),
        **({"packing": config.packing} if config.packing != "stream" else {}),
    )
    entry = data_packing.cached(root, key, build)
    return _open_blocks(entry, "train", config), _open_blocks(entry, "validation", config)


def cache_root(cache_dir: str | None) -> Path:
    """Folder of the cache's entries."""
    if cache_dir is not None:
        return Path(user_path(cache_dir))
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "linearize" / "data"


def open_training_source(config: "DataConfig") -> Source:
    """The records to train on."""
    return open_source(
        config.dataset,
        dataset_config=config.dataset_config,
        split=config.split,
        revision=config.revision,
        text_field=config.text_field,
    )


def open_data(config: "DataConfig") -> tuple[Source, Source | None]:
    """The records to train on, and those of `data.validation` where it is set."""
    train = open_training_source(config)
    if config.validation is None:
        return train, None
    from_hub = isinstance(config.dataset, str) and not is_local(config.dataset)
    if from_hub and not is_local(config.validation):
        validation = open_source(
            config.dataset,
            dataset_config=config.dataset_config,
            split=config.validation,
            revision=config.revision,
            text_field=config.text_field,
        )
    else:
        validation = open_files([config.validation], config.text_field)
    if validation.identity == train.identity:
        raise UserError(
            f"The validation data {validation.name} are the training data: give other text, or leave "
            "data.validation out."
        )
    return train, validation


def _tokenized(
    root: Path, source: Source, config: "DataConfig", tokenizer: Any, identity: str
) -> tuple[str, Documents]:
    """The key and the documents of a source; `identity` is the tokenizer's."""
    format: Format = data_documents.resolve_format(source, config.format, config.text_field, config.messages_field)
    completion_only = format != "text" if config.completion_only is None else config.completion_only
    if completion_only and format == "text":
        raise UserError(
            "data.completion_only is set, but plain text has no answers: leave it out, or give chat or "
            "instruction data."
        )
    if format == "chat":
        check_chat_template(tokenizer)
    dtype = data_packing.id_dtype(vocabulary_size(tokenizer))
    has_template = bool(tokenizer.chat_template)
    field = {"text": config.text_field, "chat": config.messages_field}.get(format, "")
    key = data_packing.cache_key(
        kind="documents",
        source=source.identity,
        tokenizer=identity,
        template=tokenizer.get_chat_template() if format in ("chat", "completion") and has_template else None,
        format=format,
        field=field,
        completion_only=completion_only,
        max_tokens=config.max_tokens,
    )

    def build(folder: Path) -> dict[str, Any]:
        logger.info("Tokenising %s (%s).", source.name, format)
        segments = data_documents.tokenize_records(
            source.records(),
            tokenizer,
            format,
            text_field=config.text_field,
            messages_field=config.messages_field,
            completion_only=completion_only,
        )
        facts = data_packing.write_documents(folder, segments, dtype, config.max_tokens)
        if not facts["tokens"]:
            raise UserError(f"{source.name} holds no text: give data with text in it.")
        logger.info("%s: %d tokens in %d documents.", source.name, facts["tokens"], facts["documents"])
        return facts

    return key, data_packing.read_documents(data_packing.cached(root, key, build))


def _pack(
    folder: Path, config: "DataConfig", source: Source, documents: Documents, held_out: Documents | None
) -> dict[str, Any]:
    """Write both splits; `held_out` are the documents of a validation set that was given."""
    length = config.sequence_length
    if held_out is None:
        train, validation = data_packing.split_documents(documents, length, config.validation_documents)
        held_out = documents
    else:
        every, others = (np.ones(len(part.ends), dtype=bool) for part in (documents, held_out))
        train = data_packing.without(documents, every, held_out, others)
        validation = [(0, len(held_out.ids))]
    layout: Any = FittedRows if config.packing == "bfd" else data_packing.StreamRows
    facts = {}
    for split, part, ranges in (("train", documents, train), ("validation", held_out, validation)):
        rows = layout(part.ends, ranges, length)
        facts[split] = data_packing.write_blocks(folder, split, part, rows, config.isolate_documents)
    for split, counts in facts.items():
        if counts["sequences"] or (split == "validation" and not validation):
            continue
        if counts["sequences_without_loss"]:
            raise UserError(
                f"No {split} sequence from {source.name} holds a token of an answer to learn from: check the data, or "
                "set data.completion_only to false."
            )
        raise UserError(
            f"The {split} data hold {counts['tokens']} tokens (documents equal to validation documents left out), "
            f"fewer than one sequence of {length}: give more text, or lower data.sequence_length."
        )
    sequences = [facts[split]["sequences"] for split in ("train", "validation")]
    logger.info("Packed into %d training and %d validation sequences of %d tokens.", *sequences, length)
    return facts


def _open_blocks(entry: Path, split: str, config: "DataConfig") -> TokenBlocks:
    ids, labels = entry / f"{split}_ids.npy", entry / f"{split}_labels.npy"
    if not ids.exists():  # validation_documents = 0
        return TokenBlocks(np.zeros((0, config.sequence_length), dtype=np.int64))
    others = [labels, *(entry / f"{split}_{name}.npy" for name in ("positions", "lengths"))]
    loaded, positions, lengths = (np.load(file, mmap_mode="r") if file.exists() else None for file in others)
    contiguous = not data_packing.read_facts(entry)[split]["sequences_without_loss"]
    return TokenBlocks(np.load(ids, mmap_mode="r"), loaded, entry.name, positions, lengths, contiguous)


def main_process_first(work: Callable[[], Result]) -> Result:
    """Run `work` in the main process of a distributed run, then in the others, which find it cached.

    The main process's error is raised in all of them. They wait in a group of its own with a long limit: tokenising a
    large corpus takes longer than the ten minutes that NCCL waits.
    """
    from torch import distributed

    if (
        not distributed.is_available()
        or int(os.environ.get("WORLD_SIZE", "1")) <= 1
        and not distributed.is_initialized()
    ):
        return work()
    if not distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
    group = distributed.new_group(backend="gloo", timeout=timedelta(days=1))
    is_main = distributed.get_rank() == 0
    result, failure = None, None
    if is_main:
        try:
            result = work()
        except Exception as error:  # of any kind: the others wait for word of it
            failure = error
    outcome = [(str(failure) or type(failure).__name__) if failure else None]
    distributed.broadcast_object_list(outcome, src=0, group=group)
    distributed.destroy_process_group(group)
    if failure:
        raise failure
    if outcome[0]:
        raise UserError(f"The main process could not prepare the data: {outcome[0]}")
    return result if is_main else work()  # type: ignore[return-value]
