"""Deformable convolutions sample at their offsets, and train, export and fuse like plain ones."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import tiny
from torch import Tensor, nn

from timm_res2net import fuse
from timm_res2net.models.layers import DeformableConv2d

DEFORMABLE: dict[str, Any] = dict(deformable=(None, 'v1', 'v2', 'v2'))


def with_offsets(model: nn.Module) -> nn.Module:
    """Gives every deformable convolution offsets of about a pixel."""
    for module in model.modules():
        if isinstance(module, DeformableConv2d):
            nn.init.normal_(module.conv_offset.weight, std=0.1)
            nn.init.normal_(module.conv_offset.bias, std=0.5)
    return model


@pytest.mark.parametrize(('version', 'factor'), [('v1', 1.0), ('v2', 0.5)])
def test_deformable_conv_starts_as_a_plain_one_times_its_mask(version: str, factor: float) -> None:
    torch.manual_seed(0)
    conv = DeformableConv2d(6, 8, stride=2, groups=2, version=version).double()
    x = torch.randn(2, 6, 9, 8, dtype=torch.double)
    torch.testing.assert_close(conv(x), factor * F.conv2d(x, conv.weight, stride=2, padding=1, groups=2))


def test_res2net_deformable_initialization_zeroes_offsets() -> None:
    model: Any = with_offsets(tiny(**DEFORMABLE))
    model.init_weights()
    for module in model.modules():
        if isinstance(module, DeformableConv2d):
            assert not module.conv_offset.weight.any()
            assert module.weight.any()


def test_res2net_deformable_gradients_reach_offsets_and_checkpointing_keeps_them(images: Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        model: Any = with_offsets(tiny(**DEFORMABLE)).train()
        model.set_grad_checkpointing(checkpointing)
        model(images).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_fuse_deformable_model_computes_the_same(images: Tensor) -> None:
    model = with_offsets(tiny('group', **DEFORMABLE))  # plain convolutions of such blocks always merge
    expected = model(images)
    torch.testing.assert_close(fuse(model)(images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.slow
def test_res2net_deformable_scripts_traces_and_exports(images: Tensor) -> None:
    model = with_offsets(tiny(**DEFORMABLE))
    expected = model(images)
    for converted in (
        torch.jit.script(model),
        torch.fx.symbolic_trace(model),
        torch.export.export(model, (images,)).module(),
    ):
        torch.testing.assert_close(converted(images), expected, rtol=1e-4, atol=1e-4)
