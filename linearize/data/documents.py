"""From records to token ids: plain text, chats, instructions in the Alpaca prompt, and prompts with completions.

Every document stands between the tokenizer's BOS (if the tokenizer puts one there by itself) and EOS, as ids. Chats
are the exception: their template writes all markers itself. Special tokens are never re-tokenised from text: "</s>"
in a text is four characters, whatever the tokenizer's end-of-sequence token is called.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from linearize.data.chat import ChatEncoder, completion_messages, read_messages
from linearize.data.sources import Record, Source, require_field, string_field, text_pieces
from linearize.errors import UserError

Format = Literal["text", "chat", "instruction", "completion"]

# The wording of Stanford Alpaca with the line break after "Response:" that LoLCATs and alpaca-lora train with
# (https://arxiv.org/abs/2410.10254, section 5.1: alpaca-cleaned).
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

PIECE_CHARACTERS = 1 << 18
"""Longer texts are tokenised in pieces."""
CALL_CHARACTERS = 1 << 20
"""Text of one call of the tokenizer, which takes some hundred times its memory and works on several pieces at once."""
BATCH_RECORDS = 256
CONVERSATIONS = "conversations"
"""The field of ShareGPT's chats, taken where the usual one is missing."""


class Segment(NamedTuple):
    """A document, or the next part of a long one."""

    ids: np.ndarray
    """(tokens,) int64"""
    supervised: np.ndarray | None
    """(tokens,) bool: which tokens the loss reads; none: all of them."""
    ends_document: bool


class Piece(NamedTuple):
    """A part of a text, as long as the tokenizer takes at once."""

    text: str
    is_first: bool
    is_last: bool


def resolve_format(source: Source, format: str, text_field: str, messages_field: str) -> Format:
    """Choose the format by the fields of the first record, or check that it has those of the format asked for."""
    fields = source.fields()
    chat = chat_field(fields, messages_field)
    needed: dict[Format, list[str]] = {
        "chat": [chat],
        "instruction": ["instruction", "output"],
        "completion": ["prompt", "completion"],
        "text": [text_field],
    }
    for name, names in needed.items():
        if format in ("auto", name) and all(field in fields for field in names):
            return name
    there = f"its fields are {', '.join(sorted(fields))}" if fields else "it has no fields"
    if format == "auto":
        raise UserError(
            f"{source.name} has neither {text_field!r} nor {messages_field!r} nor instruction and output nor prompt "
            f"and completion; {there}: set data.text_field or data.messages_field."
        )
    if format not in needed:
        raise UserError(f"The data format {format!r} is unknown: use auto, {', '.join(needed)}.")
    missing = [field for field in needed[format] if field not in fields]
    raise UserError(f"{source.name} has no field {missing[0]!r}; {there}: set data.format or the name of the field.")


def chat_field(fields: Iterable[str], messages_field: str) -> str:
    """The field that holds the messages of a chat."""
    missing = messages_field == "messages" and "messages" not in fields
    return CONVERSATIONS if missing and CONVERSATIONS in fields else messages_field


def tokenize_records(
    records: Iterable[Record],
    tokenizer: Any,
    format: Format,
    *,
    text_field: str = "text",
    messages_field: str = "messages",
    completion_only: bool = False,
) -> Iterator[Segment]:
    """Turn records into documents, in order; records without text are left out."""
    if tokenizer.eos_token_id is None and format != "chat":
        raise UserError("The tokenizer has no end-of-sequence token, which separates documents: set its eos_token.")
    chats = ChatEncoder(tokenizer, completion_only)
    for batch in _batches(records):
        if format == "text":
            yield from _text(batch, tokenizer, text_field)
        elif format == "instruction":
            yield from _instructions(batch, tokenizer, completion_only)
        elif format == "completion":
            yield from _completions(batch, tokenizer, chats, completion_only)
        else:
            yield from _conversations(batch, chats, messages_field)


def tokenizer_identity(tokenizer: Any) -> str:
    """Hash of all that decides the ids: vocabulary, merges, normalisation, added tokens, BOS and EOS.

    Padding and truncation are left out: they change with the tokenizer's last call and do not matter here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content["padding"] = content["truncation"] = None
    else:
        probe = tokenizer("The quick brown fox, 1234.\n\n naïve Ωmega")["input_ids"]
        content = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), probe]
    facts = [content, tokenizer.bos_token_id, tokenizer.eos_token_id, leading_ids(tokenizer)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def leading_ids(tokenizer: Any) -> list[int]:
    """BOS as a list, if this tokenizer starts its texts with one."""
    if tokenizer.bos_token_id is None:
        return []
    ids = tokenizer("a")["input_ids"]
    return [tokenizer.bos_token_id] if ids[:1] == [tokenizer.bos_token_id] else []


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Groups for the tokenizer, which works on the texts of one call in parallel."""
    batch: list[Record] = []
    size = 0
    for where, record in records:
        batch.append((where, record))
        size += sum(len(value) for value in record.values() if isinstance(value, str))
        if len(batch) == BATCH_RECORDS or size >= CALL_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    return tokenizer(texts, **options, verbose=False)["input_ids"]


