"""Runs exported files: ONNX by onnxruntime, OpenVINO's IR by OpenVINO, and torch's own programs."""

import json
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..models.function import Function
from ..weights.errors import CheckpointError, first_line
from ..weights.files import PathLike

__all__ = [
    'METADATA',
    'SUFFIXES',
    'ExportedModel',
    'Outputs',
    'compile_openvino',
    'finish',
    'load_exported',
    'require_floating_point',
    'require_runtime',
]

METADATA = 'timm_res2net'  # the key of our record in a file's own metadata
SUFFIXES = '.onnx', '.xml', '.pt2'

Outputs = Tensor | list[Tensor] | dict[str, Tensor]
T = TypeVar('T', bound=Outputs)
Run = Callable[[Tensor], list[Tensor]]


class ExportedModel(nn.Module):
    """A model in an exported file, which its own runtime runs on the CPU.

    Attributes:
        record: What the file says of itself: `architecture`, `function`, `precision`, `pretrained_cfg`, `outputs` and
            more, see `timm_res2net.export`.
        pretrained_cfg: timm's configuration, for `timm.data.resolve_model_data_config`.
        num_classes: Classes, 0 if it returns features.
    """

    def __init__(self, run: Run, record: dict[str, Any]) -> None:
        super().__init__()
        self.run = run
        self.record = record
        self.pretrained_cfg: dict[str, Any] = record['pretrained_cfg']
        self.num_classes: int = record['num_classes']
        self.path = f'{record["format"]}, {record["precision"]}'

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Runs the model, (N, C, H, W) to (N, num_classes), or to a list of features; float32.

        Of an image with a value that is not finite all outputs are NaN.

        Raises:
            ValueError: For images of another shape than the model was exported for, or of integers.
        """
        batch, *shape = self.record['input']
        if list(images.shape[1:]) != shape or (batch is not None and len(images) != batch):
            wanted = ', '.join(['N' if batch is None else str(batch), *map(str, shape)])
            raise ValueError(f'images are {tuple(images.shape)}; this was exported for ({wanted})')
        require_floating_point(images)
        given = images if len(images) else images.new_zeros(1, *shape)  # OpenVINO returns a row for no image
        outputs = [output[: len(images)] for output in self.run(given.detach().cpu().float().contiguous())]
        return finish(outputs if self.record['features'] else outputs[0], images.cpu().float())

    def extra_repr(self) -> str:
        return f'{self.record["architecture"]}: {self.path}'


def load_exported(file: PathLike) -> ExportedModel:
    """Loads a file that `timm_res2net.export` wrote. It is a program: load only what you trust.

    Args:
        file: .onnx, .xml with its .bin beside it, or .pt2.

    Raises:
        CheckpointError: If the file can't be read, or was not written by this package.
        ImportError: If its runtime is not installed.
        ValueError: For another suffix.
    """
    path = Path(file)
    if path.suffix not in SUFFIXES:
        raise ValueError(f'{path} is of no known format; choose {", ".join(SUFFIXES)}')
    if not path.is_file():
        raise CheckpointError(f'{path} can not be opened: there is no such file')
    require_runtime(path.suffix)
    load = {'.onnx': load_onnx, '.xml': load_openvino, '.pt2': load_torch}[path.suffix]
    try:
        run, text = load(path)
        record = json.loads(text) if text else None
        if record is not None:
            Function.from_text(record['function'])
            return ExportedModel(run, record).eval()
    except Exception as error:  # whatever a runtime raises for a file that it can't read
        raise CheckpointError(f'{path} can not be loaded: {first_line(error)}') from error
    raise CheckpointError(f'{path} was not written by timm_res2net.export: it does not say how to preprocess images')


def require_runtime(suffix: str, write: bool = False) -> None:
    """Raises an ImportError if what a format needs, to be read or also to be written, is not installed."""
    try:
        if suffix == '.onnx':
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401

            if write:
                import onnxscript  # noqa: F401
        elif suffix == '.xml':
            import openvino  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{suffix} files need it: {error}; pip install "timm_res2net[deploy]"') from error


def load_onnx(path: Path) -> tuple[Run, str]:
    """Loads an ONNX file; returns what runs it, and our record."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {name: images.numpy()})]

    return run, session.get_modelmeta().custom_metadata_map.get(METADATA, '')


