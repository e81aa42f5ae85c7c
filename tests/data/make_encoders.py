"""Makes encoders.tar.xz with the backbones of MEGANet and FCA-Net, which have the authors' modules under other names.

    python -m venv VENV && VENV/bin/pip install torch numpy scipy
    git -C FOLDER clone https://github.com/UARK-AICV/MEGANet
    git -C FOLDER clone https://github.com/frazerlin/fcanet
    VENV/bin/python tests/data/make_encoders.py FOLDER

The networks are from commits 8ae378d (MEGANet) and e7de0ed (FCA-Net); only width and depth are changed. No pretrained
weights are loaded. wide.npz is for FCA-Net.

- MEGANet's backbone is the authors' v1b. `encoder1_conv` and `encoder1_bn` are its `conv1` and `bn1`, `encoder2` to
  `encoder5` its stages.
- FCA-Net has the stem and the first stage in `backbone_pre`, and the other stages in `backbone_last`, under the
  authors' names. The stem takes five channels: an image and two click maps. First blocks are not cascaded; at
  stride 1 they keep the last split, as mmdet's do. The last stage has stride 1 and dilations 2, 4, 8.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_dilated import randomize
from make_vecroad import repeat_vectors
from reference import images, pack, save_reference, stage_maps
from torch import nn

Network = tuple[nn.Module, dict[str, nn.Module], Callable[[torch.Tensor], Any]]


def meganet(folder: Path) -> Network:
    """Builds MEGANet with a thin backbone in place of the pretrained one.

    Returns:
        The network, its backbone's modules keyed by the authors' names, and a function that runs the backbone.
    """
    sys.path.insert(0, str(folder / 'MEGANet' / 'MEGANet-Res2Net'))
    from lib import EGANet, res2net

    def thin(pretrained: bool) -> nn.Module:
        return res2net.Res2Net(res2net.Bottle2neck, [2, 1, 1, 1], baseWidth=2, scale=4)

    EGANet.res2net50_v1b_26w_4s = thin
    torch.Tensor.cuda = torch.Tensor.clone  # MEGANet moves its Gaussian filter to a GPU
    net = EGANet.EGANetModel()
    parts = {f'layer{i}': net.net.get_submodule(f'encoder{i + 1}') for i in (1, 2, 3, 4)}
    return net, {'conv1': net.net.encoder1_conv, 'bn1': net.net.encoder1_bn, **parts}, net


def fcanet(folder: Path) -> Network:
    """Builds FCA-Net with a thin backbone; returns the same as `meganet`."""
    sys.path.insert(0, str(folder / 'fcanet'))
    from model import fcanet, res2net_split

    def thin(stride: int, norm: Any, pretrained: bool, stages: list[int], more: int) -> nn.Module:
        options: dict[str, Any] = dict(layer_range=stages, aux_channel=more, baseWidth=2)
        return res2net_split.Res2NetSplit(res2net_split.Bottle2neck, [2, 1, 1, 3], stride, norm, **options)

    fcanet.res2net_split.Res2NetSplit101 = thin
    net = fcanet.FCANet('res2net')
    first, last = net.backbone_pre, net.backbone_last
    parts = {'conv1': first.conv1, 'bn1': first.bn1, 'layer1': first.layer1}
    return net, {**parts, **dict(last.named_children())}, lambda x: last(first(x))


NETWORKS = {  # builder, number of image channels, and a tensor of another part
    'meganet': (meganet, 3, 'net.up5.0.conv.0.weight'),
    'fcanet': (fcanet, 5, 'my_aspp.aspp1.bn.weight'),
}


def main(folder: Path) -> None:
    rng = np.random.default_rng(0)
    drawn: dict[tuple[str, torch.Size], np.ndarray] = {}
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        for name, (build, channels, other) in NETWORKS.items():
            net, parts, run = build(folder)
            backbone = nn.ModuleDict(parts)
            net.eval()
            randomize(backbone, drawn, rng)
            repeat_vectors(backbone)
            own = {tensor.data_ptr() for tensor in backbone.state_dict().values()}
            state = net.state_dict()
            kept = {key: tensor for key, tensor in state.items() if tensor.data_ptr() in own or key == other}
            torch.save({**kept, other: torch.ones(1)}, Path(temporary, f'{name}.pth'))
            stages = [parts[f'layer{i}'] for i in (1, 2, 3, 4)]

            def maps(x: np.ndarray, stages: Any = stages, run: Any = run) -> list[np.ndarray]:
                return stage_maps(stages, run, x, divisor=32)

            save_reference(maps, Path(temporary, name), rng, shape=(1, channels), compress=False)
        wide = images((1, channels, 8, 264), rng)
        np.savez(Path(temporary, 'wide.npz'), images=wide, fcanet=maps(wide)[3][:, ::8])
        pack(temporary, 'encoders.tar.xz')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
