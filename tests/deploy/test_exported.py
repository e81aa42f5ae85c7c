"""Untrusted exported files run no code, and invalid metadata is refused."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from torch import nn

from timm_res2net import CheckpointError, load_exported
from timm_res2net._images import bundled_digits
from timm_res2net.deploy.backends import BACKENDS
from timm_res2net.deploy.export import describe
from timm_res2net.deploy.exported import ExportedModel, parse_record
from timm_res2net.vision.predict import predict

pytestmark = pytest.mark.filterwarnings('ignore')  # torch.export warns about its own internals


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program of torch without our metadata."""
    program = torch.export.export(nn.Conv2d(3, 2, 1), (torch.zeros(1, 3, 4, 4),))
    torch.export.save(program, tmp_path / 'foreign.pt2')
    return tmp_path / 'foreign.pt2'


@pytest.fixture
def record() -> dict[str, Any]:
    """The record of a file, for a test to change."""
    record = describe(tiny(), BACKENDS['.onnx'], 'float32', batch=None, size=32, dynamic_size=False)
    return parse_record(json.dumps(record))


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.file),)


def test_torch_program_runs_no_code_without_trust(program: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(program) as original, zipfile.ZipFile(tmp_path / 'net.pt2', 'w') as changed:
        for name in original.namelist():
            is_pickled = 'sample_inputs' in name and name.endswith('.pt')
            changed.writestr(name, pickle.dumps(Bomb(tmp_path / 'ran')) if is_pickled else original.read(name))
    with pytest.raises(CheckpointError, match=r'net\.pt2.: a \.pt2 file is a program and can run any code.*trust=True'):
        load_exported(tmp_path / 'net.pt2')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize(
    ('change', 'key'),
    [
        *((dict(input=[value, 3, 32, 32]), 'input') for value in (10**9, 0, 1.0)),
        *((dict(input=value), 'input') for value in ([4096, 3, 4096, 4096], [None, 3, 32], None)),
        (dict(outputs=None), 'outputs'),
        (dict(outputs=[]), 'outputs'),
        (dict(outputs=[{'name': 3}]), 'outputs'),
        *((dict(precision=value), 'precision') for value in ('float8', ['int8'])),
        (dict(features=0), 'features'),
        (dict(architecture=7), 'architecture'),
        *((dict(function=value), 'function') for value in ({'strides': '[1, 2]'}, '')),
        (dict(pretrained_cfg=None), 'pretrained_cfg'),
        (dict(input_size=[3, 30_000, 30_000]), 'input_size'),
        (dict(input_size=[3, 64, 64]), 'pretrained_cfg'),  # not the input of the file
        (dict(input_size=None), 'pretrained_cfg'),
        (dict(crop_pct=1e-9), 'crop_pct'),
        (dict(mean=[0.5]), 'pretrained_cfg'),
        *((dict(label_names=value), 'pretrained_cfg') for value in (['a'], [1, 2, 3, 4])),
        *((dict(num_classes=value), 'pretrained_cfg') for value in (10**12, 4.0)),
        (dict(license=['mit']), 'pretrained_cfg'),
    ],
    ids=str,
)
def test_error_for_an_invalid_value_in_a_record_names_its_key(
    change: dict[str, Any], key: str, record: dict[str, Any]
) -> None:
    place = record if change.keys() <= record.keys() else record['pretrained_cfg']
    place |= change
    with pytest.raises(ValueError, match=rf"invalid '{key}' in its metadata|in its metadata: {key} must be"):
        parse_record(json.dumps(record))


@pytest.mark.parametrize('wrong', ['[' * 100_000, '[]', '{'], ids=['deep', 'list', 'cut'])
def test_record_that_is_not_a_mapping_is_refused(wrong: str) -> None:
    with pytest.raises((ValueError, RecursionError)):
        parse_record(wrong)


def test_images_that_do_not_fill_a_fixed_batch_are_classified(record: dict[str, Any]) -> None:
    record['input'][0] = 4
    model: Any = ExportedModel(Path('net.onnx'), lambda x: [x.mean(dim=(2, 3)) @ torch.eye(3, 4)], record)
    images = [image for image, _ in bundled_digits()[:6]]
    found = [*predict(model.eval(), images, read=lambda image: image, topk=1)]
    record['input'][0] = 1
    assert found == [*predict(model, images, read=lambda image: image, topk=1)]


def test_unknown_keys_of_a_record_do_not_reach_the_configuration(record: dict[str, Any]) -> None:
    record['pretrained_cfg'] |= dict(url='http://example.org', custom_load=True)
    model = ExportedModel(Path('net.onnx'), lambda x: [x.new_zeros(len(x), 4)], parse_record(json.dumps(record)))
    assert model.pretrained_cfg.keys() & {'url', 'custom_load'} == set()


@pytest.mark.parametrize(
    'outputs', [[], [torch.zeros(2, 3)], [torch.zeros(1, 4)], [torch.zeros(2, 4)] * 2, [torch.zeros(2)]], ids=len
)
def test_outputs_that_do_not_match_the_record_are_refused(outputs: list[torch.Tensor], record: Any) -> None:
    model = ExportedModel(Path('net.onnx'), lambda x: outputs, record)
    with pytest.raises(CheckpointError, match=r"outputs of 'net\.onnx' do not match its metadata"):
        model(torch.zeros(2, 3, 32, 32))


def test_runtime_that_fails_is_a_checkpoint_error(record: dict[str, Any]) -> None:
    def fail(images: torch.Tensor) -> Any:
        raise MemoryError('out of memory\nat line 3')

    with pytest.raises(CheckpointError, match=r"^cannot run 'net\.onnx': out of memory$"):
        ExportedModel(Path('net.onnx'), fail, record)(torch.zeros(2, 3, 32, 32))


def test_foreign_or_damaged_files_are_refused_with_the_reason(program: Path, tmp_path: Path) -> None:
    (tmp_path / 'broken.pt2').write_bytes(b'PK no archive')
    for name, reason in (
        ('foreign.pt2', 'it has no timm_res2net metadata'),
        ('broken.pt2', 'it is not a torch.export program'),
        ('none.pt2', 'no such file'),
    ):
        with pytest.raises(CheckpointError, match=rf"cannot load '.*{name}': {reason}"):
            load_exported(tmp_path / name, trust=True)
    with pytest.raises(ValueError, match='unknown suffix'):
        load_exported(tmp_path / 'a.pth')
