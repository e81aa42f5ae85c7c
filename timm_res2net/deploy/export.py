"""Exports a model to a small file that runs without this package, and verifies the file before it appears."""

import contextlib
import copy
import hashlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ..models.block import function_of
from ..models.classifier import class_names, model_name, require_finite_weights, with_channels
from ..version import __version__
from ..weights.errors import first_line
from ..weights.files import PathLike, sync, temporary_folder
from .fuse import fuse
from .optimize import ForInference
from .quantize import Images, calibration_images, convert_to_openvino, quantize_onnx, whole_batches
from .runtimes import METADATA, SUFFIXES, load_exported, require_runtime

__all__ = ['PRECISIONS', 'TOLERANCES', 'Export', 'export']

_logger = logging.getLogger(__name__)

PRECISIONS = {  # that can be had in a format
    '.onnx': ('float32', 'float16', 'int8'),  # onnxruntime's CPU kernels don't compute bfloat16
    '.xml': ('float32', 'float16', 'bfloat16', 'int8'),
    '.pt2': ('float32', 'float16', 'bfloat16'),
}
# Largest difference to the model, relative to its largest output, at which a file is still right. The loss by 8 bits
# depends on the weights and on the images to calibrate with; a model that computes nonsense is far beyond this.
TOLERANCES = {'float32': 1e-4, 'float16': 2e-2, 'bfloat16': 1e-1, 'int8': 5e-1}
OPSET = 20  # of ONNX; runtimes since the end of 2023 have it


@dataclass(frozen=True)
class Export:
    """A file that was exported, loaded by its own runtime, and compared with the model that it was made of."""

    file: Path
    bytes: int  # with its .bin
    largest_difference: float  # of the outputs, relative to the model's largest
    mean_difference: float  # the root of the mean square, relative to that of the model's outputs
    agreement: float | None  # share of the images with the same likeliest class; None for features
    images: int  # that were compared
    path: str  # what was done, such as 'fused, ONNX, float32'


def export(
    model: nn.Module,
    file: PathLike,
    *,
    precision: str = 'float32',
    images: Images | None = None,
    batch: int | None = None,
    size: int | tuple[int, int] | None = None,
    compile: bool = False,
) -> Export:
    """Exports a model, fused, and verifies the file.

    The file takes float32 images, preprocessed, and returns float32. It says in its own metadata, under the key
    `timm_res2net`, what it is: architecture and function, precision, preprocessing, class names, licence and origin,
    names and strides of its outputs, the SHA-256 of the weights (of the state dict in the order of its names, as
    `safetensors.torch.save` writes it), and the version of this package. It is loaded by its own runtime and compared
    with the model, at two batch sizes if those are free, and only then gets its name.

    Args:
        model: A model of this package in evaluation mode, also one with `features_only`. It is not changed.
        file: What to write: `.onnx`, `.xml` for OpenVINO's IR with a `.bin` beside it, or `.pt2` for torch. It must not
            exist yet.
        precision: 'float32', 'float16', 'bfloat16' or 'int8'; see `PRECISIONS`.
        images: Images to calibrate 8 bits with, and to compare with: (N, C, H, W), a DataLoader, or a folder.
            Random ones are compared if None.
        batch: Batch size, any if None.
        size: Height and width in pixels; those of the model's configuration if None.
        compile: Compile by AOTInductor to machine code of this machine; `.pt2` only.

    Returns:
        `file` and its `bytes`, `largest_difference` and `mean_difference` from the model, the `agreement` of likeliest
        classes (None for features), how many `images` were compared, and the `path` to it: what was done.

    Raises:
        ValueError: If an argument is not possible, the model can't be exported, or the file computes something else.
        ImportError: If the format's runtime is not installed.
        OSError: If the file can't be written.
    """
    path = Path(file)
    require_possible(path, precision, compile)
    require_counts(batch=batch, size=size)
    if any(isinstance(module, ForInference) for module in model.modules()):
        raise ValueError('an optimized model can not be exported; give the model that it was made from')
    require_finite_weights(model)
    require_runtime(path.suffix, write=True)
    fused = fuse(model)
    record = describe(model, path.suffix, precision, batch, size)
    shape = tuple(record['input'][1:])
    given = calibration_images(model, images, shape) if images is not None or precision == 'int8' else None
    program = Exportable(fused, getattr(torch, precision if precision != 'int8' else 'float32')).eval()
    with in_temporary_folder(path) as folder:
        unverified = folder / path.name
        try:
            with quiet():
                write(program, unverified, record, given, compile)
        except (OSError, ImportError):
            raise
        except Exception as error:  # whatever an exporter raises for what it can't express
            _logger.debug('no export of %s', model_name(model), exc_info=True)
            raise ValueError(
                f'{model_name(model)} can not be exported to {path.suffix}, {precision}: {first_line(error)}'
            ) from error
        result = verify(Exportable(model, torch.float32).eval(), unverified, record, given, compile)
        for part in reversed(parts_of(path)):  # what names the other one comes last
            sync(folder / part.name)
            os.replace(folder / part.name, part)
        sync(path.parent)
    return Export(path, **result)


