"""Makes deformable.tar.xz with detector backbones: strided in the 1x1, deformable, or from an older mmdet.

    python -m venv VENV && VENV/bin/pip install torch torchvision mmengine mmcv-lite fvcore yacs
    VENV/bin/pip install --no-deps mmdet
    for name in Res2Net/Res2Net-detectron2 xingyizhou/CenterNet2 shinya7y/UniverseNet; do
        git -C FOLDER clone https://github.com/$name
    done
    VENV/bin/python tests/data/make_deformable.py FOLDER

All blocks, stems, stages, norms and offset layers are the libraries' own. So are the configurations of the detectron2
and CenterNet2 networks, except for depth, width, outputs and the deformable stages of `centernet2`. CenterNet2 runs on
the layers of the authors' detectron2. torchvision's deform_conv2d replaces the compiled operators of detectron2 and
mmcv. For UniverseNet, mmengine's classes replace those of mmcv 1.

| name | source | commit | position of the stride | deformable stages | version |
| --- | --- | --- | --- | --- | --- |
| detectron2 | Res2Net/Res2Net-detectron2 | 3677895d | the 1x1 `conv1` | none | |
| centernet2 | xingyizhou/CenterNet2 | bfc8b72e | the 1x1 `conv1` | none | |
| centernet2_dcn | xingyizhou/CenterNet2 | bfc8b72e | the 1x1 `conv1` | 3 and 4 (`res4`, `res5`) | v2 |
| mmdet_dcnv2 | mmdet 3.3.0, mmcv 2.2.0 | | the 3x3 `convs` | 2 to 4 (`layer2` to `layer4`) | v2 |
| universenet_dcn | shinya7y/UniverseNet | 3652b18c | the 3x3 `convs` | 4 (`layer4`) | v1 |
| universenet_plain | shinya7y/UniverseNet | 3652b18c | the 3x3 `convs` | none | |

- Offsets for `convs.k` come from `convs.k.conv_offset` in mmdet and UniverseNet, and from `conv2_offsets.k`, which has
  no bias, in CenterNet2. Both take the input of the 3x3 convolution, which is the sum of splits.
- All norms add 1e-5 to the variance. So do detectron2's frozen norms, which have no num_batches_tracked.
- detectron2 and centernet2 have equal names and outputs. The authors' detectron2 has no deformable networks.
- mmdet and UniverseNet ignore `style='caffe'` and `fallback_on_stride=True`; mmdet 3 also `deep_stem` and `avg_down`.
"""

import pickle
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from make_dilated import randomize
from make_openmmlab import mmdet_backbone
from reference import bare, pack, save_reference, stub
from torch import nn
from torchvision.ops import deform_conv2d


def detectron2_builders(folder: Path) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module]]:
    """Imports the builders of the authors' detectron2 and of CenterNet2, with torchvision's operator."""
    sys.path[:0] = [str(folder / 'Res2Net-detectron2'), str(folder / 'CenterNet2')]
    for name in ('detectron2', 'detectron2.modeling', 'centernet', 'centernet.modeling', 'centernet.modeling.backbone'):
        bare(name)
    sys.modules['detectron2']._C = None  # the compiled operators
    from detectron2.layers import deform_conv

    def modulated_deform_conv(x, offset, mask, weight, bias, stride, padding, dilation, groups, deformable_groups):
        return deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)

    deform_conv.modulated_deform_conv = modulated_deform_conv
    from centernet.modeling.backbone.res2net import build_res2net_backbone
    from detectron2.modeling.backbone.resnet import build_resnet_backbone

    return build_resnet_backbone, build_res2net_backbone


def detectron2_network(build: Callable[..., nn.Module], config: Path, **changes: Any) -> nn.Module:
    """Builds a thin backbone from a published configuration."""
    from detectron2.config import CfgNode, get_cfg
    from detectron2.layers import ShapeSpec

    cfg = get_cfg()
    resnets = cfg.MODEL.RESNETS
    resnets.merge_from_other_cfg(CfgNode(yaml.safe_load(config.read_text())['MODEL']['RESNETS']))
    features = ['res2', 'res3', 'res4', 'res5']
    resnets.merge_from_other_cfg(CfgNode(dict(DEPTH=50, WIDTH_PER_GROUP=2, OUT_FEATURES=features, **changes)))
    return build(cfg, ShapeSpec(channels=3))


