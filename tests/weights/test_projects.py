"""Networks around a Res2Net are told by their other tensors, and unknown ones are not taken for usual in silence."""

import json
import logging
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT, assert_computes, tiny
from torch import Tensor

from timm_res2net import CheckpointError, load_checkpoint
from timm_res2net.models.function import Function
from timm_res2net.weights.checkpoints import read_checkpoint
from timm_res2net.weights.convert import convert
from timm_res2net.weights.loading import load_model
from timm_res2net.weights.projects import PROJECTS, Project, find_project
from timm_res2net.weights.readers import read

References = Callable[[str], Path]
BY_NAME = {project.whose: project for project in PROJECTS}


def marks(project: Project, above: str = '') -> dict[str, Tensor]:
    """The tensors beside the Res2Net by which a network is told."""
    names = [above + name + ('x.weight' if name.endswith('.') else '') for name in (project.mark, project.also) if name]
    return {name: torch.ones(project.shape or (1,)) for name in names}


@pytest.mark.parametrize(
    ('reference', 'file', 'whose', 'above'),
    [
        ('dilated/uacanet_s', 'dilated/uacanet', 'UACANet-S, CANet-S', ''),
        ('dilated/uacanet_l', 'dilated/uacanet', 'UACANet-L, CANet-L', ''),
        ('dilated/inspyrenet', 'dilated/backbone', 'InSPyReNet', ''),
        ('dilated/urn', 'dilated/backbone', 'URN, PMM', ''),
        ('dilated/poolnet', 'dilated/poolnet', "the authors' PoolNet", 'base.'),
        ('deformable/universenet_plain', 'deformable/universenet_plain', 'a detector of mmdet', ''),
    ],
)
def test_load_model_known_network_computes_what_its_own_code_computes(
    reference: str, file: str, whose: str, above: str, references: References, tmp_path: Path
) -> None:
    archive, name = file.split('/')
    contents = read(references(archive) / f'{name}.pth').nested
    state = contents.get('state_dict', contents)
    torch.save({**state, **marks(BY_NAME[whose], above)}, tmp_path / 'whole.pth')
    checkpoint = read_checkpoint(tmp_path / 'whole.pth')
    assert (checkpoint.project, checkpoint.assumed) == (whose, ())
    usual = load_model(checkpoint, **vars(Function()))
    with pytest.raises(CheckpointError, match=r'is of a network with .*: the weights would load and compute something'):
        load_checkpoint(usual, checkpoint)
    assert_computes(load_model(checkpoint).eval(), references(archive) / f'{reference.split("/")[1]}.npz')


# Tensors beside the Res2Net of networks that were made from their own code, and what each is told as.
with lzma.open(ROOT / 'tests' / 'data' / 'projects.json.xz') as file:
    NETWORKS: dict[str, Any] = json.load(file)
TOLD_AS = {
    'InSPyReNet-101': 'InSPyReNet',
    'PoolNet': "the authors' PoolNet",
    'joint PoolNet': "the authors' PoolNet",
    'COVID PraNet': 'PraNet, Inf-Net for CT',
    'COVID Inf-Net': 'PraNet, Inf-Net for CT',
}
UNKNOWN = 'FCA-Net', 'FEDER', 'MEGANet', 'VecRoad'  # of dialects of their own, or without a Res2Net


@pytest.mark.parametrize('name', NETWORKS)
def test_find_project_tells_networks_by_all_their_tensors(name: str) -> None:
    network = NETWORKS[name]
    for above in ('', 'state_dict.', 'module.'):
        shapes = {above + tensor: tuple(shape) for tensor, shape in network['tensors'].items()}
        found = find_project(above + network['prefix'], shapes)
        if name in UNKNOWN:
            assert found is None
        else:
            assert found is not None
            assert found.whose == TOLD_AS.get(name) or name in found.whose.split(', ')


@pytest.mark.parametrize('project', PROJECTS, ids=lambda project: f'{project.whose} {project.mark}')
def test_read_checkpoint_tells_every_known_network(project: Project, tmp_path: Path) -> None:
    state = {f'{project.prefix}.{name}': tensor for name, tensor in tiny(num_classes=0).state_dict().items()}
    torch.save({'state_dict': {f'module.{name}': t for name, t in {**state, **marks(project)}.items()}}, tmp_path / 'a')
    checkpoint = read_checkpoint(tmp_path / 'a')
    assert (checkpoint.project, checkpoint.function) == (project.whose, project.function)
    torch.save({**state, **marks(project), 'decoder.weight': torch.ones(1)}, tmp_path / 'b')
    assert read_checkpoint(tmp_path / 'b').project == project.whose
    torch.save(
        {f'other.{name.split(".", 1)[1]}': tensor for name, tensor in state.items()} | marks(project), tmp_path / 'c'
    )
    assert read_checkpoint(tmp_path / 'c').project is None


def unknown_network(folder: Path) -> Path:
    state = {f'encoder.{name}': tensor for name, tensor in tiny(num_classes=0).state_dict().items()}
    torch.save({**state, 'decoder.weight': torch.ones(1)}, folder / 'unknown.pth')
    return folder / 'unknown.pth'


def test_load_unknown_network_warns_once_of_what_is_assumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = unknown_network(tmp_path)
    for load in (
        load_model,
        lambda file: load_checkpoint(tiny(num_classes=0), file),
        lambda file: convert(file, dry_run=True),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load(file)
        (message,) = caplog.messages
        assert "The usual is assumed: first_block='official', style='pytorch', strides=(1, 2, 2, 2), dilat" in message
        assert str(file) in message


@pytest.mark.parametrize('name', ['mmdet_dilated', 'mmpretrain_caffe', 'backbone'])
def test_load_model_of_code_that_has_options_warns_of_what_is_assumed(
    name: str, references: References, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_model(references('dilated') / f'{name}.pth')  # of another geometry than the usual, which it can't tell
    (message,) = caplog.messages
    assert 'strides, dilations' in message
    assert 'The usual is assumed: ' in message


def test_load_unknown_network_with_stated_geometry_or_alone_warns_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_model(unknown_network(tmp_path), dilations=(1, 1, 1, 2))
    torch.save(tiny().state_dict(), tmp_path / 'alone.pth')
    load_model(tmp_path / 'alone.pth')
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_load_checkpoint_unknown_network_into_dilated_model_is_refused_as_assumed(tmp_path: Path) -> None:
    model = tiny(num_classes=0, dilations=(1, 1, 1, 2))
    with pytest.raises(
        CheckpointError, match=r'does not tell whether its network has dilations=\(1, 1, 1, 1\)'
    ) as error:
        load_checkpoint(model, unknown_network(tmp_path))
    assert 'load it with dilations=(1, 1, 1, 2)' in str(error.value)
    load_checkpoint(model, unknown_network(tmp_path), dilations=(1, 1, 1, 2))


def test_load_checkpoint_known_network_that_no_model_computes_is_refused(tmp_path: Path) -> None:
    state = {f'rgb_stream.backbone.{name}': tensor for name, tensor in tiny(num_classes=0).state_dict().items()}
    torch.save({**state, **marks(BY_NAME['BiANet'], 'rgb_stream.')}, tmp_path / 'bianet.pth')
    with pytest.raises(CheckpointError, match='is of BiANet, whose first convolution has no stride'):
        load_checkpoint(tiny(num_classes=0), tmp_path / 'bianet.pth')
    with pytest.raises(CheckpointError, match='is of BiANet, whose first convolution has no stride'):
        load_model(tmp_path / 'bianet.pth')
    assert read_checkpoint(tmp_path / 'bianet.pth', first_block='official').function == Function()
