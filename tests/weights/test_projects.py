"""Known networks around a Res2Net are recognized by their other tensors."""

import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from formats import under
from support import ROOT, assert_computes, tiny
from torch import Tensor

from timm_res2net import CheckpointError, load_checkpoint
from timm_res2net.models.spec import NetworkSpec
from timm_res2net.weights.checkpoints import Checkpoint, identify, read_checkpoint
from timm_res2net.weights.loading import load_model
from timm_res2net.weights.projects import PROJECTS, Project, find_project
from timm_res2net.weights.readers import RawFile, read_file

References = Callable[[str], Path]
TRUNK = tiny(num_classes=0).state_dict()
PLAIN = tiny(num_classes=0, stem_type='', stem_width=64).state_dict()
BY_NAME = {project.name: project for project in PROJECTS}


def marks(project: Project, above: str = '') -> dict[str, Tensor]:
    """Returns the tensors that identify a network."""
    names = [name for name in (project.mark, project.also) if name and not name.startswith(f'{project.prefix}.')]
    names = [above + name + ('x.weight' if name.endswith('.') else '') for name in names]
    return {name: torch.ones(project.shape or (1,)) for name in names}


@pytest.mark.parametrize(
    ('reference', 'file', 'project', 'above'),
    [
        ('dilated/uacanet_s', 'dilated/uacanet', 'UACANet-S, CANet-S', ''),
        ('dilated/uacanet_l', 'dilated/uacanet', 'UACANet-L, CANet-L', ''),
        ('dilated/inspyrenet', 'dilated/backbone', 'InSPyReNet', ''),
        ('dilated/urn', 'dilated/backbone', 'URN, PMM', ''),
        ('dilated/poolnet', 'dilated/poolnet', "the authors' PoolNet", 'base.'),
        ('deformable/universenet_plain', 'deformable/universenet_plain', 'an mmdet detector', ''),
    ],
)
def test_load_model_of_a_known_network_computes_what_its_own_code_computes(
    reference: str, file: str, project: str, above: str, references: References
) -> None:
    archive, name = file.split('/')
    tensors = read_file(references(archive) / f'{name}.pth').tensors
    state = {each.removeprefix('state_dict.'): tensor for each, tensor in tensors.items()}
    checkpoint = identify(RawFile({**state, **marks(BY_NAME[project], above)}), 'file')
    assert checkpoint.project == project
    assert {*checkpoint.provenance.values()} <= {'inferred', 'proved'}
    assert_computes(load_model(checkpoint).eval(), references(archive) / f'{reference.split("/")[1]}.npz')


# Tensors next to the Res2Nets of networks built by their own code, and the names under which `PROJECTS` lists some.
with lzma.open(ROOT / 'tests' / 'data' / 'projects.json.xz') as file:
    NETWORKS: dict[str, Any] = json.load(file)
KNOWN_AS = {
    'InSPyReNet-101': 'InSPyReNet',
    'PoolNet': "the authors' PoolNet",
    'joint PoolNet': "the authors' PoolNet",
    'COVID PraNet': 'PraNet, Inf-Net for CT',
    'COVID Inf-Net': 'PraNet, Inf-Net for CT',
}
UNKNOWN = 'FCA-Net', 'FEDER', 'MEGANet', 'VecRoad'  # have their own dialect, or no Res2Net


@pytest.mark.parametrize('name', NETWORKS)
def test_find_project_recognizes_networks_by_all_their_tensors(name: str) -> None:
    network = NETWORKS[name]
    for above in ('', 'state_dict.', 'module.'):
        shapes = {above + tensor: tuple(shape) for tensor, shape in network['tensors'].items()}
        found = find_project(above + network['prefix'], shapes)
        if name in UNKNOWN:
            assert found is None
        else:
            assert found is not None
            assert found.name == KNOWN_AS.get(name) or name in found.name.split(', ')


@pytest.mark.parametrize('project', PROJECTS, ids=lambda project: f'{project.name} {project.mark}')
def test_identify_recognizes_every_known_network(project: Project) -> None:
    def found(tensors: dict[str, Tensor]) -> Checkpoint:
        return identify(RawFile(tensors), 'file')

    trunk = PLAIN if project.name == 'an mmdet detector' else TRUNK  # a deep stem of mmdet has other names
    state = {**under(f'{project.prefix}.', trunk), **marks(project)}
    checkpoint = found(under('state_dict.module.', state))
    assert (checkpoint.project, checkpoint.spec) == (project.name, project.spec)
    assert found({**state, 'decoder.weight': torch.ones(1)}).project == project.name
    assert found({**under('other.', trunk), **marks(project)}).project is None


def test_known_network_that_no_model_computes_is_refused(tmp_path: Path) -> None:
    state = under('rgb_stream.backbone.', TRUNK)
    torch.save({**state, **marks(BY_NAME['BiANet'], 'rgb_stream.')}, tmp_path / 'bianet.pth')
    for load in (load_model, lambda file: load_checkpoint(tiny(num_classes=0), file)):
        with pytest.raises(CheckpointError, match='it is BiANet: its first convolution has stride 1'):
            load(tmp_path / 'bianet.pth')
    assert read_checkpoint(tmp_path / 'bianet.pth', first_block='official').spec == NetworkSpec()
