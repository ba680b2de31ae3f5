"""Who runs in `benchmark_kernels.py`: our ops and their peers, each as a `Case` over the same random numbers.

Legend: B batch, H query heads, G key/value heads, T tokens, D head dim, F features. Ours and PyTorch's peers take
`(B, H|G, T, D)`; fla's take `(B, T, H, D)` and no fewer key than query heads.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

WINDOW_WEIGHT, WINDOW_SHIFT, EXPONENT = 16.0, 0.5, 0.5


class Unavailable(Exception):
    """A contender that cannot run here; its text is the reason that the table gives."""


@dataclass(frozen=True)
class Shape:
    length: int
    dim: int = 128
    features: int = 128
    heads: int = 32
    groups: int = 32
    batch: int = 1
    window: int = 64


@dataclass
class Inputs:
    """What every contender is built from: query `(B, H, T, D)`, key, value `(B, G, T, D)`, features alike."""

    shape: Shape
    query: Tensor
    key: Tensor
    value: Tensor
    query_features: Tensor
    key_features: Tensor


@dataclass
class Case:
    """One call. tensors: its differentiable inputs; run: from them to the output; reference: the same in float64.

    head_axis is where a 4-dimensional tensor keeps its heads; the others keep them first.
    """

    tensors: dict[str, Tensor]
    run: Callable[[dict[str, Tensor]], Tensor]
    reference: Callable[[dict[str, Tensor]], Tensor] | None = None
    head_axis: int = 1
    note: str = ""


@dataclass(frozen=True)
class Contender:
    """A row of the table. op names what it computes and so what it is compared with."""

    name: str
    op: str
    build: Callable[[Inputs], Case]
    ours: bool = False
    sinks: int = 0
    quadratic: bool = False
    reads_features: bool = False
    by_maps: bool = False
    compiled: bool = False
    longest: int | None = None
    why_longest: str = ""


def draw(shape: Shape, device: str, dtype: torch.dtype, seed: int) -> Inputs:
    """Random inputs; features are softmaxes of normal numbers, as positive and as small as a model's."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads, width):
        return torch.randn(shape.batch, heads, shape.length, width, device=device, dtype=dtype, generator=generator)

    query, key, value = (normal(heads, shape.dim) for heads in (shape.heads, shape.groups, shape.groups))
    features = [normal(heads, shape.features).softmax(-1) for heads in (shape.heads, shape.groups)]
    return Inputs(shape, query, key, value, *features)


# --- ours


def _per_head(inputs: Inputs, level: float) -> Tensor:
    return torch.full((inputs.shape.heads,), level, device=inputs.query.device)


def draw_maps(inputs: Inputs) -> dict[str, Tensor]:
    """Softmax maps with f = F / 2: weights `(H|G, D, f)` and magnitudes `(H|G, D)`, in float32 as models keep them."""
    shape, maps = inputs.shape, {}
    generator = torch.Generator(inputs.query.device).manual_seed(1)
    for name, heads in (("query", shape.heads), ("key", shape.groups)):
        options: dict = {"device": inputs.query.device, "generator": generator}
        maps[f"{name}_weight"] = torch.randn(heads, shape.dim, shape.features // 2, **options) * shape.dim**-0.5
        maps[f"{name}_magnitude"] = torch.randn(heads, shape.dim, **options) * 0.3 * shape.dim**-0.5
    return maps


def features_or_maps(tensors: dict[str, Tensor], by_maps: bool) -> list:
    """The op's fourth and fifth argument."""
    from linearize.modeling import FeatureMapWeights

    if not by_maps:
        return [tensors["query_features"], tensors["key_features"]]
    return [
        FeatureMapWeights(tensors[f"{x}_weight"], None, tensors[f"{x}_magnitude"], "softmax") for x in ("query", "key")
    ]


def draw_memory(inputs: Inputs, unrotated: bool, gate: bool) -> dict[str, Tensor]:
    """What contract 2 adds: tensors of their own for the maps, and a gate per key head, `(G, T)`, which keeps half of
    the memory over about 10 to 10000 tokens, as learned ones do."""
    found = {}
    generator = torch.Generator(inputs.query.device).manual_seed(2)
    if unrotated:
        for name, x in (("map_query", inputs.query), ("map_key", inputs.key)):
            found[name] = torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)
    if gate:
        shape = (inputs.shape.groups, inputs.shape.length)
        found["log_decay"] = -torch.randn(shape, device=inputs.query.device, generator=generator).sub(5).exp()
    return found


