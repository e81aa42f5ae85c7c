"""Makes maskrcnn.tar.xz with the backbone of the authors' maskrcnn-benchmark, whose norms have no eps.

    python -m venv VENV && VENV/bin/pip install torch numpy yacs
    git -C FOLDER clone https://github.com/Res2Net/Res2Net-maskrcnn
    VENV/bin/python tests/data/make_maskrcnn.py FOLDER

maskrcnn.pth is a checkpoint as their Checkpointer writes it for a network trained on several GPUs, without optimizer
and scheduler. The network is from commit dd50e0f7: `build_backbone` builds it from their configuration
pytorch_mask_rcnn_R2_50_s4_FPN_2x.yaml, with other widths, and the `forward` of `body` runs it. The compiled operators
are replaced, as only the heads call them.

- The stride of a first block is in the 1x1 `conv1`: STRIDE_IN_1X1 is true by default, and no configuration sets it.
- First blocks average the last split in all four stages. The authors' detectron2 keeps it instead.
- The norms are frozen, have no num_batches_tracked, and add nothing to the variance. Here every eighth channel has
  a variance of 1/1024 and a weight that compensates for it: an eps of 1e-5 would change each map by 0.01 to 0.03.
"""

import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from make_dilated import randomize
from reference import pack, save_reference
from torch import nn

CONFIG = 'configs/pytorch_mask_rcnn_R2_50_s4_FPN_2x.yaml'


def backbone(folder: Path) -> nn.Module:
    """Builds a thin backbone, with its pyramid, from the published configuration."""
    sys.path.insert(0, str(folder / 'Res2Net-maskrcnn'))
    import maskrcnn_benchmark

    maskrcnn_benchmark._C = SimpleNamespace(nms=None)  # the compiled operators
    from maskrcnn_benchmark.config import cfg
    from maskrcnn_benchmark.modeling.backbone import build_backbone

    cfg.merge_from_file(str(folder / 'Res2Net-maskrcnn' / CONFIG))
    cfg.merge_from_list(['MODEL.RESNETS.WIDTH_PER_GROUP', 2, 'MODEL.RESNETS.BACKBONE_OUT_CHANNELS', 8])
    return build_backbone(cfg)


def shrink_variances(model: nn.Module) -> None:
    """Gives every eighth channel a small variance, so that an eps would show, and a smaller weight to compensate."""
    state = model.state_dict()
    for name, variance in state.items():
        if name.endswith('running_var'):
            state[re.sub('running_var$', 'weight', name)][::8] /= 32 * variance[::8].sqrt()
            variance[::8] = 1 / 1024


def main(folder: Path) -> None:
    model = backbone(folder).eval()
    body: Any = model.body
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        randomize(body, {}, np.random.default_rng(5))  # a seed with which wrong specs differ more than with most
        shrink_variances(body)
        state = {f'module.backbone.body.{name}': tensor for name, tensor in body.state_dict().items()}
        state['module.backbone.fpn.fpn_inner1.weight'] = torch.ones_like(model.fpn.fpn_inner1.weight)
        torch.save({'model': state, 'iteration': 180000}, Path(temporary, 'maskrcnn.pth'))

        def run(images: np.ndarray) -> list[np.ndarray]:
            return [feature.numpy() for feature in body(torch.from_numpy(images))]

        save_reference(run, Path(temporary, 'maskrcnn'), np.random.default_rng(0), compress=False)
        pack(temporary, 'maskrcnn.tar.xz')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
