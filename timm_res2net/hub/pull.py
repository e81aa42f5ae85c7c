"""Pulls models from the Hugging Face Hub and verifies every byte."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import HfApi, hf_hub_download, is_offline_mode, scan_cache_dir
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from ..weights.errors import CheckpointError
from ..weights.files import PathLike, sha256
from ..weights.folder import CONFIG_FILE, WEIGHTS_FILE, recorded_sha256
from .client import call_hub, wrong_files

__all__ = ['download_model', 'pull']

PICKLES = ('.bin', '.pth', '.pt', '.pkl', '.ckpt')


def pull(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: PathLike | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Downloads a model, verifies its checksums, and makes it.

    Args:
        repo_id: 'user/name'.
        revision: Branch, tag or commit; the commit is in the model's `pretrained_cfg['hf_hub_id']`.
        token: For private and gated repositories. That of `hf auth login` if None.
        cache_dir: Another cache than that of huggingface_hub.
        **kwargs: For `timm.create_model`, such as `num_classes` or `features_only`.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: If there are no safetensors, or their checksum is wrong even after a second download.
        ConnectionError: If the Hub can't be reached.
        HfHubHTTPError: If the Hub refuses: the repository is private, gated or absent, or the revision is.
    """
    folder, commit = download_model(repo_id, revision, token, cache_dir)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs)
    cfg = getattr(model, 'pretrained_cfg', None)
    if isinstance(cfg, dict):
        cfg.pop('file', None)
        cfg.update(source='hf-hub', hf_hub_id=f'{repo_id}@{commit}')
    return model.eval()


def download_model(
    repo_id: str,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: PathLike | None = None,
) -> tuple[Path, str]:
    """Downloads a model's files, or takes them from the cache, and verifies their checksums.

    huggingface_hub compares no downloaded bytes with a checksum by itself. Files that differ are downloaded once more.

    Args:
        repo_id: See `pull`.
        revision: See `pull`.
        token: See `pull`.
        cache_dir: See `pull`.

    Returns:
        The folder, and the commit.
    """
    cache = None if cache_dir is None else os.fspath(cache_dir)

    def download(name: str, from_revision: str | None, force: bool = False) -> Path:
        get = partial(hf_hub_download, token=token, cache_dir=cache, force_download=force)
        return Path(call_hub(get, repo_id, name, revision=from_revision))

    folder = download(CONFIG_FILE, revision).parent
    commit = folder.name
    api, files = HfApi(token=token), (CONFIG_FILE, WEIGHTS_FILE)
    try:
        download(WEIGHTS_FILE, commit)
    except EntryNotFoundError as error:
        names = call_hub(api.list_repo_files, repo_id, revision=commit)
        raise CheckpointError(f'{repo_id} has no {WEIGHTS_FILE}{advise_on_pickle(names)}') from error
    if not is_offline_mode() and (wrong := wrong_files(api, repo_id, commit, folder, files)):
        for name in wrong:
            download(name, commit, force=True)
        if wrong := wrong_files(api, repo_id, commit, folder, files):
            scan_cache_dir(cache).delete_revisions(commit).execute()
            raise CheckpointError(
                f'{" and ".join(wrong)} of {repo_id} came twice with another checksum than the Hub has; pull again'
            )
    recorded, found = recorded_sha256(folder), sha256(folder / WEIGHTS_FILE)
    if recorded not in (None, found):
        raise CheckpointError(
            f'{WEIGHTS_FILE} of {repo_id} is not the file that its {CONFIG_FILE} was written with: SHA-256 {found} for '
            f'{recorded}. Somebody replaced one of them; ask the owner'
        )
    return folder, commit


def advise_on_pickle(names: list[str]) -> str:
    """What to do about a repository that has a pickle instead of safetensors."""
    pickles = [name for name in names if name.endswith(PICKLES)]
    if not pickles:
        return ''
    return f', and a pickle can run anything: download {pickles[0]} and `timm-res2net convert` it'
