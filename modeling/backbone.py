"""What every backbone shares: an attention that can be the student's or the teacher's, and its model's switches."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward
from transformers.utils import is_tracing

from .attention_cosine import CosineScales
from .attention_gain_cell import RangeScaler
from .attention_linear import WindowMix
from .base_forward import base_forward
from .cache_layers import NO_STATIC_CACHE
from .cache_names import EitherCacheName, named
from .counter_draws import draw_words, uniform
from .decay_gate import DecayGate
from .decoding import CapturedDecoding, replace_forward
from .far_sinks import plan_far_sinks
from .feature_maps import FeatureMap
from .landmark_keys import LandmarkKeys
from .landmark_tokens import Landmarks, LandmarkTokens, forget_call, published_loss
from .model_call import layer_masks, start_call
from .op_dispatch import BACKENDS
from .packing import Packing, check_mask
from .registry import mechanism

# Mixins that go before a stock class: for a type checker they are of its kind.
if TYPE_CHECKING:
    AttentionBase = nn.Module
    ModelBase = PreTrainedModel
else:
    AttentionBase = ModelBase = object

logger = logging.getLogger(__name__)

OWN_PARAMETERS = (
    CosineScales,
    DecayGate,
    FeatureMap,
    LandmarkKeys,
    LandmarkTokens,
    RangeScaler,
    WindowMix,
)
"""Modules of the mechanisms that have parameters: `reset_parameters` initialises them."""
STOCK_LOSS: Any = PreTrainedModel.loss_function
ARMS = ("mixed", "teacher", "softmax", "linear")


class MixerAttention(EitherCacheName, AttentionBase):
    """Goes before a stock attention class: keeps its projections and adds the mechanism.

    Attributes:
        mixer: the mechanism, float32 parameters.
        arm: `mixed`, the student; `teacher`, the stock softmax attention; `softmax` and `linear`, the student's
            branches alone.
        reads: names of what the mechanism is given beside queries, keys and values, see `context`.
        observer: called in the teacher arm with `(attention, query, key, value, teacher_output, padding_mask)`, with
            `packing` where texts are packed, and with what the mechanism `reads`: query `(B, H, T, D)`, key and value
            `(B, G, T, D)`, teacher_output `(B, H, T, D)` before the output projection. Attention transfer lives in it.
        causal: whether a token sees only those before it; False in encoders.
    """

    config: Any
    layer_idx: int
    head_dim: int
    scaling: float
    attention_dropout: Any
    mixer: nn.Module
    reads: tuple[str, ...]
    arm: str
    observer: Callable[..., None] | None
    causal = True

    def add_mixer(self, config, num_heads: int, num_key_value_heads: int) -> None:
        settings = config.mixer(self.layer_idx)
        attention = mechanism(settings.type).attention
        self.reads = mechanism(settings.type).reads(settings)
        width = {"layer_width": config.hidden_size} if "layer_input" in self.reads else {}
        self.mixer = attention(settings, num_heads, num_key_value_heads, self.head_dim, self.scaling, **width)
        self.mixer.layer_idx = self.layer_idx  # type: ignore[assignment]
        self.cache_layer_type = mechanism(settings.type).cache_layer_type
        self.arm, self.observer = "mixed", None

    def context(self, query: Tensor, key: Tensor, hidden_states: Tensor) -> dict[str, Tensor]:
        """What the mechanism `reads` beside queries, keys and values.

        Args:
            query: `(B, H, T, D)`; key: `(B, G, T, D)`; before position, after a norm of theirs.
            hidden_states: `(B, T, E)`, the attention's input.
        """
        given = {"unrotated_query": query, "unrotated_key": key, "layer_input": hidden_states[:, None]}
        return {name: given[name] for name in self.reads}

    def mix(
        self, query, key, value, padding_mask=None, cache_layer=None, arm="mixed", packing=None, far_sinks=None,
        **extra,
    ) -> Tensor:  # fmt: skip
        """The mechanism on queries, keys and values, and what else it reads, as this backbone sees them (causal or
        not): `(B, H, T, D)`."""
        if arm == "linear" or not getattr(self.mixer, "sinks", 0):
            far_sinks = None
        if packing is not None:
            query, key, value = (packing.join(x) for x in (query, key, value))
            extra = {name: packing.join(x) for name, x in extra.items()}
            if far_sinks is not None:
                return packing.split(far_sinks.run(self.mixer, (query, key, value), None, None, arm, **extra))
            output = self.mixer(query, key, value, arm=arm, causal=self.causal, cu_seqlens=packing.cu_seqlens, **extra)
            return packing.split(output)
        if far_sinks is not None:
            return far_sinks.run(self.mixer, (query, key, value), padding_mask, cache_layer, arm, **extra)
        return self.mixer(
            query, key, value, padding_mask, cache_layer=cache_layer, arm=arm, causal=self.causal, **extra
        )

    def attend(
        self, query, key, value, attention_mask, padding_mask, past_key_values, eager, landmarks=None, packing=None,
        far_sinks=None, context=None, **kwargs,
    ) -> Tensor:  # fmt: skip
        """Mix tokens in the current arm: `(B, T, H, D)`. attention_mask is the softmax's, padding_mask the mixer's;
        with landmarks, query and key are not rotated; far_sinks is what `plan_far_sinks` gave; context is what
        `context` gave, None where nothing is read."""
        context = context or {}
        if self.arm != "teacher":
            if self.training and self.attention_dropout and not torch.compiler.is_compiling():
                _say_no_dropout(self.attention_dropout)
            layer = None if past_key_values is None else self._cache_layer(past_key_values)
            extra = {"packing": packing, "far_sinks": far_sinks} if landmarks is None else {"landmarks": landmarks}
            return self.mix(query, key, value, padding_mask, layer, self.arm, **extra, **context).transpose(1, 2)
        new_key, new_value = key, value
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        if self.config.softmax_window is not None:
            kwargs["sliding_window"] = self.config.softmax_window  # the mask has it already, for those that take one
        dropout = self.attention_dropout if self.training else 0.0
        output, _ = interface(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        if self.observer is not None:
            apart = {} if packing is None else {"packing": packing}
            self.observer(self, query, new_key, new_value, output.transpose(1, 2), padding_mask, **apart, **context)
        return output

    def _cache_layer(self, cache):
        layers = cache.layers
        found = getattr(layers[self.layer_idx], "_layer_type", None) if self.layer_idx < len(layers) else None
        if found != self.cache_layer_type:
            full = self.layer_idx < len(layers) and found is None and layers[self.layer_idx].get_seq_length() > 0
            advice = "; what starts a text with keys and values, as prefix tuning does, goes with softmax layers alone"
            raise ValueError(
                f"layer {self.layer_idx} needs a cache layer {self.cache_layer_type}, the cache has {found}: "
                "build it with DynamicCache(config=model.config), or let generate() do it" + advice * full
            )
        return layers[self.layer_idx]


@functools.cache
def _say_no_dropout(share: float) -> None:
    logger.warning(
        "converted layers train without the attention dropout of %s in config.json, for they have no attention "
        "weights to leave out; softmax layers and the teacher arm have it (set it to 0 there to train all alike)",
        share,
    )


class RotaryAttention(MixerAttention):
    """Goes before a stock attention of Llama's kind: a projection each, rotary embedding, grouped keys and values."""

    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.add_mixer(config, config.num_attention_heads, config.num_key_value_heads)

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        padding_mask=None,
        **kwargs,
    ):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        context = self.context(query, key, hidden_states)
        if kwargs.get("landmarks") is None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        output = self.attend(
            query, key, value, attention_mask, padding_mask, past_key_values, eager_attention_forward,
            context=context, **kwargs,
        )  # fmt: skip
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), None


