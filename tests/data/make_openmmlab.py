"""Makes openmmlab.tar.xz with the backbones of mmpretrain and mmdet.

    python -m venv VENV && VENV/bin/pip install torch mmengine mmcv-lite
    VENV/bin/pip install --no-deps mmpretrain mmdet
    VENV/bin/python tests/data/make_openmmlab.py

The archive has mmpretrain classifiers with both stems, and an mmdet detector.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import bare, pack, randomize_state, save_reference
from torch import nn


class Classifier(nn.Module):
    """Has the tensor names of mmpretrain's ImageClassifier and LinearClsHead, which need compiled operators."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.ModuleDict({'fc': nn.Linear(2048, 5)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head['fc'](self.backbone(x)[-1].mean((2, 3)))


class Detector(nn.Module):
    """Has a detector's tensor names: its backbone and one other part."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = nn.ModuleDict({'lateral_convs': nn.Conv2d(256, 8, 1)})

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.backbone(x)


def mmpretrain_backbone() -> type[nn.Module]:
    """Imports mmpretrain's backbone."""
    for name in ('mmpretrain', 'mmpretrain.models', 'mmpretrain.models.backbones'):
        bare(name)
    from mmpretrain.models.backbones.res2net import Res2Net

    return Res2Net


def mmdet_backbone() -> type[nn.Module]:
    """Imports mmdet's backbone."""
    for name in ('mmdet', 'mmdet.models', 'mmdet.models.backbones'):
        bare(name)
    layers = bare('mmdet.models.layers')
    from mmdet.models.layers.res_layer import ResLayer

    layers.ResLayer = ResLayer
    from mmdet.models.backbones.res2net import Res2Net

    return Res2Net


def arrays(computed: torch.Tensor | tuple[torch.Tensor, ...]) -> Any:
    return computed.numpy() if isinstance(computed, torch.Tensor) else [feature.numpy() for feature in computed]


def main() -> None:
    mmpretrain, mmdet = mmpretrain_backbone(), mmdet_backbone()
    args = dict(depth=50, scales=4, base_width=2)
    made = {
        'mmpretrain': Classifier(mmpretrain(deep_stem=False, avg_down=False, **args)),
        'mmpretrain_deep_stem': Classifier(mmpretrain(deep_stem=True, avg_down=True, **args)),
        'mmdet': Detector(mmdet(out_indices=(0, 1, 2, 3), **args)),
    }
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for seed, (name, model) in enumerate(made.items()):
            rng = np.random.default_rng(seed)
            randomize_state(model, rng)
            torch.save({'meta': {}, 'state_dict': model.state_dict()}, Path(folder, f'{name}.pth'))
            save_reference(lambda x, model=model: arrays(model.eval()(torch.from_numpy(x))), Path(folder, name), rng)
        pack(folder, 'openmmlab.tar.xz')


if __name__ == '__main__':
    main()
