"""Evaluation: perplexity by arm, the linear branch's share, state bytes, speed, tasks; one report.
For gain cells also noise, other cells, and test vectors of one head.

Some functions are named as their modules: import from here, or by `from linearize.evaluation.<module> import ...`.
"""

from linearize.evaluation.cell_sweeps import SweepPoint, SweepReport, exchanged_cells, sweep_cells
from linearize.evaluation.generation import Speed, continuation, measure_speed
from linearize.evaluation.info import Info, info
from linearize.evaluation.memory import StateBytes, state_bytes
from linearize.evaluation.noise import NoiseReport, measure_noise, noisy, parse_noise
from linearize.evaluation.perplexity import PerplexityResult, perplexity
from linearize.evaluation.report import Report, Row, control_name, evaluate, linear_index, window_reach
from linearize.evaluation.share import LinearShare, linear_share
from linearize.evaluation.tasks import TaskReport, TaskScore, run_tasks
from linearize.evaluation.vectors import export_vectors, head_vectors, save_vectors

__all__ = [
    "Info",
    "LinearShare",
    "NoiseReport",
    "PerplexityResult",
    "Report",
    "Row",
    "Speed",
    "StateBytes",
    "SweepPoint",
    "SweepReport",
    "TaskReport",
    "TaskScore",
    "continuation",
    "control_name",
    "evaluate",
    "exchanged_cells",
    "export_vectors",
    "head_vectors",
    "info",
    "linear_index",
    "linear_share",
    "measure_noise",
    "measure_speed",
    "noisy",
    "parse_noise",
    "perplexity",
    "run_tasks",
    "save_vectors",
    "state_bytes",
    "sweep_cells",
    "window_reach",
]
