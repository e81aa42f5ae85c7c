"""Exported files compute in onnxruntime and OpenVINO what the models compute in torch, also in 8 bits."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from eight_bits import measure
from support import TRUNKS, assert_same, built, fitting, slow_but, tiny

from integration.conftest import digits
from timm_res2net import CheckpointError, export, load_exported
from timm_res2net.deploy.backend_onnx import OPSET
from timm_res2net.models.variants import ASSETS
from timm_res2net.recipes.digits import main as write_digits
from timm_res2net.vision.predict import pretrained_model
from timm_res2net.vision.validate import labeled_images, validate
from timm_res2net.weights.config import RECORD

onnx = pytest.importorskip('onnx')
openvino = pytest.importorskip('openvino')
pytest.importorskip('nncf')

pytestmark = pytest.mark.filterwarnings('ignore')  # exporters warn about their own internals
FORMATS = '.onnx', '.xml'
CASES = [(name, suffix) for name in TRUNKS for suffix in FORMATS]  # an export to ONNX takes ten seconds


@pytest.mark.parametrize('case', slow_but([CASES[0], *CASES[1::2]], CASES), ids=str)
def test_export_every_trunk_runs_at_any_batch_and_image_size(case: tuple[str, str], tmp_path: Path) -> None:
    name, suffix = case
    model = built(name)
    done = export(model, tmp_path / f'net{suffix}', size=32, dynamic_size=True)
    assert done.images == 5
    assert done.largest_difference < 1e-5
    loaded = load_exported(done.file)
    for shape in ((5, 3, 32, 32), (1, 3, 32, 32), (2, 3, 40, 33)):
        assert_same(loaded, model, torch.randn(shape))


def kernels_of_convolutions(file: Path) -> list[str]:
    """Returns the kernels that OpenVINO runs a file's convolutions with, such as 'brgconv_avx512_i8'."""
    compiled = openvino.Core().compile_model(file, 'CPU')
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    convolutions = [node for node in nodes if node['layerType'].astype(str) == 'Convolution']
    return [node['primitiveType'].astype(str).lower() for node in convolutions]  # AMX writes i8, VNNI I8


def zero_points(file: Path) -> list[Any]:
    """Returns the zero points of an ONNX file's quantizers."""
    graph = onnx.load(file).graph
    values = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    return [values[node.input[2]] for node in graph.node if node.op_type in ('QuantizeLinear', 'DequantizeLinear')]


@pytest.mark.parametrize('case', slow_but([('dla60_res2net', '.xml')], CASES), ids=str)
def test_export_every_trunk_in_8_bits_is_close_and_a_third_as_large(case: tuple[str, str], tmp_path: Path) -> None:
    name, suffix = case
    model = built(name)
    images = fitting(name, torch.randn(8, 3, 32, 32))
    done = export(model, tmp_path / f'net{suffix}', precision='int8', images=images, size=images.shape[-1])
    assert done.mean_difference < 0.08
    assert done.images == 8
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert done.bytes < 1.6 * weights + 500_000
    if suffix == '.xml' and name == 'dla60_res2net':
        assert [kernel for kernel in kernels_of_convolutions(done.file) if not kernel.endswith('i8')] == []


@pytest.mark.parametrize('suffix', FORMATS)
def test_export_deformable_model_in_8_bits_is_close_and_takes_its_batch_size(suffix: str, tmp_path: Path) -> None:
    model = tiny(deformable=(None, 'v2', 'v2', 'v2'), first_block='mmdet')
    images = torch.randn(5, 3, 32, 32)
    done = export(model, tmp_path / f'net{suffix}', precision='int8', images=images, size=32, batch=2)
    assert done.mean_difference < 0.2
    loaded = load_exported(done.file)
    assert loaded(images[:2]).shape == (2, model.num_classes)
    for wrong in (images[:3], images[:2, :, :8]):
        with pytest.raises(ValueError, match=r'images must be \(2, 3, 32, 32\)'):
            loaded(wrong)


@pytest.mark.parametrize('suffix', FORMATS)
@pytest.mark.parametrize(
    'arguments',
    [
        dict(features_only=True, feature_cls='dict', out_indices=(1, 4)),
        dict(first_block='mmdet', style='caffe', deformable=(None, None, 'v1', 'v2')),
        dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), stem_ceil_mode=True, act_layer='silu'),
    ],
    ids=str,
)
def test_export_features_and_other_functions_computes_the_same(
    arguments: dict[str, Any], suffix: str, tmp_path: Path
) -> None:
    assert export(tiny(**arguments), tmp_path / f'net{suffix}', size=64).largest_difference < 1e-5


