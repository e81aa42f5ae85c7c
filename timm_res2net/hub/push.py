"""Pushes models to the Hugging Face Hub, so that what arrives is what left."""

import copy
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from timm.models import PretrainedCfg, get_model_args
from timm.utils import unwrap_model
from torch import nn

from ..models.block import function_of
from ..models.classifier import Classifier, as_classifier, model_name
from ..models.variants import ARCHS
from ..weights.download import retrying
from ..weights.errors import first_line
from ..weights.files import PathLike, sha256
from ..weights.folder import CONFIG_FILE, WEIGHTS_FILE, make_config, require_no_model, write_folder
from .cards import CardFacts, card, is_unchanged
from .client import call_hub, is_transient, problems_on_hub, wrong_files

__all__ = ['Push', 'push']

_logger = logging.getLogger(__name__)

CARD_FILE = 'README.md'
FILES = WEIGHTS_FILE, CONFIG_FILE, CARD_FILE


@dataclass(frozen=True)
class Push:
    """The result of a push."""

    url: str | None  # of the commit, or of the pull request; None for a dry run
    revision: str | None  # the commit
    hashes: dict[str, str]  # SHA-256 of each file
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
    dry_run: PathLike | None = None,
) -> Push:
    """Uploads a model: weights as safetensors, the configuration that makes it again, and a card.

    Before anything is sent, the folder is loaded, and the loaded model has to compute the same, bit for bit. Afterwards
    the Hub's checksums are compared with the files. If the Hub's answer is lost but the files are there, the push has
    succeeded. A card that somebody wrote keeps its text and gets the new metadata.

    Args:
        model: A model of this package, made by `timm.create_model`.
        repo_id: 'user/name'. The repository is made if it does not exist.
        tag: Name of this set of weights.
        results: Measured accuracy in percent, such as `{'accuracy': 99.5}`.
        dataset: Data for training and results, a dataset of the Hub ('imagenet-1k') or a description.
        license: A licence of the Hub ('apache-2.0'), or name and URL of another.
        base_model: The model that this one was fine-tuned from, 'user/name'.
        labels: Names of the classes.
        recipe: How it was trained, for the card.
        private: Make the repository private. The Hub's setting decides if None.
        revision: Branch to push to, made if it does not exist.
        create_pr: Propose the files by a pull request instead.
        commit_message: Of the commit.
        token: For the Hub. That of `hf auth login` if None.
        overwrite_card: Replace a card that somebody wrote.
        dry_run: A folder to write to instead, in which there must not be a model yet.

    Returns:
        The commit, and the checksums of the files.

    Raises:
        ValueError: If the model can't be made again from a configuration, or an argument is wrong.
        TypeError: If the model is no classification model.
        OSError: If the folder can't be written.
        ConnectionError: If the Hub can't be reached, or somebody else pushed at the same time; nothing of this push is
            there then.
        HfHubHTTPError: If the Hub refuses; the error says why.
    """
    facts = CardFacts(tag, results, dataset, license, base_model, recipe)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(dry_run or Path(temporary, 'model'))
        require_no_model(folder)
        network = as_classifier(unwrap_model(model))
        write_model(network, folder, labels, facts)
        require_round_trip(network, folder)
        text = card(network, repo_id=repo_id, **vars(facts))
        (folder / CARD_FILE).write_text(text)
        hashes = {name: sha256(folder / name) for name in FILES}
        if dry_run is not None:
            return Push(None, None, hashes, folder)
        if problems := problems_on_hub(text):  # for the licence, among others, as only the Hub knows all of them
            raise ValueError(problems[0])

        api = HfApi(token=token, library_name='timm_res2net')
        call_hub(api.create_repo, repo_id, private=private, exist_ok=True)
        branch = revision or 'main'
        if branch not in {ref.name for ref in call_hub(api.list_repo_refs, repo_id).branches}:
            call_hub(api.create_branch, repo_id, branch=branch, exist_ok=True)
        head = str(call_hub(api.model_info, repo_id, revision=branch).sha)
        if not overwrite_card:
            text = merge_cards(remote_card(api, repo_id, head), text)
            (folder / CARD_FILE).write_text(text)
            hashes[CARD_FILE] = sha256(folder / CARD_FILE)
        commit = Commit(api, repo_id, branch, head, folder, create_pr, commit_message or f'Push {model_name(network)}')
        url, revision = retrying(is_transient_commit)(commit.attempt)
        return Push(url, revision, hashes)


def write_model(model: Classifier, folder: Path, labels: Sequence[str] | None, facts: CardFacts) -> None:
    """Writes a model's weights and configuration to a folder."""
    name = model_name(model)
    if name not in ARCHS:
        raise ValueError(
            f'a {type(model).__name__} can not be pushed: give a model of this package, as create_model made it'
        )
    if labels is not None and len(labels) != model.num_classes:
        raise ValueError(f'labels has {len(labels)} names for {model.num_classes} classes')
    defaults = {'in_chans': 3, 'global_pool': 'avg', 'num_classes': model.num_classes}
    args = {key: value for key, value in get_model_args(model).items() if defaults.get(key) != value}
    known = model.pretrained_cfg.get('label_names') or ()
    labels = list(labels or (known if len(known) == model.num_classes else ()))
    record = {key: value for key, value in vars(facts).items() if value is not None and key != 'tag'}
    config = make_config(model, name, args, inherited_cfg(model, facts), **record)
    config.update({'label_names': labels} if labels else {})
    state = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in model.state_dict().items()
    }
    try:
        write_folder(folder, state, config, function_of(model))
    except TypeError as error:
        raise ValueError(
            f'{name} was made with an argument that no configuration can hold: {first_line(error)}'
        ) from error


