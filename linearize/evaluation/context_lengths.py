"""Lengths in tokens and numbers of trials as a person writes them: `512,1k,32k` and `50,32k=200`; 1k is 1024."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from linearize.config.sizes import KILO, parse_tokens
from linearize.errors import UserError
from linearize.evaluation.labels import length_label

TRIALS = 50
DEPTHS = 10
Z95 = 1.959963984540054  # the normal distribution's 97.5% quantile


@dataclasses.dataclass(frozen=True)
class Trials:
    """How many prompts of each length: `default`, but for the lengths that `of_length` names."""

    default: int = TRIALS
    of_length: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def of(self, length: int) -> int:
        return self.of_length.get(length, self.default)


def parse_lengths(text: str, flag: str) -> tuple[int, ...]:
    """Read lengths separated by commas, ascending and each once.

    Args:
        flag: what the sentence calls them, for example `--passkey`.

    Raises:
        UserError: one of them is no length.
    """
    return tuple(sorted({_parse_length(part, flag) for part in text.split(",")}))


def parse_trials(text: str | None) -> Trials:
    """Read `50`, `50,32k=200` or `32k=200`.

    Raises:
        UserError: what is no number of at least 1, or a length or the default that is given twice.
    """
    default, of_length = None, dict[int, int]()
    for part in () if text is None else text.split(","):
        name, equals, number = (word.strip() for word in part.rpartition("="))
        if not re.fullmatch(r"[0-9]{1,9}", number):
            raise UserError(
                f"--trials has {part.strip()!r}: give a number, such as 50, or LENGTH=NUMBER, as in 32k=200."
            )
        if int(number) < 1:
            raise UserError(f"--trials is {part.strip()}, but it must be at least 1.")
        length = _parse_length(name, "--trials") if equals else None
        if (default is not None) if length is None else (length in of_length):
            raise UserError(f"--trials is {text!r}: give each length, and the number for all others, once.")
        if length is None:
            default = int(number)
        else:
            of_length[length] = int(number)
    return Trials(TRIALS if default is None else default, of_length)


def check_trials(trials: Trials, lengths: Sequence[int], depths: int) -> None:
    """Refuse numbers for lengths that nobody asked for, and fewer trials than depths.

    Raises:
        UserError: the first that does not fit.
    """
    if depths < 1:
        raise UserError(f"--depths is {depths}, but it must be at least 1.")
    if unasked := [length for length in trials.of_length if length not in lengths]:
        asked = ", ".join(map(length_label, lengths))
        raise UserError(f"--trials names the length {length_label(unasked[0])}, but those asked for are {asked}.")
    for length in lengths:
        if (number := trials.of(length)) < depths:
            raise UserError(
                f"--depths is {depths}, but the length {length_label(length)} has only {number} "
                f"trial{'s' if number > 1 else ''}: raise --trials or lower --depths."
            )


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """The 95% score interval of a proportion.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    share, spread = hits / trials, Z95**2 / trials
    middle = share + spread / 2
    half = Z95 * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    low, high = ((middle + sign * half) / (1 + spread) for sign in (-1, 1))
    return (0.0 if hits == 0 else low), (1.0 if hits == trials else high)


def _parse_length(text: str, flag: str) -> int:
    tokens = parse_tokens(text)
    if not tokens:
        raise UserError(
            f"{flag} has the length {text.strip()!r}: give tokens separated by commas, such as 512,1k,32k "
            f"(1k is {KILO})."
        )
    return tokens
