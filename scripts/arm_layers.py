"""Which layer sees what in each arm of `measure_state_arms.py`.

All arms but the teacher, `soft...` and `landmark...` hold as many bytes a layer as `uniform`: 4 sinks and a window of
444. A memory's bytes are taken from the window; kept tokens' places (an int32 each) are not, 0.8% more.

- `memory`, `memory_bf16`, `wide64`, `wide128`, `window_dropout`, `feature_gate`, `output_gate`, `short_conv`, `delta`:
  one memory in every layer beside a window (`memory_arms.py`, `state_arms.py`).
- `kept`, `kept_memory`: kept tokens as the survey chose them, without and with a memory.
- `placed...`: windows (`placed_kept`: and kept tokens) by the survey, as bytes are worth most.
- `softN`, `softN_memory`, `softN_kept`: softmax in the N layers of the largest divergence at 256 tokens, in all others
  a window of 252, with a memory, or kept tokens; `landmarkN_kept`: in those N a window of 252 and 14 blocks of 64.
"""

import json
from dataclasses import replace
from pathlib import Path

from memory_arms import TAPS
from state_arms import See

BUDGET = 448
"""Tokens of exact bf16 keys and values whose bytes an average layer may hold."""
SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
MAPS = 32
"""Width of the memory's maps."""
FOLD = 16
"""Tokens that wait beside the window until they are added to sums in bf16 at once."""


def place(
    report: dict, shape: tuple[int, int], table: str, kinds: str, budget: int, memory: See | None = None
) -> list[See]:
    """Spend `budget` bytes on all layers: from the least option of each, always the step of the largest fall of
    `table` a byte (along the lower convex hull of its options); with `memory`, every layer pays for one besides."""
    options = [See(**option) for option in report["options"]]
    extra = memory.state_bytes(*shape, 0) if memory else 0
    sizes = [option.state_bytes(*shape, 10**9) for option in options]
    allowed = [i for i, option in enumerate(options) if kinds == "both" or option.kept == 0]
    costs = report[table]
    chosen = [min(allowed, key=lambda i: sizes[i])] * len(costs)
    left = budget - sum(sizes[i] + extra for i in chosen)
    while True:
        steps = [
            ((row[now] - row[i]) / (sizes[i] - sizes[now]), layer, i)
            for layer, (row, now) in enumerate(zip(costs, chosen, strict=True))
            for i in allowed
            if sizes[i] > sizes[now] and sizes[i] - sizes[now] <= left and row[i] < row[now]
        ]
        if not steps:
            break
        _, layer, i = max(steps)
        left -= sizes[i] - sizes[chosen[layer]]
        chosen[layer] = i
    placed = [options[i] for i in chosen]
    return [replace(see, memory=memory.memory) for see in placed] if memory else placed


def arm_layers(data: Path, shape: tuple[int, int], heads: int, layers: int, name: str) -> list[See | None]:
    """What each layer sees in the arm of this name.

    Args:
        data: holds `survey.json` (all but the simplest arms need it).
        shape: key/value heads and head dim.
        heads: query heads.
        layers: how many there are.
        name: the arm's.
    """
    path = data / "survey.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    kept = See(**report["kept"]) if report else See()
    thin = See(memory=MAPS)
    memories = {
        "memory": thin,
        "memory_bf16": replace(thin, memory_bytes=2, spare=FOLD * shape[0] * shape[1] * 4),
        "wide64": replace(thin, memory=64),
        "wide128": replace(thin, memory=128),
        "window_dropout": replace(thin, window_dropout=0.5),
        "feature_gate": replace(thin, variant="feature_gate"),
        "output_gate": replace(thin, variant="output_gate"),
        # the last queries before this one; the keys are in the window
        "short_conv": replace(thin, variant="short_conv", spare=(TAPS - 1) * heads * shape[1] * 2),
        # beta of each token in the window, bf16
        "delta": replace(thin, variant="delta", spare=BUDGET * shape[0] * 2),
    }
    if name in memories:
        return [beside(memories[name], BUDGET - 4, shape)] * layers
    others = {
        "teacher": None,
        "uniform": See(BUDGET - 4),
        "kept": kept,
        "kept_memory": beside(replace(kept, memory=MAPS), kept.window, shape),
    }
    if name in others:
        return [others[name]] * layers
    base, _, beyond = name.partition("_")
    for kind, far in (("soft", None), ("landmark", See(252, blocks=14))):
        if base.startswith(kind) and base[len(kind) :].isdigit():
            rest = {"": See(252), "memory": replace(thin, window=252), "kept": kept}[beyond]
            return hybrid(report, layers, int(base[len(kind) :]), rest, far)
    placements = {
        "placed": ("divergence", "window", None),
        "placed_error": ("error", "window", None),
        "placed_memory": ("divergence", "window", thin),
        "placed_kept": ("divergence", "both", None),
        "placed_kept_memory": ("divergence", "both", thin),
    }
    if name not in placements:
        raise SystemExit(f"there is no arm {name!r}: see the first lines of arm_layers.py")
    budget = layers * See(BUDGET - 4).state_bytes(*shape, 10**9)
    return place(report, shape, *placements[name][:2], budget, placements[name][2])  # type: ignore[return-value]


def beside(memory: See, window: int, shape: tuple[int, int]) -> See:
    """The memory beside a window that is shorter by as many tokens as the memory's bytes would hold."""
    alone = replace(memory, window=1, sinks=0, kept=0).state_bytes(*shape, 0)
    return replace(memory, window=window - -(-alone // (shape[0] * shape[1] * 4)))


def hybrid(report: dict, layers: int, count: int, others: See, far: See | None) -> list[See | None]:
    """`far` in the `count` layers of the largest divergence at 256 tokens; None is softmax over everything."""
    column = SIZES.index(256)
    worst = sorted(range(layers), key=lambda i: report["divergence"][i][column])[-count:]
    return [far if i in worst else others for i in range(layers)]
