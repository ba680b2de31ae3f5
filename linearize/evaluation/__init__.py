"""Evaluation: perplexity by arm, the linear branch's share, state bytes, speed, tasks; one report.

Some functions are named as their modules: import from here, or by `from linearize.evaluation.<module> import ...`.
"""

from linearize.evaluation.generation import Speed, continuation, measure_speed
from linearize.evaluation.info import Info, info
from linearize.evaluation.memory import StateBytes, state_bytes
from linearize.evaluation.perplexity import PerplexityResult, perplexity
from linearize.evaluation.report import Report, Row, control_name, evaluate, linear_index, window_reach
from linearize.evaluation.share import LinearShare, linear_share
from linearize.evaluation.tasks import TaskReport, TaskScore, run_tasks

__all__ = [
    "Info",
    "LinearShare",
    "PerplexityResult",
    "Report",
    "Row",
    "Speed",
    "StateBytes",
    "TaskReport",
    "TaskScore",
    "continuation",
    "control_name",
    "evaluate",
    "info",
    "linear_index",
    "linear_share",
    "measure_speed",
    "perplexity",
    "run_tasks",
    "state_bytes",
    "window_reach",
]
