"""What is measured on held-out text after each stage and at the end of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from linearize.config.values import convert_fields, require


@dataclass
class EvaluationConfig:
    """What is measured on held-out text after each stage and at the end of a run."""

    length_tokens: int | None = None
    """Tokens of each text to score at 1, 4 and 8 times the trained length; none: 65,536, on a CPU 8,192; 0: not
    measured."""
    foreign_texts: str | list[str] | None = None
    """Path(s) of text of other domains, each scored at these lengths too."""
    texts: str | list[str] | None = None
    """Path(s) of text to measure on; none: the validation documents."""
    max_tokens: int = 65_536
    """Tokens of text to score."""
    sequence_length: int | None = None
    """Tokens of one scored sequence; none: that of the training data."""
    pairs: int = 1000
    """Of an encoder, whose sentence embeddings are compared with its teacher's: pairs of neighbours at most."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of the lm-eval harness, e.g. piqa,arc_easy."""
    include_path: str | None = None
    """Folder with the harness's own or local task files."""
    limit: int | None = None
    """Documents per task; none: all."""
    controls: bool = True
    """Measure the teacher, the training-free window and the single branches too."""
    batch_size: int = 1
    """Sequences (or requests of the harness) scored together."""

    def __post_init__(self) -> None:
        convert_fields(self, "evaluation")
        for key in ("max_tokens", "batch_size", "pairs"):
            require(getattr(self, key) >= 1, f"evaluation.{key} is {getattr(self, key)}, but it must be at least 1.")
        for key, least in (("length_tokens", 0), ("sequence_length", 2), ("limit", 1)):
            value = getattr(self, key)
            require(
                value is None or value >= least,
                f"evaluation.{key} is {value}, but it must be none or at least {least}.",
            )
        require(
            self.foreign_texts is None or self.length_tokens != 0,
            "evaluation.foreign_texts are scored by length alone: leave evaluation.length_tokens 0 out.",
        )
