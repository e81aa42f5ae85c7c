"""The block computes what its equations say, in each of its three functions."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import randomise
from torch import Tensor, nn

from timm_res2net.models.block import Bottle2neck
from timm_res2net.models.function import FIRST_BLOCKS
from timm_res2net.models.pool import DilatedAvgPool2d
from timm_res2net.models.recompute import Stage


def normalised(x: Tensor, norm: Any) -> Tensor:
    """Batch normalisation in evaluation, written out."""
    mean, variance, weight, bias = (
        getattr(norm, name)[:, None, None] for name in ('running_mean', 'running_var', 'weight', 'bias')
    )
    return (x - mean) / (variance + norm.eps) ** 0.5 * weight + bias


def pooled(x: Tensor, stride: int, count_include_pad: bool) -> Tensor:
    """3x3 average, pixel by pixel."""
    height, width = x.shape[-2:]
    rows = []
    for i in range(0, height, stride):
        row = []
        for j in range(0, width, stride):
            window = x[..., max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
            row.append(window.sum((-2, -1)) / (9 if count_include_pad else window[0, 0].numel()))
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


def published(block: Any, x: Tensor, function: str, position: str, stride: int, style: str = 'pytorch') -> Tensor:
    """The block's equations in the plainest form: what each code base computes at each position."""
    shortcut_stride = stride
    first_stride, stride = (stride, 1) if style == 'caffe' else (1, stride)
    if style == 'caffe' and position == 'later stage':
        position = 'first stage'  # what decides is the stride of the 3x3 convolutions
    y = F.relu(normalised(F.conv2d(x, block.conv1.weight, stride=first_stride), block.bn1))
    width = y.shape[1] // block.scale
    splits = [y[:, i * width : (i + 1) * width] for i in range(block.scale)]
    outs: list[Tensor] = []
    convolves_all = function == 'group' and position != 'later'
    for i in range(block.scale if convolves_all else max(1, block.scale - 1)):
        z = splits[i]
        cascades = position == 'later' or (function == 'paddle' and position == 'first stage')
        if cascades and i > 0:
            z = z + outs[i - 1]
        groups = block.convs[i].groups
        z = F.conv2d(z, block.convs[i].weight, stride=stride, padding=1, groups=groups)
        outs.append(F.relu(normalised(z, block.bns[i])))
    if block.scale > 1 and not convolves_all:
        last = splits[-1]
        if position == 'later stage' or (position == 'first stage' and function == 'official'):
            last = pooled(last, stride, count_include_pad=function != 'paddle')
        outs.append(last)
    y = normalised(F.conv2d(torch.cat(outs, 1), block.conv3.weight), block.bn3)
    shortcut = x
    if block.downsample is not None:
        conv, norm = block.downsample
        shortcut = normalised(F.conv2d(x, conv.weight, stride=shortcut_stride), norm)
    return F.relu(y + shortcut)


def projection(inplanes: int, outplanes: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))


@pytest.mark.parametrize(
    ('function', 'position', 'scale', 'cardinality'),
    list(product(FIRST_BLOCKS, ('first stage', 'later stage', 'later'), (1, 2, 4), (1, 2))),
)
def test_block_computes_its_published_equations(function: str, position: str, scale: int, cardinality: int) -> None:
    stride = 2 if position == 'later stage' else 1
    inplanes = 64 if position == 'later' else 32
    downsample = None if position == 'later' else projection(inplanes, 64, stride)
    torch.manual_seed(0)
    block = Bottle2neck(inplanes, 16, stride, downsample, cardinality, base_width=26, scale=scale, first_block=function)
    randomise(block.double()).eval()
    x = torch.randn(2, inplanes, 7, 8, dtype=torch.double)
    torch.testing.assert_close(block(x), published(block, x, function, position, stride))


@pytest.mark.parametrize('function', FIRST_BLOCKS)
@pytest.mark.parametrize('step', [1, 2])
def test_first_block_in_dilated_stage_keeps_cascade_pool_and_convolutions(function: str, step: int) -> None:
    strided = Bottle2neck(8, 16, step, projection(8, 64, step), first_block=function)
    for prior in (1, 2):
        dilated = Bottle2neck(
            8, 16, 1, projection(8, 64, 1), dilation=step * prior, first_dilation=prior, first_block=function
        )
        assert dilated.cascade == strided.cascade
        assert isinstance(dilated.pool, nn.AvgPool2d) == isinstance(strided.pool, nn.AvgPool2d)
        assert len(dilated.convs) == len(strided.convs)


