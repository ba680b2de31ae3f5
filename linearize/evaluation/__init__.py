"""What a model is worth: measures, each a file with its report. May import hardware, conversion, training and data.

report.py         perplexity by arm (next_token.py, arms.py), state, speed (generation.py), share.py: `evaluate`
by_length.py      perplexity at and past the trained length; plain_window.py, its control
context_run.py    retrieval.py (passkey.py, natural.py, natural_facts.py) and context_curve.py over the length,
                  with context_lengths.py, context_reading.py, rope_scaling.py
tasks.py          benchmarks of lm_eval
embeddings.py, masked.py      of encoders
noise.py, cell_sweeps.py, vectors.py      of gain cells
description.py    what a repository is, without its weights; placement.py, a selection in words and as a plot
plots.py          pictures from numbers; labels.py, how they name what they show
glue/             the benchmark GLUE
"""

from typing import TYPE_CHECKING

from linearize.lazy import on_first_use

if TYPE_CHECKING:
    from linearize.evaluation.by_length import LengthReport, LengthText, measure_by_length
    from linearize.evaluation.cell_sweeps import SweepPoint, SweepReport, exchanged_cells, sweep_cells
    from linearize.evaluation.context_curve import ContextPerplexityReport, context_perplexity, load_stretches
    from linearize.evaluation.context_lengths import Trials, wilson
    from linearize.evaluation.context_run import ContextPlan, measure_contexts, plan_contexts
    from linearize.evaluation.description import Info, info
    from linearize.evaluation.generation import Speed, continuation, measure_speed
    from linearize.evaluation.natural import natural_prompts, natural_report
    from linearize.evaluation.next_token import PerplexityResult, perplexity
    from linearize.evaluation.noise import NoiseReport, measure_noise, noisy, parse_noise
    from linearize.evaluation.passkey import passkey_prompts, passkey_report
    from linearize.evaluation.report import Report, Row, control_name, evaluate, linear_index, window_reach
    from linearize.evaluation.retrieval import RetrievalReport, measure_retrieval
    from linearize.evaluation.rope_scaling import with_yarn
    from linearize.evaluation.share import LinearShare, linear_share
    from linearize.evaluation.tasks import TaskReport, TaskScore, run_tasks
    from linearize.evaluation.vectors import export_vectors, head_vectors, save_vectors
    from linearize.hardware.state_bytes import StateBytes, state_bytes

__getattr__ = on_first_use(
    __name__,
    {
        ".by_length": ("LengthReport", "LengthText", "measure_by_length"),
        ".cell_sweeps": ("SweepPoint", "SweepReport", "exchanged_cells", "sweep_cells"),
        ".context_lengths": ("Trials", "wilson"),
        ".context_curve": ("ContextPerplexityReport", "context_perplexity", "load_stretches"),
        ".context_run": ("ContextPlan", "measure_contexts", "plan_contexts"),
        ".generation": ("Speed", "continuation", "measure_speed"),
        ".description": ("Info", "info"),
        "linearize.hardware.state_bytes": ("StateBytes", "state_bytes"),
        ".natural": ("natural_prompts", "natural_report"),
        ".noise": ("NoiseReport", "measure_noise", "noisy", "parse_noise"),
        ".passkey": ("passkey_prompts", "passkey_report"),
        ".next_token": ("PerplexityResult", "perplexity"),
        ".report": ("Report", "Row", "control_name", "evaluate", "linear_index", "window_reach"),
        ".retrieval": ("RetrievalReport", "measure_retrieval"),
        ".rope_scaling": ("with_yarn",),
        ".share": ("LinearShare", "linear_share"),
        ".tasks": ("TaskReport", "TaskScore", "run_tasks"),
        ".vectors": ("export_vectors", "head_vectors", "save_vectors"),
    },
)

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
