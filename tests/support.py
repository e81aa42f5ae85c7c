"""What tests share: small models with randomised norms, and helpers to run programs."""

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

ROOT = Path(__file__).parents[1]

# A network of 9,000 parameters, for what has to be done many times.
TINY: dict[str, Any] = dict(layers=(1, 2, 1, 1), channels=(8, 8, 8, 8), stem_width=8, base_width=32, scale=3)


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


@cache
def built(name: str) -> nn.Module:
    """A registered model in evaluation mode with randomised norms."""
    torch.manual_seed(0)
    return randomise(timm.create_model(name)).eval()


def tiny(first_block: str = 'official', **arguments: Any) -> nn.Module:
    """Makes the tiny network in evaluation mode with randomised norms."""
    torch.manual_seed(0)
    model = timm.create_model('test_res2net', **{**TINY, 'num_classes': 4, 'first_block': first_block, **arguments})
    return randomise(model).eval()


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script, or a module after '-m', in two processes."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)
