"""A table as data, shown in a terminal by rich or written as Markdown: one source, two looks."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, Literal

NOT_A_TERMINAL = 120  # columns of a file or a pipe


@dataclasses.dataclass
class Table:
    """Cells are ready to print; the first column is left-aligned, the others right-aligned unless `text` is set."""

    title: str
    header: list[str]
    rows: list[list[str]]
    text: bool = False


def show_tables(tables: Sequence[Table], notes: Sequence[str] = (), console: Any = None) -> None:
    """Print tables and the notes below them, by rich."""
    import rich.box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    console = console or Console(width=None if sys.stdout.isatty() else NOT_A_TERMINAL)
    for table in tables:
        shown = RichTable(
            title=escape(table.title), title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for i, name in enumerate(table.header):
            justify: Literal["left", "right"] = "left" if i == 0 or table.text else "right"
            shown.add_column(escape(name), justify=justify, overflow="fold")  # numbers wrap rather than lose digits
        for row in table.rows:
            shown.add_row(*(escape(cell) for cell in row))
        console.print(shown)
    for note in notes:
        console.print(f"* {note}", markup=False, highlight=False, soft_wrap=True)


def markdown_tables(tables: Sequence[Table], notes: Sequence[str] = (), heading: str = "###") -> str:
    """The same as Markdown, each table under a heading."""
    lines = []
    for table in tables:
        lines += [f"{heading} {table.title}", "", _row(table.header)]
        lines.append(_row(["---" if i == 0 or table.text else "---:" for i in range(len(table.header))]))
        lines += [*map(_row, table.rows), ""]
    lines += [f"- {note}" for note in notes]
    return "\n".join(lines).strip() + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def format_bytes(number: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.0f} B" if unit == "B" else f"{number:.{1 if number < 100 else 0}f} {unit}"
        number /= 1024
    raise AssertionError("the last unit returns")


def format_number(number: float | None, digits: int = 4) -> str:
    """Significant digits without an exponent up to a million; "-" for None."""
    if number is None:
        return "-"
    if number != 0 and not 1e-4 <= abs(number) < 1e6:
        return f"{number:.{digits - 1}e}"
    places = max(0, digits - len(f"{abs(number):.0f}")) if abs(number) >= 1 else digits - 1
    return f"{number:.{places}f}"


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
