"""How tables and plots name a length, a depth and a noise."""

from linearize.config.sizes import KILO


def length_label(tokens: int) -> str:
    """32768 -> "32k", 1000 -> "1,000": what is no whole number of 1024 stays as it is."""
    return f"{tokens // KILO}k" if tokens and tokens % KILO == 0 else f"{tokens:,}"


def depth_label(depth: int, depths: int) -> str:
    """Bin 1 of 10 -> "10-20%"."""
    return f"{100 * depth / depths:.0f}-{100 * (depth + 1) / depths:.0f}%"


def describe(noise: dict[str, float]) -> str:
    """The kinds that are not 0, as `parse_noise` reads them."""
    return ", ".join(f"{kind}={deviation:g}" for kind, deviation in noise.items() if deviation) or "0"
