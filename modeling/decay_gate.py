"""How much of a memory each token keeps: a learned gate per head, as the ops' `log_decay`.

Source: gates from the token, Lizard (2025, arXiv 2507.09025); from the key projection, Liger (2025, arXiv 2503.01496).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

GATES = ("none", "head", "token", "key")


class DecayGate(nn.Module):
    """`log sigmoid(w . x + b)` per head, kept in float32 whatever the model's dtype.

    Args:
        heads: HK, those of the memory.
        width: of x; None leaves w out, so that every token is kept alike.
        start: b at the start, where w is 0.
    """

    def __init__(self, heads: int, width: int | None, start: float):
        super().__init__()
        self.start = start
        weight = None if width is None else nn.Parameter(torch.empty(heads, width, dtype=torch.float32))
        self.weight = weight
        self.bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))

    def reset_parameters(self) -> None:
        init.constant_(self.bias, self.start)
        if self.weight is not None:
            init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The logarithms, `(B, HK, T)` in float32 at least, all <= 0.

        Args:
            x: `(B, heads, T, width)`; heads divides HK. Without w only its shape matters.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            level = self.bias.to(dtype)[None, :, None].expand(x.shape[0], -1, x.shape[2])
            if self.weight is not None:
                weight = self.weight.to(dtype).unflatten(0, (x.shape[1], -1))
                level = level + torch.einsum("bgtd,grd->bgrt", x.to(dtype), weight).flatten(1, 2)
            return functional.logsigmoid(level)
