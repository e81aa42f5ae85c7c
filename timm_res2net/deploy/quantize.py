"""Quantizes models to 8-bit integers after training, by NNCF, onnxruntime and torchao."""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.classifier import image_config
from .images import find_images, image_transform, read_image
from .runtimes import compile_openvino

__all__ = [
    'CALIBRATION_IMAGES',
    'calibration_images',
    'convert_to_openvino',
    'quantize_onnx',
    'quantize_torch',
    'whole_batches',
]

_logger = logging.getLogger(__name__)

CALIBRATION_IMAGES = 300  # NNCF's own number; more of them change little

Images = Tensor | Iterable[Any] | str | Path


def calibration_images(model: nn.Module, images: Images | None, shape: tuple[int, ...]) -> Tensor:
    """Takes images to calibrate with, the first 300 of a batch or loader, 300 from all over a folder.

    Args:
        model: The model, whose configuration says how to preprocess the images of a folder.
        images: (N, C, H, W), preprocessed; an iterable of such batches, or of tuples that begin with one, as a
            DataLoader is; or a folder of images.
        shape: (C, H, W) of the model's input.

    Raises:
        ValueError: If there is none, one can't be read, or they are of another shape.
    """
    if images is None:
        raise ValueError('int8 needs images to calibrate with: give images: a folder, a DataLoader or a tensor')
    if isinstance(images, str | Path):
        images = folder_batches(model, Path(images), shape)
    batches: Iterable[Any] = [images] if isinstance(images, Tensor) else images
    taken: list[Tensor] = []
    for batch in batches:
        x = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
        if not isinstance(x, Tensor):
            raise ValueError(
                f'a batch to calibrate with is a {type(batch).__name__}; give tensors, or tuples that begin with one'
            )
        if x.shape[1:] != shape or not x.is_floating_point():
            wanted = ', '.join(map(str, shape))
            raise ValueError(
                f'images to calibrate with are {tuple(x.shape)} of {x.dtype}; give (N, {wanted}), floating-point'
            )
        taken += list(x.detach().cpu().float().split(1))[: len(x)]  # which splits no image into one
        if len(taken) >= CALIBRATION_IMAGES:
            break
    if not taken:
        raise ValueError('there is no image to calibrate with')
    return torch.cat(taken[:CALIBRATION_IMAGES])


