"""What all tests share."""

import atexit
import os
import shutil
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
os.environ |= {'OMP_NUM_THREADS': '1'}  # each worker keeps to one core
os.environ.pop('HF_TOKEN', None)

import pytest
import tenacity
import torch
from huggingface_hub import constants
from support import ROOT, built
from torch import nn

from timm_res2net.weights.download import BACKOFF

# Python 3.11 before 3.11.4 has no filters yet.
SAFELY: dict[str, Any] = {'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}

atexit.register(shutil.rmtree, os.environ['HF_HOME'], ignore_errors=True)


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    """Builds a registered model, small unless `full`, once for all tests of a process: leave it as it is."""
    return built


@pytest.fixture
def images() -> torch.Tensor:
    """Two images, (2, 3, 64, 64)."""
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='session')
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Unpacks files that other frameworks wrote, with what they compute; see `tests/data`."""

    @cache
    def unpacked(framework: str) -> Path:
        folder = tmp_path_factory.mktemp(framework)
        with tarfile.open(ROOT / 'tests' / 'data' / f'{framework}.tar.xz') as archive:
            archive.extractall(folder, **SAFELY)
        return folder

    return unpacked


@pytest.fixture(scope='session')
def hub_server() -> Iterator[Hub]:
    with Hub(int(os.environ['HF_ENDPOINT'].rpartition(':')[2])) as server:
        threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(params=['lfs'])
def hub(
    request: pytest.FixtureRequest,
    hub_server: Hub,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Hub]:
    """A Hub without anything in it, that keeps large files by itself ('lfs') or by hf_xet ('xet')."""
    xet = request.param == 'xet'
    hub_server.reset(tmp_path_factory.mktemp('xet') if xet else None)
    shutil.rmtree(os.environ['HF_HOME'], ignore_errors=True)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', not xet)
    monkeypatch.setitem(BACKOFF, 'wait', tenacity.wait_none())
    monkeypatch.setitem(BACKOFF, 'stop', tenacity.stop_after_attempt(3))
    yield hub_server
    hub_server.end_silence()
