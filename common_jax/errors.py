"""The exceptions for bad input, which a user can mend."""

__all__ = ["InputError", "Taken"]


class InputError(Exception):
    """Bad input: one line that names the file, line or field, and how to mend it.

    Command lines print it and exit with code 2; nothing that it concerns has been written.
    """


class Taken(InputError):
    """Another run holds what is asked for."""
