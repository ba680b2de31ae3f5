"""Chats: the common shapes of their rows, the chat template, and which of the tokens are answers.

A template writes messages into one string, in which a marker that somebody wrote ("</s>" in a question about HTML)
looks like the template's own. Messages are therefore rendered with marks around such strings, and tokenised as text
between them; the marks never reach the model.
"""

import contextlib
import itertools
import json
import os.path
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from linearize.errors import UserError

Messages = list[dict[str, Any]]
Row = tuple[str, Messages, int]
"""A chat's place for error messages, its messages, and the first of them whose answer is learned."""

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
START, END = "\ufdd0", "\ufdd1"
"""Around a special token's name in a message. Unicode reserves U+FDD0 to U+FDEF for use inside a program."""
_STAND_INS = dict(zip(itertools.product((False, True), repeat=2), "\ufdd2\ufdd3\ufdd4\ufdd5", strict=True))
"""For the template's own special tokens, by whether they take the spaces on their left and right."""
_RESERVED = re.compile("[\ufdd0-\ufdef]")
_MARKED = re.compile(f"{START}([^{START}{END}]*){END}")


# ---- shapes of rows


def read_messages(value: Any, system: Any, field: str, where: str) -> Messages:
    """The messages of a chat as objects with role and content, whatever shape they have.

    Args:
        value: A list of messages with role and content, or with from and value (ShareGPT).
        system: A system prompt beside them, or None.
        field, where: For error messages.
    """
    if not isinstance(value, list | None):
        raise UserError(
            f"The field {field!r} in {where} is a {type(value).__name__}, but it must be a list of messages."
        )
    messages = [_message(message, where) for message in value or []]
    if isinstance(system, str) and system.strip() and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def completion_messages(prompt: Any, completion: Any, where: str) -> tuple[Messages, int]:
    """The messages of a prompt and its completion, and the number of the completion's first."""
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise UserError(f"The prompt or the completion in {where} is a list: both must be lists of messages, or text.")
    parts = [
        read_messages(value, None, name, where) for value, name in ((prompt, "prompt"), (completion, "completion"))
    ]
    return parts[0] + parts[1], len(parts[0])


def _message(message: Any, where: str) -> dict[str, Any]:
    if isinstance(message, dict) and "from" in message and "value" in message and "role" not in message:
        role = SHAREGPT_ROLES.get(str(message["from"]).lower())
        if role is None:
            raise UserError(
                f"A message in {where} is from {message['from']!r}, but ShareGPT's chats are from "
                f"{', '.join(SHAREGPT_ROLES)}: rename or remove it."
            )
        message = {"role": role, "content": message["value"]}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
        raise UserError(f"A message in {where} lacks role or content: each must be an object that has both.")
    # Templates write a null as "None", and handle what is missing.
    message = {name: value for name, value in message.items() if value is not None}
    if isinstance(message.get("content"), list):
        message["content"] = "".join(_part(part, where) for part in message["content"])
    elif not isinstance(message.get("content", ""), str):
        raise UserError(
            f"The content of a message in {where} is a {type(message['content']).__name__}: it must be text."
        )
    return message


def _part(part: Any, where: str) -> str:
    """The text of a part of a content."""
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise UserError(f"A message in {where} has a part of type {kind!r}, but only text can be learned: remove it.")


# ---- tokens


