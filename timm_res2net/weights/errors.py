"""Errors of a bad file and of an unknown model, and how a message quotes another error."""

import difflib
from collections.abc import Iterable

__all__ = ['CheckpointError', 'UnknownModelError', 'first_line']


class CheckpointError(ValueError):
    """A file of weights can't be read, or is not what the model needs."""


class UnknownModelError(ValueError):
    """No model has this name."""

    @classmethod
    def among(cls, name: str, known: Iterable[str], where: str = '') -> 'UnknownModelError':
        """The error that names the known models most like it; `where` says where it is not."""
        alike = difflib.get_close_matches(name, list(known))
        hint = f'did you mean {" or ".join(alike)}?' if alike else '`timm-res2net list` shows the family'
        return cls(f'there is no model {name}{where}; {hint}')


def first_line(error: BaseException) -> str:
    """Quotes an error in a message: its first line without the full stop, or its type if it has no text.

    A line that ends in a colon continues in the next one.
    """
    line, *more = str(error).strip().split('\n')
    if more and line.endswith(':'):
        line = f'{line} {more[0].strip()}'
    return line.rstrip('.') or type(error).__name__
