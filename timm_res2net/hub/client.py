"""Calls huggingface_hub with a few retries, and turns each failure into a one-line error without the token."""

import re
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or httpx2, whichever huggingface_hub uses
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from .._errors import CheckpointError, Res2NetError, first_line, sanitize

T = TypeVar('T')

PAUSES = 1, 2  # seconds between attempts
TRANSIENT = {408, 416, 422, 429, 500, 502, 503, 504}  # HTTP status codes; 422: an upload arrived damaged
TOKEN = re.compile(r'[A-Za-z0-9._~+/-]+=*')  # https://www.rfc-editor.org/rfc/rfc6750
REVISION = re.compile(r'(?!.*\.\.)[\w][^\s~^:?*\[\\\x00-\x20\x7f]*')  # a valid Git name


def hub_api(token: str | bool | None) -> HfApi:
    """Returns huggingface_hub's client; ValueError or TypeError for an invalid token, without quoting it."""
    if not isinstance(token, str | bool | None):
        raise TypeError(f'cannot use the Hub token: it must be a str, got {type(token).__name__}')
    token = token.strip() if isinstance(token, str) else token
    sent = get_token() if token in (None, True) else token
    if isinstance(sent, str) and not TOKEN.fullmatch(sent):
        raise ValueError(
            'invalid Hub token: empty, or contains characters a token cannot have. '
            'Copy it again from https://huggingface.co/settings/tokens'
        )
    return HfApi(token=token, library_name='timm_res2net')


def require_repo_id(repo_id: str, revision: str | None = None) -> None:
    """Raises ValueError if the name of the repository or of the revision is invalid."""
    try:
        validate_repo_id(repo_id)
        if '/' not in str(repo_id):
            raise HFValidationError('the user is missing')
    except HFValidationError as error:
        raise ValueError(f'invalid repo_id {repo_id!r}: {first_line(error)}. Pass USER/NAME') from None
    if revision is not None and not (isinstance(revision, str) and REVISION.fullmatch(revision)):
        raise ValueError(f'invalid revision {revision!r}: pass a branch, a tag or a commit')


def call_hub(action: str, function: Callable[[], T], retries: int = len(PAUSES)) -> T:
    """Calls huggingface_hub, and retries after transient errors; raises what `explain` makes of the last error."""
    pauses = iter(PAUSES[:retries])
    while True:
        try:
            return function()
        except Exception as error:
            pause = next(pauses, None)
            if pause is None or is_offline_mode() or not is_transient(error):
                raise explain(action, error) from error
            time.sleep(pause)


def causes_of(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def is_transient(error: BaseException) -> bool:
    """Returns whether another attempt may succeed: after a broken connection, a busy server or a damaged download."""
    chain = causes_of(error)
    if refusals := [each for each in chain if isinstance(each, HfHubHTTPError)]:
        return refusals[-1].response.status_code in TRANSIENT
    is_broken = any(isinstance(each, CheckpointError | HTTPError | ConnectionError | TimeoutError) for each in chain)
    return is_broken or 'Consistency check failed' in str(error)  # huggingface_hub's OSError for a wrong size


def explain(action: str, error: BaseException) -> BaseException:
    """Returns the documented error for anything that huggingface_hub raises: "cannot {action}: ...", without the token.

    An HfHubHTTPError if the Hub refuses, an OSError if a local file cannot be written, else a ConnectionError.
    """
    if isinstance(error, Res2NetError):
        return error
    chain = causes_of(error)
    if refusals := [each for each in chain if isinstance(each, HfHubHTTPError)]:
        refusals[-1].args = (f'cannot {action}: {one_line(refusals[-1])}',)
        return refusals[-1]
    if isinstance(error, OSError) and error.errno is not None and not is_transient(error):
        return OSError(error.errno, f'cannot {action}: {error.strerror}', error.filename)
    advice = '' if is_offline_mode() else '. Check the network and https://status.huggingface.co'
    return ConnectionError(f'cannot {action}: {type(chain[-1]).__name__}: {one_line(chain[-1])}{advice}')


def one_line(error: BaseException) -> str:
    """Returns the message of an error as one printable line without tokens."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return sanitize(re.sub(r'hf_\w+', '***', text), 500).rstrip('.')
