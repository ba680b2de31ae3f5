"""What the processes of a launch decide together: one works for all, and none goes on where another cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from linearize.errors import UserError

Result = TypeVar("Result")


def _several() -> bool:
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def from_main_process(work: Callable[[], Result]) -> Result:
    """Do something on the main process alone; all of them get its result, which pickle can carry, or its error.

    Raises:
        UserError: the work raised it, in whichever process it is raised.
        RuntimeError: on the others, the work failed in another way; the main process raises its own error.
    """
    if not _several():
        return work()
    from torch import distributed

    outcome: list[Any] = [None, None, None]
    failure: Exception | None = None
    if distributed.get_rank() == 0:
        try:
            outcome[0] = work()
        except UserError as error:
            failure, outcome[1] = error, str(error)
        except Exception as error:  # of any kind: the others wait for word of it
            failure, outcome[2] = error, f"{type(error).__name__}: {error}"
    distributed.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise UserError(outcome[1])
    if outcome[2] is not None:
        raise RuntimeError(f"the main process failed ({outcome[2]})")
    return outcome[0]


def own_place() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    if not _several():
        return 0, 1
    from torch import distributed

    return distributed.get_rank(), distributed.get_world_size()


def refuse_together(problem: str | None) -> None:
    """Refuse to go on in every process if one of them has a problem.

    Args:
        problem: of this process, a sentence; None: it has none.

    Raises:
        UserError: the first problem there is, in the order of the processes.
    """
    problems: list[str | None] = [problem]
    if _several():
        from torch import distributed

        problems = [None] * distributed.get_world_size()
        distributed.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise UserError(found)
