"""Downloads of weights from their owners' addresses, and the deadline and retry policy that the Hub's client shares."""

import base64
import hashlib
import http.client
import logging
import math
import os
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, wait
from email.message import Message
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse

import tenacity
from tqdm import tqdm

from .errors import first_line, printable
from .files import PathLike, make_folder, sha256, sync, temporary_sibling

__all__ = ['BACKOFF', 'LARGEST', 'Deadline', 'LateError', 'download', 'in_time', 'retrying']

_logger = logging.getLogger(__name__)

BACKOFF: dict[str, Any] = dict(stop=tenacity.stop_after_attempt(5), wait=tenacity.wait_exponential(max=8))  # seconds
TIMEOUT = 30  # seconds without a byte
PATIENCE = 'TIMM_RES2NET_TIMEOUT'  # the environment variable with the seconds of a deadline
SLOWEST = 50_000  # bytes a second; a download that is faster has no deadline
LARGEST = 1 << 32  # bytes; no file of weights is larger
HASH_IN_NAME = re.compile(r'-([0-9a-f]{8,64})\.')  # the file's SHA-256 or its beginning: torch.hub's and MindCV's names
NETWORK_ERRORS = URLError, TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException  # not a full disk

T = TypeVar('T')


class Deadline:
    """The moment until which a server is waited for.

    Args:
        seconds: From now, all calls and pauses together; `math.inf` for no end. If None, those in the environment
            variable TIMM_RES2NET_TIMEOUT, or two minutes.

    Raises:
        ValueError: If that is no positive number.
    """

    def __init__(self, seconds: float | None = None) -> None:
        wanted = os.environ.get(PATIENCE, 120) if seconds is None else seconds
        try:
            self.seconds = float(wanted)
        except (TypeError, ValueError):
            self.seconds = math.nan
        if not self.seconds > 0:
            name = PATIENCE if seconds is None else 'timeout'
            raise ValueError(f'{name} is {wanted!r}; give a positive number of seconds')
        self.end = time.monotonic() + self.seconds

    @property
    def left(self) -> float:
        """Seconds, 0 when it has passed."""
        return max(0.0, self.end - time.monotonic())

    def received(self, size: int) -> None:
        """Moves the deadline for bytes that have come, so that none is too slow that comes at a fair speed."""
        self.end += size / SLOWEST


class LateError(ConnectionError):
    """A deadline has passed."""


def in_time(function: Callable[[], T], deadline: Deadline, late: str, thread: str | None = None, grace: float = 0) -> T:
    """Calls a function in another thread, and leaves it alone there when a deadline has passed.

    Args:
        function: What may wait for a server without end.
        deadline: Until when it is waited for.
        late: The message of the error then.
        thread: The thread's name.
        grace: Seconds more, for a function that mostly ends by itself then, and can say more.

    Raises:
        LateError: If the deadline has passed.
        Exception: What the function raises.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name=thread, daemon=True).start()
    while not future.done() and (left := deadline.end + grace - time.monotonic()) > 0:
        wait([future], min(left, threading.TIMEOUT_MAX))
    if not future.done():
        raise LateError(late)
    return future.result()


def retrying(is_transient: Callable[[BaseException], bool], deadline: Deadline) -> tenacity.Retrying:
    """The retry policy: exponential backoff after a transient error, with a line in the log.

    Where a server's name has no address there is one more attempt and no other: whoever is offline wants to know that.

    Args:
        is_transient: Whether a later attempt may succeed.
        deadline: When to stop.

    Returns:
        Call it with a function and its arguments. It raises the last error.
    """

    def log(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        pause = state.next_action.sleep if state.next_action else 0
        _logger.info('%s; trying again in %d s', first_line(error or OSError()), pause)

    def sleep(seconds: float) -> None:
        time.sleep(min(seconds, deadline.left))

    def may_retry(state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        if error is None or not deadline.left or (state.attempt_number > 1 and has_no_address(error)):
            return False
        return is_transient(error)

    return tenacity.Retrying(retry=may_retry, sleep=sleep, before_sleep=log, reraise=True, **BACKOFF)


def has_no_address(error: BaseException | None) -> bool:
    """Whether the cause of an error is that a server's name has no address: so it is on a machine without a network."""
    for _ in range(10):
        if error is None or isinstance(error, socket.gaierror):
            break
        error = error.__cause__ or error.__context__
    return isinstance(error, socket.gaierror)


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
        ValueError: If the URL is no address on the web.
        ConnectionError: If the download fails, or nothing comes for two minutes (or what the environment variable
            TIMM_RES2NET_TIMEOUT says); nothing is left of it.
        OSError: If the file can't be written.
    """
    if urlparse(url).scheme not in ('http', 'https'):
        raise ValueError(f'{url} can not be downloaded: give an address that begins with https://')
    target = Path(folder, Path(urlparse(url).path).name)
    if target.exists():
        return read(str(target))
    make_folder(target.parent)
    _logger.info('downloading %s to %s', url, target)
    try:
        with temporary_sibling(target) as temporary:
            headers = transfer(url, temporary)
            require_checksums(url, target.name, temporary, headers)
            try:
                contents = read(temporary)
            except ValueError as error:
                problem = first_line(error).replace(temporary, target.name)
                raise ConnectionError(f'what {url} sent is of no use: {problem}') from error
            sync(temporary)
            os.replace(temporary, target)
            sync(target.parent)
    except ConnectionError:  # an OSError, too
        raise
    except TransferError as error:
        raise ConnectionError(
            f'{url} can not be downloaded: {error}. If this machine is offline, bring the file by other means and put '
            f'it in {target.parent}, or give it to timm_res2net.load_checkpoint'
        ) from error
    except OSError as error:
        raise OSError(f'{target} can not be written: {error.strerror or first_line(error)}') from error
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
        TransferError: If that fails.
    """
    headers: dict[str, str] = {}
    deadline = Deadline()
    retry = retrying(lambda error: isinstance(error, TransferError) and error.transient, deadline)
    bar: tqdm[NoReturn] = tqdm(desc=Path(urlparse(url).path).name, unit='B', unit_scale=True, disable=None, leave=False)
    with bar, open(path, 'wb') as file:
        once = partial(transfer_once, url, file, headers, bar, deadline)
        late = f'{url} can not be downloaded: the server began no answer in {deadline.seconds:g} s'
        retry(in_time, once, deadline, late, grace=0.5)
    return headers