def memory_options(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The op's arguments for what `draw_memory` gives, or parts of it; one row."""
    options = {name: tensors[name] for name in ("map_query", "map_key") if name in tensors}
    return options | ({"log_decay": tensors["log_decay"][None]} if "log_decay" in tensors else {})


def hybrid(
    inputs: Inputs,
    backend: str = "triton",
    by_maps: bool = False,
    sinks: int = 0,
    unrotated: bool = False,
    gate: bool = False,
) -> Case:
    from linearize.modeling import hybrid_linear_attention

    tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    if by_maps:
        tensors |= draw_maps(inputs)
    else:
        tensors |= {"query_features": inputs.query_features, "key_features": inputs.key_features}
    tensors["window_weight"] = _per_head(inputs, WINDOW_WEIGHT)
    tensors["window_shift"] = _per_head(inputs, WINDOW_SHIFT)
    tensors |= draw_memory(inputs, unrotated, gate)

    def run(t, backend=backend):
        output, _ = hybrid_linear_attention(
            t["query"],
            t["key"],
            t["value"],
            *features_or_maps(t, by_maps),
            window_weight=t["window_weight"],
            window_shift=t["window_shift"],
            window=inputs.shape.window,
            sinks=sinks,
            **memory_options(t),
            backend=backend,
        )
        return output

    return Case(tensors, run, partial(run, backend="chunked"))


def cosine(inputs: Inputs, backend: str = "triton") -> Case:
    from linearize.modeling import cosine_attention

    tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    tensors |= {"exponent": _per_head(inputs, EXPONENT), "gain": _per_head(inputs, 1.0)}

    def run(t, backend=backend):
        options = {"exponent": t["exponent"], "gain": t["gain"]}
        return cosine_attention(t["query"], t["key"], t["value"], **options, backend=backend)[0]

    return Case(tensors, run, partial(run, backend="chunked"))


def landmark(inputs: Inputs, backend: str = "triton") -> Case:
    """Every block open: softmax attention with gates, whose peer is SDPA."""
    from linearize.modeling import landmark_attention

    tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value}

    def run(t, backend=backend):
        return landmark_attention(t["query"], t["key"], t["value"], block_size=64, backend=backend)[0]

    return Case(tensors, run, partial(run, backend="chunked"))


def salient(inputs: Inputs, backend: str = "triton") -> Case:
    """With the op's own sinks and kept tokens."""
    from linearize.modeling import salient_attention

    tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value}

    def run(t, backend=backend):
        return salient_attention(t["query"], t["key"], t["value"], window=inputs.shape.window, backend=backend)[0]

    return Case(tensors, run, partial(run, backend="chunked"))


# --- PyTorch's


def sdpa(inputs: Inputs, backend: SDPBackend) -> Case:
    tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    grouped = inputs.shape.groups != inputs.shape.heads

    def run(t):
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(
                t["query"], t["key"], t["value"], is_causal=True, enable_gqa=grouped
            )

    return Case(tensors, run)


@cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # one per length and mode; past the limit it would run eager
    return torch.compile(flex_attention)


