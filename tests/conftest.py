"""What all tests share."""

import atexit
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from hub import Hub, free_port

# Read at import, also by child processes: the only Hub is one of our own, and is asked only where a test wants it.
os.environ |= {'HF_HUB_OFFLINE': '1', 'HF_ENDPOINT': f'http://127.0.0.1:{free_port()}', 'HF_HOME': tempfile.mkdtemp()}
os.environ |= {'OMP_NUM_THREADS': '1'}  # each worker keeps to one core
os.environ.pop('HF_TOKEN', None)

import pytest
import timm
import torch
from huggingface_hub import constants
from torch import nn

import timm_res2net.hub.client  # registers the models

# Python 3.11 before 3.11.4 has no filters yet.
SAFELY: dict[str, Any] = {'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}

atexit.register(shutil.rmtree, os.environ['HF_HOME'], ignore_errors=True)


@cache
def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model(name)).eval()


def randomise(model: nn.Module) -> nn.Module:
    """Gives every norm statistics, weights and biases that show when they are wrong.

    timm zero-initialises the last norm of a block, so on a fresh model a comparison passes with all branches deleted.
    """
    for norm in model.modules():
        if getattr(norm, 'running_mean', None) is not None:
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
        if isinstance(norm, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
    return model


@pytest.fixture
def build() -> Callable[[str], nn.Module]:
    """Builds a registered model in eval mode with randomised norms, once for all tests: leave it as it is."""
    return built


@pytest.fixture
def images() -> torch.Tensor:
    """Two images, (2, 3, 64, 64)."""
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


# A network of 9,000 parameters, for what has to be done many times.
TINY: dict[str, Any] = dict(layers=(1, 2, 1, 1), channels=(8, 8, 8, 8), stem_width=8, base_width=32, scale=3)


def tiny(first_block: str = 'official', **arguments: Any) -> nn.Module:
    """Makes the tiny network in eval mode with randomised norms."""
    torch.manual_seed(0)
    made = timm.create_model('test_res2net', **{**TINY, 'num_classes': 4, 'first_block': first_block, **arguments})
    return randomise(made).eval()


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script, or a module after '-m', in two processes."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope='session')
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Unpacks files that other frameworks wrote, with what they compute; see `tests/data`."""

    @cache
    def unpacked(framework: str) -> Path:
        folder = tmp_path_factory.mktemp(framework)
        with tarfile.open(Path(__file__).parent / 'data' / f'{framework}.tar.xz') as archive:
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
) -> Hub:
    """A Hub without anything in it, that keeps large files by itself ('lfs') or by hf_xet ('xet')."""
    xet = request.param == 'xet'
    hub_server.reset(tmp_path_factory.mktemp('xet') if xet else None)
    shutil.rmtree(os.environ['HF_HOME'], ignore_errors=True)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', not xet)
    monkeypatch.setattr(timm_res2net.hub.client, 'PAUSES', (0, 0))
    return hub_server
