"""Random numbers that are a fixed function of whole numbers: the same whatever the batch, the call, or the device.

Source: SplitMix64 (Steele, Lea and Flood 2014), in signed 64-bit arithmetic.
"""

import torch
from torch import Tensor

GOLDEN = -7046029254386353131
MULTIPLIERS = (-4658895280553007687, -7723592293110705685)


def draw_words(seed: Tensor, *counters: Tensor | int) -> Tensor:
    """Words of 64 random bits, one for each broadcast tuple of a seed and counters, int64 all."""
    word = _hash(seed + GOLDEN)
    for counter in counters:
        word = _hash(word + GOLDEN + counter)
    return word


def shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of 64-bit words."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniform(words: Tensor) -> Tensor:
    """Numbers in [0, 1), float32, of the words' first 24 bits."""
    return shift(words, 40).to(torch.float32) / 2**24


def _hash(x: Tensor) -> Tensor:
    """SplitMix64's finaliser."""
    x = (x ^ shift(x, 30)) * MULTIPLIERS[0]
    x = (x ^ shift(x, 27)) * MULTIPLIERS[1]
    return x ^ shift(x, 31)