def flex(inputs: Inputs) -> Case:
    """A block window: each token sees its own block of W tokens and the one before, causally; no linear branch."""
    from torch.nn.attention.flex_attention import create_block_mask

    if not inputs.query.is_cuda:
        raise Unavailable("it is compiled for GPUs")
    window, length = inputs.shape.window, inputs.shape.length

    def block_window(batch, head, query, key):
        return (query >= key) & (query // window - key // window <= 1)

    mask = create_block_mask(block_window, None, None, length, length, device=inputs.query.device)
    tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    grouped = inputs.shape.groups != inputs.shape.heads

    def run(t):
        return _compiled_flex()(t["query"], t["key"], t["value"], block_mask=mask, enable_gqa=grouped)

    return Case(tensors, run)


# --- fla's


def fla_op(module: str, name: str):
    """An op of fla-core. Raises Unavailable with the reason."""
    if importlib.util.find_spec("fla") is None:
        raise Unavailable("fla-core is not installed")
    if not torch.cuda.is_available():
        raise Unavailable("it needs a GPU")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"the installed fla-core lacks it ({error})") from error


def _fla_inputs(inputs: Inputs, query: Tensor, key: Tensor) -> tuple[dict[str, Tensor], str]:
    """`(B, T, H, D)` copies, key and value repeated to all heads."""
    ratio = inputs.shape.heads // inputs.shape.groups
    whole = [query, *(x.repeat_interleave(ratio, dim=1) if ratio > 1 else x for x in (key, inputs.value))]
    tensors = dict(zip(("query", "key", "value"), (x.transpose(1, 2).contiguous() for x in whole), strict=True))
    return tensors, "keys and values repeated to all heads, outside the timing" if ratio > 1 else ""


def fla_linear(inputs: Inputs, name: str) -> Case:
    from linearize.modeling import hybrid_linear_attention

    op = fla_op("fla.ops.linear_attn", name)
    tensors, note = _fla_inputs(inputs, inputs.query_features, inputs.key_features)

    def run(t):
        return op(t["query"], t["key"], t["value"], scale=1.0, normalize=True)[0]

    def reference(t):
        query, key, value = (t[x].transpose(1, 2) for x in ("query", "key", "value"))
        output, _ = hybrid_linear_attention(query, key, value, query, key, window=0, backend="chunked")
        return output.transpose(1, 2)

    return Case(tensors, run, reference, head_axis=2, note=note)


def fla_simple_gla(inputs: Inputs) -> Case:
    """No decay: what cosine attention does after its normalisation and before its scale, neither of which it has."""
    op = fla_op("fla.ops.simple_gla", "chunk_simple_gla")
    tensors, note = _fla_inputs(inputs, inputs.query, inputs.key)

    def run(t):
        return op(t["query"], t["key"], t["value"], scale=1.0)[0]

    def reference(t):
        return plain_linear(*(t[x].transpose(1, 2) for x in ("query", "key", "value"))).transpose(1, 2)

    return Case(tensors, run, reference, head_axis=2, note=note)


def plain_linear(query: Tensor, key: Tensor, value: Tensor, chunk: int = 64) -> Tensor:
    """Causal `q k^T v` with no softmax, in chunks; `(B, H, T, D)`, T a multiple of the chunk or below it."""
    query, key, value = (x.unflatten(2, (-1, min(chunk, x.shape[2]))) for x in (query, key, value))
    sums = key.mT @ value
    before = sums.cumsum(2) - sums
    return ((query @ key.mT).tril() @ value + query @ before).flatten(2, 3)


