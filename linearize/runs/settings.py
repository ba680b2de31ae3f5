"""The settings of a run: what YAML, flags and Python callers set. A run is a list of stages, in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

from linearize.config import yaml_io
from linearize.config.architecture import ArchitectureConfig, TokenizerConfig
from linearize.config.evaluation import EvaluationConfig
from linearize.config.full_training import FullTrainingConfig
from linearize.config.selection import LayerChoice, SelectConfig
from linearize.config.settings import DataConfig, RunSettings
from linearize.config.values import NOTHING, convert_fields, field_types, require
from linearize.errors import UserError
from linearize.stages.kinds import make_settings

DEFAULT_STAGES: dict[str, dict[str, Any]] = {
    "calibrate": {"kind": "calibrate"},
    "transfer": {"kind": "transfer"},
    "finetune": {"kind": "train", "weights": "lora"},
}
"""Where none are given; without the ones that the mechanism does not have."""
OLD = {
    "transfer": "stages: {transfer: {kind: transfer, ...}}",
    "finetune": "stages: {finetune: {kind: train, weights: lora, ...}}",
    "calibration_sequences": "stages: {calibrate: {kind: calibrate, sequences: ...}}",
    "training": "stages: {training: {kind: train, weights: all, ...}}",
    "linear": "stages: {linear: {kind: train, weights: all, ...}}",
    "nonlinear": "stages: {nonlinear: {kind: train, weights: all, ...}}",
    "adaptation": "stages: {adapted: {kind: adapt, ...}}",
    "refinement": "stages: {refined: {kind: train, weights: mechanism, teacher: linear, labels_weight: 0, ...}}",
    "statistics_sequences": "sequences in the stages of kind calibrate and adapt",
    "mlm": "stages: {mlm: {kind: train, weights: all, objective: masked, ...}}",
    "distillation": "teacher, labels_weight, logits_weight and hidden_weight in the stage that learns from it, or, of "
    "an encoder, stages: {distillation: {kind: train, weights: all, objective: embeddings, ...}}",
    "train_teacher": "yardstick: same_tokens",
    "model": "architecture: {...}",
    "vocab_size": "tokenizer: {vocab_size: ...}",
    "tokenizer_name_or_path": "tokenizer: {name_or_path: ...}",
    "tokenizer_characters": "tokenizer: {characters: ...}",
}
"""Settings of config.yaml files before stages -> how they are written now."""
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass
class RunConfig(LayerChoice, RunSettings):
    """One whole run: what it starts from, its data, its stages, what is measured, and where it goes."""

    model_name_or_path: str | None = None
    """The teacher, or a converted model to go on with: a Hub id, a local directory, or a .gguf file; none: random
    weights of `architecture`."""
    revision: str | None = None
    """Branch, tag or commit of its repository."""
    architecture: ArchitectureConfig | None = None
    """The shape of a model of random weights, in place of model_name_or_path."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer of a model of random weights."""
    output_dir: str = "out"
    """The run directory: config.yaml, logs, plots, checkpoints, a repository of each stage, report.json and final."""
    overwrite: bool = False
    """Replace a run that `output_dir` already holds."""
    resume_from_checkpoint: bool = False
    """Continue the run in `output_dir` from its newest checkpoint, in the stage where it stopped."""
    seed: int = 0
    """Seed of the initialisation, the order of the data, the masks and the dropout."""
    dtype: Dtype = "auto"
    """Type of the frozen weights and of the computation; what trains is float32 always. auto: float32 of an encoder
    and where a stage trains all weights or the mechanism by the model's own loss, else bfloat16."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda: auto is the process's GPU, else the CPU (CUDA_VISIBLE_DEVICES chooses among several)."""
    load_in_4bit: bool = False
    """Hold the frozen weights in 4 bits while training (bitsandbytes NF4); the result is merged into the full
    weights."""
    load_in_8bit: bool = False
    """The same in 8 bits."""
    attention: dict[str, Any] | None = field(default_factory=lambda: {"type": "linear"})
    """The new attention: `type` and the settings of that mechanism (window, sinks, feature_map, ...); none: softmax, a
    stock model stays one."""
    softmax_layers: int | list[int] | str = field(default_factory=list)
    """Layers that keep softmax attention: a list of indices such as [4] or 0,5, from 0, negative ones from the end; or
    a number of them or a share such as 10%, which are then chosen by measuring (section select)."""
    state_budget: int | str | None = None
    """Bytes that the states of one sequence may hold beside softmax layers, such as 7MB, or 240KB/layer on average:
    windows are then placed by measuring (section select), in place of attention.window."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """How layers and windows are measured, where state_budget or a number of softmax_layers asks for it."""
    mixer_types: list[str] | None = None
    """The attention of each layer by name: softmax, or an entry of `mixers`; none: `attention` and
    `softmax_layers`."""
    mixers: dict[str, Any] | None = None
    """Settings of each name in `mixer_types`, as `attention` has them."""
    sliding_window: Literal["keep", "lift"] = "keep"
    """A teacher's sliding window (Mistral-7B-v0.1): keep it in softmax layers and in the teacher that stages learn
    from, or lift it there, so that they see all tokens; converted layers never have it."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation text."""
    stages: dict[str, Any] = field(default_factory=dict)
    """What is done, in order: name -> settings, of which `kind` (calibrate, transfer, adapt or train) and, of train,
    `weights` and `objective` say what there are."""
    yardstick: Literal["same_tokens"] | None = None
    """Train the softmax teacher too, on as many tokens as the stages that train weights, by the last one's settings:
    what the student is compared with; none: with the untouched teacher."""
    evaluation: EvaluationConfig | None = field(default_factory=EvaluationConfig)
    """The measurements; none: skipped."""
    report_to: list[str] = field(default_factory=lambda: ["none"])
    """Trackers: trackio, wandb, tensorboard, all or none. All stages are one run of the project linearize."""
    op_backend: Literal["auto", "reference", "chunked", "triton"] = "auto"
    """Implementation of the new attention; auto: the fastest that runs here."""
    push_to_hub: str | None = None
    """Hub repository that the result is pushed to, e.g. me/Llama-3-8B-linear; none: not pushed."""

    def __post_init__(self) -> None:
        convert_fields(self, "")
        self._check_attention()
        self._check_layers()
        self.stages = make_stages(self.stages)
        self._check_start()
        self._check_output()
        self._check_seed()
        self._check_teachers()
        require(
            not (self.load_in_4bit and self.load_in_8bit),
            "load_in_4bit and load_in_8bit are both set: choose one of them.",
        )
        require(
            self.push_to_hub is None or self.push_to_hub.count("/") <= 1,
            f"push_to_hub is {self.push_to_hub!r}, but a repository is named NAME or OWNER/NAME.",
        )

    def _check_attention(self) -> None:
        if self.attention is not None:
            self.attention.setdefault("type", "linear")
            if self.attention == {"type": "softmax"}:
                self.attention = None
        require(
            self.attention is not None or self.mixers is not None or self.softmax_layers == [],
            "softmax_layers is set, but without attention all layers have softmax: set attention too.",
        )

    def _check_start(self) -> None:
        if self.architecture is None:
            require(bool(self.model_name_or_path), "model_name_or_path is empty: name the model to start from.")
            require(
                self.tokenizer == TokenizerConfig(),
                "tokenizer is set, but model_name_or_path has a vocabulary of its own: leave the section out.",
            )
            return
        require(
            self.model_name_or_path is None,
            "architecture and model_name_or_path are both set, but the model has a shape of its own: leave one out.",
        )
        require(
            isinstance(self.softmax_layers, list) and self.state_budget is None,
            "softmax_layers and state_budget have layers chosen by measuring, and random weights have nothing to "
            "measure: list the layers, such as [0], and leave state_budget out.",
        )
        positions, length = self.architecture.n_positions, self.data.sequence_length
        require(
            positions is None or positions >= length,
            f"architecture.n_positions is {positions}, but data.sequence_length is {length}: raise it, or leave it "
            "out.",
        )
        require(
            self.yardstick is None,
            "yardstick trains the teacher, and random weights have none: leave it out.",
        )

    def _check_teachers(self) -> None:
        """Refuse a teacher that is not there yet where its stage begins."""
        before: list[str] = []
        for name, settings in self.stages.items():
            teacher = getattr(settings, "teacher", None)
            require(
                teacher != "yardstick" or self.yardstick is not None,
                f"{name}.teacher is yardstick, but none is trained: set yardstick to same_tokens, or {name}.teacher "
                "to base.",
            )
            later = teacher in self.stages and teacher not in before
            require(not later, f"{name}.teacher is {teacher}, which comes after it: name an earlier stage.")
            before.append(name)
        require(
            self.yardstick is None or self.yardstick_settings() is not None,
            "yardstick trains the teacher as a stage trains the student, and no stage trains weights: leave it out.",
        )

    def yardstick_settings(self) -> Any:
        """Settings of the teacher's training: those of the last stage that trains weights by the model's own loss, as
        long as all of them; None without such a stage."""
        trained = {name: stage for name, stage in self.stages.items() if trains_language(stage)}
        if not trained:
            return None
        *_, last = trained.values()
        length = self.data.sequence_length
        tokens = 0
        for stage in trained.values():
            plan = stage.plan(max(stage.lengths(length)) if hasattr(stage, "lengths") else length)
            tokens += plan.steps * plan.tokens_per_step
        changes: dict[str, Any] = {"tokens": tokens, "max_steps": None}
        if isinstance(last, FullTrainingConfig):
            changes |= {"teacher": None, "weights": "all"}
        return replaced(last, "yardstick", **changes)

    @property
    def source(self) -> str:
        """`model_name_or_path` where there is one."""
        assert self.model_name_or_path is not None, "random weights"
        return self.model_name_or_path

    @property
    def shape(self) -> ArchitectureConfig:
        """`architecture` where there is one."""
        assert self.architecture is not None, "a model of its own"
        return self.architecture

    @property
    def weights_dtype(self) -> Dtype:
        """`dtype`, auto resolved but for an encoder's."""
        if self.dtype != "auto":
            return self.dtype
        full = self.architecture is not None or any(not keeps_base(stage) for stage in self.stages.values())
        return "float32" if full else "bfloat16"


