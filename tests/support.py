"""Shared by tests: small models with randomized norms, comparisons, and a helper to run programs."""

import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from timm_res2net.models.biglittle import Res2NetBigLittle
from timm_res2net.models.cifar import Res2NetCifar
from timm_res2net.models.dla import Res2NetDla
from timm_res2net.models.resnet import Res2Net
from timm_res2net.models.variants import ARCHS

ROOT = Path(__file__).parents[1]

# A network with 9,000 parameters, for tests that build or run many networks.
TINY: dict[str, Any] = dict(layers=(1, 2, 1, 1), channels=(8, 8, 8, 8), stem_width=8, base_width=32, scale=3)

# Arguments that shrink a registered model to the fewest blocks and channels that still test all of its trunk.
SMALL: dict[type[nn.Module], dict[str, Any]] = {
    Res2Net: dict(layers=(1, 2, 1, 1), channels=(16, 24, 32, 40)),
    Res2NetDla: dict(levels=(1, 1, 1, 2, 1, 1), channels=(16, 32, 64, 128, 128, 192)),
    Res2NetBigLittle: dict(layers=(2, 2, 3, 1), base_width=8),
    Res2NetCifar: dict(layers=(1, 2, 1), channels=(16, 24, 64)),
}


def small(name: str) -> dict[str, Any]:
    """Arguments that make a registered model small; none for test_res2net, which is small already."""
    return {} if name == 'test_res2net' else SMALL[ARCHS[name].trunk]


def shallow(name: str) -> dict[str, Any]:
    """Arguments that make a registered model shallow without making it narrow, for tests of its feature sizes."""
    return {key: value for key, value in small(name).items() if key in ('layers', 'levels')}


def randomize(model: nn.Module) -> nn.Module:
    """Gives every norm random statistics, weights and biases, as training would.

    timm zero-initializes the last norm of each block, so a fresh network computes only its shortcuts.
    """
    norm: Any
    for norm in model.modules():
        if getattr(norm, 'running_mean', None) is not None:
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
        if isinstance(norm, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
    return model


def built(name: str, full: bool = False) -> nn.Module:
    """A registered model, small unless `full`, in evaluation mode with randomized norms."""
    return build_full(name) if full else build_small(name)


@lru_cache(maxsize=1)  # a model takes up to 300 MB
def build_full(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize(timm.create_model(name)).eval()


@cache
def build_meta(name: str) -> Any:
    """Makes a registered model on the meta device, for tests of its sizes."""
    return timm.create_model(name, device='meta')


@cache
def build_small(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize(timm.create_model(name, **small(name))).eval()


def fitting(name: str, images: Tensor) -> Tensor:
    """Images that suit a model: a corner for the networks for CIFAR, which hardly downsample."""
    return images[..., :16, :16] if ARCHS[name].trunk is Res2NetCifar else images


# One name for each trunk.
TRUNKS = 'test_res2net', 'dla60_res2net', 'blres2net50_26w_4s', 'res2next29_6c_24w_4s'


def strides(name: str) -> tuple[int, ...]:
    """Output strides that a model supports."""
    return {Res2NetCifar: (1, 2, 4), Res2NetBigLittle: (16, 32)}.get(ARCHS[name].trunk, (8, 16, 32))


def slow_but(fast: Sequence[Any], values: Iterable[Any]) -> list[Any]:
    """Values for `parametrize`, marked slow unless they are in `fast`."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


def tiny(first_block: str = 'official', **arguments: Any) -> nn.Module:
    """Makes the tiny network in evaluation mode with randomized norms."""
    torch.manual_seed(0)
    model = timm.create_model('test_res2net', **{**TINY, 'num_classes': 4, 'first_block': first_block, **arguments})
    return randomize(model).eval()


def assert_same(fast: Callable[[Tensor], Any], model: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    """Compares the outputs of two models, a tensor or features, relative to the largest value of each."""
    with torch.no_grad():
        for output, expected in zip(tree_leaves(fast(x)), tree_leaves(model(x)), strict=True):
            torch.testing.assert_close(output, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script, or a module after '-m', in two processes."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def assert_computes(model: nn.Module, reference: Path, tolerance: float = 1e-5) -> None:
    """Compares a model's outputs, or features, with those that a framework computed, on an even and an odd size."""
    with np.load(reference) as file:
        arrays = dict(file)
    for size in (64, 65):
        x = torch.from_numpy(arrays[f'images{size}'])
        with torch.inference_mode():
            if f'logits{size}' in arrays:
                pairs = [(model(x), arrays[f'logits{size}'])]
            else:
                features = model.forward_intermediates(x[:1], indices=[1, 2, 3, 4], intermediates_only=True)
                pairs = [(feature[:, ::8], arrays[f'map{size}_{i}']) for i, feature in enumerate(features)]
        for ours, theirs in pairs:
            theirs = torch.from_numpy(theirs)
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())
