"""The block computes its published equations, for every kind of first block."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import randomize
from torch import Tensor, nn

from timm_res2net.models.block import Bottle2neck
from timm_res2net.models.recompute import Stage
from timm_res2net.models.spec import FIRST_BLOCKS, STYLES


def normalized(x: Tensor, norm: Any) -> Tensor:
    """Batch normalization in evaluation mode."""
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def pooled(x: Tensor, stride: int, count_include_pad: bool) -> Tensor:
    """Average over windows of 3 x 3 pixels."""
    return F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=count_include_pad)


def branch(block: Any, x: Tensor, first_block: str, position: str, stride: int, style: str = 'pytorch') -> Tensor:
    """The residual branch, written out from the equations of a code base for a block at this position."""
    first_stride, stride = (stride, 1) if style == 'caffe' else (1, stride)
    if style == 'caffe' and position == 'later stage':
        position = 'first stage'  # the stride of the 3x3 convolutions decides
    y = F.relu(normalized(F.conv2d(x, block.conv1.weight, stride=first_stride), block.bn1))
    splits = y.chunk(block.scale, 1)
    outs: list[Tensor] = []
    convolves_all = first_block == 'group' and position != 'later block'
    for i in range(block.scale if convolves_all else max(1, block.scale - 1)):
        z = splits[i]
        cascades = position == 'later block' or (first_block == 'paddle' and position == 'first stage')
        if cascades and i > 0:
            z = z + outs[i - 1]
        z = F.conv2d(z, block.convs[i].weight, stride=stride, padding=1, groups=block.convs[i].groups)
        outs.append(F.relu(normalized(z, block.bns[i])))
    if block.scale > 1 and not convolves_all:
        last = splits[-1]
        if position == 'later stage' or (position == 'first stage' and first_block == 'official'):
            last = pooled(last, stride, count_include_pad=first_block != 'paddle')
        outs.append(last)
    return normalized(F.conv2d(torch.cat(outs, 1), block.conv3.weight), block.bn3)


def projection(inplanes: int, outplanes: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))


@pytest.mark.parametrize(
    ('first_block', 'position', 'scale', 'cardinality', 'style'),
    [*product(FIRST_BLOCKS, ('first stage', 'later stage', 'later block'), (1, 3), (1, 2), STYLES)],
)
def test_block_and_its_fused_form_compute_the_published_equations(
    first_block: str, position: str, scale: int, cardinality: int, style: str
) -> None:
    stride = 2 if position == 'later stage' else 1
    inplanes = 64 if position == 'later block' else 32
    downsample = None if position == 'later block' else projection(inplanes, 64, stride)
    torch.manual_seed(0)
    options = dict(
        cardinality=cardinality, scale=scale, first=position != 'later block', first_block=first_block, style=style
    )
    block = Bottle2neck(inplanes, 16, stride, downsample, **options)
    randomize(block.double()).eval()
    x = torch.randn(2, inplanes, 7, 8, dtype=torch.double)
    shortcut = x if downsample is None else downsample(x)
    expected = F.relu(branch(block, x, first_block, position, stride, style) + shortcut)
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(block.fuse()(x), expected)


def test_block_each_activation_runs_once_per_forward() -> None:
    block = Bottle2neck(64, 16, scale=4).eval()
    calls: list[nn.Module] = []
    for module in block.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda module, *_: calls.append(module))
    block(torch.randn(1, 64, 8, 8))
    assert len(calls) == len(set(calls)) == 5


def test_grad_checkpointing_repeated_backward_keeps_norm_statistics() -> None:
    torch.manual_seed(0)
    stage = randomize(Stage(*(Bottle2neck(64, 16) for _ in range(2))))
    stage.grad_checkpointing = True  # type: ignore[assignment]
    y = stage(torch.randn(2, 64, 8, 8, requires_grad=True)).sum()
    before = {name: buffer.clone() for name, buffer in stage.named_buffers()}
    y.backward(retain_graph=True)
    y.backward()
    torch.testing.assert_close(dict(stage.named_buffers()), before, rtol=0, atol=0)


@pytest.mark.slow
def test_grad_checkpointing_compiles_without_graph_break_to_the_same_gradients() -> None:
    torch.manual_seed(0)
    stage = randomize(Stage(Bottle2neck(16, 4, scale=2)))
    stage.grad_checkpointing = True  # type: ignore[assignment]
    x = torch.randn(2, 16, 8, 8)
    gradients = []
    for run in (stage, torch.compile(stage, fullgraph=True, backend='aot_eager')):
        stage.zero_grad()
        run(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in stage.parameters()])
    torch.testing.assert_close(*gradients)
