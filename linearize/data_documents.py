"""From records to token ids: plain text, chat messages, and instructions in the Alpaca prompt.

Every document stands between the tokenizer's BOS (if the tokenizer puts one there by itself) and EOS, as ids. Chat
messages are the exception: their template writes all markers itself. Special tokens are never re-tokenised from text.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from linearize.data_sources import Record, Source
from linearize.errors import UserError

Format = Literal["text", "chat", "instruction"]

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

PIECE_CHARACTERS = 1 << 20
"""Longer texts are tokenised in pieces, cut after a line break: tokenizers take far more memory than the text."""
BATCH_RECORDS = 256


class Segment(NamedTuple):
    """A document, or the next part of a long one."""

    ids: np.ndarray
    """(tokens,) int64"""
    supervised: np.ndarray | None
    """(tokens,) bool: which tokens the loss reads; none: all of them."""
    ends_document: bool


def resolve_format(source: Source, format: str, text_field: str, messages_field: str) -> Format:
    """Choose the format by the fields of the first record, or check that it has those of the format asked for."""
    fields = source.fields()
    needed: dict[Format, list[str]] = {
        "chat": [messages_field],
        "instruction": ["instruction", "output"],
        "text": [text_field],
    }
    for name, names in needed.items():
        if format in ("auto", name) and all(field in fields for field in names):
            return name
    there = f"its fields are {', '.join(sorted(fields))}" if fields else "it has no fields"
    if format == "auto":
        raise UserError(
            f"{source.name} has neither {text_field!r} nor {messages_field!r} nor instruction and output; {there}: "
            "set data.text_field or data.messages_field."
        )
    if format not in needed:
        raise UserError(f"The data format {format!r} is unknown: use auto, text, chat or instruction.")
    missing = [field for field in needed[format] if field not in fields]
    raise UserError(f"{source.name} has no field {missing[0]!r}; {there}: set data.format or the name of the field.")


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
    for batch in _batches(records):
        if format == "text":
            yield from _text(batch, tokenizer, text_field)
        elif format == "instruction":
            yield from _instructions(batch, tokenizer, completion_only)
        else:
            yield from _conversations(batch, tokenizer, messages_field, completion_only)


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
        if len(batch) == BATCH_RECORDS or size >= PIECE_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def string_field(record: dict[str, Any], field: str, where: str) -> str:
    """The text in a field of a record; none counts as empty."""
    if field not in record:
        raise UserError(f"There is no field {field!r} in {where}; its fields are {', '.join(sorted(record))}.")
    value = record[field]
    if value is not None and not isinstance(value, str):
        raise UserError(f"The field {field!r} in {where} is a {type(value).__name__}, but it must be text.")
    return value or ""


# ---- plain text


def _text(batch: list[Record], tokenizer: Any, field: str) -> Iterator[Segment]:
    leading, trailing = leading_ids(tokenizer), [tokenizer.eos_token_id]
    texts = [text for where, record in batch if (text := string_field(record, field, where)).strip()]
    pieces = [(piece, first, last) for text in texts for piece, first, last in split_text(text)]
    for start in range(0, len(pieces), BATCH_RECORDS):
        group = pieces[start : start + BATCH_RECORDS]
        for ids, (_, first, last) in zip(_encode(tokenizer, [piece for piece, _, _ in group]), group, strict=True):
            whole = (leading if first else []) + ids + (trailing if last else [])
            yield Segment(np.array(whole, dtype=np.int64), None, last)


def split_text(text: str, limit: int = PIECE_CHARACTERS) -> Iterator[tuple[str, bool, bool]]:
    """Cut a long text into (piece, is first, is last) of about `limit` characters.

    A cut lies between a line break and a character that is not a space, where byte-level BPE tokenizers (GPT-2,
    Llama-3, SmolLM2) cut by themselves, so that the ids are those of the whole text. A text without such a
    place stays whole.
    """
    start = 0
    line_start = re.compile(r"\n(?=\S)")
    while len(text) - start > limit and (cut := line_start.search(text, start + limit)):
        yield text[start : cut.end()], start == 0, False
        start = cut.end()
    yield text[start:], start == 0, True


# ---- instructions


def _instructions(batch: list[Record], tokenizer: Any, completion_only: bool) -> Iterator[Segment]:
    leading = leading_ids(tokenizer)
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
        ids = np.array([*leading, *prompt, *response, tokenizer.eos_token_id], dtype=np.int64)
        supervised = np.arange(len(ids)) >= len(leading) + len(prompt) if completion_only else None
        yield Segment(ids, supervised, True)


# ---- chat


def check_chat_template(tokenizer: Any) -> None:
    """Chat data need a template; whether it suits the messages shows when they are rendered."""
    if not tokenizer.chat_template:
        raise UserError(
            "The data are chat messages, but the tokenizer has no chat template: take the tokenizer of an instruct "
            "model, or set tokenizer.chat_template."
        )


def _conversations(batch: list[Record], tokenizer: Any, field: str, completion_only: bool) -> Iterator[Segment]:
    check_chat_template(tokenizer)
    chats = [(where, messages) for where, record in batch if (messages := _messages(record, field, where))]
    if not chats:
        return
    if completion_only and not tokenizer.is_fast:
        raise UserError(
            "The answers in chat messages cannot be found with a tokenizer written in Python: take its fast version, "
            "or set data.completion_only to false."
        )
    marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()) is not None
    if completion_only and marks_answers:
        for where, messages in chats:
            encoded = _render(
                tokenizer, messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            supervised = np.array(encoded["assistant_masks"], dtype=bool)
            yield Segment(np.array(encoded["input_ids"], dtype=np.int64), supervised, True)
        return
    texts = [_render(tokenizer, messages, where) for where, messages in chats]
    if not completion_only:
        yield from (Segment(np.array(ids, dtype=np.int64), None, True) for ids in _encode(tokenizer, texts))
        return
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for (where, messages), text, ids, offsets in zip(
        chats, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        starts = np.array([start for start, _ in offsets], dtype=np.int64)
        supervised = np.zeros(len(ids), dtype=bool)
        for begin, end in answer_spans(tokenizer, messages, text, where):
            supervised |= (starts >= begin) & (starts < end)
        yield Segment(np.array(ids, dtype=np.int64), supervised, True)


def answer_spans(tokenizer: Any, messages: list[dict], text: str, where: str) -> list[tuple[int, int]]:
    """Characters (start, stop) of the assistant's turns in the rendered text.

    A turn is what rendering the messages up to it adds to those before it with the prompt for an answer. This holds
    only if the template writes the earlier turns in the same way whatever follows; some leave out thoughts of earlier
    turns.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        until = _render(tokenizer, messages[: index + 1], where)
        if index:
            before = _render(tokenizer, messages[:index], where, add_generation_prompt=True)
        else:  # no template renders an empty chat, so look for the prompt for an answer inside the first turn
            prompt = _render(tokenizer, messages[:1], where, add_generation_prompt=True).removeprefix(until)
            before = until[: until.find(prompt)] + prompt
        if not (until.startswith(before) and text.startswith(until)):
            raise UserError(
                f"The answers in {where} cannot be told apart, because the chat template rewrites earlier turns: use "
                "a template with {% generation %} marks, or set data.completion_only to false."
            )
        spans.append((len(before), len(until)))
    return spans


def _messages(record: dict[str, Any], field: str, where: str) -> list[dict]:
    if field not in record:
        raise UserError(f"There is no field {field!r} in {where}; its fields are {', '.join(sorted(record))}.")
    messages = record[field] or []
    if not isinstance(messages, list):
        raise UserError(
            f"The field {field!r} in {where} is a {type(messages).__name__}, but it must be a list of messages."
        )
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise UserError(f"A message in {where} lacks role or content: each must be an object that has both.")
    return messages


def _render(tokenizer: Any, messages: list[dict], where: str, **options: Any) -> Any:
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **{"tokenize": False, **options})
    except (TemplateError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"The chat template does not take the messages in {where} ({reason}): mend or remove them."
        ) from error
