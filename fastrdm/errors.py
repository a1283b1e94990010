"""Errors that end a command with one line instead of a traceback. No torch."""


class RunError(Exception):
    """Base class of failures while a command works, after its arguments were accepted; exit status 1.

    A setting or an argument that is refused is a ValueError, exit status 2.
    """
