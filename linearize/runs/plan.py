"""What a run is about to do, checked before any weight is loaded and printed before anything starts."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from linearize.config.record import is_converted
from linearize.config.settings import FinetuneConfig, RunConfig, StepPlan, TransferConfig
from linearize.errors import UserError
from linearize.hardware import memory
from linearize.hardware.shape import Shape

if TYPE_CHECKING:
    from linearize.config.encoder import EncoderRunConfig
    from linearize.config.pretraining import PretrainConfig
    from linearize.stages.select_plan import SelectionPlan

Settings = TypeVar("Settings", RunConfig, "EncoderRunConfig", "PretrainConfig")
BRANCHES = {
    "both": "both: the mixed output and the linear branch alone",
    "mixed": "mixed: the output as it will be used",
    "linear": "linear: the linear branch alone",
    None: "as the mechanism needs",
}
"""How a plan names what attention transfer trains."""


@dataclass(frozen=True)
class StagePlan:
    """One training stage: its steps, what it trains and what memory it should take."""

    name: str
    settings: TransferConfig | FinetuneConfig
    steps: StepPlan
    trained: dict[str, int]
    forecast: memory.Forecast | None
    """Expected memory; None for mechanisms without a forecast."""

    @property
    def tokens(self) -> int:
        """Tokens of the stage over all processes."""
        return self.steps.steps * self.steps.tokens_per_step


@dataclass(frozen=True)
class RunPlan:
    """A run before it starts."""

    config: RunConfig
    teacher: Any
    converted: bool
    num_processes: int
    stages: list[StagePlan]
    calibration: int = 0
    """Sequences that the mechanism is fitted to before the stages."""
    selection: SelectionPlan | None = None
    """Where layers and windows are chosen by measuring."""

    def stage(self, name: str) -> StagePlan | None:
        """The stage of that name, if the run has it."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def show(self, console: Any = None) -> None:
        """Print the plan as tables."""
        from linearize.tables import show_tables

        show_tables(self.tables(), (), console)

    def tables(self) -> list[Any]:
        """The run, and each stage with its tokens, steps, trained parameters and expected memory."""
        from linearize.hardware.state_bytes import softmax_window
        from linearize.tables import Table

        config, teacher = self.config, self.teacher
        layers = teacher.num_hidden_layers
        bits = ", 4-bit base" if config.load_in_4bit else ", 8-bit base" if config.load_in_8bit else ""
        dataset = config.data.dataset
        rows = [
            ["teacher", f"{config.model_name_or_path} ({layers} layers, {config.dtype}{bits})"],
            *self._layer_rows(),
            ["data", dataset if isinstance(dataset, str) else ", ".join(dataset)],
            ["sequence length", f"{config.data.sequence_length:,} tokens"],
            ["processes", str(self.num_processes)],
            ["output", config.output_dir],
        ]
        if (window := softmax_window(teacher)) is not None:
            done = "as converted" if self.converted else {"keep": "kept", "lift": "lifted"}[config.sliding_window]
            rows.insert(-4, ["sliding window", f"{window:,} tokens, {done}"])
        if self.calibration:
            rows.insert(-2, ["calibration", f"{self.calibration:,} sequences"])
        if config.evaluation is not None and config.evaluation.yardstick:
            rows.insert(-2, ["yardstick", "the teacher, by the same finetuning"])
        if config.transfer is not None:
            rows.insert(-2, ["transfer trains", BRANCHES[config.transfer.branch]])
        tables = [Table("Run", ["", "value"], rows, text=True)]
        if self.stages:
            header = ["stage", "trains", "tokens", "steps", "tokens a step", "expected memory a process"]
            tables.append(Table("Training", header, [_stage_row(stage) for stage in self.stages], text=True))
        return tables

    def _layer_rows(self) -> list[list[str]]:
        """What the layers get."""
        config = self.config
        if self.converted:
            return [["attention", "as converted"], ["softmax layers", "as converted"]]
        if config.mixer_types is not None:
            layers = Counter(config.mixer_types).items()
            return [["attention", ", ".join(f"{count} layers {name}" for name, count in layers)]]
        shown = [f"{key} {value}" for key, value in config.attention.items() if key not in ("type", "contract")]
        rows = [["attention", f"{config.attention['type']}, {', '.join(shown) or 'default settings'}"]]
        if self.selection is not None:
            return [*rows, ["selection", self.selection.describe()]]
        return [*rows, ["softmax layers", ", ".join(map(str, config.kept_layers)) or "none"]]


