"""How a run ends when it cannot go on: one sentence and an exit code, from the command line and the recipes alike.

| what happened | exit code | output |
| --- | --- | --- |
| `UserError`, no memory, no disk space | 2 | one sentence on stderr |
| Ctrl-C | 130 | one sentence on stderr |
| SIGTERM | 143 | one sentence on stderr |
| anything else | 1 | the trace: it is a bug, and the trace is what mends it |
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from linearize.errors import Terminated, UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
PATIENCE = 30  # seconds
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def is_main_process() -> bool:
    """Whether this is the process that prints and writes: the only one, or rank 0 of a launcher's."""
    return int(os.environ.get("RANK", "0")) == 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator or the host ran out of memory."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk or the quota is full; safetensors and torch tell it only in the message."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error) or "Disk quota exceeded" in str(error)


@contextlib.contextmanager
def stage(name: str, out_of_memory: str = "") -> Iterator[None]:
    """Name the stage in the sentence about missing memory or disk space.

    Args:
        name: The stage as a person would call it, e.g. `stage 1 (attention transfer)`.
        out_of_memory: What to lower when memory ends, with the present values.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            advice = f"; {out_of_memory}" if out_of_memory else ""
            raise UserError(f"Out of memory in {name}{advice}.") from error
        if is_disk_full(error):
            raise UserError(
                f"No space left on the disk in {name}: free some space and continue with --resume_from_checkpoint "
                "(the previous checkpoint is whole)."
            ) from error
        if isinstance(error, OSError) and error.errno in UNWRITABLE and error.filename:
            raise UserError(
                f"{error.filename} cannot be used ({os.strerror(error.errno)}): check the path and its permissions."
            ) from error
        raise


def smaller(setting: str, now: int, sequence_length: int, *others: str) -> str:
    """What to do where memory ended, all of which a run that goes on may change, and what takes a new run.

    Args:
        setting: the number of sequences at once, e.g. `transfer.batch_size`. now: its value.
        sequence_length: of the data.
        others: e.g. `set load_in_4bit`.
    """
    ways = [f"lower {setting} (now {now})"] if now > 1 else []
    ways += others
    going_on = f"{', or '.join(ways)}, and resume; " if ways else ""
    return f"{going_on}a lower data.sequence_length (now {sequence_length}) takes a new run"


def guarded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Call a function and turn its failure into the exit code and the sentence of the table above.

    In a launch of several processes all of them leave with the code. What all of them find is said by the main one,
    after which the launcher ends the others; what another one alone finds it says itself, after waiting for that.
    """
    try:
        with stage("this command"), terminable():
            function(*args, **kwargs)
    except UserError as error:
        if is_main_process() or is_out_of_memory(error.__cause__ or error):
            say(str(error))
        else:
            time.sleep(PATIENCE)
            say(f"{error} (process {os.environ['RANK']})")
        return EXIT_USER_ERROR
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, Terminated)
        if is_main_process():
            what = "terminated" if terminated else "interrupted"
            say(f"{what}; {interrupt}" if str(interrupt) else what)
        return EXIT_TERMINATED if terminated else EXIT_INTERRUPTED
    return 0


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` at SIGTERM, so that nothing half-written is left. Outside the main thread, where Python
    delivers no signals, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn the failure of a command of the command line into its sentence and exit code."""
    import typer

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        code = guarded(function, *args, **kwargs)
        if code:
            raise typer.Exit(code)

    return call


def say(sentence: str) -> None:
    """Print the sentence on stderr, whole and unwrapped, so that it can be searched for."""
    sys.stdout.flush()
    print(f"linearize: {' '.join(sentence.split())}", file=sys.stderr, flush=True)
