"""The control that costs as much as a student's state: the teacher with a plain softmax window of as many bytes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linearize.hardware.state_bytes import attention_shape, softmax_window, state_bytes
from linearize.modeling.op_hybrid_linear import hybrid_linear_attention

NAME = "linearize_plain_window"
SINKS = 4
"""Sinks of the control where the student has fewer: a plain window without any collapses (StreamingLLM, Xiao et al.
2023, https://arxiv.org/abs/2309.17453), and beats no student."""


def matched_window(config: Any, tokens: int) -> tuple[int, int]:
    """Window and sinks whose bf16 keys and values, in every layer, are as many bytes as the student's state.

    Both count a text of `tokens` tokens, which matters where a student's state grows. Rounded down; never more than
    the text, nor a longer window than softmax attention itself has.

    Args:
        config: of a converted causal model.
    """
    [state] = state_bytes(config, [tokens], torch.bfloat16)
    _, key_value_heads, head_dim = attention_shape(config)
    one_token = config.num_hidden_layers * 2 * key_value_heads * head_dim * torch.bfloat16.itemsize
    held = min(tokens, max(1, state.student // one_token))
    mixers = [config.mixer(i) for i in range(config.num_hidden_layers)]
    sinks = max(SINKS, *(getattr(mixer, "sinks", 0) for mixer in mixers))
    sinks = min(sinks, held - 1)
    return min(held - sinks, softmax_window(config) or held), sinks


@contextlib.contextmanager
def plain_window(base: Any, window: int, sinks: int) -> Iterator[None]:
    """Within the block, softmax attention sees the last `window` tokens, the present one among them, and the first
    `sinks`: in layers that are not converted, and in all others in the teacher arm. Without padding and cache.

    Args:
        base: a converted causal model, unwrapped.
    """

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        reach = {"window": window, "sinks": sinks, "scaling": scaling}
        output, _ = hybrid_linear_attention(query, key, value, None, None, **reach)
        return output.transpose(1, 2), None

    before = base.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[NAME] = attend
    base.config._attn_implementation = NAME  # transformers makes no mask for a name that it does not know
    try:
        yield
    finally:
        base.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[NAME]
