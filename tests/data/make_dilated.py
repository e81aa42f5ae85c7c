"""Makes dilated.tar.xz with dilated backbones of segmentation models and detectors, and one strided in the 1x1.

    python -m venv VENV && VENV/bin/pip install torch mmengine mmcv-lite
    VENV/bin/pip install --no-deps mmpretrain mmdet
    for name in plemeri/UACANet plemeri/InSPyReNet XMed-Lab/URN Res2Net/Res2Net-PoolNet; do
        git -C FOLDER clone https://github.com/$name
    done
    VENV/bin/python tests/data/make_dilated.py FOLDER

Networks with the same tensor names share a file FILE.pth, a plain state_dict with the names in the projects' own
checkpoints. wide.npz has the last maps of uacanet_s and inspyrenet, which are equal for smaller images. Classifiers
have 5 classes. The networks are built by their own classes and run by their own `forward`; the maps are the outputs of
`layer1` to `layer4`. Only URN's imports for registering and loading are replaced.

| name | source | commit | file, prefix of names |
| --- | --- | --- | --- |
| uacanet_s | plemeri/UACANet, output_stride=32 | 6b9e54eb | uacanet.pth, `resnet.` |
| uacanet_l | plemeri/UACANet, output_stride=16 | 6b9e54eb | uacanet.pth, `resnet.` |
| inspyrenet | plemeri/InSPyReNet, output_stride=32 | 692ad8a5 | backbone.pth, `backbone.` |
| urn | XMed-Lab/URN, as in its configurations | 5e56e5e6 | backbone.pth, `backbone.` |
| poolnet | Res2Net/Res2Net-PoolNet | 7bef0652 | poolnet.pth, `base.resnet.` |
| mmdet_dilated | mmdet 3.3.0 | | mmdet_dilated.pth, `backbone.` |
| mmpretrain_caffe | mmpretrain 1.2.0, `style='caffe'` | | mmpretrain_caffe.pth, `backbone.` |

- UACANet defines InSPyReNet's multi-grid dilations but does not use them. URN's norms are SyncBatchNorm, with the same
  tensor names.
- With ceil_mode=True, poolnet's maps of the even image are as large as those of the odd one: 17, 9, 5, 5.
- The checkpoints of UACANet and PoolNet have an unused classifier `fc`; those of InSPyReNet and URN have none.
"""

import importlib.util
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_openmmlab import mmdet_backbone, mmpretrain_backbone
from reference import bare, images, pack, random_value, save_reference, stage_maps, stub
from torch import nn


def file_module(path: Path) -> Any:
    """Imports one file without its package."""
    spec = importlib.util.spec_from_file_location('_'.join(path.parts[-4:-1]).replace('-', '_'), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def urn_backbone(folder: Path) -> type[nn.Module]:
    """Imports URN's backbone from its copy of an older mmseg."""
    from mmengine.registry import Registry

    sys.path.insert(0, str(folder / 'URN'))
    for name in ('mmseg', 'mmseg.models', 'mmseg.models.backbones'):
        bare(name)
    stub('mmcv.runner', load_checkpoint=None)
    stub('mmseg.utils', get_root_logger=None)
    stub('mmseg.models.builder', BACKBONES=Registry('backbone'))
    from mmseg.models.backbones.res2net import Res2Net

    return Res2Net


def networks(folder: Path) -> dict[str, tuple[str, str, nn.Module]]:
    """Builds the networks; returns each with its file and the prefix of its names in its project's checkpoints."""
    uacanet = file_module(folder / 'UACANet/lib/backbones/Res2Net_v1b.py')
    inspyrenet = file_module(folder / 'InSPyReNet/lib/backbones/Res2Net_v1b.py')
    poolnet = file_module(folder / 'Res2Net-PoolNet/networks/deeplab_res2net.py')
    urn = urn_backbone(folder)
    mmdet, mmpretrain = mmdet_backbone(), mmpretrain_backbone()
    layers = [3, 4, 6, 3]
    thin = dict(baseWidth=2, scale=4)
    openmmlab = dict(depth=50, base_width=2, scales=4, out_indices=(0, 1, 2, 3))

    def uacanet_backbone(output_stride: int) -> nn.Module:
        return uacanet.Res2Net(uacanet.Bottle2neck, layers, num_classes=5, output_stride=output_stride, **thin)

    return {
        'uacanet_s': ('uacanet', 'resnet.', uacanet_backbone(32)),
        'uacanet_l': ('uacanet', 'resnet.', uacanet_backbone(16)),
        'inspyrenet': ('backbone', 'backbone.', inspyrenet.Res2Net(inspyrenet.Bottle2neck, layers, **thin)),
        'urn': ('backbone', 'backbone.', urn(layers=layers, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), **thin)),
        'poolnet': ('poolnet', 'base.resnet.', poolnet.Res2Net(poolnet.Bottle2neck, layers, num_classes=5, **thin)),
        'mmdet_dilated': (
            'mmdet_dilated',
            'backbone.',
            mmdet(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), **openmmlab),
        ),
        'mmpretrain_caffe': (
            'mmpretrain_caffe',
            'backbone.',
            mmpretrain(style='caffe', deep_stem=False, avg_down=False, **openmmlab),
        ),
    }


