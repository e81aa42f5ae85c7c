"""Pushes models to the Hugging Face Hub, so that what arrives is what left."""

import copy
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from timm.models import PretrainedCfg, get_model_args
from timm.utils import unwrap_model
from torch import nn

from ..models.block import function_of
from ..models.classifier import Classifier, as_classifier, model_name, require_finite_weights
from ..models.variants import ARCHS
from ..weights.config import load_folder
from ..weights.download import retrying
from ..weights.errors import CheckpointError, first_line
from ..weights.files import PathLike, atomic_write_text, sha256, temporary_folder, write_files
from ..weights.folder import CONFIG_FILE, WEIGHTS_FILE, make_config, require_no_model, write_folder
from .cards import METADATA, CardFacts, card, is_unchanged
from .client import UPLOAD, DamagedError, Hub, LateError, is_refusal, problems_on_hub, require_repo_id

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
    timeout: float | None = None,
) -> Push:
    """Uploads a model: weights as safetensors, the configuration that makes it again, and a card.

    Before anything is sent, the folder is loaded, and the loaded model has to compute the same, bit for bit. Afterwards
    the Hub's checksums are compared with the files. If the Hub's answer is lost but the files are there, the push has
    succeeded. A card that somebody wrote keeps its text and gets the new metadata. A model that `pull` made, or
    `load_model` of a file beside its `config.json`, and that was not changed since keeps its tag, results, dataset,
    licence, base model and recipe, where no others are given.

    Args:
        model: A model of this package, made by `timm.create_model`.
        repo_id: 'user/name'. The repository is made if it does not exist.
        tag: Name of this set of weights.
        results: Measured accuracy in percent, such as `{'accuracy': 99.5}`.
        dataset: Data for training and results, a dataset of the Hub ('imagenet-1k') or a description.
        license: A licence of the Hub ('apache-2.0', in any case), or name and URL of another.
        base_model: The model that this one was fine-tuned from, 'user/name'.
        labels: Names of the classes.
        recipe: How it was trained, for the card.
        private: Make the repository private. The Hub's setting decides if None.
        revision: Branch to push to, made if it does not exist.
        create_pr: Propose the files by a pull request instead.
        commit_message: Of the commit.
        token: For the Hub. That of `hf auth login` if None.
        overwrite_card: Replace a card that somebody wrote.
        dry_run: A folder to write to instead, in which there must not be a model yet. A card in it is treated as one on
            the Hub would be.
        timeout: Seconds to wait for the Hub, all requests and pauses together, and one more for each megabyte to send.
            If None, those in the environment variable TIMM_RES2NET_TIMEOUT, or 120.

    Returns:
        `url` and `revision` of the commit, None for a dry run; `hashes`, the SHA-256 of each file; and a dry run's
        `folder`.

    Raises:
        ValueError: If the model can't be made again from a configuration, or an argument is wrong.
        TypeError: If the model is no classification model, or an argument is of another type.
        OSError: If the folder, or that for temporary files, can't be written.
        ConnectionError: If the Hub can't be reached, doesn't answer in time or makes no sense, or somebody else pushed
            at the same time. Nothing of this push is there then, or the error says that this is not known.
        HfHubHTTPError: If the Hub refuses; the error says why.
    """
    require_repo_id(repo_id, revision)
    Hub(token, timeout)  # refuses what can't be
    facts = CardFacts(tag, results, dataset, license, base_model, recipe).checked()
    if dry_run is not None:
        require_no_model(Path(dry_run))
    network = as_classifier(unwrap_model(model))
    require_finite_weights(network)
    with temporary_folder(Path(tempfile.gettempdir())) as temporary:
        folder = temporary / 'model'
        write_model(network, folder, labels, facts)
        record = getattr(network, 'record', {})
        if record.get('sha256') == sha256(folder / WEIGHTS_FILE):  # pulled, and the same still
            facts = facts.completed({'tag': network.pretrained_cfg.get('tag'), **record})
            folder = temporary / 'completed'
            write_model(network, folder, labels, facts)
        require_round_trip(network, folder)
        text = card(network, repo_id=repo_id, **vars(facts))
        if dry_run is not None:
            out = Path(dry_run)
            if not overwrite_card and (out / CARD_FILE).is_file():
                text = merge_cards(decoded((out / CARD_FILE).read_bytes()), text)
            files = {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
            write_files(out, {CARD_FILE: text.encode(), **files})
            return Push(None, None, {name: sha256(out / name) for name in FILES}, out)
        atomic_write_text(folder / CARD_FILE, text)

        hub = Hub(token, timeout)  # whose time begins now
        require_valid_card(text, hub)  # the licence, among others, as only the Hub knows all of them
        branch = revision or 'main'
        if (found := find_head(hub, repo_id, branch)) is None:
            hub.call(f'the new repository {repo_id}', hub.api.create_repo, repo_id, private=private, exist_ok=True)
            found = find_head(hub, repo_id, branch) or ('', False)
        head, is_branch = found
        if not overwrite_card and (written := remote_card(hub, repo_id, head)):
            text = merge_cards(written, text)
            require_valid_card(text, hub)
            atomic_write_text(folder / CARD_FILE, text)
        if not is_branch:
            hub.call(f'the new branch {branch}', hub.api.create_branch, repo_id, branch=branch, exist_ok=True)
        message = commit_message or f'Push {model_name(network)}'
        commit = Commit(hub, repo_id, branch, head, folder, create_pr, message)
        hub.deadline.end += (folder / WEIGHTS_FILE).stat().st_size / UPLOAD
        url, made = retrying(is_transient_commit, hub.deadline)(commit.attempt)
        return Push(url, made, {name: sha256(folder / name) for name in FILES})


def require_valid_card(text: str, hub: Hub) -> None:
    """Raises a ValueError if the Hub finds a fault in a card."""
    if problems := problems_on_hub(text, hub):
        hint = ''
        if 'license' in problems[0]:
            hint = '. For a licence that it does not know give name and address: --license NAME --license-link URL, '
            hint += 'or license=(NAME, URL)'
        raise ValueError(f'the Hub does not take the card: {problems[0]}{hint}')


def find_head(hub: Hub, repo_id: str, branch: str) -> tuple[str, bool] | None:
    """The last commit of a branch, or of main if there is no such branch, and whether there is; None for no repository.

    Raises:
        Exception: As `Hub.call` does.
    """
    try:
        return hub.commit(repo_id, branch), True
    except RepositoryNotFoundError:
        return None
    except RevisionNotFoundError:
        return hub.commit(repo_id, 'main'), False


def write_model(model: Classifier, folder: Path, labels: Sequence[str] | None, facts: CardFacts) -> None:
    """Writes a model's weights and configuration to a folder."""
    name = model_name(model)
    if name not in ARCHS:
        raise ValueError(
            f'a {type(model).__name__} can not be pushed: give a model of this package, as create_model made it'
        )
    if labels is not None and not all(isinstance(label, str) and label.strip() for label in labels):
        raise ValueError('labels has an entry that is no text')
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
        loaded = load_folder(folder)
        same = torch.equal(original(x), loaded(x))
    except (RuntimeError, CheckpointError) as error:  # the weights have other names or shapes
        _logger.debug('%s', error)
        same = False
    if not same:
        raise ValueError(
            f'what its configuration makes computes something else than this {type(model).__name__}: it was changed '
            'after create_model made it. Make it by arguments of create_model, and load its weights into that'
        )


def merge_cards(written: str | None, generated: str) -> str:
    """Puts a generated card's metadata on the card that is there already, whose text stays.

    Metadata that can't be read stay, too, as a part of the text.
    """
    if written is None or not written.strip() or is_unchanged(written):
        return generated
    new: dict[str, Any] = yaml.safe_load(METADATA.match(generated)[1])  # type: ignore[index]
    block = METADATA.match(written)
    text = written[block.end() :] if block else written
    try:
        old = yaml.safe_load(block[1]) or {} if block else {}
        tags = [old.get('tags') or []] if isinstance(old.get('tags'), str) else list(old.get('tags') or [])
        merged = {**old, **new, 'tags': [*tags, *(tag for tag in new['tags'] if tag not in tags)]}
        metadata = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True, width=10_000)
    except (yaml.YAMLError, AttributeError, TypeError, ValueError, RecursionError) as error:
        _logger.warning("the card's metadata can not be read and become a part of its text: %s", first_line(error))
        fence = '`' * max(3, *(len(run) + 1 for run in re.findall('`+', written)), 3)
        text = f'\n{fence}yaml\n{block[1] if block else ""}\n{fence}\n{text}'
        metadata = yaml.safe_dump(new, sort_keys=False, allow_unicode=True, width=10_000)
    return f'---\n{metadata}---\n{text}'


