"""Around the forward of every base model: packed texts, landmarks, transformers' decorators, and what a call must
leave behind."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.utils import is_tracing
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_names import CACHE
from .landmark_tokens import through_landmarks
from .packing import through_packing


def base_forward(forward: Callable) -> Callable:
    """A causal base model's forward, which takes `past_key_values`; everything around it is here."""
    stock = merge_with_config_defaults(capture_outputs(forward))
    return through_packing(entry_per_layer(cache_advances(through_landmarks(stock))))


def entry_per_layer(forward: Callable) -> Callable:
    """A base model's forward whose `attentions` have an entry for every layer, None where there are no weights:
    transformers collects the weights that there are, and so loses whose they are."""

    @functools.wraps(forward)
    def wrapped(self, *args, return_dict=None, **kwargs):
        output = forward(self, *args, **kwargs, return_dict=True)
        found = output.get("attentions")
        if found is not None:
            converted = [getattr(attention, "mixer", None) is not None for attention in self.attention_modules()]
            weights = iter(found or [None] * converted.count(False))  # no softmax layer has any, or each
            output["attentions"] = tuple(None if layer else next(weights) for layer in converted)
        as_output = self.config.return_dict if return_dict is None else return_dict
        return output if as_output else output.to_tuple()

    return wrapped


def cache_advances(forward: Callable) -> Callable:
    """A base model's forward, gives an output, that fails where a layer did not store what the call gave it.

    Otherwise such a layer goes on with a past that lacks tokens, and nothing but the text tells. Host numbers alone
    are compared, and nothing while the call is traced.
    """
    place = list(inspect.signature(forward).parameters).index("past_key_values")

    @functools.wraps(forward)
    def wrapped(self, *args, **kwargs):
        given = args[place - 1] if len(args) >= place else kwargs.get("past_key_values")
        if given is not None and not hasattr(given, "layers"):
            raise ValueError(
                f"the cache is a {type(given).__name__}, which a converted model cannot use: build it with "
                "DynamicCache(config=model.config), or let generate() do it"
            )
        before = None if is_tracing() else _lengths(given)
        output = forward(self, *args, **kwargs)
        cache = output.get(CACHE) if given is None else given
        if cache is not None and before is not None:
            _check_advance(_lengths(cache), before, output["last_hidden_state"].shape[1], len(self.decoder_layers()))
        return output

    return wrapped


def _lengths(cache: Any) -> list[int | None]:
    """Tokens that each layer of a cache has taken; None where only the device knows, as in a static cache."""
    lengths = [] if cache is None else [layer.get_seq_length() for layer in cache.layers]
    return [None if isinstance(length, Tensor) else length for length in lengths]


def _check_advance(after: list, before: list, tokens: int, layers: int) -> None:
    """Raise RuntimeError, in one sentence, where a layer has not taken the call's tokens."""
    for i in range(layers):
        start = before[i] if i < len(before) else 0
        found = after[i] if i < len(after) else 0
        if start is not None and found is not None and found != start + tokens:
            raise RuntimeError(
                f"layer {i} holds {found} tokens of the cache after a call of {tokens} on {start}, so that later "
                "tokens would miss some: gradient checkpointing gives layers no cache (call model.eval()), and a "
                "release of transformers that was not tested may not either (install a tested one)"
            )