PYTORCH_PATH: dict = {"longest": 2048, "why_longest": "the PyTorch path is timed up to 2048 tokens"}
COSINE: dict = {"op": "cosine", "ours": True}
HYBRID: dict = {"op": "hybrid", "ours": True, "reads_features": True}
LINEAR: dict = {"op": "linear", "reads_features": True}
CONTENDERS = [
    Contender("ours: hybrid, features", build=hybrid, **HYBRID),
    Contender("ours: hybrid, maps", build=partial(hybrid, by_maps=True), by_maps=True, **HYBRID),
    Contender("ours: hybrid, features, 4 sinks", build=partial(hybrid, sinks=4), sinks=4, **HYBRID),
    Contender("ours: cosine", build=cosine, **COSINE),
    Contender("ours: landmark", "landmark", landmark, ours=True, quadratic=True),
    Contender("ours: salient", "salient", salient, ours=True),
    Contender("SDPA flash", "softmax", partial(sdpa, backend=SDPBackend.FLASH_ATTENTION), quadratic=True),
    Contender("SDPA cuDNN", "softmax", partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION), quadratic=True),
    Contender("fla chunk_simple_gla", "cosine", fla_simple_gla),
    Contender("fla chunk_linear_attn", build=partial(fla_linear, name="chunk_linear_attn"), **LINEAR),
    Contender("fla fused_chunk_linear_attn", build=partial(fla_linear, name="fused_chunk_linear_attn"), **LINEAR),
    Contender("ours: hybrid, chunked PyTorch", build=partial(hybrid, backend="chunked"), **HYBRID, **PYTORCH_PATH),
    Contender(
        "ours: cosine, chunked PyTorch", "cosine", partial(cosine, backend="chunked"), ours=True, **PYTORCH_PATH
    ),
    Contender("ours: salient, chunked PyTorch", "salient", partial(salient, backend="chunked"), ours=True),
    Contender(
        "FlexAttention, block window",
        "window",
        flex,
        compiled=True,
        longest=32768,
        why_longest="its block mask is built from a T x T one",
    ),
]

MAPS = "ours: hybrid, maps"
GATE_ARMS: dict[str, dict] = {"unrotated": {"unrotated": True}, "gate": {"gate": True}}
GATE_ARMS |= {"unrotated, gate": {"unrotated": True, "gate": True}}
GATE_CONTENDERS = [
    Contender(MAPS, build=partial(hybrid, by_maps=True), by_maps=True, **HYBRID),
    *(
        Contender(f"{MAPS}, {name}", build=partial(hybrid, by_maps=True, **arm), by_maps=True, **HYBRID)
        for name, arm in GATE_ARMS.items()
    ),
]


# --- decoding: one token against what a context left behind


@dataclass
class Step:
    """run: one token's output; held: the tensors that the sequence keeps between tokens."""

    run: Callable[[], Tensor]
    held: list[Tensor]


_PAST_AND_LAST = (slice(None, -1), slice(-1, None))