def inherited_cfg(model: Classifier, facts: CardFacts) -> dict[str, Any]:
    """timm's configuration of a model, without the parts that describe the weights that it was made with."""
    cfg = {key: model.pretrained_cfg[key] for key in PretrainedCfg.__dataclass_fields__ if key in model.pretrained_cfg}
    for key in ('description', 'notes', 'license', 'origin_url', 'tag', 'label_names', 'label_descriptions'):
        cfg.pop(key, None)
    license = facts.license if isinstance(facts.license, str) else None
    inherited: dict[str, Any] = PretrainedCfg(**{**cfg, 'tag': facts.tag, 'license': license}).to_dict(
        remove_source=True
    )
    return inherited


@torch.inference_mode()
def require_round_trip(model: Classifier, folder: Path) -> None:
    """Raises a ValueError unless a folder makes a model that computes the same as the given one."""
    x = torch.linspace(-2, 2, model.in_chans * 64 * 64).sin().reshape(1, model.in_chans, 64, 64)
    original = copy.deepcopy(model).to('cpu', torch.float32).to(memory_format=torch.contiguous_format).eval()
    try:
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        same = torch.equal(original(x), loaded(x))
    except RuntimeError as error:  # the weights have other names or shapes
        _logger.debug('%s', error)
        same = False
    if not same:
        raise ValueError(
            f'what its configuration makes computes something else than this {type(model).__name__}: it was changed '
            'after create_model made it. Make it by arguments of create_model, and load its weights into that'
        )


def merge_cards(written: str | None, generated: str) -> str:
    """Puts a generated card's metadata on the card that is there already, whose text stays."""
    if written is None or not written.strip() or is_unchanged(written):
        return generated
    old, new = ModelCard(written, ignore_metadata_errors=True), ModelCard(generated)
    old.data = type(new.data)(**{**old.data.to_dict(), **new.data.to_dict()}, ignore_metadata_errors=True)
    return str(old)


def remote_card(api: HfApi, repo_id: str, revision: str) -> str | None:
    """The card in a commit on the Hub, None if the commit has none.

    Raises:
        ConnectionError: If there is one that can't be read: it might be lost otherwise.
    """
    if CARD_FILE not in call_hub(api.list_repo_files, repo_id, revision=revision):
        return None
    try:
        return Path(call_hub(api.hf_hub_download, repo_id, CARD_FILE, revision=revision)).read_text()
    except EntryNotFoundError as error:  # what huggingface_hub makes of most refusals
        problem = first_line(error.__cause__ or error)
        raise ConnectionError(f'the card of {repo_id} can not be read: {problem}. Nothing was pushed') from error


@dataclass(frozen=True)
class Commit:
    """A commit of a folder's files to the Hub, and how to find out whether it has succeeded."""

    api: HfApi
    repo_id: str
    branch: str
    head: str  # the branch's last commit
    folder: Path
    create_pr: bool
    message: str

    def attempt(self) -> tuple[str, str]:
        """Tries once.

        Returns:
            The URL and the commit.

        Raises:
            ConnectionError: If somebody else pushed, or the files on the Hub are not those of the folder.
            Exception: Whatever huggingface_hub raises. Nothing of the commit is on the Hub then.
        """
        try:
            done = self.api.create_commit(
                self.repo_id,
                [CommitOperationAdd(name, str(self.folder / name)) for name in FILES],
                commit_message=self.message,
                revision=self.branch,
                parent_commit=self.head,
                create_pr=self.create_pr,
            )
        except Exception as error:
            conflict = isinstance(error, HfHubHTTPError) and error.response.status_code == 412
            if not conflict and not is_transient(error):
                raise
            # Perhaps only the answer was lost.
            now = str(call_hub(self.api.model_info, self.repo_id, revision=self.branch).sha)
            if found := self.find(now):
                return found
            if conflict or now != self.head:
                raise ConnectionError(
                    f'somebody else pushed to {self.repo_id} at the same time: {self.branch} went from {self.head[:8]} '
                    f'to {now[:8]}. Nothing of this push is there; look at theirs, and push again'
                ) from error
            raise NotCommittedError(
                f'the Hub did not take the commit to {self.repo_id}: {first_line(error)}'
            ) from error
        commit = done.oid or self.head
        if not self.is_at(commit):
            raise ConnectionError(f'the files in {done.commit_url} are not those that were sent; push again')
        return (done.pr_url or done.commit_url), commit

    def find(self, now: str) -> tuple[str, str] | None:
        """Looks for the commit on the Hub, whose branch is at `now`; its URL and commit, None if it isn't there."""
        if self.create_pr:
            refs = call_hub(self.api.list_repo_refs, self.repo_id, include_pull_requests=True)
            for ref in reversed(refs.pull_requests or []):
                if self.is_at(ref.target_commit):
                    number = ref.name.rpartition('/')[2]
                    return f'{self.api.endpoint}/{self.repo_id}/discussions/{number}', ref.target_commit
        elif now != self.head and self.is_at(now):
            return f'{self.api.endpoint}/{self.repo_id}/commit/{now}', now
        return None

    def is_at(self, revision: str) -> bool:
        """Whether the folder's files are in a commit on the Hub."""
        return not wrong_files(self.api, self.repo_id, revision, self.folder, FILES)


class NotCommittedError(ConnectionError):
    """The Hub did not take a commit; nothing of it is there."""


def is_transient_commit(error: BaseException) -> bool:
    """Whether to try a commit again."""
    return isinstance(error, NotCommittedError)
