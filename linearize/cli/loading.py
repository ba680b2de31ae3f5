"""The model that a command is about, and the flags that are spelt alike in all commands."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.config.record import FINAL
from linearize.errors import UserError
from linearize.failures import stage
from linearize.paths import user_path

DTYPES = ("auto", "bfloat16", "float16", "float32")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SMALL_FILES = ("*.json", "README.md")
"""What a model says of itself without its weights."""

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Directory of a model or of a run, or a Hub id, also as ID@REVISION.")
]
Output = Annotated[str, typer.Argument(metavar="OUT", help="Directory to write.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the model on the Hub.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite/--no_overwrite", help="Replace what is there.", show_default=False)
]


@dataclass(frozen=True)
class Found:
    """A model as a command was given it."""

    name: str
    """What the user called it."""
    source: str
    """Directory, `.gguf` file or Hub id that loads."""
    revision: str | None
    """On the Hub; None: its newest, or a model on this disk."""

    @property
    def on_disk(self) -> bool:
        """Whether it is here, and not on the Hub."""
        return Path(self.source).exists()

    def repository(self, *, weights: bool) -> Path:
        """A directory that holds it; of a model on the Hub it is fetched.

        Args:
            weights: All of it; False: what it says of itself suffices.

        Raises:
            UserError: It cannot be fetched.
        """
        if self.on_disk:
            return Path(self.source)
        from huggingface_hub import snapshot_download

        from linearize.load_errors import explained

        read_config(self)  # says in a sentence what is wrong with the name
        with explained(self.source):
            patterns = None if weights else list(SMALL_FILES)
            return Path(snapshot_download(self.source, revision=self.revision, allow_patterns=patterns))


def find_model(name: str, revision: str | None = None) -> Found:
    """The model that a word of the command line names.

    Args:
        name: A directory of a model, or of a run, whose final model is meant; a `.gguf` file; a Hub id, also as
            ID@REVISION.
        revision: What `--revision` gives.

    Raises:
        UserError: There is none of that name, as far as this disk can tell.
    """
    path = Path(user_path(name))
    if path.exists():
        if revision is not None:
            raise UserError(
                f"--revision {revision} is of a model on the Hub, but {path} is a local one: leave it out."
            )
        return Found(name, str(_model_in(path)), None)
    source, at, named = name.rpartition("@")
    if at and revision is not None:
        raise UserError(f"{name} and --revision {revision} both name a revision: give one of them.")
    source, revision = (source, named) if at else (name, revision)
    if not HUB_ID.fullmatch(source):
        raise UserError(
            f"There is no model {name}: looked for a directory of a model or of a run and for a .gguf file, and it is "
            "no Hub id (NAME or OWNER/NAME): check the name."
        )
    return Found(name, source, revision)


def _model_in(path: Path) -> Path:
    """The model of a path that exists: its own, or the final one of a run."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path} is a file: give the directory of a model or of a run, a Hub id, or a .gguf file.")
        return path
    for place in (path, path / FINAL):
        if (place / "config.json").is_file():
            return place
    raise UserError(
        f"{path} holds no model: looked for config.json in it and in {path / FINAL}; make one with `linearize convert "
        "MODEL OUT`, or end the run."
    )


def converted_in(found: Found, *, weights: bool) -> Path:
    """A directory that holds a converted model.

    Args:
        weights: As in `Found.repository`.

    Raises:
        UserError: It is not converted.
    """
    from linearize.config.record import find_converted

    return find_converted(found.repository(weights=weights))


def record_of(found: Found) -> dict[str, Any]:
    """The record of a model; empty where it has none."""
    from linearize.config.record import read_record

    return read_record(found.source, revision=found.revision)


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


def load(found: Found, dtype: str, device: str, contexts: Any = None) -> tuple[Any, Any, bool]:
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
    source = found.source
    config = read_config(found)
    refuse_encoder(source, config)
    converted = hasattr(config, "mixer_types")
    scaled = _scaled_config(source, config, contexts)
    tokenizer = load_model_tokenizer(source, revision=found.revision)
    with stage("loading the model", "choose a smaller --dtype"):
        if converted:
            model = load_student(source, dtype=weights, revision=found.revision)
        else:
            with explained(source):
                options = {"dtype": weights, "revision": found.revision, **scaled}
                model = AutoModelForCausalLM.from_pretrained(source, **options)
        if scaled:
            check_scaled(model, source)
        return model.to(place).eval(), tokenizer, converted


def read_config(found: Found) -> Any:
    """The configuration of a model.

    Raises:
        UserError: It cannot be read.
    """
    from linearize.conversion.students import load_config

    return load_config(found.source, revision=found.revision)


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
