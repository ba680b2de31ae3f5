"""What a run is about to do, checked before any weight is loaded and printed before anything starts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from linearize.config.record import is_converted
from linearize.errors import UserError
from linearize.hardware import memory
from linearize.hardware.shape import Shape
from linearize.runs.attention import check_attention, mixers_of, read_model
from linearize.runs.checks import check_data, check_environment, check_lengths, check_triton_takes, check_yardstick
from linearize.runs.forecast import RunForecast, duration
from linearize.stages.kinds import make_stage
from linearize.stages.kinds.base import Stage, StagePlan, Start

if TYPE_CHECKING:
    from linearize.runs.settings import RunConfig
    from linearize.stages.select_plan import SelectionPlan

BRANCHES = {
    "both": "both: the mixed output and the linear branch alone",
    "mixed": "mixed: the output as it will be used",
    "linear": "linear: the linear branch alone",
    None: "as the mechanism needs",
}
"""How a plan names what attention transfer trains."""
PARTS = ("weights", "mixers", "adapters", "activations", "logits", "workspace")
"""Of `hardware.memory.Forecast`."""


@dataclass(frozen=True)
class RunPlan:
    """A run before it starts."""

    config: RunConfig
    """Its settings, complete, with the type of the weights."""
    start: Start
    stages: list[Stage]
    """Those that have something to do, in order."""
    plans: list[StagePlan]
    """What each of them is about to do."""
    selection: SelectionPlan | None = None
    """Where layers and windows are chosen by measuring."""
    forecast: RunForecast = field(default_factory=RunForecast)
    """Text, time and disk, as far as they are known."""

    def of(self, name: str) -> StagePlan | None:
        """What the stage of that name is about to do, if the run has it."""
        return next((plan for plan in self.plans if plan.name == name), None)

    def show(self, console: Any = None) -> None:
        """Print the plan as tables."""
        from linearize.tables import show_tables

        if headline := self.forecast.headline():
            print(headline, flush=True)
        show_tables(self.tables(), self.forecast.notes(self.plans), console)

    def tables(self) -> list[Any]:
        """The run, and each stage with its tokens, steps, trained parameters and expected memory."""
        from linearize.tables import Table

        config = self.config
        dataset = config.data.dataset
        rows = [
            self._start_row(),
            *self._layer_rows(),
            ["data", dataset if isinstance(dataset, str) else ", ".join(dataset)],
            ["sequence length", f"{config.data.sequence_length:,} tokens"],
            *self.forecast.rows(),
            *self._yardstick_rows(),
            ["processes", str(self.start.num_processes)],
            ["output", config.output_dir],
        ]
        tables = [Table("Run", ["", "value"], rows, text=True)]
        if self.plans:
            header = ["stage", "trains", "tokens", "epochs", "steps", "tokens a step", "time"]
            tables.append(Table("Stages", header, [self._stage_row(plan) for plan in self.plans], text=True))
        held = [row for plan in self.plans if (row := _memory_row(plan)) is not None]
        if held:
            tables.append(Table("Memory a process, expected", ["stage", "in all", "of it"], held, text=True))
        return tables

    def _stage_row(self, plan: StagePlan) -> list[str]:
        trained = ", ".join(f"{what} {count:,}" for what, count in plan.trained.items()) or "nothing"
        if plan.steps is None:
            return [plan.name, trained, plan.note, "", "", "", ""]
        steps, epochs = plan.steps, self.forecast.epochs(plan.tokens)
        seconds = self.forecast.seconds.get(plan.name)
        return [
            plan.name,
            trained,
            f"{plan.tokens:,}",
            "" if epochs is None else f"{epochs:.2g}" if epochs < 10 else f"{epochs:,.0f}",
            f"{steps.steps:,}",
            f"{steps.tokens_per_step:,} ({steps.accumulation} x {plan.settings.batch_size} sequences a process)",
            "" if seconds is None else duration(seconds),
        ]

    def _start_row(self) -> list[str]:
        config, layers = self.config, self.start.model.num_hidden_layers
        bits = ", 4-bit base" if config.load_in_4bit else ", 8-bit base" if config.load_in_8bit else ""
        if config.architecture is not None:
            return ["model", f"{config.architecture.type} of random weights ({layers} layers, {config.dtype})"]
        return ["teacher", f"{config.model_name_or_path} ({layers} layers, {config.dtype}{bits})"]

    def _yardstick_rows(self) -> list[list[str]]:
        settings = self.config.yardstick_settings()
        if self.config.yardstick is None:
            return []
        seconds = self.forecast.seconds.get("yardstick")
        how_long = "" if seconds is None else f", {duration(seconds)}"
        return [["yardstick", f"the teacher, trained on {settings.tokens:,} tokens{how_long}"]]

    def _layer_rows(self) -> list[list[str]]:
        """What the layers get."""
        from linearize.hardware.state_bytes import softmax_window

        config, start, rows = self.config, self.start, []
        if start.converted:
            rows = [["attention", "as converted"]]
        elif config.mixer_types is not None:
            layers = Counter(config.mixer_types).items()
            rows = [["attention", ", ".join(f"{count} layers {name}" for name, count in layers)]]
        elif config.attention is None:
            rows = [["attention", "softmax"]]
        else:
            shown = [f"{key} {value}" for key, value in config.mechanism.items() if key not in ("type", "contract")]
            rows = [["attention", f"{config.mechanism['type']}, {', '.join(shown) or 'default settings'}"]]
            if self.selection is not None:
                rows.append(["selection", self.selection.describe()])
            else:
                rows.append(["softmax layers", ", ".join(map(str, config.kept_layers)) or "none"])
        if (window := softmax_window(start.model)) is not None:
            done = "as converted" if start.converted else {"keep": "kept", "lift": "lifted"}[config.sliding_window]
            rows.append(["sliding window", f"{window:,} tokens, {done}"])
        branches = [stage.branch for stage in config.stages.values() if stage.kind == "transfer"]
        return rows + [["transfer trains", BRANCHES[branch]] for branch in branches]


def _memory_row(plan: StagePlan) -> list[str] | None:
    """What a stage holds, by part; None of a stage without steps."""
    if plan.forecast is not None:
        parts = {name: getattr(plan.forecast, name) for name in PARTS}
        total = memory.format_bytes(plan.forecast.total)
    elif plan.least:
        parts, total = plan.least, f"{memory.format_bytes(sum(plan.least.values()))} and activations"
    else:
        return None if plan.steps is None else [plan.name, "no forecast", ""]
    return [plan.name, total, ", ".join(f"{name} {memory.format_bytes(count)}" for name, count in parts.items())]


def make_plan(config: RunConfig, num_processes: int = 1) -> RunPlan:
    """Check what can be checked without weights, and work out steps and memory.

    Args:
        config: Complete (`runs.attention.complete`).

    Raises:
        UserError: the model cannot be read or is too short for the sequences, settings do not fit it, or a package is
            missing.
    """
    check_environment(config)
    start, selection = plan_start(config, num_processes)
    config = start.config
    check_data(start)
    check_yardstick(start)
    check_lengths(start)
    check_triton_takes(start.model, start.forecast_settings)
    stages = [make_stage(name, settings) for name, settings in config.stages.items()]
    stages = [stage for stage in stages if stage.applies(start)]
    for stage in stages:
        stage.check(start)
    return RunPlan(config, start, stages, [stage.plan(start) for stage in stages], selection)


def plan_start(config: RunConfig, num_processes: int = 1) -> tuple[Start, SelectionPlan | None]:
    """What a run starts from, and what it measures to place windows.

    Raises:
        UserError: As `make_plan`.
    """
    from linearize.modeling import is_encoder
    from linearize.stages.select_plan import plan_selection, selects

    selection = None
    if config.architecture is not None:
        from linearize.conversion.random_models import random_configs

        model, changed = random_configs(config)
        student, converted = changed or model, False
    else:
        model = read_model(config)
        converted = hasattr(model, "mixer_types") or is_converted(config.source)
        student = model
    encoder = is_encoder(student)
    dtype = config.weights_dtype if config.dtype != "auto" or not encoder else "float32"
    config = dataclasses.replace(config, dtype=dtype)
    if config.architecture is None:
        _check_conversion(config, converted)
        if not converted and (config.attention is not None or config.mixers is not None):
            check_attention(config, model)
            selection = plan_selection(config, model) if selects(config) else None
            student = planned_student(config, model, selection)
    mechanisms = mixers_of(student)
    settings = _of_one_mechanism(config, model, selection)
    shape = Shape.of(model)
    mixer = meta_mixer(shape, settings) if mechanisms else None
    known = mixer is not None and not encoder and memory.has_forecast(settings)
    fused = known and settings.mechanism["type"] == "linear" and memory.runs_fused(model, settings)
    start = Start(
        config=config,
        model=model,
        student=student,
        converted=converted,
        encoder=encoder,
        num_processes=num_processes,
        shape=shape,
        mechanisms=mechanisms,
        arms=() if mixer is None else tuple(mixer.arms),
        mixer_parameters=0 if mixer is None else mixer_parameter_count(shape, settings),
        forecast_settings=settings,
        forecasts=known,
        fused=fused,
    )
    return start, selection


def _check_conversion(config: RunConfig, converted: bool) -> None:
    """Refuse a conversion of what is converted already."""
    from linearize.stages.select_plan import selects

    if converted and (selects(config) or config.mixers is not None):
        raise UserError(
            f"{config.model_name_or_path} is converted already, and its layers have their attention: leave "
            "state_budget, mixer_types and a number of softmax_layers out, or give its teacher."
        )


def planned_student(config: RunConfig, model: Any, selection: SelectionPlan | None = None) -> Any:
    """The config of the student of a teacher, before text and weights take their time.

    Raises:
        UserError: the teacher cannot be converted with these settings.
    """
    from linearize.conversion.students import student_config, teacher_backbone

    kind = teacher_backbone(config.source, model).config
    settings = config if selection is None else selection.forecast_settings()
    layers = (settings.attention, settings.mixer_types, settings.mixers, settings.kept_layers)
    return student_config(model, kind, *layers, settings.sliding_window)


def meta_mixer(shape: Shape, config: RunConfig) -> Any:
    """The mechanism of one layer, without memory."""
    from linearize.modeling import BACKBONES
    from linearize.modeling.registry import mechanism, resolve_settings

    entry = mechanism(config.mechanism["type"])
    settings = entry.config(**config.mechanism)
    resolve_settings(settings, shape.head_dim, BACKBONES[shape.architecture].config)
    width = {"layer_width": shape.hidden} if "layer_input" in entry.reads(settings) else {}
    with torch.device("meta"):
        return entry.attention(settings, shape.heads, shape.key_heads, shape.head_dim, 1.0, **width)


def mixer_parameter_count(shape: Shape, config: RunConfig) -> int:
    """Parameters of the mechanism in all converted layers."""
    mixer = meta_mixer(shape, config)
    layers = shape.layers - len({index % shape.layers for index in config.kept_layers})
    return layers * sum(parameter.numel() for parameter in mixer.parameters())


def _of_one_mechanism(config: RunConfig, teacher: Any, selection: SelectionPlan | None) -> RunConfig:
    """The settings as if all converted layers had the mechanism of the widest window among them, for the forecast.

    Args:
        teacher: its config; that of a converted model, whose layers have their mechanisms already.
    """
    if selection is not None:
        return selection.forecast_settings()
    layered: Any = teacher if hasattr(teacher, "mixer_types") else config
    if layered.mixer_types is None:
        return config
    softmax = [index for index, name in enumerate(layered.mixer_types) if name not in layered.mixers]
    widest = max(layered.mixers.values(), key=lambda mixer: mixer.get("window", 0), default=config.attention or {})
    return dataclasses.replace(config, mixer_types=None, mixers=None, attention=dict(widest), softmax_layers=softmax)