def common_name(name: str, shape: torch.Size) -> str:
    """Returns a name that corresponding tensors of all networks share, as do convolutions of a stage's later blocks."""
    name = re.sub(r'^conv1\.(\d)', r'stem.\1', name)
    name = re.sub(r'^bn1\.', 'stem.7.', name)
    name = re.sub(r'\.downsample\.\d\.', '.downsample.', name)
    return re.sub(r'^(layer\d)\.[1-9]', r'\1.n', name) if len(shape) > 1 else name


def randomize(
    model: nn.Module,
    drawn: dict[tuple[str, torch.Size], np.ndarray],
    rng: np.random.Generator,
    common_name: Callable[[str, torch.Size], str] = common_name,
    filters: int = 64,
) -> None:
    """Fills a network with random values, reusing those of earlier networks (`drawn`); repeats the first `filters`."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            shape = tensor.shape
            key = common_name(name, shape), shape
            if key not in drawn:
                positive = name.endswith(('running_var', 'weight'))  # a one-dimensional weight belongs to a norm
                first = shape if len(shape) == 1 else (min(shape[0], filters), *shape[1:])
                drawn[key] = np.resize(random_value(first, positive, rng), shape)
                if 'offset' in name and tensor.ndim > 1:
                    drawn[key] /= 4  # offsets of about a pixel
            tensor.copy_(torch.from_numpy(drawn[key]))


def save_state(state: dict[str, torch.Tensor], path: Path) -> None:
    """Saves a network's tensors; if the file exists, asserts that it has the same ones."""
    if path.exists():
        saved = torch.load(path)
        assert list(saved) == list(state)
        assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())
    torch.save(state, path)


def main(folder: Path) -> None:
    rng = np.random.default_rng(0)
    drawn: dict[tuple[str, torch.Size], np.ndarray] = {}
    wide = {'images': images((1, 3, 8, 552), rng)}
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        for name, (file, prefix, model) in networks(folder).items():
            model.eval()  # mmdet's `eval` does not return the model
            randomize(model, drawn, rng)
            state = {prefix + key: tensor for key, tensor in model.state_dict().items()}
            save_state(state, Path(temporary, f'{file}.pth'))

            def run(x: np.ndarray, model: nn.Module = model) -> list[np.ndarray]:
                return stage_maps((model.layer1, model.layer2, model.layer3, model.layer4), model, x)

            save_reference(run, Path(temporary, name), np.random.default_rng(0), compress=False)
            if name in ('uacanet_s', 'inspyrenet'):
                wide[name] = run(wide['images'])[3][:, ::8]
        np.savez(Path(temporary, 'wide.npz'), **wide)
        pack(temporary, 'dilated.tar.xz')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
