"""Pushes models to the Hugging Face Hub and verifies that every byte arrived."""

import copy
import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from timm.models import PretrainedCfg, get_model_args
from timm.utils import unwrap_model
from torch import nn

from .._errors import CheckpointError, first_line
from .._files import PathLike, sha256, write_files
from ..models.block import spec_of
from ..models.checks import require_finite_weights
from ..models.classifier import Classifier, as_classifier, model_name
from ..models.variants import ARCHS
from ..weights.config import (
    CONFIG_FILE,
    RECORD,
    WEIGHTS_FILE,
    make_config,
    network_arguments,
    require_labels,
    require_no_model,
    write_folder,
)
from ..weights.loading import load_folder
from .cards import card, merge_cards
from .client import call_hub, hub_api, one_line, require_repo_id
from .facts import ModelFacts
from .pull import fetch

_logger = logging.getLogger(__name__)

CARD_FILE, CODE_FILE = 'README.md', 'register.py'
FILES = WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, CODE_FILE
ABOUT_WEIGHTS = 'description', 'notes', 'license', 'origin_url', 'tag', 'label_names', 'label_descriptions'
AUTO_MAP = {  # transformers' auto classes, and the classes in `CODE_FILE` that they load
    'AutoConfig': 'register.Res2NetConfig',
    'AutoModel': 'register.Res2NetModel',
    'AutoModelForImageClassification': 'register.Res2NetForImageClassification',
    'AutoImageProcessor': 'register.Res2NetImageProcessor',
}


@dataclass(frozen=True)
class Push:
    """The result of a push."""

    url: str | None  # of the commit or of the pull request; None for a dry run
    revision: str | None  # the commit; None for a dry run
    hashes: dict[str, str]  # SHA-256 of each file
    folder: Path | None = None  # that a dry run wrote


def push(
    model: nn.Module,
    repo_id: str,
    *,
    labels: Sequence[str] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    overwrite_card: bool = False,
    dry_run: PathLike | None = None,
    **facts: Any,
) -> Push:
    """Uploads a model: safetensors, the configuration that recreates it, a model card, and code for transformers.

    Before uploading, loads the written files and requires the same outputs, bit for bit. Afterwards, compares the
    files with the Hub's checksums. A card that somebody wrote keeps its text and gets the new metadata. An unchanged
    model from `pull`, or from `load_model` of a file next to its `config.json`, keeps the recorded facts unless new
    ones are given.

    Args:
        model: Model of this package, made by `timm.create_model`.
        repo_id: 'user/name'; created if it does not exist.
        labels: Names of the classes.
        private: Whether a new repository is private; by default the Hub's setting decides.
        revision: Branch to push to, created if it does not exist; by default 'main'.
        create_pr: Open a pull request instead.
        commit_message: Commit message; by default 'Push' and the model's name.
        token: Hub token; by default that of `hf auth login`.
        overwrite_card: Replace a card that somebody wrote.
        dry_run: Folder to write to instead of the Hub. It must not contain a model. A card in it is treated like a
            card on the Hub.
        **facts: Fields of `ModelFacts`: `tag`, `results`, `dataset`, `license`, `base_model` and `recipe`.

    Raises:
        ValueError: If an argument is invalid, or a configuration cannot recreate the model. Nothing was uploaded.
        TypeError: If the model is not a classification model, or an argument has the wrong type.
        ConnectionError: If the Hub cannot be reached, or somebody else pushed at the same time. Nothing was committed,
            or the error says where to look.
        HfHubHTTPError: If the Hub refuses.
        OSError: If a folder cannot be written.

    Example:
        model = timm.create_model('test_res2net.digits', pretrained=True)
        pushed = timm_res2net.push(model, 'you/digits', results={'accuracy': 99.5}, license='apache-2.0')
        pushed.url  # https://huggingface.co/you/digits/commit/...
    """
    require_repo_id(repo_id, revision)
    api, known = hub_api(token), ModelFacts(**facts)
    if dry_run is not None:
        require_no_model(Path(dry_run))
    network = as_classifier(unwrap_model(model))
    require_finite_weights(network)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, 'model')
        config = write_model(network, folder, labels)
        record = getattr(network, 'record', {})
        if record.get('sha256') == config[RECORD]['sha256']:  # the weights are unchanged
            known = known.completed_by({'tag': network.pretrained_cfg.get('tag'), **record})
        write_facts(folder, config, known)
        require_round_trip(network, folder)
        generated = card(network, repo_id=repo_id, **known.as_dict())
        branch = revision or 'main'
        if dry_run is not None:
            existing = Path(dry_run, CARD_FILE)
            written = existing.read_bytes() if existing.is_file() and not overwrite_card else b''
        else:
            require_valid_card(generated)
            head = call_hub(f'push to {repo_id}', lambda: prepare_branch(api, repo_id, branch, private))
            written = b'' if overwrite_card else fetch_card(repo_id, head, token)
        (folder / CARD_FILE).write_text(merge_cards(written, generated), encoding='utf-8')
        hashes = {name: sha256(folder / name) for name in FILES}
        if dry_run is not None:
            write_files(dry_run, {name: (folder / name).read_bytes() for name in reversed(FILES)})  # weights last
            return Push(None, None, hashes, Path(dry_run))
        done = commit(api, repo_id, folder, branch, head, create_pr, commit_message or f'Push {model_name(network)}')
        verify(api, repo_id, folder, done)
        return Push(done.pr_url or done.commit_url, done.oid, hashes)


