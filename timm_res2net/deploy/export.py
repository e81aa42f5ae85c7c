"""Exports a model to a small file that runs without this package, and verifies the file before it appears."""

import hashlib
import json
import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from timm.data import resolve_model_data_config
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .._errors import first_line
from .._files import PathLike, require_writable, sync, temporary_folder
from ..models.block import spec_of
from ..models.checks import require_finite_weights
from ..models.classifier import class_names, model_name, with_channels
from ..version import __version__
from .backends import Backend, find_backend, requires_extra
from .calibration import Images, calibration_images, repeat_to_whole_batches
from .exported import load_exported, parse_record
from .fuse import fuse_in_float32
from .inference import TOLERANCES, ForInference
from .program import Exportable, Program

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """An exported file, and how far its outputs are from the model's."""

    file: Path
    bytes: int  # including the .bin
    largest_difference: float  # between outputs, relative to the largest output of the model
    mean_difference: float  # root mean square, relative to that of the model's outputs
    agreement: float | None  # share of images with the same predicted class; None for features
    images: int  # number of images compared
    path: str  # steps that made the file, such as 'fused, ONNX, float32'


def export(
    model: nn.Module,
    file: PathLike,
    *,
    precision: str = 'float32',
    images: Images | None = None,
    batch: int | None = None,
    size: int | tuple[int, int] | None = None,
    dynamic_size: bool = False,
    opset: int | None = None,
    symmetric: bool = False,
) -> Export:
    """Exports a model, fused, to a file that is loaded and compared with the model before it appears.

    The file takes preprocessed float32 images and returns float32. The comparison uses the format's own runtime, at two
    batch sizes and three image sizes where those are not fixed. The file's metadata, JSON under the key `timm_res2net`,
    records architecture, function, precision, preprocessing, class names, license, origin, names and strides of the
    outputs, the SHA-256 of the weights (of the state dict sorted by name, as `safetensors.torch.save` writes it), and
    the version of this package.

    Args:
        model: Model of this package in evaluation mode, also with `features_only`. It is not changed.
        file: File to write: `.onnx`, `.xml` (with a `.bin`) for OpenVINO, or `.pt2` for torch. It must not exist.
        precision: 'float32', 'float16', 'bfloat16' (not in `.onnx`) or 'int8' (not in `.pt2`).
        images: Images to calibrate int8 with and to compare outputs on: (N, C, H, W), a DataLoader, or a folder. If
            None, outputs are compared on random images.
        batch: Fixed batch size; any if None.
        size: Height and width in pixels; those of the model's configuration if None.
        dynamic_size: Accept any height and width; `size` is then the one to calibrate and preprocess with.
        opset: Version of the ONNX operators, 18 to 23, 20 if None; `.onnx` only.
        symmetric: Quantize to signed 8 bits without zero points, as TensorRT requires; int8 in `.onnx` only.

    Returns:
        The `Export`: the file, its size, and its differences from the model.

    Raises:
        ValueError: If an argument is invalid, the model cannot be exported, or the file's outputs are wrong.
        ImportError: If the format's runtime is not installed.
        OSError: If the file cannot be written.

    Example:
        >>> model = timm.create_model('test_res2net.digits', pretrained=True).eval()
        >>> done = timm_res2net.export(model, 'digits.onnx', dynamic_size=True)
        >>> done.largest_difference < 1e-4, done.agreement
        (True, 1.0)
    """
    path, backend = Path(file), find_backend(file)
    if precision not in backend.precisions:
        choices = ', '.join(backend.precisions)
        raise ValueError(f'{path.suffix} does not support precision={precision!r}. Choose from {choices}.')
    if (opset or symmetric) and path.suffix != '.onnx':
        raise ValueError(f'opset and symmetric have no effect on {path.suffix}. They are for .onnx.')
    if symmetric and precision != 'int8':
        raise ValueError(f"symmetric has no effect on {precision}. It is for precision='int8'.")
    require_free(path)
    require_writable(path)
    if any(isinstance(module, ForInference) for module in model.modules()):
        raise ValueError('cannot export an optimized or exported model. Export the original model.')
    model = unwrap_model(model)
    require_finite_weights(model)
    fused = fuse_in_float32(model)
    record = describe(model, backend, precision, batch, size, dynamic_size)
    record = parse_record(json.dumps(record))  # checks it as when the file is loaded
    shape = record['pretrained_cfg']['input_size']
    given = calibration_images(model, images, tuple(shape)) if images is not None or precision == 'int8' else None
    program = Program(
        module=Exportable(fused, precision),
        example=torch.zeros(batch or 2, *shape),
        record=record,
        calibration=given if precision == 'int8' else None,
        opset=opset,
        symmetric=symmetric,
    )
    try:
        with temporary_folder(path.parent) as folder:
            write(backend, program, folder / path.name)
            differences = verify(Exportable(model, 'float32'), folder / path.name, record, given)
            publish(folder, path)
    except OSError as error:
        raise OSError(f'cannot write {str(path)!r}: {first_line(error)}') from error
    total = sum(part.stat().st_size for part in parts_of(path))
    steps = f'fused, {backend.format}, {precision}{", symmetric" if symmetric else ""}'
    return Export(file=path, bytes=total, path=steps, **differences)


def parts_of(path: Path) -> list[Path]:
    return [path, path.with_suffix('.bin')] if path.suffix == '.xml' else [path]


