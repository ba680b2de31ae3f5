"""What a call of a causal base model begins with: embeddings, the cache, positions, and the masks of its layers."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.utils import is_tracing

from .cache_layers import softmax_layer
from .cache_names import named
from .packing import Packing, check_mask, real_positions


def layer_masks(
    model, inputs_embeds, attention_mask, position_ids, past_key_values, packing: Packing | None = None
) -> tuple[Any, Tensor | None]:
    """The masks of one forward: the softmax layers' (causal or a sliding window, as transformers makes it, texts apart
    where they are packed) and the mixers'."""
    padding_mask = mixer_padding(attention_mask, inputs_embeds, past_key_values)
    softmax = softmax_layers(model)
    if not softmax:
        return None, padding_mask
    windowed = model.config.softmax_window is not None
    causal_mask = (create_sliding_window_causal_mask if windowed else create_causal_mask)(
        config=model.config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids if packing is None else None,  # which it would take for texts where they jump
        layer_idx=softmax[0],
        and_mask_function=None if packing is None else packing.same_text,
        **named(past_key_values),
    )
    return causal_mask, padding_mask


def mixer_padding(attention_mask: Tensor | None, inputs_embeds: Tensor, cache=None) -> Tensor | None:
    """The mixers' mask: `(B, T)` of this call's tokens, or None when nothing is padded.

    It is ours because transformers' recurrent mask is dropped on calls of one token. On a GPU, and in a call that is
    traced, a mask without padding is passed on: to ask would stop the host until the GPU is idle, or end the trace.
    """
    if attention_mask is None:
        return None
    padding_mask = check_mask(attention_mask, inputs_embeds.shape[0], inputs_embeds.shape[1], cache)
    if padding_mask.device.type != "cpu" or is_tracing():
        return padding_mask
    return None if bool(padding_mask.all()) else padding_mask


def softmax_layers(model) -> list[int]:
    """Layers that run softmax attention now: those that stay so, and all converted ones in the teacher arm."""
    attentions = model.attention_modules()
    return [i for i, attention in enumerate(attentions) if getattr(attention, "arm", "teacher") == "teacher"]


def start_call(
    model, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache
) -> tuple[Tensor, Any, Tensor]:
    """What the call of a causal base model begins with: embeddings, the cache and the positions, made where not given.

    Raises:
        ValueError: both or neither of input_ids and inputs_embeds.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    hidden_states = model.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
    if use_cache and past_key_values is None:
        past_key_values = new_cache(model)
    if position_ids is None:
        position_ids = real_positions(attention_mask, hidden_states.shape[1], past_key_values, hidden_states.device)
    return hidden_states, past_key_values, position_ids


def new_cache(model) -> DynamicCache:
    """An empty cache for the current arm: in the teacher arm every layer's is that of softmax attention."""
    cache = DynamicCache(config=model.config)
    if any(getattr(attention, "arm", None) == "teacher" for attention in model.attention_modules()):
        cache.layers = [softmax_layer(model.config.softmax_window)() for _ in cache.layers]
    return cache
