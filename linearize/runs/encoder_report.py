"""What a run of an encoder measures on held-out sentences: its embeddings beside the teacher's, and hidden tokens."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from linearize.evaluation.arms import has_branches, is_student
from linearize.evaluation.embeddings import TEACHER, EmbeddingEvaluation, EmbeddingReport
from linearize.files import write_file
from linearize.runs.report import CONVERTED, after

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from linearize.config.evaluation import EvaluationConfig

STUDENT = "student"
ARMS = {"softmax": "student, window and sinks alone", "linear": "student, linear branch alone"}
FINISHED = (STUDENT, *ARMS.values())
"""Rows of the finished model."""


class EncoderReport:
    """The measurements of one run; the first model is what the others are compared with.

    Args:
        config: What to measure.
        documents: Held-out texts.
        tokenizer: Of the model.
        max_length: Tokens of a sentence at most.
        rows: Validation rows for the perplexity of hidden tokens.
        masking: What to hide in them; None: no stage learns that.
        path: Where the rows are kept.
        keep: Whether rows that lie there belong to this run.
        ended: Whether those of a finished student do too; else it was one of fewer steps.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        documents: Sequence[str],
        tokenizer: Any,
        max_length: int,
        rows: Any,
        masking: Any,
        path: Path,
        *,
        keep: bool,
        ended: bool = False,
    ) -> None:
        sizes = {"pairs": config.pairs, "batch_size": config.batch_size, "max_length": max_length}
        self.config, self.rows, self.masking = config, rows, masking
        self.evaluation, self.path = EmbeddingEvaluation(documents, tokenizer, **sizes), path
        kept = (
            EmbeddingReport.from_dict(json.loads(path.read_text(encoding="utf-8")))
            if keep and path.is_file()
            else None
        )
        same = kept is not None and (kept.sentences, kept.pairs) == (self.report.sentences, self.report.pairs)
        old = () if ended else FINISHED
        self.kept = [row for row in kept.rows if row.name not in (TEACHER, *old)] if kept is not None and same else []

    @property
    def report(self) -> EmbeddingReport:
        """The figures so far."""
        return self.evaluation.report

    def measure(self, name: str, model: Any, arm: str) -> None:
        """Add a model, unless its figures are there, and print them. The teacher is read again: it is what the others
        are compared with."""
        from linearize.evaluation.masked import masked_perplexity

        if any(row.name == name for row in self.report.rows):
            return
        masked, size = None, self.config.batch_size
        used = arm if is_student(model) else None
        if self.masking is not None and len(self.rows):
            masked = masked_perplexity(model, self.rows, self.masking, arm=used, batch_size=size)
        row = self.evaluation.measure(name, model, used, masked)
        figures = f"cosine {row.cosine:.4f}, recall@1 {row.recall:.4f}"
        print(f"{name}: {figures}" + (f", masked perplexity {masked:.2f}" if masked is not None else ""), flush=True)
        if name == TEACHER:
            self.report.rows += self.kept
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, (json.dumps(self.report.to_dict(), indent=1) + "\n").encode())

    def before_training(self, model: Any, **_: Any) -> None:
        """The teacher, whose weights the student's are before training, and the student as it was converted."""
        self.measure(TEACHER, model, "teacher")
        if self.config.controls and is_student(model):
            self.measure(CONVERTED, model, "mixed")

    def after_stage(self, name: str, model: Any) -> None:
        """The student between the stages."""
        if self.config.controls:
            self.measure(after(name), model, "mixed")

    def finish(self, model: Any) -> EmbeddingReport:
        """The finished student, and its branches alone where it has several."""
        self.measure(STUDENT, model, "mixed")
        if self.config.controls and is_student(model) and has_branches(model):
            for arm, name in ARMS.items():
                self.measure(name, model, arm)
        return self.report