def _split_last(inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    whole = (inputs.query, inputs.key, inputs.value, inputs.query_features, inputs.key_features)
    past, last = ([x[:, :, span].contiguous() for x in whole] for span in _PAST_AND_LAST)
    return past, last


def decode_hybrid(
    inputs: Inputs, by_maps: bool = False, in_place: bool = False, unrotated: bool = False, gate: bool = False
) -> Step:
    """To a new state, as the public op has it, or in place, as a model's captured step."""
    from linearize.modeling import hybrid_linear_attention
    from linearize.modeling.op_hybrid_linear_decode import hybrid_linear_step_, new_buffers

    past, last = _split_last(inputs)
    maps = features_or_maps(draw_maps(inputs), True) if by_maps else []
    options: dict = {"window_weight": _per_head(inputs, WINDOW_WEIGHT)}
    options |= {"window_shift": _per_head(inputs, WINDOW_SHIFT)}
    options |= {"window": inputs.shape.window, "sinks": 4, "backend": "triton"}
    memory = memory_options(draw_memory(inputs, unrotated, gate))
    before, at_last = ({name: x[:, :, span].contiguous() for name, x in memory.items()} for span in _PAST_AND_LAST)
    _, state = hybrid_linear_attention(*past[:3], *(maps or past[3:]), **options, **before, return_state=True)
    assert state is not None
    last = [*last[:3], *(maps or last[3:])]
    options |= at_last
    if not in_place:
        return Step(
            lambda: hybrid_linear_attention(*last, **options, initial_state=state, return_state=True)[0],
            [x for x in state if x is not None],
        )
    buffers = new_buffers(state, inputs.shape.batch).load_(state)
    options |= {"window_reference": "logsumexp", "scaling": None, "attention_mask": None}
    return Step(
        lambda: hybrid_linear_step_(*last, **options, log_weight=False, buffers=buffers, count=state.count),
        [x for x in buffers if x is not None],
    )


def decode_cosine(inputs: Inputs) -> Step:
    from linearize.modeling import cosine_attention

    past, last = _split_last(inputs)
    options: dict = {"exponent": _per_head(inputs, EXPONENT), "gain": _per_head(inputs, 1.0)}
    options |= {"return_state": True, "backend": "triton"}
    _, state = cosine_attention(*past[:3], **options)

    def run():
        return cosine_attention(*last[:3], **options, initial_state=state)[0]

    return Step(run, [x for x in state if x is not None])


def decode_salient(inputs: Inputs, in_place: bool = False) -> Step:
    """As `decode_hybrid`."""
    from linearize.modeling import salient_attention
    from linearize.modeling.op_salient_decode import new_buffers, salient_step_

    past, last = _split_last(inputs)
    options: dict = {"window": inputs.shape.window, "return_state": True, "backend": "triton"}
    _, state = salient_attention(*past[:3], **options)
    assert state is not None
    if not in_place:
        return Step(lambda: salient_attention(*last[:3], **options, initial_state=state)[0], list(state))
    buffers = new_buffers(state._make(x[:1] for x in state), inputs.shape.batch).load_(state)
    options = {"window": inputs.shape.window, "sinks": state.sink_key.shape[2], "kept": state.kept_key.shape[2]}
    options |= {"age_penalty": 0.6, "scaling": None, "attention_mask": None, "backend": "triton"}
    return Step(lambda: salient_step_(*last[:3], **options, buffers=buffers, count=state.count), list(buffers))


def decode_sdpa(inputs: Inputs, backends: list[SDPBackend]) -> Step:
    """The whole context as a KV cache, read in place: a real cache also appends the token."""
    grouped = inputs.shape.groups != inputs.shape.heads
    query = inputs.query[:, :, -1:].contiguous()

    def run():
        with sdpa_kernel(backends):
            return functional.scaled_dot_product_attention(query, inputs.key, inputs.value, enable_gqa=grouped)

    return Step(run, [inputs.key, inputs.value])


DECODERS: list[tuple[str, bool, Callable[[Inputs], Step]]] = [
    ("ours: hybrid, maps, 4 sinks, in place", True, partial(decode_hybrid, by_maps=True, in_place=True)),
    ("ours: hybrid, maps, 4 sinks", True, partial(decode_hybrid, by_maps=True)),
    ("ours: hybrid, features, 4 sinks", True, decode_hybrid),
    ("ours: cosine", True, decode_cosine),
    ("ours: salient, in place", True, partial(decode_salient, in_place=True)),
    ("ours: salient", True, decode_salient),
    ("SDPA flash, KV cache", False, partial(decode_sdpa, backends=[SDPBackend.FLASH_ATTENTION])),
    ("SDPA cuDNN, KV cache", False, partial(decode_sdpa, backends=[SDPBackend.CUDNN_ATTENTION])),
]
IN_PLACE = "ours: hybrid, maps, 4 sinks, in place"
GATE_DECODERS: list[tuple[str, bool, Callable[[Inputs], Step]]] = [
    (IN_PLACE, True, partial(decode_hybrid, by_maps=True, in_place=True)),
    *(
        (f"{IN_PLACE}, {name}", True, partial(decode_hybrid, by_maps=True, in_place=True, **arm))
        for name, arm in GATE_ARMS.items()
    ),
]
