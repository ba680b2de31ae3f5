"""Which mechanism goes with which backbone and what a pair can do, from the registries and the checks of the pipeline.

`scripts/write_pairs_table.py` puts the table into the README.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoModelForMaskedLM

from linearize.conversion.students import refuse_encoder, student_config
from linearize.errors import UserError
from linearize.modeling import ATTENTIONS, BACKBONES, backbone_of, is_encoder
from linearize.stages.adaptation import MECHANISM
from linearize.stages.calibration import calibrates
from linearize.stages.transfer import check_transfers

BEGIN, END = "<!-- pairs: scripts/write_pairs_table.py -->", "<!-- end of pairs -->"
"""What the table stands between."""


@dataclass(frozen=True)
class Pair:
    """A mechanism on a backbone, by their names in the registries."""

    mechanism: str
    backbone: str
    stages: tuple[str, ...] = ()
    """Names in `STAGES` of what can train it, in the order of a run."""
    cache: str | None = None
    """While it generates, `constant` or `growing`; None of an encoder, which does not."""
    refusal: str | None = None
    """The sentence that ends its conversion; None of a valid pair."""

    @property
    def cell(self) -> str:
        """In a few words."""
        if self.refusal is None:
            return ", ".join(self.stages)
        one_way = BACKBONES[self.backbone].encoder and not ATTENTIONS[self.mechanism].bidirectional
        return "no: causal only" if one_way else "no"


def _transfers(config: Any) -> bool:
    return all(_allowed(check_transfers, kind) for kind in _kinds(config))


def _decodes(config: Any) -> bool:
    return _allowed(refuse_encoder, "", config)


def _finds_hidden_tokens(config: Any) -> bool:
    return is_encoder(config) and AutoModelForMaskedLM in backbone_of(config).models


STAGES: dict[str, Callable[[Any], bool]] = {
    "calibration": calibrates,
    "transfer": _transfers,
    "adaptation": lambda config: MECHANISM in _kinds(config),
    "LoRA": _decodes,
    "all weights": _decodes,
    "masked words": _finds_hidden_tokens,
    "embeddings": is_encoder,
}
"""Stage -> whether a converted model of a config has it: numbers of the mechanism fitted to softmax attention;
attention transfer; scalers of gain cells fitted to other cells; adapters; all weights on the next token; of an
encoder, all weights on hidden words, or on the teacher's sentence embeddings."""


def pairs() -> Iterator[Pair]:
    """All pairs, mechanism by mechanism."""
    for mechanism in ATTENTIONS:
        for backbone in BACKBONES:
            yield make_pair(mechanism, backbone)


def make_pair(mechanism: str, backbone: str) -> Pair:
    """What a mechanism with its default settings can do on a backbone.

    Raises:
        KeyError: one of them is unknown.
    """
    teacher, entry = AutoConfig.for_model(backbone), ATTENTIONS[mechanism]
    kind = BACKBONES[backbone].config
    try:
        student = student_config(teacher, kind, {"type": mechanism}, None, None, (), "keep")
    except UserError as error:
        return Pair(mechanism, backbone, refusal=str(error))
    stages = tuple(name for name, has in STAGES.items() if has(student))
    cache = "constant" if entry.constant_state else "growing"
    return Pair(mechanism, backbone, stages, None if is_encoder(student) else cache)


def pairs_table() -> str:
    """All pairs in Markdown."""
    rows = [["mechanism", *BACKBONES, "cache"], ["---"] * (len(BACKBONES) + 2)]
    for mechanism in ATTENTIONS:
        row = [make_pair(mechanism, backbone) for backbone in BACKBONES]
        caches = dict.fromkeys(pair.cache for pair in row if pair.cache is not None)
        rows.append([mechanism, *(pair.cell for pair in row), ", ".join(caches)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def with_table(text: str) -> str:
    """A text with the table in its place.

    Raises:
        ValueError: it has no such place.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no place for the table of pairs: put {BEGIN} and {END} where it belongs")
    return f"{before}{BEGIN}\n\n{pairs_table()}\n\n{END}{after}"


def _kinds(config: Any) -> set[str]:
    """The mechanisms of a converted model."""
    return {settings["type"] for settings in config.mixers.values()}


def _allowed(check: Callable[..., None], *arguments: Any) -> bool:
    """Whether a check lets something pass."""
    try:
        check(*arguments)
    except UserError:
        return False
    return True