def load_openvino(path: Path) -> tuple[Run, str]:
    """Loads OpenVINO's IR; returns what runs it, and our record."""
    import openvino

    model = openvino.Core().read_model(path)
    text = model.get_rt_info(METADATA).astype(str) if model.has_rt_info(METADATA) else ''
    precision = json.loads(text)['precision'] if text else 'float32'
    compiled = compile_openvino(model, precision)

    def run(images: Tensor) -> list[Tensor]:
        results = compiled(images.numpy())
        return [torch.from_numpy(results[i].copy()) for i in range(len(results))]

    return run, text


def compile_openvino(model: Any, precision: str) -> Callable[[Any], Any]:
    """Makes what runs an OpenVINO model on the CPU, with torch's number of threads, in a precision.

    A model for any batch size is compiled for that of the first call, and at need once more for all others: with a
    known one, 8 bits are 5 % faster. Each time takes less than a second. It is done in a thread of its own, because
    OpenVINO gives the one that compiles a stack for signals, and leaves it without any memory if several models are
    freed, the first one first: the next signal, such as that of a process that ended, would end this one.

    Returns:
        Called with an array (N, C, H, W), it returns OpenVINO's results, arrays by the number of the output.
    """
    import openvino

    hints = {
        'INFERENCE_PRECISION_HINT': {'float16': 'f16', 'bfloat16': 'bf16'}.get(precision, 'f32'),
        'PERFORMANCE_HINT': 'LATENCY',
        'INFERENCE_NUM_THREADS': torch.get_num_threads(),
    }
    compiled: dict[int, Callable[..., Any]] = {}

    def run(images: Any) -> Any:
        batch = len(images) if not compiled or len(images) in compiled else -1
        if batch not in compiled:
            fixed = model.clone()
            fixed.reshape([batch, *images.shape[1:]])
            with ThreadPoolExecutor(1) as thread:
                compiled[batch] = thread.submit(openvino.Core().compile_model, fixed, 'CPU', hints).result()
        return compiled[batch](images, share_inputs=True)

    return run


def load_torch(path: Path) -> tuple[Run, str]:
    """Loads a program of torch.export or a package of AOTInductor; returns what runs it, and our record."""
    with zipfile.ZipFile(path) as archive:
        is_package = any(name.endswith('.so') for name in archive.namelist())
    if is_package:
        package = torch._inductor.aoti_load_package(str(path))
        return with_list(package), package.get_metadata().get(METADATA, '')
    extra = {METADATA: ''}
    program = torch.export.load(path, extra_files=extra)
    return with_list(program.module()), extra[METADATA]


def with_list(call: Callable[[Tensor], Any]) -> Run:
    """What calls a program of torch and returns its outputs as a list."""

    @torch.no_grad()
    def run(images: Tensor) -> list[Tensor]:
        outputs = call(images)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    return run


def require_floating_point(images: Tensor) -> None:
    """Raises a ValueError for images of integers: outputs, which get their data type, would wrap around."""
    if not images.is_floating_point():
        raise ValueError(f'images are of {images.dtype}; give floating-point numbers, as the transform of timm does')


def finish(outputs: T, images: Tensor) -> T:
    """Casts outputs, a tensor, list or dict, to the data type of the images, and passes on what is not finite.

    A compiler's and OpenVINO's maximum of NaN and 0 is 0, so that a damaged image would get the score of another.
    """
    finite = all_finite(images)
    whole = finite.is_cpu and bool(finite.all())  # a GPU would have to be waited for

    def finished(output: Tensor) -> Tensor:
        output = output.to(images.dtype)
        return output if whole else output.where(finite.reshape(-1, *[1] * (output.dim() - 1)), torch.nan)

    if isinstance(outputs, dict):
        return {name: finished(output) for name, output in outputs.items()}  # type: ignore[return-value]
    if isinstance(outputs, list):
        return [finished(output) for output in outputs]  # type: ignore[return-value]
    return finished(outputs)  # type: ignore[return-value]


def all_finite(images: Tensor) -> Tensor:
    """Whether all values of each image are finite, (N,).

    By numpy where that can: torch's threads, once woken up, keep a core busy for 4 ms while they wait for more work, a
    quarter of the time that OpenVINO needs for an image in 8 bits.
    """
    if images.is_cpu and images.dtype != torch.bfloat16:  # which numpy doesn't have
        return torch.from_numpy(np.isfinite(images.detach().numpy()).all(axis=(1, 2, 3)))
    return images.isfinite().flatten(1).all(dim=1)