# ---- plain text


def _text(batch: list[Record], tokenizer: Any, field: str) -> Iterator[Segment]:
    leading, trailing = leading_ids(tokenizer), [tokenizer.eos_token_id]
    for group in _groups(_pieces(batch, field)):
        for ids, (_, first, last) in zip(_encode(tokenizer, [piece for piece, _, _ in group]), group, strict=True):
            whole = (leading if first else []) + ids + (trailing if last else [])
            yield Segment(np.array(whole, dtype=np.int64), None, last)


def _pieces(batch: list[Record], field: str) -> Iterator[Piece]:
    """The pieces of all texts but blank ones."""
    for where, record in batch:
        blank: list[Piece] | None = []  # held back until the text has more than space
        for piece in split_text(text_pieces(record, field, where)):
            if blank is not None:
                blank.append(piece)
                if piece[0].strip():
                    yield from blank
                    blank = None
            else:
                yield piece


def _groups(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces for one call of the tokenizer."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + len(piece[0]) > CALL_CHARACTERS:
            yield group
            group, size = [], 0
        group.append(piece)
        size += len(piece[0])
    if group:
        yield group


def split_text(text: str | Iterable[str], limit: int = PIECE_CHARACTERS) -> Iterator[Piece]:
    """Cut a long text into pieces of `limit` to 2 `limit` characters.

    A cut lies between a line break and a character that is not a space, or else before a single space, where
    byte-level BPE tokenizers (GPT-2, Llama-3, SmolLM2) cut by themselves, so that the ids are those of the whole text.
    A text without such places is cut anywhere: its ids differ at the cut, and tokenising it as a whole would take
    a hundred times its memory.

    Args:
        text: The whole text, or its parts in order.
    """
    held, is_first = "", True
    for part in [text] if isinstance(text, str) else text:
        held, start = held + part, 0
        while len(held) - start > 2 * limit:
            cut = _cut(held, start + limit, start + 2 * limit)
            yield Piece(held[start:cut], is_first, False)
            start, is_first = cut, False
        held = held[start:]
    yield Piece(held, is_first, True)


_PLACES = (re.compile(r"(?<=\n)(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))


def _cut(text: str, first: int, last: int) -> int:
    """The best place for a cut from `first` to `last`."""
    found = (place.search(text, first, last) for place in _PLACES)
    return next((match.start() for match in found if match), last)


# ---- instructions


def _instructions(batch: list[Record], tokenizer: Any, completion_only: bool) -> Iterator[Segment]:
    prompts, responses = [], []
    for where, record in batch:
        fields = {name: string_field(record, name, where) for name in ("instruction", "output")}
        fields["input"] = string_field(record, "input", where) if "input" in record else ""
        if not fields["instruction"].strip() and not fields["output"].strip():
            continue
        template = ALPACA_PROMPT_WITH_INPUT if fields["input"] else ALPACA_PROMPT
        prompts.append(template.format_map(fields))
        responses.append(fields["output"])
    if not prompts:
        return
    encoded = _encode(tokenizer, prompts + responses)
    for prompt, response in zip(encoded[: len(prompts)], encoded[len(prompts) :], strict=True):
        yield _answered(prompt, response, tokenizer, completion_only)


def _answered(prompt: list[int], answer: list[int], tokenizer: Any, completion_only: bool) -> Segment:
    leading = leading_ids(tokenizer)
    ids = np.array([*leading, *prompt, *answer, tokenizer.eos_token_id], dtype=np.int64)
    supervised = np.arange(len(ids)) >= len(leading) + len(prompt) if completion_only else None
    return Segment(ids, supervised, True)


# ---- chats, and prompts with completions


def _conversations(batch: list[Record], chats: ChatEncoder, messages_field: str) -> Iterator[Segment]:
    rows = []
    for where, record in batch:
        field = chat_field(record, messages_field)
        if messages := read_messages(require_field(record, field, where), record.get("system"), field, where):
            rows.append((where, messages, 0))
    yield from (Segment(ids, supervised, True) for ids, supervised in chats.encode(rows))


def _completions(batch: list[Record], tokenizer: Any, chats: ChatEncoder, completion_only: bool) -> Iterator[Segment]:
    """Rows of two strings are laid end to end; those of two lists of messages are chats."""
    for where, record in batch:
        prompt, completion = (require_field(record, name, where) for name in ("prompt", "completion"))
        if isinstance(prompt, list) or isinstance(completion, list):
            messages, answers_from = completion_messages(prompt, completion, where)
            yield from (Segment(*pair, True) for pair in chats.encode([(where, messages, answers_from)]))
        else:
            texts = [string_field(record, name, where) for name in ("prompt", "completion")]
            if any(text.strip() for text in texts):
                asked, answered = _encode(tokenizer, texts)
                yield _answered(asked, answered, tokenizer, completion_only)
