"""Push models to the Hugging Face Hub and pull them, so that what arrives is what left."""

import copy
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, hf_hub_download, is_offline_mode
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from timm.models import PretrainedCfg, get_model_args
from timm.utils import unwrap_model
from torch import nn

from ..models.block import first_blocks
from ..res2net import ARCHS
from ..weights.checkpoints import configuration, name_of, require_no_model, write_folder
from ..weights.files import first_line, sha256
from ..weights.readers import CheckpointError
from .cards import LICENSES, card, is_unchanged

__all__ = ['Push', 'pull', 'push']

_logger = logging.getLogger(__name__)

PAUSES = (1, 2, 4, 8)  # seconds before each further attempt
PICKLES = ('.bin', '.pth', '.pt', '.pkl', '.ckpt')
WEIGHTS, CONFIG, CARD = 'model.safetensors', 'config.json', 'README.md'

T = TypeVar('T')


@dataclass(frozen=True)
class Push:
    """What a push did, or would do."""

    url: str | None  # of the commit, or of the pull request; None for a dry run
    revision: str | None  # the commit
    hashes: dict[str, str]  # of each file its SHA-256
    folder: Path | None = None  # of a dry run


def push(
    model: nn.Module,
    repo_id: str,
    *,
    tag: str | None = None,
    results: Mapping[str, float] | None = None,
    dataset: str | None = None,
    license: str | tuple[str, str] | None = None,
    base_model: str | None = None,
    labels: Sequence[str] | None = None,
    recipe: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    overwrite_card: bool = False,
    dry_run: str | os.PathLike[str] | None = None,
) -> Push:
    """Uploads a model: weights as safetensors, the configuration that makes it again, and a card.

    Before anything leaves, the folder is loaded and has to compute, bit for bit, what the model does. Afterwards the
    Hub's hashes have to be those of the folder. A lost answer is no failure if the files are there, and none of them
    is sent twice. A card that somebody wrote keeps its text, and gets the new metadata.

    Args:
        model: A model of this package, made by `timm.create_model`.
        repo_id: 'user/name'. The repository is made if it does not exist.
        tag: Name of this set of weights.
        results: What was measured, such as `{'accuracy': 99.5}`, in percent.
        dataset: What it was trained and measured on, a dataset of the Hub ('imagenet-1k') or a description.
        license: A licence of the Hub ('apache-2.0'), or name and address of another.
        base_model: The model that this one was fine-tuned from, 'user/name'.
        labels: Names of the classes.
        recipe: How it was trained, for the card.
        private: Make the repository private. As the Hub's settings say if None.
        revision: Branch to push to, made if it does not exist.
        create_pr: Propose the files by a pull request instead.
        commit_message: Of the commit.
        token: For the Hub. That of `hf auth login` if None.
        overwrite_card: Replace a card that somebody wrote.
        dry_run: A folder to write to instead, in which there must not be a model yet.

    Returns:
        The commit, and the hashes of the files.

    Raises:
        ValueError: If the model can't be made again from a configuration, or an argument is wrong.
        ConnectionError: If the Hub can't be reached, or somebody else pushed at the same time; nothing of this push is
            there then.
        HfHubHTTPError: If the Hub refuses; the error says why.
    """
    if isinstance(license, str) and license not in LICENSES:
        raise ValueError(f'license={license!r} is none that the Hub knows; give name and address, as a pair')
    given = dict(tag=tag, results=results, dataset=dataset, license=license, base_model=base_model, recipe=recipe)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(dry_run or Path(temporary, 'model'))
        require_no_model(folder)
        model = unwrap_model(model)
        text = write_model(model, repo_id, folder, labels, given)
        if dry_run is not None:
            (folder / CARD).write_text(text)
            return Push(None, None, {name: sha256(folder / name) for name in (WEIGHTS, CONFIG, CARD)}, folder)

        api = HfApi(token=token, library_name='timm_res2net')
        attempt(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        branch = revision or 'main'
        if branch not in {ref.name for ref in attempt(lambda: api.list_repo_refs(repo_id)).branches}:
            attempt(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
        head = str(attempt(lambda: api.model_info(repo_id, revision=branch)).sha)
        if not overwrite_card:
            text = with_text_of(existing_card(repo_id, head, token), text)
        (folder / CARD).write_text(text)
        wanted = {name: folder / name for name in (WEIGHTS, CONFIG, CARD)}
        url, commit = send(api, repo_id, branch, head, wanted, create_pr, commit_message or f'Push {name_of(model)}')
        return Push(url, commit, {name: sha256(path) for name, path in wanted.items()})


def write_model(
    model: nn.Module, repo_id: str, folder: Path, labels: Sequence[str] | None, given: dict[str, Any]
) -> str:
    """Writes a model's weights and configuration to a folder, which has to prove itself, and returns its card."""
    name = name_of(model)
    if name not in ARCHS or not hasattr(model, 'forward_head'):
        raise ValueError(
            f'a {type(model).__name__} can not be pushed: give a model of this package, as create_model made it'
        )
    num_classes: Any = model.num_classes
    if labels is not None and len(labels) != num_classes:
        raise ValueError(f'labels has {len(labels)} names for {num_classes} classes')
    usual = {'in_chans': 3, 'global_pool': 'avg', 'num_classes': num_classes}
    args = {key: value for key, value in get_model_args(model).items() if usual.get(key) != value}
    cfg: Any = model.pretrained_cfg
    inherited = {key: cfg[key] for key in PretrainedCfg.__dataclass_fields__ if cfg.get(key) is not None}
    for key in ('description', 'notes', 'license', 'origin_url', 'tag', 'label_names', 'label_descriptions'):
        inherited.pop(key, None)
    inherited = PretrainedCfg(**{**inherited, 'tag': given['tag']}).to_dict(remove_source=True)
    if isinstance(given['license'], str):
        inherited['license'] = given['license']
    known = cfg.get('label_names') or ()
    labels = list(labels or (known if len(known) == num_classes else ()))
    record = {key: value for key, value in given.items() if value is not None and key != 'tag'}
    config = configuration(model, name, args, inherited, **record)
    config.update({'label_names': labels} if labels else {})
    state = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in model.state_dict().items()
    }
    try:
        write_folder(folder, state, config, next(iter(first_blocks(model)), None))
    except TypeError as error:
        raise ValueError(
            f'{name} was made with an argument that no configuration can hold: {first_line(error)}'
        ) from error
    prove(model, folder)
    return card(model, repo_id=repo_id, **given)


@torch.inference_mode()
def prove(model: nn.Module, folder: Path) -> None:
    """Raises a ValueError unless a folder makes a model that computes just what the given one does."""
    in_chans: Any = model.in_chans
    x = torch.linspace(-2, 2, in_chans * 64 * 64).sin().reshape(1, in_chans, 64, 64)
    itself = copy.deepcopy(model).to('cpu', torch.float32).to(memory_format=torch.contiguous_format).eval()
    try:
        again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        same = torch.equal(itself(x), again(x))
    except RuntimeError as error:  # the weights have other names or shapes
        _logger.debug('%s', error)
        same = False
    if not same:
        raise ValueError(
            f'what its configuration makes computes something else than this {type(model).__name__}: it was changed '
            'after create_model made it. Make it by arguments of create_model, and load its weights into that'
        )


def with_text_of(written: str | None, made: str) -> str:
    """Puts a new card's metadata on a card that is there already, whose text stays."""
    if written is None or not written.strip() or is_unchanged(written):
        return made
    old, new = ModelCard(written, ignore_metadata_errors=True), ModelCard(made)
    old.data = type(new.data)(**{**old.data.to_dict(), **new.data.to_dict()}, ignore_metadata_errors=True)
    return str(old)


def existing_card(repo_id: str, revision: str, token: str | None) -> str | None:
    """The card that is on the Hub, if there is one."""
    try:
        return download(repo_id, CARD, revision, token=token).read_text()
    except EntryNotFoundError:
        return None


def send(
    api: HfApi, repo_id: str, branch: str, head: str, wanted: Mapping[str, Path], create_pr: bool, message: str
) -> tuple[str, str]:
    """Commits files, and decides by what is on the Hub afterwards whether that worked.

    Args:
        api: The Hub.
        repo_id: The repository.
        branch: To commit to.
        head: The commit that it is at.
        wanted: Names of files, and where they are.
        create_pr: Commit to a new pull request.
        message: Of the commit.

    Returns:
        The address and the commit.
    """
    problem: Exception | None = None
    for pause in (*PAUSES, None):
        operations = [CommitOperationAdd(name, str(path)) for name, path in wanted.items()]
        try:
            done = api.create_commit(
                repo_id, operations, commit_message=message, revision=branch, parent_commit=head, create_pr=create_pr
            )
        except Exception as error:
            conflict = isinstance(error, HfHubHTTPError) and error.response.status_code == 412
            if not conflict and not passes(error):
                raise
            problem = error
            now = str(attempt(lambda: api.model_info(repo_id, revision=branch)).sha)
            # Is it there, and only the answer was lost?
            if create_pr:
                proposals = attempt(lambda: api.list_repo_refs(repo_id, include_pull_requests=True)).pull_requests or []
                for ref in reversed(proposals):
                    if same_files(api, repo_id, ref.target_commit, wanted):
                        number = ref.name.rpartition('/')[2]
                        return f'{api.endpoint}/{repo_id}/discussions/{number}', ref.target_commit
            elif now != head and same_files(api, repo_id, now, wanted):
                return f'{api.endpoint}/{repo_id}/commit/{now}', now
            if conflict or now != head:
                raise ConnectionError(
                    f'somebody else pushed to {repo_id} at the same time: {branch} went from {head[:8]} to {now[:8]}. '
                    'Nothing of this push is there; look at theirs, and push again'
                ) from error
            if pause is not None:
                _logger.info('the Hub did not take the commit (%s); trying again in %d s', first_line(error), pause)
                time.sleep(pause)
        else:
            commit = done.oid or head
            if not same_files(api, repo_id, commit, wanted):
                raise ConnectionError(f'the files in {done.commit_url} are not those that were sent; push again')
            return (done.pr_url or done.commit_url), commit
    raise ConnectionError(
        f'the Hub did not take the commit to {repo_id}: {first_line(problem or OSError())}'
    ) from problem


def same_files(api: HfApi, repo_id: str, revision: str, wanted: Mapping[str, Path]) -> bool:
    """Whether the Hub has just these files, by the hashes that it tells."""
    told = hashes_on_hub(api, repo_id, list(wanted), revision)
    return all(has_hash(path, told.get(name, '')) for name, path in wanted.items())


def hashes_on_hub(api: HfApi, repo_id: str, names: list[str], revision: str) -> dict[str, str]:
    """The hashes that the Hub tells of files, as far as they are there: SHA-256 of large ones, git's of others."""
    entries: Any = attempt(lambda: api.get_paths_info(repo_id, names, revision=revision))
    return {entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in entries}


def has_hash(path: Path, told: str) -> bool:
    """Whether a file has the hash that the Hub tells: SHA-256 for a large one, git's for another."""
    return told == (sha256(path) if len(told) == 64 else git_hash(path))


def git_hash(path: str | os.PathLike[str]) -> str:
    """The SHA-1 by which git, and so the Hub, knows a small file."""
    data = Path(path).read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def pull(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Downloads a model and checks every byte of it.

    Args:
        repo_id: 'user/name'.
        revision: Branch, tag or commit; the model remembers the commit, in `pretrained_cfg['hf_hub_id']`.
        token: For private and gated repositories. That of `hf auth login` if None.
        cache_dir: Other than that of huggingface_hub.
        **kwargs: For `timm.create_model`, such as `num_classes` or `features_only`.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: If there are no safetensors, or their hash is wrong even when they are fetched again.
        ConnectionError: If the Hub can't be reached.
        HfHubHTTPError: If the Hub refuses: the repository is private, gated or absent, or the revision is.
    """
    folder, commit = fetch(repo_id, revision, token, cache_dir)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs)
    if isinstance(getattr(model, 'pretrained_cfg', None), dict):
        cfg: Any = model.pretrained_cfg
        cfg.pop('file', None)
        cfg.update(source='hf-hub', hf_hub_id=f'{repo_id}@{commit}')
    return model.eval()


def fetch(
    repo_id: str,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[Path, str]:
    """Downloads and checks a model's files; arguments as in `pull`.

    Returns:
        The folder, and the commit.
    """
    config = download(repo_id, CONFIG, revision, token, cache_dir)
    commit = config.parent.name
    recorded = json.loads(config.read_text()).get('timm_res2net', {}).get('sha256')
    try:
        weights = download(repo_id, WEIGHTS, commit, token, cache_dir, recorded)
    except EntryNotFoundError as error:
        api = HfApi(token=token)
        pickles = [
            name for name in attempt(lambda: api.list_repo_files(repo_id, revision=commit)) if name.endswith(PICKLES)
        ]
        raise CheckpointError(
            f'{repo_id} has no {WEIGHTS}'
            + (
                f', and a pickle can run anything: download {pickles[0]} and `timm-res2net convert` it'
                if pickles
                else ''
            )
        ) from error
    if recorded not in (None, sha256(weights)):
        raise CheckpointError(
            f'{WEIGHTS} of {repo_id} is not the file that its {CONFIG} was written with: SHA-256 {sha256(weights)} for '
            f'{recorded}. Somebody replaced one of them; ask the owner'
        )
    return config.parent, commit


def download(
    repo_id: str,
    name: str,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    recorded: str | None = None,
) -> Path:
    """Downloads a file of the Hub, or takes it from the cache, and checks it against the Hub's hash.

    huggingface_hub compares no bytes with any hash. A file that differs is removed and fetched again once.

    Args:
        repo_id: As in `pull`.
        name: Of the file.
        revision: As in `pull`.
        token: As in `pull`.
        cache_dir: As in `pull`.
        recorded: The SHA-256 to go by where the Hub can't be asked.
    """
    where = None if cache_dir is None else str(cache_dir)
    for force in (False, True):
        path = Path(
            attempt(
                lambda force=force: hf_hub_download(  # type: ignore[misc]
                    repo_id, name, revision=revision, token=token, cache_dir=where, force_download=force
                )
            )
        )
        # The cache calls a file by the Hub's hash; but those that came through Xet by Xet's, which says nothing here.
        if has_hash(path, path.resolve().name):
            return path
        told = recorded
        if not is_offline_mode():
            told = hashes_on_hub(HfApi(token=token), repo_id, [name], path.parent.name)[name]
        if has_hash(path, told) if told else len(path.resolve().name) == 64:
            return path
        path.resolve().unlink()
        path.unlink(missing_ok=True)
    raise CheckpointError(f'{name} of {repo_id} is damaged: it came twice with another hash than the Hub tells, {told}')


def problems_on_hub(text: str) -> list[str]:
    """What the Hub finds wrong with a card; nothing if it can't be reached."""
    try:
        ModelCard(text).validate()
    except ValueError as error:
        return [' '.join(str(error).split())]
    except Exception as error:  # no Hub, in whatever way the HTTP library says that
        _logger.info('the card was not checked on the Hub: %s', first_line(error))
    return []


def attempt(call: Callable[[], T]) -> T:
    """Calls the Hub, again after a pause where the failure may pass."""
    for pause in PAUSES:
        try:
            return call()
        except Exception as error:
            if not passes(error):
                raise
            _logger.info('%s; trying again in %d s', first_line(error), pause)
            time.sleep(pause)
    try:
        return call()
    except Exception as error:
        if isinstance(error, HfHubHTTPError) or not passes(error):
            raise
        raise ConnectionError(f'the Hub can not be reached: {first_line(error)}') from error


def passes(error: BaseException) -> bool:
    """Whether a failure may be gone at the next attempt: a broken connection, a busy server, bytes lost or damaged."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 416, 422, 429, 500, 502, 503, 504)
    # By name, as the HTTP library under huggingface_hub changes with its versions.
    broken = any(base.__name__ == 'TransportError' for base in type(error).__mro__)
    wrapped = error.__cause__ is not None and passes(error.__cause__)  # as uploads of large files are
    return broken or wrapped or 'Consistency check failed' in str(error)
