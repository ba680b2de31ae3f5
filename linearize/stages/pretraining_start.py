"""What a pretraining starts from: a checkpoint or random weights, what of it trains, and the teacher beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import set_seed

from linearize.conversion.pretraining_model import check_model, random_model
from linearize.conversion.students import load_config, load_encoder, load_model
from linearize.data.vocabulary import check_vocabulary
from linearize.errors import UserError
from linearize.evaluation.arms import context_tokens
from linearize.modeling import is_encoder

if TYPE_CHECKING:
    from linearize.config.pretraining import PretrainConfig
    from linearize.stages.distillation import Distiller


def build_model(config: PretrainConfig, tokenizer: Any) -> Any:
    """The checkpoint's model, or one with random weights, in float32 on the CPU.

    Raises:
        UserError: The checkpoint cannot be read, has too few positions or entries for text and tokenizer, or has no
            scalers where only they are to train.
    """
    set_seed(config.seed)
    if config.model_name_or_path is not None:
        source = config.model_name_or_path
        load = load_encoder if is_encoder(load_config(source)) else load_model
        model = _checked(load(source), config, tokenizer)
        return model if config.training.train == "all" else _freeze_all_but_scalers(model)
    check_model(config)
    return random_model(config, tokenizer)


def _freeze_all_but_scalers(model: Any) -> Any:
    from linearize.stages.adaptation import scalers_of

    model.requires_grad_(False)
    for scaler in scalers_of(model).values():
        scaler.requires_grad_(True)
    return model


def build_distiller(config: PretrainConfig, model: Any) -> Distiller | None:
    """The teacher of `config.distillation`, in float32 on the CPU, or None.

    Raises:
        UserError: It cannot be read, or does not fit the model.
    """
    if config.distillation is None or config.distillation.teacher is None:
        return None
    from linearize.stages.distillation import Distiller

    return Distiller(load_model(config.distillation.teacher), model, config.distillation)


def _checked(model: Any, config: PretrainConfig, tokenizer: Any) -> Any:
    positions, length = getattr(model.config, "max_position_embeddings", None), config.data.sequence_length
    longest = context_tokens(model.config)
    if longest is not None and length > longest:
        landmarks = "" if longest == positions else f", which with its landmarks hold {longest} tokens"
        raise UserError(
            f"data.sequence_length is {length}, but {config.model_name_or_path} has {positions} positions{landmarks}: "
            "lower it."
        )
    entries = model.get_input_embeddings().weight.shape[0]
    check_vocabulary(tokenizer, entries, str(config.model_name_or_path))
    return model
