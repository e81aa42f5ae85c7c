"""The door to the Hub for push and pull: one token, one deadline, retries, and errors of few kinds."""

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from huggingface_hub import (
    HfApi,
    HfFileMetadata,
    ModelCard,
    constants,
    get_token,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import tqdm, validate_repo_id  # type: ignore[attr-defined]

from ..weights.download import LARGEST, Deadline, LateError, in_time, retrying
from ..weights.errors import first_line, printable
from ..weights.files import PathLike

__all__ = [
    'DamagedError',
    'Hub',
    'LateError',
    'cache_folder',
    'cache_path',
    'cached_file',
    'has_checksum',
    'is_refusal',
    'is_transient',
    'problems_on_hub',
    'require_repo_id',
]

_logger = logging.getLogger(__name__)

P = ParamSpec('P')
T = TypeVar('T')

TOKEN = re.compile(r'[A-Za-z0-9._~+/-]+=*')  # what may follow 'Bearer', https://www.rfc-editor.org/rfc/rfc6750
CHECKSUM = re.compile('[0-9a-f]{40}|[0-9a-f]{64}')  # git's of a small file and of a commit, SHA-256 of a large file
REVISION = re.compile(r'(?!.*\.\.)[\w][^\s~^:?*\[\\\x00-\x20\x7f]*')  # a name that git takes
THREAD = 'timm_res2net.hub'
BROKEN = BrokenPipeError, ConnectionAbortedError, ConnectionRefusedError, ConnectionResetError, TimeoutError
UPLOAD = 1_000_000  # bytes a second, for which the deadline of a push is moved
LONGEST_WAIT = 1_000_000  # seconds, some days; a socket takes no infinity


class DamagedError(ValueError):
    """A file that came from the Hub is not the one that the Hub has."""


class Hub:
    """The calls of one push or pull.

    Args:
        token: For the Hub. That of `hf auth login` if None.
        timeout: Seconds for all calls together, see `Deadline`.
        retries: Try again after transient errors.

    Raises:
        ValueError: If the token can't be one, or the timeout is not positive.
        TypeError: If the token is no text.
    """

    def __init__(self, token: str | bool | None = None, timeout: float | None = None, retries: bool = True) -> None:
        token = token.strip() if isinstance(token, str) else token
        self.secret = token_to_send(token)
        self.deadline = Deadline(timeout)
        self.retries = retries
        self.api = HfApi(token=token, library_name='timm_res2net')

    def call(self, awaited: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls a function of huggingface_hub, with retries after transient errors if they are wanted.

        It runs in a thread of its own, as huggingface_hub waits for a silent server without end.

        Args:
            awaited: What is waited for, as an error will name it.
            function: The function.
            *args: Its arguments.
            **kwargs: Its arguments.

        Raises:
            ConnectionError: If the Hub can't be reached, does not answer in time, or answers what makes no sense.
            HfHubHTTPError: If the Hub refuses.
            OSError: If a file can't be written.
            DamagedError: If a file came damaged each time.
        """
        attempt = partial(self.in_time, awaited, partial(function, *args, **kwargs))
        try:
            return retrying(is_transient, self.deadline)(attempt) if self.retries else attempt()
        except Exception as error:
            problem = self.documented(awaited, error)
            raise problem from (error if type(problem) in (ConnectionError, OSError) else None)

    def in_time(self, awaited: str, function: Callable[[], T]) -> T:
        """Calls a function in another thread, and leaves it alone there when the deadline has passed."""
        late = (
            f'the Hub did not answer within {self.deadline.seconds:g} s, which was waited for: {awaited}. For a slow '
            'connection give more seconds by timeout, --timeout or the environment variable TIMM_RES2NET_TIMEOUT'
        )
        return in_time(function, self.deadline, late, THREAD)

    def documented(self, awaited: str, error: BaseException) -> Exception:
        """The error of a documented type, with one line and without a token, that tells what another one does."""
        chain = [error]
        while chain[-1].__cause__ is not None and len(chain) < 10:
            chain.append(chain[-1].__cause__)
        refusals = [each for each in chain if isinstance(each, HfHubHTTPError)]
        if refusals:  # what huggingface_hub made of it may say less
            refusals[-1].args = (self.one_line(refusals[-1]),)
            return refusals[-1]
        if isinstance(error, LateError | DamagedError):
            return error
        if any(isinstance(each, OfflineModeIsEnabled) for each in chain):
            return ConnectionError(f'{awaited}: not without the Hub, and HF_HUB_OFFLINE says that it must not be asked')
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, BROKEN):
            return OSError(error.errno, f'{awaited}: {error.strerror}', error.filename)  # of this machine
        if is_transient(error):
            return ConnectionError(f'the Hub can not be reached: {self.one_line(chain[-1])} ({awaited})')
        kind = type(chain[-1]).__name__
        return ConnectionError(f'the Hub answers what makes no sense for {awaited}: {kind}: {self.one_line(chain[-1])}')

    def one_line(self, error: BaseException) -> str:
        """The text of an error in one line, without the token and what a terminal obeys, and cut if it is long."""
        text = ' '.join(str(error).split()) or type(error).__name__
        if self.secret is not None:
            text = text.replace(self.secret, '***')
        return printable(text, 500).rstrip('.')

    def commit(self, repo_id: str, revision: str | None) -> str:
        """The commit that a branch, tag or commit of a repository is at."""

        def ask() -> str:
            return require_checksum(self.api.model_info(repo_id, revision=revision).sha, 40)

        return self.call(f'the last commit of {repo_id}', ask)

    def checksums(self, repo_id: str, commit: str, names: Iterable[str]) -> dict[str, tuple[str, int]]:
        """Checksum and size of those of some files that are in a commit."""

        def ask() -> dict[str, tuple[str, int]]:
            found = self.api.get_paths_info(repo_id, list(names), revision=commit)
            files = [each for each in found if isinstance(each, RepoFile) and each.path in names]
            told = {each.path: (each.lfs.sha256 if each.lfs else each.blob_id, int(each.size)) for each in files}
            return {name: (require_checksum(checksum), size) for name, (checksum, size) in told.items()}

        return self.call(f'the checksums of {repo_id}', ask)

    def latest(self, repo_id: str, name: str, revision: str | None) -> tuple[str, str, int]:
        """Commit, checksum and size of a file at a branch, tag or commit, by one request."""

        def ask() -> tuple[str, str, int]:
            told = self.announced(repo_id, name, revision)
            size = LARGEST if told.size is None else told.size
            return require_checksum(told.commit_hash, 40), require_checksum(told.etag), size

        return self.call(f'{name} of {repo_id}', ask)

    def announced(self, repo_id: str, name: str, revision: str | None) -> HfFileMetadata:
        """What huggingface_hub is told of a file before it downloads it, and believes."""
        url = hf_hub_url(repo_id, name, revision=revision, endpoint=self.api.endpoint)
        return self.api.get_hf_file_metadata(url=url, timeout=min(self.deadline.left + 0.01, LONGEST_WAIT))

    def has(self, repo_id: str, commit: str, folder: Path, names: Iterable[str]) -> bool:
        """Whether a commit on the Hub has these files of a folder."""
        told = self.checksums(repo_id, commit, names)
        return all(name in told and has_checksum((folder / name).read_bytes(), told[name][0]) for name in names)

    def download(
        self, repo_id: str, name: str, commit: str, checksum: str, size: int, cache: str | None = None
    ) -> tuple[Path, bytes]:
        """Takes a file from the cache or downloads it, until its checksum is right.

        huggingface_hub compares no downloaded bytes with a checksum by itself.

        Raises:
            DamagedError: If it is wrong each time. The file is not in the cache then.
            Exception: As `call` does.
        """
        folder = cache_folder(repo_id, cache)
        broken: list[Path] = []  # by an earlier attempt
        hub = self

        class Bar(tqdm):
            received = 0

            def update(self, n: float | None = 1) -> bool | None:
                self.received += int(n or 0)
                hub.deadline.received(int(n or 0))
                if self.received > size:
                    raise DamagedError(f'{name} of {repo_id} does not end after {size:,} bytes')
                if not hub.deadline.left:
                    raise LateError('nobody waits any more')
                return super().update(n)

        def attempt() -> tuple[Path, bytes]:
            for path in broken:  # its link may point at another file than the Hub's, which a download leaves as it is
                path.unlink(missing_ok=True)
                (folder / 'trees' / f'{commit}.json').unlink(missing_ok=True)  # what an earlier answer said
            found = None if broken else cached_file(repo_id, name, commit, cache)
            if found is None:
                told = self.announced(repo_id, name, commit)
                if (told.etag, told.commit_hash) != (checksum, commit):  # they become paths in the cache
                    raise DamagedError(f'{name} of {repo_id} is announced with another checksum than the Hub lists')
                found = Path(
                    self.api.hf_hub_download(
                        repo_id, name, revision=commit, cache_dir=cache, force_download=bool(broken), tqdm_class=Bar
                    )
                )
            content = found.read_bytes()
            if not has_checksum(content, checksum):
                broken.append(found)
                raise DamagedError(f'{name} of {repo_id} has another checksum than the Hub lists')
            return found, content

        try:
            return self.call(f'{name} of {repo_id}', attempt)
        except LateError:
            release_locks(repo_id, cache)
            raise
        except DamagedError as error:
            for path in broken:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                    (folder / 'blobs' / checksum).unlink(missing_ok=True)
            raise DamagedError(f'{error}, each time; try again later') from error


def release_locks(repo_id: str, cache: PathLike | None) -> None:
    """Lets the next call have the files of a repository in the cache, after one that was too late.

    huggingface_hub still waits in its thread, hf_xet without end, and holds a lock that the next call would wait for.
    It writes to a file of its own, so that both may do that at once.
    """
    folder = cache_folder(repo_id, cache)
    for path in (folder.parent / '.locks' / folder.name).glob('*.lock'):
        with contextlib.suppress(OSError):
            path.unlink()


def cache_path(cache_dir: PathLike | None) -> str | None:
    """A cache's path as a text; ValueError for what can be none, TypeError for what is no path."""
    path = None if cache_dir is None else os.fsdecode(cache_dir)
    if path is not None and '\0' in path:
        raise ValueError(f'cache_dir is {path!r}; give a folder')
    return path


def cache_folder(repo_id: str, cache: PathLike | None) -> Path:
    """Where a cache keeps what it has of a repository."""
    return Path(cache or constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type='model'))


def cached_file(repo_id: str, name: str, revision: str | None, cache: str | None) -> Path | None:
    """The file that is in the cache already, None if there is none."""
    try:
        return Path(hf_hub_download(repo_id, name, revision=revision, cache_dir=cache, local_files_only=True))
    except FileNotFoundError:
        return None


def token_to_send(token: str | bool | None) -> str | None:
    """The token that huggingface_hub sends: a given one, none for False, else that of the environment or a login.

    Raises:
        ValueError: If it can't be one; the message doesn't quote it. It would be sent, and quoted in errors.
        TypeError: If it is no text.
    """
    if not isinstance(token, str | bool | None):
        raise TypeError(f'the token for the Hub is of type {type(token).__name__}; give a text')
    sent = token if isinstance(token, str) else None if token is False else get_token()
    if sent is not None and not TOKEN.fullmatch(sent):
        raise ValueError(
            'the token for the Hub is none: it is empty, or has characters that no token has. Copy it again from '
            'https://huggingface.co/settings/tokens'
        )
    return sent


def require_repo_id(repo_id: str, revision: str | None = None) -> None:
    """Raises a ValueError for what can't be the name of a repository, or of a revision; a TypeError for no text."""
    for name, value in (('repo_id', repo_id), ('revision', '' if revision is None else revision)):
        if not isinstance(value, str):
            raise TypeError(f'{name} is {value!r}; give a text')
    try:
        validate_repo_id(repo_id)
        if '/' not in repo_id:
            raise HFValidationError('it has no user')
    except HFValidationError as error:
        raise ValueError(f'{repo_id!r} is no name of a repository; give USER/NAME ({first_line(error)})') from None
    if revision is not None and not REVISION.fullmatch(revision):
        raise ValueError(f'revision is {revision!r}; give a branch, a tag or a commit')


def require_checksum(text: object, length: int | None = None) -> str:
    """Returns a checksum that the Hub tells; ValueError for anything else, as it becomes a part of a path."""
    if not isinstance(text, str) or not CHECKSUM.fullmatch(text) or len(text) != (length or len(text)):
        raise ValueError(f'{str(text)[:80]!r} is no checksum')
    return text


def has_checksum(content: bytes, checksum: str) -> bool:
    """Whether a file has a checksum: git's for 40 digits, SHA-256 for 64."""
    if len(checksum) == 64:
        return hashlib.sha256(content).hexdigest() == checksum
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest() == checksum


def is_refusal(error: BaseException) -> bool:
    """Whether the Hub has understood a request and will not do it."""
    return isinstance(error, HfHubHTTPError) and not is_transient(error)


def is_transient(error: BaseException) -> bool:
    """Whether a later attempt may succeed: after a broken connection, a busy server, lost or damaged bytes."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 416, 422, 429, 500, 502, 503, 504)
    if isinstance(error, DamagedError):
        return True
    # By name, as the HTTP library under huggingface_hub changes with its versions.
    broken = isinstance(error, BROKEN) or any(base.__name__ == 'TransportError' for base in type(error).__mro__)
    of_xet = type(error) is ConnectionError  # whose errors have no status
    wrapped = error.__cause__ is not None and is_transient(error.__cause__)  # as uploads of large files are
    gone = type(error) is FileNotFoundError  # another process heals the same cache
    return broken or of_xet or wrapped or gone or 'Consistency check failed' in str(error)


def problems_on_hub(text: str, hub: Hub | None = None) -> list[str]:
    """What the Hub finds wrong with a card; nothing if it can't be asked.

    Raises:
        ConnectionError: If it can't be reached, and `hub` is given: more than this is wanted of it.
    """

    def ask() -> list[str]:
        try:
            ModelCard(text, ignore_metadata_errors=True).validate()
        except ValueError as error:
            return [asked.one_line(error)]
        return []

    if is_offline_mode():
        return []
    asked = hub or Hub()
    try:
        return asked.call('the check of the card', ask)
    except (ConnectionError, HfHubHTTPError) as error:
        if hub and isinstance(error, ConnectionError):
            raise
        _logger.info('the card was not checked on the Hub: %s', error)
    return []


class Quiet(logging.Filter):
    """Keeps the lines about retries off the log, that huggingface_hub writes for each attempt of a call here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.threadName != THREAD or record.levelno >= logging.ERROR


for each in ('utils._http', 'file_download'):
    logging.getLogger(f'huggingface_hub.{each}').addFilter(Quiet())
