"""Pushed models are pulled byte for byte in spite of faults; incomplete files are never used."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from hub_server import Fault, Hub, free_port
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open
from support import randomise, tiny
from torch import nn

import timm_res2net
from timm_res2net import CheckpointError, load_checkpoint, load_model, pull, push
from timm_res2net.deploy.images import bundled_digits
from timm_res2net.hub.push import Commit
from timm_res2net.vision.predict import predict
from timm_res2net.weights.config import load_folder
from timm_res2net.weights.files import sha256

FILES = ('model.safetensors', 'config.json', 'README.md')
WRITE: dict[str, Any] = dict(token='hf_write')


def digests(hub: Hub, repo_id: str = 'user/net', revision: str = 'main') -> dict[str, str]:
    files = hub.files(repo_id, revision)
    return {name: hashlib.sha256(files[name]).hexdigest() for name in FILES if name in files}


def sha256_of_weights(hub: Hub) -> str:
    return digests(hub)['model.safetensors']


def digits() -> nn.Module:
    return timm.create_model('test_res2net.digits', pretrained=True).eval()


def fine_tuned() -> nn.Module:
    """The embedded model with three classes of its own, one image channel, and half the bits."""
    torch.manual_seed(0)
    model = randomise(timm.create_model('test_res2net.digits', pretrained=True, num_classes=3, in_chans=1))
    return model.to(torch.bfloat16).to(memory_format=torch.channels_last).eval()


# Push and pull


@pytest.mark.parametrize('hub', ['lfs', 'xet'], indirect=True)
@pytest.mark.parametrize('make', [digits, fine_tuned])
def test_push_and_pull_return_identical_weights_and_outputs(make: Any, hub: Hub, tmp_path: Path) -> None:
    model = make()
    labels = ['round', 'straight', 'both'] if make is fine_tuned else None
    pushed = push(model, 'user/net', tag='mine', labels=labels, **WRITE)
    if not hub.xet:  # the store of hf_xet can be read by it only
        assert digests(hub) == pushed.hashes
    back = pull('user/net', cache_dir=tmp_path)
    dtype = next(model.parameters()).dtype
    torch.testing.assert_close(back.to(dtype).state_dict(), model.state_dict(), rtol=0, atol=0)
    x = torch.randn(2, model.in_chans, 32, 32).to(dtype)
    torch.testing.assert_close(back(x), model(x), rtol=0, atol=0)
    cfg = back.pretrained_cfg
    assert cfg['hf_hub_id'] == f'user/net@{pushed.revision}'
    assert list(cfg['label_names']) == (labels or list('0123456789'))
    assert cfg['tag'] == 'mine'


def test_pull_embedded_model_classifies_every_bundled_digit(hub: Hub, tmp_path: Path) -> None:
    from timm.data import create_transform, resolve_model_data_config

    push(digits(), 'user/net', **WRITE)
    model = pull('user/net', cache_dir=tmp_path)
    transform = create_transform(**resolve_model_data_config(model))
    images, truths = zip(*bundled_digits())
    with torch.inference_mode():
        found = model(torch.stack([transform(image) for image in images])).argmax(dim=1)
    assert [str(index) for index in found.tolist()] == list(truths)
    likeliest = [each[0].label for each in predict(model, images, read=lambda image: image) if isinstance(each, list)]
    assert likeliest == list(truths)


@pytest.mark.parametrize('prefix', ['hf-hub:user/net', 'local-dir:'])
def test_push_writes_repository_and_folder_that_timm_loads(prefix: str, hub: Hub, tmp_path: Path) -> None:
    arguments = dict(base_width=13, scale=3, first_block='paddle', attn_layer='se', act_layer='silu', global_pool='max')
    torch.manual_seed(0)
    model = randomise(timm.create_model('test_res2net', num_classes=4, output_stride=8, **arguments)).eval()
    pushed = push(model, 'user/net', **WRITE)
    assert pushed.url is not None
    if prefix == 'local-dir:':
        prefix += str(push(model, 'user/net', dry_run=tmp_path / 'folder').folder)
    loaded = timm.create_model(prefix, pretrained=True, cache_dir=str(tmp_path / 'cache')).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    adapted = timm.create_model(prefix, pretrained=True, num_classes=2, in_chans=1, cache_dir=str(tmp_path / 'cache'))
    assert adapted(x[:, :1]).shape == (1, 2)


@pytest.mark.parametrize('prefix', ['hf-hub:user/net', 'local-dir:'])
def test_create_model_maps_no_weights(prefix: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError('a process ends that reads a mapped file which became shorter')

    if prefix == 'local-dir:':
        prefix += str(push(tiny(), 'user/net', dry_run=tmp_path / 'folder').folder)
    else:
        push(tiny(), 'user/net', **WRITE)
    monkeypatch.setattr('safetensors.torch.load_file', refuse)
    loaded = timm.create_model(prefix, pretrained=True, cache_dir=str(tmp_path / 'cache'))
    torch.testing.assert_close(loaded.state_dict(), tiny().state_dict(), rtol=0, atol=0)


def test_push_writes_repository_that_transformers_load(hub: Hub, tmp_path: Path) -> None:
    transformers = pytest.importorskip('transformers')
    push(fine_tuned().float(), 'user/net', labels=['a', 'b', 'c'], **WRITE)
    loaded = transformers.AutoModelForImageClassification.from_pretrained('user/net', cache_dir=tmp_path).eval()
    x = torch.randn(2, 1, 32, 32)
    model = pull('user/net', cache_dir=tmp_path)
    torch.testing.assert_close(loaded.timm_model.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(loaded(x).logits, model(x))  # with another memory format
    assert loaded.config.id2label == {0: 'a', 1: 'b', 2: 'c'}


def test_push_uploads_weights_config_and_card_with_given_metadata(hub: Hub, tmp_path: Path) -> None:
    push(fine_tuned(), 'user/net', license='mit', results={'accuracy': 91.5}, dataset='somebody/shapes', **WRITE)
    files = hub.files('user/net')
    assert sorted(files) == ['.gitattributes', *sorted(FILES)]
    config = json.loads(files['config.json'])
    assert config['model_args'] == {'in_chans': 1}
    assert (config['num_classes'], config['pretrained_cfg']['input_size']) == (3, [1, 32, 32])
    assert config['pretrained_cfg']['license'] == 'mit'
    assert 'description' not in config['pretrained_cfg']
    record = config['timm_res2net']
    assert record['sha256'] == hashlib.sha256(files['model.safetensors']).hexdigest()
    assert (record['version'], record['dataset']) == (timm_res2net.__version__, 'somebody/shapes')
    (tmp_path / 'weights').write_bytes(files['model.safetensors'])
    with safe_open(tmp_path / 'weights', 'pt') as weights:
        assert weights.metadata() == {'format': 'pt', 'first_block': 'official'}
    load_checkpoint(fine_tuned(), tmp_path / 'weights')


def test_push_dry_run_writes_folder_and_sends_no_request(hub: Hub, tmp_path: Path) -> None:
    done = push(digits(), 'user/net', dry_run=tmp_path / 'folder')
    assert hub.log == []
    with pytest.raises(ValueError, match='folder has a model'):
        push(tiny(), 'user/net', dry_run=tmp_path / 'folder')
    assert done.folder == tmp_path / 'folder'
    assert done.hashes == {name: sha256(tmp_path / 'folder' / name) for name in FILES}


def test_push_dry_run_keeps_the_card_in_the_folder_as_a_push_does(tmp_path: Path) -> None:
    (tmp_path / 'README.md').write_bytes('Meine Wörter.'.encode('latin-1'))
    push(tiny(), 'user/net', license='mit', dry_run=tmp_path)
    card = (tmp_path / 'README.md').read_text(encoding='utf-8')
    assert card.endswith('Meine Wörter.')
    assert 'license: mit' in card
    (tmp_path / 'model.safetensors').unlink()
    push(tiny(), 'user/net', license='mit', dry_run=tmp_path, overwrite_card=True)
    assert 'Wörter' not in (tmp_path / 'README.md').read_text(encoding='utf-8')


def test_push_unchanged_model_makes_no_second_commit(hub: Hub) -> None:
    first = push(digits(), 'user/net', **WRITE)
    commits = len(hub.repos['user/net'].commits)
    assert push(digits(), 'user/net', **WRITE).revision == first.revision
    assert len(hub.repos['user/net'].commits) == commits


def test_push_revision_creates_branch(hub: Hub, tmp_path: Path) -> None:
    first = push(digits(), 'user/net', **WRITE)
    second = push(tiny(), 'user/net', revision='v2', **WRITE)
    assert hub.repos['user/net'].branches == {'main': first.revision, 'v2': second.revision}
    assert pull('user/net', revision='v2', cache_dir=tmp_path).num_classes == 4
    assert pull('user/net', revision=first.revision, cache_dir=tmp_path).num_classes == 10


def test_push_create_pr_leaves_main_unchanged(hub: Hub) -> None:
    first = push(digits(), 'user/net', **WRITE)
    proposed = push(tiny(), 'user/net', create_pr=True, **WRITE)
    assert hub.repos['user/net'].branches['main'] == first.revision
    assert proposed.url == f'{os.environ["HF_ENDPOINT"]}/user/net/discussions/1'
    assert digests(hub, revision='refs/pr/1') == proposed.hashes


def test_push_private_repository_is_hidden_without_token(hub: Hub, tmp_path: Path) -> None:
    push(digits(), 'user/net', private=True, **WRITE)
    with pytest.raises(RepositoryNotFoundError):
        pull('user/net', cache_dir=tmp_path)
    assert pull('user/net', token='hf_read', cache_dir=tmp_path).num_classes == 10


def test_pull_then_push_keeps_what_is_known_of_weights_until_they_change(hub: Hub, tmp_path: Path) -> None:
    told: dict[str, Any] = dict(results={'accuracy': 91.5}, dataset='somebody/shapes', license='MIT', recipe='By hand')
    push(tiny(), 'user/net', tag='mine', base_model='timm/res2net50d.in1k', labels=list('abcd'), **told, **WRITE)
    model = pull('user/net', cache_dir=tmp_path)
    push(model, 'user/copy', recipe='Otherwise', **WRITE)
    config, copy = (json.loads(hub.files(name)['config.json']) for name in ('user/net', 'user/copy'))
    assert config['pretrained_cfg'] == copy['pretrained_cfg']
    assert config['pretrained_cfg']['license'] == 'mit'
    assert copy['timm_res2net'] == {**config['timm_res2net'], 'recipe': 'Otherwise'}
    assert copy['label_names'] == list('abcd')
    assert '| accuracy | 91.50 % |' in hub.files('user/copy')['README.md'].decode()
    with torch.no_grad():
        model.fc.bias.add_(1)
    push(model, 'user/changed', **WRITE)
    assert json.loads(hub.files('user/changed')['config.json'])['timm_res2net'].keys() == {'version', 'sha256'}
    assert '91.50' not in hub.files('user/changed')['README.md'].decode()


def test_push_of_a_file_beside_its_config_keeps_what_is_known_of_weights_until_they_change(tmp_path: Path) -> None:
    told: dict[str, Any] = dict(
        tag='mine', results={'accuracy': 91.5}, license=('Ours', 'https://a.org'), recipe='Hand'
    )
    push(tiny(), 'user/net', labels=list('abcd'), dry_run=tmp_path / 'net', **told)
    file = tmp_path / 'net' / 'model.safetensors'
    push(load_model(file), 'user/copy', dry_run=tmp_path / 'copy')
    config, copy = (json.loads((tmp_path / name / 'config.json').read_text()) for name in ('net', 'copy'))
    assert copy['timm_res2net'] == config['timm_res2net']
    assert copy['pretrained_cfg']['tag'] == 'mine'
    assert '| accuracy | 91.50 % |' in (tmp_path / 'copy' / 'README.md').read_text()
    changed = load_model(file)
    with torch.no_grad():
        changed.fc.bias.add_(1)
    push(changed, 'user/changed', dry_run=tmp_path / 'changed')
    shutil.copy(tmp_path / 'changed' / 'model.safetensors', file)
    for name, model in (('changed', changed), ('others', load_model(file))):
        push(model, f'user/{name}', dry_run=tmp_path / f'{name} again')
        config = json.loads((tmp_path / f'{name} again' / 'config.json').read_text())
        assert config['timm_res2net'].keys() == {'version', 'sha256'}
        assert config['pretrained_cfg'].get('tag') != 'mine'


def test_push_leaves_out_records_that_can_not_be_on_a_card(hub: Hub, tmp_path: Path) -> None:
    folder = push(tiny(), 'user/net', dry_run=tmp_path / 'folder').folder
    assert folder is not None
    config = json.loads((folder / 'config.json').read_text())
    config['timm_res2net'].update(license=['x', 'javascript:alert(1)'], results=[3], base_model={'a': 1})
    (folder / 'config.json').write_text(json.dumps(config))
    push(load_folder(folder), 'user/net', **WRITE)
    assert 'javascript' not in str(hub.files('user/net'))


# Cards


def test_push_keeps_text_of_edited_card(hub: Hub) -> None:
    written = '---\nlanguage: en\nlicense: mit\n---\n# My net\n\nFor my students.\n'
    hub.put('user/net', {'README.md': written.encode()})
    push(digits(), 'user/net', license='apache-2.0', **WRITE)
    card = hub.files('user/net')['README.md'].decode()
    assert card.endswith('---\n# My net\n\nFor my students.\n')
    assert 'language: en' in card
    assert 'license: apache-2.0' in card
    assert 'library_name: timm' in card
    push(digits(), 'user/net', overwrite_card=True, **WRITE)
    assert 'For my students' not in hub.files('user/net')['README.md'].decode()


def test_push_replaces_card_of_earlier_push(hub: Hub) -> None:
    push(digits(), 'user/net', results={'accuracy': 98.0}, **WRITE)
    push(digits(), 'user/net', results={'accuracy': 99.5}, **WRITE)
    card = hub.files('user/net')['README.md'].decode()
    assert '99.50 %' in card
    assert '98.00 %' not in card


@pytest.mark.parametrize(
    ('written', 'kept'),
    [
        ('# Bäume\n'.encode('latin-1'), '# Bäume\n'),
        ('# Bäume\r\nund Äste\r\n'.encode('utf-16'), '# Bäume\nund Äste\n'),
        ('\ufeff---\nlanguage: de\n---\n# Bäume\n'.encode(), '# Bäume\n'),
        ('---\ntags:\n\t- trees\n---\n# Bäume\n'.encode('cp1252'), '```yaml\ntags:\n\t- trees\n```\n# Bäume\n'),
        (b'---\n- a list\n---\n# Trees\n', '```yaml\n- a list\n```\n# Trees\n'),
        (b'---\na: [\n---\n````\n# Trees\n', '`````yaml\na: [\n`````\n````\n# Trees\n'),
        (b'---\nmodel-index: trees\n---\n# Trees\n', '# Trees\n'),
        (b'# Trees \x81\n', '# Trees \x81\n'),
    ],
    ids=['latin-1', 'utf-16', 'mark', 'tabs', 'list', 'broken', 'results', 'undefined'],
)
def test_push_keeps_words_of_a_card_in_any_encoding_and_form(written: bytes, kept: str, hub: Hub) -> None:
    hub.put('user/net', {'README.md': written})
    for _ in range(2):  # the second changes nothing
        push(tiny(), 'user/net', **WRITE)
        card = hub.files('user/net')['README.md'].decode()
        assert card.startswith('---\n')
        assert card.endswith(kept)
        assert 'library_name: timm' in card
        assert len(hub.repos['user/net'].commits) == 2
    if b'language' in written:
        assert 'language: de' in card
    if b'model-index' in written:
        assert 'model-index: trees' in card


def test_push_keeps_own_tags_of_a_card(hub: Hub) -> None:
    hub.put('user/net', {'README.md': b'---\ntags:\n- trees\n- timm\n---\nMy words.\n'})
    push(tiny(), 'user/net', **WRITE)
    meta = yaml.safe_load(hub.files('user/net')['README.md'].decode().split('---')[1])
    assert meta['tags'] == ['trees', 'timm', 'image-classification', 'res2net']


@pytest.mark.parametrize('status', [400, 403, 404, 418])
def test_push_with_unreadable_card_stops_and_keeps_it(status: int, hub: Hub) -> None:
    hub.put('user/net', {'README.md': b'My words.'})
    hub.faults = [Fault('HEAD .*README.md', 'status', status=status, times=100)]
    with pytest.raises((ConnectionError, HfHubHTTPError)):
        push(digits(), 'user/net', **WRITE)
    assert hub.files('user/net')['README.md'] == b'My words.'
    assert 'model.safetensors' not in hub.files('user/net')


# Faults while pushing


def test_push_lost_response_makes_no_error_and_no_second_commit(hub: Hub) -> None:
    hub.faults = [Fault('POST .*/commit/', 'lost')]
    pushed = push(digits(), 'user/net', **WRITE)
    assert digests(hub) == pushed.hashes
    assert len(hub.repos['user/net'].commits) == 2
    assert pushed.revision == hub.repos['user/net'].branches['main']


def test_push_create_pr_lost_response_makes_no_second_pull_request(hub: Hub) -> None:
    push(digits(), 'user/net', **WRITE)
    hub.faults = [Fault('POST .*/commit/', 'lost')]
    proposed = push(tiny(), 'user/net', create_pr=True, **WRITE)
    assert list(hub.repos['user/net'].pulls.items()) == [('refs/pr/1', proposed.revision)]
    assert proposed.url == f'{os.environ["HF_ENDPOINT"]}/user/net/discussions/1'


def test_push_compiled_model_has_hashes_of_plain_model(hub: Hub) -> None:
    plain = push(digits(), 'user/net', **WRITE)
    assert push(torch.compile(digits()), 'user/net', **WRITE).hashes == plain.hashes


def test_push_corrupt_upload_raises_connection_error_and_commits_nothing(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('hub_server.PART', 10_000_000)
    hub.faults = [Fault('PUT /_large', 'corrupt', times=100)]
    with pytest.raises(ConnectionError, match='did not take the commit'):
        push(digits(), 'user/net', **WRITE)
    assert list(hub.files('user/net')) == ['.gitattributes']
    assert hub.large == {}


def test_push_commit_of_other_bytes_raises_connection_error(hub: Hub) -> None:
    hub.faults = [Fault('POST .*/commit/', 'corrupt')]
    with pytest.raises(ConnectionError, match='are not those that were sent'):
        push(digits(), 'user/net', **WRITE)


def test_push_concurrent_commit_raises_and_is_not_overwritten(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    push(digits(), 'user/net', **WRITE)
    attempt = Commit.attempt

    def late(commit: Commit) -> Any:
        hub.put('user/net', {'theirs.txt': b'first'})
        return attempt(commit)

    monkeypatch.setattr(Commit, 'attempt', late)
    with pytest.raises(ConnectionError, match='somebody else pushed to user/net at the same time'):
        push(tiny(), 'user/net', **WRITE)
    assert hub.files('user/net')['theirs.txt'] == b'first'
    assert b'"num_classes": 10' in hub.files('user/net')['config.json']


def test_push_four_at_once_commits_one_and_refuses_three(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    push(digits(), 'user/net', **WRITE)
    together = threading.Barrier(4, timeout=60)
    attempt = Commit.attempt

    def at_once(commit: Commit) -> Any:
        together.wait()
        return attempt(commit)

    monkeypatch.setattr(Commit, 'attempt', at_once)
    outcomes: list[Any] = []

    def run(num_classes: int) -> None:
        try:
            outcomes.append(push(tiny(num_classes=num_classes), 'user/net', **WRITE))
        except ConnectionError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run, args=(number + 2,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    landed = [outcome for outcome in outcomes if not isinstance(outcome, ConnectionError)]
    assert len(outcomes) == 4
    assert len(landed) == 1
    assert digests(hub) == landed[0].hashes
    assert len(hub.repos['user/net'].commits) == 3


@pytest.mark.parametrize(
    ('token', 'message'),
    [('hf_read', 'write permission'), ('hf_other', 'rights'), ('hf_bad', 'Invalid credentials'), (None, 'token|401')],
)
def test_push_without_permission_raises_and_hides_token(
    token: str | None, message: str, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    push(digits(), 'user/net', **WRITE)
    before = digests(hub)
    with caplog.at_level(logging.DEBUG), pytest.raises(HfHubHTTPError, match=message) as error:
        push(tiny(), 'user/net', token=token if token else False)
    assert digests(hub) == before
    assert token is None or token not in f'{error.value} {caplog.text}'


def test_push_token_is_in_no_file_and_no_log(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        push(digits(), 'user/net', **WRITE)
    assert all(b'hf_write' not in data for data in hub.files('user/net').values())
    assert 'hf_write' not in caplog.text


def test_push_full_disk_raises_and_leaves_no_file_or_repository(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('timm_res2net.weights.folder.save_file', full)
    with pytest.raises(OSError, match=r'can not be written: .*No space left'):
        push(digits(), 'user/net', dry_run=tmp_path / 'folder')
    with pytest.raises(OSError, match=r'can not be written: .*No space left'):
        push(digits(), 'user/net', **WRITE)
    assert list(tmp_path.iterdir()) == []
    assert hub.repos == {}


@pytest.mark.parametrize(
    'change',
    [
        lambda model: setattr(model, 'maxpool', nn.AvgPool2d(3, 2, 1)),
        lambda model: setattr(model, 'fc', nn.Linear(256, 7)),
        lambda model: setattr(model, 'more', nn.Linear(2, 2)),
    ],
    ids=['function', 'shape', 'names'],
)
def test_push_model_changed_after_create_model_raises_and_sends_no_request(change: Any, hub: Hub) -> None:
    model = digits()
    change(model)
    with pytest.raises(ValueError, match='was changed after create_model made it'):
        push(model, 'user/net', **WRITE)
    assert hub.log == []


@pytest.mark.parametrize(
    ('make', 'arguments', 'message'),
    [
        (lambda: timm.create_model('test_resnet'), {}, 'can not be pushed: give a model of this package'),
        (lambda: timm.create_model('test_res2net', features_only=True), {}, 'is no classification model'),
        (digits, dict(labels=['a']), 'labels has 1 names for 10 classes'),
        (lambda: timm.create_model('test_res2net', norm_layer=nn.BatchNorm2d), {}, 'no configuration can hold'),
        (lambda: tiny().to('meta'), {}, r'of the tensors are on the meta device, without values \(first: conv1\.0'),
    ],
)
def test_push_wrong_arguments_raise_before_any_request(make: Any, arguments: Any, message: str, hub: Hub) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        push(make(), 'user/net', **arguments, **WRITE)
    assert hub.log == []


def test_push_nan_weights_are_called_that_and_refused_dry_run_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.fc.weight[1, 2] = float('nan')
    for options in ({}, dict(dry_run=tmp_path / 'new' / 'folder')):
        with pytest.raises(ValueError, match=r'1 of the tensors have NaN or infinity in them \(first: fc\.weight\)'):
            push(model, 'user/net', **options)
    changed = tiny()
    changed.maxpool = nn.AvgPool2d(3, 2, 1)
    with pytest.raises(ValueError, match='was changed after create_model made it'):
        push(changed, 'user/net', dry_run=tmp_path / 'new' / 'folder')
    assert list(tmp_path.iterdir()) == []
    assert hub.log == []


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(results={'accuracy': float('nan')}), 'results says accuracy nan; give percent'),
        (dict(results={'accuracy': 9950}), 'results says accuracy 9950; give percent'),
        (dict(results={'accuracy': '99'}), "results says accuracy '99'; give percent"),
        (dict(results={' ': 99}), "results has a metric ' '"),
        (dict(tag='a b'), "tag is 'a b'; give letters"),
        (dict(dataset=' '), "dataset is ' '; give a text"),
        (dict(base_model='x](javascript:alert(1))'), 'base_model is .*; give the name of a repository'),
        (dict(license=''), "license is ''; give one that the Hub knows"),
        (dict(license='Our Own'), "license is 'Our Own'; give one that the Hub knows"),
        (dict(license=('Our Own', 'javascript:alert(1)')), 'give a name, and an address with https://'),
        (dict(labels=['a', 'b', 'c', '']), 'labels has an entry that is no text'),
    ],
    ids=lambda value: str(value)[:40],
)
def test_push_and_dry_run_refuse_the_same_arguments_before_any_request(
    arguments: Any, message: str, hub: Hub, tmp_path: Path
) -> None:
    for options in ({}, dict(dry_run=tmp_path / 'folder')):
        with pytest.raises(ValueError, match=message):
            push(tiny(), 'user/net', **arguments, **options)
    assert list(tmp_path.iterdir()) == []
    assert hub.log == []


def test_push_license_unknown_to_hub_raises_and_creates_no_repository(hub: Hub) -> None:
    with pytest.raises(ValueError, match=r'"license.*must be one of.*--license-link'):
        push(digits(), 'user/net', license='made-up', **WRITE)
    assert hub.repos == {}
    assert push(digits(), 'user/net', license='gemma', **WRITE).url


# Faults while pulling


def test_pull_download_that_is_always_corrupt_raises_and_is_deleted(hub: Hub, tmp_path: Path) -> None:
    push(digits(), 'user/net', **WRITE)
    hub.faults = [Fault('GET /_cdn', 'corrupt', times=3)]
    with pytest.raises(CheckpointError, match=r'model\.safetensors of user/net has another checksum'):
        pull('user/net', cache_dir=tmp_path)
    assert not [path for path in tmp_path.rglob('*') if path.name in ('model.safetensors', sha256_of_weights(hub))]
    assert pull('user/net', cache_dir=tmp_path).num_classes == 10


def test_pull_corrupt_cache_is_downloaded_again(hub: Hub, tmp_path: Path) -> None:
    pushed = push(digits(), 'user/net', **WRITE)
    pull('user/net', cache_dir=tmp_path)
    (blob,) = tmp_path.rglob(f'blobs/{pushed.hashes["model.safetensors"]}')
    blob.write_bytes(blob.read_bytes()[:-1] + b'?')
    torch.testing.assert_close(pull('user/net', cache_dir=tmp_path).state_dict(), digits().state_dict())
    assert sha256(blob) == blob.name


def test_pull_weights_of_another_config_are_refused(hub: Hub, tmp_path: Path) -> None:
    push(digits(), 'user/net', **WRITE)
    push(randomise(digits()), 'user/other', **WRITE)
    hub.put('user/net', {'model.safetensors': hub.files('user/other')['model.safetensors']})
    with pytest.raises(CheckpointError, match=r'is not the file that its config\.json was written with'):
        pull('user/net', cache_dir=tmp_path)


def test_pull_repository_without_safetensors_raises_and_downloads_no_pickle(hub: Hub, tmp_path: Path) -> None:
    hub.put('user/net', {'config.json': b'{}', 'pytorch_model.bin': b'pickle'})
    with pytest.raises(CheckpointError, match=r'download pytorch_model\.bin and `timm-res2net convert` it'):
        pull('user/net', cache_dir=tmp_path)
    assert not any('pytorch_model.bin' in line for line in hub.log)
    hub.put('user/empty', {'config.json': b'{}'})
    with pytest.raises(CheckpointError, match=r'^user/empty has no model\.safetensors$'):
        pull('user/empty', cache_dir=tmp_path)


def test_pull_refused_by_hub_raises_errors_of_huggingface_hub(hub: Hub, tmp_path: Path) -> None:
    push(digits(), 'user/net', **WRITE)
    with pytest.raises(RevisionNotFoundError):
        pull('user/net', revision='v9', cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        pull('user/absent', cache_dir=tmp_path)
    with pytest.raises(HfHubHTTPError, match='Invalid credentials'):
        pull('user/net', token='hf_bad', cache_dir=tmp_path)
    hub.repos['user/net'].gated = True
    with pytest.raises(GatedRepoError):
        pull('user/net', token='hf_other', cache_dir=tmp_path)
    assert not [path for path in tmp_path.rglob('*') if path.name == 'model.safetensors']


def test_pull_offline_uses_cache_and_raises_for_uncached_model(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(digits(), 'user/net', **WRITE)
    pull('user/net', cache_dir=tmp_path)
    hub.log.clear()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert pull('user/net', cache_dir=tmp_path).num_classes == 10
    assert hub.log == []
    with pytest.raises(ConnectionError, match=r'^config\.json of user/other is not in the cache, and HF_HUB_OFFLINE'):
        pull('user/other', cache_dir=tmp_path)


def test_pull_unreachable_hub_raises_connection_error(hub: Hub, tmp_path: Path) -> None:
    push(digits(), 'user/net', **WRITE)
    hub.faults = [Fault('GET /_cdn', 'reset', times=100)]
    with pytest.raises(ConnectionError, match='the Hub can not be reached'):
        pull('user/net', cache_dir=tmp_path)
    assert not [path for path in tmp_path.rglob('*') if path.name == 'model.safetensors']


def test_pull_killed_process_leaves_no_partial_weights_and_next_pull_succeeds(hub: Hub, tmp_path: Path) -> None:
    pushed = push(digits(), 'user/net', **WRITE)
    code = f"""if True:
        from huggingface_hub import constants
        constants.HF_HUB_DISABLE_XET = True
        import timm_res2net
        timm_res2net.pull('user/net', cache_dir={str(tmp_path)!r})
    """
    hub.slow = True
    try:
        process = subprocess.Popen([sys.executable, '-c', code], env={**os.environ, 'HF_HUB_OFFLINE': '0'})
        deadline = time.monotonic() + 60
        while not any('GET /_cdn' in line for line in hub.log) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        process.wait()
    finally:
        hub.slow = False
    assert not [path for path in tmp_path.rglob('blobs/*') if path.name == pushed.hashes['model.safetensors']]
    torch.testing.assert_close(pull('user/net', cache_dir=tmp_path).state_dict(), digits().state_dict())


# Through a proxy


@pytest.fixture
def olah(tmp_path: Path) -> Iterator[str]:
    """The URL of olah, a third-party proxy of the Hub, in front of our Hub."""
    pytest.importorskip('olah')
    port, upstream = free_port(), os.environ['HF_ENDPOINT'].removeprefix('http://')
    options = dict(host='127.0.0.1', port=port, hf_scheme='http', hf_netloc=upstream)
    options |= dict(hf_lfs_netloc=upstream.replace('127.0.0.1', 'localhost'), mirror_netloc=f'127.0.0.1:{port}')
    options |= dict(mirror_lfs_netloc=f'127.0.0.1:{port}', repos_path=tmp_path / 'repos', log_path=tmp_path / 'log')
    arguments = [part for key, value in options.items() for part in (f'--{key.replace("_", "-")}', str(value))]
    program = Path(sys.executable).with_name('olah-cli')
    process = subprocess.Popen(
        [str(program), *arguments, '--mirror-scheme', 'http', '--metadata-cache-ttl', '0'],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield f'http://127.0.0.1:{port}'
    process.kill()
    process.wait()


@pytest.mark.slow
def test_download_model_through_olah_proxy_is_byte_exact(olah: str, hub: Hub, tmp_path: Path) -> None:
    pushed = push(digits(), 'user/net', **WRITE)
    code = f"""if True:
        from huggingface_hub import constants
        constants.HF_HUB_DISABLE_XET = True
        import timm_res2net.hub.pull, time
        for attempt in range(60):
            try:
                found = timm_res2net.hub.pull.download_model('user/net', cache_dir={str(tmp_path / 'cache')!r})
                break
            except Exception as error:
                if attempt == 59:
                    raise
                time.sleep(0.5)
        from timm_res2net.weights.files import sha256
        print(sha256(found.folder / 'model.safetensors'), sha256(found.folder / 'config.json'))
    """
    environment = {**os.environ, 'HF_HUB_OFFLINE': '0', 'HF_ENDPOINT': olah}
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [pushed.hashes['model.safetensors'], pushed.hashes['config.json']]
