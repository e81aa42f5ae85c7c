"""Known networks around a Res2Net with the authors' tensor names, told by the names of their other tensors.

The authors' names say nothing of strides and dilations. What these networks compute was read off and run from their own
code; that each has its marks, and no other one, was found by comparing the tensor names of all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..models.function import Function

__all__ = ['PROJECTS', 'Project', 'find_project']


@dataclass(frozen=True)
class Project:
    """A network around a Res2Net. Names of its tensors are without what precedes the Res2Net's module."""

    whose: str
    prefix: str  # the Res2Net's module
    function: Function | None  # what the Res2Net computes, None if no model here does
    mark: str  # a tensor beside it; if the name ends in a dot, a module
    also: str = ''  # another one that it has, too
    absent: str = ''  # one that it doesn't have, but another network with the same mark
    shape: tuple[int, ...] | None = None  # of the mark, if others have the same
    unknown: str = ''  # why no model here computes the function


USUAL = Function()
MMDET = Function('mmdet')
DILATED = Function(dilations=(1, 1, 2, 4))
MULTI_GRID = Function(dilations=(1, 1, 2, (4, 8, 16)))
STRIDE_16 = Function(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2))
STRIDE_8 = Function(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
DENSE = Function(strides=(1, 2, 2, 1))
CCLNET = Function(strides=(1, 2, 1, 2))
POOLNET = replace(STRIDE_16, stem_ceil_mode=True)

UACANET = 'attention4.conv_query.0.conv.weight'
PRANET = 'ra4_conv2.conv.weight'

# fmt: off
PROJECTS = (
    #        whose                  prefix      function    mark
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
    Project('URN, PMM',             'backbone', STRIDE_8,   'decode_head.psp_modules.0.1.conv.weight'),
    Project("the authors' PoolNet", 'resnet',   POOLNET,    'ppms_pre.weight'),
    Project('CCLNet',               'resnet',   CCLNET,     'tokenmlp.token_mixer.0.weight'),
    Project('PraNet, Inf-Net for CT', 'resnet', DENSE,      PRANET, also='final_1.weight'),  # of others
    Project('a detector of mmdet',  'backbone', MMDET,      'bbox_head.'),
    Project('a detector of mmdet',  'backbone', MMDET,      'roi_head.'),
    Project('BiANet',               'backbone', None,       'toplayer.1.weight',
            unknown='is of BiANet, whose first convolution has no stride, as in no model here'),
    Project('PraNet',               'resnet',   USUAL,      PRANET, also='agg1.conv_upsample1.conv.weight',
                                                            absent='final_1.weight'),
    Project('Inf-Net',              'resnet',   USUAL,      PRANET, also='ParDec.conv_upsample1.conv.weight',
                                                            absent='final_1.weight'),
    Project('SINet-V2',             'resnet',   USUAL,      'NCD.conv_upsample1.conv.weight'),
    Project('C2FNet',               'resnet',   USUAL,      'acfm3.msca.local_att.0.weight'),
    Project('SANet',                'bkbone',   USUAL,      'linear5.0.weight', also='predict.weight'),
    Project('MSNet, M2SNet',        'resnet',   USUAL,      'x5_x4_x3_x2_x1.0.weight'),
    Project('BGNet',                'resnet',   USUAL,      'eam.reduce1.conv.weight'),
    Project('CFANet',               'resnet',   USUAL,      'low_fusion.gate_1.weight'),
    Project('FAPNet',               'resnet',   USUAL,      'cgate5.layer_1.0.weight'),
    Project('CaraNet',              'resnet',   USUAL,      'CFP_1.bn_relu_1.bn.weight'),
    Project('CSF',                  'base',     USUAL,      'fuse1x1.conv.weights'),
    Project('PNS-Net',              'feature_extractor', USUAL, 'NSB_1.query_conv.weight'),
)
# fmt: on


def find_project(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Project | None:
    """Finds the network that a Res2Net is a part of, None for an unknown one.

    Args:
        prefix: Before the Res2Net's names.
        shapes: Shapes of all tensors of the file.
    """
    parent, _, last = prefix.removesuffix('.').rpartition('.')
    above = f'{parent}.' if parent else ''
    for project in PROJECTS:
        if (
            last == project.prefix
            and has(shapes, above + project.mark)
            and (not project.also or has(shapes, above + project.also))
            and not (project.absent and has(shapes, above + project.absent))
            and project.shape in (None, shapes.get(above + project.mark))
        ):
            return project
    return None


def has(names: Mapping[str, object], name: str) -> bool:
    """Whether there is a tensor of that name, or in that module, whose name ends in a dot."""
    return any(each.startswith(name) for each in names) if name.endswith('.') else name in names
