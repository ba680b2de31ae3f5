"""The Triton backend of `hybrid_linear_attention`: what it can do, and the call around the kernels."""

import torch
from torch import Tensor

from ..triton_support import unavailable
from .decode import decode_step
from .function import Call, HybridLinear, Operands, run
from .rows import make_rows
from .states import extend_keys, new_sinks, next_state

# float16 and float32 are multiplied as float32: wider sums do not fit into shared memory.
WIDEST = {torch.bfloat16: 256, torch.float16: 128, torch.float32: 128}
MOST_SINKS = 64


def unsupported(query, key, value, query_features, key_features, **options) -> str | None:
    """Say why `fused` cannot do this call (arguments of the public function), or None when it can."""
    reason = unavailable(query)
    if reason is not None:
        return reason
    if not options.get("causal", True):
        return "the Triton kernels are causal; a bidirectional call runs the chunked path"
    widths = {"head dimension": query.shape[-1], "value dimension": value.shape[-1]}
    if query_features is not None:
        widths["feature count"] = max(_width(query_features), _width(key_features))
    widest = WIDEST[query.dtype]
    for name, width in widths.items():
        if width > widest:
            return f"in {query.dtype} the Triton kernels hold a {name} of at most {widest}, this call has {width}"
    if options.get("sinks", 0) > MOST_SINKS:
        return f"the Triton kernels hold at most {MOST_SINKS} sinks, this call has {options['sinks']}"
    return None


def _width(features) -> int:
    if isinstance(features, Tensor):
        return features.shape[-1]
    return features.weight.shape[-1] * (2 if features.activation in ("softmax", "exp") else 1)


def fused(
    query,
    key,
    value,
    query_features,
    key_features,
    *,
    window_weight=None,
    window_shift=None,
    window_reference="logsumexp",
    window=64,
    sinks=0,
    causal=True,
    scaling=None,
    attention_mask=None,
    cu_seqlens=None,
    initial_state=None,
    return_state=False,
):
    """Hybrid linear attention by Triton kernels; arguments and returns of `hybrid_linear_attention`."""
    if query.shape[2] == 0:
        padded = [torch.nn.functional.pad(x, (0, 0, 0, 1)) if isinstance(x, Tensor) else x for x in
                  (query, key, value, query_features, key_features)]  # fmt: skip
        mask = query.new_zeros(query.shape[0], 1, dtype=torch.bool)
        output, state = fused(
            *padded, window_weight=window_weight, window_shift=window_shift, window_reference=window_reference,
            window=window, sinks=sinks, scaling=scaling, attention_mask=mask, initial_state=initial_state,
            return_state=return_state,
        )  # fmt: skip
        return output[:, :, :0], state
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    train = torch.is_grad_enabled() and _needs_gradient(
        query, key, value, query_features, key_features, window_weight, window_shift, initial_state
    )
    if query.shape[2] == 1 and initial_state is not None and return_state and not train:
        return decode_step(
            query, key, value, query_features, key_features, window_weight=window_weight, window_shift=window_shift,
            window_reference=window_reference, window=window, sinks=sinks, scaling=scaling,
            attention_mask=attention_mask, state=initial_state,
        )  # fmt: skip
    rows = make_rows(query, attention_mask, cu_seqlens, None if initial_state is None else initial_state.count)
    linear = query_features is not None
    call = Call(
        rows, window, sinks, scaling, window_reference == "max" and linear,
        (getattr(query_features, "activation", None), getattr(key_features, "activation", None)),
        return_state and linear,
    )  # fmt: skip
    keys = (key, value, key_features if isinstance(key_features, Tensor) else None)
    sink_key = sink_value = None
    if initial_state is not None:
        sink_key, sink_value = new_sinks(rows, sinks, initial_state, key, value)
        keys = extend_keys(rows, window, initial_state, *keys)
    maps = [
        x[:3] if x is not None and not isinstance(x, Tensor) else (None,) * 3 for x in (query_features, key_features)
    ]
    operands = Operands(
        _dense(query), *(_dense(x) for x in keys[:2]), _dense(query_features), _dense(keys[2]), *maps[0], *maps[1],
        window_weight if linear and window + sinks else None, window_shift if linear and window + sinks else None,
        sink_key, sink_value,
        initial_state.kv if linear and initial_state is not None else None,
        initial_state.normalizer if linear and initial_state is not None else None,
    )  # fmt: skip
    if train:
        output, last_kv, last_z = HybridLinear.apply(call, *operands)
    else:
        output, last_kv, last_z, _ = run(call, operands, save=False)
    if not return_state:
        return output, None
    return output, next_state(rows, window, sinks, initial_state, (query, key, value, key_features), last_kv, last_z)


def _needs_gradient(*values) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, tuple) and _needs_gradient(*value):
            return True
    return False


def _dense(x) -> Tensor | None:
    """A tensor whose last dimension is contiguous, as the kernels read it; None for a map."""
    if not isinstance(x, Tensor):
        return None
    return x if x.stride(-1) == 1 else x.contiguous()
