"""Bytes where they are needed: each layer gets the window, or the softmax attention, that it is worth.

A short measured pass gives what every layer loses with a few windows (`select_measure.py`), and a greedy rule spends
the budget (`select_place.py`). The budget is that of the layers whose state is bounded; softmax layers keep their
KV cache besides. Sinks and the memory's width are as `attention` has them.

    selection.json     the tables and the placement; tables are read again where model, text and settings agree
    selection.yaml     the placement as `mixer_types` and `mixers`, for `linearize run` and `convert --config`
    selection.png      both as a plot
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.config.selection import CONFIG, FILES, PLOT, TABLES
from linearize.errors import UserError
from linearize.processes import from_main_process
from linearize.stages.select_plan import option_label, with_option

if TYPE_CHECKING:
    from linearize.stages.select_measure import LayerTables
    from linearize.stages.select_plan import SelectionPlan
    from linearize.tables import Table

SOFTMAX = "softmax"


@dataclass
class Selection:
    """Which layer has which window, and what it was chosen by."""

    plan: SelectionPlan
    tables: LayerTables
    identity: dict[str, Any]
    """Digests of model and text, and the settings that the tables follow from."""
    options: list[int | None]
    """Place of each layer's window in `plan.windows`; None: it keeps softmax."""

    @property
    def windows(self) -> list[int | None]:
        """Of each layer, tokens; None: it keeps softmax."""
        return [None if option is None else self.plan.windows[option] for option in self.options]

    @property
    def kept(self) -> list[int | None]:
        """Tokens that each layer keeps beside its window; None: it keeps softmax."""
        return [None if option is None else self.plan.kept[option] for option in self.options]

    @property
    def layer_bytes(self) -> list[int | None]:
        """State of each layer; None where it grows with the text."""
        return [None if option is None else self.plan.sizes[option] for option in self.options]

    @property
    def bytes(self) -> int:
        """State of all bounded layers."""
        return sum(size for size in self.layer_bytes if size is not None)

    @property
    def mixer_types(self) -> list[str]:
        """As `linearize.convert` takes it."""
        return [SOFTMAX if option is None else self._name(option) for option in self.options]

    @property
    def mixers(self) -> dict[str, dict[str, Any]]:
        """As `linearize.convert` takes them: an entry for each window, with what is kept beside it, in use."""
        plan, used = self.plan, sorted({option for option in self.options if option is not None})
        return {
            self._name(option): with_option(plan.config.mechanism, plan.windows[option], plan.kept[option])
            for option in used
        }

    def _name(self, option: int) -> str:
        label = option_label(self.plan.windows[option], self.plan.kept[option], between="_")
        return f"{self.plan.config.mechanism['type']}_{label}"

    def summary(self) -> dict[str, Any]:
        """What the record of a converted repository keeps, and the plot shows."""
        losses = self.tables.divergence
        chosen = zip(losses, self.options, strict=True)
        return {
            "windows": self.windows,
            "kept": self.kept,
            "budget_bytes": self.plan.budget,
            "state_bytes": self.bytes,
            "ranking": self.plan.config.select.ranking,
            "least_window": self.plan.windows[0],
            "least_divergence": [row[0] for row in losses],
            "divergence": [0.0 if option is None else row[option] for row, option in chosen],
            "tokens": self.tables.tokens,
            "sequence_length": self.tables.sequence_length,
            "seconds": self.tables.seconds,
        }

    def sentence(self) -> str:
        """One line for a person."""
        from linearize.evaluation.placement import selection_sentence

        return selection_sentence(self.summary())

    def show(self) -> None:
        """Print the placement and what it costs."""
        from linearize.tables import show_tables

        show_tables([self.table()], [self.sentence(), self._cost()])

    def table(self) -> Table:
        """Layer, window, bytes, and what was measured."""
        from linearize.tables import Table

        plan = self.plan
        least = f"divergence\nwith {plan.windows[0]}"
        rows = []
        for layer, (size, option) in enumerate(zip(self.layer_bytes, self.options, strict=True)):
            divergence, error = self.tables.divergence[layer], self.tables.error[layer]
            rows.append(
                [
                    str(layer),
                    SOFTMAX if option is None else option_label(plan.windows[option], plan.kept[option]),
                    "grows" if size is None else f"{size:,}",
                    *(["-", "-"] if option is None else [f"{row[option]:.2g}" for row in (divergence, error)]),
                    f"{divergence[0]:.2g}",
                ]
            )
        header = [
            "layer",
            "window + kept" if any(plan.kept) else "window",
            "bytes",
            "divergence,\nnats a token",
            "error of\nthe layer",
            least,
        ]
        return Table("Selection", header, rows)

    def _cost(self) -> str:
        tables = self.tables
        what = "windows and kept tokens" if any(tables.kept) else "windows"
        return (
            f"measured: {len(tables.error)} layers x {len(tables.windows)} {what} on {tables.tokens:,} tokens in "
            f"pieces of {tables.sequence_length:,}, {tables.seconds:,.0f} s"
        )

    def save(self, directory: str | PathLike[str]) -> list[Path]:
        """Write the tables, the config and the plot; returns their paths."""
        from linearize.evaluation.placement import plot_placement
        from linearize.files import write_file

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        values = {"identity": self.identity, "tables": dataclasses.asdict(self.tables), "placement": self.summary()}
        write_file(folder / TABLES, (json.dumps(values, indent=1) + "\n").encode())
        write_file(folder / CONFIG, self._yaml().encode())
        plot_placement(self.summary(), folder / PLOT)
        return [folder / name for name in FILES]

    def _yaml(self) -> str:
        import yaml

        config = self.plan.config
        model = {name: getattr(config, name) for name in ("model_name_or_path", "revision", "dtype", "sliding_window")}
        values = {**model, "mixer_types": self.mixer_types, "mixers": self.mixers}
        return f"# {self.sentence()}\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=119)


