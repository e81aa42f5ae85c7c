"""Atomic writes and checksums."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import first_line

__all__ = [
    'atomic_write',
    'atomic_write_text',
    'make_folder',
    'read_text',
    'require_writable',
    'sha256',
    'temporary_sibling',
]

PathLike = str | os.PathLike[str]


def sha256(path: PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_text(path: PathLike) -> str:
    """Reads a text file; ValueError if that is not possible."""
    try:
        return Path(path).read_text(encoding='utf-8')
    except OSError as error:
        raise ValueError(f'{path} can not be opened: {error.strerror}') from error
    except UnicodeDecodeError:
        raise ValueError(f'{path} is no text in UTF-8') from None


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


def output_path(out: PathLike) -> Path:
    """Where to write a file, after following links.

    Raises:
        OSError: If that can't be a file: a device, pipe or folder is there, or there is no folder for it.
    """
    path = Path(os.path.realpath(out) if os.path.islink(out) else out)
    shown = os.fspath(out) or "''"
    if not os.path.isdir(path.parent):
        raise FileNotFoundError(f'there is no folder {path.parent} to write {path.name} to')
    if os.path.lexists(path) and not os.path.isfile(path):  # of links only one that leads to itself is left
        raise OSError(f'{shown} can not be written: it is {"a folder" if os.path.isdir(path) else "no regular file"}')
    return path


def require_writable(out: PathLike) -> None:
    """Raises an OSError if `atomic_write` can't write there, for work that takes long before it writes."""
    atomic_write(out, lambda path: None, replace=False)


def atomic_write(out: PathLike, write: Callable[[str], object], replace: bool = True) -> None:
    """Writes a file under a temporary name in the same folder, then renames it. A link is followed.

    Args:
        out: File to write.
        write: Writes to the file whose name it is given.
        replace: Rename it; else it is removed again.

    Raises:
        OSError: If the file can't be written; what was there before still is.
        ValueError: If `write` raises one, as matplotlib does for a suffix that it doesn't know.
    """
    path = output_path(out)
    try:
        with temporary_sibling(path) as temporary:
            write(temporary)
            if replace:
                os.replace(temporary, path)
    except OSError as error:
        raise OSError(f'{out} can not be written: {error.strerror or first_line(error)}') from error
    except ValueError as error:
        raise ValueError(f'{out} can not be written: {first_line(error)}') from error


def make_folder(out: PathLike) -> Path:
    """Makes a folder and those above it, unless it is there; OSError if it can't be made."""
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise OSError(f'{out} is no folder and can not be made one: {error.strerror}') from error
    return Path(out)


def atomic_write_text(out: PathLike, text: str) -> None:
    """Writes a text file as `atomic_write` does."""
    atomic_write(out, lambda path: Path(path).write_text(text))