def _stage_row(stage: StagePlan) -> list[str]:
    trained = ", ".join(f"{what} {count:,}" for what, count in stage.trained.items())
    steps = stage.steps
    return [
        stage.name,
        trained,
        f"{stage.tokens:,}",
        f"{steps.steps:,}",
        f"{steps.tokens_per_step:,} ({steps.accumulation} x {stage.settings.batch_size} sequences a process)",
        "no forecast" if stage.forecast is None else memory.format_bytes(stage.forecast.total),
    ]


def make_plan(config: RunConfig, num_processes: int = 1) -> RunPlan:
    """Check what can be checked without weights, and work out steps and memory.

    Raises:
        UserError: the teacher cannot be read or is too short for the sequences, settings do not fit it, or a package
            is missing.
    """
    from linearize.conversion.students import refuse_encoder
    from linearize.stages.select_plan import plan_selection, selects
    from linearize.stages.transfer import check_branch, check_transfers, with_branch
    from linearize.training.loop import exact_plan

    check_environment(config)
    teacher = read_teacher(config)
    refuse_encoder(config.model_name_or_path, teacher)
    converted = hasattr(teacher, "mixer_types") or is_converted(config.model_name_or_path)
    selection = None
    if not converted:
        check_attention(config, teacher)
        selection = plan_selection(config, teacher) if selects(config) else None
    elif selects(config) or config.mixers is not None:
        raise UserError(
            f"{config.model_name_or_path} is converted already, and its layers have their attention: leave "
            "state_budget, mixer_types and a number of softmax_layers out, or give its teacher."
        )
    settings = _of_one_mechanism(config, teacher, selection)
    check_lengths(settings, teacher, converted)
    shape = Shape.of(teacher)
    if config.transfer is not None and len({index % shape.layers for index in settings.kept_layers}) == shape.layers:
        raise UserError("attention transfer has no converted layer to train: name fewer softmax_layers.")
    mixer = meta_mixer(shape, settings)
    mixers = mixer_parameter_count(shape, settings)
    known = memory.has_forecast(settings)
    check_triton_takes(teacher, settings)
    fused = known and settings.attention["type"] == "linear" and memory.runs_fused(teacher, settings)
    stages = []
    if config.transfer is not None:
        check_transfers(settings.attention["type"])
        transfer = with_branch(config.transfer, _mixers_of(teacher) or config.mechanisms)
        check_branch(transfer, mixer.arms)
        config = dataclasses.replace(config, transfer=transfer)
        steps = exact_plan(transfer, config.data.sequence_length, num_processes, "transfer")
        forecast = memory.forecast_transfer(teacher, settings, fused=fused) if known else None
        stages.append(StagePlan("attention transfer", transfer, steps, {"mechanism": mixers}, forecast))
    if config.finetune is not None:
        check_finetune(config, shape)
        check_passing(config, teacher)
        longest = max(config.finetune.lengths(config.data.sequence_length))
        steps = exact_plan(config.finetune, longest, num_processes, "finetune")
        trained = {"LoRA": memory.adapter_parameters(shape, config)}
        trained |= {"mechanism": mixers} if config.finetune.train_mixers else {}
        forecast = memory.forecast_finetune(teacher, settings, fused=fused) if known else None
        stages.append(StagePlan("finetuning", config.finetune, steps, trained, forecast))
    calibration = config.calibration_sequences if _calibrates(config, teacher, converted) else 0
    return RunPlan(config, teacher, converted, num_processes, stages, calibration, selection)


