"""The Triton backend of `hybrid_linear_attention`: what it can do, and the call around the kernels."""

import torch
from torch import Tensor
from torch.nn import functional

from ..launching import dense, dense_rows
from ..triton_support import common_dtype, unavailable
from .autograd import HybridLinear
from .decode import decode_step, feature_count
from .function import Call, Operands, run
from .rows import compacted, make_rows
from .states import extend_keys, new_sinks, next_state

# float16 and float32 are multiplied as float32: wider sums do not fit into shared memory.
WIDEST = {torch.bfloat16: 256, torch.float16: 128, torch.float32: 128}
MOST_SINKS = 64
MOST_ROWS = 65535  # programs along the second side of a CUDA grid


def unsupported(query, key, value, query_features, key_features, **options) -> str | None:
    """Say why `fused` cannot do this call (arguments of the public function), or None when it can."""
    reason = unavailable(query, key, value)
    if reason is not None:
        return reason
    if not options.get("causal", True):
        return "the Triton kernels are causal; a bidirectional call runs the chunked path"
    widths = {"head dimension": query.shape[-1], "value dimension": value.shape[-1]}
    if options.get("map_query") is not None:
        widths["dimension of what the maps read"] = options["map_query"].shape[-1]
    if query_features is not None:
        widths["feature count"] = max(feature_count(query_features), feature_count(key_features))
    dtype = common_dtype(query, key, value)
    widest = WIDEST[dtype]
    for name, width in widths.items():
        if width > widest:
            return f"in {dtype} the Triton kernels hold a {name} of at most {widest}, this call has {width}"
    cu_seqlens = options.get("cu_seqlens")
    rows = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if rows * query.shape[1] > MOST_ROWS:
        return f"the Triton kernels run {MOST_ROWS} rows times heads at most, this call has {rows} x {query.shape[1]}"
    if options.get("sinks", 0) > MOST_SINKS:
        return f"the Triton kernels hold at most {MOST_SINKS} sinks, this call has {options['sinks']}"
    return None


@torch.compiler.disable  # torch.compile would follow the launches down to the pointers
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
    map_query=None,
    map_key=None,
    log_decay=None,
):
    """Hybrid linear attention by Triton kernels; arguments and returns of `hybrid_linear_attention`."""
    options = {
        "window_weight": window_weight, "window_shift": window_shift, "window_reference": window_reference,
        "window": window, "sinks": sinks, "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "attention_mask": attention_mask,
    }  # fmt: skip
    inputs = (query, key, value, query_features, key_features, map_query, map_key, log_decay)
    if query.shape[2] == 0:  # as one padded token
        padded = [functional.pad(x, (0, 0) * (x.dim() - 3) + (0, 1)) if isinstance(x, Tensor) else x for x in inputs]
        options["attention_mask"] = query.new_zeros(query.shape[0], 1, dtype=torch.bool)
        options |= zip(("map_query", "map_key", "log_decay"), padded[5:], strict=True)
        output, state = fused(*padded[:5], **options, initial_state=initial_state, return_state=return_state)
        return output[:, :, :0], state
    train = torch.is_grad_enabled() and _needs_gradient(*inputs, window_weight, window_shift, initial_state)
    if query.shape[2] == 1 and initial_state is not None and return_state and not train:
        reads = {"map_query": map_query, "map_key": map_key, "log_decay": log_decay}
        return decode_step(query, key, value, query_features, key_features, **options, **reads, state=initial_state)
    attention_mask, inputs, restore = compacted(attention_mask, *inputs)
    query, key, value, query_features, key_features, _, map_key, _ = inputs
    rows = make_rows(query, attention_mask, cu_seqlens, None if initial_state is None else initial_state.count)
    linear = query_features is not None
    activations = (getattr(query_features, "activation", None), getattr(key_features, "activation", None))
    maximum, final = window_reference == "max" and linear, return_state and linear
    call = Call(rows, window, sinks, options["scaling"], maximum, activations, final)
    operands = _operands(call, inputs, window_weight, window_shift, initial_state)
    if train:
        output, last_kv, last_z = HybridLinear.apply(call, *operands)
    else:
        output, last_kv, last_z, _ = run(call, operands, save=False)
    output = restore(output).to(query.dtype)
    if not return_state:
        return output, None
    tensors = (query, key, value, key_features, map_key)
    return output, next_state(rows, window, sinks, initial_state, tensors, last_kv, last_z)


def _operands(call: Call, inputs, weight, shift, state) -> Operands:
    """The tensors of a call as the kernels read them: dense, in one dtype, the state's ring before the keys."""
    query, key, value, query_features, key_features, map_query, map_key, log_decay = inputs
    dtype = common_dtype(query, key, value)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    map_query, map_key = (None if x is None else x.to(dtype) for x in (map_query, map_key))
    (feature_q, query_map), (feature_k, key_map) = _split(query_features), _split(key_features)
    sink_key = sink_value = first_kv = first_z = None
    if state is not None:
        sink_key, sink_value = new_sinks(call.rows, call.sinks, state, key, value)
        news = (key, value, feature_k, map_key)
        key, value, feature_k, map_key = extend_keys(call.rows, call.window, state, *news)
    linear = query_features is not None
    if linear and state is not None:
        first_kv, first_z = state.kv, state.normalizer
    if not linear or call.window + call.sinks == 0:
        weight = shift = None
    return Operands._make(
        (
            *(dense_rows(x) for x in (query, key, value, feature_q, feature_k)),
            *(dense(x) for x in (*query_map, *key_map, weight, shift)),
            *(dense_rows(x) for x in (sink_key, sink_value)),
            *(dense(x) for x in (first_kv, first_z)),
            *(dense_rows(x) for x in (map_query, map_key)),
            dense(log_decay),
        )
    )


def _split(features) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Features as a tensor, and a map's weight, bias and magnitude; None for what is not given."""
    if features is None:
        return None, (None, None, None)
    if isinstance(features, Tensor):
        return features, (None, None, None)
    return None, (features.weight, features.bias, features.magnitude)


def _needs_gradient(*values) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, tuple) and _needs_gradient(*value):
            return True
    return False
