"""The CIFAR trunk: sizes from the literature, and what it computes."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from support import randomize
from torch import nn

from timm_res2net.models.cifar import Res2NetCifar


def count(**arguments: Any) -> tuple[int, int]:
    """Counts the parameters of a network, with and without its norms."""
    model = Res2NetCifar(device='meta', **arguments)
    of_norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    total = sum(p.numel() for p in model.parameters())
    return total, total - of_norms


@pytest.mark.parametrize(
    ('cardinality', 'base_width', 'scale', 'grouped', 'papers', 'published'),
    [
        (6, 24, 4, 24_360_932, 24_302_116, 23_705_732),
        (8, 25, 4, 33_905_236, 33_829_172, 32_957_436),
        (6, 24, 6, 36_801_380, 36_718_372, 36_146_180),
    ],
)
def test_cifar_variants_have_published_parameter_counts(
    cardinality: int, base_width: int, scale: int, grouped: int, papers: int, published: int
) -> None:
    arguments = dict(cardinality=cardinality, base_width=base_width, scale=scale)
    assert count(**arguments) == (grouped, papers)
    assert count(first_block='official', **arguments)[0] == published
    assert count(attn_layer='se', **arguments)[0] - grouped == 521_808
    for number in (papers, published):
        assert f'{number:,}' in ' '.join((Res2NetCifar.__doc__ or '').split())


@torch.inference_mode()
def test_cifar_scale_1_equals_bottlenecks_of_timm() -> None:
    torch.manual_seed(0)
    model = randomize(Res2NetCifar(channels=(8, 16, 32), scale=1, base_width=64, cardinality=8)).eval()
    x = torch.randn(2, 3, 32, 32)
    y = model.act1(model.bn1(model.conv1(x)))
    for stage, planes in zip((model.layer1, model.layer2, model.layer3), (8, 16, 32)):
        for i, block in enumerate(stage):
            stride = 2 if i == 0 and planes > 8 else 1
            theirs = timm.models.resnet.Bottleneck(y.shape[1], planes, stride, block.downsample, 8, 64).eval()
            state = {k.replace('convs.0', 'conv2').replace('bns.0', 'bn2'): v for k, v in block.state_dict().items()}
            theirs.load_state_dict(state)
            y = theirs(y)
    torch.testing.assert_close(model(x), F.linear(y.mean((2, 3)), model.fc.weight, model.fc.bias))
