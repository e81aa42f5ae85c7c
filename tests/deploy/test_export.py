"""Exported files are verified before they appear; an export that fails raises one clear error and writes nothing."""

import copy
import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save
from support import tiny
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import timm_res2net
from timm_res2net import CheckpointError, export, load_exported, optimize
from timm_res2net.deploy import calibration
from timm_res2net.deploy import export as export_module
from timm_res2net.deploy.backends import BACKENDS
from timm_res2net.deploy.calibration import calibration_images
from timm_res2net.deploy.export import predict_classes, publish
from timm_res2net.models.classifier import class_names

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
SIZE: dict[str, Any] = dict(size=32)
FEW: dict[str, Any] = dict(layers=(1, 1, 1, 1), scale=2)  # few operators to export


def test_export_torch_file_computes_what_the_model_does_at_any_batch_size(tmp_path: Path) -> None:
    model = tiny('mmdet', style='caffe', strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)).bfloat16().float()
    done = export(copy.deepcopy(model).bfloat16(), tmp_path / 'net.pt2', **SIZE)
    assert (done.path, done.bytes) == ('fused, torch, float32', (tmp_path / 'net.pt2').stat().st_size)
    assert (done.agreement, done.images) == (1, 3)
    assert done.largest_difference < 1e-5
    loaded = load_exported(tmp_path / 'net.pt2', trust=True)
    for batch in (0, 1, 2, 5):
        x = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(loaded(x), model(x).detach(), rtol=0, atol=1e-4)
    x = torch.randn(3, 3, 32, 32)
    x[1, 0, 0, 0] = torch.inf
    assert loaded(x).isnan().all(dim=1).tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r'images must be \(N, 3, 32, 32\), got \(2, 3, 16, 32\)'):
        loaded(torch.zeros(2, 3, 16, 32))
    with pytest.raises(ValueError, match=r'images must be floating-point, got torch\.uint8'):
        loaded(torch.zeros(1, 3, 32, 32).byte())
    assert [path.name for path in tmp_path.iterdir()] == ['net.pt2']


@pytest.mark.slow
def test_exported_file_describes_itself_even_if_the_model_was_compiled(tmp_path: Path) -> None:
    cfg = dict(
        input_size=(3, 32, 32), mean=(0.1, 0.2, 0.3), license='mit', origin_url='https://a.b', label_names=[*'abcd']
    )
    model = tiny('mmdet', **FEW, pretrained_cfg_overlay=cfg)
    export(torch.compile(model, backend='eager'), tmp_path / 'net.pt2', batch=2)
    loaded = load_exported(tmp_path / 'net.pt2', trust=True)
    state = {name: tensor.contiguous() for name, tensor in sorted(model.state_dict().items())}
    expected = dict(
        architecture='test_res2net',
        function={'first_block': 'mmdet'},
        format='torch',
        precision='float32',
        input=[2, 3, 32, 32],
        outputs=[{'name': 'logits'}],
        features=False,
        weights_sha256=hashlib.sha256(save(state)).hexdigest(),
        version=timm_res2net.__version__,
    )
    cfg = loaded.record.pop('pretrained_cfg')
    assert loaded.record == expected
    assert (cfg['license'], cfg['origin_url']) == ('mit', 'https://a.b')
    assert class_names(loaded) == [*'abcd']
    assert resolve_model_data_config(loaded) == resolve_model_data_config(model)
    with pytest.raises(ValueError, match=r'images must be \(2, 3, 32, 32\)'):
        loaded(torch.zeros(3, 3, 32, 32))


@pytest.mark.slow
def test_export_features_returns_them_with_names_and_strides(tmp_path: Path) -> None:
    model = tiny(**FEW, features_only=True, feature_cls='dict', out_indices=(2, 4))
    assert export(model, tmp_path / 'net.pt2', **SIZE).agreement is None
    loaded = load_exported(tmp_path / 'net.pt2', trust=True)
    info = model.feature_info
    names = [{'name': name, 'stride': stride} for name, stride in zip(info.module_name(), info.reduction())]
    assert loaded.record['outputs'] == names
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), [each.detach() for each in tree_leaves(model(x))], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_export_torch_in_half_precision_takes_and_returns_float32(tmp_path: Path) -> None:
    model = tiny()
    done = export(model, tmp_path / 'net.pt2', precision='bfloat16', **SIZE)
    assert 1e-5 < done.largest_difference < 0.1
    x = torch.randn(2, 3, 32, 32)
    found = load_exported(tmp_path / 'net.pt2', trust=True)(x)
    torch.testing.assert_close(found, model(x).detach(), rtol=0, atol=0.2)


