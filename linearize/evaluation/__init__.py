"""Evaluation: perplexity by arm, the linear branch's share, state bytes, speed, tasks; one report.
For gain cells also noise, other cells, and test vectors of one head; for any model retrieval and perplexity over the
context length, and perplexity at and past the trained length.

Some functions are named as their modules: import from here, or by `from linearize.evaluation.<module> import ...`.
"""

from linearize.evaluation.by_length import LengthReport, LengthText, measure_by_length
from linearize.evaluation.cell_sweeps import SweepPoint, SweepReport, exchanged_cells, sweep_cells
from linearize.evaluation.context_lengths import Trials, wilson
from linearize.evaluation.context_perplexity import ContextPerplexityReport, context_perplexity, load_stretches
from linearize.evaluation.context_run import ContextPlan, measure_contexts, plan_contexts
from linearize.evaluation.generation import Speed, continuation, measure_speed
from linearize.evaluation.info import Info, info
from linearize.evaluation.memory import StateBytes, state_bytes
from linearize.evaluation.natural import natural_prompts, natural_report
from linearize.evaluation.noise import NoiseReport, measure_noise, noisy, parse_noise
from linearize.evaluation.passkey import passkey_prompts, passkey_report
from linearize.evaluation.perplexity import PerplexityResult, perplexity
from linearize.evaluation.report import Report, Row, control_name, evaluate, linear_index, window_reach
from linearize.evaluation.retrieval import RetrievalReport, measure_retrieval
from linearize.evaluation.rope_scaling import with_yarn
from linearize.evaluation.share import LinearShare, linear_share
from linearize.evaluation.tasks import TaskReport, TaskScore, run_tasks
from linearize.evaluation.vectors import export_vectors, head_vectors, save_vectors

__all__ = [
    "ContextPerplexityReport",
    "ContextPlan",
    "Info",
    "LengthReport",
    "LengthText",
    "LinearShare",
    "NoiseReport",
    "PerplexityResult",
    "Report",
    "RetrievalReport",
    "Row",
    "Speed",
    "StateBytes",
    "SweepPoint",
    "SweepReport",
    "TaskReport",
    "TaskScore",
    "Trials",
    "context_perplexity",
    "continuation",
    "control_name",
    "evaluate",
    "exchanged_cells",
    "export_vectors",
    "head_vectors",
    "info",
    "linear_index",
    "linear_share",
    "load_stretches",
    "measure_by_length",
    "measure_contexts",
    "measure_noise",
    "measure_retrieval",
    "measure_speed",
    "natural_prompts",
    "natural_report",
    "noisy",
    "parse_noise",
    "passkey_prompts",
    "passkey_report",
    "perplexity",
    "plan_contexts",
    "run_tasks",
    "save_vectors",
    "state_bytes",
    "sweep_cells",
    "wilson",
    "window_reach",
    "with_yarn",
]