def select(
    plan: SelectionPlan,
    rows: Any,
    load_model: Callable[[dict[str, Any]], Any],
    directory: str | PathLike[str] | None = None,
) -> Selection:
    """Measure, unless `directory` holds the finished tables, and place; nothing is written. Every process calls it.

    Args:
        plan: of `plan_selection`.
        rows: training sequences.
        load_model: from the settings of one mechanism to the untrained student with it in every layer.
        directory: where an earlier call has saved its selection.

    Raises:
        UserError: the text is too short, or `directory` holds the selection of another model, text or settings.
    """
    identity = _identity(plan, rows)
    stored = None if directory is None else Path(directory) / TABLES
    tables = None if stored is None else from_main_process(lambda: read_tables(stored, identity))
    if tables is None:
        tables = _measured(plan, rows, load_model)
    return Selection(plan, tables, identity, placed(plan, getattr(tables, plan.config.select.ranking)))


def placed(plan: SelectionPlan, losses: list[list[float]]) -> list[int | None]:
    """The option of each layer, None where it keeps softmax; softmax goes to the layers that lose most with the
    window that all could have."""
    from linearize.stages.select_place import largest, place

    softmax = plan.softmax
    if isinstance(softmax, int):
        softmax = largest([row[plan.uniform] for row in losses], softmax)
    options: list[int | None] = [None] * plan.layers
    bounded = [layer for layer in range(plan.layers) if layer not in softmax]
    budget = plan.bounded * plan.sizes[0] if plan.budget is None else plan.budget
    for layer, option in zip(bounded, place([losses[i] for i in bounded], plan.sizes, budget), strict=True):
        options[layer] = option
    return options


def _measured(plan: SelectionPlan, rows: Any, load_model: Callable[[dict[str, Any]], Any]) -> LayerTables:
    import gc

    import torch

    from linearize.stages.select_measure import layer_tables, measured_pieces

    settings = plan.config.select
    pieces = measured_pieces(rows, settings.tokens, plan.sequence_length)
    model = load_model(with_option(plan.config.mechanism, plan.windows[-1], plan.kept[-1]))
    tables = layer_tables(model, pieces, plan.windows, plan.kept, settings.batch_size)
    del model  # its memory is the next one's
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return tables


def _identity(plan: SelectionPlan, rows: Any) -> dict[str, Any]:
    """All that the tables follow from: a change of anything else places anew without measuring."""
    from linearize.stages.identity import data_identity, source_identity

    config = plan.config
    read = ("type", "sinks", "age_penalty")
    settings: dict[str, Any] = {name: config.mechanism[name] for name in read if name in config.mechanism}
    settings |= {
        "windows": plan.windows,
        "kept": plan.kept,
        "tokens": config.select.tokens,
        "sequence_length": plan.sequence_length,
    }
    settings |= {name: getattr(config, name) for name in ("dtype", "sliding_window", "load_in_4bit", "load_in_8bit")}
    base = source_identity(config.source, config.revision)
    return {"base": base, "data": data_identity(rows), "settings": settings}


def read_tables(path: Path, identity: Mapping[str, Any]) -> LayerTables | None:
    """The finished tables in a file; None where there is no file.

    Raises:
        UserError: it is damaged, or was measured on something else.
    """
    from linearize.stages.select_measure import LayerTables

    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        stored, tables = values["identity"], LayerTables(**values["tables"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it to measure again.") from error
    names = {"base": "model", "data": "text", "settings": "settings"}
    if others := [what for name, what in names.items() if stored.get(name) != identity[name]]:
        raise UserError(
            f"{path} was measured with {' and '.join(f'other {what}' for what in others)}: measure again with "
            "--overwrite, or name another output_dir."
        )
    return tables
