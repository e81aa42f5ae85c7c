"""Exported files are verified before they appear; what can't be exported is one clear error, and nothing is written."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from support import tiny
from timm.data import resolve_model_data_config
from torch import nn

import timm_res2net
from timm_res2net import CheckpointError, export, fuse, optimize
from timm_res2net.deploy import export as export_module
from timm_res2net.deploy import quantize, runtimes
from timm_res2net.deploy.export import PRECISIONS
from timm_res2net.deploy.quantize import calibration_images
from timm_res2net.deploy.runtimes import load_exported
from timm_res2net.models.block import function_of
from timm_res2net.models.classifier import class_names
from timm_res2net.models.function import Function
from timm_res2net.vision.predict import pretrained_model

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
SIZE: dict[str, Any] = dict(size=32)


def test_export_torch_file_computes_what_the_model_does_at_any_batch_size(tmp_path: Path) -> None:
    model = tiny('mmdet', style='caffe', strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2))
    done = export(model, tmp_path / 'net.pt2', **SIZE)
    assert (done.path, done.bytes) == ('fused, torch, float32', (tmp_path / 'net.pt2').stat().st_size)
    assert done.agreement == 1
    assert done.largest_difference < 1e-5
    loaded = load_exported(tmp_path / 'net.pt2')
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(loaded(x), model(x).detach(), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r'images are \(2, 3, 16, 32\); this was exported for \(N, 3, 32, 32\)'):
        loaded(torch.zeros(2, 3, 16, 32))
    assert [path.name for path in tmp_path.iterdir()] == ['net.pt2']


def test_load_exported_refuses_integers_and_passes_on_what_is_not_finite(tmp_path: Path) -> None:
    export(tiny(), tmp_path / 'net.pt2', **SIZE)
    loaded = load_exported(tmp_path / 'net.pt2')
    x = torch.randn(3, 3, 32, 32)
    x[1, 0, 0, 0] = torch.inf
    assert loaded(x).isnan().all(dim=1).tolist() == [False, True, False]
    assert loaded(x[:0]).shape == (0, 4)
    with pytest.raises(ValueError, match=r'images are of torch\.uint8; give floating-point numbers'):
        loaded(torch.zeros(1, 3, 32, 32).byte())


def test_export_file_says_what_it_is(tmp_path: Path) -> None:
    model = timm.create_model('test_res2net.digits', pretrained=True).eval()
    export(model, tmp_path / 'net.pt2', batch=2)
    loaded = load_exported(tmp_path / 'net.pt2')
    record = loaded.record
    assert record['architecture'] == 'test_res2net'
    assert Function.from_text(record['function']) == function_of(model)
    assert (record['input'], record['outputs'], record['precision']) == (
        [2, 3, 32, 32],
        [{'name': 'logits'}],
        'float32',
    )
    assert record['pretrained_cfg']['license'] == 'apache-2.0'
    assert record['pretrained_cfg']['origin_url'] == model.pretrained_cfg['origin_url']
    assert record['version'] == timm_res2net.__version__
    assert class_names(loaded) == class_names(model)
    config, original = resolve_model_data_config(loaded), resolve_model_data_config(model)
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()} == original
    with torch.no_grad():
        model.fc.bias[0] += 1
    export(model, tmp_path / 'other.pt2', batch=2)
    assert load_exported(tmp_path / 'other.pt2').record['weights_sha256'] != record['weights_sha256']
    with pytest.raises(ValueError, match=r'exported for \(2, 3, 32, 32\)'):
        loaded(torch.zeros(3, 3, 32, 32))


@pytest.mark.parametrize('arguments', [{}, dict(feature_cls='dict', out_indices=(2, 4))], ids=str)
def test_export_features_returns_them_with_names_and_strides(arguments: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(features_only=True, **arguments)
    done = export(model, tmp_path / 'net.pt2', **SIZE)
    assert done.agreement is None
    loaded = load_exported(tmp_path / 'net.pt2')
    info = model.feature_info
    names = [{'name': name, 'stride': stride} for name, stride in zip(info.module_name(), info.reduction())]
    assert loaded.record['outputs'] == names
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    expected = list(expected.values()) if isinstance(expected, dict) else expected
    torch.testing.assert_close(loaded(x), [each.detach() for each in expected], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r'net\.pt2 returns feature maps and no classes'):
        pretrained_model(None, tmp_path / 'net.pt2')
    with pytest.raises(ValueError, match='ExportedModel has no Res2Net block'):
        export(loaded, tmp_path / 'again.pt2', **SIZE)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # timm leaves files open
@pytest.mark.parametrize('features_only', [False, True])
def test_export_of_one_channel_says_one_mean_and_reads_a_folder_as_grey(features_only: bool, tmp_path: Path) -> None:
    (tmp_path / 'photos').mkdir()
    Image.new('RGB', (40, 40), 'red').save(tmp_path / 'photos' / 'a.png')
    model = tiny(in_chans=1, features_only=features_only)
    export(model, tmp_path / 'net.pt2', images=tmp_path / 'photos')
    cfg = load_exported(tmp_path / 'net.pt2').pretrained_cfg
    assert (cfg['input_size'], cfg['mean'], cfg['std']) == ([1, 32, 32], [0.5], [0.5])


@pytest.mark.parametrize('precision', ['float16', 'bfloat16'])
def test_export_torch_in_half_precision_takes_and_returns_float32(precision: str, tmp_path: Path) -> None:
    model = tiny()
    done = export(model, tmp_path / 'net.pt2', precision=precision, **SIZE)
    assert 1e-5 < done.largest_difference < 0.1
    x = torch.randn(2, 3, 32, 32)
    found = load_exported(tmp_path / 'net.pt2')(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, model(x).detach(), rtol=0, atol=0.2)


class Foreign(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def optimized() -> nn.Module:
    return optimize(tiny(features_only=True), torch.zeros(1, 3, 32, 32), compile=False)


@pytest.mark.parametrize(
    ('model', 'name', 'arguments', 'error', 'message'),
    [
        (lambda: tiny().train(), 'net.pt2', {}, ValueError, 'training mode'),
        (lambda: Foreign().eval(), 'net.pt2', {}, ValueError, 'has no Res2Net block'),
        (tiny, 'net.tflite', {}, ValueError, 'no known suffix; choose .onnx, .xml, .pt2'),
        (tiny, 'net.pt2', dict(precision='int8'), ValueError, "'int8' is not possible in .pt2; choose from float32"),
        (tiny, 'net.pt2', dict(precision='float8'), ValueError, "precision='float8' is not possible"),
        (tiny, 'net.onnx', dict(compile=True), ValueError, 'compile is for .pt2'),
        (tiny, 'none/net.pt2', {}, FileNotFoundError, 'there is no folder'),
        (tiny, 'there.pt2', {}, ValueError, 'there is a .*there.pt2 already'),
        (
            tiny,
            'net.pt2',
            dict(images=torch.zeros(2, 3, 16, 16)),
            ValueError,
            r'are \(2, 3, 16, 16\) .*give \(N, 3',
        ),
        (tiny, 'net.pt2', dict(images=[]), ValueError, 'no image to calibrate with'),
        (tiny, 'net.pt2', dict(images=torch.zeros(0, 3, 32, 32)), ValueError, 'no image to calibrate with'),
        (tiny, 'net.pt2', dict(images=[{'image': torch.zeros(1, 3, 32, 32)}]), ValueError, 'is a dict; give tensors'),
        (tiny, 'net.pt2', dict(batch=0), ValueError, 'batch=0 is not possible; give a number above zero'),
        (tiny, 'net.pt2', dict(size='32'), ValueError, "size='32' is not possible; give a number above zero"),
        (optimized, 'net.pt2', {}, ValueError, 'an optimized model can not be exported'),
        (tiny, 'net.pt2', dict(images='nowhere'), ValueError, 'nowhere is no folder of images'),
        (tiny, 'net.pt2', dict(images=torch.zeros(1, 3, 32, 32).byte()), ValueError, 'of torch.uint8; give'),
    ],
)
def test_export_bad_input_is_one_clear_error_and_writes_nothing(
    model: Any, name: str, arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / 'there.pt2').write_text('mine')
    with pytest.raises(error, match=message) as caught:
        export(model(), tmp_path / name, **{**SIZE, **arguments})
    assert '\n' not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ['there.pt2']
    assert (tmp_path / 'there.pt2').read_text() == 'mine'


def test_export_xml_does_not_overwrite_a_bin(tmp_path: Path) -> None:
    (tmp_path / 'net.bin').write_text('mine')
    with pytest.raises(ValueError, match=r'there is a .*net\.bin already'):
        export(tiny(), tmp_path / 'net.xml', **SIZE)


@pytest.mark.parametrize(
    ('fault', 'message'),
    [
        (RuntimeError('no such operator\nat line 3'), 'can not be exported to .pt2, float32: no such operator'),
        (OSError(28, 'No space left on device'), r'net\.pt2 can not be written: .*No space left on device'),
        (KeyboardInterrupt(), None),
    ],
)
def test_export_interrupted_leaves_nothing(
    fault: BaseException, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(program: Any, file: Path, *options: Any) -> None:
        file.write_bytes(b'half a file')
        raise fault

    monkeypatch.setattr(export_module, 'write_torch', fail)
    with pytest.raises((ValueError, OSError, KeyboardInterrupt), match=message):
        export(tiny(), tmp_path / 'net.pt2', **SIZE)
    assert list(tmp_path.iterdir()) == []


def test_export_to_a_full_disk_is_an_os_error_that_names_the_file(tmp_path: Path) -> None:
    resource = pytest.importorskip('resource')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(OSError, match=r'net\.pt2 can not be written: .*File too large'):
            export(tiny(), tmp_path / 'net.pt2', **SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_export_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module) -> nn.Module:
        fused = fuse(model)
        nn.init.zeros_(fused.fc.weight)
        return fused

    monkeypatch.setattr(export_module, 'fuse', wrong)
    model = tiny()
    with pytest.raises(ValueError, match=r'computes something else than the model, up to .*was not kept'):
        export(model, tmp_path / 'net.pt2', **SIZE)
    assert list(tmp_path.iterdir()) == []


def test_export_whose_last_features_are_not_a_number_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: nn.Module) -> nn.Module:
        fused = fuse(model)
        nn.init.constant_(next(reversed(list(fused.parameters()))), torch.nan)
        return fused

    model = tiny(features_only=True)
    monkeypatch.setattr(export_module, 'fuse', wrong)
    with pytest.raises(ValueError, match=r'computes something else than the model, up to nan%'):
        export(model, tmp_path / 'net.pt2', **SIZE)
    assert list(tmp_path.iterdir()) == []


def test_export_missing_runtime_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, suffix in (('onnxscript', '.onnx'), ('onnxruntime', '.onnx'), ('openvino', '.xml')):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=r'files need it: .*pip install "timm_res2net\[deploy\]"'):
            export(tiny(), tmp_path / f'net{suffix}', **SIZE)
    assert list(tmp_path.iterdir()) == []


def test_load_exported_other_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    program = torch.export.export(nn.Conv2d(3, 2, 1), (torch.zeros(1, 3, 4, 4),))
    torch.export.save(program, tmp_path / 'foreign.pt2')
    with pytest.raises(CheckpointError, match=r'was not written by timm_res2net\.export'):
        load_exported(tmp_path / 'foreign.pt2')
    (tmp_path / 'broken.pt2').write_bytes(b'PK no archive')
    with pytest.raises(CheckpointError, match=r'broken\.pt2 can not be loaded'):
        load_exported(tmp_path / 'broken.pt2')
    with pytest.raises(CheckpointError, match='there is no such file'):
        load_exported(tmp_path / 'none.pt2')
    with pytest.raises(ValueError, match='is of no known format'):
        load_exported(tmp_path / 'a.pth')


def test_calibration_images_come_from_tensors_loaders_and_folders(tmp_path: Path) -> None:
    model = timm.create_model('test_res2net.digits', pretrained=True)
    x = torch.randn(500, 3, 32, 32)
    assert torch.equal(calibration_images(model, x, (3, 32, 32)), x[:300])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:20], torch.zeros(20)), batch_size=8)
    assert torch.equal(calibration_images(model, loader, (3, 32, 32)), x[:20])
    for i in range(3):
        folder = tmp_path / str(i % 2)
        folder.mkdir(exist_ok=True)
        Image.new('RGB', (40, 40), (i * 100, 0, 0)).save(folder / f'{i}.png')
    found = calibration_images(model, tmp_path, (3, 32, 32))
    assert found.shape == (3, 3, 32, 32)
    assert sorted(round(value, 2) for value in found[:, 0, 0, 0].tolist()) == [-1.0, -0.22, 0.57]


def test_calibration_images_of_a_folder_with_a_damaged_one_are_refused_by_its_name(tmp_path: Path) -> None:
    for i in range(3):
        Image.new('L', (8, 8)).save(tmp_path / f'{i}.png')
    (tmp_path / '1.png').write_bytes((tmp_path / '0.png').read_bytes()[:40])
    with pytest.raises(ValueError, match=r'/1\.png is no image to calibrate with: this'):
        calibration_images(timm.create_model('test_res2net.digits'), tmp_path, (3, 32, 32))


def test_calibration_images_are_of_all_classes_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, 'CALIBRATION_IMAGES', 5)
    for i in range(9):
        (tmp_path / str(i // 3)).mkdir(exist_ok=True)
        Image.new('L', (8, 8), i * 28).save(tmp_path / str(i // 3) / f'{i}.png')
    found = calibration_images(timm.create_model('test_res2net.digits'), tmp_path, (3, 32, 32))
    shades = found[:, 0, 0, 0].mul(127.5).add(127.5).div(28).round().tolist()
    assert shades == [0, 1, 3, 5, 7]


def test_every_format_and_precision_has_a_tolerance_and_a_reader() -> None:
    assert {precision for each in PRECISIONS.values() for precision in each} == export_module.TOLERANCES.keys()
    assert PRECISIONS.keys() == set(runtimes.SUFFIXES)


def test_export_record_is_json_and_its_repr_short(tmp_path: Path) -> None:
    done = export(tiny(), tmp_path / 'net.pt2', **SIZE)
    assert len(repr(done)) < 400
    assert dataclasses.asdict(done)['images'] == 3
    loaded = load_exported(tmp_path / 'net.pt2')
    assert json.loads(json.dumps(loaded.record)) == loaded.record
    assert repr(loaded) == 'ExportedModel(test_res2net: torch, float32)'
    assert os.stat(tmp_path / 'net.pt2').st_mode & 0o400
