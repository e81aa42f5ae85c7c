"""Pulls models from the Hugging Face Hub and verifies every byte."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from .._errors import CheckpointError
from .._files import PathLike
from ..weights.config import CONFIG_FILE, WEIGHTS_FILE
from ..weights.loading import load_folder
from .client import call_hub, hub_api, require_repo_id

_logger = logging.getLogger(__name__)


def pull(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: PathLike | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Downloads a model of this package, verifies its checksums, and loads it.

    Args:
        repo_id: 'user/name'.
        revision: Branch, tag or commit. The model's `pretrained_cfg['hf_hub_id']` records the commit.
        token: Hub token for private and gated repositories; by default that of `hf auth login`.
        cache_dir: Folder to use instead of huggingface_hub's cache.
        **kwargs: Passed to `timm.create_model`, such as `num_classes` or `features_only`.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: If the repository has no safetensors, a file is damaged, the configuration is invalid or is
            for a model of another package, or the weights do not fit the configuration.
        ValueError: If an argument is invalid.
        ConnectionError: If the Hub cannot be reached and the model is not in the cache.
        HfHubHTTPError: If the Hub refuses because the repository or revision does not exist, is private, or is gated,
            and the model is not in the cache.
        OSError: If the cache cannot be written.

    Example:
        model = timm_res2net.pull('you/digits')
        logits = model(torch.randn(1, 3, 32, 32))  # (1, 10)
    """
    folder = fetch_model(repo_id, revision, token, cache_dir)
    model: Any = load_folder(folder, source=repo_id, **kwargs)
    model.pretrained_cfg.update(source='hf-hub', hf_hub_id=f'{repo_id}@{folder.name}')
    return cast(nn.Module, model)


def fetch_model(
    repo_id: str, revision: str | None = None, token: str | None = None, cache_dir: PathLike | None = None
) -> Path:
    """Downloads and verifies `config.json` and `model.safetensors`; returns their folder, named after the commit."""
    folder = fetch(repo_id, (CONFIG_FILE, WEIGHTS_FILE), revision, token, cache_dir)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            hint = 'Download its weights and run `timm-res2net convert`'
            raise CheckpointError(f'cannot pull {repo_id}: it has no {name}. {hint}')
    return folder


def fetch_file(hub_id: str, name: str, cache_dir: PathLike | None = None) -> Path | None:
    """Returns a verified file of 'user/name' or 'user/name@revision', or None if there is none. Raises like `pull`."""
    repo_id, _, revision = hub_id.partition('@')
    file = fetch(repo_id, (name,), revision or None, cache_dir=cache_dir) / name
    return file if file.is_file() else None


def fetch(
    repo_id: str,
    names: Sequence[str],
    revision: str | None = None,
    token: str | None = None,
    cache_dir: PathLike | None = None,
) -> Path:
    """Downloads the files that exist, compares their checksums with the Hub's, and returns their folder.

    If the Hub cannot be reached or refuses, returns the folder in the cache, as huggingface_hub does.
    """
    require_repo_id(repo_id, revision)
    api = hub_api(token)
    where: dict[str, Any] = dict(repo_id=repo_id, cache_dir=cache_dir)
    download = partial(api.snapshot_download, **where, revision=revision, allow_patterns=list(names))

    def attempt() -> Path:
        folder = Path(download())
        if is_offline_mode() or not any((folder / name).is_file() for name in names):
            return folder
        differing = {each['path'] for each in api.verify_repo_checksums(**where, revision=folder.name).mismatches}
        damaged = [name for name in names if name in differing]
        for name in damaged:
            (folder / name).resolve().unlink(missing_ok=True)  # or the next call would use it
        if damaged:
            raise CheckpointError(f"cannot use {damaged[0]} of {repo_id}: checksum differs from the Hub's. Try again")
        return folder

    cached = find_in_cache(download, names)
    try:
        return call_hub(f'download {" and ".join(names)} of {repo_id}', attempt, retries=1 if cached else 2)
    except (ConnectionError, HfHubHTTPError) as error:
        if cached is None or find_in_cache(download, names) is None:  # or no longer, as it was damaged
            raise
        _logger.warning('%s. Using the copy in the cache', error)
        return cached


def find_in_cache(download: Callable[..., str], names: Sequence[str]) -> Path | None:
    """Returns the folder in the cache, or None if it lacks one of the files."""
    try:
        folder = Path(download(local_files_only=True))
    except FileNotFoundError:
        return None
    return folder if all((folder / name).is_file() for name in names) else None
