"""The Big-Little trunk: sizes from the literature, and what its equations compute."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import randomize
from test_block import branch, normalized, pooled
from torch import Tensor, nn

from timm_res2net.models.biglittle import BigLittleModule, Res2NetBigLittle
from timm_res2net.models.block import Bottle2neck

SMALL: dict[str, Any] = dict(layers=(2, 3, 2, 2), base_width=8, scale=3)


@pytest.mark.parametrize(
    ('arguments', 'params'),
    [
        (dict(layers=(4, 8, 18, 3), scale=1, base_width=64), 41_851_560),
        (dict(attn_layer='se'), 29_420_513),
        (dict(base_width=4, cardinality=8), 25_804_264),
    ],
)
def test_biglittle_variants_have_published_parameter_counts(arguments: dict[str, Any], params: int) -> None:
    model = Res2NetBigLittle(device='meta', **arguments)
    assert sum(p.numel() for p in model.parameters()) == params


def conv(x: Tensor, layers: Any, at: int, stride: int = 1) -> Tensor:
    """The convolution and norm at an index of a sequence, written out."""
    weight = layers[at].weight
    return normalized(F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2), layers[at + 1])


def block(x: Tensor, module: Bottle2neck, stride: int, last_relu: bool = True) -> Tensor:
    """A block of Big-Little Net from the equations; a block of stride 2 is a first block, without a cascade."""
    shortcut = pooled(x, 2, True) if stride == 2 else x
    layers = [layer for layer in module.downsample or [] if not isinstance(layer, nn.AvgPool2d)]
    shortcut = conv(shortcut, layers, 0) if layers else shortcut
    y = branch(module, x, 'official', 'later stage' if stride == 2 else 'later block', stride) + shortcut
    return F.relu(y) if last_relu else y


def nearest(x: Tensor, size: torch.Size) -> Tensor:
    """Interpolation to the nearest pixel, as an index."""
    rows, columns = (torch.arange(new) * old // new for new, old in zip(size, x.shape[-2:]))
    return x[..., rows[:, None], columns]


def big_little(x: Tensor, module: BigLittleModule, stride: int) -> Tensor:
    """The Big-Little module from its equations."""
    big = x
    for i, part in enumerate(module.big):
        big = block(big, part, 2 if i == 0 else 1, last_relu=i < len(module.big) - 1)
    little = x
    for part in module.little:
        little = block(little, part, 1)
    little = conv(little, module.little_e, 0)
    return block(F.relu(nearest(big, little.shape[-2:]) + little), module.fusion[0], stride)


def test_biglittle_computes_its_published_equations() -> None:
    torch.manual_seed(0)
    model = randomize(Res2NetBigLittle(**SMALL)).double().eval()
    x = torch.randn(1, 3, 61, 43, dtype=torch.double)

    y = F.relu(normalized(F.conv2d(x, model.conv1.weight, stride=2, padding=3), model.bn1))
    stem = model.bl_init
    little = F.relu(conv(y, stem.little, 0))
    little = F.relu(conv(little, stem.little, 3, stride=2))
    y = F.relu(conv(y, stem.big, 0, stride=2) + conv(little, stem.little, 6))
    y = F.relu(conv(y, stem.fusion, 0))
    y = big_little(y, model.layer1, 2)
    y = big_little(y, model.layer2, 2)
    y = big_little(y, model.layer3, 1)
    for i, part in enumerate(model.layer4):
        y = block(y, part, 2 if i == 0 else 1)
    torch.testing.assert_close(model.forward_features(x), y)


def test_biglittle_little_branch_depth_and_width_follow_alpha_and_beta() -> None:
    model = Res2NetBigLittle((3, 4, 12, 3), alpha=4, beta=2, device='meta')
    assert [len(layer.little) for layer in (model.layer1, model.layer2, model.layer3)] == [1, 1, 5]
    assert [len(layer.big) for layer in (model.layer1, model.layer2, model.layer3)] == [2, 3, 11]
    assert model.layer3.little_e[0].in_channels == 1024 // 4
    assert model.bl_init.little[0].out_channels == 16
