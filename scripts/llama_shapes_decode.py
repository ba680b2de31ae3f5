"""The decode part of `measure_llama_shapes.py`: one token a step at a long context, student and teacher."""

import contextlib
import functools
from collections.abc import Callable
from unittest import mock

import torch
from kernel_measures import capture
from llama_shapes import Clock, Record, attempt, say, stock_twin
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from linearize.modeling import HybridLinearState
from linearize.modeling.attention_linear import state_bytes
from linearize.modeling.cache_names import named
from linearize.modeling.decoding import DecodingSession, compiled_elementwise

RESERVE = 2_500_000_000
"""Bytes that a search for the largest batch leaves to workspaces, graphs and fragments."""


class FullLayer(DynamicLayer):
    """Keys and values of a fixed number of tokens, the newest in the last place at every step.

    What a captured step can read by flash attention without a mask: the shortest possible step of a softmax model. (A
    `StaticCache` brings a mask, for which transformers repeats the keys of every group in memory.)
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1


def measure_decode(args, model, clock: Clock, record: Record) -> None:
    """Student and teacher, eager and captured, at batch 1 and at the largest batch that fits."""
    with torch.no_grad():
        for batch in _batches(args, _student_batch(args, model, clock)):
            _student_captured(args, model, batch, clock, record)
            _student_eager(args, model, batch, clock, record)
        teacher = stock_twin(model, model.config)
        for kind in ("captured", "eager"):
            for batch in _batches(args, _teacher_batch(args, model, clock, kind)):
                _teacher(args, teacher, batch, kind, clock, record)
    _compare(record)


def _batches(args, largest: int) -> list[int]:
    return sorted({1, *(batch for batch in args.batches if batch < largest), largest})


def _largest(clock: Clock, per_sequence: float) -> int:
    """How many sequences the free memory holds."""
    clock.clear()
    if not clock.gpu:
        return 2
    return max(1, int((clock.free_bytes() - RESERVE) / per_sequence))


def _student_batch(args, model, clock: Clock) -> int:
    config = model.config
    heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    state = state_bytes(config.mixer(0), heads, groups, dim, args.context, model.dtype.itemsize)
    logits = 2 * model.dtype.itemsize * config.vocab_size
    activations = model.dtype.itemsize * (4 * config.intermediate_size + 12 * config.hidden_size)
    largest = _largest(clock, config.num_hidden_layers * state + logits + activations)
    return largest // 8 * 8 or largest


def _teacher_batch(args, model, clock: Clock, kind: str) -> int:
    config = model.config
    layer = 2 * config.num_key_value_heads * args.context * config.head_dim * model.dtype.itemsize
    # The stock cache makes a new copy of a layer's keys and values with every token.
    return _largest(clock, layer * (config.num_hidden_layers + (1.5 if kind == "eager" else 0.0)))


def _fitting(clock: Clock, batch: int, work: Callable[[int], dict]) -> dict:
    """Runs at a batch size, and at a little less where the forecast was too high."""
    for _ in range(4):
        clock.clear()
        try:
            return {"batch": batch, **work(batch)}
        except torch.OutOfMemoryError:
            say(f"batch {batch} does not fit")
        batch = min(batch - 1, int(0.94 * batch))
    raise RuntimeError("no batch fits")


def _student_captured(args, model, batch: int, clock: Clock, record: Record) -> None:
    for compiled in args.compile:
        row = {"part": "decode", "model": "student", "kind": "captured" + (", compiled" if compiled else "")}

        def work(size: int, compiled=compiled) -> dict:
            session = DecodingSession(model, size, compile=compiled)
            try:
                session.seek(args.context, fill=0)
                session.step(_tokens(model, size).flatten())
                run = session.replay if clock.gpu else functools.partial(session.step, _tokens(model, size).flatten())
                return _timed(args, clock, run, size, calls=4) | {"state_gb": session.nbytes() / 1e9}
            finally:
                session.close()

        with attempt(record, **row, batch=batch):
            record.add(**row, **_fitting(clock, batch, work))


def _student_eager(args, model, batch: int, clock: Clock, record: Record) -> None:
    row = {"part": "decode", "model": "student", "kind": "eager"}

    def work(size: int) -> dict:
        cache = _student_cache(model, size, args.context)
        ids = _tokens(model, size)
        timed = _timed(args, clock, lambda: model(ids, past_key_values=cache, use_cache=True), size)
        return timed | {"state_gb": sum(layer.nbytes() for layer in cache.layers) / 1e9}

    with attempt(record, **row, batch=batch):
        record.add(**row, **_fitting(clock, batch, work))


def _student_cache(model, batch: int, context: int) -> DynamicCache:
    """A cache after `context` tokens, its sums and keys random."""
    config = model.config
    groups, dim = config.num_key_value_heads, config.head_dim
    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        settings = config.mixer(i)
        heads = groups if settings.share_key_map else config.num_attention_heads
        width = settings.feature_dim * (2 if settings.feature_map in ("softmax", "exp") else 1)
        sums = torch.randn(batch, heads, width, dim, device=model.device)
        # As large as the features' sum over the context; in place, for at the largest batch there is room for one.
        normalizer = torch.rand(batch, heads, width, device=model.device).add_(0.5).mul_(context / width)
        raw = functools.partial(torch.randn, dtype=model.dtype, device=model.device)
        state = HybridLinearState(
            kv=sums.mul_(context / width),
            normalizer=normalizer,
            window_key=raw(batch, groups, settings.window, dim),
            window_value=raw(batch, groups, settings.window, dim),
            window_features=None,
            sink_key=raw(batch, groups, settings.sinks, dim),
            sink_value=raw(batch, groups, settings.sinks, dim),
            count=torch.full((batch,), context, device=model.device),
            window_map_key=raw(batch, groups, settings.window, dim) if settings.map_input == "projections" else None,
        )
        layer.store(state, context)
    return cache


def _teacher(args, teacher, batch: int, kind: str, clock: Clock, record: Record) -> None:
    """The stock model: eager with the cache that `generate` gives it, captured with one of fixed length."""
    for compiled in args.compile if kind == "captured" else [False]:
        row = {"part": "decode", "model": "teacher", "kind": kind + (", compiled" if compiled else "")}

        def work(size: int, compiled=compiled) -> dict:
            with compiled_elementwise(teacher) if compiled else contextlib.nullcontext():
                return _teacher_step(args, teacher, size, kind, clock)

        with attempt(record, **row, batch=batch):
            record.add(**row, **_fitting(clock, batch, work))


def _teacher_step(args, teacher, batch: int, kind: str, clock: Clock) -> dict:
    config, ids = teacher.config, _tokens(teacher, batch)
    # Eager: as many tokens before the first step as make the context at the last one, so that every copy of the cache
    # fits where the one before it was.
    tokens = args.context if kind == "captured" else args.context - args.steps - 4
    shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
    layers: list[DynamicLayer] = []
    for _ in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, dtype=teacher.dtype, device=teacher.device) for _ in range(2))
        if kind == "captured":
            layers.append(FullLayer(keys, values))
        else:
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            layers.append(layer)
        del keys, values
    cache = Cache(layers=layers)
    state = {"state_gb": sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) / 1e9}
    if kind == "eager":
        return _timed(args, clock, lambda: teacher(ids, use_cache=True, **named(cache)), batch) | state
    positions = torch.full((1, 1), tokens - 1, device=teacher.device)

    def step():
        # While a graph is captured transformers makes a mask, which keeps SDPA from flash; one query needs none.
        with mock.patch("transformers.models.llama.modeling_llama.create_causal_mask", return_value=None):
            return teacher(ids, position_ids=positions, use_cache=True, **named(cache)).logits

    run = capture(step) if clock.gpu else step
    return _timed(args, clock, run, batch, calls=4) | state


def _timed(args, clock: Clock, run: Callable[[], object], batch: int, calls: int = 1) -> dict:
    ms = clock.milliseconds(run, args.steps, calls)
    return {"ms": ms, "tokens_per_second": 1e3 * batch / ms, "memory": clock.memory()}


def _tokens(model, batch: int) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (batch, 1), device=model.device)


def _compare(record: Record) -> None:
    """The student's largest batch beside the teacher's: tokens per second over tokens per second."""
    best: dict[str, float] = {}
    for row in record.data["rows"]:
        if row["part"] == "decode" and "tokens_per_second" in row:
            kind = f"{row['model']} {row['kind'].split(',')[0]}"
            best[kind] = max(best.get(kind, 0.0), row["tokens_per_second"])
    student = best.get("student captured")
    if student is None or record.data["shape"] != "8b":
        return
    for name, bar in (("teacher eager", 60), ("teacher captured", 15)):
        if name in best:
            record.add(part="decode compared", against=name, ratio=student / best[name], bar=bar)
