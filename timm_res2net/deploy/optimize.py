"""Optimizes models for inference: fuses them, and compiles them with torch or OpenVINO."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .._errors import first_line
from .backend_openvino import compile_for_openvino
from .backends import requires_extra
from .fuse import fuse_in_float32
from .inference import ForInference, Outputs, finish, require_floating_point, run_batch

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
    """Optimizes a model for inference: fuses it, compiles it, and warms it up.

    The model is fused, converted to channels-last memory format and to `dtype`, and compiled by `torch.compile` as one
    graph with frozen weights. If no compiler works, it is left uncompiled, and a warning says why. The first call with
    another batch size compiles again, once for all other sizes: that takes seconds, or less than one with OpenVINO.

    Args:
        model: Model of this package in evaluation mode. It is not changed.
        example_input: Images (N, C, H, W) of the size that matters most, on the model's device. They calibrate
            `torch.int8`: pass some 300 real ones.
        dtype: Data type to compute in; the model's if None. OpenVINO runs `torch.int8`, and compiles it in the
            first call.
        compile: Compile with torch.compile. OpenVINO always compiles.
        backend: 'openvino' to run on the CPU with OpenVINO, for any batch size and the height and width of
            `example_input`; torch if None, except for `torch.int8`.

    Returns:
        A module that is called like the model, without gradients, and returns the same in the dtype of its input: a
        tensor, or a list or dict of features. The outputs of an image with NaN or infinity are NaN. Its `path` lists
        the steps, and `pretrained_cfg` is the model's.

    Raises:
        ValueError: If the model cannot be fused, the example is not a batch of images that it can run, or an argument
            is invalid.
        ImportError: If OpenVINO, or NNCF for `torch.int8`, is not installed.

    Example:
        >>> model = timm.create_model('res2net50d', pretrained=True).eval()
        >>> fast = timm_res2net.optimize(model, torch.randn(8, 3, 224, 224), dtype=torch.bfloat16)
        >>> fast.path
        'fused, channels last, bfloat16, compiled'
    """
    if example_input.dim() != 4 or not example_input.numel():
        raise ValueError(f'example_input must be a batch of images (N, C, H, W), got {tuple(example_input.shape)}')
    require_floating_point(example_input)
    if backend not in (None, 'openvino'):
        raise ValueError(f"unknown backend={backend!r}. Choose 'openvino', or None for torch.")
    fused = fuse_in_float32(model)
    dtype = dtype or next(model.parameters()).dtype
    if dtype not in DTYPES:
        raise ValueError(f'unsupported dtype={dtype}. Choose from {", ".join(map(str, DTYPES))}.')
    optimized: Optimized | OptimizedByOpenVINO
    if backend is not None or dtype == torch.int8:
        if not compile:
            raise ValueError(f'compile=False has no effect with backend={backend!r}, dtype={dtype}. Leave it out.')
        if example_input.device.type != 'cpu':
            raise ValueError(f'OpenVINO and torch.int8 run on the CPU, but example_input is on {example_input.device}')
        with requires_extra('running with OpenVINO'):
            optimized = OptimizedByOpenVINO(fused, example_input.float(), dtype)
    else:
        optimized = Optimized(fused.to(dtype).to(memory_format=torch.channels_last), dtype)
        run_example(optimized, example_input)  # so that a wrong example is not blamed on the compiler
        if compile:
            optimized.compile_or_warn(example_input)
    for name in ('pretrained_cfg', 'default_cfg', 'num_classes', 'feature_info'):
        if hasattr(model, name):
            setattr(optimized, name, getattr(model, name))
    _logger.info('%s: %s', type(model).__name__, optimized.path)
    return optimized.eval()


def run_example(model: nn.Module, example_input: Tensor) -> Outputs:
    try:
        with torch.no_grad():
            return model(example_input)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        shape = tuple(example_input.shape)
        raise ValueError(f'the model cannot run example_input, {shape}: {first_line(error)}') from error


class Optimized(ForInference):
    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.context: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.path = f'fused, channels last, {name_of(dtype)}'

    def forward(self, x: Tensor) -> Outputs:
        """Runs the model on (N, C, H, W); outputs have the dtype of `x`, and no gradient."""
        require_floating_point(x)
        # torch.compile would compile again for tensors that were made in inference mode.
        with torch.inference_mode(False), torch.no_grad(), self.context():
            images = x.to(self.dtype, memory_format=torch.channels_last)
            return finish(self.model(images.clone() if images.is_inference() else images), x)

    def compile_or_warn(self, example_input: Tensor) -> None:
        """Compiles in a first call, with the fastest settings or else the defaults; logs why settings failed."""
        model = self.model
        for name in ('fastest', 'default'):
            try:
                settings = fastest_settings(example_input.device) if name == 'fastest' else {}
                self.model = torch.compile(model, fullgraph=True, **settings)  # type: ignore[assignment]
                self.context = frozen_weights
                self(example_input)
            except Exception as error:  # compilers can raise anything
                _logger.warning('torch.compile with %s settings failed: %s', name, first_line(error))
            else:
                self.path += ', compiled'
                return
        self.model, self.context = model, nullcontext


class OptimizedByOpenVINO(ForInference):
    def __init__(self, model: nn.Module, example_input: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        _, self.structure = tree_flatten(run_example(model, example_input[:2]))
        self.shape = None, *example_input.shape[1:]
        self.run = compile_for_openvino(model, example_input, name_of(dtype))
        self.path = f'fused, {name_of(dtype)}, OpenVINO'
        if dtype != torch.int8:  # the example of int8 is for calibration, not a batch that will be run
            self(example_input)

    def forward(self, x: Tensor) -> Outputs:
        return finish(tree_unflatten(run_batch(self.run, x, self.shape), self.structure), x)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def fastest_settings(device: torch.device) -> dict[str, Any]:
    """Returns settings of `torch.compile` that save one to two milliseconds a call in torch 2.14; older versions fail.

    Kernels are called from C++, and a call does not check that the modules are still those that were compiled. That is
    safe if no other model uses the compiled code, hence `isolate_recompiles`.
    """
    skip = torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe
    return dict(isolate_recompiles=True, options=dict(cpp_wrapper=device.type == 'cpu', guard_filter_fn=skip))


def frozen_weights() -> AbstractContextManager[Any]:
    """Returns a context in which torch.compile treats weights as constants, and packs them for its kernels.

    As an option of `torch.compile` it has no effect in torch 2.14, which reads the global setting first.
    """
    from torch._inductor import config  # takes half a second to import

    return config.patch(freezing=True)
