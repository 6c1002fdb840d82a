"""The one exception that means: the person gave us something we cannot use."""


class InputError(ValueError):
    """Bad input or configuration.

    The message is one sentence that says what is wrong and what to type instead. Doors print it without a
    traceback and exit with status 2.
    """
