"""Feature maps: learned, per head, never negative; as data for the ops and as modules for the models.

Sources: `softmax` and `exp`, Hedgehog (Zhang et al. 2024, arXiv 2402.04347), with both signs of the map's output;
`relu`, T2R (Kasai et al. 2021, arXiv 2103.13076); `elu`, Katharopoulos et al. 2020 (arXiv 2006.16236). The magnitude
is this project's: softmax features alone forget how large a query or key is.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

FEATURE_FLOOR = 1e-12
MAGNITUDE_LIMIT = 10.0
WIDTH = {"softmax": 2, "exp": 2, "relu": 1, "elu": 1}  # features per unit of the map's width f

INITIALIZATIONS = ("identity", "identity_first", "kaiming")


class FeatureMapWeights(NamedTuple):
    """A feature map as data, from which the op computes features.

    Fields: weight `(H|G, D, f)`; bias `(H|G, f)` or None; magnitude `(H|G, D)` or None; activation, one of
    `softmax`, `exp` (F = 2f) and `relu`, `elu` (F = f).
    """

    weight: Tensor
    bias: Tensor | None
    magnitude: Tensor | None
    activation: str


def apply_feature_map(x: Tensor, maps: FeatureMapWeights, floor: float = FEATURE_FLOOR) -> Tensor:
    """Compute features in float32 at least.

    Args:
        x: `(B, heads, T, D)`; heads divides the map's heads (a key head's features per query head need no copy of x).
        floor: the least feature; 0 where vectors of features are normalised, which would make it a direction.

    Returns:
        `(B, map heads, T, F)`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    _, heads, _, dim = x.shape
    x = x.to(dtype)
    weight = maps.weight.to(dtype).view(heads, -1, dim, maps.weight.shape[-1])
    u = torch.einsum("bgtd,grdf->bgrtf", x, weight)
    if maps.bias is not None:
        u = u + maps.bias.to(dtype).view(heads, -1, 1, u.shape[-1])
    if maps.activation == "softmax":
        features = torch.cat([u.softmax(-1), (-u).softmax(-1)], dim=-1)
    elif maps.activation == "exp":
        features = torch.cat([(u - u.amax(-1, True)).exp(), (u.amin(-1, True) - u).exp()], dim=-1)
    elif maps.activation == "relu":
        features = u.relu()
    elif maps.activation == "elu":
        features = 1 + functional.elu(u)
    else:
        raise ValueError(f"unknown feature map activation {maps.activation!r}: use softmax, exp, relu or elu")
    if floor:
        features = features.clamp(min=floor)
    if maps.magnitude is not None:
        magnitude = maps.magnitude.to(dtype).view(heads, -1, dim)
        level = torch.einsum("bgtd,grd->bgrt", x, magnitude).clamp(-MAGNITUDE_LIMIT, MAGNITUDE_LIMIT)
        features = features * level.exp()[..., None]
    return features.flatten(1, 2)


def feature_width(maps: FeatureMapWeights) -> int:
    """F, the number of features that a map gives."""
    return WIDTH[maps.activation] * maps.weight.shape[-1]


class FeatureMap(nn.Module):
    """One learned map per head, kept in float32 whatever the model's dtype.

    Args:
        heads: maps to learn: H, or G when a group of query heads shares one key map.
        head_dim: D.
        feature_dim: f, the map's width, at most D for the identity.
        activation: `softmax`, `exp`, `relu` or `elu`.
        bias, magnitude: whether to learn a bias per feature, and a direction that scales a token's features.
        initialization: `identity`, `identity_first` or `kaiming`.
    """

    def __init__(self, heads, head_dim, feature_dim, activation, bias, magnitude, initialization):
        super().__init__()
        self.activation, self.initialization = activation, initialization
        self.weight = nn.Parameter(torch.empty(heads, head_dim, feature_dim, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(heads, feature_dim, dtype=torch.float32)) if bias else None
        self.magnitude = nn.Parameter(torch.empty(heads, head_dim, dtype=torch.float32)) if magnitude else None

    def forward(self, x: Tensor) -> FeatureMapWeights:
        """The map as data, from which an op computes features of x.

        Parameters are read inside a forward of their own module, where weights that are offloaded, partitioned or
        adapted are there; x itself is not read, but the modules that adapters put around this one pass one on.
        """
        return FeatureMapWeights(self.weight, self.bias, self.magnitude, self.activation)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Identity: feature i is the dimension that `identity_dimensions` gives, or dimension i; Kaiming: uniform,
        fan-in D f."""
        head_dim, feature_dim = self.weight.shape[1:]
        if self.initialization != "kaiming":
            eye = torch.zeros(head_dim, feature_dim, dtype=self.weight.dtype, device=self.weight.device)
            first = self.initialization == "identity_first"
            rows = torch.arange(feature_dim) if first else identity_dimensions(head_dim, feature_dim)
            rows = rows.to(self.weight.device)
            eye[rows, torch.arange(feature_dim, device=self.weight.device)] = 1.0
            init.copy_(self.weight, eye.expand_as(self.weight))
        else:
            bound = (6 / (head_dim * feature_dim)) ** 0.5
            init.uniform_(self.weight, -bound, bound)
        for parameter in (self.bias, self.magnitude):
            if parameter is not None:
                init.zeros_(parameter)


def identity_dimensions(head_dim: int, feature_dim: int) -> Tensor:
    """The dimensions that a narrow identity keeps: whole RoPE pairs (i, i + D/2), the slowest pairs first.

    The published choice, the first f dimensions, keeps one half of every pair when f = D/2.
    """
    if feature_dim >= head_dim:
        return torch.arange(head_dim)[:feature_dim]
    half = head_dim // 2
    pairs = torch.arange(half - (feature_dim + 1) // 2, half)
    return torch.cat([pairs, pairs + half])[:feature_dim]