def write_model(model: Classifier, folder: Path, labels: Sequence[str] | None) -> dict[str, Any]:
    """Writes weights, configuration and code for transformers to a folder; returns the configuration."""
    name = model_name(model)
    if name not in ARCHS:
        raise ValueError(f'cannot push a {type(model).__name__}: it is not a model of this package')
    if labels is not None:
        require_labels(labels, model.num_classes)
    defaults = {'in_chans': 3, 'global_pool': 'avg', 'num_classes': model.num_classes}
    args = {key: value for key, value in network_arguments(get_model_args(model)).items() if defaults.get(key) != value}
    known = model.pretrained_cfg.get('label_names') or ()
    labels = list(labels or (known if len(known) == model.num_classes else ()))
    inherited = {*PretrainedCfg.__dataclass_fields__} - {*ABOUT_WEIGHTS}
    cfg = {key: value for key, value in model.pretrained_cfg.items() if key in inherited}
    config = make_config(model, name, args, PretrainedCfg(**cfg).to_dict(remove_source=True), labels)
    config.update(auto_map=AUTO_MAP)
    state = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in model.state_dict().items()
    }
    try:
        write_folder(folder, state, config, spec_of(model))
    except TypeError as error:
        raise ValueError(f'cannot push {name}: config.json cannot hold its arguments: {first_line(error)}') from error
    shutil.copyfile(Path(__file__).with_name(CODE_FILE), folder / CODE_FILE)
    return config


def write_facts(folder: Path, config: dict[str, Any], facts: ModelFacts) -> None:
    """Adds facts to a configuration, and writes it to a folder."""
    record = facts.as_dict()
    config[RECORD] |= {key: value for key, value in record.items() if key != 'tag'}
    config['pretrained_cfg'] |= {key: record[key] for key in ('tag', 'license') if isinstance(record.get(key), str)}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + '\n')


@torch.inference_mode()
def require_round_trip(model: Classifier, folder: Path) -> None:
    """Raises ValueError unless the model in a folder returns the same outputs as the given one."""
    x = torch.linspace(-2, 2, model.in_chans * 64 * 64).sin().reshape(1, model.in_chans, 64, 64)
    original = copy.deepcopy(model).to('cpu', torch.float32).to(memory_format=torch.contiguous_format).eval()
    try:
        is_same = torch.equal(original(x), load_folder(folder)(x))
    except (RuntimeError, CheckpointError) as error:  # other tensor names or shapes
        _logger.debug('%s', error)
        is_same = False
    if not is_same:
        raise ValueError(
            f'cannot push this {type(model).__name__}: it was changed after create_model, so its configuration cannot '
            'recreate it. Make the change with arguments of create_model, and load the weights into that model'
        )


def require_valid_card(text: str) -> None:
    """Raises ValueError if the Hub rejects a card, for example because of an unknown license."""

    def validate() -> str:
        try:
            ModelCard(text, ignore_metadata_errors=True).validate()
        except ValueError as error:
            return one_line(error)
        return ''

    if problem := call_hub('validate the card', validate):
        raise ValueError(
            f'the Hub rejects the card: {problem}. For a license without an ID pass license=(NAME, URL), or on the '
            'command line --license NAME --license-link URL'
        )


def prepare_branch(api: HfApi, repo_id: str, branch: str, private: bool | None) -> str:
    """Creates the repository and the branch if needed; returns the branch's last commit."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    if branch != 'main':
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    return str(api.model_info(repo_id, revision=branch).sha)


def fetch_card(repo_id: str, head: str, token: str | None) -> bytes:
    """Downloads the card of a commit, empty if it has none. Never ignores an error: a push would replace the card."""
    with tempfile.TemporaryDirectory() as cache:
        file = fetch(repo_id, (CARD_FILE,), head, token, cache) / CARD_FILE
        return file.read_bytes() if file.is_file() else b''


def commit(api: HfApi, repo_id: str, folder: Path, branch: str, head: str, create_pr: bool, message: str) -> CommitInfo:
    """Commits the files of a folder on top of `head`.

    Every attempt names the same parent. If only the response was lost, huggingface_hub finds nothing left to commit; if
    somebody else pushed in the meantime, the Hub refuses. Opening a pull request is not retried: that could open two.
    """

    def attempt() -> CommitInfo:
        files = [CommitOperationAdd(name, str(folder / name)) for name in FILES]
        return api.create_commit(
            repo_id, files, commit_message=message, revision=branch, parent_commit=head, create_pr=create_pr
        )

    try:
        return call_hub(f'commit to {repo_id}', attempt, retries=0 if create_pr else 2)
    except HfHubHTTPError as error:
        if error.response.status_code != 412:
            raise
        raise ConnectionError(
            f'cannot commit to {repo_id}: somebody else pushed to {branch!r} at the same time. '
            'Their commit is untouched: look at it, and push again'
        ) from error
    except ConnectionError as error:
        where = f'{api.endpoint}/{repo_id}/{"discussions" if create_pr else "commits"}'
        raise ConnectionError(f'{error}. If the response was lost, the commit exists: see {where}') from error


def verify(api: HfApi, repo_id: str, folder: Path, done: CommitInfo) -> None:
    """Raises ConnectionError unless the Hub has the files of a folder in a commit."""
    found = call_hub(
        f'verify {done.commit_url}', lambda: api.verify_repo_checksums(repo_id, local_dir=folder, revision=done.oid)
    )
    if found.mismatches or found.extra_paths:
        raise ConnectionError(f'the files in {done.commit_url} differ from the uploaded ones. Push again')
