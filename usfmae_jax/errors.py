"""The exceptions that several rooms raise and catch."""


class InputError(ValueError):
    """Bad input or configuration.

    The message is one sentence that says what is wrong and what to type instead. Doors print it without a
    traceback and exit with status 2.
    """


class DamagedRecord(Exception):
    """A record or image that cannot be read; the input pipeline counts, names and skips it."""
