"""Rename tables: how each code base names the tensors of a Res2Net, and what its networks compute.

Code bases use the same names and shapes for networks that compute different things. Each dialect therefore also records
the `NetworkSpec` of its networks, and which of its fields other code with the same names may set differently.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..models.spec import NetworkSpec

# A row (theirs, ours) replaces the beginning of a name; the first row that matches is used:
#
#     ('res{s}.{i}.conv1.norm.', 'layer{s}.{i}.bn1.')   with offsets={'s': -1}
#     res3.0.conv1.norm.weight -> layer2.0.bn1.weight
#
# {s} numbers stages, {i} blocks in a stage, {k} convolutions in a block, and {j} layers in a stem or shortcut.
# PaddlePaddle needs two more: {letter} counts blocks as a, b, c, and {path} repeats stage and block ('res2a').
# '../head.' is next to the network's module: if the prefix is 'backbone.', '../head.fc.' stands for 'head.fc.'.
Rows = tuple[tuple[str, str], ...]


def conv_norm(theirs: tuple[str, str], names: Iterable[str], ours: Iterable[tuple[str, str]]) -> Rows:
    """Returns two rows for each name, one for a convolution and one for its norm; the name replaces * in `theirs`."""
    return tuple(
        (template.replace('*', name), target)
        for name, pair in zip(names, ours)
        for template, target in zip(theirs, pair)
    )


STEM = ('conv1.', 'bn1.')
DEEP_STEM = ('conv1.0.', 'conv1.1.'), ('conv1.3.', 'conv1.4.'), ('conv1.6.', 'bn1.')
BLOCK = (
    ('layer{s}.{i}.conv1.', 'layer{s}.{i}.bn1.'),
    ('layer{s}.{i}.convs.{k}.', 'layer{s}.{i}.bns.{k}.'),
    ('layer{s}.{i}.conv3.', 'layer{s}.{i}.bn3.'),
)
SHORTCUT = ('layer{s}.{i}.downsample.0.', 'layer{s}.{i}.downsample.1.')
POOLED_SHORTCUT = ('layer{s}.{i}.downsample.1.', 'layer{s}.{i}.downsample.2.')  # with an average pool before it
OFFSET = 'layer{s}.{i}.convs.{k}.conv_offset.'

PADDLE = '*._conv.', '*._batch_norm.'
PADDLE_NAMES = 'bb_{s}_{i}.conv0', 'bb_{s}_{i}.{path}_branch2b_{k}', 'bb_{s}_{i}.conv2'
PADDLE_BLOCKS = (*conv_norm(PADDLE, PADDLE_NAMES, BLOCK), ('out.', 'fc.'))
PADDLE_STEM = conv_norm(PADDLE, ('conv1', 'bb_{s}_{i}.short'), (STEM, SHORTCUT))
PADDLE_DEEP_STEM = conv_norm(
    PADDLE, ('conv1_1', 'conv1_2', 'conv1_3', 'bb_{s}_{i}.short'), (*DEEP_STEM, POOLED_SHORTCUT)
)
ARCHIVE = 'res{s}{letter}_*_', 'bn{s}{letter}_*_'
ARCHIVE_BLOCKS = (
    ('res{s}{letter}_branch2b_{k}_conv_offset.', OFFSET),  # only in PaddleDetection
    *conv_norm(ARCHIVE, ('branch2a', 'branch2b_{k}', 'branch2c'), BLOCK),
    ('fc_', 'fc.'),
)
ARCHIVE_STEM = (('conv1_', 'conv1.'), ('bn_conv1_', 'bn1.'), *conv_norm(ARCHIVE, ['branch1'], [SHORTCUT]))
ARCHIVE_DEEP_STEM = (
    *conv_norm(('conv1_*_', 'bnv1_*_'), '123', DEEP_STEM),  # PaddleClas cuts off three letters of conv1_1, as of res2a
    *conv_norm(ARCHIVE, ['branch1'], [POOLED_SHORTCUT]),
)
DETECTION_NAMES = 'branch2a', 'branch2b.{k}', 'branch2c', 'branch1.conv', 'branch1'
DETECTION_BLOCKS = (
    *conv_norm(
        ('res{s}.blocks.{i}.*.conv.', 'res{s}.blocks.{i}.*.norm.'), DETECTION_NAMES, (*BLOCK, POOLED_SHORTCUT, SHORTCUT)
    ),
    ('res{s}.blocks.{i}.branch2b.{k}.conv_offset.', OFFSET),
)
DETECTION_STEM = conv_norm(('res1.*.conv.', 'res1.*.norm.'), ['conv1'], [STEM])
DETECTION_DEEP_STEM = conv_norm(('res1.conv1_*.conv.', 'res1.conv1_*.norm.'), '123', DEEP_STEM)
MINDSPORE_TENSORS = dict(gamma='weight', beta='bias', moving_mean='running_mean', moving_variance='running_var')
MINDCV_SHORTCUT = (('layer{s}.{i}.down_sample.{j}.', 'layer{s}.{i}.downsample.{j}.'),)
MINDCV_DEEP_SHORTCUT = (  # at stride 1, MindCV counts from 0, while timm keeps index 0 for the pool
    ('layer1.0.down_sample.0.', 'layer1.0.downsample.1.'),
    ('layer1.0.down_sample.1.', 'layer1.0.downsample.2.'),
    *MINDCV_SHORTCUT,
)
MMPRETRAIN_DEEP_STEM = conv_norm(('stem.*.conv.', 'stem.*.bn.'), '012', DEEP_STEM)
MMDET_STEM = (('stem.7.', 'bn1.'), ('stem.{j}.', 'conv1.{j}.'))
DETECTRON_BLOCKS = (
    ('res{s}.{i}.conv1.norm.', 'layer{s}.{i}.bn1.'),
    ('res{s}.{i}.conv3.norm.', 'layer{s}.{i}.bn3.'),
    ('res{s}.{i}.shortcut.1.norm.', 'layer{s}.{i}.downsample.2.'),
    ('res{s}.{i}.shortcut.1.', 'layer{s}.{i}.downsample.1.'),
    ('res{s}.{i}.shortcut.norm.', 'layer{s}.{i}.downsample.1.'),
    ('res{s}.{i}.shortcut.', 'layer{s}.{i}.downsample.0.'),
    ('res{s}.{i}.conv2_offsets.{k}.', OFFSET),  # CenterNet2, without bias
    ('res{s}.{i}.', 'layer{s}.{i}.'),
    ('stem.conv1.norm.', 'bn1.'),
    ('stem.', ''),
)


def holocron_stages(first: int) -> Rows:
    """Returns the rows of Holocron's blocks. Holocron numbers stem layers and stages together; stage 1 is `first`."""
    parts = {
        'conv.0.': 'conv1.',
        'conv.1.': 'bn1.',
        'conv.3.conv.{k}.0.': 'convs.{k}.',
        'conv.3.conv.{k}.1.': 'bns.{k}.',
        'conv.4.': 'conv3.',
        'conv.5.': 'bn3.',
        'downsample.': 'downsample.',
    }
    return tuple(
        (f'features.{first + stage}.{{i}}.{theirs}', f'layer{stage + 1}.{{i}}.{ours}')
        for stage in range(4)
        for theirs, ours in parts.items()
    )