def keeps_base(stage: Any) -> bool:
    """Whether a stage leaves the weights beside the mechanism frozen, in the type that they were loaded in."""
    return getattr(stage, "weights", None) in (None, "lora") and stage.kind != "adapt"


def trains_language(stage: Any) -> bool:
    """Whether a stage trains weights by the loss of the language model."""
    return stage.kind == "train" and getattr(stage, "objective", "next_token") == "next_token"


def make_stages(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of each stage; one that is switched off (none) is left out.

    Raises:
        UserError: A name that another setting has, an unknown kind, or settings that a stage does not have.
    """
    fields = {item.name for item in dataclasses.fields(RunConfig)}
    stages = {}
    for name, values in given.items():
        if values is None or (isinstance(values, str) and values.lower() in NOTHING):
            continue
        require(
            name not in fields and name.isidentifier() and name not in RESERVED,
            f"A stage is called {name!r}: choose a name of letters, digits and underscores that no other setting has.",
        )
        stages[name] = make_settings(name, values)
    return stages


RESERVED = (
    *("yardstick", "base", "none", "final", "logs", "plots", "checkpoints", "adapter", "converted"),
    *("inputs", "tasks"),
)
"""Names of other things in a run's directory or among its teachers."""


def replaced(settings: Any, name: str, **changes: Any) -> Any:
    """A stage's settings under a name, with others in place of some."""
    return make_settings(name, {**dataclasses.asdict(settings), **changes})


def resolve_run(
    config: RunConfig | Mapping[str, Any] | str | PathLike[str] | None, overrides: Mapping[str, Any] | None = None
) -> RunConfig:
    """Settings of a run from a path, a preset's name, a mapping or settings, with `overrides` (dotted names) laid over
    them.

    Args:
        config: None for the defaults.
        overrides: As the flags give them; those of a stage begin with its name.

    Raises:
        UserError: Unknown settings, values that a field cannot take, or a file of an older version.
    """
    values = run_values(config)
    given = dict(overrides or {})
    stages = {name: value for name, value in given.items() if name.partition(".")[0] in values["stages"]}
    values["stages"] = yaml_io.merge(values["stages"], stages)
    rest = {name: value for name, value in given.items() if name not in stages}
    return yaml_io.resolve(values, rest, settings=RunConfig)


def run_values(config: RunConfig | Mapping[str, Any] | str | PathLike[str] | None) -> dict[str, Any]:
    """The settings that a config gives, unchecked, with the stages that it stands for.

    Raises:
        UserError: It is of an older version.
    """
    if isinstance(config, RunConfig):
        return yaml_io.to_values(config)
    named = config if isinstance(config, Mapping) or config is None else yaml_io.read_values(config)
    values = dict(named or {})
    if "models" in values:
        raise UserError(f"{config} holds settings of the GLUE benchmark: linearize glue --config {config}.")
    if old := [name for name in values if name in OLD]:
        raise UserError(
            f"{', '.join(old)} {'is' if len(old) == 1 else 'are'} of an older version, where each kind of run had its "
            f"own settings. Write {old[0]} as `{OLD[old[0]]}` (`linearize presets NAME` shows a whole file)."
        )
    if values.get("stages") is None:
        values["stages"] = {name: dict(stage) for name, stage in DEFAULT_STAGES.items()}
    if not isinstance(values["stages"], Mapping):
        raise UserError("stages must be names with settings, in order, such as {transfer: {kind: transfer}}.")
    return values


def flat_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> annotation of every plain field of a run and of its stages.

    Args:
        config: As `run_values` gives it.
    """
    names = yaml_io.flat_names(RunConfig)
    for name, kind in stage_types(config).items():
        names[name] = kind | None
        names |= {f"{name}.{key}": inner for key, inner in field_types(kind).items()}
    return names


def stage_types(config: Mapping[str, Any]) -> dict[str, Any]:
    """Class of settings of each stage that a config has; of those that name no known kind none."""
    from linearize.stages.kinds import settings_type

    found = {}
    for name, values in config["stages"].items():
        if isinstance(values, Mapping) and (kind := settings_type(values)) is not None:
            found[name] = kind
    return found
