"""What becomes of a push and a pull for each fault at each step: one table."""

import copy
import io
import json
import logging
import math
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from hub_server import Fault, Hub
from huggingface_hub import ModelCard, close_session, constants, file_download, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http, _xet
from support import TINY, slow_but, tiny
from torch import nn

import timm_res2net.hub.push
from timm_res2net import CheckpointError, pull, push
from timm_res2net.hub.cards import signature
from timm_res2net.hub.client import has_checksum, problems_on_hub
from timm_res2net.hub.pull import download_model
from timm_res2net.hub.push import Commit
from timm_res2net.vision.predict import pretrained_model

STEPS = {
    'push': {
        'check': 'POST /api/validate-yaml',
        'head': 'GET .*/revision/main',
        'create': 'POST .*/repos/create',
        'checksums': 'POST .*/paths-info',
        'HEAD-card': 'HEAD .*README.md',
        'GET-card': 'GET .*README.md',
        'preupload': 'POST .*/preupload',
        'batch': 'POST .*/objects/batch',
        'upload': 'PUT /_large',
        'verify': 'POST .*/verify',
        'xet-token': 'GET .*/xet-write-token',
        'commit': 'POST .*/commit/',
    },
    'pull': {
        'head': 'GET /api/models/user/net$',
        'checksums': 'POST .*/paths-info',
        'HEAD-config': 'HEAD .*config.json',
        'GET-config': 'GET .*config.json',
        'HEAD-weights': 'HEAD .*model.safetensors',
        'GET-weights': 'GET /_cdn',
        'xet-token': 'GET .*/xet-read-token',
    },
}
# Two letters: what happens if the fault is there once, and if it stays. A dot is success; the letters are those of
# ERRORS; a space is no such fault.
TABLE = """
                   400 401 403 404 418 429 500 503 drop html loop silent cut reset short corrupt etag lost
push check          VV  .H  .H  .H  .H  .C  .C  .C   .C   .C   .H     CC
push head           HH  HH  HH  HH  HH  .H  .H  .H   .C   CC   .C     CC
push create         HH  HH  HH  HH  HH  .H  .H  .H   .C   CC   HH     CC
push checksums      HH  HH  HH  HH  HH  .H  .H  .H   .C   CC   HH     CC
push HEAD-card      HH  HH  HH  HH  HH  .H  .H  .H   .C   .C   .C     CC   -     -     -       -   .C    -
push GET-card       HH  HH  HH  HH  HH  .H  .H  .H   .C   .C   .C     CC  .C    .C    .C      .C    -    -
push preupload      HH  HH  HH  HH  HH  .C  .C  .C   .C   .C   HH     CC
push batch          HH  HH  HH  HH  HH  .C  .C  .C   .C   .C   HH     CC
push upload         HH  HH  HH  HH  HH  .C  .C  .C   .C   .C   HH     CC   -     -     -      .C    -    -
push verify         HH  HH  HH  HH  HH  ..  ..  ..   ..   ..   HH     CC
push xet-token      .C  .C  .C  .C  .C  .C  .C  .C   .C   .C   .C     CC
push commit         HH  HH  HH  HH  HH  .C  .C  .C   .C   .C   HH     CC   -     -     -      XX    -   ..
pull head           HH  HH  HH  HH  HH  .H  .H  .H   .C   CC   .C     CC
pull checksums      HH  HH  HH  HH  HH  .H  .H  .H   .C   CC   HH     CC
pull HEAD-config    HH  HH  HH  HH  HH  .H  .H  .H   .C   .D   .C     CC   -     -     -       -   .D    -
pull GET-config     HH  HH  HH  HH  HH  .H  .H  .H   .C   .C   .C     CC  .C    .C    .C      .D    -    -
pull HEAD-weights   HH  HH  HH  HH  HH  .H  .H  .H   .C   .D   .C     CC   -     -     -       -   .D    -
pull GET-weights    HH  HH  HH  HH  HH  .H  .H  .H   .C   .C   .C     CC  .C    .C    .C      .D    -    -
pull xet-token      HH  HH  HH  HH  HH  .H  .H  .H   .C   CC   .C     CC
"""
ERRORS: dict[str, type[Exception]] = {
    'H': HfHubHTTPError,
    'C': ConnectionError,
    'D': CheckpointError,
    'V': ValueError,
    'X': ConnectionError,  # and the Hub has made a commit of its own liking
}
KINDS = {'html': 'nonsense'}
TEXT = '---\nlibrary_name: timm\ntags: [timm]\n---\n\n# A net'
CARD = f'{TEXT}\n{signature(TEXT)}\n'

