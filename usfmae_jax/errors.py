"""The exceptions that several rooms raise and catch, and the exit codes that doors turn them into."""

#: Exit codes: done, bad input or config, stopped by preemption after a saved checkpoint.
DONE, BAD_INPUT, PREEMPTED = 0, 2, 75


class InputError(ValueError):
    """Bad input or configuration.

    The message is one sentence that says what is wrong and what to type instead. Doors print it without a
    traceback and exit with status 2.
    """


class DamagedRecord(Exception):
    """A record or image that cannot be read; the input pipeline counts, names and skips it."""