@pytest.mark.parametrize('count_include_pad', [True, False])
@pytest.mark.parametrize('size', [(8, 8), (9, 7)])
def test_dilated_avg_pool_equals_plain_pool_on_denser_grid(count_include_pad: bool, size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size)
    torch.testing.assert_close(DilatedAvgPool2d(1, count_include_pad)(x), pooled(x, 1, count_include_pad))
    sparse = pooled(x[..., ::2, ::2], 1, count_include_pad)
    torch.testing.assert_close(DilatedAvgPool2d(2, count_include_pad)(x)[..., ::2, ::2], sparse)


def test_block_each_activation_runs_once_per_forward() -> None:
    block = Bottle2neck(64, 16, scale=4).eval()
    calls: list[nn.Module] = []
    for module in block.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda module, *_: calls.append(module))
    block(torch.randn(1, 64, 8, 8))
    assert len(calls) == len(set(calls)) == 5


@pytest.mark.parametrize(
    ('arguments', 'named'),
    [
        (dict(first_block='caffe'), 'first_block'),
        (dict(scale=0), 'scale'),
        (dict(cardinality=0), 'cardinality'),
        (dict(base_width=3), 'base_width'),
        (dict(reduce_first=2), 'block_reduce_first'),
        (dict(aa_layer=nn.AvgPool2d), 'aa_layer'),
        (dict(attn_layer='sea'), 'attn_layer'),
    ],
)
def test_block_unsupported_argument_raises_value_error_with_its_name(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Bottle2neck(64, 16, **arguments)


def test_grad_checkpointing_repeated_backward_keeps_norm_statistics() -> None:
    torch.manual_seed(0)
    stage = randomise(Stage(*(Bottle2neck(64, 16) for _ in range(2))))
    stage.grad_checkpointing = True  # type: ignore[assignment]
    y = stage(torch.randn(2, 64, 8, 8, requires_grad=True)).sum()
    before = {name: buffer.clone() for name, buffer in stage.named_buffers()}
    y.backward(retain_graph=True)
    y.backward()
    torch.testing.assert_close(dict(stage.named_buffers()), before, rtol=0, atol=0)


def test_block_group_equals_one_grouped_convolution_over_all_splits() -> None:
    block: Any = Bottle2neck(32, 16, 2, projection(32, 64, 2), cardinality=2, scale=3, first_block='group')
    x = torch.randn(2, block.conv1.out_channels, 8, 8)
    weight = torch.cat([conv.weight for conv in block.convs])
    one = F.conv2d(x, weight, stride=2, padding=1, groups=6)
    torch.testing.assert_close(torch.cat([conv(y) for conv, y in zip(block.convs, x.chunk(3, 1))], 1), one)


def test_block_last_act_false_omits_last_activation() -> None:
    x = torch.randn(2, 64, 8, 8)
    assert (Bottle2neck(64, 16, last_act=False)(x) < 0).any()
    assert not (Bottle2neck(64, 16)(x) < 0).any()


@pytest.mark.parametrize(('function', 'scale'), list(product(FIRST_BLOCKS, (1, 2, 4))))
def test_block_caffe_style_equals_equations(function: str, scale: int) -> None:
    torch.manual_seed(0)
    arguments = dict(scale=scale, first_block=function, style='caffe')
    block = Bottle2neck(32, 16, 2, projection(32, 64, 2), **arguments)
    randomise(block.double()).eval()
    x = torch.randn(2, 32, 7, 8, dtype=torch.double)
    torch.testing.assert_close(block(x), published(block, x, function, 'later stage', 2, 'caffe'))
    torch.testing.assert_close(block.fuse()(x), block(x))


def test_block_unknown_style_raises_value_error() -> None:
    with pytest.raises(ValueError, match="style='tensorflow' is not known; choose from pytorch, caffe"):
        Bottle2neck(64, 16, style='tensorflow')


class Zero(nn.Module):
    """Drops everything, as stochastic depth does now and then."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_block_drop_path_acts_on_the_branch_before_the_sum() -> None:
    torch.manual_seed(0)
    block = Bottle2neck(64, 16, drop_path=Zero())
    x = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(block(x), F.relu(x), rtol=0, atol=0)


def test_block_of_one_split_is_exported_without_splitting() -> None:
    block = Bottle2neck(16, 8, scale=1, base_width=64, downsample=nn.Conv2d(16, 32, 1)).eval()
    program = torch.export.export(block, (torch.randn(1, 16, 8, 8),))
    operators = {str(node.target) for node in program.graph.nodes if node.op == 'call_function'}
    assert 'aten.conv2d.default' in operators
    assert not [name for name in operators if 'chunk' in name or 'split' in name or 'cat' in name]