head, *rows = TABLE.strip('\n').splitlines()
CELLS = [
    (*row.split()[:2], fault, times, outcome)
    for row in rows
    for fault, outcomes in zip(head.split(), row.split()[2:])
    for times, outcome in zip((1, 100), outcomes)
    if outcomes != '-'
]
FAST = {('push', 'create', '403', 100), ('push', 'HEAD-card', '404', 1), ('push', 'GET-card', 'corrupt', 1)}
FAST |= {('push', 'check', '400', 1), ('push', 'head', '500', 1), ('push', 'checksums', 'html', 1)}
FAST |= {('push', 'preupload', '429', 100), ('push', 'batch', 'silent', 1), ('push', 'upload', '418', 1)}
FAST |= {('push', 'verify', 'loop', 1), ('push', 'commit', 'drop', 100), ('push', 'commit', 'lost', 1)}
FAST |= {('pull', 'head', '400', 1), ('pull', 'checksums', '401', 1), ('pull', 'HEAD-config', 'etag', 100)}
FAST |= {('pull', 'GET-config', 'short', 100), ('pull', 'HEAD-weights', 'loop', 100), ('pull', 'GET-weights', '503', 1)}
FAST |= {('pull', 'GET-weights', 'corrupt', 100), ('pull', 'GET-weights', 'reset', 1)}
FAST |= {('push', 'xet-token', '403', 100), ('pull', 'xet-token', 'drop', 1)}


def marks(cell: tuple[str, str, str, int, str]) -> list[pytest.MarkDecorator]:
    return [] if cell[:4] in FAST else [pytest.mark.slow]


@pytest.fixture(scope='module')
def old_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a push of the tiny network uploads."""
    folder = push(tiny(), 'user/net', dry_run=tmp_path_factory.mktemp('old') / 'folder').folder
    assert folder is not None
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets huggingface_hub wait for nothing, and leaves out what a push does on this machine alone."""
    clock = SimpleNamespace(sleep=lambda seconds: None, time=time.time, monotonic=time.monotonic)
    for module in (_http, file_download):
        monkeypatch.setattr(module, 'time', clock)
    monkeypatch.setattr(timm_res2net.hub.push, 'card', lambda *args, **kwargs: CARD)
    monkeypatch.setattr(timm_res2net.hub.push, 'require_round_trip', lambda *args: None)


