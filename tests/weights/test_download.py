"""Downloads survive transient faults, and leave nothing behind when they fail."""

import base64
import contextlib
import hashlib
import http.server
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tenacity
import timm
import torch
from safetensors.torch import save, save_file
from support import TINY, randomise, tiny
from torch import Tensor, nn

import timm_res2net.weights.download
from timm_res2net import CheckpointError, export_checkpoint
from timm_res2net.models.variants import WEIGHTS
from timm_res2net.weights.download import download
from timm_res2net.weights.files import sha256
from timm_res2net.weights.readers import read

CONTENT = bytes(range(256)) * 4000  # 1 MB


class Server(http.server.ThreadingHTTPServer):
    """A server of `files`, in which each request takes one fault from `faults` until none is left."""

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {'ETag': '"1"'}
        self.spelling: Callable[[str], str] = str  # of the names of headers
        self.faults: list[Any] = []
        self.requests: list[dict[str, str]] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.server_port}'


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self.server.requests.append(dict(self.headers.items()))
        fault = self.server.faults.pop(0) if self.server.faults else None
        body = self.server.files.get(self.path)
        if fault == 'slow head':  # a line of the head from time to time
            self.wfile.write(b'HTTP/1.0 200 OK\r\n')
            while not self.server.closing.wait(0.1):
                self.wfile.write(b'A: b\r\n')
            return
        if fault == 'circle':
            self.send_response(302)
            self.send_header('Location', self.path)
            self.end_headers()
            return
        if fault == 'silent':
            self.server.closing.wait(10)
            return
        if body is None or isinstance(fault, int):
            self.send_error(404 if body is None else fault)
            return
        start = int(self.headers.get('Range', 'bytes=0-')[6:-1]) if fault != 'no range' else 0
        self.send_response(206 if start or fault == 'part' else 200)
        if start or fault == 'part':
            size = len(body) + (fault == 'other part')
            self.send_header('Content-Range', f'bytes {start}-{size - 1}/{size}')
        for key, value in self.server.headers.items():
            self.send_header(self.server.spelling(key), value if fault != 'other tag' else '"2"')
        told = fault[5:] if str(fault).startswith('size ') else str(len(body) - start)
        if fault != 'endless':
            self.send_header(self.server.spelling('Content-Length'), told)
        self.end_headers()
        if fault == 'endless':
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(body)
        while fault == 'drip' and not self.server.closing.wait(0.02):
            self.wfile.write(b'.')
        body = body[start:]
        if fault in ('cut', 'no range, cut'):
            body = body[: len(body) // 2]
        elif fault == 'damaged':
            body = bytes([body[0] ^ 1]) + body[1:]
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setitem(timm_res2net.weights.download.BACKOFF, 'wait', tenacity.wait_none())
    monkeypatch.setitem(timm_res2net.weights.download.BACKOFF, 'stop', tenacity.stop_after_attempt(4))
    with Server() as running:
        running.files['/file.bin'] = CONTENT
        threading.Thread(target=running.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True).start()
        yield running
        running.closing.set()
        running.shutdown()


def contents(path: str) -> bytes:
    return Path(path).read_bytes()


def test_download_to_a_full_disk_is_an_os_error_that_names_the_file(server: Server, tmp_path: Path) -> None:
    resource = pytest.importorskip('resource')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(OSError, match=r'file\.bin can not be written: File too large$') as error:
            download(f'{server.url}/file.bin', tmp_path, contents)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert type(error.value) is OSError
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_two_attempts_are_made_and_the_message_says_where_to_put_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def resolve(host: str, *args: object, **kwargs: object) -> None:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, 'Name or service not known')

    monkeypatch.setattr(socket, 'getaddrinfo', resolve)
    monkeypatch.setitem(timm_res2net.weights.download.BACKOFF, 'wait', tenacity.wait_none())
    with pytest.raises(ConnectionError, match=rf'service not known>\. .* put it in {tmp_path}/here, or') as error:
        download('https://weights.invalid/file.bin', tmp_path / 'here', contents)
    assert str(error.value).count('can not be downloaded') == 1
    assert asked == ['weights.invalid'] * 2


