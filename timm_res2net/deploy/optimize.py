"""Models for inference: norms folded into convolutions, and the fastest way to run the rest."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from timm.models import FeatureDictNet, FeatureHookNet
from timm.models.resnet import ResNet
from timm.utils import reparameterize_model
from torch import Tensor, nn

from ..models.block import Bottle2neck, fold_norms, require_evaluation
from ..models.dla import DlaRoot
from ..models.trunk import Trunk
from ..weights.files import first_line

__all__ = ['fuse', 'optimize']

_logger = logging.getLogger(__name__)

# Modules that run their children in the order in which they have them.
IN_ORDER = nn.Sequential, DlaRoot, Trunk, ResNet, FeatureDictNet, FeatureHookNet

PRECISIONS = {torch.float32: 'f32', torch.bfloat16: 'bf16', torch.float16: 'f16'}  # as OpenVINO calls them


def fuse(model: nn.Module) -> nn.Module:
    """Makes a model for inference that computes the same, up to rounding (1e-5 of the largest output).

    Every batch norm becomes part of the convolution before it, all over the model. In blocks without a cascade the
    convolutions that run side by side and the average beside them become one grouped convolution, where one can compute
    the same: not with an activation other than ReLU, and not for Paddle's average, which leaves out the padding.
    `timm.utils.reparameterize_model` does the same to the blocks alone.

    The result is made of other modules and can't be trained: its `train()` is an error. It exports, scripts and gives
    features like the model that it was made from, which stays as it is.

    Args:
        model: A model of this package, or one that contains some, in evaluation mode.

    Returns:
        A fused copy.

    Raises:
        ValueError: If the model is in training mode, or has no Res2Net block.
    """
    require_evaluation(model)
    if not any(isinstance(module, Bottle2neck) for module in model.modules()):
        raise ValueError(f'{type(model).__name__} has no Res2Net block; give a model that was made by this package')
    (fused,) = reparameterize_model(nn.Sequential(model))  # wrapped, as timm fuses what is in a model and not itself
    for module in fused.modules():
        if isinstance(module, IN_ORDER):
            fold_norms(module)
    return fused


class Optimized(nn.Module):
    """A model as `optimize` returns it: call it like the one that it was made from.

    Attributes:
        path: What was done to the model, such as 'fused, channels last, bfloat16, compiled'.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.context: Callable[[], Any] = nullcontext
        self.path = f'fused, channels last, {str(dtype).removeprefix("torch.")}'

    def forward(self, x: Tensor) -> Any:
        """Runs the model on (N, C, H, W); outputs have the data type of `x`, and no gradient."""
        # The compiler takes tensors that inference mode made for another kind, and would compile once more.
        with torch.inference_mode(False), torch.no_grad(), self.context():
            images = x.to(self.dtype, memory_format=torch.channels_last)
            return cast(self.model(images.clone() if images.is_inference() else images), x.dtype)

    def warm_up(self, example_input: Tensor, **options: Any) -> None:
        """Compiles the model, and runs it so that compilation takes place now; what fails changes nothing."""
        model, context = self.model, self.context
        try:
            self.model, self.context = torch.compile(model, fullgraph=True, **options), freezing  # type: ignore[assignment]
            self(example_input)
        except Exception:
            self.model, self.context = model, context
            raise
        self.path += ', compiled'

    def extra_repr(self) -> str:
        return self.path


