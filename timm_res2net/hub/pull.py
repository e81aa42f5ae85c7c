"""Pulls models from the Hugging Face Hub and verifies every byte."""

import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, is_offline_mode
from torch import nn

from ..weights.config import checked_config, make_model
from ..weights.download import LARGEST
from ..weights.errors import CheckpointError
from ..weights.files import PathLike, atomic_write_text
from ..weights.folder import CONFIG_FILE, LARGEST_CONFIG, WEIGHTS_FILE
from .client import CHECKSUM, DamagedError, Hub, cached_file, has_checksum, require_repo_id

__all__ = ['Download', 'download_model', 'pull']

_logger = logging.getLogger(__name__)

PICKLES = ('.bin', '.pth', '.pt', '.pkl', '.ckpt')
FILES = CONFIG_FILE, WEIGHTS_FILE


@dataclass(frozen=True)
class Download:
    """A model's files as they were checked; those in the cache may change at any time."""

    folder: Path  # in the cache
    commit: str
    files: dict[str, bytes]


def pull(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: PathLike | None = None,
    timeout: float | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Downloads a model, verifies its checksums, and makes it.

    Args:
        repo_id: 'user/name'.
        revision: Branch, tag or commit; the commit is in the model's `pretrained_cfg['hf_hub_id']`.
        token: For private and gated repositories. That of `hf auth login` if None.
        cache_dir: Another cache than that of huggingface_hub.
        timeout: Seconds to wait for the Hub, all requests and pauses together; a download at more than 50 kB/s may
            take longer. If None, those in the environment variable TIMM_RES2NET_TIMEOUT, or 120.
        **kwargs: For `timm.create_model`, such as `num_classes` or `features_only`.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: If there are no safetensors, if the configuration or the weights are of no use, or if their
            checksum is wrong even after several downloads.
        ValueError: If an argument is wrong.
        ConnectionError: If the Hub can't be reached, doesn't answer in time or makes no sense; or if the model is not
            in the cache and HF_HUB_OFFLINE is set.
        HfHubHTTPError: If the Hub refuses: the repository is private, gated or absent, or the revision is.
        OSError: If the cache, or the folder for temporary files, can't be written.
    """
    found = download_model(repo_id, revision, token, cache_dir, timeout)
    model = make_model(found.files[CONFIG_FILE], found.files[WEIGHTS_FILE], repo_id, **kwargs)
    cfg = getattr(model, 'pretrained_cfg', None)
    if isinstance(cfg, dict):
        cfg.update(source='hf-hub', hf_hub_id=f'{repo_id}@{found.commit}')
    return model


def download_model(
    repo_id: str,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: PathLike | None = None,
    timeout: float | None = None,
) -> Download:
    """Downloads a model's files, or takes them from the cache, and verifies their checksums.

    Args:
        repo_id: See `pull`.
        revision: See `pull`.
        token: See `pull`.
        cache_dir: See `pull`.
        timeout: See `pull`.

    Raises:
        CheckpointError: As `pull` does, but for weights that don't fit the configuration.
        Exception: As `pull` does.
    """
    require_repo_id(repo_id, revision)
    cache = None if cache_dir is None else os.fspath(cache_dir)
    hub = Hub(token, timeout)
    found = cached_model(repo_id, revision, cache) if is_offline_mode() else pulled_model(hub, repo_id, revision, cache)
    record = checked_config(found.files[CONFIG_FILE], repo_id).get('timm_res2net', {})
    recorded = record.get('sha256')
    if recorded is not None and not has_checksum(found.files[WEIGHTS_FILE], str(recorded)):
        raise CheckpointError(
            f'{WEIGHTS_FILE} of {repo_id} is not the file that its {CONFIG_FILE} was written with: it should have '
            f'SHA-256 {str(recorded)[:80]}. Somebody replaced one of them; ask the owner'
        )
    return found


def pulled_model(hub: Hub, repo_id: str, revision: str | None, cache: str | None) -> Download:
    """Downloads a model's files as the Hub has them now."""
    commit = hub.commit(repo_id, revision)
    told = hub.checksums(repo_id, commit, FILES)
    for name in FILES:
        if name not in told:
            names = hub.call(f'the files of {repo_id}', hub.api.list_repo_files, repo_id, revision=commit)
            raise CheckpointError(f'{repo_id} has no {name}{advise_on_pickle(names)}')
    files = {}
    for name, most in zip(FILES, (LARGEST_CONFIG, LARGEST)):
        size = told[name][1]
        if size > most:
            raise CheckpointError(f'{name} of {repo_id} has {size:,} bytes, and none needs more than {most:,}')
        try:
            path, files[name] = hub.download(repo_id, name, commit, *told[name], cache)
        except DamagedError as error:
            raise CheckpointError(str(error)) from error
    if revision != commit:
        remember(path.parents[2] / 'refs' / (revision or 'main'), commit)
    return Download(path.parent, commit, files)


def remember(ref: Path, commit: str) -> None:
    """Writes which commit a revision is at, for when the Hub can't be asked. A cache may be there for reading only."""
    try:
        ref.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(ref, commit)
    except OSError as error:
        _logger.debug('%s', error)


def cached_model(repo_id: str, revision: str | None, cache: str | None) -> Download:
    """Takes a model's files from the cache, and verifies those whose checksum is known there."""

    def place(name: str) -> Path:
        path = cached_file(partial(hf_hub_download, repo_id, name, revision=revision, cache_dir=cache))
        if path is None:
            at = f' at {revision}' if revision else ''
            raise ConnectionError(
                f'{name} of {repo_id}{at} is not in the cache, and HF_HUB_OFFLINE says that the Hub must not be asked'
            )
        return path

    files = {}
    for name in FILES:
        path = place(name)
        files[name] = path.read_bytes()
        # The cache has links to files that are named after their checksums, where the file system has links.
        checksum = Path(os.readlink(path)).name if path.is_symlink() else ''
        if not CHECKSUM.fullmatch(checksum):
            _logger.warning('%s of %s can not be verified without the Hub', name, repo_id)
        elif not has_checksum(files[name], checksum):
            raise CheckpointError(f'{name} of {repo_id} is damaged in the cache; pull it again when the Hub is there')
    return Download(path.parent, path.parent.name, files)


def advise_on_pickle(names: list[str]) -> str:
    """What to do about a repository that has a pickle instead of safetensors."""
    pickles = [name for name in names if name.endswith(PICKLES)]
    if not pickles:
        return ''
    return f', and a pickle can run anything: download {pickles[0]} and `timm-res2net convert` it'
