"""Cache layers: holders of a sequence's state; the attention that owns the state does the arithmetic.

transformers builds them by name from `config.layer_types`. The number in a name is raised with any change of the
layer's fields or methods, so that a checkpoint's own copy of this code and an installed package of another version
never take each other's. They are recognised by that name, never by `isinstance`.
"""

import functools
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from .cache_names import CACHE

NO_STATIC_CACHE = (
    "a converted model has no static cache, for its state never grows: leave cache_implementation or StaticCache out, "
    "and generate within `with model.captured_decoding():` to replay CUDA graphs"
)


def no_static_layer(**kwargs):
    """What a StaticCache of a converted model's config is made of."""
    raise ValueError(NO_STATIC_CACHE)


class Growing:
    """Goes before every layer here: transformers knows their names for no static cache."""

    _layer_type: str | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls._layer_type is not None:
            STATIC_LAYER_TYPE_MAPPING[cls._layer_type] = no_static_layer  # type: ignore[assignment]


class StateLayer(Growing, CacheLayerMixin):
    """A state of constant size: a NamedTuple of tensors (or None), batch first in each.

    Attributes:
        state: None until the first call.
        seen: tokens so far, padding included, as transformers counts them.
        holder: the decoding session whose buffers hold the state for now, or None; asking for `state` takes it back.
        buffers, count: set in a session's own layers, whose state a step changes in place; else None.
    """

    is_compileable = False
    is_sliding = False
    supports_early_init = False
    buffers: Any = None
    count: Tensor | None = None

    def __init__(self, **kwargs):
        super().__init__()
        self._state: Any = None  # a NamedTuple
        self.holder: Any = None
        self.seen = 0

    @property
    def state(self) -> Any:
        if self.holder is not None:
            self.holder.release()
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state, self.holder = state, None

    def lend(self, holder: Any) -> None:
        """Leave the state to `holder`, which has taken it over."""
        self._state, self.holder = None, holder

    def __getstate__(self) -> dict:
        """For copies and pickles, which take the state and no session."""
        return {**self.__dict__, "_state": self.state, "holder": None}

    def store(self, state: Any, new_tokens: int) -> None:
        """Take the state after a call of `new_tokens` tokens."""
        self.state, self.is_initialized, self.device = state, True, state[0].device
        self.seen += new_tokens

    def nbytes(self) -> int:
        """Bytes held."""
        state = self.state
        return 0 if state is None else sum(x.nbytes for x in state if x is not None)

    def _map(self, function) -> None:
        state = self.state
        if state is not None:
            self.state = state._make(None if x is None else function(x) for x in state)

    # What transformers' Cache calls on every layer.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("the state is made by the attention, on its first call")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        raise ValueError(
            "a softmax layer was given the cache of a converted layer: to generate in the teacher arm, pass "
            f"{CACHE}=DynamicCache()"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.is_initialized, self.seen = None, False, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.holder is not None:
            self.holder.reorder_(self, beam_idx)
        else:
            self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device) if isinstance(indices, Tensor) else indices])

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda x: x.to(self.device, non_blocking=True))

    def crop(self, max_length: int) -> None:
        raise RuntimeError("a recurrent state cannot be rolled back: assisted decoding does not work with it")


class LinearStateLayer(StateLayer):
    """The state of hybrid linear attention."""

    _layer_type = "linearize_linear_3"


class GainCellStateLayer(StateLayer):
    """The ring of gain-cell attention."""

    _layer_type = "linearize_gain_cell_1"


class CosineStateLayer(StateLayer):
    """The state of cosine attention: a `CosineMemory`, whose keys are raw, before any feature map."""

    _layer_type = "linearize_cosine_2"


class SalientStateLayer(StateLayer):
    """The window, sinks and kept tokens of salient-token attention."""

    _layer_type = "linearize_salient_1"


class SoftmaxLayer(Growing, DynamicLayer):
    """The growing cache of a layer that stays softmax, with a `reset` that drops it.

    transformers 5.17 resets such a layer to zeros of the old length, which a second prompt then attends to.
    """

    _layer_type = "linearize_softmax_1"

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False


class WindowLayer(Growing, DynamicSlidingWindowLayer):
    """The cache of a softmax layer with a sliding window, with a `reset` that drops it.

    A layer is built by its name alone, so that the name holds the window, and every window has a subclass.
    """

    window: int

    def __init__(self, **kwargs):
        super().__init__(sliding_window=self.window)

    def __reduce__(self):
        """For copies and pickles, which do not find the subclass by its name."""
        return _restored_window_layer, (self.window, self.__dict__.copy())

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.cumulative_length = False, 0


@functools.cache
def softmax_layer(window: int | None) -> type[DynamicLayer]:
    """The cache layer of softmax attention over the last `window` tokens, or over all; transformers knows it then."""
    if window is None:
        return SoftmaxLayer
    fields = {"window": window, "_layer_type": f"linearize_softmax_window_{window}_1"}
    return type("WindowLayer", (WindowLayer,), fields)


def _restored_window_layer(window: int, state: dict) -> DynamicLayer:
    layer = softmax_layer(window)()
    layer.__dict__.update(state)
    return layer
