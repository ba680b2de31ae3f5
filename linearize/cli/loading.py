"""The model that a command is about, with the flags that say which, in what type and where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.config.record import is_converted
from linearize.errors import UserError
from linearize.failures import stage

DTYPES = ("auto", "bfloat16", "float16", "float32")

Directory = Annotated[str, typer.Argument(help="Directory of a converted model, or of a run.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]


def choose_device(name: str) -> Any:
    """`auto`, `cpu` or `cuda` as a torch device."""
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device is {name!r}, but it must be one of auto, cpu, cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but no GPU is visible: use auto or cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(name: str) -> Any:
    """`auto`, or a dtype of torch."""
    import torch

    if name not in DTYPES:
        raise UserError(f"--dtype is {name!r}, but it must be one of {', '.join(DTYPES)}.")
    return name if name == "auto" else getattr(torch, name)


def load(source: str, dtype: str, device: str, contexts: Any = None) -> tuple[Any, Any, bool]:
    """A model with its tokenizer, on its device, and whether it is a converted one.

    Args:
        contexts: a `ContextPlan` whose scaling of the RoPE a stock model gets.
    """
    from transformers import AutoModelForCausalLM

    from linearize.conversion.students import load_model_tokenizer, load_student, refuse_encoder
    from linearize.evaluation.rope_scaling import check_scaled
    from linearize.load_errors import explained

    weights = choose_dtype(dtype)
    place = choose_device(device)
    source = model_of(source)
    config = read_config(source)
    refuse_encoder(source, config)
    converted = hasattr(config, "mixer_types")
    scaled = _scaled_config(source, config, contexts)
    tokenizer = load_model_tokenizer(source)
    with stage("loading the model", "choose a smaller --dtype"):
        if converted:
            model = load_student(source, dtype=weights)
        else:
            with explained(source):
                model = AutoModelForCausalLM.from_pretrained(source, dtype=weights, **scaled)
        if scaled:
            check_scaled(model, source)
        return model.to(place).eval(), tokenizer, converted


def model_of(source: str) -> str:
    """The converted model of a run directory; any other source as it is."""
    if Path(source).is_dir() and not is_converted(source) and is_converted(Path(source) / "final"):
        return str(Path(source) / "final")
    return source


def read_config(source: str) -> Any:
    from linearize.conversion.students import load_config

    return load_config(source)


def _scaled_config(source: str, config: Any, contexts: Any) -> dict[str, Any]:
    """`config=...` where the plan scales the RoPE; nothing where it does not, or where all lengths fit as it is."""
    from linearize.evaluation.rope_scaling import with_yarn

    scaling = contexts.rope_scaling if contexts is not None else None
    if scaling is None:
        return {}
    with_yarn(config, 1.0, source)  # refused before its factor is asked for
    factor = scaling.choose(config, contexts.lengths())
    if factor == 1 and scaling.factor is None:
        print("The longest length fits the trained context: --rope_scaling yarn=auto leaves RoPE as it is.")
        return {}
    return {"config": with_yarn(config, factor, source)}


def check_context(model: Any, flag: str, tokens: int) -> None:
    """Refuse sequences that are longer than the model's context, where it has one."""
    from linearize.evaluation.arms import context_tokens

    context = context_tokens(model.config)
    if context is not None and tokens > context:
        raise UserError(f"--{flag} is {tokens}, but the model's context is {context} tokens.")
