"""What is measured at the end of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from linearize.config.values import convert_fields, require


@dataclass
class LengthConfig:
    """What is scored by length at the end of a run."""

    length_tokens: int | None = None
    """Tokens of each text to score at 1, 4 and 8 times the trained length; none: 65,536, on a CPU 8,192; 0: not
    measured."""
    foreign_texts: str | list[str] | None = None
    """Path(s) of text of other domains, each scored at these lengths too."""

    def __post_init__(self) -> None:
        convert_fields(self, "evaluation")
        require(
            self.length_tokens is None or self.length_tokens >= 0,
            f"evaluation.length_tokens is {self.length_tokens}, but it must be none or at least 0.",
        )
        require(
            self.foreign_texts is None or self.length_tokens != 0,
            "evaluation.foreign_texts are scored by length alone: leave evaluation.length_tokens 0 out.",
        )


@dataclass
class EvaluationConfig(LengthConfig):
    """What is measured at the end of a run."""

    texts: str | list[str] | None = None
    """Path(s) of text to take the perplexity on; none: the validation documents."""
    max_tokens: int = 65_536
    """Tokens of text to score."""
    sequence_length: int | None = None
    """Tokens of one scored sequence; none: that of the training data."""
    yardstick: bool = False
    """Train the teacher by the same stage 2, which takes as long again, and compare the student by length with that;
    else with the untouched teacher."""
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
        super().__post_init__()
        for key in ("max_tokens", "batch_size"):
            require(getattr(self, key) >= 1, f"evaluation.{key} is {getattr(self, key)}, but it must be at least 1.")
        require(
            self.sequence_length is None or self.sequence_length >= 2,
            f"evaluation.sequence_length is {self.sequence_length}, but it must be none or at least 2.",
        )
        require(
            self.limit is None or self.limit >= 1,
            f"evaluation.limit is {self.limit}, but it must be none or at least 1.",
        )
