"""Paths as people write them."""

import os


def user_path(path: str | os.PathLike[str]) -> str:
    """A path, or a name that is none (a Hub id), with a home directory in place of `~` or `~name` at its start.

    A shell expands it in its own words, but not in a YAML file, in quotes or behind `=`.
    """
    return os.path.expanduser(os.fspath(path))


def expand_words(words: list[str]) -> list[str]:
    """Words of a command line, those that are paths and the values behind `--flag=` as `user_path` gives them."""
    expanded = []
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        expanded.append(flag + equals + user_path(value))
    return expanded
