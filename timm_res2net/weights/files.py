"""Files that appear whole or not at all: written here, or downloaded."""

import base64
import hashlib
import http.client
import logging
import os
import re
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlparse

from tqdm import tqdm

_logger = logging.getLogger(__name__)

PAUSES = (1, 2, 4, 8)  # seconds before each further attempt at a download
TIMEOUT = 30  # seconds without a byte
HASH_IN_NAME = re.compile(
    r'-([0-9a-f]{8,64})\.'
)  # the beginning of the file's sha256, as torch.hub and MindCV name files


def first_line(error: BaseException) -> str:
    """What an error says, to quote in a message: its first line without the full stop, or its type if it is mute.

    A line that ends in a colon goes on in the next one.
    """
    line, *more = str(error).strip().split('\n')
    if more and line.endswith(':'):
        line = f'{line} {more[0].strip()}'
    return line.rstrip('.') or type(error).__name__


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def temporary_beside(path: Path) -> Iterator[str]:
    """Gives the name of an empty file beside another, with its suffix, which goes at the end if it is still there."""
    handle, temporary = tempfile.mkstemp(suffix=path.suffix, prefix='.', dir=path.parent)
    os.close(handle)
    try:
        os.chmod(temporary, 0o644)
        yield temporary
    finally:
        Path(temporary).unlink(missing_ok=True)


def replace_file(out: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Writes a file under a temporary name beside its own, then renames it; ValueError if that fails."""
    path = Path(out)
    if not path.parent.is_dir():
        raise ValueError(f'there is no folder {path.parent} to write {path.name} to')
    try:
        with temporary_beside(path) as temporary:
            write(temporary)
            os.replace(temporary, path)
    except (OSError, ValueError) as error:
        raise ValueError(f'{out} can not be written: {first_line(error)}') from error


def replace_text(out: str | os.PathLike[str], text: str) -> None:
    """Writes a file of text as `replace_file` does."""
    replace_file(out, lambda path: Path(path).write_text(text))


def download(url: str, folder: str | os.PathLike[str], check: Callable[[str], object]) -> Path:
    """Downloads a file, unless it is in the folder already.

    It lands under a temporary name and is renamed when its size is what the server announced, its hash is the one in
    its name or in the server's `Content-MD5`, where there is one, and `check` is content with it. A cut connection is
    taken up where it broke.

    Args:
        url: http or https.
        folder: Where to put it, under the last part of the address. It is made if it does not exist.
        check: Reads the file, and raises an error if it is not what it should be.

    Returns:
        The file.

    Raises:
        ConnectionError: If it can't be had; nothing is left of it then.
    """
    target = Path(folder, Path(urlparse(url).path).name)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    _logger.info('downloading %s to %s', url, target)
    with temporary_beside(target) as temporary:
        headers = transfer(url, temporary)
        beginning = HASH_IN_NAME.search(target.name)
        if beginning and not sha256(temporary).startswith(beginning[1]):
            raise ConnectionError(
                f'what {url} sent is not the file that its name tells; its SHA-256 differs. Try again'
            )
        md5 = headers.get('Content-MD5')
        if md5 and md5 != base64.b64encode(hashlib.md5(Path(temporary).read_bytes()).digest()).decode():
            raise ConnectionError(f'what {url} sent was damaged on its way; its MD5 differs. Try again')
        try:
            check(temporary)
        except ValueError as error:
            problem = first_line(error).replace(temporary, target.name)
            raise ConnectionError(f'what {url} sent is of no use: {problem}') from error
        os.replace(temporary, target)
    return target


def transfer(url: str, path: str) -> dict[str, str]:
    """Writes what a server sends to a file, in as many attempts as that takes, and returns the headers of the first."""
    headers: dict[str, str] = {}
    problem = ''
    bar = tqdm(desc=Path(urlparse(url).path).name, unit='B', unit_scale=True, disable=None, leave=False)
    with bar, open(path, 'wb') as file:
        for pause in (*PAUSES, None):
            try:
                if fetch(url, file, headers, bar):
                    return headers
                problem = f'the connection was cut after {file.tell():,} of {int(headers["Content-Length"]):,} bytes'
            except HTTPError as error:
                problem = f'the server answers {error.code} {error.reason}'
                error.close()
                if error.code < 500 and error.code != 429:
                    break
            except (OSError, http.client.HTTPException) as error:
                problem = first_line(error)
            if pause is not None:
                _logger.info('%s: %s; trying again in %d s', url, problem, pause)
                time.sleep(pause)
    raise ConnectionError(
        f'{url} can not be downloaded: {problem}. If this machine is offline, bring the file by other means and '
        f'put it in {Path(path).parent}, or give it to timm_res2net.load_checkpoint'
    )


def fetch(url: str, file: Any, headers: dict[str, str], bar: tqdm) -> bool:
    """Makes one attempt to get (the rest of) a file; False if the server stopped before the announced end."""
    received = file.tell()
    resume = {'Range': f'bytes={received}-', 'If-Range': headers.get('ETag', '')} if headers.get('ETag') else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=resume), timeout=TIMEOUT) as response:
        if response.status != 206:  # the whole file, from its beginning
            received = 0
            headers.clear()
            headers.update(response.headers.items())
            file.seek(0)
            file.truncate()
        bar.total = int(headers.get('Content-Length', 0)) or None
        bar.n = received
        while chunk := response.read(1 << 18):
            file.write(chunk)
            bar.update(len(chunk))
    return 'Content-Length' not in headers or file.tell() == int(headers['Content-Length'])
