"""Commands, flags and what is printed; starts without anything heavy. May import all rooms below.

app.py            the command line itself: `main`, `run_recipe`, the commands that make, train or push one model
loading.py        the model that a command is about, and the flags that are spelt alike in all commands
evaluate.py, chat.py, info.py, vectors.py    a command each
runs.py           the commands that run stages
presets.py        `linearize presets`
select.py         `linearize select`
importing.py      `linearize import`
diff.py           `linearize diff`
<<<<<<< HEAD
flags.py          a flag for each setting; context_flags.py, those about context length; help.py, how all are shown
=======
flags.py          a flag for each setting; context_flags.py, those about context length; help.py, how they are listed
>>>>>>> engine
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
