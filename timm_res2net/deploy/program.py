"""The program that a backend writes to a file: a model with its input, and the record that describes both."""

import copy
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..weights.config import RECORD


class Exportable(nn.Module):
    """A copy of a model on the CPU that computes in a given precision, but takes and returns float32, in a tuple."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        super().__init__()
        self.dtype = torch.float32 if precision == 'int8' else getattr(torch, precision)
        self.model = copy.deepcopy(model).to('cpu', self.dtype)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.float() for output in tree_leaves(self.model(images.to(self.dtype))))


@dataclass(frozen=True)
class Program:
    """A model that is ready to be written."""

    module: Exportable
    example: Tensor  # (N, C, H, W)
    record: dict[str, Any]  # for the file's metadata
    calibration: Tensor | None  # images (N, C, H, W) to quantize to int8 with; None for other precisions
    opset: int | None = None  # of ONNX; the default one if None
    symmetric: bool = False  # quantize to signed integers without zero points, in ONNX

    @property
    def dynamic(self) -> tuple[int, ...]:
        """Dimensions of the input that are free."""
        return tuple(i for i, size in enumerate(self.record['input']) if size is None)

    @property
    def dynamic_shapes(self) -> tuple[dict[int, Any]] | None:
        """The free dimensions, as torch's exporters expect them."""
        dims = {0: torch.export.Dim('batch', min=1), 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
        return ({i: dims[i] for i in self.dynamic},) if self.dynamic else None

    @property
    def outputs(self) -> list[str]:
        return [output['name'] for output in self.record['outputs']]

    @property
    def metadata(self) -> dict[str, str]:
        return {RECORD: json.dumps(self.record)}
