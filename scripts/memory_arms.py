"""Memories of a bounded state for `state_arms.py`: linear attention with gates, and the delta rule with decay.

A memory takes a token when it leaves the window (never a sink), with its key and value; forgetting is counted from
there, by gates of the tokens that come in meanwhile. What it reads is mixed with the softmax over the window:

- `LinearMemory`: one denominator for both, the window's mass being `exp(log_weight + shift * log-sum-exp)` (OPS.md 1).
  Variants: `feature_gate`, a decay of each feature from a bottleneck of 16 (GLA, arXiv 2312.06635); `output_gate`,
  `sigmoid(W x + b)` on what comes from the memory (HypeNet, arXiv 2601.22156); `short_conv`, a causal depthwise
  convolution of width 4 on what the maps read, started as identity (LAWCAT, arXiv 2509.18467; Mamba, 2312.00752).
- `DeltaMemory`: the gated delta rule (Gated DeltaNet, arXiv 2412.06464; Kimi Linear, 2510.26692; RADLADS, 2505.03005)
  on unit-norm maps of the unrotated queries and keys, `beta = sigmoid(w.x + b)` from the written token's own input.
  Its reading is scaled by a learned factor a channel (an RMS norm in its place was worse in the two layers tried), and
  mixed as `(1 - m) window + m memory`, `m = sigmoid(w.x + b + c * log-sum-exp)`, 0 as long as it is empty. Keys are
  centred before their norm: without that they all point one way, and each write would take the place of the last.

Maps are per head, before position; everything is float32.
Shapes: B batch, H query heads, G key/value heads, T tokens, D head dim, C the model's width.
"""

import math

import torch
from memory_scans import delta_scan, gated_scan
from torch import Tensor, nn
from torch.nn import functional as F

TAPS, BOTTLENECK = 4, 16
RATES = {
    **dict.fromkeys(("query_map", "key_map", "query_magnitude", "key_magnitude", "query_bias", "key_bias"), 1e-2),
    **dict.fromkeys(("query_taps", "key_taps", "mix_level"), 1e-2),
    **dict.fromkeys(("log_weight", "shift", "gate_bias", "beta_bias", "mix_bias", "output_bias", "log_scale"), 3e-2),
    **dict.fromkeys(("gate_weight", "gate_up", "gate_down", "beta_weight", "mix_weight", "output_weight"), 1e-3),
}
"""Learning rates of attention transfer, by a parameter's name."""


def make_memory(heads: int, groups: int, head_dim: int, width: int, hidden: int, variant: str) -> nn.Module:
    """The memory of a `See`, whose state has `2 * width` keys a key/value head."""
    if variant == "delta":
        return DeltaMemory(heads, groups, head_dim, 2 * width, hidden)
    return LinearMemory(heads, groups, head_dim, width, hidden, variant)