HOLOCRON_STEM = (('features.0.', 'conv1.'), ('features.1.', 'bn1.'), *holocron_stages(4))
HOLOCRON_DEEP_STEM = (*holocron_stages(10), ('features.7.', 'bn1.'), ('features.{j}.', 'conv1.{j}.'))

OFFICIAL = NetworkSpec()
GEOMETRY = ('strides', 'dilations', 'dilate_first')
AMBIGUOUS = tuple(name for name in vars(OFFICIAL) if name != 'deformable')  # what the authors' names do not show


@dataclass(frozen=True)
class Dialect:
    """How one code base names the tensors of its networks, and what these compute."""

    description: str  # where such files come from
    anchors: tuple[str, ...]  # each file has a tensor with one of these names
    stems: tuple[tuple[str, Rows], ...]  # and one with one of these, each with more rows; the last one is deep
    rows: Rows = ()  # theirs to ours, for the beginning of a name
    suffixes: dict[str, str] = field(default_factory=dict)  # theirs to ours, for the last part of a name
    offsets: dict[str, int] = field(default_factory=dict)  # added to their numbers to get ours
    spec: NetworkSpec | None = OFFICIAL  # what their networks compute; None if no model here computes it
    unsupported: str = ''  # why no model here computes it
    detector_spec: NetworkSpec | None = None  # spec of a network that is part of a larger one, if different
    ambiguous: tuple[str, ...] = ()  # spec fields that their configurations change without a trace in the file
    stem_norm: bool = True  # whether a norm follows the last convolution of the stem
    transposed: bool = False  # whether the classifier's weight has shape (in, out)
    options: tuple[str, ...] = ()  # spec fields that their configuration can set, for export
    prefix: str = ''  # of the network's names, for export


