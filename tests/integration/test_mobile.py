"""ExecuTorch and LiteRT compute what fused models compute in torch; Core ML converts them, and runs on a Mac only."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from integration.conftest import make
from timm_res2net import fuse

IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings('default')  # libraries about their own internals


@pytest.fixture
def fused(kind: str) -> nn.Module:
    return fuse(make(kind, num_classes=4).eval())


def assert_same(found: Any, fused: nn.Module) -> None:
    with torch.no_grad():
        expected: Tensor = fused(IMAGES)
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize('backend', ['portable', 'xnnpack'])
def test_executorch_computes_the_same(backend: str, fused: nn.Module) -> None:
    exir = pytest.importorskip('executorch.exir')
    xnnpack = pytest.importorskip('executorch.backends.xnnpack.partition.xnnpack_partitioner')
    runtime = pytest.importorskip('executorch.runtime').Runtime.get()
    parts = [xnnpack.XnnpackPartitioner()] if backend == 'xnnpack' else []
    lowered = exir.to_edge_transform_and_lower(torch.export.export(fused, (IMAGES,)), partitioner=parts)
    program = runtime.load_program(lowered.to_executorch().buffer)
    assert_same(program.load_method('forward').execute([IMAGES])[0], fused)


def test_litert_computes_the_same(fused: nn.Module) -> None:
    litert_torch = pytest.importorskip('litert_torch')
    assert_same(litert_torch.convert(fused, (IMAGES,))(IMAGES), fused)


def test_core_ml_takes_the_model(fused: nn.Module) -> None:
    coremltools = pytest.importorskip('coremltools')
    program = torch.export.export(fused, (IMAGES,)).run_decompositions({})
    assert coremltools.convert(program).get_spec().WhichOneof('Type') == 'mlProgram'
