"""Errors of this package, and functions that quote untrusted text in messages."""

import difflib
import re
from collections.abc import Iterable


class Res2NetError(Exception):
    """Base class of the errors that this package defines."""


class CheckpointError(Res2NetError, ValueError):
    """A weights file cannot be read, or does not fit the model."""

    def __init__(self, message: str = '') -> None:
        super().__init__(sanitize(message, limit=2000))  # it may quote names from the file


class UnknownModelError(Res2NetError, ValueError):
    """No model or set of weights has this name."""

    @classmethod
    def among(cls, name: str, known: Iterable[str], where: str = '', kind: str = 'model') -> 'UnknownModelError':
        """Builds the error with the closest known names; `where` follows "no KIND NAME" in the message."""
        close = difflib.get_close_matches(name, list(known))
        if v1b := re.fullmatch(r'(res2net\d+)_v1b_26w_4s', name):  # the authors' name; Paddle's would be closest
            close = [f'{v1b[1]}d']
        hint = f'Did you mean {" or ".join(close)}?' if close else 'Run `timm-res2net list` to see all names.'
        return cls(f'no {kind} {name!r}{where}. {hint}')


def sanitize(text: object, limit: int = 200) -> str:
    """Makes untrusted text safe to print: escapes control and bidirectional characters, shortens long text."""
    shown = str(text)
    if len(shown) > limit:
        shown = f'{shown[: limit * 2 // 3]} ... {shown[-limit // 4 :]}'
    return ''.join(
        each if each.isprintable() else each.encode('unicode_escape', 'surrogatepass').decode() for each in shown
    )


def first_line(error: BaseException) -> str:
    """Returns an error's first line, without a full stop, to quote in another message; its type if it has no text."""
    line, *more = str(error).strip().split('\n')
    while more and line.endswith(':'):
        line = f'{line} {more.pop(0).strip()}'
    return sanitize(line.rstrip('.'), 500) or type(error).__name__