# In order of priority: the first dialect that matches a file is used.
DIALECTS = {
    'paddleclas': Dialect(
        'PaddleClas, .pdparams',
        ('bb_0_0.conv0._conv.weight',),
        (('conv1._conv.weight', PADDLE_STEM), ('conv1_1._conv.weight', PADDLE_DEEP_STEM)),
        PADDLE_BLOCKS,
        suffixes={'_mean': 'running_mean', '_variance': 'running_var'},
        offsets={'s': 1, 'k': -1},
        spec=NetworkSpec('paddle'),
        transposed=True,
    ),
    'paddle-archive': Dialect(
        'PaddleClas and PaddleDetection before Paddle 2, .tar',
        ('res2a_branch2a_weights',),
        (('conv1_weights', ARCHIVE_STEM), ('conv1_1_weights', ARCHIVE_DEEP_STEM)),
        ARCHIVE_BLOCKS,
        suffixes=dict(
            weights='weight',
            w_0='weight',
            scale='weight',
            offset='bias',
            b_0='bias',
            mean='running_mean',
            variance='running_var',
        ),
        offsets={'s': -1, 'k': -1},
        spec=NetworkSpec('paddle'),
        transposed=True,
    ),
    'paddledetection': Dialect(
        'PaddleDetection, .pdparams',
        ('res2.blocks.0.branch2a.conv.weight',),
        (('res1.conv1.conv.weight', DETECTION_STEM), ('res1.conv1_1.conv.weight', DETECTION_DEEP_STEM)),
        DETECTION_BLOCKS,
        suffixes={'_mean': 'running_mean', '_variance': 'running_var'},
        offsets={'s': -1},
        spec=NetworkSpec('paddle'),
    ),
    'mindcv': Dialect(
        'MindCV, MindSpore .ckpt',
        ('layer1.0.down_sample.1.moving_mean',),  # an optimizer copies all weights, but not statistics
        (('conv1.weight', MINDCV_SHORTCUT), ('conv1.0.weight', MINDCV_DEEP_SHORTCUT)),
        (('classifier.', 'fc.'),),
        suffixes=MINDSPORE_TENSORS,
    ),
    'mindspore': Dialect(
        "MindSpore ports, .ckpt: CFANet's, and MindSpore's own from before MindCV",
        ('layer1.0.bn1.moving_mean',),
        (('conv1.weight', ()), ('conv1.0.weight', ()), ('conv1_0.weight', (('conv1_{j}.', 'conv1.{j}.'),))),
        suffixes=MINDSPORE_TENSORS,
        spec=None,
        unsupported="its tensor names are those of MindSpore ports such as CFANet's, which pad strided convolutions at "
        'the end only. No model in this package does that',
    ),
    'mmpretrain': Dialect(
        'mmpretrain (mmcls), .pth',
        ('layer1.0.convs.0.weight',),
        (('../head.fc.weight', ()), ('stem.0.conv.weight', MMPRETRAIN_DEEP_STEM)),
        (('../head.fc.', 'fc.'),),
        ambiguous=('style', 'norm_eps', *GEOMETRY),
        prefix='backbone.',
    ),
    'mmdet': Dialect(
        "mmdet, .pth: detectors have mmdet's first block, backbones converted for mmdet have the authors'",
        ('layer1.0.convs.0.weight',),
        (('stem.7.weight', MMDET_STEM),),
        detector_spec=NetworkSpec('mmdet'),
        ambiguous=('first_block', 'style', 'norm_eps', *GEOMETRY),
        options=('strides', 'dilations', 'deformable'),
        prefix='backbone.',
    ),
    'holocron': Dialect(
        'Holocron, .pth',
        ('features.0.weight',),
        (
            ('features.4.0.conv.3.conv.0.0.weight', HOLOCRON_STEM),
            ('features.10.0.conv.3.conv.0.0.weight', HOLOCRON_DEEP_STEM),
        ),
        (('head.', 'fc.'),),
    ),
    'detectron2': Dialect(
        "the authors' detectron2 and CenterNet2, .pkl: detectors compute mmdet's first block in Caffe style",
        ('res2.0.convs.0.weight',),
        (('stem.conv1.weight', ()), ('stem.conv1.0.weight', ())),
        DETECTRON_BLOCKS,
        offsets={'s': -1},
        detector_spec=NetworkSpec('mmdet', 'caffe'),
        ambiguous=('first_block', 'style', *GEOMETRY),
    ),
    'maskrcnn-benchmark': Dialect(
        "the authors' maskrcnn-benchmark, .pth",
        ('layer1.0.convs.0.weight',),
        (('stem.conv1.weight', ()),),
        (('stem.', ''),),
        spec=NetworkSpec(style='caffe', norm_eps=0.0),
        ambiguous=('style', *GEOMETRY),  # STRIDE_IN_1X1 and RES5_DILATION in its configurations
    ),
    'vecroad': Dialect(
        'VecRoad, .pth',
        ('stage_2.0.convs.0.weight',),
        (('stage_1.0.0.weight', ()),),
        (('stage_1.0.{j}.', 'conv1.{j}.'), ('stage_{s}.', 'layer{s}.')),
        offsets={'s': -1},
        spec=NetworkSpec('mmdet', strides=(1, 2, 1, 1), dilations=(1, 1, 2, (4, 8, 16))),
        stem_norm=False,
    ),
    'meganet': Dialect(
        "MEGANet and others that name the authors' stem and stages encoder1 to encoder5, .pth",
        ('encoder2.0.convs.0.weight',),
        (('encoder1_conv.weight', ()), ('encoder1_conv.0.weight', ())),
        (('encoder1_conv.', 'conv1.'), ('encoder1_bn.', 'bn1.'), ('encoder{s}.', 'layer{s}.')),
        offsets={'s': -1},
        ambiguous=AMBIGUOUS,
    ),
    'fca-net': Dialect(
        "FCA-Net, .pth, which splits the authors' modules in two",
        ('backbone_last.layer4.0.convs.0.weight',),
        (('backbone_pre.conv1.0.weight', ()),),
        (('backbone_pre.', ''), ('backbone_last.', '')),
        spec=NetworkSpec('mmdet', strides=(1, 2, 2, 1), dilations=(1, 1, 1, (2, 4, 8))),
    ),
    'd-linknet': Dialect(
        "D-LinkNet and others that name the authors' stem firstconv and the stages encoder1 to encoder4, .pth",
        ('encoder1.0.convs.0.weight',),
        (('firstconv.weight', ()), ('firstconv.0.weight', ())),
        (('firstconv.', 'conv1.'), ('firstbn.', 'bn1.'), ('encoder{s}.', 'layer{s}.')),
        ambiguous=AMBIGUOUS,
    ),
    'layer0': Dialect(
        "networks with the authors' stem in one module, layer0, .pth",
        ('layer1.0.convs.0.weight',),
        (('layer0.0.weight', ()), ('layer0.0.0.weight', ())),
        (('layer0.0.', 'conv1.'), ('layer0.1.', 'bn1.')),
        ambiguous=AMBIGUOUS,
    ),
    'numbered': Dialect(
        "networks cut from the authors' or timm's by nn.Sequential(*model.children()), as fastai does, .pth",
        ('4.0.convs.0.weight',),
        (('0.weight', ()), ('0.0.weight', ())),
        (('0.', 'conv1.'), ('1.', 'bn1.'), *((f'{i + 3}.', f'layer{i}.') for i in (1, 2, 3, 4)), ('9.', 'fc.')),
        ambiguous=AMBIGUOUS,
    ),
    'official': Dialect(
        "the authors' code, timm, Jittor, this package, and projects that build on them (PraNet, ...)",
        ('layer1.0.convs.0.weight', 'layer1.big.0.convs.0.weight', 'level2.tree1.convs.0.weight'),
        (('conv1.weight', ()), ('conv1.0.weight', ()), ('base_layer.0.weight', ())),
        ambiguous=AMBIGUOUS,
    ),
}
EXPORTS = ('official', 'mmpretrain', 'mmdet', 'paddleclas')