def folder_batches(model: nn.Module, folder: Path, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Reads a folder's images, preprocessed for a model, one in a batch; not more than are needed, evenly spread.

    Raises:
        ValueError: If there is no image, or one of them can't be read.
    """
    if not folder.is_dir():
        raise ValueError(f'{folder} is no folder of images to calibrate with')
    files = find_images([str(folder)]).files
    if not files:
        raise ValueError(f'there is no image in {folder} to calibrate with')
    transform = image_transform({**image_config(model, shape[0]), 'input_size': shape})
    count = min(len(files), CALIBRATION_IMAGES)
    for i in range(count):
        file = files[i * len(files) // count]  # of all classes: they are in order of their folders
        try:
            image = read_image(file)
        except ValueError as error:
            raise ValueError(f'{file} is no image to calibrate with: {error}; take it out of {folder}') from error
        yield transform(image)[None]


def convert_to_openvino(model: nn.Module, example_input: Tensor, batch: int, images: Tensor | None = None) -> Any:
    """Converts a float32 model to OpenVINO's.

    Args:
        model: The model.
        example_input: Images (N, C, H, W), whose height and width become those of the model.
        batch: Its batch size, -1 for any.
        images: Quantize it with these images to calibrate.
    """
    import openvino

    converted = openvino.convert_model(model, example_input=example_input)
    if images is not None:
        converted.reshape([-1, *example_input.shape[1:]])  # it is calibrated image by image
        converted = quantize_openvino(converted, images)
    converted.reshape([batch, *example_input.shape[1:]])
    return converted


def quantize_openvino(model: Any, images: Tensor) -> Any:
    """Quantizes an OpenVINO model by NNCF, with limits and a correction of biases that suit cascades.

    Activations are limited to the largest of all images. NNCF's default, the mean of each image's largest, clips, and a
    cascade adds up what is lost: res2net50_26w_4s with random weights is 8.1 % off by it (root mean square of the
    logits) and 2.2 % without. NNCF's default correction of biases is a fast one that looks at each layer alone. For the
    embedded digits model, 14 % off by it, the slow one is better (2 %), for others it is worse, and for deformable
    convolutions it fails, so both are tried on some of the images.

    Raises:
        ImportError: If NNCF is not installed.
        Exception: That of NNCF, if it fails in both ways.
    """
    try:
        import nncf
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet
    except ImportError as error:
        raise ImportError(f'int8 needs it: {error}; pip install "timm_res2net[deploy]"') from error
    nncf.set_log_level(logging.ERROR)
    data = nncf.Dataset([image.numpy() for image in images.split(1)])
    limits = nncf.AdvancedQuantizationParameters(activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX)
    some = images[:: max(1, len(images) // 32)]
    expected, candidates = run_openvino(model, some), []
    failure = None
    for fast in (True, False):
        options = dict(subset_size=len(images), fast_bias_correction=fast, advanced_parameters=limits)
        try:
            with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):  # progress bars of all steps
                candidates.append(requantize_pools(nncf.quantize(model, data, **options)))
        except Exception as error:  # whatever it meets in a graph that it doesn't know
            _logger.debug('no quantization with fast_bias_correction=%s', fast, exc_info=True)
            failure = error
    if not candidates and failure:
        raise failure
    return min(candidates, key=lambda candidate: float((run_openvino(candidate, some) - expected).square().mean()))


def requantize_pools(model: Any) -> Any:
    """Quantizes what pools return whose quantized input has other users, too, and returns the model.

    OpenVINO runs such a pool, and by that the convolutions after it, in float32: in a DLA a fifth of the operations,
    for a third of the time. The largest of quantized values is one of them, so the same scale leaves it as it is.
    """
    from openvino import opset13

    for pool in model.get_ops():
        if pool.get_type_name() != 'MaxPool':
            continue
        quantizer = pool.input_value(0).get_node()
        if quantizer.get_type_name() == 'FakeQuantize' and len(quantizer.output(0).get_target_inputs()) > 1:
            users = pool.output(0).get_target_inputs()
            limits = [quantizer.input_value(i) for i in range(1, 5)]
            again = opset13.fake_quantize(pool.output(0), *limits, levels=quantizer.get_attributes()['levels'])
            for user in users:
                user.replace_source_output(again.output(0))
    return model


def run_openvino(model: Any, images: Tensor) -> Tensor:
    """The last output of an OpenVINO model, image by image."""
    compiled = compile_openvino(model, 'float32')
    outputs = [torch.from_numpy(compiled(image.numpy())[len(model.outputs) - 1].copy()) for image in images.split(1)]
    return torch.cat(outputs)


def whole_batches(images: Tensor, batch: int) -> Tensor:
    """Images, and the first ones again until the last batch is whole."""
    return images[torch.arange(-(-len(images) // batch) * batch) % len(images)]


def quantize_onnx(file: Path, out: Path, images: Tensor, batch: int) -> None:
    """Quantizes an ONNX file by onnxruntime, to QDQ nodes, with scales for each channel of a weight.

    Args:
        file: It.
        out: Where to write.
        images: To calibrate with.
        batch: How many at a time, in a file for no other number; some are taken twice for the last one.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(whole_batches(images, batch).split(batch))

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.rest, None)
            return None if image is None else {'images': image.numpy()}

    prepared = file.with_suffix('.prepared.onnx')
    quant_pre_process(file, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        out,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
    )


@torch.no_grad()
def quantize_torch(model: nn.Module, images: Tensor) -> nn.Module:
    """Quantizes a fused model by torchao, for what torch.compile makes of it on x86 processors; as it is, it is slow.

    Raises:
        ImportError: If torchao is not installed.
    """
    from torch._inductor import config

    try:
        with config.patch(pre_grad_custom_pass=config.pre_grad_custom_pass):  # which the import sets, for all models
            from torchao.quantization.pt2e import allow_exported_model_train_eval
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
            from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    except ImportError as error:
        raise ImportError(
            f"dtype=torch.int8 needs it: {error}; pip install torchao, or give backend='openvino'"
        ) from error
    example = images[:1].repeat(2, 1, 1, 1)  # not one image, or the program would be for one
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim('batch', min=1)},)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program, quantizer)
    for batch in images.split(8):
        prepared(batch)
    quantized: nn.Module = allow_exported_model_train_eval(convert_pt2e(prepared))
    return quantized
