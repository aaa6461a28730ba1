"""The one error a user is meant to read."""


class InputError(ValueError):
    """Something given to spd-fast is wrong.

    The message is one sentence that names the thing (file, shape, column), says what is wrong with
    it and what was expected. The command line prints it without a traceback and exits with 2.
    """
