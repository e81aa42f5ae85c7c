"""Downloads weights from their owners' addresses, with huggingface_hub's own download (retries, resume, progress)."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlparse

from huggingface_hub.file_download import http_get

from .._errors import first_line
from .._files import PathLike, make_folder, sha256, sync, temporary_sibling

HASH_IN_NAME = re.compile(r'-([0-9a-f]{8,64})\.')  # the file's SHA-256 or its beginning: torch.hub's and MindCV's names
T = TypeVar('T')


def download(url: str, folder: PathLike, read: Callable[[str], T]) -> T:
    """Downloads a file, unless the folder has it, and reads it; ConnectionError or OSError if that fails.

    The file gets its name only when its size and checksum are right, as far as they are known, and it can be read.
    """
    if urlparse(url).scheme not in ('http', 'https'):
        raise ValueError(f'cannot download {url!r}: it must begin with https://')
    target = Path(folder, Path(urlparse(url).path).name)
    if target.exists():
        return read(str(target))
    make_folder(target.parent)
    with temporary_sibling(target) as temporary:
        try:
            contents = fetch(url, temporary, target.name, read)
        except Exception as error:  # the client's own errors differ between versions of huggingface_hub
            if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
                raise OSError(f'cannot write {target}: {error.strerror}') from error
            problem = first_line(error).replace(temporary, target.name)
            raise ConnectionError(
                f'cannot download {url}: {problem}. Without a network, put the file into {target.parent}'
            ) from error
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
    return contents


def fetch(url: str, path: str, name: str, read: Callable[[str], T]) -> T:
    """Downloads to a file, verifies its checksum if the name contains one, and reads it."""
    with open(path, 'wb') as file:
        http_get(url, file, displayed_filename=name, _nb_retries=1)  # or it would try for 5 s without a network
    expected = HASH_IN_NAME.search(name)
    if expected and not sha256(path).startswith(expected[1]):
        raise ConnectionError('its SHA-256 differs from that in its name')
    return read(path)
