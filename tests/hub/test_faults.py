"""After a fault at any step, nothing is half done, no damaged bytes are used, and the next call works."""

import logging
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Fault, Hub
from huggingface_hub.errors import HfHubHTTPError
from support import slow_but, tiny
from torch import nn

import timm_res2net.hub.push
from timm_res2net import CheckpointError, pull, push
from timm_res2net.hub.cards import sign

STEPS = {
    'push': {
        'check': 'POST /api/validate-yaml',
        'head': 'GET .*/revision/main',
        'create': 'POST .*/repos/create',
        'card': '(HEAD|GET) .*README.md',
        'preupload': 'POST .*/preupload',
        'upload': 'PUT /_large',
        'verify': 'GET .*/tree',
        'commit': 'POST .*/commit/',
    },
    'pull': {
        'head': 'GET .*/revision/main',
        'tree': 'GET .*/tree',
        'config': '(HEAD|GET) .*config.json',
        'weights': 'GET /_cdn',
    },
}
# Each cell has two characters: the outcome if the fault occurs once, and if it persists. A dot is success, a letter is
# an error in ERRORS, and a single dash is a fault that cannot occur at this step.
TABLE = """
                   403 429 503 drop nonsense cut corrupt lost
push check          HH  .H  .H   .C       .C   -       -    -
push head           HH  .H  .H   .C       CC   -       -    -
push create         HH  .H  .H   .C       CC   -       -    -
push card           HH  .H  .H   .C       CC  .C      .D    -
push preupload      HH  .H  .H   .C       CC   -       -    -
push upload         HH  .H  .H   .C        -   -      .H    -
push verify         HH  .H  .H   .C       CC   -       -    -
push commit         HH  .H  .H   .C       CC   -      XX   ..
pull head           HH  .H  .H   .C       CC   -       -    -
pull tree           HH  .H  .H   .C       CC   -       -    -
pull config         HH  .H  .H   .C       CC  .C      .D    -
pull weights        HH  .H  .H   .C       .C  .C      .D    -
"""
ERRORS: dict[str, type[Exception]] = {
    'H': HfHubHTTPError,
    'C': ConnectionError,
    'D': CheckpointError,
    'X': ConnectionError,  # after a commit in which the Hub has damaged a file
}
TEXT = '---\nlibrary_name: timm\ntags: [timm]\n---\n\n# A net'
CARD = f'{TEXT}\n{sign(TEXT)}\n'

head, *rows = TABLE.strip('\n').splitlines()
CELLS = {
    f'{action} {step} {fault} {times}': outcome
    for action, step, *cells in map(str.split, rows)
    for fault, outcomes in zip(head.split(), cells)
    for times, outcome in zip((1, 100), outcomes)
    if outcomes != '-'
}
FAST = [  # at least one for each step; together they cover every kind of fault, and every outcome
    *('push check 503 100', 'push head 503 1', 'push create 403 100', 'push card corrupt 1', 'push preupload 429 1'),
    *('push upload corrupt 1', 'push verify nonsense 1', 'push commit drop 100', 'push commit lost 1'),
    *('push commit corrupt 1', 'pull head drop 1', 'pull tree 403 1', 'pull config cut 1', 'pull weights corrupt 100'),
]


