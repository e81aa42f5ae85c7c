"""Writes and loads torch.export programs, and quantizes models with torchao."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .inference import Run
from .program import METADATA, Program


def write_torch(program: Program, file: Path) -> None:
    """Writes a torch.export program."""
    exported = torch.export.export(program.module, (program.example,), dynamic_shapes=program.dynamic_shapes)
    content = io.BytesIO()  # torch's own writer aborts the process if the disk is full
    torch.export.save(exported, content, extra_files=program.metadata)
    file.write_bytes(content.getbuffer())


def load_torch(file: Path) -> tuple[str, Callable[[str], Run]]:
    """Loads a file, which can run any code in it; returns its record, and a function that returns its `Run`."""
    if not zipfile.is_zipfile(file):  # torch would log a traceback
        raise ValueError('it is not a torch.export program')
    extra_files = {METADATA: ''}
    program = torch.export.load(file, extra_files=extra_files).module()

    @torch.no_grad()
    def run(images: Tensor) -> list[Tensor]:
        return list(program(images))

    return extra_files[METADATA], lambda precision: run


@torch.no_grad()
def quantize_torch(model: nn.Module, images: Tensor) -> nn.Module:
    """Quantizes a fused model with torchao for x86; the result is slow until torch.compile compiles it."""
    from torch._inductor import config

    with config.patch(pre_grad_custom_pass=config.pre_grad_custom_pass):  # the import changes it globally
        from torchao.quantization.pt2e import allow_exported_model_train_eval
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    example = images[:1].repeat(2, 1, 1, 1)  # torch.export specializes on a batch of one
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim('batch', min=1)},)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program, quantizer)
    for batch in images.split(8):
        prepared(batch)
    quantized: nn.Module = allow_exported_model_train_eval(convert_pt2e(prepared))
    return quantized