def remote_card(hub: Hub, repo_id: str, commit: str) -> str | None:
    """The card in a commit on the Hub, None if the commit has none.

    Raises:
        ConnectionError: If there is one that can't be read: it might be lost otherwise.
    """
    told = hub.checksums(repo_id, commit, [CARD_FILE]).get(CARD_FILE)
    if told is None:
        return None
    with temporary_folder(Path(tempfile.gettempdir())) as cache:
        try:
            _, content = hub.download(repo_id, CARD_FILE, commit, *told, str(cache))
        except DamagedError as error:
            raise ConnectionError(f'{error}. Nothing was pushed') from error
    return decoded(content)


def decoded(content: bytes) -> str:
    """The text of a card that somebody wrote, in whatever encoding it is."""
    if content.startswith((b'\xff\xfe', b'\xfe\xff')):
        return content.decode('utf-16', errors='replace').replace('\r\n', '\n')
    try:
        text = content.decode('utf-8-sig')
    except UnicodeDecodeError:
        text = content.decode('cp1252' if not set(content) & {0x81, 0x8D, 0x8F, 0x90, 0x9D} else 'latin-1')
    return text.replace('\r\n', '\n')


@dataclass(frozen=True)
class Commit:
    """A commit of a folder's files to the Hub, and how to find out whether it has succeeded."""

    hub: Hub
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
            HfHubHTTPError: If the Hub refuses. Nothing of the commit is on the Hub then.
            OSError: If a file can't be read.
        """
        awaited = f'the commit to {self.repo_id}'
        commit = partial(
            self.hub.api.create_commit,
            self.repo_id,
            [CommitOperationAdd(name, str(self.folder / name)) for name in FILES],
            commit_message=self.message,
            revision=self.branch,
            parent_commit=self.head,
            create_pr=self.create_pr,
        )
        try:
            done = self.hub.in_time(awaited, commit)
        except Exception as error:
            problem = self.hub.documented(awaited, error)
            conflict = isinstance(problem, HfHubHTTPError) and problem.response.status_code == 412
            if isinstance(problem, LateError):
                raise ConnectionError(f'{problem}. {self.doubt}') from error
            if (is_refusal(problem) and not conflict) or (isinstance(problem, OSError) and problem.errno is not None):
                raise problem from None
            return self.find_after(problem)
        made = done.oid or self.head
        try:
            same = self.is_at(made)
        except (ConnectionError, HfHubHTTPError) as error:
            raise ConnectionError(f'{done.commit_url} is there, but it could not be checked: {error}') from error
        if not same:
            raise ConnectionError(f'the files in {done.commit_url} are not those that were sent; push again')
        return (done.pr_url or done.commit_url), made

    @property
    def doubt(self) -> str:
        """What to say when nobody knows whether the commit is there."""
        return f'Perhaps the files are there all the same: look at {self.hub.api.endpoint}/{self.repo_id}/commits'

    def find_after(self, problem: Exception) -> tuple[str, str]:
        """Looks for the commit after an error; perhaps only the answer was lost.

        Raises:
            ConnectionError: If it isn't there, or can't be looked for.
        """
        try:
            now = self.hub.commit(self.repo_id, self.branch)
            found = self.find(now)
        except (ConnectionError, HfHubHTTPError) as error:
            raise ConnectionError(f'{problem}. {self.doubt} ({error})') from error
        if found:
            return found
        if now != self.head:
            raise ConnectionError(
                f'somebody else pushed to {self.repo_id} at the same time: {self.branch} went from {self.head[:8]} '
                f'to {now[:8]}. Nothing of this push is there; look at theirs, and push again'
            ) from problem
        raise NotCommittedError(f'the Hub did not take the commit to {self.repo_id}: {problem}') from problem

    def find(self, now: str) -> tuple[str, str] | None:
        """Looks for the commit on the Hub, whose branch is at `now`; its URL and commit, None if it isn't there."""
        api = self.hub.api
        if self.create_pr:
            ask = partial(api.list_repo_refs, self.repo_id, include_pull_requests=True)
            refs = self.hub.call(f'the pull requests of {self.repo_id}', ask)
            for ref in reversed(refs.pull_requests or []):
                if self.is_at(ref.target_commit):
                    number = ref.name.rpartition('/')[2]
                    return f'{api.endpoint}/{self.repo_id}/discussions/{number}', ref.target_commit
        elif now != self.head:  # somebody else's commit may be on top of it
            ask_commits = partial(api.list_repo_commits, self.repo_id, revision=self.branch)
            for each in self.hub.call(f'the commits of {self.repo_id}', ask_commits):
                if each.commit_id == self.head:
                    break
                if self.is_at(each.commit_id):
                    return f'{api.endpoint}/{self.repo_id}/commit/{each.commit_id}', each.commit_id
        return None

    def is_at(self, revision: str) -> bool:
        """Whether the folder's files are in a commit on the Hub."""
        return self.hub.has(self.repo_id, revision, self.folder, FILES)


class NotCommittedError(ConnectionError):
    """The Hub did not take a commit; nothing of it is there."""


def is_transient_commit(error: BaseException) -> bool:
    """Whether to try a commit again."""
    return isinstance(error, NotCommittedError)