class OptimizedByOpenVino(nn.Module):
    """A model as `optimize` returns it with `backend='openvino'`: call it like the one that it was made from."""

    def __init__(self, model: nn.Module, example_input: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.no_grad():
            outputs = model(example_input)
        self.shape = example_input.shape[1:]
        self.names = list(outputs) if isinstance(outputs, dict) else None
        self.single = isinstance(outputs, Tensor)
        self.run = compiled_by_openvino(model, example_input, dtype)
        self.path = f'fused, {str(dtype).removeprefix("torch.")}, OpenVINO'

    def forward(self, x: Tensor) -> Any:
        """Runs the model on (N, C, H, W); outputs have the data type of `x`, and no gradient."""
        if x.shape[1:] != self.shape:
            raise ValueError(
                f'images are {tuple(x.shape)}; this was optimized for (N, {", ".join(map(str, self.shape))})'
            )
        results = self.run(x.detach().float().contiguous().numpy(), share_inputs=True)
        outputs = [torch.from_numpy(results[i]).to(x.dtype) for i in range(len(results))]
        if self.single:
            return outputs[0]
        return outputs if self.names is None else dict(zip(self.names, outputs))

    def extra_repr(self) -> str:
        return self.path


def optimize(
    model: nn.Module,
    example_input: Tensor,
    *,
    dtype: torch.dtype | None = None,
    compile: bool = True,
    backend: str | None = None,
) -> nn.Module:
    """Makes the fastest form of a model for inference, compiled and warmed up.

    The model is fused, brought to channels-last memory format and to `dtype`, and compiled by `torch.compile` as one
    graph with frozen weights. Where a compiler is missing it does without and logs why. The first call with another
    batch size compiles once more, for all other sizes; that takes some seconds.

    Args:
        model: A model of this package in evaluation mode. It stays as it is.
        example_input: Images (N, C, H, W) of the size that matters most, on the model's device.
        dtype: Data type to compute in, such as `torch.bfloat16`; the model's if None.
        compile: Compile it.
        backend: 'openvino' to run it by OpenVINO, which has to be installed, on the CPU. Its batch size is free, image
            height and width are those of `example_input`.

    Returns:
        A module that is called like the model, without gradients, and returns the same in the data type of what it is
        given: a tensor, or a list or dict of features. Its `path` tells what was done.

    Raises:
        ValueError: If the model can't be fused, the example is no batch of images, or the backend can't be had.
    """
    if example_input.dim() != 4 or not example_input.is_floating_point():
        given = f'{tuple(example_input.shape)} of {example_input.dtype}'
        raise ValueError(f'example_input is {given}; give a batch of images, (N, C, H, W), as floating-point numbers')
    if backend not in (None, 'openvino'):
        raise ValueError(f"backend={backend!r} is not known; choose 'openvino', or None for torch.compile")
    fused = fuse(model)
    dtype = dtype or next(fused.parameters()).dtype
    if dtype not in PRECISIONS:
        raise ValueError(f'dtype={dtype} is not possible; choose {", ".join(map(str, PRECISIONS))}')
    if backend == 'openvino':
        optimized = by_openvino(fused.float(), example_input, dtype)
    else:
        optimized = by_torch(fused, example_input, dtype, compile)
    _logger.info('%s: %s', type(model).__name__, optimized.path)
    return optimized


def by_torch(fused: nn.Module, example_input: Tensor, dtype: torch.dtype, compile: bool) -> nn.Module:
    """Has torch run a fused model, compiled if that is wanted and can be."""
    fused = fused.to(dtype).to(memory_format=torch.channels_last)
    optimized = Optimized(fused, dtype).eval()
    for way in (fastest, plain) if compile else ():
        try:
            optimized.warm_up(example_input, **way(example_input.device))
        except Exception as error:  # whatever the compiler's own tools raise
            _logger.warning('torch.compile with %s settings is not possible here: %s', way.__name__, first_line(error))
        else:
            break
    return optimized


def by_openvino(fused: nn.Module, example_input: Tensor, dtype: torch.dtype) -> nn.Module:
    """Has OpenVINO run a fused model; ValueError if it isn't installed."""
    try:
        return OptimizedByOpenVino(fused, example_input.float(), dtype).eval()
    except ImportError as error:
        raise ValueError(f"backend='openvino' needs it: {error}; pip install openvino, or leave backend out") from error


def compiled_by_openvino(model: nn.Module, example_input: Tensor, dtype: torch.dtype) -> Any:
    """Has OpenVINO compile a float32 model for the CPU and any batch size, to compute in a data type."""
    import openvino

    converted = openvino.convert_model(model, example_input=example_input)
    converted.reshape([-1, *example_input.shape[1:]])
    hints = {
        'INFERENCE_PRECISION_HINT': PRECISIONS[dtype],
        'PERFORMANCE_HINT': 'LATENCY',
        'INFERENCE_NUM_THREADS': torch.get_num_threads(),
    }
    return openvino.Core().compile_model(converted, 'CPU', hints)


def fastest(device: torch.device) -> dict[str, Any]:
    """Settings of `torch.compile` that save a millisecond or two of each call, in torch 2.14.

    The calls of kernels become C++, and it is not checked again at each call that the model is the one that was
    compiled. That is safe as long as no other model meets what was compiled for it, hence the isolation.
    """
    skip = torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe
    return dict(isolate_recompiles=True, options=dict(cpp_wrapper=device.type == 'cpu', guard_filter_fn=skip))


def plain(device: torch.device) -> dict[str, Any]:
    """No settings of `torch.compile`."""
    return {}


def freezing() -> Any:
    """Context in which what is compiled takes weights for constants and packs them as its kernels want them.

    `torch.compile` has an option of that name, but torch 2.14 looks at the setting before it looks at options.
    """
    from torch._inductor import config  # half a second, for those who compile

    return config.patch(freezing=True)


def cast(outputs: Any, dtype: torch.dtype) -> Any:
    """Brings what a model returns to a data type: a tensor, a list or a dict."""
    if isinstance(outputs, dict):
        return {name: output.to(dtype) for name, output in outputs.items()}
    return outputs.to(dtype) if isinstance(outputs, Tensor) else [output.to(dtype) for output in outputs]
