"""The command `linearize chat`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from linearize.cli.context_flags import tokens
from linearize.cli.loading import Device, Dtype, Found, Model, Revision, find_model, load
from linearize.errors import UserError
from linearize.failures import command


@command
def chat(
    model: Model,
    revision: Revision = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Answer this and end, instead of a conversation.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", parser=tokens, help="Tokens of an answer at most.")
    ] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0 for greedy decoding.")] = 0.0,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Talk with a model, converted or not.

    Through its chat template if it has one.
    """
    found = find_model(model, revision)
    chat_with_model(
        found, prompt=prompt, max_new_tokens=max_new_tokens, temperature=temperature, dtype=dtype, device=device
    )


def chat_with_model(
    found: Found, *, prompt: str | None, max_new_tokens: int, temperature: float, dtype: str, device: str
) -> None:
    """Answer one prompt, or hold a conversation until the input ends."""
    if max_new_tokens < 1 or temperature < 0:
        raise UserError("--max_new_tokens must be at least 1 and --temperature must not be negative.")
    if prompt is not None and not prompt.strip():
        raise UserError("--prompt is empty: give a text to answer, or leave it out for a conversation.")
    model, tokenizer, _ = load(found, dtype, device)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    messages: list[dict[str, str]] = []
    if prompt is not None:
        _answer(model, tokenizer, messages, prompt, max_new_tokens, sampling)
        return
    print("An empty line or Ctrl-D ends the conversation.")
    while text := _read_line():
        _answer(model, tokenizer, messages, text, max_new_tokens, sampling)


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _answer(
    model: Any,
    tokenizer: Any,
    messages: list[dict[str, str]],
    text: str,
    max_new_tokens: int,
    sampling: dict[str, Any],
) -> None:
    """Stream one answer; the conversation so far goes along where there is a chat template."""
    from transformers import TextStreamer

    messages.append({"role": "user", "content": text})
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(text, return_tensors="pt")
    inputs = inputs.to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    messages.append({"role": "assistant", "content": answer})
