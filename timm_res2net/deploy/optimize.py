"""Runs models as fast as possible: fused, in channels-last memory format, and compiled by torch or OpenVINO."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..weights.errors import first_line
from .fuse import fuse
from .quantize import convert_to_openvino, quantize_torch
from .runtimes import Outputs, compile_openvino, finish, require_floating_point

__all__ = ['DTYPES', 'ForInference', 'compile_by_openvino', 'optimize']

_logger = logging.getLogger(__name__)

DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.int8


def optimize(
    model: nn.Module,
    example_input: Tensor,
    *,
    dtype: torch.dtype | None = None,
    compile: bool = True,
    backend: str | None = None,
) -> nn.Module:
    """Makes the fastest form of a model for inference, compiled and warmed up.

    The model is fused, converted to channels-last memory format and to `dtype`, and compiled by `torch.compile` as one
    graph with frozen weights. Without a working compiler it is not compiled, and the log says why. The first call with
    another batch size compiles once more, for all other sizes; that takes some seconds, with OpenVINO less than one.

    Args:
        model: A model of this package in evaluation mode. It is not changed.
        example_input: Images (N, C, H, W) of the size that matters most, on the model's device. For `torch.int8` they
            are what the quantization is calibrated with: take some 300 real ones.
        dtype: Data type to compute in, such as `torch.bfloat16`; the model's if None. `torch.int8` is for CPUs.
        compile: Compile it by torch.compile; OpenVINO and `torch.int8` always compile.
        backend: 'openvino' to run it by OpenVINO on the CPU. Its batch size is free, image height and width are those
            of `example_input`.

    Returns:
        A module that is called like the model, without gradients, and returns the same in the data type of its input:
        a tensor, or a list or dict of features. Of an image with a value that is not finite all outputs are NaN. Its
        `path` says what was done, and `pretrained_cfg` is the model's.

    Raises:
        ValueError: If the model can't be fused, the example is no batch of images or none that the model can run, or
            the backend is not known.
        ImportError: If OpenVINO, or for `torch.int8` NNCF or torchao, is not installed.
    """
    if example_input.dim() != 4 or not example_input.numel():
        raise ValueError(f'example_input is {tuple(example_input.shape)}; give a batch of images, (N, C, H, W)')
    require_floating_point(example_input)
    if backend not in (None, 'openvino'):
        raise ValueError(f"backend={backend!r} is not known; choose 'openvino', or None for torch.compile")
    fused = fuse(model)
    dtype = dtype or next(fused.parameters()).dtype
    if dtype not in DTYPES:
        raise ValueError(f'dtype={dtype} is not possible; choose {", ".join(map(str, DTYPES))}')
    if not compile and (backend or dtype == torch.int8):
        raise ValueError(f'compile=False has no meaning for backend={backend!r}, dtype={dtype}; leave it out')
    if example_input.device.type != 'cpu' and (backend or dtype == torch.int8):
        raise ValueError(f'example_input is on {example_input.device}; OpenVINO and torch.int8 are for the CPU')
    optimized: Optimized | OptimizedByOpenVino
    if backend == 'openvino':
        outputs = run_example(fused.float(), example_input[:2].float())
        optimized = OptimizedByOpenVino(fused, example_input.float(), outputs, dtype)
    elif dtype == torch.int8:
        run_example(fused.float(), example_input[:2].float())
        optimized = Optimized(quantize_torch(fused, example_input.float()), dtype)
        compile_or_warn(optimized, example_input[:8])  # all are for calibration, not a batch that will be run
    else:
        optimized = Optimized(fused.to(dtype).to(memory_format=torch.channels_last), dtype)
        run_example(optimized, example_input)  # one that the model can't run is no fault of the compiler
        if compile:
            compile_or_warn(optimized, example_input)
    for name in ('pretrained_cfg', 'default_cfg', 'num_classes', 'feature_info'):
        if hasattr(model, name):
            setattr(optimized, name, getattr(model, name))
    _logger.info('%s: %s', type(model).__name__, optimized.path)
    return optimized.eval()


def run_example(model: nn.Module, example_input: Tensor) -> Outputs:
    """Runs a model on an example; ValueError if it can't."""
    try:
        with torch.no_grad():
            return model(example_input)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        shape = tuple(example_input.shape)
        raise ValueError(f'the model can not run example_input, {shape}: {first_line(error)}') from error


class ForInference(nn.Module):
    """A model that can only be run.

    Attributes:
        path: What was done to the model, such as 'fused, channels last, bfloat16, compiled'.
    """

    path: str

    def train(self, mode: bool = True) -> 'ForInference':
        """Raises a ValueError for training mode, before any module's mode is set."""
        if mode:
            raise ValueError('an optimized model is for inference only; train the model that it was made from')
        return super().train(False)

    def extra_repr(self) -> str:
        return self.path