def _calibrates(config: RunConfig, teacher: Any, converted: bool) -> bool:
    """Whether the mechanism has a calibration, and nothing has fitted or trained it."""
    from linearize.config.record import read_record
    from linearize.stages.calibration import calibrates

    if not converted:
        return any(calibrates(settings) for settings in config.mechanisms)
    record = read_record(config.model_name_or_path, revision=config.revision)
    untouched = record and not record.get("calibration") and not any((record.get("tokens") or {}).values())
    return bool(untouched) and not (record.get("recipe") or {}).get("imported") and calibrates(teacher)


def meta_mixer(shape: Shape, config: RunConfig) -> Any:
    """The mechanism of one layer, without memory."""
    from linearize.modeling import BACKBONES
    from linearize.modeling.registry import mechanism, resolve_settings

    entry = mechanism(config.attention["type"])
    settings = entry.config(**config.attention)
    resolve_settings(settings, shape.head_dim, BACKBONES[shape.architecture].config)
    width = {"layer_width": shape.hidden} if "layer_input" in entry.reads(settings) else {}
    with torch.device("meta"):
        return entry.attention(settings, shape.heads, shape.key_heads, shape.head_dim, 1.0, **width)


def mixer_parameter_count(shape: Shape, config: RunConfig) -> int:
    """Parameters of the mechanism in all converted layers."""
    mixer = meta_mixer(shape, config)
    layers = shape.layers - len({index % shape.layers for index in config.kept_layers})
    return layers * sum(parameter.numel() for parameter in mixer.parameters())


def read_teacher(config: RunConfig) -> Any:
    """The teacher's config.

    Raises:
        UserError: it cannot be read, transformers knows no such architecture, or its weights are quantised.
    """
    from linearize.conversion.quantization import refuse_quantized
    from linearize.conversion.students import load_config
    from linearize.modeling import BACKBONES

    try:
        teacher = load_config(config.model_name_or_path, revision=config.revision)
    except UserError:
        raise
    except ValueError as error:
        known = ", ".join(BACKBONES)
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{config.model_name_or_path} cannot be converted: {reason} Known are {known}.") from error
    refuse_quantized(config.model_name_or_path, teacher)
    return teacher


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
    widest = max(layered.mixers.values(), key=lambda mixer: mixer.get("window", 0), default=config.attention)
    return dataclasses.replace(config, mixer_types=None, mixers=None, attention=dict(widest), softmax_layers=softmax)


def complete_attention(config: Settings) -> Settings:
    """The settings with every setting of the mechanism, checked, and the branch that attention transfer trains, so
    that `config.yaml` says what later defaults would change.

    Raises:
        UserError: unknown mechanism, unknown setting, or a value that it cannot take.
    """
    from linearize.stages.transfer import with_branch

    named = getattr(config, "mixers", None)
    if named is None:
        completed: dict[str, Any] = {"attention": complete_mixer(config.attention or {"type": "linear"})}
    else:
        completed = {"mixers": complete_mixers(named)}
    transfer = getattr(config, "transfer", None)
    if transfer is not None and transfer.branch is None:
        given = [completed["attention"]] if named is None else list(completed["mixers"].values())
        completed["transfer"] = with_branch(transfer, _mixers_there(config) or given)
    return dataclasses.replace(config, **completed)