def check_chat_template(tokenizer: Any) -> None:
    """Chat data need a template; whether it suits the messages shows when they are rendered."""
    if not tokenizer.chat_template:
        raise UserError(
            "The data are chat messages, but the tokenizer has no chat template: take the tokenizer of an instruct "
            "model, or set tokenizer.chat_template."
        )


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turn what a template raises into a sentence."""
    from jinja2.exceptions import TemplateError

    try:
        yield
    except (TemplateError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"The chat template does not take the messages in {where} ({reason}): mend or remove them."
        ) from error


class Encoded(NamedTuple):
    ids: np.ndarray
    """(tokens,) int64"""
    places: np.ndarray
    """(tokens,) int64: the character that a token stands for first, spaces only if it has nothing else."""


class ChatEncoder:
    """Renders and tokenises chats; special tokens are those that the template writes, and no others."""

    def __init__(self, tokenizer: Any, completion_only: bool) -> None:
        """
        Args:
            completion_only: Learn the assistant's answers alone.

        Raises:
            UserError: On use, where the tokenizer has no chat template or is written in Python.
        """
        self.tokenizer, self.completion_only = tokenizer, completion_only
        added = tokenizer.added_tokens_decoder.items()
        self.special = {token.content: (number, token) for number, token in added if token.special and token.content}
        longest_first = sorted(self.special, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.template: str = ""
        self.core: Any = None

    def encode(self, rows: Sequence[Row]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """The ids (tokens,) int64 of chats and which of them are learned, (tokens,) bool or None for all.

        Where a template writes earlier turns in another way than the last (it leaves out thoughts), a chat gives a
        document for each of its answers, as the model meets them.
        """
        if not rows:
            return
        self._prepare()
        documents = [document for row in rows for document in self._documents(*row)]
        for encoded, (_, spans) in zip(self._encode([text for text, _ in documents]), documents, strict=True):
            if spans is None:
                yield encoded.ids, None
                continue
            supervised = np.zeros(len(encoded.ids), dtype=bool)
            for start, stop in spans:
                supervised |= (encoded.places >= start) & (encoded.places < stop)
            yield encoded.ids, supervised

    def _prepare(self) -> None:
        if self.core is not None:
            return
        check_chat_template(self.tokenizer)
        if not self.tokenizer.is_fast:
            raise UserError(
                "The answers in chat messages cannot be found with a tokenizer written in Python: take its fast "
                "version."
            )
        self.template = self.tokenizer.get_chat_template()
        self.core = _plain_backend(self.tokenizer)

    def _documents(self, where: str, messages: Messages, answers_from: int) -> Sequence[tuple[str, list | None]]:
        """Rendered texts and the characters (start, stop) of the answers in each; none: all is learned."""
        messages = [{**self._marked(message), "role": message["role"]} for message in messages]
        if not self.completion_only:
            return [(self._render(messages, where), None)]
        if re.search(r"\{%-?\s*generation\s*-?%\}", self.template):
            return [self._marked_answers(messages, answers_from, where)]
        return self._answers(messages, answers_from, where)

    def _marked_answers(self, messages: Messages, answers_from: int, where: str) -> tuple[str, list]:
        """A text and what its template calls generated."""
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # annotated as giving strings
        with _explained(where):
            texts, spans = render(
                conversations=[messages],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        first = 0
        if answers_from:
            prompt = self._render(messages[:answers_from], where, add_generation_prompt=True)
            first = len(os.path.commonprefix([prompt, texts[0]]))
        return texts[0], [(start, stop) for start, stop in spans[0] if start >= first]

    def _answers(self, messages: Messages, answers_from: int, where: str) -> list[tuple[str, list]]:
        """Texts and their answers, found by rendering parts of the chat.

        An answer is what rendering the messages up to it adds to those before it with the prompt for an answer. It
        lies in the text of the whole chat if that starts so; else it gets a text of its own.
        """
        documents: list[tuple[str, list]] = [(self._render(messages, where), [])]
        for index in range(len(messages) - 1, answers_from - 1, -1):
            if messages[index]["role"] != "assistant":
                continue
            until = self._render(messages[: index + 1], where)
            start = self._answer_start(messages, index, until, where)
            if not documents[-1][0].startswith(until):
                documents.append((until, []))
            documents[-1][1].insert(0, (start, len(until)))
        return [(text, spans) for text, spans in documents[::-1] if spans or len(documents) == 1]

    def _answer_start(self, messages: Messages, index: int, until: str, where: str) -> int:
        """Where the answer of message `index` begins in `until`, the text up to it."""
        if not index:  # no template renders an empty chat, so look for the prompt for an answer inside the first turn
            prompt = self._render(messages[:1], where, add_generation_prompt=True).removeprefix(until)
            return until.find(prompt) + len(prompt) if prompt in until else 0
        before = self._render(messages[:index], where)
        prompted = self._render(messages[:index], where, add_generation_prompt=True)
        start = len(os.path.commonprefix([prompted, until]))  # a prompt may open a thought that the answer lacks
        if not until.startswith(before) or start < len(before):
            raise UserError(
                f"The answers in {where} cannot be told apart, because the chat template rewrites earlier turns "
                "before an answer: use a template with {% generation %} marks, or set data.completion_only to false."
            )
        return start

    def _render(self, messages: Messages, where: str, **options: Any) -> str:
        with _explained(where):
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def _marked(self, value: Any) -> Any:
        """A message with marks around the special tokens' names in it."""
        if isinstance(value, str):
            return self.pattern.sub(f"{START}\\g<0>{END}", _RESERVED.sub("\ufffd", value))
        if isinstance(value, dict):
            return {name: self._marked(part) for name, part in value.items()}
        return [self._marked(part) for part in value] if isinstance(value, list) else value

    def _encode(self, texts: list[str]) -> list[Encoded]:
        marked = [_RESERVED.search(text) is not None for text in texts]
        unmarked = [text for text, has_marks in zip(texts, marked, strict=True) if not has_marks]
        self.core.encode_special_tokens = False
        plain = iter(self.core.encode_batch(unmarked, add_special_tokens=False))
        return [
            self._encode_marked(text) if has_marks else _encoded(next(plain), text)
            for text, has_marks in zip(texts, marked, strict=True)
        ]

    def _encode_marked(self, text: str) -> Encoded:
        """Tokens of a text with marks: stand-ins for the template's special tokens, all else as text."""
        parts: list[str] = []
        places: list[int] = []
        own: list[int] = []
        for piece, start, is_text in _split_marks(text):
            position = 0
            for match in () if is_text else self.pattern.finditer(piece):
                number, token = self.special[match.group()]
                own.append(number)
                parts += [piece[position : match.start()], _STAND_INS[bool(token.lstrip), bool(token.rstrip)]]
                places += [*range(start + position, start + match.start()), start + match.start()]
                position = match.end()
            parts.append(piece[position:])
            places += range(start + position, start + len(piece))
        written = "".join(parts)
        self.core.encode_special_tokens = True
        encoded = _encoded(self.core.encode(written, add_special_tokens=False), written)
        stand_ins = [self.core.token_to_id(name) for name in _STAND_INS.values()]
        ids = encoded.ids.copy()
        ids[np.isin(ids, stand_ins)] = own
        return Encoded(ids, np.array([*places, len(text)], dtype=np.int64)[encoded.places])


