"""Shared parts of inference-only models: optimized models and exported files."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

# Largest difference from the original model, relative to its largest output, that still counts as correct. In int8, the
# difference depends on the weights and calibration images; a model that computes nonsense exceeds the limit by far.
TOLERANCES = {'float32': 1e-4, 'float16': 2e-2, 'bfloat16': 1e-1, 'int8': 5e-1}

Run = Callable[[Tensor], list[Tensor]]  # float32 images (N, C, H, W) on the CPU -> outputs
Outputs = Any  # a tensor, or a list or dict of features


class ForInference(nn.Module):
    """An inference-only model: it has no gradients, and stays in evaluation mode."""

    path: str  # the steps that made it, such as 'fused, channels last, bfloat16, compiled'

    def train(self, mode: bool = True) -> 'ForInference':
        """Stays in evaluation mode, even inside a model that is trained."""
        return super().train(False)

    def extra_repr(self) -> str:
        return self.path


def run_batch(run: Run, images: Tensor, shape: Sequence[int | None]) -> list[Tensor]:
    """Runs images (N, C, H, W) in another runtime; ValueError unless they fit `shape`, where None means any size."""
    if images.dim() != 4 or any(size not in (None, have) for size, have in zip(shape, images.shape)):
        expected = ', '.join(name if size is None else str(size) for size, name in zip(shape, 'NCHW'))
        raise ValueError(f'images must be ({expected}), got {tuple(images.shape)}')
    require_floating_point(images)
    given = images if len(images) else images.new_zeros(1, *images.shape[1:])  # OpenVINO cannot run an empty batch
    outputs = run(given.detach().cpu().float().contiguous())
    return [output[: len(images)] for output in outputs]


def require_floating_point(images: Tensor) -> None:
    """Raises a ValueError for integer images: outputs would be cast to their dtype, and wrap around."""
    if not images.is_floating_point():
        raise ValueError(f'images must be floating-point, got {images.dtype}. Preprocess them with the timm transform.')


def finish(outputs: Outputs, images: Tensor) -> Outputs:
    """Casts outputs to the dtype of the images, and sets those of images with NaN or infinity to NaN.

    Compilers and OpenVINO compute max(NaN, 0) = 0, so a damaged image would otherwise get plausible scores.
    """
    finite = find_finite(images)
    all_finite = finite.is_cpu and bool(finite.all())  # on a GPU, this would wait for all pending work

    def finish_one(output: Tensor) -> Tensor:
        output = output.to(images.dtype)
        return output if all_finite else output.where(finite.reshape(-1, *[1] * (output.dim() - 1)), torch.nan)

    return tree_map(finish_one, outputs)


def find_finite(images: Tensor) -> Tensor:
    """Returns for each image whether all of its values are finite, (N,).

    Uses numpy where possible: torch's threads, once woken, spin for 4 ms while they wait for more work. That keeps a
    core busy for a quarter of the time that OpenVINO takes for an image in int8.
    """
    if images.is_cpu and images.dtype != torch.bfloat16:  # numpy has no bfloat16
        return torch.from_numpy(np.isfinite(images.detach().numpy()).all(axis=(1, 2, 3)))
    return images.isfinite().flatten(1).all(dim=1)