def complete_mixers(mixers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The same of the settings of mechanisms by name."""
    completed = {}
    for name, given in mixers.items():
        if not isinstance(given, dict) or "type" not in given:
            raise UserError(f"mixers.{name} must be a section with the type of a mechanism, not {given!r}.")
        completed[name] = complete_mixer(given, f"mixers.{name}")
    return completed


def _mixers_there(config: Any) -> list[dict[str, Any]]:
    """The settings of the mechanisms of the model that a run starts from, where it is a converted one."""
    source = config.model_name_or_path
    if os.path.exists(source) and not is_converted(source):
        return []
    with contextlib.suppress(UserError):  # the run says so where it needs the model
        return _mixers_of(read_teacher(config))
    return []


def _mixers_of(model: Any) -> list[dict[str, Any]]:
    """The settings of a converted model's mechanisms, from its config; none of another model."""
    return [dict(mixer) for mixer in getattr(model, "mixers", {}).values()]


def complete_mixer(settings: Mapping[str, Any], section: str = "attention") -> dict[str, Any]:
    """The same of the settings of one mechanism, `section` in messages."""
    from linearize.modeling.registry import mechanism

    with _one_sentence(section):
        typed_config: Any = mechanism(settings["type"]).config
        unknown = [name for name in settings if name not in typed_config.__dataclass_fields__]
        if unknown:
            known = ", ".join(typed_config.__dataclass_fields__)
            raise UserError(f"Unknown setting {section}.{unknown[0]}; known are {known}.")
        return dataclasses.asdict(typed_config(**settings))


@contextlib.contextmanager
def _one_sentence(subject: str) -> Iterator[None]:
    """Turn what a typed config raises into a sentence; @strict wraps it in errors of its own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(f"{subject}: {' '.join(str(cause).split())}") from error


def check_attention(config: RunConfig, teacher: Any) -> None:
    """Check the mechanism against the teacher before data and weights take their time."""
    from linearize.conversion.students import student_config
    from linearize.modeling import BACKBONES
    from linearize.modeling.registry import mechanism

    if teacher.model_type not in BACKBONES:
        raise UserError(
            f"{config.model_name_or_path} is a {teacher.model_type} model, which cannot be converted; known are "
            f"{', '.join(BACKBONES)}."
        )
    shape = Shape.of(teacher)
    if shape.heads % shape.key_heads:
        raise UserError(
            f"{config.model_name_or_path} has {shape.heads} attention heads that do not divide among "
            f"{shape.key_heads} key/value heads."
        )
    for settings in config.mechanisms:
        with _one_sentence("attention"):
            mechanism(settings["type"]).config(**settings).resolve(shape.head_dim)
    kept = config.softmax_layers if isinstance(config.softmax_layers, list) else []
    for index in kept:
        if not -shape.layers <= index < shape.layers:
            raise UserError(f"softmax_layers names layer {index}, but the teacher has layers 0 to {shape.layers - 1}.")
    kind = BACKBONES[teacher.model_type].config
    layers = (config.attention, config.mixer_types, config.mixers, kept)
    student_config(teacher, kind, *layers, config.sliding_window)


def check_finetune(config: RunConfig, shape: Shape) -> None:
    """Refuse what stage 2 could not do now, not after the hours of stage 1."""
    from linearize.stages.finetune_lengths import changes_rows, check_rows, refuse_packing

    assert config.finetune is not None
    if config.dtype == "float16":
        raise UserError("finetuning in float16 would lose small gradients: set dtype to bfloat16 or float32.")
    row_length = config.data.sequence_length
    check_rows(config.finetune, row_length)
    if changes_rows(config.finetune, row_length) and (
        config.data.packing != "stream" or config.data.isolate_documents
    ):
        refuse_packing()
    known = memory.linear_layers(shape)
    if unknown := [name for name in config.finetune.lora_targets or () if name not in known]:
        raise UserError(
            f"finetune.lora_targets: the teacher has no linear layer named {', '.join(unknown)}; there are "
            f"{', '.join(known)}."
        )


def check_passing(config: RunConfig, teacher: Any) -> None:
    """Refuse states that stage 2 could not start from."""
    from linearize.evaluation.arms import context_tokens
    from linearize.stages.finetune_lengths import check_state_passing

    assert config.finetune is not None
    if config.finetune.state_passing:
        kinds = [settings["type"] for settings in _mixers_of(teacher) or config.mechanisms]
        longest = max(config.finetune.lengths(config.data.sequence_length))
        check_state_passing(kinds, context_tokens(teacher), longest)


def check_lengths(config: RunConfig, teacher: Any, converted: bool) -> None:
    """Refuse sequences that the teacher has never seen the positions of, landmarks' own among them."""
    from linearize.evaluation.arms import context_tokens

    student = teacher
    if not converted and config.attention["type"] == "landmark":
        student = planned_student(config.model_name_or_path, config.attention, config.sliding_window)
    limit = context_tokens(student)
    room = "" if limit == context_tokens(teacher, "teacher") else " with its landmarks"
    lengths = {"data.sequence_length": config.data.sequence_length}
    if config.evaluation is not None and config.evaluation.sequence_length is not None:
        lengths["evaluation.sequence_length"] = config.evaluation.sequence_length
    if config.finetune is not None:
        lengths["finetune.sequence_length"] = max(config.finetune.lengths(config.data.sequence_length))
    for name, length in lengths.items():
        if limit is not None and length > limit:
            raise UserError(
                f"{name} is {length}, but the teacher's context is {limit} tokens{room}: set it to {limit} or lower."
            )


def check_environment(config: RunConfig) -> None:
    """Refuse now what would fail after hours: a missing package, device, folder or token."""
    from linearize.conversion.quantization import require_bitsandbytes
    from linearize.training.launcher import check_launcher
    from linearize.training.log import tracker_names

    check_launcher(config.device)
    tracker_names(config.report_to)
    if config.load_in_4bit or config.load_in_8bit:
        require_bitsandbytes()
    if config.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("device is cuda, but no GPU is visible: set device to auto or cpu.")
    if config.op_backend == "triton":
        check_triton()
    evaluation = config.evaluation
    if evaluation is not None:
        texts = [evaluation.texts] if isinstance(evaluation.texts, str) else evaluation.texts or []
        for path in [*texts, *([evaluation.include_path] if evaluation.include_path else [])]:
            if not os.path.exists(path):
                raise UserError(f"evaluation: there is no file or folder {path}; check the path.")
        if evaluation.tasks:
            from linearize.evaluation.tasks import check_tasks

            check_tasks(evaluation.tasks, evaluation.include_path)


def check_triton_takes(teacher: Any, config: RunConfig) -> None:
    """Refuse the fused backend on a GPU where its kernels take no linear attention of these settings."""
    import torch

    if config.op_backend != "triton" or config.attention["type"] != "linear" or not torch.cuda.is_available():
        return
    if reason := memory.why_not_fused(teacher, config):
        raise UserError(f"op_backend is triton, but {reason}: set op_backend to auto or chunked.")


def check_triton() -> None:
    """Refuse the fused backend where its kernels cannot run."""
    import torch

    from linearize.kernels.triton_support import unavailable
    from linearize.modeling.op_dispatch import find_kernel
    from linearize.modeling.op_hybrid_linear import CONTRACT

    kernel, reason = find_kernel("hybrid_linear", CONTRACT)
    if kernel is not None:
        reason = unavailable(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")) or ""
    if reason:
        raise UserError(f"op_backend is triton, but {reason}: set op_backend to auto or chunked.")


def planned_student(source: str, attention: Mapping[str, Any], sliding_window: str = "keep") -> Any:
    """The config of the student of a teacher, before text and weights take their time.

    Raises:
        UserError: the teacher cannot be read, or cannot be converted with these settings.
    """
    from linearize.conversion.students import load_config, student_config, teacher_backbone

    teacher = load_config(source)
    kind = teacher_backbone(source, teacher).config
    return student_config(teacher, kind, attention, None, None, (), sliding_window)
