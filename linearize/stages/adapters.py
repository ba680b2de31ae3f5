"""LoRA on a converted model: attached, saved in peft's format, and merged into plain weights."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from linearize.config.record import CARD_FILE, is_converted
from linearize.conversion.quantization import freeze_base, is_quantized
from linearize.errors import UserError
from linearize.files import atomic_directory
from linearize.modeling import PREFIX, backbone_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from linearize.config.settings import FinetuneConfig

MIXER = "mixer"
"""Name of the mechanism's module in every converted attention."""
UNSAVED = "a converted model that was not saved (its README.md says how to load this adapter)"
"""Base of an adapter on a model that lies in no repository: loading it by that name fails, and says why."""


class AdaptedModel(PeftModelForCausalLM):
    """A peft model whose forward can run the training objective instead of the language model's own forward.

    The objective works on hidden states and never sees all logits, yet it must be called through the outermost module:
    the hooks of DDP, which average the gradients, sit there.
    """

    def __init__(self, model: nn.Module, peft_config: LoraConfig, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # peft 0.21 asks by the older of two names, which transformers 5.23 warns about.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            super().__init__(model, peft_config, *args, **kwargs)

    def forward(self, *args: Any, objective: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        """Runs `objective(self, **kwargs)` where one is given, else the model as usual."""
        if objective is None:
            return super().forward(*args, **kwargs)
        return objective(self, *args, **kwargs)

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Saves the adapter; embeddings never train here, so peft need not ask the Hub whether the vocabulary was
        resized."""
        kwargs.setdefault("save_embedding_layers", False)
        super().save_pretrained(save_directory, *args, **kwargs)


def adaptable_layers(model: PreTrainedModel) -> list[str]:
    """Last names of the linear layers that can take an adapter, in order of appearance; the mechanism and the head are
    left out."""
    head = model.get_output_embeddings()
    names: dict[str, None] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and MIXER not in parts:
            names[parts[-1]] = None
    return list(names)


def default_targets(model: PreTrainedModel) -> list[str]:
    """The projections of the attention."""
    return list(backbone_of(model.config).lora_targets)


def transposes(model: nn.Module) -> bool:
    """Whether the layers that take adapters keep their weight as (inputs, outputs), which peft must be told."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def check_targets(model: PreTrainedModel, targets: Sequence[str], section: str = "finetune") -> None:
    """Refuses names of layers that the model does not have.

    Raises:
        UserError: names the unknown ones and those there are.
    """
    known = adaptable_layers(model)
    unknown = [target for target in targets if target not in known]
    if unknown:
        raise UserError(
            f"{section}.lora_targets: {type(model).__name__} has no linear layer named {', '.join(unknown)}; "
            f"there are {', '.join(known)}."
        )


def base_of(model: PreTrainedModel) -> str:
    """The converted repository that a model was loaded from, as an adapter names it; `UNSAVED` of one that was just
    converted, whose teacher the adapter does not belong on."""
    name = model.name_or_path
    if name and not os.path.isfile(name):
        with contextlib.suppress(OSError):
            found = cached_file(name, "config.json", local_files_only=True)
            if found is not None and is_converted(Path(found).parent):
                return os.path.abspath(name) if os.path.exists(name) else name
    return UNSAVED


def add_adapters(
    model: PreTrainedModel,
    config: FinetuneConfig,
    *,
    train_mixers: bool,
    base_model: str | os.PathLike[str] | None = None,
    revision: str | None = None,
) -> AdaptedModel:
    """Freezes the model and puts LoRA on the configured layers, in place.

    Args:
        model: The converted model; half-precision and quantised bases get float32 adapters.
        config: Rank, alpha, dropout and target layers; without any the attention's projections.
        train_mixers: Train a float32 copy of every mechanism along; it is saved with the adapter.
        base_model: What the adapter belongs on, written as its `base_model_name_or_path`: the converted repository
            (path or Hub id). Default: where the model was loaded from.
        revision: Of that repository on the Hub.

    Raises:
        UserError: A target layer that the model does not have.
    """
    targets = config.lora_targets or default_targets(model)
    check_targets(model, targets, config.section)
    freeze_base(model)
    has_mixers = any(name.split(".")[-1] == MIXER for name, _ in model.named_modules())
    alpha = config.lora_alpha
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        fan_in_fan_out=transposes(model),
        modules_to_save=[MIXER] if train_mixers and has_mixers else None,
        base_model_name_or_path=base_of(model) if base_model is None else os.fspath(base_model),
        revision=revision,
    )
    return AdaptedModel(model, lora)


def is_mixer_parameter(name: str) -> bool:
    """Whether a parameter's dotted name belongs to a mechanism."""
    return MIXER in name.split(".")


def save_adapter(
    model: PeftModel,
    directory: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Writes the adapter in peft's format, with a card of its own, atomically.

    Args:
        model: What `finetune` returned; its adapter names what it belongs on (`add_adapters`).
        directory: Made, or replaced as a whole.
        tokenizer: Saved beside it.

    Raises:
        UserError: The disk is full or the directory cannot be written.
    """
    from linearize.hub.card import adapter_card

    path, lora = Path(directory), model.peft_config["default"]
    with atomic_directory(path) as partial:
        model.save_pretrained(str(partial), save_embedding_layers=False)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
        text = adapter_card(path.name, lora, model.get_base_model().config, unsaved=UNSAVED)
        (partial / CARD_FILE).write_text(text, encoding="utf-8")
    return path


def merge(model: PeftModel) -> PreTrainedModel:
    """Adds the adapters to the weights and puts the trained mechanisms in place, in place.

    Args:
        model: An adapter model on an unquantised base; it is used up.

    Returns:
        The plain model, ready to save.

    Raises:
        UserError: The base is quantised (merge into full weights instead), or the adapter holds values that are not
            finite.
    """
    base: Any = model.get_base_model()
    if is_quantized(base):
        raise UserError("the base is quantised: merge into the full weights with merge_into_unquantized.")
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        if "NaNs detected" not in str(error):
            raise
        raise UserError(
            "the adapter holds values that are not finite: finetune again from a checkpoint before them."
        ) from error
    return merged.requires_grad_(True).eval()


def merge_into_unquantized(
    model: PeftModel,
    model_name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    revision: str | None = None,
    token: str | None = None,
) -> PreTrainedModel:
    """Loads the full weights again, moves mechanisms and adapters over, and merges them.

    Args:
        model: An adapter model on a 4-bit or 8-bit base (any base works).
        model_name_or_path: The teacher that the base was converted from, or a converted repository.
        dtype: Of the merged weights; the mechanisms stay float32.
        revision: Of the repository.
        token: For a gated one.

    Returns:
        The plain model on the CPU.
    """
    from linearize.conversion.students import convert_like, load_config, load_student

    base: Any = model.get_base_model()
    source = os.fspath(model_name_or_path)
    where: dict[str, Any] = {"revision": revision, "token": token, "dtype": dtype}
    if load_config(source, revision=revision, token=token).model_type.startswith(PREFIX):
        full: Any = load_student(source, **where)
    else:
        full = convert_like(source, base.config, **where)
    full.load_mixer_state_dict(_mixer_tensors(base))
    adapter = "default"
    lora = _copy_of(model.peft_config[adapter])
    lora.fan_in_fan_out = transposes(full)  # a quantised Conv1D is stored as a linear layer
    adapted = AdaptedModel(full, lora)
    outcome: Any = set_peft_model_state_dict(adapted, get_peft_model_state_dict(model, save_embedding_layers=False))
    if outcome.unexpected_keys:
        raise UserError(f"{source} is not what the adapter was trained on: it has no {outcome.unexpected_keys[0]}.")
    return merge(adapted)


def _copy_of(config: Any) -> Any:
    copied = type(config)(
        **{key: value for key, value in config.to_dict().items() if key in config.__dataclass_fields__}
    )
    copied.inference_mode = False
    return copied


def _mixer_tensors(base: nn.Module) -> dict[str, torch.Tensor]:
    """The mechanisms' tensors from before finetuning, under the names of a model without adapters."""
    tensors: dict[str, torch.Tensor] = {}
    for name, module in base.named_modules():
        if name.split(".")[-1] == MIXER:
            plain = getattr(module, "original_module", module)
            tensors.update(plain.state_dict(prefix=f"{name}."))
    return tensors