@pytest.mark.parametrize(
    ('faults', 'ranges'),
    [
        ([], [None]),
        (['cut'], [None, 512_000]),
        (['cut', 'cut', 'cut'], [None, 512_000, 768_000, 896_000]),
        (['cut', 'no range'], [None, 512_000]),
        ([503, 429], [None, None, None]),
        (['cut', 503], [None, 512_000, 512_000]),
    ],
    ids=['well', 'cut', 'cut again and again', 'ranges ignored', 'busy', 'busy after a cut'],
)
def test_download_transient_fault_is_retried_or_resumed(
    faults: list[Any], ranges: list[int | None], server: Server, tmp_path: Path
) -> None:
    server.faults = faults
    folder = tmp_path / 'new' / 'folder'
    assert download(f'{server.url}/file.bin', folder, contents) == CONTENT
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [('file.bin', CONTENT)]
    asked = [f'bytes={start}-' if start else None for start in ranges]
    assert [request.get('Range') for request in server.requests] == asked


def test_download_accepts_header_names_in_lower_case(server: Server, tmp_path: Path) -> None:
    server.spelling, server.faults = str.lower, ['cut']
    assert download(f'{server.url}/file.bin', tmp_path / 'cut', contents) == CONTENT
    assert [request.get('Range') for request in server.requests] == [None, 'bytes=512000-']
    server.headers, server.faults = {'Content-MD5': 'AAAAAAAAAAAAAAAAAAAAAA=='}, []
    with pytest.raises(ConnectionError, match='its MD5 differs'):
        download(f'{server.url}/file.bin', tmp_path / 'md5', contents)


def test_download_cut_without_etag_restarts_from_beginning(server: Server, tmp_path: Path) -> None:
    server.headers, server.faults = {}, ['cut']
    assert download(f'{server.url}/file.bin', tmp_path, contents) == CONTENT
    assert [request.get('Range') for request in server.requests] == [None, None]


@pytest.mark.parametrize('faults', [['part'], ['cut', 'other part'], ['cut', 'other tag']])
def test_download_part_of_a_file_that_was_not_asked_for_restarts(
    faults: list[Any], server: Server, tmp_path: Path
) -> None:
    server.faults = faults
    assert download(f'{server.url}/file.bin', tmp_path, contents) == CONTENT
    assert server.requests[-1].get('Range') is None


@pytest.mark.parametrize(
    ('fault', 'message'),
    [
        ('endless', 'it is larger than 2,000,000 bytes'),
        ('size abc', "the server says that its size is 'abc'"),
        ('size -1', "the server says that its size is '-1'"),
        ('silent', 'timed out'),
        ('drip', r'only [0-9,]+ bytes came in 0\.3 s'),
        ('slow head', r'the server began no answer in 0\.3 s'),
        ('circle', r'the server answers 302 The HTTP server returned a redirect error .* loop'),
    ],
)
def test_download_of_no_size_or_end_raises_and_leaves_no_file(
    fault: str, message: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('timm_res2net.weights.download.LARGEST', 2_000_000)
    monkeypatch.setenv('TIMM_RES2NET_TIMEOUT', '0.3')
    server.faults = [fault] * 9
    start = time.perf_counter()
    with pytest.raises(ConnectionError, match=f'can not be downloaded: .*{message}') as error:
        download(f'{server.url}/file.bin', tmp_path, contents)
    assert '\n' not in str(error.value)
    assert time.perf_counter() - start < 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('url', ['file:///etc/hostname', 'ftp://127.0.0.1/x', '/etc/hostname', ''])
def test_download_of_what_is_not_on_the_web_raises_value_error(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='give an address that begins with https://'):
        download(url, tmp_path, contents)


def test_download_existing_file_sends_no_request(server: Server, tmp_path: Path) -> None:
    download(f'{server.url}/file.bin', tmp_path, contents)
    download(f'{server.url}/file.bin', tmp_path, contents)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ('faults', 'headers', 'message'),
    [
        (['cut'] * 4, {}, r'the connection was cut after 512,000 of 1,024,000 bytes'),
        ([404], {}, 'the server answers 404 Not Found'),
        ([503] * 4, {}, 'the server answers 503'),
        (['damaged'], {'Content-MD5': base64.b64encode(hashlib.md5(CONTENT).digest()).decode()}, 'its MD5 differs'),
    ],
    ids=['cut for good', 'absent', 'busy for good', 'damaged'],
)
def test_download_failure_raises_connection_error_and_leaves_no_file(
    faults: list[Any], headers: dict[str, str], message: str, server: Server, tmp_path: Path
) -> None:
    server.faults, server.headers = faults, headers
    with pytest.raises(ConnectionError, match=message):
        download(f'{server.url}/file.bin', tmp_path, contents)
    assert list(tmp_path.iterdir()) == []
    server.faults, server.headers = [], {}
    assert download(f'{server.url}/file.bin', tmp_path, contents) == CONTENT


