"""Writes and loads torch.export programs."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..weights.config import RECORD
from .inference import Run
from .program import Program


def write_torch(program: Program, file: Path) -> None:
    exported = torch.export.export(program.module, (program.example,), dynamic_shapes=program.dynamic_shapes)
    content = io.BytesIO()  # torch's own writer aborts the process if the disk is full
    torch.export.save(exported, content, extra_files=program.metadata)
    file.write_bytes(content.getbuffer())


def load_torch(file: Path) -> tuple[str, Callable[[str], Run]]:
    """Loads a file, which can run any code in it; returns its record, and a function that returns its `Run`."""
    if not zipfile.is_zipfile(file):  # torch would log a traceback
        raise ValueError('it is not a torch.export program')
    extra_files = {RECORD: ''}
    program = torch.export.load(file, extra_files=extra_files).module()

    @torch.no_grad()
    def run(images: Tensor) -> list[Tensor]:
        return list(program(images))

    return extra_files[RECORD], lambda precision: run
