"""The stages that train an encoder's weights: its sentence embeddings against the teacher's, or masked language
modelling.

Sources: Sanh et al. 2019 (arXiv 1910.01108), the cosine of hidden states; Reimers and Gurevych 2019 (arXiv
1908.10084), mean pooling; Park et al. 2019 (arXiv 1904.05068), the similarities between the rows of a batch.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from linearize.config.embeddings import EmbeddingConfig
from linearize.data.rows import TextRows, collate
from linearize.errors import UserError
from linearize.evaluation.embeddings import sentence_embeddings
from linearize.stages.distillation import hidden_distance
from linearize.stages.opening import open_stage
from linearize.stages.transfer import training_only
from linearize.training.launcher import in_bfloat16
from linearize.training.loop import Interrupt, PeakMemory, readable_memory_errors
from linearize.training.stage_trainer import StageTrainer


@dataclass
class EncoderStageResult:
    """What a stage leaves beside the trained model."""

    losses: list[float]
    """Loss of each step that this call ran."""
    steps: int
    """Steps of the whole stage, those before a resume included."""
    tokens: int
    """Places of the whole stage, padding included."""
    seconds: float
    """Duration of this call's training."""
    peak_memory_bytes: int | None
    """Highest number of bytes that tensors held on the GPU; None on a CPU."""
    log_path: Path
    """JSON lines: mean losses every `logging_steps`."""


def distill_embeddings(
    student: Any,
    teacher: Any,
    train: TextRows,
    config: EmbeddingConfig,
    *,
    output_dir: str | os.PathLike[str],
    **options: Any,
) -> EncoderStageResult:
    """Train an encoder, in place, until its sentence embeddings are the teacher's.

    Writes `checkpoints/distillation/step-N` and `logs/distillation.jsonl` under the output directory. Ctrl-C ends the
    step, saves a checkpoint and raises `KeyboardInterrupt`. Heads and pooler do not train.

    Args:
        student: A converted encoder in float32.
        teacher: The encoder that it was made from, on any device; it is moved to the student's and frozen.
        train: Rows of text.
        config: Settings of the stage.
        output_dir: The run directory.
        options: `seed`, of the order of the data and the dropout; `resume`, True goes on from the latest checkpoint
            of this stage, if there is one; `report_to`, trackers of accelerate; `device`, "cpu" keeps to the CPU.

    Raises:
        UserError: Student and teacher do not fit each other; settings that do not fit the data or the processes; not
            finite losses; out of memory; a full disk.
    """
    for name, what in (("hidden_size", "width"), ("num_hidden_layers", "number of layers")):
        ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if ours != theirs and (name == "hidden_size" or config.hidden_weight):
            raise UserError(f"The {what} of the teacher is {theirs}, but {ours} of the student: name its own teacher.")
    base = student.base_model
    kind = partial(EmbeddingTrainer, teacher.base_model.eval().requires_grad_(False))
    parameters = [p for name, p in base.named_parameters() if not name.startswith("pooler.")]
    if config.weights == "attention":
        parameters = attention_parameters(student)
    return _run(kind, student, base, parameters, train, config, Path(output_dir), **options)


def attention_parameters(student: Any) -> list[nn.Parameter]:
    """Projections and mechanism of the converted layers' attention."""
    block = attrgetter(student.attention_path.partition(".")[0])
    layers = {attention.layer_idx for attention in student.mixer_attentions()}
    attentions = [block(layer) for i, layer in enumerate(student.decoder_layers()) if i in layers]
    return [parameter for attention in attentions for parameter in attention.parameters()]


def _run(
    kind: Any,
    student: Any,
    model: Any,
    parameters: list[nn.Parameter],
    train: TextRows,
    config: EmbeddingConfig,
    output: Path,
    *,
    seed: int = 0,
    resume: bool | str | os.PathLike[str] = False,
    report_to: str | Sequence[str] = ("none",),
    device: str | None = None,
) -> EncoderStageResult:
    if not len(train):
        raise UserError("The training data have no row: give more text.")
    on_cpu = PartialState(cpu=device == "cpu").device.type == "cpu"
    opened = open_stage(
        config,
        train,
        student,
        output,
        seed=seed,
        resume=resume,
        report_to=report_to,
        device=device,
        facts={"train": config.weights},
        bf16=in_bfloat16(config.precision, on_cpu=on_cpu),
        # Rows within the window leave the feature maps without a gradient.
        ddp_find_unused_parameters=True,
    )
    memory, start = PeakMemory(opened.arguments.device), time.perf_counter()
    memory_errors = readable_memory_errors(kind.func.STAGE, config.section, config, train.sequence_length)
    quiet = contextlib.nullcontext() if config.dropout else without_dropout(student)
    with memory_errors, training_only(student, parameters), quiet, Interrupt() as interrupt:
        trainer = opened.trainer(kind, model, interrupt, data_collator=collate)
        losses = trainer.run_stage(opened.checkpoint)
    PartialState().wait_for_everyone()
    seconds = time.perf_counter() - start
    return EncoderStageResult(losses, opened.plan.steps, opened.tokens, seconds, memory.bytes(), opened.log_path)


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """No dropout within the block, in training mode too."""
    modules = list(model.modules())
    places: list[tuple[nn.Module, str]] = [(module, "p") for module in modules if isinstance(module, nn.Dropout)]
    places += [(module, "attention_dropout") for module in modules if hasattr(module, "attention_dropout")]
    before = [(module, name, getattr(module, name)) for module, name in places]
    for module, name in places:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


