"""The command `linearize info`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from linearize.cli.context_flags import tokens
from linearize.cli.loading import Found, Model, Revision, converted_in, find_model, read_config
from linearize.errors import UserError
from linearize.failures import command

HARDWARE = ("gain-cell",)


@command
def info(
    model: Model,
    revision: Revision = None,
    hardware: Annotated[
        str | None, typer.Option("--hardware", help="gain-cell: estimate what the attention costs on this hardware.")
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", parser=tokens, help="With --hardware: tokens that a layer holds (1024).")
    ] = None,
    cell: Annotated[
        str | None,
        typer.Option("--cell", help="With --hardware: YAML file, silicon_cmos (the default) or silicon_cmos_linear."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
) -> None:
    """Show a model's layers and the bytes of its state.

    Against the teacher's KV cache; or with --hardware what the attention of any model would cost there.
    """
    import json

    if hardware is not None:
        description: Any = estimate_model(find_model(model, revision), hardware, window=window, cell=cell)
    elif window is not None or cell is not None:
        raise UserError("--window and --cell are of the hardware estimate: give --hardware gain-cell too.")
    else:
        from linearize.evaluation import info as describe

        found = find_model(model, revision)
        description = describe(converted_in(found, weights=False))
        if not found.on_disk:
            description = replace(description, path=found.name)
    if json_output:
        print(json.dumps(description.to_dict(), indent=2))
    else:
        description.show()


def estimate_model(found: Found, hardware: str, *, window: int | None, cell: str | None) -> Any:
    """The hardware report of a model, stock or converted."""
    from linearize.conversion.gain_cells import load_cell
    from linearize.hardware import hardware_report
    from linearize.hardware.estimate import DEFAULT_WINDOW, gain_cell_layers
    from linearize.modeling import is_encoder

    if hardware not in HARDWARE:
        raise UserError(f"--hardware is {hardware!r}, but it must be one of {', '.join(HARDWARE)}.")
    chosen = None if cell is None else load_cell(cell)
    config, source = read_config(found), found.name
    if is_encoder(config):
        raise UserError(f"{source} is an encoder, which gain cells cannot run: their ring holds earlier tokens alone.")
    if gain_cell_layers(config) and (window is not None or cell is not None):
        raise UserError(f"The gain-cell layers of {source} have their own window and cell: omit --window and --cell.")
    return hardware_report(source, config, DEFAULT_WINDOW if window is None else window, chosen)