def optimized() -> nn.Module:
    return optimize(tiny(features_only=True), torch.zeros(1, 3, 32, 32), compile=False)


@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        ('net.tflite', {}, "unknown suffix of .*net.tflite'. Choose from .onnx, .xml, .pt2"),
        ('net.pt2', dict(precision='int8'), ".pt2 does not support precision='int8'. Choose from float32"),
        ('net.pt2', dict(opset=20), 'opset and symmetric have no effect on .pt2. They are for .onnx'),
        ('net.xml', dict(symmetric=True), 'opset and symmetric have no effect on .xml. They are for .onnx'),
        ('net.onnx', dict(symmetric=True), "no effect on float32. It is for precision='int8'"),
        ('none/net.pt2', {}, 'cannot write net.pt2: no folder .*none'),
        ('there.pt2', {}, "cannot write '.*there.pt2': it already exists"),
        ('there.xml', {}, "cannot write '.*there.bin': it already exists"),
        ('net.pt2', dict(images=torch.zeros(2, 3, 16, 16)), r'\(N, 3, 32, 32\).*\(2, 3, 16, 16\)'),
        ('net.pt2', dict(images=torch.zeros(0, 3, 32, 32)), 'images is empty'),
        ('net.pt2', dict(images=[{'image': 1}]), 'must be tensors, .* got dict'),
        ('net.pt2', dict(images='nowhere'), "cannot use 'nowhere': no such file"),
        ('net.pt2', dict(images=torch.zeros(1, 3, 32, 32).byte()), 'got .*torch.uint8'),
        ('net.pt2', dict(batch=0), "invalid 'input' in its metadata"),
        ('net.onnx', dict(precision='int8'), 'int8 requires images'),
        ('net.onnx', dict(opset=17), 'opset must be from 18 to 23, got 17'),
        ('net.pt2', dict(model=lambda: tiny().train()), 'training mode'),
        ('net.pt2', dict(model=lambda: nn.Sequential(tiny()).eval()), 'it is not a timm model'),
        ('net.pt2', dict(model=optimized), 'cannot export an optimized or exported model'),
    ],
)
def test_export_with_a_wrong_argument_raises_one_line_and_writes_nothing(
    name: str, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    there = [tmp_path / 'there.bin', tmp_path / 'there.pt2']
    for file in there:
        file.write_text('mine')
    arguments = {'model': tiny, **SIZE, **arguments}
    with pytest.raises(FileNotFoundError if 'no folder' in message else ValueError, match=message) as caught:
        export(arguments.pop('model')(), tmp_path / name, **arguments)
    assert '\n' not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == there
    assert [file.read_text() for file in there] == ['mine', 'mine']


@pytest.mark.parametrize(
    ('fault', 'message'),
    [
        (RuntimeError('no such operator\nat line 3'), 'cannot export test_res2net to .pt2, float32: no such operator'),
        (KeyboardInterrupt(), None),
    ],
)
def test_interrupted_export_leaves_nothing(
    fault: BaseException, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(program: Any, file: Path) -> None:
        file.write_bytes(b'half a file')
        raise fault

    monkeypatch.setitem(BACKENDS, '.pt2', replace(BACKENDS['.pt2'], write=fail))
    with pytest.raises((ValueError, KeyboardInterrupt), match=message):
        export(tiny(), tmp_path / 'net.pt2', **SIZE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_export_to_a_full_disk_is_an_os_error_that_names_the_file(tmp_path: Path) -> None:
    resource = pytest.importorskip('resource')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write '.*net\.pt2': .*File too large"):
            export(tiny(**FEW), tmp_path / 'net.pt2', **SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('change', 'problem'),
    [
        (lambda last: last[:, :2], 'have other shapes than'),
        (lambda last: last * torch.nan, "differ from the model's by nan%"),
        (lambda last: last * 1.001, "differ from the model's by 0.10%"),
    ],
)
def test_export_with_a_wrong_output_is_discarded(
    change: Callable[[Tensor], Tensor], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(images: Tensor) -> list[Tensor]:
        *others, last = model(images)
        return [*others, change(last)]

    model = tiny(features_only=True)
    monkeypatch.setitem(BACKENDS, '.pt2', replace(BACKENDS['.pt2'], write=lambda program, file: file.touch()))
    monkeypatch.setattr(export_module, 'load_exported', lambda file, trust: run)
    with pytest.raises(ValueError, match=f'discarded: its outputs {problem}'):
        export(model, tmp_path / 'net.pt2', **SIZE)
    assert list(tmp_path.iterdir()) == []


def test_two_exports_to_one_name_leave_the_files_of_the_first_whose_bin_appears_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace_and_record(source: Path, target: Path) -> None:
        moved.append(target.name)
        source.rename(target)

    moved: list[str] = []
    monkeypatch.setattr('os.replace', replace_and_record)
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        for part in ('net.xml', 'net.bin'):
            (tmp_path / str(i) / part).write_text(f'{part} of {i}')
    publish(tmp_path / '0', tmp_path / 'net.xml')
    with pytest.raises(ValueError, match=r'net\.xml.: it already exists'):
        publish(tmp_path / '1', tmp_path / 'net.xml')
    assert moved == ['net.bin', 'net.xml']
    contents = {part.name: part.read_text() for part in tmp_path.glob('net.*')}
    assert contents == {'net.xml': 'net.xml of 0', 'net.bin': 'net.bin of 0'}


@pytest.mark.slow
def test_export_torch_file_with_dynamic_size_takes_sizes_that_leave_two_pixels_in_the_last_map(tmp_path: Path) -> None:
    model = tiny()
    done = export(model, tmp_path / 'net.pt2', size=64, dynamic_size=True)
    assert done.images == 5
    loaded = load_exported(done.file, trust=True)
    assert loaded.record['input'] == [None, 3, None, None]
    assert loaded.pretrained_cfg['input_size'] == (3, 64, 64)
    for shape in ((2, 3, 33, 40), (1, 3, 97, 64)):
        x = torch.randn(shape)
        torch.testing.assert_close(loaded(x), model(x).detach(), rtol=0, atol=1e-4)
    with pytest.raises(CheckpointError, match=r"cannot run 'net\.pt2': Guard failed"):
        loaded(torch.zeros(1, 3, 32, 32))


def test_predicted_class_of_a_single_logit_is_its_sign() -> None:
    logits = torch.tensor([[-1.0], [2.0]])
    assert predict_classes(logits).tolist() == [False, True]
    assert predict_classes(torch.cat([logits, -logits], 1)).tolist() == [1, 0]


def test_export_without_a_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'openvino', None)
    with pytest.raises(ImportError, match=r'\.xml requires .*pip install "timm_res2net\[deploy\]"'):
        export(tiny(), tmp_path / 'net.xml', **SIZE)
    assert list(tmp_path.iterdir()) == []


def test_calibration_images_come_from_tensors_and_loaders() -> None:
    model, x = timm.create_model('test_res2net.digits'), torch.randn(500, 3, 32, 32)
    assert torch.equal(calibration_images(model, x, (3, 32, 32)), x[:300])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:20], torch.zeros(20)), batch_size=8)
    assert torch.equal(calibration_images(model, loader, (3, 32, 32)), x[:20])


def test_calibration_images_of_a_folder_are_preprocessed_and_of_all_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, 'CALIBRATION_IMAGES', 5)
    for i in range(9):
        (tmp_path / str(i // 3)).mkdir(exist_ok=True)
        Image.new('L', (8, 8), i * 28).save(tmp_path / str(i // 3) / f'{i}.png')
    model = timm.create_model('test_res2net.digits')
    found = calibration_images(model, tmp_path, (3, 32, 32))
    assert found.shape == (5, 3, 32, 32)
    shades = found[:, 0, 0, 0].mul(127.5).add(127.5).div(28).round().tolist()
    assert shades == [0, 1, 3, 5, 7]
    (tmp_path / '0' / '1.png').write_bytes(b'no image')
    with pytest.raises(ValueError, match=r"cannot use '.*/1\.png': "):
        calibration_images(model, tmp_path, (3, 32, 32))
