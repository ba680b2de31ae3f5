"""The two names of a call's cache: `past_key_values` up to transformers 5.23, `cache` from 5.24 on.

The code here says `past_key_values`. What is called from outside takes either name, and what calls transformers' own
layers, functions and outputs asks here for the name that they have.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

NAMES = ("past_key_values", "cache")
CACHE = "past_key_values" if "past_key_values" in BaseModelOutputWithPast.__dataclass_fields__ else "cache"
"""The name in the installed transformers."""


def named(cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a cache to what is transformers' own."""
    return {CACHE: cache}


def either_name(forward: Callable) -> Callable:
    """A forward that takes its cache by both names; one without a cache as it is.

    Raises:
        ValueError: of the forward, a cache under each name.
    """
    parameters = inspect.signature(forward).parameters
    name = next((name for name in NAMES if name in parameters), None)
    if name is None or getattr(forward, "takes_either_name", False):
        return forward
    other = NAMES[1 - NAMES.index(name)]

    @functools.wraps(forward)
    def wrapped(self, *args, **kwargs):
        if other in kwargs:
            cache = kwargs.pop(other)
            if cache is not None and kwargs.get(name) is not None:
                raise ValueError(f"the call has a cache under both names, {name} and {other}: give one")
            if cache is not None:
                kwargs[name] = cache
        return forward(self, *args, **kwargs)

    wrapped.takes_either_name = True  # type: ignore[attr-defined]
    return wrapped


class EitherCacheName:
    """Goes before stock classes: the forward of every subclass takes its cache by both names."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        forward = getattr(cls, "forward", None)
        if forward is not None and (wrapped := either_name(forward)) is not forward:
            cls.forward = wrapped  # type: ignore[attr-defined]
