"""Known networks that contain a Res2Net with the authors' tensor names, recognized by their other tensors.

The authors' names do not show strides and dilations, so these were taken from each project's code, and the outputs were
compared. Each mark, together with `also`, `absent` and `shape`, was checked to be unique among these networks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..models.spec import NetworkSpec


@dataclass(frozen=True)
class Project:
    """A network that contains a Res2Net. Tensor names are relative to the parent of the Res2Net's module."""

    name: str
    prefix: str  # the Res2Net's module
    spec: NetworkSpec | None  # what the Res2Net computes; None if no model here does
    mark: str  # a tensor that must be present, or a module if the name ends in a dot
    also: str = ''  # another tensor or module that must be present
    absent: str = ''  # one that must be absent, if another network has the same mark
    shape: tuple[int, ...] | None = None  # of the mark, if another network has the same mark
    unsupported: str = ''  # why no model here computes it


DEFAULT = NetworkSpec()
MMDET = NetworkSpec('mmdet')
DILATED = NetworkSpec(dilations=(1, 1, 2, 4))
MULTI_GRID = NetworkSpec(dilations=(1, 1, 2, (4, 8, 16)))
STRIDE_16 = NetworkSpec(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2))
STRIDE_8 = NetworkSpec(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
DENSE = NetworkSpec(strides=(1, 2, 2, 1))
CCLNET = NetworkSpec(strides=(1, 2, 1, 2))
POOLNET = replace(STRIDE_16, stem_ceil_mode=True)

UACANET = 'attention4.conv_query.0.conv.weight'
PRANET = 'ra4_conv2.conv.weight'

# fmt: off
PROJECTS = (
    #        name                   prefix      spec        mark
    Project('UACANet-S, CANet-S',   'resnet',   DILATED,    UACANET, shape=(32, 64, 3, 3)),
    Project('UACANet-L, CANet-L',   'resnet',   STRIDE_16,  UACANET, shape=(256, 512, 3, 3)),
    Project("UACANet's PraNet",     'resnet',   DILATED,    'decoder.conv_upsample1.conv.weight', absent='nonlocal2.',
                                                            also='attention4.conv_mid.0.conv.weight'),
    Project("UACANet's Baseline",   'resnet',   DILATED,    'context2.branch1.conv.weight'),
    Project('SCSGNet',              'resnet',   DILATED,    'nonlocal2.qkv.weight'),
    Project('MGF-Net',              'resnet',   STRIDE_16,  'attention2.gamma'),
    Project('BCSNet',               'resnet',   STRIDE_16,  'attention_CCR1.conv_query.0.conv.weight'),
    Project('InSPyReNet',           'backbone', MULTI_GRID, 'attention0.threshold'),
    Project('LaneSOD',              'backbone', MULTI_GRID, 'attention.threshold'),
    Project('TSNUNet',              'backbone', MULTI_GRID, 'conv_fuse345.0.weight'),
    Project('DSRNet',               'resnet',   MULTI_GRID, 'CRM_7.conv_p1.weight'),
    Project('diffSOD',              'backbone_original', MULTI_GRID, 'original_rfb1.ff.0.weight'),
    Project('diffSOD',              'backbone_x', MULTI_GRID, 'original_rfb1.ff.0.weight'),  # its other name
    Project('URN, PMM',             'backbone', STRIDE_8,   'decode_head.psp_modules.0.1.conv.weight',
                                                            absent='decode_head.fpn_convs.0.conv.weight'),  # UPerNet's
    Project("the authors' PoolNet", 'resnet',   POOLNET,    'ppms_pre.weight'),
    Project('CCLNet',               'resnet',   CCLNET,     'tokenmlp.token_mixer.0.weight'),
    Project('PraNet, Inf-Net for CT', 'resnet', DENSE,      PRANET, also='final_1.weight'),  # only here
    # mmdet >= 2 names a deep stem `stem`. The authors' fork of mmdet 1 names it conv1, and always pools the last split.
    Project('an mmdet 1 detector',  'backbone', DEFAULT,    'bbox_head.', also='backbone.conv1.0.weight'),
    Project('an mmdet 1 detector',  'backbone', DEFAULT,    'rpn_head.',  also='backbone.conv1.0.weight'),
    Project('an mmdet detector',    'backbone', MMDET,      'bbox_head.'),
    Project('an mmdet detector',    'backbone', MMDET,      'roi_head.'),
    Project('an mmdet detector',    'backbone', MMDET,      'rpn_head.'),
    Project('BiANet',               'backbone', None,       'toplayer.1.weight',
            unsupported='it is BiANet: its first convolution has stride 1, unlike those of all models in this package'),
    Project('PraNet',               'resnet',   DEFAULT,      PRANET, also='agg1.conv_upsample1.conv.weight',
                                                            absent='final_1.weight'),
    Project('Inf-Net',              'resnet',   DEFAULT,      PRANET, also='ParDec.conv_upsample1.conv.weight',
                                                            absent='final_1.weight'),
    Project('SINet-V2',             'resnet',   DEFAULT,      'NCD.conv_upsample1.conv.weight'),
    Project('C2FNet',               'resnet',   DEFAULT,      'acfm3.msca.local_att.0.weight'),
    Project('SANet',                'bkbone',   DEFAULT,      'linear5.0.weight', also='predict.weight'),
    Project('MSNet, M2SNet',        'resnet',   DEFAULT,      'x5_x4_x3_x2_x1.0.weight'),
    Project('BGNet',                'resnet',   DEFAULT,      'eam.reduce1.conv.weight'),
    Project('CFANet',               'resnet',   DEFAULT,      'low_fusion.gate_1.weight'),
    Project('FAPNet',               'resnet',   DEFAULT,      'cgate5.layer_1.0.weight'),
    Project('CaraNet',              'resnet',   DEFAULT,      'CFP_1.bn_relu_1.bn.weight'),
    Project('CSF',                  'base',     DEFAULT,      'fuse1x1.conv.weights'),
    Project('PNS-Net',              'feature_extractor', DEFAULT, 'NSB_1.query_conv.weight'),
)
# fmt: on


def find_project(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Project | None:
    """Finds the known network that contains the Res2Net under a prefix; `shapes` are those of a file's tensors."""
    parent, _, last = prefix.removesuffix('.').rpartition('.')
    above = f'{parent}.' if parent else ''
    for project in PROJECTS:
        if (
            last == project.prefix
            and contains(shapes, above + project.mark)
            and (not project.also or contains(shapes, above + project.also))
            and not (project.absent and contains(shapes, above + project.absent))
            and project.shape in (None, shapes.get(above + project.mark))
        ):
            return project
    return None


def contains(names: Mapping[str, object], name: str) -> bool:
    """Whether there is a tensor of that name, or in that module if the name ends in a dot."""
    return any(each.startswith(name) for each in names) if name.endswith('.') else name in names