def require_possible(path: Path, precision: str, compile: bool) -> None:
    """Raises an error for a file that can't be written, or a precision that its format doesn't have."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f'{path} has no known suffix; choose {", ".join(SUFFIXES)}')
    if precision not in PRECISIONS[path.suffix]:
        choices = ', '.join(PRECISIONS[path.suffix])
        raise ValueError(f'precision={precision!r} is not possible in {path.suffix}; choose from {choices}')
    if compile and path.suffix != '.pt2':
        raise ValueError(f'compile is for .pt2, and {path} is another format')
    for part in parts_of(path):
        if os.path.lexists(part):
            raise ValueError(f'there is a {part} already; name another file, or move it away')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'there is no folder {path.parent} to write {path.name} to')


def require_counts(**values: Any) -> None:
    """Raises a ValueError for a batch or size that is given and is no number above zero, or two."""
    for name, value in values.items():
        numbers = value if isinstance(value, tuple) and len(value) == 2 and name == 'size' else (value,)
        if value is not None and not all(isinstance(number, int) and number > 0 for number in numbers):
            raise ValueError(f'{name}={value!r} is not possible; give a number above zero')


def parts_of(path: Path) -> list[Path]:
    """All files that are written for one."""
    return [path, path.with_suffix('.bin')] if path.suffix == '.xml' else [path]


def describe(
    model: nn.Module, suffix: str, precision: str, batch: int | None, size: int | tuple[int, int] | None
) -> dict[str, Any]:
    """What a file says of itself."""
    cfg: dict[str, Any] = getattr(model, 'pretrained_cfg', None) or {}
    channels = next(parameter.shape[1] for parameter in model.parameters() if parameter.dim() == 4)
    config = with_channels(resolve_model_data_config(model), channels)
    height, width = (size, size) if isinstance(size, int) else size or config['input_size'][1:]
    info: Any = getattr(model, 'feature_info', None)
    features = not hasattr(model, 'forward_head')
    if features and info is None:
        raise ValueError(f'{model_name(model)} is no model of timm; export that which is in it')
    function = function_of(model)
    assert function is not None  # or `fuse` would have refused the model
    keys = ('license', 'origin_url', 'tag', 'hf_hub_id')
    if features:
        outputs = [{'name': each['module'], 'stride': each['reduction']} for each in info.get_dicts()]
        names = []
    else:
        outputs, names = [{'name': 'logits'}], class_names(model)
    return dict(
        architecture=model_name(model),
        function=function.as_text(),
        format={'.onnx': 'ONNX', '.xml': 'OpenVINO', '.pt2': 'torch'}[suffix],
        precision=precision,
        input=[batch, channels, height, width],
        outputs=outputs,
        features=features,
        num_classes=len(names),
        pretrained_cfg={
            'architecture': model_name(model),
            **{key: cfg[key] for key in keys if cfg.get(key)},
            **config,
            'input_size': [channels, height, width],
            'label_names': names,
            'num_classes': len(names),
        },
        weights_sha256=hashlib.sha256(
            save({name: tensor.detach().cpu().contiguous() for name, tensor in sorted(model.state_dict().items())})
        ).hexdigest(),
        version=__version__,
    )


class Exportable(nn.Module):
    """A copy of a model on the CPU that takes and returns float32, and computes in a data type; features as a tuple."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).to('cpu', dtype)
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Runs the model on (N, C, H, W)."""
        outputs = self.model(images.to(self.dtype))
        if isinstance(outputs, Tensor):
            return outputs.float()
        values = outputs.values() if isinstance(outputs, dict) else outputs
        return tuple(output.float() for output in values)


def write(program: Exportable, file: Path, record: dict[str, Any], images: Tensor | None, compile: bool) -> None:
    """Writes a file in the format of its suffix, with the record in its metadata."""
    batch, *shape = record['input']
    example = torch.zeros(batch or 2, *shape)
    text = json.dumps(record)
    names = [output['name'] for output in record['outputs']]
    int8 = images if record['precision'] == 'int8' else None
    if file.suffix == '.onnx':
        write_onnx(program, file, example, batch is None, names, text, int8)
    elif file.suffix == '.xml':
        write_openvino(program, file, example, batch is None, names, text, int8)
    else:
        write_torch(program, file, example, batch is None, text, compile)


def write_onnx(
    program: nn.Module, file: Path, example: Tensor, free: bool, names: list[str], text: str, images: Tensor | None
) -> None:
    """Writes ONNX by torch's exporter, quantized if images are given."""
    import onnx

    unquantized = file if images is None else file.with_name('unquantized.onnx')
    torch.onnx.export(
        program,
        (example,),
        unquantized,
        dynamo=True,
        opset_version=OPSET,
        input_names=['images'],
        output_names=names,
        dynamic_shapes=({0: torch.export.Dim('batch', min=1)},) if free else None,
        external_data=False,
        verbose=False,
    )
    if images is not None:
        quantize_onnx(unquantized, file, images, 1 if free else len(example))
    model = onnx.load(file)
    onnx.helper.set_model_props(model, {METADATA: text})
    onnx.checker.check_model(model)
    onnx.save(model, file)


