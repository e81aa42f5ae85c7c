"""What push and pull share: retries, and the comparison of files with the Hub's checksums."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ParamSpec, TypeVar

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from ..weights.download import retrying
from ..weights.errors import first_line

__all__ = ['call_hub', 'is_transient', 'problems_on_hub', 'wrong_files']

_logger = logging.getLogger(__name__)

P = ParamSpec('P')
T = TypeVar('T')


def call_hub(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls a function of huggingface_hub, with retries after transient errors.

    Raises:
        ConnectionError: If the Hub can't be reached.
        HfHubHTTPError: If the Hub refuses.
    """
    try:
        return retrying(is_transient)(function, *args, **kwargs)
    except Exception as error:
        if isinstance(error, HfHubHTTPError) or not is_transient(error):
            raise
        raise ConnectionError(f'the Hub can not be reached: {first_line(error)}') from error


def is_transient(error: BaseException) -> bool:
    """Whether a later attempt may succeed: after a broken connection, a busy server, lost or damaged bytes."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 416, 422, 429, 500, 502, 503, 504)
    # By name, as the HTTP library under huggingface_hub changes with its versions.
    broken = any(base.__name__ == 'TransportError' for base in type(error).__mro__)
    wrapped = error.__cause__ is not None and is_transient(error.__cause__)  # as uploads of large files are
    return broken or wrapped or 'Consistency check failed' in str(error)


def wrong_files(api: HfApi, repo_id: str, revision: str, folder: Path, names: Iterable[str]) -> list[str]:
    """Those of some files in a folder that are not in a commit, or have another checksum there."""
    verified = call_hub(api.verify_repo_checksums, repo_id, revision=revision, local_dir=folder)
    wrong = {*verified.extra_paths, *(mismatch['path'] for mismatch in verified.mismatches)}
    return [name for name in names if name in wrong]


def problems_on_hub(text: str) -> list[str]:
    """What the Hub finds wrong with a card; nothing if it can't be reached."""
    try:
        ModelCard(text).validate()
    except ValueError as error:
        return [' '.join(str(error).split())]
    except Exception as error:  # no Hub, in whatever way the HTTP library says that
        _logger.info('the card was not checked on the Hub: %s', first_line(error))
    return []
