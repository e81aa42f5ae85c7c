"""Small models and images for tests with other libraries."""

from typing import Any

import pytest
import timm
import torch
from support import randomize, small
from torch import Tensor, nn

from timm_res2net.recipes.digits import split

KINDS = 'res2net50_26w_4s', 'res2net50_vd_26w_4s', 'dla60_res2net', 'blres2net50_26w_4s'  # one for each trunk and stem


def make(name: str, **arguments: Any) -> nn.Module:
    """Makes a small model with randomized norms."""
    torch.manual_seed(0)
    return randomize(timm.create_model(name, **small(name), **arguments))


def digits(part: str, count: int) -> Tensor:
    """Returns digits, preprocessed for the embedded model, (N, 3, 32, 32)."""
    images = torch.from_numpy(split()[part][0][:count]).float().div(255)  # (N, 8, 8)
    enlarged = torch.nn.functional.interpolate(images[:, None], size=32, mode='bicubic', antialias=True)
    return (enlarged.expand(-1, 3, -1, -1) - 0.5) / 0.5


def assert_gradient_reaches_first_layer(model: nn.Module, loss: Tensor) -> None:
    loss.backward()
    first = next(parameter for parameter in model.parameters() if parameter.ndim == 4)
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """The name of a model, one for each trunk and stem."""
    return request.param
