"""How much of the output is the linear branch's: the test of whether it is used at all.

Legend: B batch, H query heads, G key/value heads, T tokens, D head dim.
"""

import dataclasses
from typing import Any

import torch
from tqdm.auto import tqdm

from linearize.errors import UserError
from linearize.evaluation.arms import has_branches, input_device, measuring


@dataclasses.dataclass(frozen=True)
class LinearShare:
    """The linear branch's share, in [0, 1]: of the denominator that the branches of linear attention share, of the
    lengths of both branches' outputs in cosine attention, which has none.

    Fields: mean over tokens past the window, heads and layers; per_layer, the same of each converted layer by its
    index; tokens, the number of tokens past the window that each layer's figure averages (the least of the layers).
    """

    mean: float
    per_layer: dict[int, float]
    tokens: int


def linear_share(model: Any, blocks: Any, *, batch_size: int = 1, max_tokens: int | None = None) -> LinearShare:
    """Measure the share on the queries, keys and values of the mixed arm: what the student sees when it runs.

    Only tokens whose linear branch can see a key count, n >= window + sinks (all tokens of an encoder, whose branch
    looks both ways); a layer without such tokens has share 0.

    Args:
        model: a student, or its peft wrapper.
        blocks: `len()` and `[i] -> {"input_ids": (L,)}`, without padding.
        max_tokens: stop after so many tokens (whole batches); default all.

    Raises:
        UserError: a model without linear branches.
    """
    if not has_branches(model):
        raise UserError(
            "The linear share needs a mechanism with a linear branch, and this model's attention has none."
        )
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    with measuring(model, "mixed") as base, tqdm(desc="linear share", unit="block", leave=False) as bar:
        hooks = [_attach(attention, base.config, sums, counts) for attention in base.mixer_attentions()]
        try:
            done = 0
            for start in range(0, len(blocks), batch_size):
                rows = [blocks[i]["input_ids"] for i in range(start, min(start + batch_size, len(blocks)))]
                input_ids = torch.stack(rows).to(input_device(base))
                base.base_model(input_ids, use_cache=False)
                bar.update(len(rows))
                done += input_ids.numel()
                if max_tokens is not None and done >= max_tokens:
                    break
        finally:
            for hook in hooks:
                hook.remove()
    per_layer = {i: sums[i] / counts[i] if counts[i] else 0.0 for i in sorted(sums)}
    mean = sum(per_layer.values()) / len(per_layer) if per_layer else 0.0
    return LinearShare(mean, per_layer, min(counts.values(), default=0))


def _attach(attention: Any, config: Any, sums: dict[int, float], counts: dict[int, int]) -> Any:
    """Watch one layer's mixer; adds its mean over heads, summed over tokens, and counts the tokens."""
    layer_idx = attention.layer_idx
    settings = config.mixer(layer_idx)
    reach = settings.window + settings.sinks if attention.causal else 0
    sums[layer_idx], counts[layer_idx] = 0.0, 0

    def observe(mixer, args, kwargs):
        inputs = dict(zip(("query", "key", "value"), args, strict=False), **kwargs)
        context = {name: inputs[name] for name in attention.reads}
        given = (inputs[name] for name in ("query", "key", "value"))
        share = mixer.linear_share(*given, causal=attention.causal, **context)
        share = share[:, :, reach:]
        sums[layer_idx] += share.double().mean(1).sum().item()
        counts[layer_idx] += share.shape[0] * share.shape[2]

    return attention.mixer.register_forward_pre_hook(observe, with_kwargs=True)
