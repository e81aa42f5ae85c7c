"""Exported files run in onnxruntime and OpenVINO as the models do in torch, also in 8 bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from support import TRUNKS, built, fitting, randomise, tiny

from integration.conftest import digits
from timm_res2net import CheckpointError, export, optimize
from timm_res2net.deploy.images import bundled_digits
from timm_res2net.deploy.runtimes import METADATA, load_exported
from timm_res2net.recipes.digits import split
from timm_res2net.vision.predict import predict, pretrained_model
from timm_res2net.vision.validate import labelled_images, validate

onnx = pytest.importorskip('onnx')
openvino = pytest.importorskip('openvino')
pytest.importorskip('nncf')

pytestmark = pytest.mark.filterwarnings(
    'ignore::FutureWarning', 'ignore::UserWarning', 'ignore::DeprecationWarning', 'ignore::SyntaxWarning'
)
FORMATS = '.onnx', '.xml'


@pytest.mark.parametrize('suffix', FORMATS)
@pytest.mark.parametrize('name', TRUNKS)
def test_export_every_trunk_runs_in_its_runtime_at_any_batch_size(name: str, suffix: str, tmp_path: Path) -> None:
    model = built(name)
    images = fitting(name, torch.randn(5, 3, 32, 32))
    done = export(model, tmp_path / f'net{suffix}', size=images.shape[-1])
    assert done.largest_difference < 1e-5
    loaded = load_exported(done.file)
    for x in (images, images[:1], images[:3]):
        expected = model(x).detach()
        torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    with pytest.raises(ValueError, match='this was exported for'):
        loaded(images[..., :8])


@pytest.mark.parametrize(('name', 'suffix'), [*((name, '.onnx') for name in TRUNKS), ('dla60_res2net', '.xml')])
def test_export_every_trunk_in_8_bits_is_close_and_a_third_as_large(name: str, suffix: str, tmp_path: Path) -> None:
    model = built(name)
    images = fitting(name, torch.randn(8, 3, 32, 32))
    done = export(model, tmp_path / f'net{suffix}', precision='int8', images=images, size=images.shape[-1])
    assert done.mean_difference < 0.08
    assert done.images == 8
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert done.bytes < 1.6 * weights + 500_000
    if suffix == '.xml':
        assert [kernel for kernel in kernels_of_convolutions(done.file) if not kernel.endswith('I8')] == []


@pytest.mark.parametrize('suffix', FORMATS)
def test_export_in_8_bits_for_one_batch_size_is_calibrated_and_takes_it(suffix: str, tmp_path: Path) -> None:
    model, images = tiny(), torch.randn(5, 3, 32, 32)
    done = export(model, tmp_path / f'net{suffix}', precision='int8', images=images, size=32, batch=2)
    assert done.mean_difference < 0.08
    loaded = load_exported(done.file)
    assert loaded(images[:2]).shape == (2, model.num_classes)
    with pytest.raises(ValueError, match=r'this was exported for \(2, 3, 32, 32\)'):
        loaded(images[:3])


@pytest.mark.parametrize('suffix', FORMATS)
def test_export_deformable_model_in_8_bits_is_close(suffix: str, tmp_path: Path) -> None:
    model = randomise(tiny(deformable=(None, 'v2', 'v2', 'v2'), first_block='mmdet'))
    done = export(model, tmp_path / f'net{suffix}', precision='int8', images=torch.randn(16, 3, 64, 64), size=64)
    assert done.mean_difference < 0.2


def kernels_of_convolutions(file: Path) -> list[str]:
    """What OpenVINO runs a file's convolutions by, such as 'brgconv_avx512_I8'."""
    compiled = openvino.Core().compile_model(file, 'CPU')
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    return [node['primitiveType'].astype(str) for node in nodes if node['layerType'].astype(str) == 'Convolution']


