"""Downloads weights from their publishers, with huggingface_hub's downloader (retries, resume, progress bar)."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlparse

from huggingface_hub.file_download import http_get

from .._errors import first_line
from .._files import PathLike, make_folder, replacing, sha256

HASH_IN_NAME = re.compile(r'-([0-9a-f]{8,64})\.')  # SHA-256 or its beginning, as torch.hub and MindCV name files
T = TypeVar('T')


def download(url: str, folder: PathLike, read: Callable[[str], T]) -> T:
    """Downloads a file unless the folder has it, and reads it; raises ConnectionError or OSError if that fails.

    The file gets its final name only after its size and checksum, where known, were verified and it was read.
    """
    if urlparse(url).scheme not in ('http', 'https'):
        raise ValueError(f'cannot download {url!r}: it must begin with https://')
    target = Path(folder, Path(urlparse(url).path).name)
    if target.exists():
        return read(str(target))
    make_folder(target.parent)
    with replacing(target) as (temporary,):
        try:
            with open(temporary, 'wb') as file:
                http_get(url, file, displayed_filename=target.name, _nb_retries=1)  # more take 5 s if offline
            expected = HASH_IN_NAME.search(target.name)
            if expected and not sha256(temporary).startswith(expected[1]):
                raise ConnectionError('its SHA-256 differs from the one in its name')
            contents = read(temporary)
        except Exception as error:  # the client's own errors differ between versions of huggingface_hub
            if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
                raise OSError(f'cannot write {target}: {error.strerror}') from error
            problem = first_line(error).replace(temporary, target.name)
            raise ConnectionError(
                f'cannot download {url}: {problem}. If you are offline, put the file into {target.parent}'
            ) from error
    return contents
