"""Converts, quantizes, compiles, writes and loads OpenVINO models."""

import contextlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import first_line
from .._files import open_regular
from ..weights.config import RECORD
from .inference import Run
from .program import Program

_logger = logging.getLogger(__name__)

PRECISION_HINTS = {'float16': 'f16', 'bfloat16': 'bf16'}  # otherwise 'f32', also for unquantized layers in int8


def convert(model: nn.Module, example: Tensor, dynamic: tuple[int, ...], images: Tensor | None = None) -> Any:
    """Converts a float32 model, with `dynamic` dimensions of the input left free; quantizes it if given images."""
    import openvino

    converted = openvino.convert_model(model, example_input=example)
    if images is not None:
        converted.reshape([-1, *example.shape[1:]])  # calibration runs image by image
        converted = quantize_openvino(converted, images)
    converted.reshape([-1 if i in dynamic else size for i, size in enumerate(example.shape)])
    return converted


def quantize_openvino(model: Any, images: Tensor) -> Any:
    """Quantizes an OpenVINO model with NNCF, with ranges and a bias correction that suit cascades.

    The range of an activation is its largest value over all images. NNCF's default, the mean of each image's largest
    value, clips, and a cascade accumulates the errors: res2net50_26w_4s with random weights is 8.1 % off with it (root
    mean square of the logits) and 2.2 % without. NNCF's default bias correction is a fast one that looks at each layer
    alone. The slow one is better for the embedded digits model (2 % off, not 14 %), but worse for others, and fails for
    deformable convolutions. So both are tried, and the one closer to the model on some of the images is kept.
    """
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    nncf.set_log_level(logging.ERROR)
    data = nncf.Dataset([image.numpy() for image in images.split(1)])
    ranges = nncf.AdvancedQuantizationParameters(activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX)
    some = images[:: max(1, len(images) // 32)]
    expected, candidates = run_last_output(model, some), []
    for fast in (True, False):
        options = dict(subset_size=len(images), fast_bias_correction=fast, advanced_parameters=ranges)
        try:
            with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):  # progress bars
                candidates.append(requantize_pools(nncf.quantize(model, data, **options)))
        except Exception:  # NNCF can raise anything for an unsupported graph
            if fast:
                raise
            _logger.debug('the slow bias correction failed', exc_info=True)
    return min(candidates, key=lambda each: float((run_last_output(each, some) - expected).square().mean()))


def requantize_pools(model: Any) -> Any:
    """Also quantizes the outputs of max pools, if their quantized input has other consumers; returns the model.

    Otherwise OpenVINO runs such a pool, and the convolutions after it, in float32: a fifth of the operations of a DLA,
    and a third of its time. The maximum of quantized values is one of them, so quantizing it with the same scale does
    not change it.
    """
    from openvino import opset13

    for pool in model.get_ops():
        if pool.get_type_name() != 'MaxPool':
            continue
        quantizer = pool.input_value(0).get_node()
        if quantizer.get_type_name() == 'FakeQuantize' and len(quantizer.output(0).get_target_inputs()) > 1:
            consumers = pool.output(0).get_target_inputs()
            limits = [quantizer.input_value(i) for i in range(1, 5)]
            requantized = opset13.fake_quantize(pool.output(0), *limits, levels=quantizer.get_attributes()['levels'])
            for consumer in consumers:
                consumer.replace_source_output(requantized.output(0))
    return model


def run_last_output(model: Any, images: Tensor) -> Tensor:
    """Computes the last output of an OpenVINO model, image by image."""
    run = compile_openvino(model, 'float32')
    return torch.cat([run(image)[-1] for image in images.split(1)])


def compile_openvino(model: Any, precision: str) -> Run:
    """Compiles an OpenVINO model for the CPU, with as many threads as torch has.

    The first call compiles it for its own shape, as int8 is 5 % faster with a known shape; the first call with another
    shape compiles it for all shapes. Either takes less than a second, in a separate thread: OpenVINO sets an alternate
    signal stack in the compiling thread, and leaves it dangling if several models are freed, oldest first. The next
    signal, such as SIGCHLD, would then kill this process.
    """
    import openvino

    hints = {
        'INFERENCE_PRECISION_HINT': PRECISION_HINTS.get(precision, 'f32'),
        'PERFORMANCE_HINT': 'LATENCY',
        'INFERENCE_NUM_THREADS': torch.get_num_threads(),
    }
    compiled: dict[tuple[int, ...] | None, Callable[..., Any]] = {}
    lock = Lock()  # calls from two threads would exchange their inputs

    def run(images: Tensor) -> list[Tensor]:
        with lock:
            shape = images.shape if not compiled or images.shape in compiled else None
            if shape not in compiled:
                fixed = model.clone()
                if shape is not None:
                    fixed.reshape(shape)
                with ThreadPoolExecutor(1) as thread:
                    compiled[shape] = thread.submit(openvino.Core().compile_model, fixed, 'CPU', hints).result()
            results = compiled[shape](images.numpy(), share_inputs=True)
            return [torch.from_numpy(results[i]) for i in range(len(results))]

    return run


def compile_for_openvino(model: nn.Module, example: Tensor, precision: str) -> Run:
    """Compiles a float32 model for OpenVINO on the CPU, for any batch size; the example calibrates int8."""
    return compile_openvino(convert(model, example[:2], (0,), example if precision == 'int8' else None), precision)


def write_openvino(program: Program, file: Path) -> None:
    """Writes an .xml file and its .bin file, quantized if the program has images to calibrate with."""
    import openvino

    model = convert(program.module, program.example, program.dynamic, program.calibration)
    model.inputs[0].get_tensor().set_names({'images'})
    for output, name in zip(model.outputs, program.outputs):
        output.get_tensor().set_names({name})
    model.set_rt_info(program.metadata[RECORD], [RECORD])
    try:
        openvino.save_model(model, file, compress_to_fp16=False)
    except RuntimeError as error:
        raise OSError(f'OpenVINO failed, perhaps because the disk is full: {first_line(error)}') from error


def load_openvino(file: Path) -> tuple[str, Callable[[str], Run]]:
    """Loads an .xml file and its .bin file; returns its record, and a function that compiles the model.

    OpenVINO gets the bytes, not the path, so it cannot open any other file.
    """
    import openvino

    content = []
    for part in (file, file.with_suffix('.bin')):
        with open_regular(part) as opened:
            content.append(opened.read())
    model = openvino.Core().read_model(*content)
    record = model.get_rt_info(RECORD).astype(str) if model.has_rt_info(RECORD) else ''
    return record, partial(compile_openvino, model)
