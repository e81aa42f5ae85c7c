"""Writes, quantizes and loads ONNX files."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .._files import open_regular
from ..weights.config import RECORD
from .calibration import repeat_to_whole_batches
from .inference import Run
from .program import Program

OPSET = 20  # supported by runtimes since the end of 2023
OPSETS = range(18, 24)  # those that torch's exporter can write


def write_onnx(program: Program, file: Path) -> None:
    """Writes a program with torch's exporter, quantized if the program has images to calibrate with."""
    opset = program.opset or OPSET
    if opset not in OPSETS:
        raise ValueError(f'opset must be from {OPSETS[0]} to {OPSETS[-1]}, got {opset}')
    import onnx

    unquantized = file if program.calibration is None else file.with_name('unquantized.onnx')
    torch.onnx.export(
        program.module,
        (program.example,),
        unquantized,
        dynamo=True,
        opset_version=opset,
        input_names=['images'],
        output_names=program.outputs,
        dynamic_shapes=program.dynamic_shapes,
        external_data=False,
        verbose=False,
    )
    if program.calibration is not None:
        batch = 1 if 0 in program.dynamic else len(program.example)
        quantize_onnx(unquantized, file, program.calibration, batch, program.symmetric)
    model = onnx.load(file)
    version = next(each.version for each in model.opset_import if each.domain in ('', 'ai.onnx'))
    if version != opset:  # the exporter only logs a warning
        raise ValueError(f'the exporter wrote opset {version}, not {opset}')
    onnx.helper.set_model_props(model, program.metadata)
    onnx.checker.check_model(model)
    onnx.save(model, file)


def quantize_onnx(file: Path, out: Path, images: Tensor, batch: int, symmetric: bool) -> None:
    """Quantizes a file to QDQ nodes, with one scale per output channel of a weight.

    With `symmetric`, activations are signed integers without zero points, and biases float32, as TensorRT requires.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = ({'images': each.numpy()} for each in repeat_to_whole_batches(images, batch).split(batch))
    prepared = file.with_suffix('.prepared.onnx')
    quant_pre_process(file, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        out,
        SimpleNamespace(get_next=partial(next, batches, None)),  # acts as a CalibrationDataReader
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        extra_options={'ActivationSymmetric': True, 'QuantizeBias': False} if symmetric else {},
    )


def load_onnx(file: Path) -> tuple[str, Callable[[str], Run]]:
    """Loads a file; returns its record, and a function that starts onnxruntime.

    The runtime gets the bytes, not the path, because it would open any file that a tensor in the model refers to.
    """
    import onnx

    with open_regular(file) as opened:
        content = opened.read()
    model = onnx.load_model_from_string(content)
    if any(tensor.external_data or tensor.data_location == tensor.EXTERNAL for tensor in find_tensors(model)):
        raise ValueError('it refers to other files, but an exported model is a single file')
    record = next((each.value for each in model.metadata_props if each.key == RECORD), '')

    def start(precision: str) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors only
        # This optimizer makes signed quantization unsigned, which saturates on processors without VNNI.
        skipped = ['QDQS8ToU8Transformer']
        providers = ['CPUExecutionProvider']
        session = onnxruntime.InferenceSession(content, options, providers, disabled_optimizers=skipped)
        name = session.get_inputs()[0].name
        return lambda images: [torch.from_numpy(output) for output in session.run(None, {name: images.numpy()})]

    return record, start


def find_tensors(message: Any) -> Iterator[Any]:
    """Finds the tensors of an ONNX model, wherever the format allows them: in graphs, attributes and functions."""
    from google.protobuf.message import Message  # type: ignore[import-untyped]

    if message.DESCRIPTOR.name == 'TensorProto':
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in [value] if isinstance(value, Message) else value:
                yield from find_tensors(each)
