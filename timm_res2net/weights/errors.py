"""The error of a bad file, and how a message quotes another error."""

__all__ = ['CheckpointError', 'first_line']


class CheckpointError(ValueError):
    """A file of weights can't be read, or is not what the model needs."""


def first_line(error: BaseException) -> str:
    """Quotes an error in a message: its first line without the full stop, or its type if it has no text.

    A line that ends in a colon continues in the next one.
    """
    line, *more = str(error).strip().split('\n')
    if more and line.endswith(':'):
        line = f'{line} {more[0].strip()}'
    return line.rstrip('.') or type(error).__name__
