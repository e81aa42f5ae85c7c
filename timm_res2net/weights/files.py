"""Atomic writes and checksums."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import first_line

__all__ = ['atomic_write', 'atomic_write_text', 'sha256', 'temporary_sibling']

PathLike = str | os.PathLike[str]


def sha256(path: PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def temporary_sibling(path: Path) -> Iterator[str]:
    """Makes an empty temporary file in the same folder, with the same suffix, and removes it if it still exists."""
    handle, temporary = tempfile.mkstemp(suffix=path.suffix, prefix='.', dir=path.parent)
    os.close(handle)
    try:
        os.chmod(temporary, 0o644)
        yield temporary
    finally:
        Path(temporary).unlink(missing_ok=True)


def atomic_write(out: PathLike, write: Callable[[str], object]) -> None:
    """Writes a file under a temporary name in the same folder, then renames it.

    Args:
        out: File to write.
        write: Writes to the file whose name it is given.

    Raises:
        OSError: If the file can't be written; what was there before still is.
        ValueError: If `write` raises one, as matplotlib does for a suffix that it doesn't know.
    """
    path = Path(out)
    if not path.parent.is_dir():
        raise FileNotFoundError(f'there is no folder {path.parent} to write {path.name} to')
    try:
        with temporary_sibling(path) as temporary:
            write(temporary)
            os.replace(temporary, path)
    except OSError as error:
        raise OSError(f'{out} can not be written: {first_line(error)}') from error
    except ValueError as error:
        raise ValueError(f'{out} can not be written: {first_line(error)}') from error


def atomic_write_text(out: PathLike, text: str) -> None:
    """Writes a text file as `atomic_write` does."""
    atomic_write(out, lambda path: Path(path).write_text(text))
