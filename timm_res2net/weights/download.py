"""Downloads of weights from their owners' addresses, and the retry policy that the Hub's client shares."""

import base64
import hashlib
import http.client
import logging
import os
import re
import ssl
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse

import tenacity
from tqdm import tqdm

from .errors import first_line
from .files import PathLike, sha256, temporary_sibling

__all__ = ['BACKOFF', 'download', 'retrying']

_logger = logging.getLogger(__name__)

BACKOFF: dict[str, Any] = dict(stop=tenacity.stop_after_attempt(5), wait=tenacity.wait_exponential(max=8))  # seconds
TIMEOUT = 30  # seconds without a byte
HASH_IN_NAME = re.compile(r'-([0-9a-f]{8,64})\.')  # the file's SHA-256 or its beginning: torch.hub's and MindCV's names
NETWORK_ERRORS = URLError, TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException  # not a full disk

T = TypeVar('T')


def retrying(is_transient: Callable[[BaseException], bool]) -> tenacity.Retrying:
    """The retry policy: exponential backoff after a transient error, with a line in the log.

    Args:
        is_transient: Whether a later attempt may succeed.

    Returns:
        Call it with a function and its arguments. It raises the last error.
    """

    def log(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        pause = state.next_action.sleep if state.next_action else 0
        _logger.info('%s; trying again in %d s', first_line(error or OSError()), pause)

    retry = tenacity.retry_if_exception(is_transient)
    return tenacity.Retrying(retry=retry, before_sleep=log, reraise=True, **BACKOFF)


class TransferError(OSError):
    """One attempt at a transfer failed."""

    def __init__(self, problem: str, transient: bool = True) -> None:
        super().__init__(problem)
        self.transient = transient


def download(url: str, folder: PathLike, read: Callable[[str], T]) -> T:
    """Downloads a file, unless it is in the folder already, and reads it.

    The file is written under a temporary name. It is renamed when its size is the announced one, its checksum is the
    one in its name or in the server's `Content-MD5` header, where there is one, and it can be read.

    Written by hand: pooch, which would fit otherwise, starts a cut download of 300 MB all over instead of resuming it.

    Args:
        url: http or https.
        folder: Where to put the file, under the last part of the URL. It is made if it does not exist.
        read: Reads the file, and raises a ValueError if it is not what it should be.

    Returns:
        What `read` returns.

    Raises:
        ConnectionError: If the download fails; nothing is left of it.
    """
    target = Path(folder, Path(urlparse(url).path).name)
    if target.exists():
        return read(str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    _logger.info('downloading %s to %s', url, target)
    with temporary_sibling(target) as temporary:
        headers = transfer(url, temporary)
        require_checksums(url, target.name, temporary, headers)
        try:
            contents = read(temporary)
        except ValueError as error:
            problem = first_line(error).replace(temporary, target.name)
            raise ConnectionError(f'what {url} sent is of no use: {problem}') from error
        os.replace(temporary, target)
    return contents


def require_checksums(url: str, name: str, path: str, headers: dict[str, str]) -> None:
    """Raises a ConnectionError if a file's checksum is not the one in its name or in the server's headers."""
    prefix = HASH_IN_NAME.search(name)
    if prefix and not sha256(path).startswith(prefix[1]):
        raise ConnectionError(f'what {url} sent is not the file that its name promises; its SHA-256 differs. Try again')
    md5 = headers.get('content-md5')
    if md5 and md5 != base64.b64encode(hashlib.md5(Path(path).read_bytes()).digest()).decode():
        raise ConnectionError(f'what {url} sent was damaged on its way; its MD5 differs. Try again')


def transfer(url: str, path: str) -> dict[str, str]:
    """Writes a URL's content to a file, with retries, and returns the response's headers, their names in lower case.

    Raises:
        ConnectionError: If that fails.
    """
    headers: dict[str, str] = {}
    bar: tqdm[NoReturn] = tqdm(desc=Path(urlparse(url).path).name, unit='B', unit_scale=True, disable=None, leave=False)
    with bar, open(path, 'wb') as file:
        try:
            retrying(lambda error: isinstance(error, TransferError) and error.transient)(
                transfer_once, url, file, headers, bar
            )
        except TransferError as error:
            raise ConnectionError(
                f'{url} can not be downloaded: {error}. If this machine is offline, bring the file by other means and '
                f'put it in {Path(path).parent}, or give it to timm_res2net.load_checkpoint'
            ) from error
    return headers


def transfer_once(url: str, file: IO[bytes], headers: dict[str, str], bar: 'tqdm[NoReturn]') -> None:
    """Requests a file, or the rest of it if the server said how to resume (ETag) in `headers`, which it updates.

    Raises:
        TransferError: If the file is not complete afterwards.
    """
    received = file.tell()
    resume = {'Range': f'bytes={received}-', 'If-Range': headers['etag']} if 'etag' in headers else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=resume), timeout=TIMEOUT) as response:
            if response.status != 206:  # the whole file, from its beginning
                received = 0
                headers.clear()
                headers.update({name.lower(): value for name, value in response.headers.items()})
                file.seek(0)
                file.truncate()
            bar.total = int(headers.get('content-length', 0)) or None
            bar.n = received
            while chunk := response.read(1 << 18):
                file.write(chunk)
                bar.update(len(chunk))
    except HTTPError as error:
        error.close()
        transient = error.code >= 500 or error.code == 429
        raise TransferError(f'the server answers {error.code} {error.reason}', transient) from error
    except NETWORK_ERRORS as error:
        raise TransferError(first_line(error)) from error
    if 'content-length' in headers and file.tell() != int(headers['content-length']):
        size = int(headers['content-length'])
        raise TransferError(f'the connection was cut after {file.tell():,} of {size:,} bytes')
