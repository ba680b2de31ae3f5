"""What a bounded attention reads, in chunks: linear memories, the delta rule, and the softmax of a window.

All work is linear in tokens. `check_scans` compares each with a loop over single tokens in float64.

Shapes: B batch, G key/value heads, R query heads a key/value head, T tokens, F width of queries and keys, E of values,
C tokens of a chunk, n chunks.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
"""Queries of a window's block."""
DELTA_CHUNK = 64
"""Tokens of a chunk of the delta rule."""


def gated_scan(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, rounded: bool = False) -> Tensor:
    """Linear attention with decay: `S_t = a_t S_{t-1} + k_t v_t^T`, read as `q_t S_t`.

    Args:
        query: `(B, G, R, T, F)`.
        key: `(B, G, T, F)`.
        value: `(B, G, T, E)`.
        log_decay: log a, at most 0: `(B, G, T, 1)`, or `(B, G, T, F)` with a gate a feature (GLA, arXiv 2312.06635).
        rounded: the state is rounded to bfloat16 after each chunk of 16 tokens, as if it were stored so.

    Returns:
        `(B, G, R, T, E)`.
    """
    length = query.shape[-2]
    features = log_decay.shape[-1]
    chunk = 16 if rounded else 64 if features == 1 else 32
    query, key, value, log_decay = (_chunks(x, chunk) for x in (query, key, value, log_decay))
    sums = log_decay.cumsum(-2)
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=query.device).tril()
    decay = (sums[..., :, None, :] - sums[..., None, :, :]).masked_fill(~causal[..., None], -1e9).exp()
    if features == 1:
        inside = (query @ key.mT[:, :, None]) * decay[:, :, None, ..., 0]
    else:  # (B, G, n, C, C, F): a factored form would overflow where a feature forgets fast
        inside = torch.einsum("bgrnif,bgnijf->bgrnij", query, key[..., None, :, :] * decay)
    last = sums[..., -1:, :]
    added = (key * (last - sums).exp()).mT @ value
    kept = last.exp().mT.expand_as(added)
    state = torch.zeros_like(added[:, :, 0])
    states = []
    for i in range(added.shape[2]):
        states.append(state)
        state = torch.addcmul(added[:, :, i], state, kept[:, :, i])
        state = state.bfloat16().to(value.dtype) if rounded else state
    outside = (query * sums.exp()[:, :, None]) @ torch.stack(states, 2)[:, :, None]
    return (inside @ value[:, :, None] + outside).flatten(3, 4)[..., :length, :]