class EncoderTrainer(StageTrainer):
    """Trains an encoder on rows of text."""

    config: EmbeddingConfig

    def advice(self) -> str:
        """What to change when a loss is not finite."""
        return f"{super().advice()} or {self.config.section}.mixer_learning_rate"

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The mechanism's parameters at their learning rate without weight decay, the others at theirs, decayed where
        they are matrices."""
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        mixers = [parameter for name, parameter in trained if ".mixer." in name]
        others = [parameter for name, parameter in trained if ".mixer." not in name]
        rate, decay = self.config.learning_rate, self.config.weight_decay
        return [
            {"params": [p for p in others if p.dim() >= 2], "lr": rate, "weight_decay": decay},
            {"params": [p for p in others if p.dim() < 2], "lr": rate, "weight_decay": 0.0},
            {"params": mixers, "lr": self.config.mixer_learning_rate, "weight_decay": 0.0},
        ]


class EmbeddingTrainer(EncoderTrainer):
    """Trains sentence embeddings against a teacher's.

    Args:
        teacher: The frozen encoder, without a head.
        arguments, others: As in `StageTrainer`.
    """

    STAGE = "embedding distillation"
    LOSS_NAMES = ("loss", "embedding", "similarity", "hidden")

    config: EmbeddingConfig

    def __init__(self, teacher: Any, *arguments: Any, **others: Any) -> None:
        self.teacher = teacher
        self._step: list[Tensor] | None = None
        super().__init__(*arguments, **others)
        self.teacher.to(self.args.device)

    def prepare_batches(self, batches: list[Any]) -> list[Any]:
        """Embeds the rows of the whole step, where they are cut into micro-batches: similarities are among them all.

        One more forward pass of student and teacher, without gradients.
        """
        self._step = None
        if self.config.similarity_weight and len(batches) * self.args.world_size > 1:
            with torch.no_grad():
                pairs = [self._embeddings({k: x.to(self.args.device) for k, x in batch.items()}) for batch in batches]
            self._step = [self.accelerator.gather(torch.cat(column)) for column in zip(*pairs, strict=True)]
        return batches

    def _embeddings(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's, `(B, E)`."""
        models, mask = (self.trained, self.teacher), batch["attention_mask"]
        mine, theirs = (sentence_embeddings(model(**batch).last_hidden_state, mask) for model in models)
        return mine, theirs

    def _similarity(self, mine: Tensor, target: Tensor) -> Tensor:
        """Squared difference of the similarities: of these rows with all of the step, over its number of rows."""
        if self._step is None:
            return len(mine) * (mine @ mine.T - target @ target.T).square().mean()
        all_mine, all_targets = self._step
        part = (mine @ all_mine.T - target @ all_targets.T).square().sum() / len(all_mine)
        # Of each pair one row has a gradient here, and the other where it is this one's turn: half of it each.
        return 2 * part - part.detach()

    def counted(self, batch: Any) -> Tensor:
        """Its rows."""
        return torch.tensor(len(batch["input_ids"]))

    def losses(self, model: nn.Module, inputs: dict[str, Any], denominator: Any) -> tuple[Tensor, ...]:
        """The weighted sum, then its parts: each a mean over the rows."""
        mask = inputs["attention_mask"]
        with torch.no_grad():
            theirs = self.teacher(**inputs, output_hidden_states=True)
        ours = model(**inputs, output_hidden_states=True)
        mine, target = (sentence_embeddings(x.last_hidden_state, mask) for x in (ours, theirs))
        embedding = (1 - (mine * target).sum(-1)).sum()
        similarity = self._similarity(mine, target)
        weights = mask / mask.sum(1, keepdim=True).clamp(min=1)
        hidden = hidden_distance(ours.hidden_states[1:], theirs.hidden_states[1:], weights)
        parts = [part / denominator for part in (embedding, similarity, hidden)]
        config = self.config
        scales = (config.embedding_weight, config.similarity_weight, config.hidden_weight)
        total = torch.stack([scale * part for scale, part in zip(scales, parts, strict=True)]).sum()
        return total, *parts
