"""The program that a backend writes to a file: a model with its input, and everything that describes both."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

METADATA = 'timm_res2net'  # the key of our record in a file's own metadata


class Exportable(nn.Module):
    """A copy of a model on the CPU that computes in any dtype and takes and returns float32; features as a tuple."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).to('cpu', dtype)
        self.dtype = dtype
        self.eval()

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = self.model(images.to(self.dtype))
        if isinstance(outputs, Tensor):
            return outputs.float()
        values = outputs.values() if isinstance(outputs, dict) else outputs
        return tuple(output.float() for output in values)


@dataclass(frozen=True)
class Program:
    """A model that is ready to be written."""

    module: Exportable
    example: Tensor  # (N, C, H, W)
    dynamic: tuple[int, ...]  # dimensions of the input that are free
    outputs: tuple[str, ...]  # their names
    record: str  # JSON, for the file's metadata
    calibration: Tensor | None  # images (N, C, H, W) to quantize to int8 with; None for other precisions

    @property
    def dynamic_shapes(self) -> tuple[dict[int, Any]] | None:
        """Its free dimensions, for torch's exporters."""
        dims = {0: torch.export.Dim('batch', min=1), 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
        return ({i: dims[i] for i in self.dynamic},) if self.dynamic else None
