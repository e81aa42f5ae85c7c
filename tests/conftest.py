"""What all tests share."""

import os
from collections.abc import Callable
from functools import cache

os.environ['HF_HUB_OFFLINE'] = '1'  # read when huggingface_hub is imported, by timm; for this and for child processes

import pytest
import timm
import torch
from torch import nn

import timm_res2net  # noqa: F401 - registers the models


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
