"""Commands, flags and what is printed; starts without anything heavy. May import all rooms below.

app.py            the command line itself: `main`, `run_recipe`, and the commands about one model
runs.py           the commands that run a whole training
presets.py        `linearize presets`
select.py         `linearize select`
importing.py      `linearize import`
diff.py           `linearize diff`
commands.py       what the commands do once their flags are read
flags.py          a flag for each setting; context_flags.py, those about context length
"""

from typing import TYPE_CHECKING

from linearize.lazy import on_first_use

if TYPE_CHECKING:
    from linearize.cli.app import main, run_recipe

__getattr__ = on_first_use(
    __name__,
    {
        ".app": ("main", "run_recipe"),
    },
)

__all__ = [
    "main",
    "run_recipe",
]