def delta_scan(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """The delta rule with decay: `S_t = a_t (1 - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T`, read as `q_t S_t`.

    Gated DeltaNet (arXiv 2412.06464, section 3.3): within a chunk what is written solves a unit triangular system (the
    UT transform), and only the state between chunks is sequential.

    Args:
        query: `(B, G, R, T, F)`.
        key: of length 1, `(B, G, T, F)`.
        value: `(B, G, T, E)`.
        log_decay: log a, at most 0, `(B, G, T, 1)`.
        beta: from 0 to 1, `(B, G, T, 1)`; a token of beta 0 writes nothing.

    Returns:
        `(B, G, R, T, E)`.
    """
    length = query.shape[-2]
    query, key, value, log_decay, beta = (_chunks(x, DELTA_CHUNK) for x in (query, key, value, log_decay, beta))
    sums = log_decay.cumsum(-2)
    causal = torch.ones(DELTA_CHUNK, DELTA_CHUNK, dtype=torch.bool, device=query.device).tril()
    decay = (sums - sums.mT).masked_fill(~causal, -1e9).exp()
    system = (beta * (key @ key.mT) * decay).tril(-1)
    given = torch.cat([beta * value, beta * sums.exp() * key], -1)
    solved = torch.linalg.solve_triangular(system, given, upper=False, unitriangular=True)
    fresh, read = solved.split([value.shape[-1], key.shape[-1]], -1)
    inside = (query @ key.mT[:, :, None]) * decay[:, :, None]
    outside = query * sums.exp()[:, :, None]
    last = sums[..., -1:, :]
    carried = (key * (last - sums).exp()).mT
    state = torch.zeros_like(carried[:, :, 0] @ value[:, :, 0])
    outputs = []
    for i in range(key.shape[2]):
        written = fresh[:, :, i] - read[:, :, i] @ state
        outputs.append(inside[:, :, :, i] @ written[:, :, None] + outside[:, :, :, i] @ state[:, :, None])
        state = last[:, :, i].exp() * state + carried[:, :, i] @ written
    return torch.cat(outputs, 3)[..., :length, :]


def window_read(query: Tensor, key: Tensor, value: Tensor, window: int, sinks: int) -> tuple[Tensor, Tensor]:
    """Softmax over the last `window` tokens and the first `sinks`: `(B, G, R, T, E)` and its log-sum-exp
    `(B, G, R, T, 1)`, float32, from query `(B, G, R, T, F)`, key `(B, G, T, F)` and value `(B, G, T, E)`."""
    length = query.shape[-2]
    query = _chunks(query, BLOCK)
    place = torch.arange(query.shape[3] * BLOCK, device=query.device).view(-1, BLOCK)
    near = place[:, :1] - window + 1 + torch.arange(BLOCK + window - 1, device=query.device)
    first = torch.arange(min(sinks, length), device=query.device).expand(len(near), -1)
    distance = place[:, :, None] - near[:, None]
    in_window = (distance >= 0) & (distance < window) & (near >= sinks)[:, None]  # a sink has a column of its own
    seen = torch.cat([place[:, :, None] >= first[:, None], in_window], -1)
    columns = torch.cat([first, near], 1).clamp(0, length - 1)
    scores = (query @ key[:, :, columns].mT[:, :, None]).float() * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen, -1e9)
    level = scores.logsumexp(-1, keepdim=True)
    output = (scores - level).exp() @ value[:, :, columns].float()[:, :, None]
    return tuple(x.flatten(3, 4)[..., :length, :] for x in (output, level))  # type: ignore[return-value]


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """`(..., T, F)` to `(..., n, C, F)`, with zeros after the end."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % chunk)).unflatten(-2, (-1, chunk))


def check_scans(length: int = 300) -> dict[str, float]:
    """Largest difference from a loop over tokens, or from masked softmax attention, float64."""
    torch.manual_seed(0)
    groups, repeat, width, dim = 2, 3, 8, 5

    def normal(*shape):
        return torch.randn(2, groups, *shape, dtype=torch.float64)

    query, key, value = normal(repeat, length, width), normal(length, width), normal(length, dim)
    key = F.normalize(key, dim=-1)
    beta, scalar, features = normal(length, 1).sigmoid(), normal(length, 1) - 1, normal(length, width) - 1
    results = {}
    for name, log_decay in (("scalar gate", scalar), ("feature gate", features)):
        log_decay = F.logsigmoid(3 * log_decay)
        got = gated_scan(query, key, value, log_decay)
        results[name] = difference(got, _loop(query, key, value, log_decay, None))
    log_decay = F.logsigmoid(scalar)
    results["delta"] = difference(
        delta_scan(query, key, value, log_decay, beta), _loop(query, key, value, log_decay, beta)
    )
    wide = normal(repeat, length, width), normal(length, width)
    output, level = window_read(*wide, value, 37, 4)
    place = torch.arange(length)
    distance = place[:, None] - place
    seen = (distance >= 0) & ((distance < 37) | (place < 4))
    scores = (wide[0] @ wide[1].mT[:, :, None] * width**-0.5).masked_fill(~seen, -torch.inf)
    results["window"] = difference(output, scores.softmax(-1) @ value[:, :, None])  # its scores are float32
    results["window, log-sum-exp"] = difference(level, scores.logsumexp(-1, keepdim=True))
    return results


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _loop(query, key, value, log_decay, beta) -> Tensor:
    state = torch.zeros_like(key[:, :, 0, :, None] * value[:, :, 0, None])
    outputs = []
    for t in range(key.shape[2]):
        k, v = key[:, :, t, :, None], value[:, :, t, None]
        state = log_decay[:, :, t, :, None].exp() * state
        written = v if beta is None else beta[:, :, t, :, None] * (v - k.mT @ state)
        state = state + k @ written
        outputs.append(query[:, :, :, t] @ state)
    return torch.stack(outputs, 3)
