"""ExecuTorch and LiteRT compute what fused models compute in torch; Core ML converts them, but runs on a Mac only."""

import pytest
import torch
from support import assert_same
from torch import nn

from integration.conftest import make
from timm_res2net import fuse

IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings('default')  # libraries warn about their own internals


@pytest.fixture
def fused(kind: str) -> nn.Module:
    return fuse(make(kind, num_classes=4).eval())


@pytest.mark.parametrize('backend', ['portable', 'xnnpack'])
def test_executorch_computes_the_same(backend: str, fused: nn.Module) -> None:
    exir = pytest.importorskip('executorch.exir')
    xnnpack = pytest.importorskip('executorch.backends.xnnpack.partition.xnnpack_partitioner')
    runtime = pytest.importorskip('executorch.runtime').Runtime.get()
    parts = [xnnpack.XnnpackPartitioner()] if backend == 'xnnpack' else []
    lowered = exir.to_edge_transform_and_lower(torch.export.export(fused, (IMAGES,)), partitioner=parts)
    program = runtime.load_program(lowered.to_executorch().buffer)
    method = program.load_method('forward')
    assert_same(lambda x: torch.as_tensor(method.execute([x])[0]), fused, IMAGES)


def test_litert_computes_the_same(fused: nn.Module) -> None:
    converted = pytest.importorskip('litert_torch').convert(fused, (IMAGES,))
    assert_same(lambda x: torch.as_tensor(converted(x)), fused, IMAGES)


def test_core_ml_converts_the_model(fused: nn.Module) -> None:
    coremltools = pytest.importorskip('coremltools')
    program = torch.export.export(fused, (IMAGES,)).run_decompositions({})
    assert coremltools.convert(program).get_spec().WhichOneof('Type') == 'mlProgram'