@pytest.fixture
def hub_lines() -> Iterator[list[str]]:
    """The warnings of huggingface_hub."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger('huggingface_hub').addHandler(handler)
    yield lines
    logging.getLogger('huggingface_hub').removeHandler(handler)


def changed() -> nn.Module:
    model = copy.deepcopy(the_tiny())
    with torch.no_grad():
        model.fc.bias.add_(1)
    return model


@cache
def the_tiny() -> nn.Module:
    """The tiny network, made once."""
    return tiny()


@pytest.mark.parametrize(
    ('hub', 'cell'),
    [
        pytest.param('xet' if 'xet' in cell[1] else 'lfs', cell, id=' '.join(map(str, cell[:4])), marks=marks(cell))
        for cell in CELLS
    ],
    indirect=['hub'],
)
def test_fault_has_stated_outcome_leaves_nothing_and_next_call_succeeds(
    cell: tuple[str, str, str, int, str],
    hub: Hub,
    hasty: None,
    old_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    action, step, name, times, outcome = cell
    temporary, cache = tmp_path / 'temporary', tmp_path / 'cache'
    temporary.mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(temporary))
    old, new, repo_id = the_tiny(), changed(), 'user/new' if step == 'create' else 'user/net'
    hub.put('user/net', {**({} if hub.xet else old_files), 'README.md': b'My words.'})
    if hub.xet:  # whose store only hf_xet writes to
        push(old, 'user/net', token='hf_write')
    before = {each: dict(repo.branches) for each, repo in hub.repos.items()}
    commits = len(hub.repos['user/net'].commits) if step != 'create' else 1
    options: dict[str, Any] = dict(timeout=0.7) if name == 'silent' or (hub.xet and times > 1) else {}

    def run(**options: Any) -> dict[str, torch.Tensor]:
        if action == 'pull':
            return pull(repo_id, cache_dir=cache, **options).state_dict()
        push(new, repo_id, token='hf_write', **options)
        return new.state_dict()

    status = int(name) if name.isdigit() else 0
    fault = Fault(STEPS[action][step], 'status' if status else KINDS.get(name, name), times, status or 503)
    fault.headers = {'Retry-After': '0'} if status == 429 else {}
    hub.faults = [fault]
    if outcome == '.':
        run(**options)
    else:
        with pytest.raises(ERRORS[outcome]) as error:
            run(**options)
        assert '\n' not in str(error.value)
        assert len(str(error.value)) < 1000
        hub.end_silence()  # what nobody waits for any more must come to nothing, too
        if outcome != 'X':  # the Hub is as it was
            assert {each: dict(repo.branches) for each, repo in hub.repos.items()} == before
    assert fault.times < times
    assert list(temporary.iterdir()) == []
    blobs = [path for path in cache.rglob('blobs/[!.]*') if path.is_file()]
    assert all(has_checksum(path.read_bytes(), path.name) for path in blobs)

    hub.faults = []
    expected = run() if action == 'push' else old.state_dict()
    torch.testing.assert_close(pull(repo_id, cache_dir=cache).state_dict(), expected, rtol=0, atol=0)
    assert len(hub.repos[repo_id].commits) == commits + (action == 'push') + (outcome == 'X')
    if step != 'create':
        assert b'My words.' in hub.files('user/net')['README.md']


STORE_FAULTS = 'silent', 'drop', 'status', 'nonsense'


@pytest.mark.parametrize('hub', ['xet'], indirect=True)
@pytest.mark.parametrize('action', ['push', 'pull'])
@pytest.mark.parametrize('kind', slow_but(['silent'], STORE_FAULTS))
def test_store_of_xet_that_fails_ends_the_call_in_time_and_does_not_hold_up_the_next_one(
    action: str, kind: str, hub: Hub, hasty: None, tmp_path: Path
) -> None:
    push(tiny(), 'user/net', token='hf_write')
    calls: dict[str, Callable[..., object]] = {
        'push': lambda **options: push(changed(), 'user/net', token='hf_write', **options),
        'pull': lambda **options: pull('user/net', cache_dir=tmp_path, **options),
    }
    hub.faults = [Fault('GET .*/xet-.*-token', 'elsewhere', times=100), Fault('/_store', kind, times=100)]
    start = time.perf_counter()
    with pytest.raises(ConnectionError, match=r'^the Hub .*(the commit to|model\.safetensors of) user/net'):
        calls[action](timeout=0.7)  # hf_xet tries again for longer
    assert time.perf_counter() - start < 5
    assert hub.faults[1].times < 100
    hub.faults = []
    _xet.XET_CONNECTION_INFO_CACHE.clear()
    calls[action](timeout=20)
    expected = changed() if action == 'push' else tiny()
    torch.testing.assert_close(pull('user/net', cache_dir=tmp_path).state_dict(), expected.state_dict())


# What a caller is told, and how long it takes


def test_pull_without_a_network_tries_twice_and_says_so(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def resolve(host: str, *args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, 'Name or service not known')

    caplog.set_level('INFO', 'timm_res2net')
    close_session()  # else a connection that an earlier test left open is used
    monkeypatch.setattr(socket, 'getaddrinfo', resolve)
    with pytest.raises(ConnectionError, match=r'^the Hub can not be reached: .*Name or service not known'):
        pull('user/net', cache_dir=tmp_path)
    assert caplog.text.count('trying again') == 1


def test_silent_hub_is_named_with_what_was_waited_for_and_how_to_wait_longer(
    hub: Hub, old_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put('user/net', old_files)
    hub.faults = [Fault('GET /_cdn', 'silent', times=100)]
    monkeypatch.setenv('TIMM_RES2NET_TIMEOUT', '0.4')
    start = time.perf_counter()
    with pytest.raises(
        ConnectionError, match=r'within 0\.4 s, .* waited for: model\.safetensors of user/net.*--timeout'
    ):
        pull('user/net', cache_dir=tmp_path)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize('wanted', ['soon', '-1', '0', 'nan'])
def test_timeout_that_is_no_positive_number_is_refused(
    wanted: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('TIMM_RES2NET_TIMEOUT', wanted)
    with pytest.raises(ValueError, match=f"TIMM_RES2NET_TIMEOUT is '{wanted}'; give a positive number"):
        pull('user/net', cache_dir=tmp_path)
    with pytest.raises(ValueError, match='timeout is 0; give a positive number'):
        push(tiny(), 'user/net', timeout=0)
    assert hub.log == []


@pytest.mark.parametrize('seconds', [1e9, 1e300, math.inf])
def test_timeout_that_no_socket_can_hold_is_waited_for(
    seconds: float, hub: Hub, old_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.put('user/net', old_files)
    assert pull('user/net', timeout=seconds, cache_dir=tmp_path).num_classes == 4


def test_retries_write_no_line_of_huggingface_hub(
    hub: Hub, hasty: None, old_files: dict[str, bytes], tmp_path: Path, hub_lines: list[str]
) -> None:
    hub.put('user/net', old_files)
    hub.faults = [Fault('GET /_cdn', 'status', status=429, times=100, headers={'Retry-After': '0'})]
    with pytest.raises(HfHubHTTPError, match='429 Too Many Requests'):
        pull('user/net', cache_dir=tmp_path)
    assert hub_lines == []


@pytest.mark.parametrize('token', ['hf_secret hf_secret', 'hf_secret\nhf_secret', 'hf_sécret', '', ' \n', "hf_s'ecret"])
def test_token_that_is_none_is_refused_unsent_and_unquoted(token: str, hub: Hub, tmp_path: Path) -> None:
    for call in (lambda: push(tiny(), 'user/net', token=token), lambda: pull('user/net', token=token)):
        with pytest.raises(ValueError, match='the token for the Hub is none: it is empty, or has characters') as error:
            call()
        assert 'cret' not in repr(error.value)
    assert hub.log == []


def test_token_of_the_environment_that_is_none_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HF_TOKEN', 'hf_sécret')
    with pytest.raises(ValueError, match='the token for the Hub is none'):
        pull('user/net')


def test_token_with_white_space_around_is_used_without(hub: Hub, hasty: None) -> None:
    assert push(tiny(), 'user/net', token=' hf_write\n').url


@pytest.mark.parametrize('token', ['hf_write', None, True])
def test_token_that_the_hub_quotes_is_not_in_the_error(
    token: Any, hub: Hub, hasty: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token != 'hf_write':
        monkeypatch.setenv('HF_TOKEN', 'hf_write')
    hub.put('user/net', {'config.json': b'{}'})
    quoting = {'X-Error-Message': 'no Bearer hf_write here'}
    hub.faults = [Fault('GET /api/models', 'status', status=400, headers=quoting)]
    with pytest.raises(HfHubHTTPError, match=r'no Bearer \*\*\* here'):
        pull('user/net', token=token, cache_dir=tmp_path)


def test_token_that_the_hub_quotes_about_a_card_is_not_in_the_error(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(card: ModelCard) -> None:
        raise ValueError('no Bearer hf_write here')

    monkeypatch.setenv('HF_TOKEN', 'hf_write')
    monkeypatch.setattr(ModelCard, 'validate', refuse)
    assert problems_on_hub(CARD) == ['no Bearer *** here']


def test_text_of_the_hub_that_controls_a_terminal_is_escaped_in_the_error(
    hub: Hub, hasty: None, tmp_path: Path
) -> None:
    hub.put('user/net', {'config.json': b'{}'})
    evil = {'X-Error-Message': 'a \x1b]0;evil\x07 b'}
    hub.faults = [Fault('GET /api/models', 'status', status=400, headers=evil)]
    with pytest.raises(HfHubHTTPError) as error:
        pull('user/net', cache_dir=tmp_path)
    assert r'a \x1b]0;evil\x07 b' in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize('repo_id', ['brandnew', '', 'a b/c d', 'a/b/c', '../net', 'user/net.git', 'user/'])
def test_name_that_is_no_repository_is_refused_before_any_request(repo_id: str, hub: Hub, tmp_path: Path) -> None:
    for options in ({}, dict(dry_run=tmp_path / 'folder')):
        with pytest.raises(ValueError, match='is no name of a repository; give USER/NAME'):
            push(tiny(), repo_id, **options)
    with pytest.raises(ValueError, match='is no name of a repository; give USER/NAME'):
        pull(repo_id)
    assert hub.log == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('revision', ['', ' ', '../main', 'a..b', 'a b', '-d', 'a\nb'])
def test_revision_that_git_can_not_have_is_refused_before_any_request(revision: str, hub: Hub) -> None:
    with pytest.raises(ValueError, match=r'revision is .*; give a branch, a tag or a commit'):
        pull('user/net', revision=revision)
    with pytest.raises(ValueError, match=r'revision is .*; give a branch, a tag or a commit'):
        push(tiny(), 'user/net', revision=revision)
    assert hub.log == []


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(repo_id=None), 'repo_id is None; give a text'),
        (dict(repo_id=5), 'repo_id is 5; give a text'),
        (dict(revision=5), 'revision is 5; give a text'),
        (dict(token=5), 'the token for the Hub is of type int; give a text'),
    ],
    ids=str,
)
def test_argument_of_another_type_is_refused_before_any_request(
    arguments: dict[str, Any], message: str, hub: Hub
) -> None:
    for call in (pull, lambda **options: push(tiny(), **options)):
        with pytest.raises(TypeError, match=message):
            call(**{'repo_id': 'user/net', **arguments})
    assert hub.log == []


def test_cache_that_can_be_no_folder_is_refused_before_any_request(hub: Hub) -> None:
    with pytest.raises(ValueError, match=r"cache_dir is '\\x00'; give a folder"):
        pull('user/net', cache_dir='\0')
    assert hub.log == []


# The cache


def cached(cache: Path, name: str = 'model.safetensors') -> Path:
    (found,) = cache.rglob(f'snapshots/*/{name}')
    return found


def test_checksum_that_is_a_path_touches_no_file_outside_the_cache(
    hub: Hub, old_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.put('user/net', old_files)
    outside = tmp_path / 'outside'
    outside.write_bytes(b'mine')
    hub.faults = [Fault('(HEAD|GET) .*/resolve/.*', 'etag', times=100)]
    with pytest.raises(CheckpointError, match='is announced with another checksum'):
        pull('user/net', cache_dir=tmp_path / 'cache')
    assert outside.read_bytes() == b'mine'
    assert [path.name for path in tmp_path.iterdir() if path.name != 'cache'] == ['outside']
    assert not [path for path in (tmp_path / 'cache').rglob('*') if path.is_file() and path.name != 'CACHEDIR.TAG']


def test_cache_that_a_false_answer_has_poisoned_is_healed(
    hub: Hub, old_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.put('user/net', old_files)
    pull('user/net', cache_dir=tmp_path)
    link = cached(tmp_path)
    false = link.resolve().with_name('0' * 64)
    false.write_bytes(b'false')
    link.unlink()
    link.symlink_to(false)
    torch.testing.assert_close(pull('user/net', cache_dir=tmp_path).state_dict(), tiny().state_dict())


def test_damaged_cache_and_damaged_download_are_healed(hub: Hub, old_files: dict[str, bytes], tmp_path: Path) -> None:
    hub.put('user/net', old_files)
    pull('user/net', cache_dir=tmp_path)
    cached(tmp_path).write_bytes(b'damaged')
    hub.faults = [Fault('GET /_cdn', 'corrupt')]
    torch.testing.assert_close(pull('user/net', cache_dir=tmp_path).state_dict(), tiny().state_dict())
    assert hub.faults[0].times == 0


def test_pulls_at_once_heal_a_damaged_cache(hub: Hub, old_files: dict[str, bytes], tmp_path: Path) -> None:
    hub.put('user/net', old_files)
    pull('user/net', cache_dir=tmp_path)
    cached(tmp_path).write_bytes(b'damaged')
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: download_model('user/net', cache_dir=tmp_path), range(8)))
    assert {model.files['model.safetensors'] for model in found} == {old_files['model.safetensors']}


def test_pull_of_endless_file_stops_at_its_size(
    hub: Hub, hasty: None, old_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.put('user/net', old_files)
    size = len(old_files['model.safetensors'])
    hub.faults = [Fault('GET /_cdn', 'long', times=100)]
    with pytest.raises(CheckpointError, match=f'does not end after {size:,} bytes'):
        pull('user/net', cache_dir=tmp_path)


def test_pull_of_huge_config_does_not_download_it(hub: Hub, old_files: dict[str, bytes], tmp_path: Path) -> None:
    hub.put('user/net', {**old_files, 'config.json': b' ' * 5_000_001})
    with pytest.raises(CheckpointError, match='5,000,001 bytes'):
        pull('user/net', cache_dir=tmp_path)
    assert not any('resolve' in line for line in hub.log)


@pytest.mark.parametrize('content', [b'\x80\x04N.', b'', b'{"cut'])
def test_pull_of_no_safetensors_raises_checkpoint_error(
    content: bytes, hub: Hub, old_files: dict[str, bytes], tmp_path: Path
) -> None:
    config = json.loads(old_files['config.json'])
    del config['timm_res2net']
    hub.put('user/net', {'config.json': json.dumps(config).encode(), 'model.safetensors': content})
    with pytest.raises(CheckpointError, match=r'^model\.safetensors of user/net is cut, or is no file of safetensors'):
        pull('user/net', cache_dir=tmp_path)


def test_pull_of_damaged_cache_for_reading_only_raises_os_error(
    hub: Hub, old_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(30, 'Read-only file system', str(path))

    hub.put('user/net', old_files)
    pull('user/net', cache_dir=tmp_path)
    cached(tmp_path).write_bytes(b'damaged')
    monkeypatch.setattr(Path, 'unlink', refuse)
    with pytest.raises(OSError, match=r'model\.safetensors of user/net: Read-only file system'):
        pull('user/net', cache_dir=tmp_path)


def test_slow_work_on_this_machine_is_not_waiting_for_the_hub(
    hub: Hub, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('timm_res2net.hub.push.require_round_trip', lambda *args: time.sleep(0.6))
    assert push(tiny(), 'user/net', token='hf_write', timeout=0.5).url


def test_pull_into_cache_that_can_not_be_written_raises_os_error(
    hub: Hub, old_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.put('user/net', old_files)
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match=r'config\.json of user/net: Not a directory'):
        pull('user/net', cache_dir=tmp_path / 'file' / 'cache')


@pytest.mark.parametrize('hub', ['lfs', 'xet'], indirect=True)
def test_offline_pull_refuses_damaged_file_and_says_what_it_can_not_verify(
    hub: Hub,
    old_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = json.loads(old_files['config.json'])
    del config['timm_res2net']['sha256']
    push(tiny(), 'user/net', token='hf_write')
    hub.put('user/net', {'config.json': json.dumps(config).encode()})
    pull('user/net', cache_dir=tmp_path)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    link, good = cached(tmp_path), old_files['model.safetensors']
    link.write_bytes(good[:-4] + b'\0\0\0\0')
    with pytest.raises(CheckpointError, match=r'model\.safetensors of user/net is damaged in the cache'):
        pull('user/net', cache_dir=tmp_path)
    link.unlink()
    link.write_bytes(good)  # as on a file system without links
    torch.testing.assert_close(pull('user/net', cache_dir=tmp_path).state_dict(), tiny().state_dict())
    assert 'model.safetensors of user/net can not be verified without the Hub' in caplog.text


def test_offline_push_says_so_in_one_line(hub: Hub, hasty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(ConnectionError, match='HF_HUB_OFFLINE says that it must not be asked'):
        push(tiny(), 'user/net', token='hf_write')


# The commit


def test_lost_answer_under_a_commit_of_others_is_found(hub: Hub, hasty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put('user/net', {'README.md': b'My words.'})
    hub.faults = [Fault('POST .*/commit/', 'lost')]
    find_after = Commit.find_after

    def late(commit: Commit, *args: Any) -> Any:
        hub.put('user/net', {'README.md': b'Theirs.'})
        return find_after(commit, *args)

    monkeypatch.setattr(Commit, 'find_after', late)
    pushed = push(tiny(), 'user/net', token='hf_write')
    last, ours, *_ = reversed(hub.repos['user/net'].commits)
    assert pushed.revision == ours
    assert hub.repos['user/net'].branches['main'] == last
    assert hub.files('user/net')['README.md'] == b'Theirs.'


def test_commit_that_can_not_be_looked_for_is_said_to_be_unknown(hub: Hub, hasty: None) -> None:
    hub.put('user/net', {'README.md': b'My words.'})
    hub.faults = [Fault('POST .*/commit/', 'lost'), Fault('GET .*/commits/', 'status', status=403, times=100)]
    with pytest.raises(ConnectionError, match=r'Perhaps the files are there all the same: look at .*/user/net/commits'):
        push(tiny(), 'user/net', token='hf_write')


def test_conflict_of_a_branch_that_did_not_move_is_tried_again_and_blames_nobody(hub: Hub, hasty: None) -> None:
    hub.faults = [Fault('POST .*/commit/', 'status', status=412)]
    assert push(tiny(), 'user/net', token='hf_write').url
    hub.faults = [Fault('POST .*/commit/', 'status', status=412, times=100)]
    with pytest.raises(ConnectionError, match=r'the Hub did not take the commit to user/net: .*412'):
        push(changed(), 'user/net', token='hf_write')


# Published weights that timm loads


def of_hub(repo_id: str) -> dict[str, Any]:
    overlay = dict(hf_hub_id=repo_id, file=None, num_classes=4)
    return dict(pretrained=True, num_classes=4, pretrained_cfg_overlay=overlay, **TINY)


def test_create_model_without_the_hub_says_so_in_one_line_and_takes_the_cache(
    hub: Hub,
    hasty: None,
    old_files: dict[str, bytes],
    tmp_path: Path,
    hub_lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.put('user/net', old_files)
    hub.faults = [Fault('.*', 'drop', times=1000)]
    with pytest.raises(ConnectionError, match=r'the Hub can not be reached: .* \(model\.safetensors of user/net\)'):
        timm.create_model('test_res2net', **of_hub('user/net'), cache_dir=str(tmp_path))
    assert hub_lines == []
    faults, hub.faults = hub.faults, []
    timm.create_model('test_res2net', **of_hub('user/net'), cache_dir=str(tmp_path))
    hub.faults = faults
    timm.create_model('test_res2net', **of_hub('user/net'), cache_dir=str(tmp_path))
    assert hub_lines == []
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    model = timm.create_model('test_res2net', **of_hub('user/net'), cache_dir=str(tmp_path))
    torch.testing.assert_close(model.state_dict(), tiny().state_dict(), rtol=0, atol=0)


def test_create_model_takes_the_latest_weights_of_the_hub_and_those_of_a_revision(
    hub: Hub, hasty: None, old_files: dict[str, bytes], tmp_path: Path
) -> None:
    first = hub.put('user/net', old_files)
    timm.create_model('test_res2net', **of_hub('user/net'), cache_dir=str(tmp_path))
    pushed = push(changed(), 'user/net', token='hf_write')
    model = timm.create_model('test_res2net', **of_hub('user/net'), cache_dir=str(tmp_path))
    torch.testing.assert_close(model.state_dict(), changed().state_dict(), rtol=0, atol=0)
    hub.put('user/net', {'config.json': b'{}'})
    for revision, wanted in ((first, tiny()), (pushed.revision, changed())):
        model = timm.create_model('test_res2net', **of_hub(f'user/net@{revision}'), cache_dir=str(tmp_path / 'new'))
        torch.testing.assert_close(model.state_dict(), wanted.state_dict(), rtol=0, atol=0)


def test_create_model_takes_the_file_that_its_configuration_names(
    hub: Hub, hasty: None, old_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.put('user/net', {**old_files, 'other.safetensors': old_files['model.safetensors']})
    hub.put('user/net', {'model.safetensors': b'other'})
    options = of_hub('user/net')
    options['pretrained_cfg_overlay']['hf_hub_filename'] = 'other.safetensors'
    model = timm.create_model('test_res2net', **options, cache_dir=str(tmp_path))
    torch.testing.assert_close(model.state_dict(), tiny().state_dict(), rtol=0, atol=0)


def test_create_model_of_damaged_weights_on_the_hub_raises_checkpoint_error(
    hub: Hub, hasty: None, old_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.put('user/net', {'model.safetensors': old_files['model.safetensors'][:-9]})
    with pytest.raises(CheckpointError, match=r'user--net.*model\.safetensors is refused: it is cut'):
        timm.create_model('test_res2net', **of_hub('user/net'), cache_dir=str(tmp_path))


def test_create_model_of_hub_that_refuses_raises_its_error(hub: Hub, hasty: None, tmp_path: Path) -> None:
    with pytest.raises(HfHubHTTPError, match='Repository Not Found'):
        timm.create_model('test_res2net', **of_hub('user/absent'), cache_dir=str(tmp_path))


def test_create_model_believes_no_checksum_that_is_a_path(
    hub: Hub, hasty: None, old_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.put('user/net', old_files)
    cache = tmp_path / 'cache'
    hub.faults = [Fault('(HEAD|GET) .*/resolve/.*', 'etag', times=100)]
    with pytest.raises(ConnectionError, match=r"'\.\./\.\./\.\./outside' is no checksum"):
        timm.create_model('test_res2net', **of_hub('user/net'), cache_dir=str(cache))
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]
    hub.faults = []
    model = timm.create_model('test_res2net', **of_hub('user/net'), cache_dir=str(cache))
    torch.testing.assert_close(model.state_dict(), tiny().state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize('name', ['test_res2net', 'hf-hub:user/net'])
def test_create_model_downloads_damaged_weights_again_and_leaves_none_in_the_cache(
    name: str, hub: Hub, hasty: None, old_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.put('user/net', old_files)
    options = dict(cache_dir=str(tmp_path), **(of_hub('user/net') if name == 'test_res2net' else dict(pretrained=True)))
    hub.faults = [Fault('GET /_cdn', 'corrupt', times=100)]
    with pytest.raises(CheckpointError, match=r'model\.safetensors of user/net has another checksum'):
        timm.create_model(name, **options)
    assert not list(tmp_path.rglob('model.safetensors'))
    hub.faults[0].times = 1
    model = timm.create_model(name, **options)
    assert hub.faults[0].times == 0
    torch.testing.assert_close(model.state_dict(), tiny().state_dict(), rtol=0, atol=0)


def test_create_model_heals_damaged_weights_in_the_cache_and_refuses_them_without_the_hub(
    hub: Hub, hasty: None, old_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.put('user/net', {**old_files, 'a/b.safetensors': old_files['model.safetensors']})
    options = of_hub('user/net')
    options['pretrained_cfg_overlay']['hf_hub_filename'] = 'a/b.safetensors'
    timm.create_model('test_res2net', **options, cache_dir=str(tmp_path))
    cached(tmp_path, 'a/b.safetensors').write_bytes(b'damaged')
    hub.faults = [Fault('.*', 'drop', times=100)]
    with pytest.raises(CheckpointError, match=r'a/b\.safetensors of user/net is damaged in the cache'):
        timm.create_model('test_res2net', **options, cache_dir=str(tmp_path))
    hub.faults = []
    model = timm.create_model('test_res2net', **options, cache_dir=str(tmp_path))
    torch.testing.assert_close(model.state_dict(), tiny().state_dict(), rtol=0, atol=0)


def test_create_model_takes_what_others_have_brought_to_the_cache_after_one_question(
    hub: Hub, hasty: None, old_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put('user/net', old_files)
    hf_hub_download('user/net', 'model.safetensors', cache_dir=tmp_path)
    monkeypatch.setattr(constants, 'HF_HUB_ETAG_TIMEOUT', 0.4)
    for kind in ('', 'silent', 'drop', 'status', 'etag'):
        hub.log.clear()
        hub.faults = [Fault('HEAD', kind, times=100)] if kind else []
        model = timm.create_model('test_res2net', **of_hub('user/net'), cache_dir=str(tmp_path))
        torch.testing.assert_close(model.state_dict(), tiny().state_dict(), rtol=0, atol=0)
        assert len(hub.log) == 1


@pytest.mark.parametrize(
    ('name', 'kind', 'message'),
    [
        ('hf-hub:user/net', 'drop', r'the Hub can not be reached: .* \(config\.json of user/net\)'),
        ('hf_hub:user/net', 'status', '.*503 Service Unavailable'),
    ],
)
def test_pretrained_model_without_the_hub_writes_no_line_and_takes_the_cache(
    name: str, kind: str, message: str, hub: Hub, hasty: None, old_files: dict[str, bytes], hub_lines: list[str]
) -> None:
    hub.put('user/net', old_files)
    fault = Fault('.*', kind, times=1000)
    hub.faults = [fault]
    with pytest.raises(ValueError, match=f'weights of {name} can not be had: {message}'):
        pretrained_model(name)
    assert hub_lines == []
    hub.faults = []
    pretrained_model(name)
    hub.faults = [fault]
    torch.testing.assert_close(pretrained_model(name).state_dict(), tiny().state_dict())
    assert hub_lines == []


def test_pretrained_model_of_another_family_comes_from_the_hub(hub: Hub, hasty: None) -> None:
    model = timm.create_model('test_resnet', num_classes=3)
    weights = io.BytesIO()
    torch.save(model.state_dict(), weights)
    config = dict(architecture='test_resnet', num_classes=3, pretrained_cfg={'num_classes': 3})
    hub.put('user/net', {'config.json': json.dumps(config).encode(), 'pytorch_model.bin': weights.getvalue()})
    torch.testing.assert_close(pretrained_model('hf-hub:user/net').state_dict(), model.state_dict())