def require_free(path: Path) -> None:
    for part in parts_of(path):
        if os.path.lexists(part):
            raise ValueError(f'cannot write {str(part)!r}: it already exists. Move it away, or choose another name.')


def write(backend: Backend, program: Program, file: Path) -> None:
    """Writes a program with its backend; ValueError if the exporter fails."""
    try:
        with requires_extra(f'exporting to {file.suffix}'), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # exporters warn about their own internals
            backend.write(program, file)
    except (OSError, ImportError):
        raise
    except Exception as error:  # exporters can raise anything
        name, precision = program.record['architecture'], program.record['precision']
        _logger.debug('cannot export %s', name, exc_info=True)
        raise ValueError(f'cannot export {name} to {file.suffix}, {precision}: {first_line(error)}') from error


def publish(folder: Path, path: Path) -> None:
    """Moves verified files to their final names, the .bin first: an .xml never appears without its weights."""
    parts = parts_of(path)
    for part in parts:
        sync(folder / part.name)
    require_free(path)  # another export may have been faster
    for part in reversed(parts):
        os.replace(folder / part.name, part)
    sync(path.parent)


def describe(
    model: nn.Module,
    backend: Backend,
    precision: str,
    batch: int | None,
    size: int | tuple[int, int] | None,
    dynamic_size: bool,
) -> dict[str, Any]:
    """Makes the record that goes into a file's metadata."""
    cfg: dict[str, Any] = getattr(model, 'pretrained_cfg', None) or {}
    channels = next(parameter.shape[1] for parameter in model.parameters() if parameter.dim() == 4)
    config = with_channels(resolve_model_data_config(model), channels)
    height, width = (size, size) if isinstance(size, int) else size or config['input_size'][1:]
    info: Any = getattr(model, 'feature_info', None)
    features = not hasattr(model, 'forward_head')
    if features and info is None:
        raise ValueError(f'cannot export a {model_name(model)}: it is not a timm model. Export the model inside it.')
    spec = spec_of(model)
    assert spec is not None  # or `fuse` would have refused the model
    if features:
        outputs = [{'name': each['module'], 'stride': each['reduction']} for each in info.get_dicts()]
        names = []
    else:
        outputs, names = [{'name': 'logits'}], class_names(model)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(model.state_dict().items())}
    return dict(
        architecture=model_name(model),
        function=spec.as_text(),
        format=backend.format,
        precision=precision,
        input=[batch, channels, *((None, None) if dynamic_size else (height, width))],
        outputs=outputs,
        features=features,
        pretrained_cfg={
            'architecture': model_name(model),
            **{key: cfg[key] for key in ('license', 'origin_url', 'tag', 'hf_hub_id') if cfg.get(key)},
            **config,
            'input_size': [channels, height, width],
            'label_names': names,
            'num_classes': len(names),
        },
        weights_sha256=hashlib.sha256(save(state)).hexdigest(),
        version=__version__,
    )


@torch.no_grad()
def verify(model: nn.Module, file: Path, record: dict[str, Any], images: Tensor | None) -> dict[str, Any]:
    """Returns how far the outputs of a file are from the model's, as in `Export`; ValueError if they are too far."""
    loaded = load_exported(file, trust=True)
    batches = make_batches(record, images)
    found, expected = ([[y.flatten() for y in tree_leaves(run(x))] for x in batches] for run in (loaded, model))
    if [[y.shape for y in outputs] for outputs in found] != [[y.shape for y in outputs] for outputs in expected]:
        raise ValueError(f"{file.name} was discarded: its outputs have other shapes than the model's")
    pairs = [(torch.cat(a), torch.cat(b)) for a, b in zip(zip(*found), zip(*expected))]  # for each output
    # Tensor.max() propagates NaN, Python's max() does not.
    largest = torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()
    mean = torch.stack([((a - b).square().mean() / b.square().mean()).sqrt() for a, b in pairs]).max().item()
    tolerance = TOLERANCES[record['precision']]
    if not largest <= tolerance:
        difference = f'{largest:.2%} of the largest output, more than {tolerance:.2%}'
        raise ValueError(f"{file.name} was discarded: its outputs differ from the model's by {difference}")
    same = None
    if loaded.num_classes:
        classes = (predict_classes(each.reshape(-1, loaded.num_classes)) for each in pairs[0])
        same = torch.eq(*classes).float().mean().item()
    return dict(largest_difference=largest, mean_difference=mean, agreement=same, images=sum(map(len, batches)))


def make_batches(record: dict[str, Any], images: Tensor | None) -> list[Tensor]:
    """Makes the batches to compare on: of two batch sizes and three image sizes, where those are not fixed."""
    batch, _, *size = record['input']
    if images is None:
        shape = record['pretrained_cfg']['input_size']
        images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    if batch is not None:
        batches = list(repeat_to_whole_batches(images, batch).split(batch))
    else:
        images = images if len(images) > 1 else images.expand(3, -1, -1, -1)
        batches = [images[:1], *images[1:].split(8)]
    if None in size:
        height, width = images.shape[-2:]
        for other in ((height + 32, width + 16), (height + 13, width + 7)):
            batches.append(F.interpolate(batches[0], other, mode='bilinear'))
    return batches


def predict_classes(logits: Tensor) -> Tensor:
    """Returns the index of the largest logit, or whether the only one is positive."""
    return logits.argmax(1) if logits.shape[1] > 1 else logits[:, 0] > 0
