"""`report.md`, the page of a run: what it was, what its stages did, what was measured, and the plots."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.runs.directory import CONFIG, YARDSTICK

if TYPE_CHECKING:
    from linearize.runs.plan import RunPlan

CAPTIONS = {
    "perplexity": "Perplexity of the validation text over the tokens of all stages",
    "evaluation_arms": "Held-out perplexity of each model",
    "evaluation_by_length": "Held-out perplexity by length of the text",
    "evaluation_linear_share": "Share of the linear branch in the output, by layer",
}
"""Plot of a run -> what it shows."""
DOES = {"train": "training", "adapt": "adaptation"}
"""Kind of a stage without a title -> what it does."""


def page(plan: RunPlan, stages: Mapping[str, Any], figures: str, path: Path) -> str:
    """The whole page.

    Args:
        plan: Of the run.
        stages: As `report.json` has them.
        figures: What was measured, in Markdown; empty: nothing.
        path: The run directory, with its plots.
    """
    parts = [_beginning(plan, path), _stages_table(plan, stages), figures, _plots(path)]
    return "\n".join(part.strip() + "\n" for part in parts if part)


def _beginning(plan: RunPlan, path: Path) -> str:
    """What the run was: its model, attention, data, and how it is run again."""
    config, start = plan.config, plan.start
    layers, data = f"{start.model.num_hidden_layers} layers, {config.dtype}", config.data
    bits = ", 4-bit base" if config.load_in_4bit else ", 8-bit base" if config.load_in_8bit else ""
    if config.architecture is not None:
        model = f"{config.architecture.type} of random weights ({layers})"
    else:
        model = f"`{config.model_name_or_path}` ({layers}{bits})"
    names = data.dataset if isinstance(data.dataset, list) else [data.dataset]
    held_out = data.validation or f"{data.validation_documents:,} documents of it"
    if config.evaluation is not None and config.evaluation.texts is not None:
        held_out += "; measured on text of its own"
    rows = "rows of up to" if start.encoder else "sequences of"
    lines = [
        f"# {_title(plan)}",
        "",
        f"- model: {model}",
        f"- attention: {_attention(plan)}",
        f"- data: {', '.join(f'`{name}`' for name in names)} in {rows} {data.sequence_length:,} tokens; "
        f"validation: {held_out}",
    ]
    if config.yardstick is not None:
        lines.append("- yardstick: the softmax teacher, trained on as many tokens as the student's weights")
    again = shlex.quote((path / CONFIG).as_posix())
    return "\n".join([*lines, f"- again: `linearize run {again} --output_dir ANOTHER`"])


def _title(plan: RunPlan) -> str:
    """What became of what."""
    config = plan.config
    if config.architecture is not None:
        source = f"{config.architecture.type} of random weights"
    else:
        source = Path(str(config.model_name_or_path)).name
    types = " and ".join(dict.fromkeys(mixer["type"].replace("_", "-") for mixer in plan.start.mechanisms))
    return f"{source} with {types or 'softmax'} attention"


def _attention(plan: RunPlan) -> str:
    """The mechanisms, with the settings that are not their defaults."""
    from linearize.modeling.registry import mechanism

    config, start, shown = plan.config, plan.start, []
    for settings in start.mechanisms:
        usual = vars(mechanism(settings["type"]).config())
        own = [f"{key} {value}" for key, value in settings.items() if key != "type" and _unusual(usual, key, value)]
        shown.append(", ".join([settings["type"], *own]))
    if not shown:
        return "softmax"
    # Where layers are chosen by measuring, the selection says so itself.
    kept = [] if start.converted or plan.selection is not None else config.kept_layers
    if config.mixer_types is not None and not start.converted:
        kept = [place for place, name in enumerate(config.mixer_types) if name not in (config.mixers or {})]
    return "; ".join(
        [
            *dict.fromkeys(shown),
            *(["as it was converted"] if start.converted else []),
            *([f"layers {', '.join(map(str, kept))} keep softmax"] if kept else []),
            *([plan.selection.describe()] if plan.selection is not None else []),
        ]
    )


def _unusual(usual: Mapping[str, Any], key: str, value: Any) -> bool:
    """Whether a setting is worth a word; a section of settings is not, which config.yaml has."""
    return key in usual and not isinstance(value, Mapping) and (key == "window" or usual[key] != value)


def _stages_table(plan: RunPlan, stages: Mapping[str, Any]) -> str:
    """What each stage did, as a table of Markdown."""
    lines = [
        "### Stages",
        "",
        "| stage | does | trains | steps | tokens | seconds |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    titles = {stage.name: stage.title for stage in plan.stages}
    for name, done in stages.items():
        steps, seconds, planned = done.get("steps"), done.get("seconds"), plan.of(name)
        note = "" if planned is None else planned.note
        lines.append(
            "| "
            + " | ".join(
                [
                    "yardstick (softmax teacher)" if name == YARDSTICK else name,
                    titles.get(name) or DOES.get(done["kind"], done["kind"]),
                    done["trained"],
                    f"{steps:,}" if steps else "",
                    f"{done['tokens']:,}" if done["tokens"] else note,
                    f"{seconds:,.0f}" if seconds else "",
                ]
            )
            + " |"
        )
    return "\n".join(lines) if stages else ""


def _plots(path: Path) -> str:
    """The plots that are there, those of the whole run before those of its stages."""
    there = sorted((path / "plots").glob("*.png"))
    known = [file for name in CAPTIONS for file in there if file.stem == name]
    rest = [file for file in there if file not in known]
    named = [(CAPTIONS.get(file.stem, file.stem.replace("_", " ")), file) for file in [*known, *rest]]
    lines = [f"![{caption}](plots/{file.name})" for caption, file in named]
    return "\n".join(["### Plots", "", "\n\n".join(lines)]) if lines else ""
