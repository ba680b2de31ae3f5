"""The one place that looks for kernels: which implementation of an op runs a call.

A converted repository ships this file without the kernels; there, and where an installed package keeps another
contract, the chunked PyTorch path beside each op does the work.
"""

import functools
import importlib
import logging
import os
from types import ModuleType
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "chunked", "triton")
BACKEND_VARIABLE = "LINEARIZE_OP_BACKEND"


@functools.cache
def find_kernel(op: str, contract: int) -> tuple[ModuleType | None, str]:
    """Import `linearize.kernels.<op>`, once.

    Returns:
        The module and an empty string, or None and the reason.
    """
    try:
        kernel = importlib.import_module(f"linearize.kernels.{op}")
    except ModuleNotFoundError as error:
        if error.name in ("linearize", "linearize.kernels", f"linearize.kernels.{op}"):
            return None, "linearize, which brings the kernels, is not installed"
        return None, _broken(error)
    except ImportError as error:
        return None, _broken(error)
    if kernel.CONTRACT != contract:
        reason = f"the installed linearize keeps contract {kernel.CONTRACT} of {op}, this code keeps {contract}"
        return None, reason
    return kernel, ""


def find_decoding(op: str, contract: int, backend: str, on_gpu: bool) -> ModuleType | None:
    """The module with the kernel of a one-token step in place, or None where the ordinary op does the step; arguments
    as in `choose_backend`."""
    if backend == "auto":
        backend = os.environ.get(BACKEND_VARIABLE, "auto")
    if backend not in ("auto", "triton") or (backend == "auto" and not on_gpu):
        return None
    kernels, _ = find_kernel(op, contract)
    if kernels is None:
        return None
    try:
        return importlib.import_module(f"{kernels.__name__}.decode")
    except ImportError:
        return None


def check_contract(name: str, saved: int, supported: int, oldest: int | None = None) -> None:
    """Refuse a checkpoint of another contract of an op than `supported`, or than those from `oldest` on; name as in
    "linear attention"."""
    if not (supported if oldest is None else oldest) <= saved <= supported:
        raise ValueError(
            f"this checkpoint was saved with contract {saved} of {name} and this version of linearize supports "
            f"{supported}: load it with trust_remote_code=True where linearize is not installed"
        )


def take_contract(settings: Any, name: str, contract: int, contract_1: dict[str, Any]) -> None:
    """Bring a mechanism's settings of contract 1 or 2 to the second.

    Args:
        contract_1: settings that a config.json of contract 1 lacks, with what they mean there, whatever the class's
            defaults are.

    Raises:
        ValueError: another contract, or settings that contract 1 did not know.
    """
    check_contract(name, settings.contract, contract, oldest=1)
    if settings.contract != 1:
        return
    for field, value in contract_1.items():
        if getattr(settings, field) not in (None, value):
            raise ValueError(
                f"{field} is {getattr(settings, field)!r}, and contract 1 of {name} knows {value} alone: "
                f"set contract to {contract}"
            )
        setattr(settings, field, value)
    settings.contract = contract


def check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse queries `(B, H, T, D)`, keys and values `(B, G, T, D)` that do not fit each other."""
    check_heads(query, key)
    if key.shape != value.shape or query.shape[2:] != key.shape[2:]:
        raise ValueError(
            "query, key and value must have the same tokens and width, key and value the same heads: "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )


def check_heads(query: Tensor, key: Tensor) -> None:
    """Refuse query heads that do not divide among the key heads."""
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads do not divide among {key.shape[1]} key heads")


def _broken(error: ImportError) -> str:
    return f"the installed linearize is broken ({error})"


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)


def choose_backend(op: str, contract: int, backend: str, on_gpu: bool, args: tuple, kwargs: dict):
    """Pick the implementation of one call.

    Args:
        backend: one of `BACKENDS`; `auto` gives way to the environment variable `LINEARIZE_OP_BACKEND`.
        on_gpu: whether the tensors are on a GPU; only then does `auto` look for kernels.
        args, kwargs: the arguments of the call, which `unsupported` judges.

    Returns:
        A callable with the op's arguments, or None for the chunked path.

    Raises:
        ValueError: an explicit backend is unknown, missing, or cannot do the call.
    """
    if backend == "auto":
        backend = os.environ.get(BACKEND_VARIABLE, "auto")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "chunked" or (backend == "auto" and not on_gpu):
        return None
    kernel, reason = find_kernel(op, contract)
    if backend == "reference" and kernel is not None:
        return kernel.reference
    if kernel is not None:
        try:  # which loads the Triton kernels, on first use
            reason = kernel.unsupported(*args, **kwargs)
        except ImportError as error:
            reason = _broken(error)
        if reason is None:
            return kernel.fused
    if backend != "auto":
        raise ValueError(f"backend {backend!r} cannot run this call of {op}: {reason}")
    warn_once(f"{op} runs its chunked PyTorch path on the GPU: {reason}")
    return None
