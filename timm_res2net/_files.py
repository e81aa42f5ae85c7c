"""Safe reading, atomic writes and checksums."""

import hashlib
import os
import shutil
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
        with open_regular(path) as file:
            return file.read().decode('utf-8-sig')
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
    """Flushes a file, or the entries of a folder, to disk, so that no crash leaves a renamed file incomplete."""
    if os.name == 'nt' and os.path.isdir(path):  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def output_path(out: PathLike) -> Path:
    """Follows links at an output path; OSError if no regular file can be written there."""
    path = Path(os.path.realpath(out) if os.path.islink(out) else out)
    if not os.path.isdir(path.parent):
        raise FileNotFoundError(f'cannot write {path.name}: no folder {path.parent}')
    if os.path.lexists(path) and not os.path.isfile(path):  # a link can remain only if it leads to itself
        raise OSError(f'cannot write {str(out)!r}: it is {"a folder" if os.path.isdir(path) else "not a regular file"}')
    return path


def require_writable(out: PathLike) -> None:
    """Raises OSError if `atomic_write` could not write to `out`; call it before long work."""
    with temporary_folder(output_path(out).parent):
        pass


@contextmanager
def replacing(*paths: Path) -> Iterator[list[str]]:
    """Yields an empty temporary file for each path and afterwards renames all of them; after an error, none.

    A replaced file keeps its permissions. All content is flushed to disk before any file is renamed.
    """
    with ExitStack() as stack:
        folders = [stack.enter_context(temporary_folder(path.parent)) for path in paths]
        temporary = [folder / path.name for folder, path in zip(folders, paths)]
        for path, new in zip(paths, temporary):
            new.touch()
            with suppress(FileNotFoundError):
                shutil.copymode(path, new)
        yield [str(new) for new in temporary]
        for new in temporary:
            sync(new)
        for new, path in zip(temporary, paths):
            os.replace(new, path)
        for parent in {path.parent for path in paths}:
            sync(parent)


def atomic_write(out: PathLike, write: Callable[[str], object]) -> None:
    """Calls `write` with a temporary path and renames that file to `out`; links are followed.

    If that fails, the old file remains, and the error is an OSError, or a ValueError if `write` raised one.
    """
    path = output_path(out)
    try:
        with replacing(path) as (temporary,):
            write(temporary)
    except OSError as error:
        raise OSError(f'cannot write {out}: {error.strerror or first_line(error)}') from error
    except ValueError as error:
        raise ValueError(f'cannot write {out}: {first_line(error)}') from error


def atomic_write_text(out: PathLike, text: str) -> None:
    """Writes a UTF-8 text file as `atomic_write` does."""
    atomic_write(out, lambda path: Path(path).write_text(text, encoding='utf-8'))


def write_files(folder: PathLike, files: Mapping[str, bytes]) -> None:
    """Writes all of these files to a folder, or none and raises OSError. A new folder appears complete."""
    target = Path(folder)
    try:
        if target.is_dir():
            with replacing(*[output_path(target / name) for name in files]) as temporary:
                for path, content in zip(temporary, files.values()):
                    Path(path).write_bytes(content)
        else:
            write_new_folder(target, files)
    except OSError as error:
        raise OSError(f'cannot write {folder}: {error.strerror or first_line(error)}') from error


def write_new_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files to a folder that gets its name when it is complete; OSError if another process created it first."""
    with temporary_folder(make_folder(folder.parent)) as temporary:
        complete = temporary / folder.name
        complete.mkdir()
        for name, content in files.items():
            (complete / name).write_bytes(content)
            sync(complete / name)
        sync(complete)
        os.rename(complete, folder)
        sync(folder.parent)


def make_folder(out: PathLike) -> Path:
    """Creates a folder and its parents if needed; OSError if that fails."""
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise OSError(f'cannot create folder {out}: {error.strerror}') from error
    return Path(out)
