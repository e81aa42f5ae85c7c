"""Errors of a bad file and of an unknown model, and how a message quotes what others wrote."""

import difflib
import re
from collections.abc import Iterable

__all__ = ['CheckpointError', 'UnknownModelError', 'first_line', 'printable']

LONGEST_MESSAGE = 2000  # characters


class CheckpointError(ValueError):
    """A file of weights can't be read, or is not what the model needs."""

    def __init__(self, message: str = '') -> None:
        super().__init__(printable(message, LONGEST_MESSAGE))  # names in it may be from the file


def printable(text: object, longest: int = 200) -> str:
    """A text from a file as a message may show it: nothing that a terminal obeys, and not longer than a message.

    Control characters, and those that change the direction of writing, are escaped. A long text loses its middle.
    """
    shown = str(text)
    if len(shown) > longest:
        shown = f'{shown[: longest * 2 // 3]} ... {shown[-longest // 4 :]}'
    escaped = (
        each if each.isprintable() else each.encode('unicode_escape', 'surrogatepass').decode() for each in shown
    )
    return ''.join(escaped)


class UnknownModelError(ValueError):
    """No model has this name."""

    @classmethod
    def among(cls, name: str, known: Iterable[str], where: str = '') -> 'UnknownModelError':
        """The error that names the known models most like it; `where` says where it is not."""
        alike = difflib.get_close_matches(name, list(known))
        if v1b := re.fullmatch(r'(res2net\d+)_v1b_26w_4s', name):  # the authors' name, which is most like Paddle's
            alike = [f'{v1b[1]}d']
        hint = f'did you mean {" or ".join(alike)}?' if alike else '`timm-res2net list` shows the family'
        return cls(f'there is no model {name}{where}; {hint}')


def first_line(error: BaseException) -> str:
    """Quotes an error in a message: its first line without the full stop, or its type if it has no text.

    A line that ends in a colon continues in the next one.
    """
    line, *more = str(error).strip().split('\n')
    if more and line.endswith(':'):
        line = f'{line} {more[0].strip()}'
    return printable(line.rstrip('.'), 500) or type(error).__name__
