"""How a package of kernels offers its Triton code: loaded on the first call, so that nothing needs Triton before."""

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType


def on_first_use(package: str) -> tuple[Callable[..., str | None], Callable]:
    """`unsupported` and `fused` of a package whose submodule `fused` defines both."""

    @functools.cache
    def load() -> ModuleType:
        module = importlib.import_module(".fused", package)
        sys.modules[package].fused = module.fused  # type: ignore[attr-defined]  # importing it bound its name there
        return module

    def unsupported(*args, **kwargs) -> str | None:
        """Say why `fused` cannot do this call (arguments of the public function), or None when it can."""
        from .triton_support import unavailable

        return unavailable(*args[:3]) or load().unsupported(*args, **kwargs)

    def fused(*args, **kwargs):
        """Run the Triton kernels; they are loaded on first use."""
        return load().fused(*args, **kwargs)

    return unsupported, fused
