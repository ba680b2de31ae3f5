"""What a run's report.json says of its training of all weights."""

import json
from types import SimpleNamespace

from linearize.runs.engine import RunResult


def report_of(result: RunResult, stage: str = "training") -> SimpleNamespace:
    """Figures of a stage, with the class and the vocabulary of the model that it left."""
    figures = json.loads((result.output_dir / "report.json").read_text())["stages"][stage]
    config = json.loads((result.final / "config.json").read_text())
    return SimpleNamespace(**figures, architecture=config["architectures"][0], vocab_size=config["vocab_size"])
