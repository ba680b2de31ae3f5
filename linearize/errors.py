"""The exception that a person is meant to read, and the one that SIGTERM becomes."""


class UserError(ValueError):
    """Something the user can mend: one sentence that says what is wrong and what to do.

    The command line and the recipes print the sentence without a trace and exit with code 2.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM, from a scheduler or a launcher: as Ctrl-C, but for the exit code."""
