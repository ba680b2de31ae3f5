"""The one exception that a person is meant to read."""


class UserError(ValueError):
    """Something the user can mend: one sentence that says what is wrong and what to do.

    The command line and the recipes print the sentence without a trace and exit with code 2.
    """