def openmmlab_networks(folder: Path) -> tuple[type[nn.Module], type[nn.Module]]:
    """Imports the backbones of mmdet and of UniverseNet, with torchvision's operator."""
    bare('mmcv.ops')
    compiled = ('deform_conv_forward', 'deform_conv_backward_input', 'deform_conv_backward_parameters')
    modulated = ('modulated_deform_conv_forward', 'modulated_deform_conv_backward')
    stub('mmcv._ext', **dict.fromkeys(compiled + modulated))
    from mmcv.ops import deform_conv, modulated_deform_conv

    def deform_conv_v1(x, offset, weight, stride, padding, dilation, groups, deform_groups, bias, im2col_step):
        return deform_conv2d(x, offset, weight, None, stride, padding, dilation)

    def deform_conv_v2(x, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups):
        return deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)

    deform_conv.deform_conv2d, modulated_deform_conv.modulated_deform_conv2d = deform_conv_v1, deform_conv_v2

    mmdet = mmdet_backbone()
    # UniverseNet is a copy of an older mmdet
    for name in [name for name in sys.modules if name.split('.')[0] == 'mmdet']:
        del sys.modules[name]
    sys.path.insert(0, str(folder / 'UniverseNet'))
    from mmengine.model import BaseModule, Sequential
    from mmengine.registry import Registry

    stub('mmcv.runner', BaseModule=BaseModule, Sequential=Sequential)
    for name in ('mmdet', 'mmdet.models', 'mmdet.models.backbones'):
        bare(name)
    stub('mmdet.models.builder', BACKBONES=Registry('backbone'))
    utils = bare('mmdet.models.utils')
    from mmdet.models.utils.res_layer import ResLayer as OlderResLayer

    utils.ResLayer = OlderResLayer
    from mmdet.models.backbones.res2net import Res2Net as UniverseNet

    return mmdet, UniverseNet


def common_name(name: str, shape: torch.Size) -> str:
    """Returns a name that corresponding tensors of detectron2 and mmdet share."""
    name = re.sub(r'^res(\d)', lambda match: f'layer{int(match[1]) - 1}', name)
    name = re.sub(r'\.conv([13])\.norm\.', r'.bn\1.', name)
    name = re.sub(r'\.(shortcut|downsample)\.\d\.(norm\.)?', '.downsample.', name)
    name = re.sub(r'\.conv2_offsets\.(\d)', r'.convs.\1.conv_offset', name)
    return name.replace('stem.conv1.', 'stem.').replace('stem.bn1.', 'stem.7.')


def main(folder: Path) -> None:
    detectron2, centernet2 = detectron2_builders(folder)
    mmdet, universenet = openmmlab_networks(folder)
    panoptic = folder / 'Res2Net-detectron2/configs/COCO-PanopticSegmentation/panoptic_fpn_R2_101_3x.yaml'
    centernet = folder / 'CenterNet2/configs/CenterNet2_R2-101-DCN_896_4x.yaml'
    args = dict(depth=50, scales=4, base_width=2, out_indices=(0, 1, 2, 3))
    made = {
        'detectron2': detectron2_network(detectron2, panoptic),
        'centernet2': detectron2_network(centernet2, centernet, DEFORM_ON_PER_STAGE=[False] * 4),
        'centernet2_dcn': detectron2_network(centernet2, centernet),
        'mmdet_dcnv2': mmdet(
            dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),
            stage_with_dcn=(False, True, True, True),
            **args,
        ),
        'universenet_dcn': universenet(
            dcn=dict(type='DCN', deform_groups=1, fallback_on_stride=False),
            stage_with_dcn=(False, False, False, True),
            **args,
        ),
        'universenet_plain': universenet(deep_stem=False, avg_down=False, **args),
    }
    rng = np.random.default_rng(0)
    drawn: dict[tuple[str, torch.Size], np.ndarray] = {}
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        for name, model in made.items():
            model.eval()  # mmdet's `eval` does not return the model
            randomize(model, drawn, rng, common_name, filters=10_000)
            file = Path(temporary, name)
            if name.startswith(('mmdet', 'universenet')):
                state = {f'backbone.{key}': tensor for key, tensor in model.state_dict().items()}
                state['neck.lateral_convs.0.conv.weight'] = torch.ones(8, 256, 1, 1)
                torch.save({'meta': {}, 'state_dict': state}, file.with_suffix('.pth'))
            else:
                state = {f'backbone.bottom_up.{key}': tensor for key, tensor in model.state_dict().items()}
                state['backbone.fpn_lateral3.weight'] = torch.ones(8, 512, 1, 1)
                if name == 'detectron2':
                    arrays = {key: tensor.numpy() for key, tensor in state.items()}
                    file.with_suffix('.pkl').write_bytes(pickle.dumps({'model': arrays, '__author__': 'Res2Net'}))
                else:
                    torch.save({'model': state, 'iteration': 179999}, file.with_suffix('.pth'))

            def run(x: np.ndarray, model: nn.Module = model) -> list[np.ndarray]:
                maps = model(torch.from_numpy(x))
                return [feature.numpy() for feature in (maps.values() if isinstance(maps, dict) else maps)]

            save_reference(run, file, np.random.default_rng(0))
        pack(temporary, 'deformable.tar.xz')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
