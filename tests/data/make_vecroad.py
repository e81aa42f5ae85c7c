"""Makes vecroad.tar.xz with the dilated backbone of VecRoad, whose stem lacks its last norm.

    python -m venv VENV && VENV/bin/pip install torch numpy
    git -C FOLDER clone https://github.com/tansor/VecRoad
    VENV/bin/python tests/data/make_vecroad.py FOLDER

vecroad.pth is a checkpoint as their train.py writes it, but without the optimizer. The network is from commit ffcb47e5:
their Res2Net, with only its width changed, run by the `forward` of their `RPNet`. No pretrained weights are
downloaded.

- RPNet renames their Res2Net's modules: `stage_1.0` is `conv1`, `stage_2` to `stage_5` are `layer1` to `layer4`. They
  are next to the modules of all other parts.
- There is no `bn1`: a ReLU follows the last convolution of the stem, `stage_1.0.6`.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_dilated import randomize
from reference import images, pack, save_reference, stage_maps
from torch import nn


def rpnet(folder: Path) -> Any:
    """Builds VecRoad's network with a thin backbone in place of the pretrained one."""
    sys.path.insert(0, str(folder / 'VecRoad'))
    from model import model, res2net

    def thin(pretrained: bool) -> nn.Module:
        return res2net.Res2Net(res2net.Bottle2neck, [3, 4, 6, 3], baseWidth=2, scale=4)

    model.res2net50_v1b_26w_4s = thin
    return model.RPNet()


def repeat_vectors(model: nn.Module) -> None:
    """Repeats norm values every 100 channels, to save space. Filters repeat every 64, so no two channels are equal."""
    for tensor in model.state_dict().values():
        if tensor.ndim == 1:
            tensor.copy_(torch.from_numpy(np.resize(tensor[:100].numpy(), tensor.shape)))


def main(folder: Path) -> None:
    net = rpnet(folder).eval()
    rng = np.random.default_rng(10)  # a seed with which wrong dilations differ more than with most
    wide = images((1, 3, 8, 264), rng)
    # The authors' names, by which `randomize` chooses the tensors that share values.
    stages = {f'layer{i}': net.get_submodule(f'stage_{i + 1}') for i in (1, 2, 3, 4)}
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        backbone = nn.ModuleDict({'conv1': net.stage_1[0], **stages})
        randomize(backbone, {}, rng)
        repeat_vectors(backbone)
        state = {f'module.{name}': tensor for name, tensor in net.state_dict().items() if name.startswith('stage_')}
        state['module.next_step_final.weight'] = torch.ones_like(net.next_step_final.weight)
        torch.save({'outer_it': 29, 'path_it': 2047, 'state_dict': state}, Path(temporary, 'vecroad.pth'))

        def run(x: np.ndarray) -> list[np.ndarray]:
            return stage_maps(stages.values(), lambda x: net(x, None, test=True), x, divisor=8)

        save_reference(run, Path(temporary, 'vecroad'), np.random.default_rng(0), compress=False)
        np.savez(Path(temporary, 'wide.npz'), images=wide, vecroad=run(wide)[3][:, ::8])
        pack(temporary, 'vecroad.tar.xz')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
