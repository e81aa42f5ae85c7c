"""Pulls models from the Hugging Face Hub and verifies every byte."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from torch import nn

from ..weights.config import make_model, require_recorded_weights
from ..weights.download import LARGEST
from ..weights.errors import CheckpointError
from ..weights.files import PathLike, atomic_write_text
from ..weights.folder import CONFIG_FILE, LARGEST_CONFIG, WEIGHTS_FILE
from .client import CHECKSUM, DamagedError, Hub, cache_folder, cache_path, cached_file, has_checksum, require_repo_id

__all__ = ['Download', 'bring_file', 'download_model', 'pull']

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
        TypeError: If an argument is of another type.
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
    cache = cache_path(cache_dir)
    hub = Hub(token, timeout)
    found = cached_model(repo_id, revision, cache) if is_offline_mode() else pulled_model(hub, repo_id, revision, cache)
    require_recorded_weights(found.files[CONFIG_FILE], found.files[WEIGHTS_FILE], repo_id)
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
    for name in FILES:
        path, files[name] = downloaded(hub, repo_id, name, commit, *told[name], cache)
    remember(repo_id, revision, commit, cache)
    return Download(path.parent, commit, files)


def downloaded(
    hub: Hub, repo_id: str, name: str, commit: str, checksum: str, size: int, cache: str | None
) -> tuple[Path, bytes]:
    """Brings one file to the cache and verifies it; where it is, and its content.

    Raises:
        CheckpointError: If it is too large, or damaged each time.
        Exception: As `Hub.call` does.
    """
    most = LARGEST_CONFIG if name == CONFIG_FILE else LARGEST
    if size > most:
        raise CheckpointError(f'{name} of {repo_id} has {size:,} bytes, and none needs more than {most:,}')
    try:
        return hub.download(repo_id, name, commit, checksum, size, cache)
    except DamagedError as error:
        raise CheckpointError(str(error)) from error


def remember(repo_id: str, revision: str | None, commit: str, cache: str | None) -> None:
    """Writes which commit a revision is at, for when the Hub can't be asked. A cache may be there for reading only."""
    if revision == commit:
        return
    ref = cache_folder(repo_id, cache) / 'refs' / (revision or 'main')
    try:
        ref.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(ref, commit)
    except OSError as error:
        _logger.debug('%s', error)


def cached_model(repo_id: str, revision: str | None, cache: str | None) -> Download:
    """Takes a model's files from the cache, and verifies those whose checksum is known there."""
    files = {}
    for name in FILES:
        path = cached_file(repo_id, name, revision, cache)
        if path is None:
            at = f' at {revision}' if revision else ''
            raise ConnectionError(
                f'{name} of {repo_id}{at} is not in the cache, and HF_HUB_OFFLINE says that the Hub must not be asked'
            )
        folder, files[name] = path.parent, verified(path, repo_id, name)
    return Download(folder, folder.name, files)


def verified(path: Path, repo_id: str, name: str) -> bytes:
    """The content of a file in the cache, after a look at its checksum if that is known there; else with a warning.

    Raises:
        CheckpointError: If it is damaged.
    """
    content = path.read_bytes()
    # The cache has links to files that are named after their checksums, where the file system has links.
    checksum = Path(os.readlink(path)).name if path.is_symlink() else ''
    if not CHECKSUM.fullmatch(checksum):
        _logger.warning('%s of %s can not be verified without the Hub', name, repo_id)
    elif not has_checksum(content, checksum):
        raise CheckpointError(f'{name} of {repo_id} is damaged in the cache; pull it again when the Hub is there')
    return content


def bring_file(hub_id: str, name: str, cache_dir: PathLike | None = None) -> Path | None:
    """Brings a file from the Hub to the cache and verifies it, as `pull` does, and returns where it is.

    timm would wait for a silent Hub without end, write dozens of lines about one that can't be reached, and believe
    whatever comes. If the Hub can't be asked or refuses, what is in the cache is taken.

    Args:
        hub_id: 'user/name', or 'user/name@revision'.
        name: The file's.
        cache_dir: See `pull`.

    Returns:
        The file, None if the Hub, or without the Hub the cache, has none of this name.

    Raises:
        Exception: As `pull` does.
    """
    repo_id, _, rest = hub_id.partition('@')
    revision = rest or None
    require_repo_id(repo_id, revision)
    cache = cache_path(cache_dir)
    cached = cached_file(repo_id, name, revision, cache)
    if not is_offline_mode():
        hub = Hub()
        asked = Hub(timeout=constants.HF_HUB_ETAG_TIMEOUT, retries=False) if cached else hub
        try:
            commit, checksum, size = asked.latest(repo_id, name, revision)
            path, _ = downloaded(hub, repo_id, name, commit, checksum, size, cache)
            remember(repo_id, revision, commit, cache)
            return path
        except EntryNotFoundError:
            return None
        except (ConnectionError, HfHubHTTPError):
            if cached is None:
                raise
    if cached is not None:
        verified(cached, repo_id, name)
    return cached


def advise_on_pickle(names: list[str]) -> str:
    """What to do about a repository that has a pickle instead of safetensors."""
    pickles = [name for name in names if name.endswith(PICKLES)]
    if not pickles:
        return ''
    return f', and a pickle can run anything: download {pickles[0]} and `timm-res2net convert` it'
