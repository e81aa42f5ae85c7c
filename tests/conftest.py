"""Environment and fixtures of all tests.

Imports torch only where tests are collected: the process that distributes them does not need it.
"""

import atexit
import json
import os
import shutil
import struct
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from hub_server import Hub, free_port

# Read at import, also by child processes: the only Hub is our test server, and only the fixture `hub` goes online.
os.environ |= {'HF_HUB_OFFLINE': '1', 'HF_ENDPOINT': f'http://127.0.0.1:{free_port()}', 'HF_HOME': tempfile.mkdtemp()}
os.environ |= {'HF_HUB_DISABLE_XET': '1'}  # the test server stores large files itself
os.environ |= {'OMP_NUM_THREADS': '1'}  # each worker keeps to one core
os.environ.pop('HF_TOKEN', None)

import numpy as np
import pytest
from filelock import FileLock
from huggingface_hub import constants

# Python 3.11 before 3.11.4 has no filters yet.
SAFELY: dict[str, Any] = {'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}

atexit.register(shutil.rmtree, os.environ['HF_HOME'], ignore_errors=True)


def pytest_collectstart() -> None:
    import registry  # noqa: F401 - copies timm's registry before this package changes it


@pytest.fixture
def build() -> Callable[..., Any]:
    """Builds a registered model, small unless `full`, once for all tests of a process: do not change it."""
    from support import built

    return built


@pytest.fixture
def images() -> Any:
    """Two images, (2, 3, 64, 64)."""
    import torch

    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='session')
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Unpacks an archive of `tests/data`, once for all processes; returns its folder."""
    root = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        root = root.parent

    @cache
    def unpacked(framework: str) -> Path:
        folder = root / framework
        with FileLock(f'{folder}.lock'):
            if not folder.exists():
                with tarfile.open(Path(__file__).with_name('data') / f'{framework}.tar.xz') as archive:
                    archive.extractall(folder, **SAFELY)
        return folder

    return unpacked


@pytest.fixture(scope='session')
def hub_server() -> Iterator[Hub]:
    with Hub(int(os.environ['HF_ENDPOINT'].rpartition(':')[2])) as server:
        threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def hub(hub_server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty Hub, whose client makes no pauses."""
    hub_server.reset()
    shutil.rmtree(os.environ['HF_HOME'], ignore_errors=True)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr('time.sleep', lambda seconds: None)  # between attempts
    return hub_server


@pytest.fixture(scope='session')
def fashion_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a hundred images in Fashion-MNIST's format: discs, rings, bars, ... as classes, in ten brightnesses."""
    folder = tmp_path_factory.mktemp('fashion-mnist')
    y, x = np.mgrid[-13.5:14, -13.5:14]
    radius = np.hypot(x, y)
    shapes = [
        *(radius < 13, (radius < 13) & (radius > 7), abs(x) < 5, abs(y) < 5, (abs(x) < 4) | (abs(y) < 4)),
        *(abs(x - y) < 5, (abs(x - y) < 5) | (abs(x + y) < 5), x + y < 0, np.maximum(abs(x), abs(y)) < 12),
        (np.maximum(abs(x), abs(y)) < 12) & (np.maximum(abs(x), abs(y)) > 7),
    ]
    brightness = np.linspace(120, 255, 10).astype(np.uint8)[:, None, None, None]
    images = (np.stack(shapes) * brightness).reshape(100, 28, 28).astype(np.uint8)
    labels = np.tile(np.arange(10, dtype=np.uint8), 10)
    raw = folder / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    for part in ('train', 't10k'):
        (raw / f'{part}-images-idx3-ubyte').write_bytes(struct.pack('>4i', 0x803, 100, 28, 28) + images.tobytes())
        (raw / f'{part}-labels-idx1-ubyte').write_bytes(struct.pack('>2i', 0x801, 100) + labels.tobytes())
    return folder


@pytest.fixture(scope='session')
def simple_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a dataset that is quick to learn: a bright or a dark square on each image of gray noise."""
    from timm_res2net.recipes import multi_scale

    folder = tmp_path_factory.mktemp('sets') / 'simple'
    rng = np.random.default_rng(0)
    drawn = []
    for index in range(32):
        pixels = rng.integers(90, 160, (64, 64), dtype=np.uint8)
        mask = np.zeros((64, 64), bool)
        side = int(rng.integers(16, 40))
        top, left = (int(start) for start in rng.integers(64 - side, size=2))
        mask[top : top + side, left : left + side] = True
        pixels[mask] = 255 * (index % 2)
        drawn.append(multi_scale.Canvas(pixels, [index % 2], [mask], [side]))
    document = multi_scale.write_part(folder / 'train', drawn)
    document['categories'] = [dict(id=1, name='dark'), dict(id=2, name='bright')]
    (folder / 'annotations').mkdir()
    (folder / 'annotations' / 'instances_train.json').write_text(json.dumps(document))
    return folder
