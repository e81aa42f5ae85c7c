"""The table of backends: which runtimes run our models, in which precisions, and from which files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from .._files import PathLike
from .backend_onnx import load_onnx, write_onnx
from .backend_openvino import compile_for_openvino, load_openvino, write_openvino
from .backend_torch import load_torch, write_torch
from .inference import Run


@dataclass(frozen=True)
class Backend:
    """A runtime and its file format."""

    format: str
    suffix: str
    precisions: tuple[str, ...]  # of exported files
    write: Callable[..., None]  # (program, file, **options)
    load: Callable[[Path], tuple[str, Callable[[str], Run]]]  # file -> its record, and a function: precision -> run
    compile: Callable[[nn.Module, Tensor, str], Run] | None = None  # in the same process, for `optimize(backend=...)`
    options: tuple[str, ...] = ()  # of `export`, for this format only
    runs_code: bool = False  # loading a file can run any code that its author put there


# fmt: off
BACKENDS = {
    'onnxruntime': Backend(
        format='ONNX', suffix='.onnx', precisions=('float32', 'float16', 'int8'),  # its CPU kernels lack bfloat16
        write=write_onnx, load=load_onnx, options=('opset', 'symmetric'),
    ),
    'openvino': Backend(
        format='OpenVINO', suffix='.xml', precisions=('float32', 'float16', 'bfloat16', 'int8'),
        write=write_openvino, load=load_openvino, compile=compile_for_openvino,
    ),
    'torch': Backend(
        format='torch', suffix='.pt2', precisions=('float32', 'float16', 'bfloat16'),
        write=write_torch, load=load_torch, runs_code=True,
    ),
}
# fmt: on
SUFFIXES = tuple(each.suffix for each in BACKENDS.values())
PRECISIONS = tuple(dict.fromkeys(precision for each in BACKENDS.values() for precision in each.precisions))


def find_backend(file: PathLike) -> Backend:
    """Returns the backend of a file by its suffix; ValueError if there is none."""
    for backend in BACKENDS.values():
        if Path(file).suffix == backend.suffix:
            return backend
    raise ValueError(f'unknown suffix of {str(file)!r}. Choose from {", ".join(SUFFIXES)}.')


@contextmanager
def requires_extra(what: str) -> Iterator[None]:
    """Adds to an ImportError inside what requires the package, and how to install it."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{what} requires a package: {error}. Run: pip install "timm_res2net[deploy]"') from error