@pytest.fixture
def hub_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the steps of a push that need no Hub."""
    monkeypatch.setattr(timm_res2net.hub.push, 'card', lambda *args, **kwargs: CARD)
    monkeypatch.setattr(timm_res2net.hub.push, 'require_round_trip', lambda *args: None)


@cache
def model(is_changed: bool = False) -> nn.Module:
    made = tiny()
    with torch.no_grad():
        made.fc.bias.add_(int(is_changed))
    return made


@cache
def old_files() -> dict[str, bytes]:
    """The files that a push of the unchanged network uploads."""
    with tempfile.TemporaryDirectory() as folder:
        push(model(), 'user/net', dry_run=f'{folder}/net')
        return {path.name: path.read_bytes() for path in Path(folder, 'net').iterdir()}


@pytest.mark.parametrize('cell', slow_but(FAST, CELLS))
def test_fault_has_the_expected_outcome_leaves_nothing_behind_and_the_next_call_succeeds(
    cell: str, hub: Hub, hub_only: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    action, step, kind, number = cell.split()
    times, outcome = int(number), CELLS[cell]
    temporary, cache = tmp_path / 'temporary', tmp_path / 'cache'
    hub.put('user/net', {**old_files(), 'README.md': b'My words.'})
    temporary.mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(temporary))
    repo_id = 'user/new' if step == 'create' else 'user/net'
    before = {each: dict(repo.branches) for each, repo in hub.repos.items()}

    def run() -> nn.Module:
        if action == 'pull':
            return pull(repo_id, cache_dir=cache)
        push(model(is_changed=True), repo_id, token='hf_write')
        return model(is_changed=True)

    status = int(kind) if kind.isdigit() else 0
    headers = {'Retry-After': '0'} if status == 429 else {}
    fault = Fault(STEPS[action][step], 'status' if status else kind, times, status, headers)
    hub.faults = [fault]
    is_committed = outcome == 'X' or step == 'verify'
    if outcome == '.':
        run()
    else:
        with pytest.raises(ERRORS[outcome]) as error:
            run()
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 1000
        assert is_committed or {each: dict(repo.branches) for each, repo in hub.repos.items()} == before
    assert fault.times < times
    assert list(temporary.iterdir()) == []

    hub.faults = []
    expected = run() if action == 'push' else model()
    torch.testing.assert_close(pull(repo_id, cache_dir=cache).state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert len(hub.repos[repo_id].commits) == 1 + (action == 'push') + (outcome == 'X')
    assert step == 'create' or outcome == 'X' or b'My words.' in hub.files('user/net')['README.md']


def test_lost_response_of_a_pull_request_opens_no_second_one_and_says_where_to_look(hub: Hub, hub_only: None) -> None:
    hub.put('user/net', old_files())
    hub.faults = [Fault('POST .*/commit/', 'lost')]
    with pytest.raises(ConnectionError, match=r'If the response was lost, the commit exists: see .*/discussions$'):
        push(model(is_changed=True), 'user/net', create_pr=True, token='hf_write')
    assert list(hub.repos['user/net'].branches) == ['main', 'refs/pr/1']


def test_concurrent_commit_is_not_overwritten(hub: Hub, hub_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put('user/net', old_files())
    commit = timm_res2net.hub.push.commit

    def commit_late(*args: Any) -> Any:
        hub.put('user/net', {'theirs.txt': b'first'})
        return commit(*args)

    monkeypatch.setattr('timm_res2net.hub.push.commit', commit_late)
    with pytest.raises(ConnectionError, match="cannot commit to user/net: somebody else pushed to 'main' at the same"):
        push(model(is_changed=True), 'user/net', token='hf_write')
    assert hub.files('user/net') == {**old_files(), 'theirs.txt': b'first'}


def test_license_unknown_to_the_hub_is_refused_before_a_repository_is_created(hub: Hub) -> None:
    with pytest.raises(ValueError, match=r'the Hub rejects the card: .*"license.*must be one of.*--license-link'):
        push(model(), 'user/net', license='made-up', token='hf_write')
    assert hub.repos == {}


def test_token_is_in_no_file_and_no_log(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        push(model(), 'user/net', token=' hf_write\n')  # pasted with white space
    assert all(b'hf_write' not in data for data in hub.files('user/net').values())
    assert 'hf_write' not in caplog.text


def test_error_shows_no_token_and_no_terminal_codes_from_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HF_TOKEN', 'hf_write')
    hub.put('user/net', {'config.json': b'{}'})
    quoting = {'X-Error-Message': 'no Bearer hf_write here \x1b]0;evil\x07'}
    hub.faults = [Fault('GET /api/models', 'status', status=400, headers=quoting)]
    with pytest.raises(HfHubHTTPError, match=r'no Bearer \*\*\* here \\x1b\]0;evil\\x07') as error:
        pull('user/net', cache_dir=tmp_path)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ('name', 'values', 'message'),
    [
        ('repo_id', ['', 'a b/c d', 'a/b/c', '../net', 'user/', None], 'invalid repo_id .*Pass USER/NAME'),
        ('revision', ['', '../main', 'a b', '-d', 'a\nb', 5], 'invalid revision .*: pass a branch'),
        ('token', ['hf_secret\nhf_secret', 'hf_sécret', '', ' \n', "hf_s'ecret"], 'invalid Hub token: empty, or'),
        ('token', [5], 'token: it must be a str, got int'),
    ],
)
def test_invalid_name_or_token_is_refused_before_any_request_and_no_token_is_shown(
    name: str, values: list[Any], message: str, hub: Hub
) -> None:
    for value in values:
        for call in (pull, lambda **options: push(model(), **options)):
            with pytest.raises((ValueError, TypeError), match=message) as error:
                call(**{'repo_id': 'user/net', name: value})
            assert 'cret' not in repr(error.value)
    assert hub.log == []


def test_invalid_token_in_the_environment_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HF_TOKEN', 'hf_sécret')
    with pytest.raises(ValueError, match='invalid Hub token'):
        pull('user/net')
    assert hub.log == []
