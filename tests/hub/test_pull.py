"""Pulled files are verified; damaged, incomplete and foreign ones are never used; the cache works without the Hub."""

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import Fault, Hub
from huggingface_hub import close_session, constants, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from support import TINY, randomize, tiny
from test_faults import old_files

from timm_res2net import CheckpointError, pull, push
from timm_res2net.vision.predict import pretrained_model


@pytest.fixture
def net(hub: Hub) -> Hub:
    """The Hub with the tiny network in user/net."""
    hub.put('user/net', old_files())
    return hub


def assert_tiny(model: Any) -> None:
    torch.testing.assert_close(model.state_dict(), tiny().state_dict(), rtol=0, atol=0)


def test_refusal_raises_the_error_of_huggingface_hub_and_leaves_no_weights(hub: Hub, tmp_path: Path) -> None:
    hub.put('user/net', old_files(), gated=True)
    for error, repo_id, options in (
        (RevisionNotFoundError, 'user/net', dict(revision='v9')),
        (RepositoryNotFoundError, 'user/absent', {}),
        (HfHubHTTPError, 'user/net', dict(token='hf_bad')),
        (GatedRepoError, 'user/net', dict(token='hf_other')),
    ):
        with pytest.raises(error, match=f'^cannot download config.json and model.safetensors of {repo_id}: '):
            pull(repo_id, cache_dir=tmp_path, **options)
    assert not list(tmp_path.rglob('model.safetensors'))
    assert_tiny(pull('user/net', token='hf_read', cache_dir=tmp_path))


def test_repository_without_safetensors_is_refused_and_its_pickle_is_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.put('user/net', {'config.json': b'{}', 'pytorch_model.bin': b'pickle'})
    with pytest.raises(CheckpointError, match=r'user/net: it has no model\.safetensors\. .*`timm-res2net convert`'):
        pull('user/net', cache_dir=tmp_path)
    assert not any('pytorch_model.bin' in line for line in hub.log)


def test_damaged_file_in_the_cache_is_refused_offline_and_downloaded_again_online(
    net: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull('user/net', cache_dir=tmp_path)
    (cached,) = tmp_path.rglob('snapshots/*/model.safetensors')
    cached.write_bytes(cached.read_bytes()[:-4] + b'\0\0\0\0')
    with monkeypatch.context() as offline:
        offline.setattr(constants, 'HF_HUB_OFFLINE', True)
        with pytest.raises(CheckpointError, match=r'model\.safetensors of user/net'):
            pull('user/net', cache_dir=tmp_path)
    assert_tiny(pull('user/net', cache_dir=tmp_path))
    cached.write_bytes(b'damaged')
    net.faults = [Fault('GET /_cdn', 'drop', times=100)]
    with pytest.raises(ConnectionError, match=r'^cannot download'):
        pull('user/net', cache_dir=tmp_path)
    net.faults = []
    assert_tiny(pull('user/net', cache_dir=tmp_path))


def test_offline_pull_uses_the_cache_or_names_the_missing_model(
    net: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull('user/net', cache_dir=tmp_path)
    net.log.clear()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert_tiny(pull('user/net', cache_dir=tmp_path))
    with pytest.raises(ConnectionError, match=r'^cannot download .* of user/other: .*HF_HUB_OFFLINE'):
        pull('user/other', cache_dir=tmp_path)
    with pytest.raises(ConnectionError, match='HF_HUB_OFFLINE'):
        push(tiny(), 'user/net', token='hf_write')
    assert net.log == []


def test_pull_without_a_network_fails_in_one_line_after_pauses_of_three_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(host: str, *args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, 'Name or service not known')

    pauses: list[float] = []
    close_session()  # it may hold an open connection
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(socket, 'getaddrinfo', resolve)
    monkeypatch.setattr(time, 'sleep', pauses.append)
    with pytest.raises(ConnectionError, match=r'^cannot download .* of user/net: .*Name or service not known') as error:
        pull('user/net', cache_dir=tmp_path)
    assert pauses == [1, 2]
    assert '\n' not in str(error.value)


def test_pull_into_a_cache_that_cannot_be_written_is_an_os_error(net: Hub, tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match=r'cannot download .* of user/net: Not a directory'):
        pull('user/net', cache_dir=tmp_path / 'file' / 'cache')


def hub_options(repo_id: str, cache: Path, **overlay: Any) -> dict[str, Any]:
    """Returns arguments of `timm.create_model` that load the weights of a repository."""
    overlay = dict(hf_hub_id=repo_id, file=None, num_classes=4, **overlay)
    return dict(pretrained=True, num_classes=4, pretrained_cfg_overlay=overlay, cache_dir=str(cache), **TINY)


def test_create_model_without_the_hub_uses_the_cache_or_fails_in_one_line(
    net: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    net.faults = down = [Fault('.*', 'drop', times=1000)]
    with pytest.raises(ConnectionError, match=r'^cannot download model\.safetensors of user/net: '):
        timm.create_model('test_res2net', **hub_options('user/net', tmp_path))
    net.faults = []
    hf_hub_download('user/net', 'model.safetensors', cache_dir=tmp_path)  # as another program would
    net.faults = down
    assert_tiny(timm.create_model('test_res2net', **hub_options('user/net', tmp_path)))
    assert 'Using the copy in the cache' in caplog.text
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert_tiny(timm.create_model('test_res2net', **hub_options('user/net', tmp_path)))


def test_create_model_uses_the_latest_weights_or_those_of_a_revision(hub: Hub, tmp_path: Path) -> None:
    first = hub.put('user/net', old_files())
    timm.create_model('test_res2net', **hub_options('user/net', tmp_path))
    changed = randomize(tiny())
    push(changed, 'user/net', token='hf_write')
    model = timm.create_model('test_res2net', **hub_options('user/net', tmp_path))
    torch.testing.assert_close(model.state_dict(), changed.state_dict(), rtol=0, atol=0)
    assert_tiny(timm.create_model('test_res2net', **hub_options(f'user/net@{first}', tmp_path / 'new')))


@pytest.mark.parametrize('name', ['test_res2net', 'hf-hub:user/net'])
def test_create_model_refuses_damaged_downloads_and_the_next_call_succeeds(name: str, net: Hub, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(pretrained=True, cache_dir=str(tmp_path))
    options |= hub_options('user/net', tmp_path) if name == 'test_res2net' else {}
    net.faults = [Fault('GET /_cdn', 'corrupt', times=100)]
    with pytest.raises(CheckpointError, match=r'model\.safetensors of user/net: checksum differs'):
        timm.create_model(name, **options)
    assert not list(tmp_path.rglob('model.safetensors'))
    net.faults = []
    assert_tiny(timm.create_model(name, **options))


def test_pretrained_model_of_another_family_is_left_to_timm(hub: Hub, tmp_path: Path) -> None:
    model = timm.create_model('test_resnet', num_classes=3)
    torch.save(model.state_dict(), tmp_path / 'weights')
    config = dict(architecture='test_resnet', num_classes=3, pretrained_cfg={'num_classes': 3})
    weights = (tmp_path / 'weights').read_bytes()
    hub.put('user/net', {'config.json': json.dumps(config).encode(), 'pytorch_model.bin': weights})
    torch.testing.assert_close(pretrained_model('hf-hub:user/net').state_dict(), model.state_dict())
