"""Decoding one token at a time in place, as a CUDA graph on a GPU: by itself, or under the ordinary `generate`.

A converted model's state never grows, so a step always has the same shapes: embed, mix, fold, project. A session owns
the buffers of one batch size; positions come from its count of tokens on the device, and nothing waits for the host.
"""

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache_names import NAMES, named
from .far_sinks import move_sinks_, sink_limit
from .packing import check_mask
from .registry import mechanism

MAX_SESSIONS = 4  # of one block, each with a graph and the state of its batch; the least recently used goes first
WARM_UPS = 3  # runs before a capture, in which kernels are compiled and libraries take their workspaces
HOST_ROPE = ("dynamic", "longrope")  # rotary embeddings that look at the positions on the host
ROTATED = ("LlamaAttention", "LinearizedLlamaAttention", "MistralAttention", "LinearizedMistralAttention")
NORMS = ("LlamaRMSNorm", "MistralRMSNorm")
GATED_UNITS = ("LlamaMLP", "MistralMLP")


class DecodingSession:
    """A fixed number of rows decoded in place, one token of each at a time.

    Args:
        model: a converted causal language model without softmax layers, on one device, not in the teacher arm.
        batch_size: B, rows.
        capture: replay a CUDA graph; None does where there is a GPU.
        compile: run norms, rotary embedding and gated units through `torch.compile`.
        dtype: of keys and values; None is the model's.
        forward: the model's forward; None is its current one.

    Raises:
        ValueError: the model cannot be captured; one sentence.
    """

    def __init__(self, model, batch_size: int, capture=None, compile=False, dtype=None, forward=None):
        device = model.get_input_embeddings().weight.device
        capture = device.type == "cuda" if capture is None else capture
        _check(model, capture)
        self.model, self.batch_size, self._forward = model, batch_size, forward or model.forward
        self._compile, self.setting = compile, ()
        self.logits: Any = None
        self._lenders: list[weakref.ref] = []
        self._graph: Any = None
        self._shifted = False  # whether `shift` may be other than 0
        self._most = 0  # no row has more tokens: known without asking the device
        self._sink_limit = sink_limit(model.base_model)
        with torch.inference_mode(False), torch.no_grad():  # buffers that any mode may change later
            self.token_ids = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
            self.real = torch.ones(batch_size, 1, dtype=torch.bool, device=device)
            self.count = torch.zeros(batch_size, dtype=torch.int64, device=device)
            self.shift = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)  # of positions, from the count
            dtype = dtype or model.dtype
            cache: Any = DynamicCache(config=model.config)
            self.cache, self.layers = cache, cache.layers
            self.mixers: list[Any] = [attention.mixer for attention in model.mixer_attentions()]
            for attention, layer in zip(model.mixer_attentions(), self.layers, strict=True):
                heads = getattr(attention.config, "num_key_value_heads", None) or attention.config.num_attention_heads
                layer.buffers = attention.mixer.new_buffers(heads, attention.arm, batch_size, dtype, device)
                layer.count = self.count
            if capture:
                with torch.cuda.device(device):
                    self._capture()

    @torch.no_grad()
    def step(self, token_ids: Tensor, real: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """Take one token per row.

        Args:
            token_ids: `(B,)` or `(B, 1)`.
            real: `(B, 1)`, 0 leaves a row as it is; None takes all.
            position_ids: `(B, 1)` or `(1, 1)`; None counts on from the tokens so far.

        Returns:
            Logits `(B, V)` of the next token, which the next step overwrites.
        """
        self.token_ids.copy_(token_ids.view(-1, 1))
        if real is None:
            self.real.fill_(True)
        else:
            self.real.copy_(real)
        if position_ids is not None:
            if position_ids.device.type == "cpu" and self.model.max_positions is not None:
                self.model.check_positions(int(position_ids.max()) + 1)
            torch.sub(
                position_ids.to(self.count.device).expand(self.batch_size, 1), self.count[:, None], out=self.shift
            )
        elif self._shifted:
            self.shift.zero_()
        self._shifted = position_ids is not None
        self.replay()
        return self.logits

    @torch.no_grad()
    def replay(self) -> None:
        """Run a step on the tokens that are there.

        Raises:
            ValueError: a row has no learned position left.
        """
        self._check_positions()
        if self._sink_limit is not None and self._most > self._sink_limit:
            sink_keys = [layer.buffers.sink_key for layer in self.layers]
            move_sinks_(self.model.base_model, sink_keys, self.count, self.real[:, 0])
        if self._graph is not None:
            self._graph.replay()
            return
        with compiled_elementwise(self.model) if self._compile else contextlib.nullcontext():
            self._run()

    def _check_positions(self) -> None:
        """Count a step; the device is asked only where padding may hide that there is a position left."""
        self._most += 1
        limit = self.model.max_positions
        if limit is not None and self._most > limit:
            self._most = int(self.count.max()) + 1
            self.model.check_positions(self._most)

    def _run(self) -> None:
        output = self._forward(
            input_ids=self.token_ids,
            attention_mask=self.real,
            position_ids=self.count[:, None] + self.shift,
            use_cache=True,
            return_dict=True,
            **named(self.cache),
        )
        self.logits = output.logits[:, -1]
        self.count.add_(self.real[:, 0])

    def _capture(self) -> None:
        """Warm up and capture on rows of padding, which change no state."""
        self.real.fill_(False)
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        with compiled_elementwise(self.model) if self._compile else contextlib.nullcontext():
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._run()
            current.wait_stream(stream)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
        self._graph = graph
        self.real.fill_(True)

    @torch.no_grad()
    def seek(self, count: int | Tensor, fill: int | None = None) -> None:
        """Set the tokens so far, `(B,)` or one number for all rows, as if that many had been read.

        Args:
            fill: a seed; fills the state with random values, to time a step at any context without reading it.
        """
        self.release()
        if isinstance(count, Tensor):
            self.count.copy_(count)
        else:
            self.count.fill_(count)
        self._most = int(self.count.max())
        if fill is None:
            return
        generator = torch.Generator(self.count.device).manual_seed(fill)
        for layer in self.layers:
            layer.buffers.fill_(generator)

    def to_cache(self) -> DynamicCache:
        """An ordinary cache with copies of the rows' states."""
        cache: Any = DynamicCache(config=self.model.config)
        for mixer, mine, layer in zip(self.mixers, self.layers, cache.layers, strict=True):
            layer.store(mixer.read_buffers(mine.buffers, self.count), int(self.count.max()))
        return cache

    def nbytes(self) -> int:
        """Bytes of state held."""
        return sum(x.nbytes for layer in self.layers for x in layer.buffers if x is not None)

    def close(self) -> None:
        """Give lent states back and free graph and buffers."""
        self.release()
        self._graph, self.logits, self.layers, self.mixers, self.cache = None, None, [], [], None

    # A cache of `generate` lends its layers' states for as long as only one-token calls come.

    @torch.no_grad()
    def attach(self, layers: list) -> None:
        """Take over the states of a cache's layers, whose rows are as many."""
        self.release()
        self.count.copy_(layers[0].state.count)
        self._most = layers[0].seen
        for mine, layer in zip(self.layers, layers, strict=True):
            mine.buffers.load_(layer.state)
            layer.lend(self)  # which frees the state before the next one is copied
        self._lenders = [weakref.ref(layer) for layer in layers]

    @torch.no_grad()
    def release(self) -> None:
        """Give every state back that is still lent."""
        lenders, self._lenders = self._lenders, []
        for mixer, mine, reference in zip(self.mixers, self.layers, lenders, strict=False):
            layer = reference()
            if layer is not None and layer.holder is self:
                layer.state = mixer.read_buffers(mine.buffers, self.count)

    @torch.no_grad()
    def reorder_(self, layer, rows: Tensor) -> None:
        """Reorder the rows of one lent layer; the count, common to all, goes with the first."""
        index = next(i for i, reference in enumerate(self._lenders) if reference() is layer)
        rows = rows.to(self.count.device)
        self.layers[index].buffers.reorder_(rows)
        if index == 0:
            self.count.copy_(self.count.index_select(0, rows))


class CapturedDecoding:
    """A model's forward that hands one-token calls with a cache to a session of their batch size."""

    def __init__(self, model, compile: bool):
        self.model, self.compile = model, compile
        self.attentions = model.mixer_attentions()
        self.sessions: dict[tuple, DecodingSession] = {}
        self.plain = model.forward
        _check(model, capture=model.device.type == "cuda")

        @functools.wraps(model.forward)  # generate reads the signature
        def forward(*args, **kwargs):
            return self.call(*args, **kwargs)

        self.forward = forward

    def call(self, *args: Any, **kwargs: Any):
        if len(args) == 1 and "input_ids" not in kwargs:
            return self.call(input_ids=args[0], **kwargs)
        layers = None if args else self._decoding_layers(kwargs)
        if layers is None:
            return self.plain(*args, **kwargs)
        token_ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        setting, session = self._setting(), layers[0].holder
        if session is None or session.setting != setting or any(layer.holder is not session for layer in layers):
            session = self._session(layers, setting)
            session.attach(layers)
        real = None if mask is None else check_mask(mask, len(token_ids), 1, _cache_of(kwargs))
        logits = session.step(token_ids, real, kwargs.get("position_ids"))
        for layer in layers:
            layer.seen += 1
        output = CausalLMOutputWithPast(logits=logits[:, None].clone(), **named(_cache_of(kwargs)))
        return output if kwargs.get("return_dict") in (None, True) else output.to_tuple()

    def _decoding_layers(self, kwargs) -> list | None:
        """The cache's layers when a session can do the call: one token per row, nothing but logits, no gradients."""
        token_ids, mask, cache = kwargs.get("input_ids"), kwargs.get("attention_mask"), _cache_of(kwargs)
        extras = ("inputs_embeds", "token_type_ids", "labels", "output_hidden_states", "output_attentions")
        if cache is None or token_ids is None or torch.is_grad_enabled():
            return None
        given = [value for name in extras if (value := kwargs.get(name)) is not None and value is not False]
        if token_ids.shape[1] != 1 or given:
            return None
        position = kwargs.get("position_ids")
        if position is not None and position.shape not in ((1, 1), token_ids.shape):
            return None
        if (mask is not None and mask.dim() != 2) or kwargs.get("use_cache") is False:
            return None
        layers = getattr(cache, "layers", [])
        if [getattr(x, "_layer_type", None) for x in layers] != [x.cache_layer_type for x in self.attentions]:
            return None
        return layers if all(layer.is_initialized for layer in layers) else None

    def _session(self, layers, setting: tuple) -> DecodingSession:
        """The session of this batch size, made on first use."""
        state = layers[0].state
        batch, dtype = len(state.count), state.window_key.dtype
        key = (batch, dtype, *setting)
        session = self.sessions.pop(key, None)
        if session is None:
            while len(self.sessions) >= MAX_SESSIONS:
                self.sessions.pop(next(iter(self.sessions))).close()
            session = DecodingSession(self.model, batch, compile=self.compile, dtype=dtype, forward=self.plain)
            session.setting = setting
        self.sessions[key] = session  # the most recently used is last
        return session

    def _setting(self) -> tuple:
        """What else a graph has fixed: arms, backends, and where the weights are."""
        modes = tuple((attention.arm, attention.mixer.op_backend) for attention in self.attentions)
        return (self.model.get_input_embeddings().weight.data_ptr(), self.model.training, modes)

    def close(self) -> None:
        for session in self.sessions.values():
            session.close()
        self.sessions = {}


def _cache_of(kwargs: dict) -> Any:
    """The cache of a call, under either name."""
    return next((cache for name in NAMES if (cache := kwargs.get(name)) is not None), None)


def _check(model, capture: bool) -> None:
    """Raise ValueError, in one sentence, where a step of constant shape is impossible."""
    names = getattr(model.config, "mixer_types", None) or []
    if len(model.mixer_attentions()) != model.config.num_hidden_layers:
        raise ValueError(
            f"{names.count('softmax')} of the model's {len(names)} layers are softmax attention, whose cache grows "
            "with every token: captured decoding needs every layer converted, so generate without it"
        )
    if growing := [name for name in names if not mechanism(model.config.mixers[name]["type"]).constant_state]:
        raise ValueError(
            f"the model has {model.config.mixers[growing[0]]['type']} attention, whose cache grows with the text: "
            "captured decoding needs a state of constant size, so generate without it"
        )
    if fixed := [name for name in names if not mechanism(model.config.mixers[name]["type"]).in_place]:
        raise ValueError(
            f"the model has {model.config.mixers[fixed[0]]['type']} attention, which makes a new state with every "
            "token: captured decoding needs one that changes in place, so generate without it"
        )
    if any(attention.arm == "teacher" for attention in model.mixer_attentions()):
        raise ValueError("captured decoding is not for the teacher arm, whose cache grows with every token")
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ValueError(
            "captured decoding needs the whole model in memory, and this one's device map has offloaded weights: "
            "load it onto one device, or generate without it"
        )
    if not capture:
        return
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ValueError(
            "captured decoding needs the whole model on one GPU: a CUDA graph does not span several devices"
        )
    kind = next((x.rope_type for x in model.modules() if getattr(x, "rope_type", None) in HOST_ROPE), None)
    if kind is not None:
        raise ValueError(
            f"rotary embeddings of type {kind!r} read positions on the host, which no CUDA graph can replay"
        )


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rotate(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    return query * cosine + _rotate_half(query) * sine, key * cosine + _rotate_half(key) * sine


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


@contextlib.contextmanager
def compiled_elementwise(model: nn.Module) -> Iterator[None]:
    """Within the block, norms, gated units and rotary embedding of a Llama or a Mistral are compiled functions, one
    kernel each.

    Works on a stock model as on a converted one. Calls of other shapes compile again.
    """
    changed = []
    rotations: dict[Any, Callable] = {}
    for module in model.modules():
        forward = _compiled_forward(module)
        if forward is not None:
            changed.append(replace_forward(module, forward))
        if type(module).__name__ in ROTATED:
            home: Any = sys.modules[type(module).forward.__module__]  # where its forward looks for the function
            rotations.setdefault(home, home.apply_rotary_pos_emb)
    for home in rotations:
        home.apply_rotary_pos_emb = _compiled(_rotate)
    try:
        yield
    finally:
        for restore in changed:
            restore()
        for home, rotation in rotations.items():
            home.apply_rotary_pos_emb = rotation


def replace_forward(module: nn.Module, forward: Callable) -> Callable[[], None]:
    """Hide a module's forward behind an instance attribute; returns the way back."""
    before = module.__dict__.get("forward")
    module.forward = forward

    def restore() -> None:
        del module.forward
        if before is not None:
            module.forward = before

    return restore


def _compiled_forward(module: Any) -> Callable | None:
    """What replaces the forward of a norm or a gated unit; None for every other module."""
    if type(module).__name__ in NORMS:
        return lambda x: _compiled(_rms_norm)(x, module.weight, module.variance_epsilon)
    if type(module).__name__ in GATED_UNITS and module.config.hidden_act in ("silu", "swish"):
        return lambda x: module.down_proj(_compiled(_gate)(module.gate_proj(x), module.up_proj(x)))
    return None
