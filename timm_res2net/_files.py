"""Safe reading, atomic writes and checksums."""

import hashlib
import io
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ._errors import first_line

PathLike = str | os.PathLike[str]


def sha256(path: PathLike) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def open_regular(path: PathLike) -> BinaryIO:
    """Opens a regular file for reading; OSError for anything else, such as a pipe that never ends."""
    flags = os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0)
    file = os.fdopen(os.open(path, flags), 'rb')
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        raise OSError(None, 'is a directory' if stat.S_ISDIR(mode) else 'not a regular file')
    return file


def read_text(path: PathLike) -> str:
    """Reads a UTF-8 text file, with or without a byte order mark; ValueError if that fails."""
    try:
        with open_regular(path) as file, io.TextIOWrapper(file, encoding='utf-8-sig') as text:
            return text.read()
    except OSError as error:
        raise ValueError(f'cannot read {path}: {error.strerror}') from error
    except UnicodeDecodeError:
        raise ValueError(f'cannot read {path}: it is not UTF-8 text') from None


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Makes a temporary folder inside `parent`, on the same file system, and removes it afterwards."""
    with tempfile.TemporaryDirectory(prefix='.timm-res2net-', dir=parent) as folder:
        yield Path(folder)


def sync(path: PathLike) -> None:
    """Flushes a file, or the entries of a folder, to disk, so that a later rename cannot outlive its content."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if os.path.isdir(path):  # Windows cannot open folders
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def temporary_sibling(path: Path) -> Iterator[str]:
    """Yields an empty temporary file on the same file system, with the name and permissions of `path`."""
    with temporary_folder(path.parent) as folder:
        temporary = folder / path.name
        temporary.touch()
        with suppress(FileNotFoundError):
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        yield str(temporary)


def output_path(out: PathLike) -> Path:
    """Resolves links of an output path; OSError if no regular file can be written there."""
    path = Path(os.path.realpath(out) if os.path.islink(out) else out)
    if not os.path.isdir(path.parent):
        raise FileNotFoundError(f'cannot write {path.name}: no folder {path.parent}')
    if os.path.lexists(path) and not os.path.isfile(path):  # the only links left are those that point to themselves
        raise OSError(f'cannot write {str(out)!r}: it is {"a folder" if os.path.isdir(path) else "not a regular file"}')
    return path


def require_writable(out: PathLike) -> None:
    """Raises OSError if `atomic_write` could not write to `out`; call it before long work."""
    with temporary_sibling(output_path(out)):
        pass


def atomic_write(out: PathLike, write: Callable[[str], object]) -> None:
    """Calls `write` with a temporary path, flushes it to disk and renames it to `out`; links are followed.

    The old file survives any failure, which is an OSError, or the ValueError that `write` raises.
    """
    path = output_path(out)
    try:
        with temporary_sibling(path) as temporary:
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    except OSError as error:
        raise OSError(f'cannot write {out}: {error.strerror or first_line(error)}') from error
    except ValueError as error:
        raise ValueError(f'cannot write {out}: {first_line(error)}') from error


def write_files(folder: PathLike, files: Mapping[str, bytes]) -> None:
    """Writes several files to a folder, creating it if needed: all of them, or none and an OSError."""
    is_new, place = not os.path.isdir(folder), make_folder(folder)
    paths = {name: output_path(place / name) for name in files}
    try:
        with ExitStack() as stack:
            temporary = {name: stack.enter_context(temporary_sibling(path)) for name, path in paths.items()}
            for name, content in files.items():
                Path(temporary[name]).write_bytes(content)
                sync(temporary[name])
            for name, path in paths.items():
                os.replace(temporary[name], path)
            for parent in {path.parent for path in paths.values()}:
                sync(parent)
    except OSError as error:
        with suppress(OSError):  # it is not empty after all
            if is_new:
                place.rmdir()
        raise OSError(f'cannot write {folder}: {error.strerror or first_line(error)}') from error


def make_folder(out: PathLike) -> Path:
    """Creates a folder and its parents if needed; OSError if that fails."""
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise OSError(f'cannot create folder {out}: {error.strerror}') from error
    return Path(out)


def atomic_write_text(out: PathLike, text: str) -> None:
    """Writes a UTF-8 text file as `atomic_write` does."""
    atomic_write(out, lambda path: Path(path).write_text(text, encoding='utf-8'))