def _plain_backend(tokenizer: Any) -> Any:
    """A copy of a tokenizer's backend that trims no offsets (post-processors do) and knows the stand-ins."""
    from tokenizers import AddedToken, Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    core = Tokenizer.from_str(json.dumps({**content, "post_processor": None, "padding": None, "truncation": None}))
    core.add_tokens(
        [
            AddedToken(name, lstrip=left, rstrip=right, normalized=False, special=False)
            for (left, right), name in _STAND_INS.items()
        ]
    )
    return core


def _split_marks(text: str) -> Iterator[tuple[str, int, bool]]:
    """(piece, where it starts in the text, whether it stood between marks); no piece holds a mark."""
    position = 0
    for match in _MARKED.finditer(text):
        yield from _without_lone_marks(text, position, match.start())
        yield match.group(1), match.start(1), True
        position = match.end()
    yield from _without_lone_marks(text, position, len(text))


def _without_lone_marks(text: str, start: int, stop: int) -> Iterator[tuple[str, int, bool]]:
    """A template that cuts messages up may separate the marks of a pair."""
    for match in re.finditer(f"[^{START}{END}]+", text[start:stop]):
        yield match.group(), start + match.start(), False


def _encoded(encoding: Any, text: str) -> Encoded:
    return Encoded(
        np.array(encoding.ids, dtype=np.int64), np.array(list(_places(encoding.offsets, text)), dtype=np.int64)
    )


def _places(offsets: Iterable[tuple[int, int]], text: str) -> Iterator[int]:
    for start, stop in offsets:
        spaces = len(text[start:stop]) - len(text[start:stop].lstrip())
        yield start + spaces if start + spaces < stop else start