def transfer_once(
    url: str, file: IO[bytes], headers: dict[str, str], bar: 'tqdm[NoReturn]', deadline: Deadline
) -> None:
    """Requests a file, or the rest of it if the server said how to resume (ETag) in `headers`, which it updates.

    Raises:
        TransferError: If the file is not complete afterwards.
    """
    resume = {'Range': f'bytes={file.tell()}-', 'If-Range': headers['etag']} if 'etag' in headers else {}
    request = urllib.request.Request(url, headers=resume)
    try:
        with urllib.request.urlopen(request, timeout=min(TIMEOUT, deadline.left + 0.01)) as response:
            if response.status == 206:
                require_rest(file.tell(), headers, response.headers)
            else:  # the whole file, from its beginning
                headers.clear()
                headers.update({name.lower(): value for name, value in response.headers.items()})
                file.seek(0)
                file.truncate()
            size = announced_size(headers)
            bar.total, bar.n = size, file.tell()
            while chunk := response.read1(1 << 18):
                file.write(chunk)
                bar.update(len(chunk))
                deadline.received(len(chunk))
                if file.tell() > (LARGEST if size is None else size):
                    raise TransferError(f'it is larger than {LARGEST if size is None else size:,} bytes', False)
                if not deadline.left:
                    raise TransferError(f'only {file.tell():,} bytes came in {deadline.seconds:g} s', False)
    except HTTPError as error:
        error.close()
        transient = error.code >= 500 or error.code == 429
        reason = str(error.reason).partition('\n')[0]  # of redirects in a circle there are more lines
        raise TransferError(f'the server answers {error.code} {printable(reason)}', transient) from error
    except NETWORK_ERRORS as error:
        raise TransferError(first_line(error)) from error
    if size is not None and file.tell() != size:
        raise TransferError(f'the connection was cut after {file.tell():,} of {size:,} bytes')


def announced_size(headers: dict[str, str]) -> int | None:
    """The size of a file by its headers, None if they don't tell."""
    text = headers.get('content-length')
    if text is None:
        return None
    if not re.fullmatch('[0-9]{1,18}', text):
        raise TransferError(f'the server says that its size is {text[:40]!r}', False)
    return int(text)


def require_rest(received: int, headers: dict[str, str], answer: Message) -> None:
    """Raises a TransferError unless a partial answer is the rest of the file that `headers` are of."""
    expected = f'bytes {received}-', f'/{headers.get("content-length", "")}'
    found = answer.get('Content-Range', '')
    same = answer.get('ETag', headers.get('etag')) == headers.get('etag')
    if not (headers and same and found.startswith(expected[0]) and found.endswith(expected[1])):
        headers.clear()  # start again from the beginning
        raise TransferError('the server sent a part of a file that was not asked for')
