"""The models of a run: what it starts from, what it learns from, and what comes out in full weights."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from linearize.conversion.quantization import is_quantized, quantization_config

if TYPE_CHECKING:
    from linearize.runs.directory import StagesDirectory
    from linearize.runs.plan import RunPlan
    from linearize.stages.select import Selection


class RunModels:
    """Loads the models of one run.

    Args:
        plan: Of the run.
        directory: Its directory.
        device: The process's.
        tokenizer: Of its model.
    """

    def __init__(self, plan: RunPlan, directory: StagesDirectory, device: torch.device, tokenizer: Any) -> None:
        self.plan, self.directory, self.device, self.tokenizer = plan, directory, device, tokenizer
        self.config, self.start = plan.config, plan.start
        self.selection: Selection | None = None
        self.dtype: torch.dtype = getattr(torch, self.config.dtype)

    @property
    def quantizes(self) -> bool:
        """Whether frozen weights are held in 4 or 8 bits."""
        return self.config.load_in_4bit or self.config.load_in_8bit

    def options(self, *, quantized: bool) -> dict[str, Any]:
        """How weights are loaded.

        Args:
            quantized: In 4 or 8 bits if the settings say so; False loads the full weights on the CPU, to merge into.
        """
        bits = quantization_config(
            load_in_4bit=self.config.load_in_4bit and quantized,
            load_in_8bit=self.config.load_in_8bit and quantized,
            compute_dtype=self.dtype,
        )
        placed = {} if bits is None else {"quantization_config": bits, "device_map": {"": self.device}}
        return {"dtype": self.dtype, **placed}

    def layers(self) -> dict[str, Any]:
        """Which layer gets which attention, as `convert` takes it."""
        chosen = self.selection
        if chosen is None:
            return self.config.layers()
        return {"mixer_types": chosen.mixer_types, "mixers": chosen.mixers}

    def first(self, *, quantized: bool = True, layers: dict[str, Any] | None = None) -> Any:
        """What the run starts from: the untrained student, a converted or a stock model, or random weights.

        Args:
            quantized: As in `options`.
            layers: Other layers than those of the run.
        """
        from transformers import set_seed

        from linearize.conversion.random_models import random_model
        from linearize.conversion.students import convert, load_encoder, load_model, load_student

        config, options = self.config, self.options(quantized=quantized)
        set_seed(config.seed)
        revision = config.revision
        if config.architecture is not None:
            model = random_model(config, self.tokenizer)
        elif self.start.converted:
            model = load_student(config.source, revision=revision, **options)
        elif not self.start.mechanisms:
            load = load_encoder if self.start.encoder else load_model
            model = load(config.source, dtype=self.dtype, revision=revision)
        else:
            where: dict[str, Any] = {"sliding_window": config.sliding_window, "revision": revision}
            model = convert(config.source, **(layers or self.layers()), **where, **options)
        return self.placed(model) if quantized else model

    def after(self, repository: Path) -> Any:
        """The model that a stage left."""
        from linearize.conversion.students import load_encoder, load_model, load_student

        if self.start.mechanisms:
            return self.placed(load_student(repository, **self.options(quantized=True)))
        load = load_encoder if self.start.encoder else load_model
        return self.placed(load(repository, dtype=self.dtype))

    def placed(self, model: Any) -> Any:
        """The model on its device, with the run's kernels."""
        if not is_quantized(model):
            model.to(self.device)
        if hasattr(model, "set_op_backend"):
            model.set_op_backend(self.config.op_backend)
        return model

    def teacher(self, name: str) -> Any:
        """The frozen model that a stage's `teacher` names, in float32."""
        from linearize.conversion.students import load_encoder, load_model

        config = self.config
        if name == "base" and self.start.encoder:
            return load_encoder(config.source, revision=config.revision)
        if name == "base":
            return load_model(config.source, revision=config.revision)
        if name == "yardstick":
            return load_model(self.directory.yardstick)
        return load_model(self.directory.of_stage(name) if name in config.stages else name)

    def of_yardstick(self) -> Any:
        """The trained teacher with the student's layers, untrained: its arms are the teacher's and the controls'."""
        from linearize.conversion.students import convert

        layers, window = self.layers(), self.config.sliding_window
        return self.placed(convert(self.directory.yardstick, **layers, sliding_window=window, dtype=self.dtype))

    def whole(self, model: Any, base: str | Path) -> Any:
        """A model in full weights, adapters merged.

        Args:
            model: After a stage: plain or adapted, quantised or not; it is used up.
            base: Where the full weights under the adapters are.
        """
        from linearize.conversion.students import load_student
        from linearize.stages.finetuning import merge, merge_into_unquantized

        adapted = hasattr(model, "peft_config")
        if not is_quantized(model.get_base_model() if adapted else model):
            return merge(model) if adapted else model
        if adapted:
            revision = self.config.revision if base == self.config.model_name_or_path else None
            return merge_into_unquantized(model, base, dtype=self.dtype, revision=revision)
        own = base == self.config.model_name_or_path
        full: Any = self.first(quantized=False) if own else load_student(base, **self.options(quantized=False))
        full.load_mixer_state_dict({name: tensor.cpu() for name, tensor in model.mixer_state_dict().items()})
        return full

    def measured(self, model: Any) -> Any:
        """The finished model on its device, where nothing else of the run is left; where full weights do not fit, the
        saved ones in the bits that the run trained on."""
        from linearize.conversion.students import load_student
        from linearize.hardware.memory_full import fits

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if not self.quantizes or fits(model, self.device):
            return self.placed(model)
        return load_student(self.directory.final, **self.options(quantized=True))
