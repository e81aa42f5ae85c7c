"""The table of backends: for each suffix of an exported file, the runtime that writes and runs it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .._files import PathLike
from .backend_onnx import load_onnx, write_onnx
from .backend_openvino import load_openvino, write_openvino
from .backend_torch import load_torch, write_torch
from .inference import Run
from .program import Program


@dataclass(frozen=True)
class Backend:
    """A runtime and its file format."""

    format: str
    precisions: tuple[str, ...]
    write: Callable[[Program, Path], None]
    load: Callable[[Path], tuple[str, Callable[[str], Run]]]  # file -> its record, and: precision -> run
    runs_code: bool = False  # loading a file can run any code that its author put there


PRECISIONS = 'float32', 'float16', 'bfloat16', 'int8'
BACKENDS = {
    '.onnx': Backend('ONNX', ('float32', 'float16', 'int8'), write_onnx, load_onnx),  # its CPU kernels lack bfloat16
    '.xml': Backend('OpenVINO', PRECISIONS, write_openvino, load_openvino),
    '.pt2': Backend('torch', ('float32', 'float16', 'bfloat16'), write_torch, load_torch, runs_code=True),
}


def find_backend(file: PathLike) -> Backend:
    """Returns the backend of a file by its suffix; ValueError if there is none."""
    suffix = Path(file).suffix
    if suffix not in BACKENDS:
        raise ValueError(f'unknown suffix of {str(file)!r}. Choose from {", ".join(BACKENDS)}.')
    return BACKENDS[suffix]


@contextmanager
def requires_extra(what: str) -> Iterator[None]:
    """Re-raises an ImportError with what requires the package, and how to install it."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{what} requires a package: {error}. Run: pip install "timm_res2net[deploy]"') from error
