"""Downloads are complete and verified, or leave nothing behind."""

import hashlib
import os
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import Fault, Hub
from safetensors.torch import save, save_file
from support import TINY, randomize, tiny
from torch import nn

from timm_res2net import CheckpointError, export_checkpoint
from timm_res2net.models.variants import WEIGHTS
from timm_res2net.weights.download import download

FILES = f'{os.environ["HF_ENDPOINT"]}/user/net/resolve/main'
URL = f'{FILES}/file.data'
CONTENT = bytes(range(256)) * 4000  # 1 MB


@pytest.fixture
def server(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A server of files, with `CONTENT` at `URL`."""
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)  # of huggingface_hub between attempts
    hub.put('user/net', {'file.data': CONTENT})
    return hub


def contents(path: str) -> bytes:
    return Path(path).read_bytes()


def test_download_is_complete_even_after_a_broken_connection(server: Hub, tmp_path: Path) -> None:
    server.faults = [Fault('GET', 'cut')]
    assert download(URL, tmp_path / 'new' / 'folder', contents) == CONTENT
    (file,) = (tmp_path / 'new' / 'folder').iterdir()
    assert (file.name, file.read_bytes()) == ('file.data', CONTENT)
    server.log.clear()
    assert download(URL, file.parent, contents) == CONTENT
    assert server.log == []  # the folder already has it


@pytest.mark.parametrize('fault', [Fault('GET', 'cut', 9), Fault('GET', 'status', 9, 404)], ids=['cut', '404'])
def test_failed_download_is_a_connection_error_and_leaves_no_file(fault: Fault, server: Hub, tmp_path: Path) -> None:
    server.faults = [fault]
    with pytest.raises(ConnectionError, match=r'^cannot download http.*\. If you are offline, put the file into.*$'):
        download(URL, tmp_path, contents)
    assert list(tmp_path.iterdir()) == []
    server.faults = []
    assert download(URL, tmp_path, contents) == CONTENT


def test_download_error_without_a_network_names_the_folder(server: Hub, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=rf'cannot download http://127.*refused.*file into {tmp_path}'):
        download('http://127.0.0.1:9/x', tmp_path, contents)
    assert time.monotonic() - start < 5
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_an_os_error_that_names_the_file(server: Hub, tmp_path: Path) -> None:
    resource = pytest.importorskip('resource')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(OSError, match=r'cannot write .*file\.data: File too large$') as error:
            download(URL, tmp_path, contents)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert type(error.value) is OSError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('url', ['file:///etc/hostname', '/etc/hostname'])
def test_url_without_http_is_a_value_error(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='it must begin with https://'):
        download(url, tmp_path, contents)


def test_checksum_in_the_name_is_verified(server: Hub, tmp_path: Path) -> None:
    beginning = hashlib.sha256(CONTENT).hexdigest()[:8]
    server.put('user/net', {f'net-{beginning}.ckpt': CONTENT, 'net-00000000.ckpt': CONTENT})
    assert download(f'{FILES}/net-{beginning}.ckpt', tmp_path, contents)
    with pytest.raises(ConnectionError, match='its SHA-256 differs'):
        download(f'{FILES}/net-00000000.ckpt', tmp_path, contents)
    assert len([*tmp_path.iterdir()]) == 1


def test_interrupted_download_is_not_kept(server: Hub, tmp_path: Path) -> None:
    def interrupt(path: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(URL, tmp_path, interrupt)
    assert list(tmp_path.iterdir()) == []


# Weights at their publishers' URLs

FOREIGN = {name: weights.cfg['url'] for name, weights in WEIGHTS.items() if 'url' in weights.cfg}


def serve_file(server: Hub, url: str, content: bytes) -> dict[str, Any]:
    """Serves a file in place of a published one; returns a pretrained_cfg overlay that downloads it."""
    name = url.rpartition('/')[2]
    server.put('user/net', {name: content})
    return dict(url=f'{FILES}/{name}', custom_load=True)


def test_published_weights_of_other_frameworks_have_url_and_license() -> None:
    assert len(FOREIGN) == 12
    for name, url in FOREIGN.items():
        cfg = timm.get_pretrained_cfg(name)
        assert (cfg.url, cfg.custom_load, cfg.license) == (url, True, 'apache-2.0')
        assert url.startswith('https://')
        assert 'resizes' in cfg.notes[0]
        assert f'{WEIGHTS[name].top1:.2f} %' in cfg.description


def test_create_model_pretrained_paddleclas_downloads_once_then_uses_cache(server: Hub, tmp_path: Path) -> None:
    name = 'res2net200_vd_26w_4s.ssld_in1k'
    arch, args = name.split('.')[0], dict(layers=(1, 1, 1, 1), channels=(32, 32, 32, 64), base_width=32)
    torch.manual_seed(0)
    expected = randomize(timm.create_model(arch, num_classes=5, **args)).eval()
    export_checkpoint(expected, tmp_path / 'file', 'paddleclas')
    overlay = serve_file(server, FOREIGN[name], (tmp_path / 'file').read_bytes())
    options = dict(pretrained=True, cache_dir=tmp_path / 'cache', pretrained_cfg_overlay={**overlay, 'num_classes': 5})
    for _ in range(2):
        model = timm.create_model(name, **options, **args).eval()
        torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
        server.faults = [Fault('GET', 'status', 100)]  # from now on only the cache has it
    assert [file.name for file in (tmp_path / 'cache').iterdir()] == [FOREIGN[name].split('/')[-1]]


def test_create_model_pretrained_file_without_res2net_raises_and_is_deleted(server: Hub, tmp_path: Path) -> None:
    name = 'res2net50_vd_26w_4s.ssld_in1k'
    overlay = serve_file(server, FOREIGN[name], save({'layer1.0.conv2.weight': torch.ones(1)}))
    with pytest.raises(ConnectionError, match=r'cannot download .*: .* it holds no Res2Net among'):
        timm.create_model(name, pretrained=True, cache_dir=tmp_path, pretrained_cfg_overlay=overlay)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('name', 'given', 'message'),
    [
        ('res2net50_vd_26w_4s', dict(first_block='official'), "something else with first_block='official'"),
        ('res2net50d', dict(block_args=dict(first_block='mmdet')), "something else with first_block='mmdet'"),
        ('res2net50_26w_4s', dict(norm_layer=partial(nn.BatchNorm2d, eps=1e-2)), 'need norm_eps=1e-05 .*norm_eps=0.01'),
    ],
)
def test_create_model_pretrained_with_another_spec_raises_without_a_download(
    name: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, pretrained=True, **given)


def test_create_model_pretrained_with_another_eps_hidden_in_a_function_is_refused(tmp_path: Path) -> None:
    save_file(tiny().state_dict(), tmp_path / 'net.safetensors')
    overlay = dict(file=str(tmp_path / 'net.safetensors'), num_classes=4)
    options = dict(pretrained=True, pretrained_cfg_overlay=overlay, **TINY)
    timm.create_model('test_res2net', norm_layer=nn.BatchNorm2d, **options)
    timm.create_model('test_res2net', first_block='mmdet', pretrained=True, pretrained_cfg=overlay, **TINY)
    with pytest.raises(ValueError, match=r'its network has norm_eps=1e-05 .*, the model has norm_eps=0\.01'):
        timm.create_model('test_res2net', norm_layer=lambda size, **dd: nn.BatchNorm2d(size, 1e-2, **dd), **options)


def test_create_model_pretrained_file_of_another_spec_is_refused(tmp_path: Path) -> None:
    export_checkpoint(tiny('paddle'), tmp_path / 'file.pdparams', 'paddleclas')
    state = tiny(num_classes=0).state_dict()
    names = {name: re.sub(r'^conv1\.', 'stem.', re.sub(r'^bn1\.', 'stem.7.', name)) for name in state}
    torch.save({f'backbone.{names[name]}': tensor for name, tensor in state.items()}, tmp_path / 'file.pth')
    for file, classes, first_block in (('file.pdparams', 4, 'paddle'), ('file.pth', 0, 'mmdet')):
        overlay = dict(file=str(tmp_path / file), num_classes=classes)
        options = dict(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes)
        with pytest.raises(CheckpointError, match=f"its network has first_block='{first_block}'"):
            timm.create_model('test_res2net', **options, **TINY)


def test_create_model_pretrained_loads_timm_names_unless_metadata_contradicts(tmp_path: Path) -> None:
    expected = tiny('paddle').state_dict()
    overlay = dict(file=str(tmp_path / 'file.safetensors'), num_classes=4)
    options = dict(pretrained=True, pretrained_cfg_overlay=overlay, **TINY)
    save_file(expected, overlay['file'])
    model = timm.create_model('test_res2net', first_block='paddle', **options)
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)
    save_file(expected, overlay['file'], {'first_block': 'paddle'})
    with pytest.raises(CheckpointError, match="its network has first_block='paddle'"):
        timm.create_model('test_res2net', **options)


def test_create_model_pretrained_loads_safetensors_with_mmpretrain_names(tmp_path: Path) -> None:
    state = {f'backbone.{name}': tensor for name, tensor in tiny().state_dict().items()}
    state = {name.replace('backbone.fc.', 'head.fc.'): tensor for name, tensor in state.items()}
    save_file(state, tmp_path / 'file.safetensors')
    overlay = dict(file=str(tmp_path / 'file.safetensors'), num_classes=4)
    model = timm.create_model('test_res2net', pretrained=True, pretrained_cfg_overlay=overlay, **TINY)
    torch.testing.assert_close(model.state_dict(), tiny().state_dict(), rtol=0, atol=0)