@pytest.mark.parametrize(('suffix', 'opset'), [('.onnx', None), ('.onnx', 18), ('.onnx', 23), ('.xml', None)])
def test_export_writes_metadata_names_and_opset_of_the_format(suffix: str, opset: int | None, tmp_path: Path) -> None:
    model = tiny(features_only=True)
    export(model, tmp_path / f'net{suffix}', size=32, batch=2, opset=opset)
    if suffix == '.onnx':
        file = onnx.load(tmp_path / 'net.onnx')
        text = {each.key: each.value for each in file.metadata_props}[RECORD]
        names = [output.name for output in file.graph.output]
        assert file.opset_import[0].version == (opset or OPSET)
    else:
        read = openvino.Core().read_model(tmp_path / 'net.xml')
        text = read.get_rt_info(RECORD).astype(str)
        names = [output.get_any_name() for output in read.outputs]
    record = json.loads(text)
    assert names == [output['name'] for output in record['outputs']] == model.feature_info.module_name()
    assert record['function'] == {'first_block': 'official'}
    assert record['input'] == [2, 3, 32, 32]


@pytest.mark.parametrize(('suffix', 'precision'), [('.onnx', 'float16'), ('.xml', 'float16'), ('.xml', 'bfloat16')])
def test_export_in_half_precision_takes_two_bytes_per_weight(suffix: str, precision: str, tmp_path: Path) -> None:
    model = built('test_res2net')
    done = export(model, tmp_path / f'net{suffix}', precision=precision, size=32)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert done.bytes < 2 * weights + 500_000
    assert 1e-5 < done.largest_difference < 0.1


@pytest.mark.parametrize('suffix', FORMATS)
def test_export_digits_in_8_bits_loses_at_most_a_fifth_of_a_percent(suffix: str, tmp_path: Path) -> None:
    model = timm.create_model('test_res2net.digits', pretrained=True).eval()
    signed = suffix == '.onnx'  # unsigned kernels saturate on processors without VNNI
    done = export(model, tmp_path / f'net{suffix}', precision='int8', images=digits('train', 100), symmetric=signed)
    assert done.mean_difference < (0.06 if signed else 0.035)
    assert done.path == ('fused, ONNX, int8, symmetric' if signed else 'fused, OpenVINO, int8')
    if signed:
        points = zero_points(done.file)
        assert {str(point.dtype) for point in points} == {'int8'}
        assert not any(point.any() for point in points)
    else:
        assert [kernel for kernel in kernels_of_convolutions(done.file) if not kernel.endswith('i8')] == []
    write_digits([str(tmp_path)])
    images = labeled_images(tmp_path / 'val', [str(i) for i in range(10)])
    loaded = pretrained_model(None, str(tmp_path / f'net{suffix}'))
    assert validate(loaded, images).top1 >= validate(model, images).top1 - 0.2


def test_openvino_file_with_missing_weights_or_a_pipe_is_refused(tmp_path: Path) -> None:
    export(tiny(), tmp_path / 'net.xml', size=32)
    (tmp_path / 'net.bin').unlink()
    with pytest.raises(CheckpointError, match=r"cannot load '.*net\.xml': .*No such file"):
        load_exported(tmp_path / 'net.xml')
    os.mkfifo(tmp_path / 'net.bin')
    with pytest.raises(CheckpointError, match='not a regular file'):
        load_exported(tmp_path / 'net.xml')


@pytest.mark.parametrize('place', ['graph', 'function'])
def test_onnx_file_that_refers_to_another_file_is_refused_without_opening_it(place: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / 'pipe')  # opening it would never return
    tensor = onnx.TensorProto(name='x', data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key='location', value='pipe')
    model = onnx.helper.make_model(onnx.helper.make_graph([], 'graph', [], []))
    if place == 'graph':
        model.graph.initializer.append(tensor)
    else:
        node = onnx.helper.make_node('Constant', [], ['y'], value=tensor)
        model.functions.append(onnx.helper.make_function('local', 'f', [], ['y'], [node], model.opset_import))
    (tmp_path / 'net.onnx').write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match='it refers to other files'):
        load_exported(tmp_path / 'net.onnx')


@pytest.mark.slow
def test_error_of_int8_matches_the_table() -> None:
    rows = {row['model']: row for row in json.loads((ASSETS / 'int8.json').read_text())['results']}
    name = 'res2next29_6c_24w_4s'
    found = measure(name)
    for runtime in ('openvino', 'onnx'):
        assert found[runtime] == pytest.approx(rows[name][runtime], rel=0.25)  # other processors round differently