def write_openvino(
    program: nn.Module, file: Path, example: Tensor, free: bool, names: list[str], text: str, images: Tensor | None
) -> None:
    """Writes OpenVINO's IR, quantized if images are given."""
    import openvino

    model = convert_to_openvino(program, example, -1 if free else len(example), images)
    model.inputs[0].get_tensor().set_names({'images'})
    for output, name in zip(model.outputs, names):
        output.get_tensor().set_names({name})
    model.set_rt_info(text, [METADATA])
    try:
        openvino.save_model(model, file, compress_to_fp16=False)
    except RuntimeError as error:
        raise OSError(f'OpenVINO can not write it, perhaps the disk is full: {first_line(error)}') from error


def write_torch(program: nn.Module, file: Path, example: Tensor, free: bool, text: str, compile: bool) -> None:
    """Writes a program of torch.export, or a package that AOTInductor compiled of it."""
    shapes = ({0: torch.export.Dim('batch', min=1)},) if free else None
    exported = torch.export.export(program, (example,), dynamic_shapes=shapes)
    if compile:
        configs = {'aot_inductor.metadata': {METADATA: text}}
        torch._inductor.aoti_compile_and_package(exported, package_path=str(file), inductor_configs=configs)
    else:
        content = io.BytesIO()  # on a full disk torch would end the process
        torch.export.save(exported, content, extra_files={METADATA: text})
        file.write_bytes(content.getbuffer())


@torch.no_grad()
def verify(
    program: nn.Module, file: Path, record: dict[str, Any], images: Tensor | None, compiled: bool
) -> dict[str, Any]:
    """Loads a file by its runtime and compares it with the model.

    Returns:
        The fields of an `Export`.

    Raises:
        ValueError: If it computes something else.
    """
    loaded = load_exported(file)
    batch, *shape = record['input']
    if images is None:
        images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    if batch is not None:
        images = whole_batches(images, batch)
        batches = list(images.split(batch))
    else:
        images = images if len(images) > 1 else images.expand(3, -1, -1, -1)
        batches = [images[:1], *images[1:].split(8)]  # two sizes
    expected: list[list[Tensor]] = []
    found: list[list[Tensor]] = []
    for each in batches:
        for side, run in ((expected, program), (found, loaded)):
            outputs = run(each)
            side.append([outputs] if isinstance(outputs, Tensor) else list(outputs))
    theirs = [torch.cat(outputs) for outputs in zip(*expected)]
    ours = [torch.cat(outputs) for outputs in zip(*found)]
    if [output.shape for output in ours] != [output.shape for output in theirs]:
        raise ValueError(f'{file.name} returns other shapes than the model, and was not kept')
    pairs = list(zip(ours, theirs))
    # Of tensors max() passes NaN on, Python's own does not.
    difference = torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()
    mean = torch.stack([((a - b).square().mean() / b.square().mean()).sqrt() for a, b in pairs]).max().item()
    tolerance = TOLERANCES[record['precision']]
    if not difference <= tolerance:
        raise ValueError(
            f'{file.name} computes something else than the model, up to {difference:.2%} of the largest output where '
            f'{tolerance:.2%} is usual at most, and was not kept'
        )
    same = None if record['features'] else float((ours[0].argmax(1) == theirs[0].argmax(1)).float().mean())
    path = ['fused', record['format'], record['precision'], *(['compiled'] if compiled else [])]
    return dict(
        bytes=sum(part.stat().st_size for part in parts_of(file)),
        largest_difference=difference,
        mean_difference=mean,
        agreement=same,
        images=len(images),
        path=', '.join(path),
    )


@contextlib.contextmanager
def in_temporary_folder(path: Path) -> Iterator[Path]:
    """Makes a temporary folder beside a file; an OSError is of the file that can't be written."""
    try:
        with temporary_folder(path.parent) as folder:
            yield folder
    except OSError as error:
        raise OSError(f'{path} can not be written: {first_line(error)}') from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps exporters' warnings and progress from the user, to whom they say nothing."""
    with warnings.catch_warnings(), open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter('ignore')
        yield
