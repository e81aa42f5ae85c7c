"""Quantizes models to 8-bit integers after training, by NNCF, onnxruntime and torchao."""

import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader
from torch import Tensor, nn

from ..models.classifier import image_config
from .runtimes import compile_openvino

__all__ = ['CALIBRATION_IMAGES', 'calibration_images', 'convert_to_openvino', 'quantize_onnx', 'quantize_torch']

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
        ValueError: If there is none, or they are of another shape.
    """
    if images is None:
        raise ValueError('int8 needs images to calibrate with: give images: a folder, a DataLoader or a tensor')
    if isinstance(images, str | Path):
        images = folder_batches(model, Path(images), shape)
    batches: Iterable[Any] = [images] if isinstance(images, Tensor) else images
    taken: list[Tensor] = []
    for batch in batches:
        x: Tensor = batch if isinstance(batch, Tensor) else batch[0]
        if x.shape[1:] != shape or not x.is_floating_point():
            wanted = ', '.join(map(str, shape))
            raise ValueError(
                f'images to calibrate with are {tuple(x.shape)} of {x.dtype}; give (N, {wanted}), floating-point'
            )
        taken += x.detach().cpu().float().split(1)
        if len(taken) >= CALIBRATION_IMAGES:
            break
    if not taken:
        raise ValueError('there is no image to calibrate with')
    return torch.cat(taken[:CALIBRATION_IMAGES])


def folder_batches(model: nn.Module, folder: Path, shape: tuple[int, ...]) -> Iterable[Any]:
    """Reads a folder's images by timm, preprocessed for a model; not more than are needed, evenly spread."""
    if not folder.is_dir():
        raise ValueError(f'{folder} is no folder of images to calibrate with')
    try:
        dataset: Any = create_dataset('', root=str(folder), input_img_mode='L' if shape[0] == 1 else 'RGB')
    except RuntimeError as error:
        raise ValueError(f'there is no image in {folder} to calibrate with') from error
    config = {**image_config(model, shape[0]), 'input_size': shape}
    loader: Any = create_loader(
        dataset, batch_size=16, num_workers=0, use_prefetcher=False, persistent_workers=False, **config
    )
    count = min(len(dataset), CALIBRATION_IMAGES)
    chosen = [i * len(dataset) // count for i in range(count)]  # of all classes: they are in order of their folders
    return torch.utils.data.DataLoader(torch.utils.data.Subset(loader.dataset, chosen), batch_size=16)


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
    converted.reshape([batch, *example_input.shape[1:]])
    return converted if images is None else quantize_openvino(converted, images)


def quantize_openvino(model: Any, images: Tensor) -> Any:
    """Quantizes an OpenVINO model by NNCF, with limits and a correction of biases that suit cascades.

    Activations are limited to the largest of all images. NNCF's default, the mean of each image's largest, clips, and a
    cascade adds up what is lost: res2net50_26w_4s with random weights is 8.1 % off by it (root mean square of the
    logits) and 2.2 % without. NNCF's default correction of biases is a fast one that looks at each layer alone. For the
    embedded digits model, 14 % off by it, the slow one is better (2 %), for others it is worse, so both are tried on
    some of the images.

    Raises:
        ImportError: If NNCF is not installed.
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
    for fast in (True, False):
        options = dict(subset_size=len(images), fast_bias_correction=fast, advanced_parameters=limits)
        with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):  # progress bars of all its steps
            candidates.append(requantize_pools(nncf.quantize(model, data, **options)))
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


def quantize_onnx(file: Path, out: Path, images: Tensor) -> None:
    """Quantizes an ONNX file by onnxruntime, to QDQ nodes, with scales for each channel of a weight."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(images.split(1))

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