def test_download_unreachable_server_raises_connection_error_with_url(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r'http://127.0.0.1:9/x can not be downloaded: .*refused.*offline'):
        download('http://127.0.0.1:9/x', tmp_path, contents)
    assert list(tmp_path.iterdir()) == []


def test_download_verifies_hash_in_file_name(server: Server, tmp_path: Path) -> None:
    beginning = hashlib.sha256(CONTENT).hexdigest()[:8]
    server.files = {f'/net-{beginning}.ckpt': CONTENT, '/net-00000000.ckpt': CONTENT}
    assert download(f'{server.url}/net-{beginning}.ckpt', tmp_path, contents)
    with pytest.raises(ConnectionError, match='its SHA-256 differs'):
        download(f'{server.url}/net-00000000.ckpt', tmp_path, contents)
    assert len(list(tmp_path.iterdir())) == 1


def test_download_unreadable_file_raises_and_is_deleted(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r'is of no use: file\.bin is no file of weights'):
        download(f'{server.url}/file.bin', tmp_path, read)
    assert list(tmp_path.iterdir()) == []


def test_download_interrupted_while_reading_leaves_no_file(server: Server, tmp_path: Path) -> None:
    def interrupt(path: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(f'{server.url}/file.bin', tmp_path, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_download_retry_is_logged(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server.faults = [503]
    with caplog.at_level(logging.INFO, 'timm_res2net'):
        download(f'{server.url}/file.bin', tmp_path, contents)
    assert [record.message.split(': ')[-1] for record in caplog.records][1:] == [
        'the server answers 503 Service Unavailable; trying again in 0 s'
    ]


# Weights at their publishers' URLs

FOREIGN = {name: weights.cfg['url'] for name, weights in WEIGHTS.items() if 'url' in weights.cfg}


def serve_file(server: Server, url: str, content: bytes) -> dict[str, Any]:
    """Serves a file instead of a published one; returns the overlay of a pretrained_cfg that downloads it."""
    path = '/' + url.split('/', 3)[3]
    server.files[path] = content
    return dict(url=server.url + path, custom_load=True)


def test_published_weights_of_other_frameworks_have_url_and_license() -> None:
    assert len(FOREIGN) == 12
    for name, url in FOREIGN.items():
        cfg = timm.get_pretrained_cfg(name)
        assert (cfg.url, cfg.custom_load, cfg.license) == (url, True, 'apache-2.0')
        assert url.startswith('https://')
        assert 'resizes' in cfg.notes[0]
        assert f'{WEIGHTS[name].top1:.2f} %' in cfg.description


@pytest.mark.parametrize('name', [name for name in FOREIGN if 'mindcv' not in name])
def test_create_model_pretrained_paddleclas_downloads_once_then_uses_cache(
    name: str, server: Server, tmp_path: Path
) -> None:
    arch, args = name.split('.')[0], dict(layers=(1, 1, 1, 1), base_width=4)
    torch.manual_seed(0)
    expected = randomise(timm.create_model(arch, num_classes=5, **args)).eval()
    export_checkpoint(expected, tmp_path / 'file', 'paddleclas')
    overlay = serve_file(server, FOREIGN[name], (tmp_path / 'file').read_bytes())
    options = dict(pretrained=True, cache_dir=tmp_path / 'cache', pretrained_cfg_overlay={**overlay, 'num_classes': 5})
    for _ in range(2):
        model = timm.create_model(name, **options, **args).eval()
        torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
        server.faults = [503] * 100  # from now on only the cache has it
    assert [file.name for file in (tmp_path / 'cache').iterdir()] == [FOREIGN[name].split('/')[-1]]


@pytest.mark.parametrize('name', [name for name in FOREIGN if 'mindcv' in name])
def test_create_model_pretrained_mindcv_verifies_hash_and_loads_weights(
    name: str, server: Server, tmp_path: Path, references: Callable[[str], Path]
) -> None:
    deep = name.split('.')[0].endswith('d')
    file = references('mindspore') / ('res2net_v1b.ckpt' if deep else 'res2net.ckpt')
    args = dict(layers=(1, 2, 1, 1), **(dict(base_width=3, scale=3) if deep else dict(base_width=2)))
    overlay = serve_file(server, FOREIGN[name], file.read_bytes())
    options = dict(pretrained=True, cache_dir=tmp_path, **args)
    with pytest.raises(ConnectionError, match='SHA-256 differs'):
        timm.create_model(name, pretrained_cfg_overlay={**overlay, 'num_classes': 5}, **options)
    renamed = FOREIGN[name].rpartition('-')[0] + f'-{sha256(file)[:8]}.ckpt'
    overlay = serve_file(server, renamed, file.read_bytes())
    model = timm.create_model(name, pretrained_cfg_overlay={**overlay, 'num_classes': 5}, **options)
    torch.testing.assert_close(model.fc.weight.detach(), read(file).nested['classifier.weight'], rtol=0, atol=0)


def test_create_model_pretrained_file_without_res2net_raises_and_is_deleted(server: Server, tmp_path: Path) -> None:
    name = 'res2net50_vd_26w_4s.ssld_in1k'
    overlay = serve_file(server, FOREIGN[name], save({'layer1.0.conv2.weight': torch.ones(1)}))
    with pytest.raises(ConnectionError, match=r'is of no use: .* there is no Res2Net among'):
        timm.create_model(name, pretrained=True, cache_dir=tmp_path, pretrained_cfg_overlay=overlay)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_create_model_pretrained_full_size_download_is_adapted_as_timm_does(
    server: Server, tmp_path: Path, images: Tensor
) -> None:
    name = 'res2net50_vd_26w_4s.ssld_in1k'
    torch.manual_seed(0)
    published = randomise(timm.create_model(name)).eval()
    export_checkpoint(published, tmp_path / 'file', 'paddleclas')
    assert (tmp_path / 'file').stat().st_size > 100_000_000
    overlay = serve_file(server, FOREIGN[name], (tmp_path / 'file').read_bytes())
    server.faults = ['cut']
    for changes in ({}, dict(in_chans=1), dict(num_classes=7), dict(features_only=True, in_chans=4)):
        outputs = []
        for source in (overlay, dict(state_dict=published.state_dict(), url=None, custom_load=False)):
            torch.manual_seed(1)
            options = dict(pretrained=True, cache_dir=tmp_path / 'cache', pretrained_cfg_overlay=source)
            model = timm.create_model(name, **options, **changes).eval()
            with torch.inference_mode():
                outputs.append(model(images[:1, :1].expand(-1, changes.get('in_chans', 3), -1, -1)))
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
    assert len(server.requests) == 2


def test_create_model_pretrained_with_another_first_block_raises_value_error(server: Server, tmp_path: Path) -> None:
    for name, function in (('res2net50_vd_26w_4s', 'official'), ('res2net50d', 'mmdet')):
        with pytest.raises(ValueError, match=f"would compute something else with first_block='{function}'"):
            timm.create_model(name, pretrained=True, first_block=function)
    with pytest.raises(ValueError, match='would compute something else'):
        timm.create_model('res2net50d', pretrained=True, block_args=dict(first_block='paddle'))


def test_create_model_pretrained_with_a_norm_of_another_eps_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = dict(layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    state = timm.create_model('res2net50_26w_4s', **arguments).state_dict()
    save_file(state, tmp_path / 'net.safetensors')
    asked = []

    def bring_file(*of: Any) -> Path:
        asked.append(of)
        return tmp_path / 'net.safetensors'

    monkeypatch.setattr('timm_res2net.res2net.bring_file', bring_file)
    options = dict(pretrained=True, **arguments)
    with pytest.raises(ValueError, match=r'weights in1k of .* with norm_eps=1e-05 and .* else with norm_eps=0\.01'):
        timm.create_model('res2net50_26w_4s', norm_layer=partial(nn.BatchNorm2d, eps=1e-2), **options)
    assert not asked  # for the file
    with pytest.raises(ValueError, match=r'with norm_eps=1e-05; the model has norm_eps=0\.01'):
        timm.create_model(
            'res2net50_26w_4s', norm_layer=lambda channels, **dd: nn.BatchNorm2d(channels, 1e-2, **dd), **options
        )
    timm.create_model('res2net50_26w_4s', norm_layer=nn.BatchNorm2d, **options)


def test_create_model_pretrained_file_of_another_function_is_refused(tmp_path: Path) -> None:
    export_checkpoint(tiny('paddle'), tmp_path / 'file.pdparams', 'paddleclas')
    names = {name: re.sub(r'^conv1\.', 'stem.', re.sub(r'^bn1\.', 'stem.7.', name)) for name in tiny().state_dict()}
    detector = {f'backbone.{names[name]}': tensor for name, tensor in tiny().state_dict().items()}
    torch.save(detector, tmp_path / 'file.pth')
    for file, custom_load, function in (('file.pdparams', True, 'paddle'), ('file.pth', False, 'mmdet')):
        overlay = dict(file=str(tmp_path / file), custom_load=custom_load, num_classes=4)
        with pytest.raises(CheckpointError, match=f"is of a network with first_block='{function}'"):
            timm.create_model('test_res2net', pretrained=True, pretrained_cfg_overlay=overlay, **TINY)


def test_create_model_pretrained_timm_names_load_unless_metadata_contradicts(tmp_path: Path) -> None:
    expected = tiny('paddle').state_dict()
    overlay = dict(file=str(tmp_path / 'file.safetensors'), num_classes=4)
    options = dict(pretrained=True, pretrained_cfg_overlay=overlay, **TINY)
    save_file(expected, overlay['file'])
    model = timm.create_model('test_res2net', first_block='paddle', **options)
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)
    save_file(expected, overlay['file'], {'first_block': 'paddle'})
    with pytest.raises(CheckpointError, match="is of a network with first_block='paddle'"):
        timm.create_model('test_res2net', **options)


def test_create_model_pretrained_safetensors_of_mmpretrain_names_loads(tmp_path: Path) -> None:
    state = {f'backbone.{name}': tensor for name, tensor in tiny().state_dict().items()}
    state = {name.replace('backbone.fc.', 'head.fc.'): tensor for name, tensor in state.items()}
    (tmp_path / 'file.safetensors').write_bytes(save(state))
    overlay = dict(file=str(tmp_path / 'file.safetensors'), num_classes=4)
    model = timm.create_model('test_res2net', pretrained=True, pretrained_cfg_overlay=overlay, **TINY)
    torch.testing.assert_close(model.state_dict(), tiny().state_dict(), rtol=0, atol=0)