class MixerModelMixin(EitherCacheName, ModelBase):
    """Goes before a stock PreTrainedModel class: initialisation, arms and backend of the mechanisms.

    Attributes:
        layers_path: of the list of layers in the base model. attention_path: of the attention in a layer.
        too_long: what to do about a text past the last learned position.
        optional_weights: prefixes of names that a teacher's checkpoint may lack.
        auto_classes: name of an Auto class -> of the class that it loads, from the backbone's file.
        key_rotation: method of a base model that rotates, see `RotaryModel`; None in others.
    """

    layers_path, attention_path = "layers", "self_attn"
    too_long = "shorten the text, or generate fewer new tokens"
    optional_weights: tuple[str, ...] = ()
    auto_classes: dict[str, str]
    key_rotation: Any = None
    _is_stateful = True
    _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = False
    _can_compile_fullgraph = False
    _tp_plan: Any = None
    _pp_plan: Any = None
    _ep_plan: Any = None
    _keep_in_fp32_modules_strict: set[str] | list[str] | None = {"mixer"}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OWN_PARAMETERS):
            module.reset_parameters()

    def post_init(self) -> None:
        super().post_init()
        tokens: Any = getattr(self.base_model, "mixer", None)
        if tokens is not None:  # an embedding or another head than the vocabulary's reads the tokens themselves
            tokens.include_in_loss = tokens.output is not None and self.get_output_embeddings() is not None
            if tokens.include_in_loss:
                self.register_forward_hook(forget_call)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As ever, every class of the backbone's file named in the config: any Auto class finds its own in the saved
        code."""
        home = next(kind for kind in type(self).__mro__ if "auto_classes" in vars(kind)).__module__.rpartition(".")[2]
        self.config.auto_map = {auto: f"{home}.{name}" for auto, name in self.auto_classes.items()}
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def max_positions(self) -> int | None:
        """How many positions are learned, which no token can go past; None where they are computed."""
        return self.config.max_position_embeddings if self.config.learned_positions else None

    def check_positions(self, tokens: int) -> None:
        """Refuse a sequence of `tokens` real tokens, landmarks counted, that the learned positions do not reach.

        Raises:
            ValueError: one sentence.
        """
        if self.max_positions is not None and tokens > self.max_positions:
            counted = "" if self.landmarks is None else f", landmarks counted ({self.config.longest_text} are without)"
            raise ValueError(
                f"this model has {self.max_positions} learned positions and was given {tokens} tokens{counted}: "
                f"{self.too_long}"
            )

    def add_landmarks(self) -> None:
        """In the base model's `__init__`: give it landmark tokens if its layers need them."""
        kinds = [self.config.mixer(i) for i in range(self.config.num_hidden_layers)]
        if all(kind is not None and kind.type == "landmark" for kind in kinds):  # in all layers or in none
            reach = max(kind.reach for kind in kinds)
            self.mixer = LandmarkTokens(kinds[0], reach, self.config.hidden_size, self.config.initializer_range)

    @property
    def landmarks(self) -> LandmarkTokens | None:
        """The landmark tokens of a base model, or None where it has none or its layers are in the teacher arm."""
        tokens: Any = getattr(self, "mixer", None)
        return tokens if tokens is not None and getattr(self.attention_modules()[0], "arm", "") != "teacher" else None

    def _loss(self) -> Callable[..., Tensor]:
        tokens: Any = self.base_model.landmarks
        if tokens is None or not tokens.include_in_loss:
            return STOCK_LOSS.fget(self)

        def loss(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **kwargs) -> Tensor:
            if labels is None or shift_labels is not None:
                raise ValueError("published landmark labels need labels, not shift_labels: a landmark is one of them")
            return published_loss(tokens, self.get_output_embeddings(), logits, labels, num_items_in_batch)

        return loss

    # A property with the stock setter: transformers assigns to it where a model has none.
    loss_function = property(_loss, STOCK_LOSS.fset)

    def place_landmarks(
        self, embeddings: Tensor, attention_mask: Tensor | None, cache, packing: Packing | None = None
    ) -> Landmarks:
        """Plan the landmarks of a call of a base model; arguments as its forward has them, embeddings `(B, T, width)`.

        On a GPU this waits once for the number of landmarks.
        """
        batch, tokens, _ = embeddings.shape
        past = None
        if cache is not None and cache.layers and getattr(cache.layers[0], "state", None) is not None:
            past = cache.layers[0].state.count.to(embeddings.device)
        simple = attention_mask is None and packing is None
        if attention_mask is None:
            real = torch.ones(batch, tokens, dtype=torch.bool, device=embeddings.device)
        else:
            real = check_mask(attention_mask, batch, tokens, cache).to(embeddings.device)
            simple = packing is None and not is_tracing() and real.device.type == "cpu" and bool(real.all())
        own: Any = self.landmarks
        landmarks = Landmarks.plan(real, past, own.block_size, simple, packing)
        length = landmarks.position.shape[1]
        # Only a pass that sees all blocks has positions beyond the reach; some tables change with their length.
        whole = self.training or any(getattr(x.mixer, "observer", None) for x in self.mixer_attentions())
        landmarks.rotary = self.rotary_tables(max(own.reach, length) if whole else own.reach, embeddings.device)
        if self.training:  # here and not in a layer, which would draw again where it is checkpointed
            seeds = own.take_row_seeds(batch, real.device)
            landmarks.seeds = seeds if packing is None else draw_words(*packing.rows_and_numbers(seeds))
            landmarks.drawn = uniform(draw_words(landmarks.seeds[:, None], torch.arange(2, device=real.device)))
        return landmarks

    def rotary_tables(self, positions: int, device=None) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines `(positions, D)`, float32, of a base model that rotates; None of one that does not."""
        return None

    def decoder_layers(self) -> list[nn.Module]:
        """The layers in order, converted or not."""
        return list(attrgetter(self.layers_path)(self.base_model))

    def attention_modules(self) -> list[nn.Module]:
        """The attention of every layer in order, converted or not."""
        return [attrgetter(self.attention_path)(layer) for layer in self.decoder_layers()]

    def mixer_attentions(self) -> list[MixerAttention]:
        """The attention modules of the converted layers, in order."""
        return [module for module in self.modules() if isinstance(module, MixerAttention) and hasattr(module, "mixer")]

    def set_arm(self, arm: str) -> None:
        """Switch every converted layer: `mixed`, `teacher`, `softmax` or `linear`."""
        if arm not in ARMS:
            raise ValueError(f"unknown arm {arm!r}: use one of {', '.join(ARMS)}")
        if arm not in (known := self.arms()):
            raise ValueError(f"this model's attention has no arm {arm!r}: use one of {', '.join(known)}")
        for attention in self.mixer_attentions():
            attention.arm = arm

    def arms(self) -> tuple[str, ...]:
        """The arms that every converted layer has: the teacher's, the student's, and its branches alone."""
        mixers: list[Any] = [attention.mixer for attention in self.mixer_attentions()]
        return tuple(arm for arm in ARMS if arm == "teacher" or all(arm in mixer.arms for mixer in mixers))

    @contextlib.contextmanager
    def use_arm(self, arm: str) -> Iterator[None]:
        """Switch within a block, then back."""
        before = [(attention, attention.arm) for attention in self.mixer_attentions()]
        self.set_arm(arm)
        try:
            yield
        finally:
            for attention, previous in before:
                attention.arm = previous

    def set_op_backend(self, backend: str) -> None:
        """Choose the ops' backend at run time; never saved."""
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
        for attention in self.mixer_attentions():
            attention.mixer.op_backend = backend  # type: ignore[assignment]

    @contextlib.contextmanager
    def captured_decoding(self, compile: bool = False) -> Iterator[None]:
        """Within the block, one-token calls with a cache replay a CUDA graph of the whole step; `generate` as ever.

        The first token of a batch size captures the graph. On a CPU the same steps run without one.

        Args:
            compile: also run norms, rotary embedding and gated units through `torch.compile` inside the graph.

        Raises:
            ValueError: the model has softmax layers, whose cache grows, or is in the teacher arm.
        """
        decoding = CapturedDecoding(self, compile)
        restore = replace_forward(self, decoding.forward)
        try:
            yield
        finally:
            restore()
            decoding.close()

    def _prepare_static_cache(self, *args, **kwargs):
        raise ValueError(NO_STATIC_CACHE)

    def mixer_state_dict(self) -> dict[str, Tensor]:
        """The mechanisms' tensors, named as in `state_dict()`."""
        return {name: tensor for name, tensor in self.state_dict().items() if "mixer." in name}

    def load_mixer_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Load what `mixer_state_dict` gave.

        Raises:
            ValueError: tensors are missing or do not belong.
        """
        expected = set(self.mixer_state_dict())
        if expected != set(tensors):
            odd = sorted(expected ^ set(tensors))
            raise ValueError(f"the mechanisms' tensors do not fit this model: {len(odd)} differ, first {odd[0]}")
        self.load_state_dict(tensors, strict=False)


class RotaryModel(ModelBase):
    """Goes before a stock base model of Llama's kind: its layers, and the forward that they share.

    Attributes:
        layer_class: of the decoder layers, made from (config, layer_idx).
    """

    add_landmarks: Any
    layer_class: type[nn.Module]
    embed_tokens: Any
    rotary_emb: Any
    norm: Any

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList([self.layer_class(config, i) for i in range(config.num_hidden_layers)])
        self.add_landmarks()
        self.post_init()

    def rotary_tables(self, positions: int, device=None) -> tuple[Tensor, Tensor]:
        self.rotary_emb.max_seq_len_cached = 0  # dynamic scaling would go on from the longest text that it has seen
        cos, sin = self.rotary_emb(torch.empty(0, device=device), torch.arange(positions, device=device)[None])
        return cos[0], sin[0]

    def key_rotation(self, positions: int) -> Callable[[Tensor], Tensor]:
        """What rotates keys `(B, G, T, D)` that have a position on to one that is `positions` later; not scaled."""
        angles = positions * self.rotary_emb.inv_freq.double()
        cosine, sine = (torch.cat([x, x]) for x in (angles.cos(), angles.sin()))

        def rotate(key: Tensor) -> Tensor:
            wide = key.to(torch.promote_types(key.dtype, torch.float32))
            tables = (x.to(wide)[None, None] for x in (cosine, sine))
            return apply_rotary_pos_emb(wide, wide, *tables)[1].to(key.dtype)

        return rotate

    @base_forward
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        hidden_states, past_key_values, position_ids = start_call(
            self, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache
        )
        causal_mask, padding_mask = layer_masks(
            self, hidden_states, attention_mask, position_ids, past_key_values, kwargs.get("packing")
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        kwargs |= plan_far_sinks(self, hidden_states, padding_mask, past_key_values, kwargs.get("packing"))
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                padding_mask=padding_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                **named(past_key_values),
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **named(past_key_values))