class Optimized(ForInference):
    """A model that torch runs, as `optimize` returns it."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = torch.float32 if dtype == torch.int8 else dtype  # of what the model takes
        self.context: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.path = f'fused, channels last, {str(dtype).removeprefix("torch.")}'

    def forward(self, x: Tensor) -> Outputs:
        """Runs the model on (N, C, H, W); outputs have the data type of `x`, and no gradient."""
        require_floating_point(x)
        # torch.compile compiles once more for tensors that were made in inference mode.
        with torch.inference_mode(False), torch.no_grad(), self.context():
            images = x.to(self.dtype, memory_format=torch.channels_last)
            return finish(self.model(images.clone() if images.is_inference() else images), x)

    def compile_now(self, example_input: Tensor, **options: Any) -> None:
        """Compiles the model, which takes a first call; an error changes nothing."""
        model, context = self.model, self.context
        try:
            self.model, self.context = torch.compile(model, fullgraph=True, **options), frozen_weights  # type: ignore[assignment]
            self(example_input)
        except Exception:
            self.model, self.context = model, context
            raise
        self.path += ', compiled'


class OptimizedByOpenVino(ForInference):
    """A model that OpenVINO runs, as `optimize` returns it."""

    def __init__(self, model: nn.Module, example_input: Tensor, outputs: Outputs, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = example_input.shape[1:]
        self.names = list(outputs) if isinstance(outputs, dict) else None
        self.single = isinstance(outputs, Tensor)
        self.run = compile_by_openvino(model, example_input, dtype)
        self.path = f'fused, {str(dtype).removeprefix("torch.")}, OpenVINO'
        if dtype != torch.int8:  # whose example is all that it was calibrated with, not a batch that will be run
            self(example_input)

    def forward(self, x: Tensor) -> Outputs:
        """Runs the model on (N, C, H, W); outputs have the data type of `x`, and no gradient."""
        if x.shape[1:] != self.shape:
            raise ValueError(
                f'images are {tuple(x.shape)}; this was optimized for (N, {", ".join(map(str, self.shape))})'
            )
        require_floating_point(x)
        images = x if len(x) else x.new_zeros(1, *self.shape)  # it returns a row for no image
        results = self.run(images.detach().float().contiguous().numpy())
        outputs: Any = [torch.from_numpy(results[i])[: len(x)] for i in range(len(results))]
        if self.names is not None:
            outputs = dict(zip(self.names, outputs))
        return finish(outputs[0] if self.single else outputs, x)


def compile_by_openvino(model: nn.Module, example_input: Tensor, dtype: torch.dtype) -> Callable[[Any], Any]:
    """Makes what runs a float32 model by OpenVINO on the CPU in a data type.

    Raises:
        ImportError: If OpenVINO is not installed.
    """
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"backend='openvino' needs it: {error}; pip install openvino, or leave backend out"
        ) from error
    images = example_input if dtype == torch.int8 else None
    converted = convert_to_openvino(model, example_input[:2], -1, images)
    return compile_openvino(converted, str(dtype).removeprefix('torch.'))


def compile_or_warn(optimized: Optimized, example_input: Tensor) -> None:
    """Compiles with the fastest settings, else with the default ones; a warning says why settings failed."""
    for name, settings in (('fastest', fastest_settings), ('default', default_settings)):
        try:
            optimized.compile_now(example_input, **settings(example_input.device))
        except Exception as error:  # whatever the compiler's own tools raise
            _logger.warning('torch.compile with %s settings is not possible here: %s', name, first_line(error))
        else:
            return


def default_settings(device: torch.device) -> dict[str, Any]:
    """The settings that `torch.compile` has by itself."""
    return {}


def fastest_settings(device: torch.device) -> dict[str, Any]:
    """Settings of `torch.compile` that save a millisecond or two of each call, in torch 2.14.

    Kernels are called from C++, and a call doesn't check that the modules are still those that were compiled. That is
    safe if no other model uses the compiled code, hence `isolate_recompiles`.

    Raises:
        AttributeError: In an older torch.
    """
    skip = torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe
    return dict(isolate_recompiles=True, options=dict(cpp_wrapper=device.type == 'cpu', guard_filter_fn=skip))


def frozen_weights() -> AbstractContextManager[Any]:
    """Context in which torch.compile takes weights for constants and packs them for its kernels.

    `torch.compile` has an option of that name, but torch 2.14 looks at the global setting before it looks at options.
    """
    from torch._inductor import config  # half a second, only needed to compile

    return config.patch(freezing=True)