@pytest.mark.parametrize('suffix', FORMATS)
@pytest.mark.parametrize(
    'arguments',
    [
        dict(features_only=True),
        dict(features_only=True, feature_cls='dict', out_indices=(1, 4)),
        dict(first_block='mmdet', style='caffe', deformable=(None, None, 'v1', 'v2')),
        dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), stem_ceil_mode=True, act_layer='silu'),
    ],
    ids=str,
)
def test_export_features_and_other_functions(arguments: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    model = tiny(**arguments)
    export(model, tmp_path / f'net{suffix}', size=64)
    loaded = load_exported(tmp_path / f'net{suffix}')
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = model(x), loaded(x)
    if 'features_only' in arguments:
        expected = list(expected.values()) if isinstance(expected, dict) else expected
        strides = [output['stride'] for output in loaded.record['outputs']]
        assert [64 // feature.shape[-1] for feature in found] == strides
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('suffix', FORMATS)
def test_export_metadata_are_the_formats_own(suffix: str, tmp_path: Path) -> None:
    model = timm.create_model('test_res2net.digits', pretrained=True, features_only=True).eval()
    export(model, tmp_path / f'net{suffix}', size=32, batch=2)
    if suffix == '.onnx':
        file = onnx.load(tmp_path / 'net.onnx')
        text = {each.key: each.value for each in file.metadata_props}[METADATA]
        names = [output.name for output in file.graph.output]
        assert (file.opset_import[0].version, file.ir_version) == (20, 10)
    else:
        read = openvino.Core().read_model(tmp_path / 'net.xml')
        text = read.get_rt_info(METADATA).astype(str)
        names = [output.get_any_name() for output in read.outputs]
    record = json.loads(text)
    assert names == [output['name'] for output in record['outputs']] == model.feature_info.module_name()
    assert record['function'] == {'first_block': 'official'}
    assert record['input'] == [2, 3, 32, 32]


@pytest.mark.parametrize(('suffix', 'precision'), [('.onnx', 'float16'), ('.xml', 'float16'), ('.xml', 'bfloat16')])
def test_export_in_half_precision_is_half_as_large(suffix: str, precision: str, tmp_path: Path) -> None:
    model = built('test_res2net')
    whole = export(model, tmp_path / f'whole{suffix}', size=32)
    half = export(model, tmp_path / f'half{suffix}', precision=precision, size=32)
    assert half.bytes < 0.65 * whole.bytes
    assert 1e-5 < half.largest_difference < 0.1


@pytest.mark.parametrize('suffix', FORMATS)
def test_export_digits_in_8_bits_lose_at_most_a_fifth_of_a_percent(suffix: str, tmp_path: Path) -> None:
    model = timm.create_model('test_res2net.digits', pretrained=True).eval()
    done = export(
        model, tmp_path / f'net{suffix}', precision='int8', images=digits('train', 200 if suffix == '.onnx' else 100)
    )
    assert done.mean_difference < 0.035
    if suffix == '.xml':
        assert [kernel for kernel in kernels_of_convolutions(done.file) if not kernel.endswith('I8')] == []
    for i, (image, label) in enumerate(zip(*split()['val'])):
        (tmp_path / 'val' / str(label)).mkdir(exist_ok=True, parents=True)
        Image.fromarray(image).save(tmp_path / 'val' / str(label) / f'{i}.png')
    images = labelled_images(tmp_path / 'val', [str(i) for i in range(10)])
    loaded = pretrained_model(None, str(tmp_path / f'net{suffix}'))
    assert validate(loaded, images).top1 >= validate(model, images).top1 - 0.2
    pictures = [image for image, _ in bundled_digits()]
    labels = [[found[0].label for found in predict(each, pictures, lambda x: x)] for each in (model, loaded)]
    assert sum(a == b for a, b in zip(*labels)) >= 59


def test_optimize_int8_by_openvino_is_quantized_and_close() -> None:
    model = timm.create_model('test_res2net.digits', pretrained=True).eval()
    images = digits('train', 16)
    optimized = optimize(model, images, dtype=torch.int8, backend='openvino')
    assert optimized.path == 'fused, int8, OpenVINO'
    found, expected = optimized(images[:8]), model(images[:8]).detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.2 * float(expected.abs().max()))
    assert not torch.allclose(found, expected, atol=1e-3)
    with pytest.raises(ValueError, match=r'compile=False has no meaning for .*torch\.int8'):
        optimize(model, images, dtype=torch.int8, backend='openvino', compile=False)


def test_openvino_model_is_compiled_for_the_first_batch_size_and_once_for_all_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_model, shapes = openvino.Core.compile_model, []

    def recorded(core: Any, model: Any, *args: Any) -> Any:
        shapes.append(str(model.inputs[0].get_partial_shape()))
        return compile_model(core, model, *args)

    monkeypatch.setattr(openvino.Core, 'compile_model', recorded)
    optimized = optimize(tiny(), torch.randn(2, 3, 32, 32), backend='openvino')
    assert shapes == ['[2,3,32,32]']
    for batch in (2, 1, 5, 2, 3):
        assert len(optimized(torch.randn(batch, 3, 32, 32))) == batch
    assert shapes == ['[2,3,32,32]', '[?,3,32,32]']


def test_load_exported_without_its_bin_is_refused(tmp_path: Path) -> None:
    export(tiny(), tmp_path / 'net.xml', size=32)
    (tmp_path / 'net.bin').unlink()
    with pytest.raises(CheckpointError, match=r'net\.xml can not be loaded'):
        load_exported(tmp_path / 'net.xml')
