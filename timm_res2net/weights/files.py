"""Safe reading, atomic writes and checksums."""

import hashlib
import io
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import first_line

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    'atomic_write',
    'atomic_write_text',
    'lock',
    'make_folder',
    'open_regular',
    'read_text',
    'require_writable',
    'sha256',
    'sync',
    'temporary_folder',
    'temporary_sibling',
    'write_files',
]

PathLike = str | os.PathLike[str]
PREFIX = '.timm-res2net-'  # of temporary folders


def sha256(path: PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def open_regular(path: PathLike) -> BinaryIO:
    """Opens a file. A pipe, whose end may never come, or another device is an OSError."""
    flags = os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0)
    file = os.fdopen(os.open(path, flags), 'rb')
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        raise OSError(None, 'Is a directory' if stat.S_ISDIR(mode) else 'It is no regular file')
    return file


def read_text(path: PathLike) -> str:
    """Reads a text file, also with the mark that Windows puts before one; ValueError if that is not possible."""
    try:
        with open_regular(path) as file, io.TextIOWrapper(file, encoding='utf-8-sig') as text:
            return text.read()
    except OSError as error:
        raise ValueError(f'{path} can not be opened: {error.strerror}') from error
    except UnicodeDecodeError:
        raise ValueError(f'{path} is no text in UTF-8') from None


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Makes a temporary folder in another one, and removes it, as well as those that killed processes left there.

    A lock, which ends with its process, tells that one is in use. Where there are no locks, nothing is taken for left.
    """
    for left in parent.glob(f'{PREFIX}*'):
        with suppress(OSError):
            unused = lock(left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(unused)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        handle: int | None = None
        try:
            try:
                handle = lock(folder)
            except BlockingIOError:  # another process took it for left, and is removing it
                continue
            except OSError:  # there are no locks here
                pass
            if not folder.exists():  # as that process has removed it
                continue
            yield folder
            return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if handle is not None:
                os.close(handle)


def lock(folder: Path, *, wait: bool = False) -> int:
    """Locks a folder until the handle that it returns is closed, or the process ends.

    Raises:
        OSError: If another process has locked it and this one shall not wait, or there are no locks here.
    """
    if fcntl is None:
        raise OSError('there are no locks of folders here')
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        raise
    return handle


def sync(path: PathLike) -> None:
    """Returns when a file, or the names in a folder, are on the disk: before that, a rename can outlive its file."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if os.path.isdir(path):  # Windows opens no folders
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def temporary_sibling(path: Path) -> Iterator[str]:
    """Makes an empty temporary file in the same file system, with the same name, and removes it if it still exists.

    Its permissions are those of the file that it is to replace, or of any new file.
    """
    with temporary_folder(path.parent) as folder:
        temporary = folder / path.name
        temporary.touch()
        with suppress(FileNotFoundError):
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        yield str(temporary)


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
                sync(temporary)
                os.replace(temporary, path)
                sync(path.parent)
    except OSError as error:
        raise OSError(f'{out} can not be written: {error.strerror or first_line(error)}') from error
    except ValueError as error:
        raise ValueError(f'{out} can not be written: {first_line(error)}') from error


def write_files(folder: PathLike, files: Mapping[str, bytes]) -> None:
    """Writes files to a folder, which is made if it does not exist: all of them, or none if one can't be written.

    Links are followed.

    Raises:
        OSError: If that is not possible; what was there before still is.
    """
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
        with suppress(OSError):  # if it has files after all
            if is_new:
                place.rmdir()
        raise OSError(f'{folder} can not be written: {error.strerror or first_line(error)}') from error


def make_folder(out: PathLike) -> Path:
    """Makes a folder and those above it, unless it is there; OSError if it can't be made."""
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise OSError(f'{out} is no folder and can not be made one: {error.strerror}') from error
    return Path(out)


def atomic_write_text(out: PathLike, text: str) -> None:
    """Writes a text file as `atomic_write` does."""
    atomic_write(out, lambda path: Path(path).write_text(text, encoding='utf-8'))
