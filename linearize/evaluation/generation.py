"""What a reader sees and waits for: sample continuations, prefill and decode speed."""

import contextlib
import dataclasses
import time
from typing import Any

import torch

from linearize.evaluation.arms import adapters_off, context_tokens, input_device, is_student, measuring
from linearize.modeling.cache_names import CACHE, named


@dataclasses.dataclass(frozen=True)
class Speed:
    """Tokens per second of one sequence on this machine, sequences one at a time."""

    prefill: float
    decode: float


def continuation(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    arm: str | None = "mixed",
    max_new_tokens: int = 40,
    adapters: bool = True,
) -> str:
    """Continue a prompt greedily and return only what was added.

    Args:
        arm: "mixed", or "teacher" for the softmax attention; None for a stock model.
        adapters: False switches LoRA off, so that the teacher arm is the untouched teacher.
    """
    with contextlib.nullcontext() if adapters else adapters_off(model), measuring(model, arm) as base:
        inputs = tokenizer(prompt, return_tensors="pt").to(input_device(base))
        options = named(_teacher_cache()) if arm == "teacher" else {}
        output = base.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **options)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def measure_speed(
    model: Any, *, arm: str | None = "mixed", prompt_tokens: int = 512, new_tokens: int = 16, repeats: int = 1
) -> Speed:
    """Time a prefill and a greedy decode through the cache, after one short warm-up; the best of `repeats`.

    The prompt is cut to the context of the model.
    """
    arm = arm if is_student(model) else None
    with measuring(model, arm) as base:
        context = context_tokens(base.config, arm) or prompt_tokens + new_tokens
        prompt_tokens = max(1, min(prompt_tokens, context - new_tokens))
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(base.config.vocab_size, (1, prompt_tokens), generator=generator).to(input_device(base))
        _timed_run(base, prompt[:, :8], 2)
        runs = [_timed_run(base, prompt, new_tokens, teacher=arm == "teacher") for _ in range(repeats)]
    return Speed(prompt_tokens / min(run[0] for run in runs), new_tokens / min(run[1] for run in runs))


def _timed_run(base: Any, prompt: torch.Tensor, new_tokens: int, teacher: bool = False) -> tuple[float, float]:
    """Seconds of the prefill and of `new_tokens` one-token steps."""
    cache = _teacher_cache() if teacher else None
    started = _now(prompt)
    output = base(prompt, use_cache=True, logits_to_keep=1, **named(cache))
    prefilled = _now(prompt)
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = base(token, use_cache=True, logits_to_keep=1, **named(output[CACHE]))
    return prefilled - started, _now(prompt) - prefilled


def _now(tensor: torch.Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def _teacher_cache() -> Any:
    """The stock cache: the config of a student would build the mechanism's."""
    from transformers import DynamicCache

    return DynamicCache()