def slow_pairs(head_dim: int, width: int) -> Tensor:
    """`(D, width)`: the dimensions that rotate slowest; at a width of 2 D each twice, the second time sharper."""
    if width > head_dim:
        return torch.cat([slow_pairs(head_dim, head_dim), 2 * slow_pairs(head_dim, width - head_dim)], 1)
    pairs = [i for p in range(head_dim // 2 - width // 2, head_dim // 2) for i in (p, p + head_dim // 2)]
    return torch.eye(head_dim)[:, pairs]


class LinearMemory(nn.Module):
    """Softmax maps per query head and key/value head, the window's weight and shift, and the gates."""

    def __init__(self, heads: int, groups: int, head_dim: int, width: int, hidden: int, variant: str = ""):
        super().__init__()
        self.groups, self.variant, self.rounded = groups, variant, False
        eye = slow_pairs(head_dim, width)
        self.query_map = nn.Parameter(eye.repeat(heads, 1, 1))
        self.key_map = nn.Parameter(eye.repeat(groups, 1, 1))
        self.query_magnitude = nn.Parameter(torch.zeros(heads, head_dim))
        self.key_magnitude = nn.Parameter(torch.zeros(groups, head_dim))
        self.log_weight = nn.Parameter(torch.full((heads,), math.log(16.0)))
        self.shift = nn.Parameter(torch.full((heads,), 0.5))
        if variant == "feature_gate":
            self.gate_down = nn.Parameter(torch.randn(BOTTLENECK, hidden) * hidden**-0.5)
            self.gate_up = nn.Parameter(torch.zeros(groups, 2 * width, BOTTLENECK))
            self.gate_bias = nn.Parameter(torch.full((groups, 2 * width), 6.0))
        else:
            self.gate_weight = nn.Parameter(torch.zeros(groups, hidden))
            self.gate_bias = nn.Parameter(torch.full((groups,), 6.0))
        if variant == "output_gate":
            self.output_weight = nn.Parameter(torch.zeros(heads, head_dim, hidden))
            self.output_bias = nn.Parameter(torch.full((heads, head_dim), 3.0))
        if variant == "short_conv":
            taps = torch.zeros(TAPS)
            taps[-1] = 1
            self.query_taps = nn.Parameter(taps.repeat(heads, head_dim, 1))
            self.key_taps = nn.Parameter(taps.repeat(groups, head_dim, 1))

    def features(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        query, key = query.to(self.query_map.dtype), key.to(self.key_map.dtype)
        if self.variant == "short_conv":
            query, key = _short_conv(query, self.query_taps), _short_conv(key, self.key_taps)
        return (
            _features(query, self.query_map, self.query_magnitude),
            _features(key, self.key_map, self.key_magnitude),
        )

    def log_decay(self, hidden: Tensor) -> Tensor:
        """`(B, G, T, 1)`, or `(B, G, T, F)` with a gate a feature."""
        hidden = hidden.to(self.gate_bias.dtype)
        if self.variant == "feature_gate":
            gate = torch.einsum("btr,gfr->bgtf", hidden @ self.gate_down.mT, self.gate_up) + self.gate_bias[:, None]
        else:
            gate = (torch.einsum("btc,gc->bgt", hidden, self.gate_weight) + self.gate_bias[:, None])[..., None]
        return F.logsigmoid(gate)

    def read(self, raw_query, raw_key, value, hidden, window: int, sinks: int) -> Tensor:
        """Numerators and, last, the mass: `(B, H, T, D + 1)`."""
        query, key = self.features(raw_query, raw_key)
        value = value.to(key.dtype)
        value = torch.cat([value, torch.ones_like(value[..., :1])], -1)
        query = query.unflatten(1, (self.groups, -1))
        stream = (entering(x, window, sinks) for x in (key, value))
        return gated_scan(query, *stream, self.log_decay(hidden), rounded=self.rounded).flatten(1, 2)

    def alone(self, read: Tensor, hidden: Tensor) -> Tensor:
        return self.gated(read, hidden) / read[..., -1:].clamp_min(1e-20)

    def mixed(self, read: Tensor, near: Tensor, level: Tensor, hidden: Tensor) -> Tensor:
        mass = (self.log_weight[:, None, None] + self.shift[:, None, None] * level).clamp(-30, 30).exp()
        return (self.gated(read, hidden) + mass * near) / (read[..., -1:] + mass).clamp_min(1e-20)

    def gated(self, read: Tensor, hidden: Tensor) -> Tensor:
        """The numerators, behind the output gate if there is one."""
        if self.variant != "output_gate":
            return read[..., :-1]
        gate = torch.einsum("btc,hdc->bhtd", hidden.to(read.dtype), self.output_weight) + self.output_bias[:, None]
        return read[..., :-1] * gate.sigmoid()


class DeltaMemory(nn.Module):
    """Unit-norm maps per query head and key/value head, beta, a gate, and the mix with the window."""

    def __init__(self, heads: int, groups: int, head_dim: int, width: int, hidden: int):
        super().__init__()
        self.groups = groups
        eye = slow_pairs(head_dim, width)
        self.query_map = nn.Parameter(eye.repeat(heads, 1, 1))
        self.key_map = nn.Parameter(eye.repeat(groups, 1, 1))
        self.query_bias = nn.Parameter(torch.zeros(heads, width))
        self.key_bias = nn.Parameter(torch.zeros(groups, width))
        self.log_scale = nn.Parameter(torch.zeros(heads, head_dim))
        self.gate_weight = nn.Parameter(torch.zeros(groups, hidden))
        self.gate_bias = nn.Parameter(torch.full((groups,), 6.0))
        self.beta_weight = nn.Parameter(torch.zeros(groups, hidden))
        self.beta_bias = nn.Parameter(torch.zeros(groups))
        self.mix_weight = nn.Parameter(torch.zeros(heads, hidden))
        self.mix_bias = nn.Parameter(torch.full((heads,), -2.0))
        self.mix_level = nn.Parameter(torch.zeros(heads))

    @torch.no_grad()
    def start(self, raw_query, raw_key, value, hidden, output: Tensor) -> None:
        """From a first batch: centre the keys, and give each head's reading the size that fits `output` best."""
        self.key_bias.copy_(-torch.einsum("bgtd,gdf->gf", raw_key.float(), self.key_map) / raw_key[:, 0, :, 0].numel())
        read = self.read(raw_query, raw_key, value, hidden, 0, 0)
        size = (read * output).sum((0, 2, 3)) / read.square().sum((0, 2, 3))
        self.log_scale.copy_(size.clamp_min(1e-3).log()[:, None].expand_as(self.log_scale))

    def read(self, raw_query, raw_key, value, hidden, window: int, sinks: int) -> Tensor:
        """What the state says to the queries, scaled; 0 while it is empty: `(B, H, T, D)`."""
        dtype = self.key_map.dtype
        hidden = hidden.to(dtype)
        query = torch.einsum("bhtd,hdf->bhtf", raw_query.to(dtype), self.query_map) + self.query_bias[:, None]
        key = torch.einsum("bgtd,gdf->bgtf", raw_key.to(dtype), self.key_map) + self.key_bias[:, None]
        query = F.normalize(query, dim=-1).unflatten(1, (self.groups, -1))
        gate, beta = (
            (torch.einsum("btc,gc->bgt", hidden, weight) + bias[:, None])[..., None]
            for weight, bias in ((self.gate_weight, self.gate_bias), (self.beta_weight, self.beta_bias))
        )
        stream = [entering(x, window, sinks) for x in (F.normalize(key, dim=-1), value.to(dtype), beta.sigmoid())]
        output = delta_scan(query, *stream[:2], F.logsigmoid(gate), stream[2]).flatten(1, 2)
        return output * self.log_scale.exp()[:, None]

    def alone(self, read: Tensor, hidden: Tensor) -> Tensor:
        return read

    def mixed(self, read: Tensor, near: Tensor, level: Tensor, hidden: Tensor) -> Tensor:
        logit = torch.einsum("btc,hc->bht", hidden.to(read.dtype), self.mix_weight)[..., None]
        share = (logit + self.mix_bias[:, None, None] + self.mix_level[:, None, None] * level).sigmoid()
        share = share * (read.square().sum(-1, keepdim=True) > 0)
        return (1 - share) * near + share * read


def entering(x: Tensor, window: int, sinks: int) -> Tensor:
    """`(..., T, F)` in the order of entry into the memory: what has just left the window, but no sink.

    A window of 0 has no sinks either: each token enters at once.
    """
    if window == 0:
        return x
    return F.pad(x[..., sinks:, :], (0, 0, window + sinks, 0))[..., : x.shape[-2], :]


def _features(x: Tensor, weight: Tensor, magnitude: Tensor) -> Tensor:
    mapped = torch.einsum("bhtd,hdf->bhtf", x, weight)
    both = torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], -1).clamp_min(1e-12)
    return both * torch.einsum("bhtd,hd->bht", x, magnitude).clamp(-10, 10).exp()[..., None]


def _short_conv(x: Tensor, taps: Tensor) -> Tensor:
    """`(B, H, T, D)` with taps `(H, D, TAPS)`, the last for the token itself."""
    before = F.pad(x, (0, 0, TAPS - 1, 0))
    return sum(before[:, :, i : i + x.shape[2]] * taps[:, None, :, i] for i in range(TAPS))  # type: ignore[return-value]
