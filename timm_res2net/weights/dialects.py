"""Rename tables for other people's files: from their tensor names to timm's, and back.

Files of different code bases can hold tensors of the same shapes for networks that compute different things. So each
dialect says, beside the names, what its networks compute (a `Function`), and what of that other codes with these names
do in another way.
"""

import re
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..models.function import Function
from .errors import CheckpointError

__all__ = [
    'DIALECTS',
    'EXPORTS',
    'Dialect',
    'Translation',
    'export',
    'find_network',
    'flatten',
    'is_dead',
    'translate',
]

# A row renames the beginning of a name, theirs to ours; the first row that matches is used. {s} is the number of a
# stage, {i} of a block in the stage, {k} of a convolution in the block, {j} of a layer in a shortcut; {letter} is a
# block counted by letters, and {path} repeats stage and block. Tensors beside the network are written as in a path:
# ../head is beside backbone.
Rows = tuple[tuple[str, str], ...]
NUMBERS = {'letter': r'[a-z]\d*', 'path': r'\w+?'}  # all others are \d+

PADDLE_BLOCKS = (
    ('bb_{s}_{i}.conv0._conv.', 'layer{s}.{i}.conv1.'),
    ('bb_{s}_{i}.conv0._batch_norm.', 'layer{s}.{i}.bn1.'),
    ('bb_{s}_{i}.{path}_branch2b_{k}._conv.', 'layer{s}.{i}.convs.{k}.'),
    ('bb_{s}_{i}.{path}_branch2b_{k}._batch_norm.', 'layer{s}.{i}.bns.{k}.'),
    ('bb_{s}_{i}.conv2._conv.', 'layer{s}.{i}.conv3.'),
    ('bb_{s}_{i}.conv2._batch_norm.', 'layer{s}.{i}.bn3.'),
    ('out.', 'fc.'),
)
PADDLE_STEM = (
    ('conv1._conv.', 'conv1.'),
    ('conv1._batch_norm.', 'bn1.'),
    ('bb_{s}_{i}.short._conv.', 'layer{s}.{i}.downsample.0.'),
    ('bb_{s}_{i}.short._batch_norm.', 'layer{s}.{i}.downsample.1.'),
)
PADDLE_DEEP_STEM = (
    ('conv1_1._conv.', 'conv1.0.'),
    ('conv1_1._batch_norm.', 'conv1.1.'),
    ('conv1_2._conv.', 'conv1.3.'),
    ('conv1_2._batch_norm.', 'conv1.4.'),
    ('conv1_3._conv.', 'conv1.6.'),
    ('conv1_3._batch_norm.', 'bn1.'),
    ('bb_{s}_{i}.short._conv.', 'layer{s}.{i}.downsample.1.'),
    ('bb_{s}_{i}.short._batch_norm.', 'layer{s}.{i}.downsample.2.'),
)
ARCHIVE_BLOCKS = (
    ('res{s}{letter}_branch2a_', 'layer{s}.{i}.conv1.'),
    ('bn{s}{letter}_branch2a_', 'layer{s}.{i}.bn1.'),
    ('res{s}{letter}_branch2b_{k}_conv_offset.', 'layer{s}.{i}.convs.{k}.conv_offset.'),  # of PaddleDetection
    ('res{s}{letter}_branch2b_{k}_', 'layer{s}.{i}.convs.{k}.'),
    ('bn{s}{letter}_branch2b_{k}_', 'layer{s}.{i}.bns.{k}.'),
    ('res{s}{letter}_branch2c_', 'layer{s}.{i}.conv3.'),
    ('bn{s}{letter}_branch2c_', 'layer{s}.{i}.bn3.'),
    ('fc_', 'fc.'),
)
ARCHIVE_STEM = (
    ('conv1_', 'conv1.'),
    ('bn_conv1_', 'bn1.'),
    ('res{s}{letter}_branch1_', 'layer{s}.{i}.downsample.0.'),
    ('bn{s}{letter}_branch1_', 'layer{s}.{i}.downsample.1.'),
)
ARCHIVE_DEEP_STEM = (
    ('conv1_1_', 'conv1.0.'),
    ('bnv1_1_', 'conv1.1.'),  # PaddleClas cuts three letters off conv1_1, as it does with res2a
    ('conv1_2_', 'conv1.3.'),
    ('bnv1_2_', 'conv1.4.'),
    ('conv1_3_', 'conv1.6.'),
    ('bnv1_3_', 'bn1.'),
    ('res{s}{letter}_branch1_', 'layer{s}.{i}.downsample.1.'),
    ('bn{s}{letter}_branch1_', 'layer{s}.{i}.downsample.2.'),
)
DETECTION_BLOCKS = (
    ('res{s}.blocks.{i}.branch2a.conv.', 'layer{s}.{i}.conv1.'),
    ('res{s}.blocks.{i}.branch2a.norm.', 'layer{s}.{i}.bn1.'),
    ('res{s}.blocks.{i}.branch2b.{k}.conv.', 'layer{s}.{i}.convs.{k}.'),
    ('res{s}.blocks.{i}.branch2b.{k}.norm.', 'layer{s}.{i}.bns.{k}.'),
    ('res{s}.blocks.{i}.branch2b.{k}.conv_offset.', 'layer{s}.{i}.convs.{k}.conv_offset.'),
    ('res{s}.blocks.{i}.branch2c.conv.', 'layer{s}.{i}.conv3.'),
    ('res{s}.blocks.{i}.branch2c.norm.', 'layer{s}.{i}.bn3.'),
    ('res{s}.blocks.{i}.branch1.conv.conv.', 'layer{s}.{i}.downsample.1.'),  # with an average pool before it
    ('res{s}.blocks.{i}.branch1.conv.norm.', 'layer{s}.{i}.downsample.2.'),
    ('res{s}.blocks.{i}.branch1.conv.', 'layer{s}.{i}.downsample.0.'),
    ('res{s}.blocks.{i}.branch1.norm.', 'layer{s}.{i}.downsample.1.'),
)
DETECTION_STEM = (
    ('res1.conv1.conv.', 'conv1.'),
    ('res1.conv1.norm.', 'bn1.'),
)
DETECTION_DEEP_STEM = (
    ('res1.conv1_1.conv.', 'conv1.0.'),
    ('res1.conv1_1.norm.', 'conv1.1.'),
    ('res1.conv1_2.conv.', 'conv1.3.'),
    ('res1.conv1_2.norm.', 'conv1.4.'),
    ('res1.conv1_3.conv.', 'conv1.6.'),
    ('res1.conv1_3.norm.', 'bn1.'),
)
MINDSPORE_TENSORS = dict(gamma='weight', beta='bias', moving_mean='running_mean', moving_variance='running_var')
MINDCV_SHORTCUT = (('layer{s}.{i}.down_sample.{j}.', 'layer{s}.{i}.downsample.{j}.'),)
MINDCV_DEEP_SHORTCUT = (  # where the stride is 1, MindCV counts from 0, timm keeps a place for the pool
    ('layer1.0.down_sample.0.', 'layer1.0.downsample.1.'),
    ('layer1.0.down_sample.1.', 'layer1.0.downsample.2.'),
    *MINDCV_SHORTCUT,
)
MMPRETRAIN_DEEP_STEM = (
    ('stem.0.conv.', 'conv1.0.'),
    ('stem.0.bn.', 'conv1.1.'),
    ('stem.1.conv.', 'conv1.3.'),
    ('stem.1.bn.', 'conv1.4.'),
    ('stem.2.conv.', 'conv1.6.'),
    ('stem.2.bn.', 'bn1.'),
)
MMDET_STEM = (
    ('stem.0.', 'conv1.0.'),
    ('stem.1.', 'conv1.1.'),
    ('stem.3.', 'conv1.3.'),
    ('stem.4.', 'conv1.4.'),
    ('stem.6.', 'conv1.6.'),
    ('stem.7.', 'bn1.'),
)
DETECTRON_BLOCKS = (
    ('res{s}.{i}.conv1.norm.', 'layer{s}.{i}.bn1.'),
    ('res{s}.{i}.conv3.norm.', 'layer{s}.{i}.bn3.'),
    ('res{s}.{i}.shortcut.1.norm.', 'layer{s}.{i}.downsample.2.'),
    ('res{s}.{i}.shortcut.1.', 'layer{s}.{i}.downsample.1.'),
    ('res{s}.{i}.shortcut.norm.', 'layer{s}.{i}.downsample.1.'),
    ('res{s}.{i}.shortcut.', 'layer{s}.{i}.downsample.0.'),
    ('res{s}.{i}.conv2_offsets.{k}.', 'layer{s}.{i}.convs.{k}.conv_offset.'),  # CenterNet2, without bias
    ('res{s}.{i}.', 'layer{s}.{i}.'),
    ('stem.conv1.norm.', 'bn1.'),
    ('stem.', ''),
)
VECROAD_STAGES = (
    ('stage_1.0.{j}.', 'conv1.{j}.'),
    ('stage_{s}.', 'layer{s}.'),
)
ENCODERS = (
    ('encoder1_conv.', 'conv1.'),
    ('encoder1_bn.', 'bn1.'),
    ('encoder{s}.', 'layer{s}.'),
)
FCA_PARTS = (
    ('backbone_pre.', ''),
    ('backbone_last.', ''),
)
PORT_BLOCKS = (
    ('layer{s}.{i}.conv2.{k}.', 'layer{s}.{i}.convs.{k}.'),
    ('layer{s}.{i}.bn2.{k}.', 'layer{s}.{i}.bns.{k}.'),
)


def holocron_stages(first: int) -> Rows:
    """Rows for Holocron's blocks; its features are counted from the stem on, the first stage is number `first`."""
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


HOLOCRON_STEM = (
    ('features.0.', 'conv1.'),
    ('features.1.', 'bn1.'),
    *holocron_stages(4),
)
HOLOCRON_DEEP_STEM = (
    ('features.0.', 'conv1.0.'),
    ('features.1.', 'conv1.1.'),
    ('features.3.', 'conv1.3.'),
    ('features.4.', 'conv1.4.'),
    ('features.6.', 'conv1.6.'),
    ('features.7.', 'bn1.'),
    *holocron_stages(10),
)

OFFICIAL = Function()
DILATION = ('strides', 'dilations', 'dilate_first')


@dataclass(frozen=True)
class Dialect:
    """How one code base names the tensors of its networks, and what these compute."""

    whose: str  # files these are
    anchors: tuple[str, ...]  # each file has one of these tensors
    stems: tuple[tuple[str, Rows], ...]  # and one of these, which adds its rows: plain stem, then deep stem
    rows: Rows = ()
    tensors: dict[str, str] = field(default_factory=dict)  # renames of the last part of a name
    shift: dict[str, int] = field(default_factory=dict)  # to add to their numbers to get ours
    function: Function | None = OFFICIAL  # what their networks compute; None if no model here does
    in_detector: Function | None = None  # the same, for a network that is a part of a larger one
    unknown: str = ''  # why no model here does: what is said of a file
    unsaid: tuple[str, ...] = ()  # fields of `function` that may differ; `in_detector` tells the first block and style
    stem_norm: bool = True  # a norm follows the last convolution of the stem
    dead: tuple[str, ...] = ()  # projections of trees that the network never runs, unless the tree is a leaf
    transposed: bool = False  # the classifier is (in, out)
    raw_split_first: bool = False  # equation (1) of the paper counts splits from the one that is not convolved
    options: tuple[str, ...] = ()  # fields of `function` that their configurations can choose
    prefix: str = ''  # before the network's names in their files


# In order of priority: a file is of the first dialect that matches.
DIALECTS = {
    'paddleclas': Dialect(
        'PaddleClas, .pdparams',
        ('bb_0_0.conv0._conv.weight',),
        (('conv1._conv.weight', PADDLE_STEM), ('conv1_1._conv.weight', PADDLE_DEEP_STEM)),
        PADDLE_BLOCKS,
        tensors={'_mean': 'running_mean', '_variance': 'running_var'},
        shift={'s': 1, 'k': -1},
        function=Function('paddle'),
        transposed=True,
    ),
    'paddle-archive': Dialect(
        'PaddleClas and PaddleDetection before Paddle 2, .tar',
        ('res2a_branch2a_weights',),
        (('conv1_weights', ARCHIVE_STEM), ('conv1_1_weights', ARCHIVE_DEEP_STEM)),
        ARCHIVE_BLOCKS,
        tensors=dict(
            weights='weight',
            w_0='weight',
            scale='weight',
            offset='bias',
            b_0='bias',
            mean='running_mean',
            variance='running_var',
        ),
        shift={'s': -1, 'k': -1},
        function=Function('paddle'),
        transposed=True,
    ),
    'paddledetection': Dialect(
        'PaddleDetection, .pdparams',
        ('res2.blocks.0.branch2a.conv.weight',),
        (('res1.conv1.conv.weight', DETECTION_STEM), ('res1.conv1_1.conv.weight', DETECTION_DEEP_STEM)),
        DETECTION_BLOCKS,
        tensors={'_mean': 'running_mean', '_variance': 'running_var'},
        shift={'s': -1},
        function=Function('paddle'),
    ),
    'mindcv': Dialect(
        'MindCV, .ckpt of MindSpore',
        ('layer1.0.down_sample.1.moving_mean',),  # an optimizer has twins of all weights, but not of statistics
        (('conv1.weight', MINDCV_SHORTCUT), ('conv1.0.weight', MINDCV_DEEP_SHORTCUT)),
        (('classifier.', 'fc.'),),
        tensors=MINDSPORE_TENSORS,
    ),
    'mindspore': Dialect(
        "ports to MindSpore, .ckpt: CFANet's, MindSpore's own before MindCV",
        ('layer1.0.bn1.moving_mean',),
        (('conv1.weight', ()), ('conv1.0.weight', ()), ('conv1_0.weight', ())),
        tensors=MINDSPORE_TENSORS,
        function=None,
        unknown="has the names of ports to MindSpore as CFANet's. The known ones compute something that no model here "
        'does: they pad strided convolutions and pools at the end only',
    ),
    'mmpretrain': Dialect(
        'mmpretrain (mmcls), .pth',
        ('layer1.0.convs.0.weight',),
        (('../head.fc.weight', ()), ('stem.0.conv.weight', MMPRETRAIN_DEEP_STEM)),
        (('../head.fc.', 'fc.'),),
        unsaid=('style', *DILATION),
        prefix='backbone.',
    ),
    'mmdet': Dialect(
        'mmdet, .pth: detectors have its own first block, backbones converted for it the authors',
        ('layer1.0.convs.0.weight',),
        (('stem.7.weight', MMDET_STEM),),
        in_detector=Function('mmdet'),
        unsaid=('first_block', *DILATION),
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
        "the authors' detectron2 and CenterNet2, .pkl: detectors are mmdet's in caffe's style, backbones the authors'",
        ('res2.0.convs.0.weight',),
        (('stem.conv1.weight', ()), ('stem.conv1.0.weight', ())),
        DETECTRON_BLOCKS,
        shift={'s': -1},
        in_detector=Function('mmdet', 'caffe'),
        unsaid=('first_block', 'style', *DILATION),
    ),
    'maskrcnn-benchmark': Dialect(
        "the authors' maskrcnn-benchmark, .pth",
        ('layer1.0.convs.0.weight',),
        (('stem.conv1.weight', ()),),
        (('stem.', ''),),
        function=Function(style='caffe', norm_eps=0.0),
    ),
    'vecroad': Dialect(
        'VecRoad, .pth',
        ('stage_2.0.convs.0.weight',),
        (('stage_1.0.0.weight', ()),),
        VECROAD_STAGES,
        shift={'s': -1},
        function=Function('mmdet', strides=(1, 2, 1, 1), dilations=(1, 1, 2, (4, 8, 16))),
        stem_norm=False,
    ),
    'meganet': Dialect(
        "MEGANet and others that call the authors' stem and stages encoder1 to encoder5, .pth",
        ('encoder2.0.convs.0.weight',),
        (('encoder1_conv.weight', ()), ('encoder1_conv.0.weight', ())),
        ENCODERS,
        shift={'s': -1},
    ),
    'fca-net': Dialect(
        "FCA-Net, .pth, which has the authors' modules in two",
        ('backbone_last.layer4.0.convs.0.weight',),
        (('backbone_pre.conv1.0.weight', ()),),
        FCA_PARTS,
        function=Function('mmdet', strides=(1, 2, 2, 1), dilations=(1, 1, 1, (2, 4, 8))),
    ),
    'official': Dialect(
        "the authors' code, timm, Jittor, this package and all that build on them (PraNet, ...)",
        ('layer1.0.convs.0.weight', 'layer1.big.0.convs.0.weight', 'level2.tree1.convs.0.weight'),
        (('conv1.weight', ()), ('conv1.0.weight', ()), ('base_layer.0.weight', ())),
        unsaid=('first_block', 'style', *DILATION, 'stem_ceil_mode', 'act_layer', 'norm_eps'),
        dead=('level3', 'level4', 'level4.tree1'),
    ),
    'equation-1': Dialect(
        'ports that keep the first split as it is, as equation (1) of the paper, with conv2.k for convs.k',
        ('layer1.0.conv2.0.weight', 'layer1.0.convs.0.weight'),
        (('conv1.weight', ()), ('conv1.0.weight', ())),
        PORT_BLOCKS,
        function=None,
        unknown='has the names of ports that follow equation (1) of the paper. The known ones compute something '
        'that no model here does: 4uiiurz1 strides the first convolution, dl19940602 takes the maximum where '
        'others average',
        raw_split_first=True,
    ),
}
EXPORTS = ('official', 'mmpretrain', 'mmdet', 'paddleclas')
# The modules that networks of this package consist of.
PARTS = {
    *('conv1', 'bn1', 'maxpool', 'layer1', 'layer2', 'layer3', 'layer4', 'fc', 'base_layer', 'bl_init'),
    *(f'level{i}' for i in range(6)),
}
# Prefixes that don't mean that the network is a part of a larger one.
AVERAGED = {'state_dict_ema', 'model_ema', 'ema_state_dict', 'ema', 'ema_model'}
WRAPPERS = {'state_dict', 'model', 'model_state', 'module', '_orig_mod', 'net', *AVERAGED}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
# How many dimensions a tensor may have, by the last part of its name, or its module's.
DIMENSIONS = {'bias': (1,), 'running_mean': (1,), 'running_var': (1,), 'num_batches_tracked': (0, 1)}
CONVOLUTIONS = re.compile(r'conv1|conv1\.[036]|base_layer\.0|.*\.(?:conv[13]|convs\.\d+|conv_offset)')
MOST_NETWORKS = 16  # in one file


@dataclass(frozen=True, repr=False)
class Translation:
    """A network's tensors under timm's names, and what was changed in those of the file."""

    state: dict[str, Tensor]
    dialect: str
    prefix: str  # before the network's names in the file
    dropped: dict[str, str]  # names in the file, and why
    filled: tuple[str, ...]  # names in `state`
    cast: dict[str, int]  # how many tensors were cast to float32, by their data type

    def __repr__(self) -> str:
        return f'Translation({self.dialect}, {len(self.state)} tensors, {len(self.dropped)} dropped)'

    @property
    def is_part(self) -> bool:
        """Whether the network is a part of a larger one."""
        return bool(set(self.prefix.split('.')[:-1]) - WRAPPERS)


@cache
def compile_template(template: str) -> re.Pattern[str]:
    """Compiles one side of a row to a regular expression."""
    escaped = re.escape(template)
    return re.compile(re.sub(r'\\{(\w+)\\}', lambda m: f'(?P<{m[1]}>{NUMBERS.get(m[1], r"[0-9]+")})', escaped))


def rename(name: str, rows: Rows, tensors: Mapping[str, str], shift: Mapping[str, int], blocks: int = 0) -> str | None:
    """Renames a tensor by the first row that matches the beginning of its name.

    Args:
        name: Name of the tensor.
        rows: Renames of the beginning.
        tensors: Renames of the last part.
        shift: To add to the numbers.
        blocks: Number of blocks in stage 3; needed to make a {path}.

    Returns:
        The new name; None for a name without modules that no row knows.
    """
    for source, target in rows:
        if match := compile_template(source).match(name):
            numbers: dict[str, Any] = {
                key: int(value) + shift.get(key, 0) if value.isdecimal() else value
                for key, value in match.groupdict().items()
            }
            if 'letter' in numbers:
                numbers['i'] = block_index(numbers['letter'])
            if '{path}' in target:
                numbers['path'] = block_path(numbers['s'], numbers['i'], blocks)
            rest = name[match.end() :]
            return target.format(**numbers) + tensors.get(rest, rest)
    module, dot, rest = name.rpartition('.')
    return module + dot + tensors.get(rest, rest) if dot and not name.startswith('../') else None


def block_index(letter: str) -> int:
    """The index of a block that PaddleClas names a, b, c or, where there might be too many of them, a, b1, b2."""
    return int(letter[1:]) if len(letter) > 1 else ord(letter) - ord('a')


def block_path(stage: int, i: int, blocks: int) -> str:
    """What PaddleClas calls block `i` of a stage (from 0) in a network with so many blocks in the third one."""
    counted = stage == 2 and blocks > 6
    return f'res{stage + 2}' + (f'b{i}' if counted and i else chr(ord('a') + i))


def full_name(prefix: str, name: str) -> str:
    """Joins a prefix and a name that may begin with '../'."""
    while name.startswith('../'):
        parent = prefix[:-1].rpartition('.')[0]
        prefix, name = parent + '.' if parent else '', name[3:]
    return prefix + name


def find_network(
    names: Mapping[str, Any], dialect: str | None = None, prefix: str | None = None
) -> tuple[str, str, Rows]:
    """Finds a Res2Net in a file.

    Args:
        names: Names of the tensors.
        dialect: Key of `DIALECTS`, any if None.
        prefix: Before the network's names, any if None.

    Returns:
        The dialect, the prefix of the network's names, and the rows to rename it by.

    Raises:
        CheckpointError: If there is none, or more than one.
    """
    if dialect is not None and dialect not in DIALECTS:
        raise ValueError(f'dialect={dialect!r} is not known; choose from {", ".join(DIALECTS)}')
    for key in DIALECTS if dialect is None else [dialect]:
        matches = find_prefixes(names, DIALECTS[key])
        if prefix is not None:
            matches = {each: rows for each, rows in matches.items() if strip_wrappers(each) == prefix} or {
                each: rows for each, rows in matches.items() if prefix and f'.{each}'.endswith(f'.{prefix}')
            }
        matches = without_twins(matches, names)
        if len(matches) > 1:
            several = ', '.join(map(repr, matches))
            raise CheckpointError(f'there are several Res2Nets in it, under {several}; say which one by prefix=')
        for found, rows in matches.items():
            return key, found, rows
    wanted = f' in the dialect {dialect}' if dialect else ''
    under = '' if prefix is None else f' under {prefix!r}'
    hint = ''
    if any(name.endswith('layer1.0.conv2.weight') for name in names):
        hint = '. It has the names of a plain ResNet, without splits'
    first = ', '.join(list(names)[:3]) or 'none'
    raise CheckpointError(f'there is no Res2Net{wanted}{under} among its {len(names)} tensors (first: {first}){hint}')


def strip_wrappers(prefix: str) -> str:
    """A prefix without what only wraps the network that it names."""
    while prefix.partition('.')[0] in WRAPPERS:
        prefix = prefix.partition('.')[2]
    return prefix


def without_twins(matches: dict[str, Rows], names: Mapping[str, Any]) -> dict[str, Rows]:
    """Leaves out networks that are there twice: averaged weights are preferred, as in timm, and the shorter prefix."""
    if len(matches) > MOST_NETWORKS:
        raise CheckpointError(f'there are {len(matches)} Res2Nets in it, more than any file of weights has')
    averaged = {strip_wrappers(each) for each in matches if each.partition('.')[0] in AVERAGED}
    kept: dict[str, Rows] = {}
    for each in sorted(matches, key=len):
        is_raw = strip_wrappers(each) in averaged and each.partition('.')[0] not in AVERAGED
        if not is_raw and not any(is_same_network(names, each, other) for other in kept):
            kept[each] = matches[each]
    return kept


def is_same_network(names: Mapping[str, Any], prefix: str, other: str) -> bool:
    """Whether all tensors under a prefix are those under another one: one network that has two names."""
    inside = {name: value for name, value in names.items() if name.startswith(prefix)}
    twins = ((value, names.get(other + name[len(prefix) :])) for name, value in inside.items())
    return all(isinstance(twin, Tensor) and twin.data_ptr() == value.data_ptr() for value, twin in twins)


def find_prefixes(names: Mapping[str, Any], dialect: Dialect) -> dict[str, Rows]:
    """Finds all networks of a dialect: the prefix of their names, and the rows to rename them by."""
    found = {}
    for name in names:
        for anchor in dialect.anchors:
            prefix = name.removesuffix(anchor)
            if prefix == name or not f'.{prefix}'.endswith('.'):
                continue
            for stem, rows in dialect.stems:
                if full_name(prefix, stem) in names:
                    found[prefix] = rows + dialect.rows
    return found


def flatten(nested: Mapping[str, Any], prefix: str = '') -> dict[str, Tensor]:
    """The tensors in nested dicts, by names joined with dots, which the prefix precedes."""
    found: dict[str, Tensor] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            found.update(flatten(value, f'{prefix}{name}.'))
        elif isinstance(value, Tensor):
            found[prefix + name] = value
    return found


def translate(nested: Mapping[str, Any], dialect: str | None = None, prefix: str | None = None) -> Translation:
    """Renames a network's tensors to timm's names. The given tensors are not changed.

    Args:
        nested: Nested dicts with tensors, as a file holds them, in any wrappers such as `state_dict` or `module.`.
        dialect: Key of `DIALECTS`, detected if None.
        prefix: Before the network's names, detected if None.

    Returns:
        The tensors, floating-point ones as float32, counters of batches that are missing filled in as 0.

    Raises:
        CheckpointError: If there is no Res2Net among them, or more than one, or a tensor of it can't be a weight.
    """
    tensors = flatten(nested)
    key, prefix, rows = find_network(tensors, dialect, prefix)
    names = DIALECTS[key]
    parent = full_name(prefix, '../')
    state: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    cast: Counter[str] = Counter()
    for full, value in tensors.items():
        inside = full.startswith(prefix)
        is_twin = inside and prefix + full[len(prefix) :].partition('.')[2] in tensors  # an optimizer's
        outside = '../' + full.removeprefix(parent) if prefix and full.startswith(parent) else '../'
        ours = rename(full[len(prefix) :] if inside else outside, rows, names.tensors, names.shift)
        if ours is None or (inside and ours.partition('.')[0] not in PARTS):
            if inside and is_of_block(full[len(prefix) :], rows):
                raise CheckpointError(f'{full} is of a block, and no tensor that a block of this package has')
            dropped[full] = "an optimizer's twin" if is_twin else 'beside the network'
        elif inside and is_dead(ours, tensors, names, prefix):
            dropped[full] = 'of a module that never runs'
        elif ours in state:
            raise CheckpointError(f'{full} becomes {ours}, which is there already')
        else:
            state[ours] = to_float32(full, value, cast, ours=ours)
    if names.transposed and 'fc.weight' in state:
        state['fc.weight'] = state['fc.weight'].transpose(0, -1).contiguous()
    if names.raw_split_first:
        state = move_raw_split_last(state)
    if not names.stem_norm:
        state |= identity_norm('bn1', len(state['conv1.6.weight']))
    absent = {name: tensor for name, tensor in zeros_beside(state).items() if name not in state}
    state.update(absent)
    return Translation(state, key, prefix, dropped, tuple(absent), dict(cast))


def identity_norm(name: str, channels: int) -> dict[str, Tensor]:
    """The tensors of a norm that does nothing."""
    zero, one = torch.zeros(channels), torch.ones(channels)
    tensors = dict(weight=one, bias=zero, running_mean=zero, running_var=one - Function.norm_eps)
    return {f'{name}.{part}': tensor.clone() for part, tensor in tensors.items()}


def is_of_block(name: str, rows: Rows) -> bool:
    """Whether rows rename the beginning of a block's names to which a name belongs."""
    starts = {source[: match.end()] for source, _ in rows if (match := re.search(r'\{(i|letter)\}', source))}
    return any(compile_template(start).match(name) for start in starts)


def zeros_beside(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that some code bases do without, and that are zero there: counters of norms, biases of offsets."""
    zeros = {}
    for name, tensor in state.items():
        module, _, last = name.rpartition('.')
        if last == 'running_var':
            zeros[f'{module}.num_batches_tracked'] = torch.tensor(0)
        elif name.endswith('.conv_offset.weight'):
            zeros[f'{module}.bias'] = torch.zeros(len(tensor))
    return zeros


def is_dead(name: str, names: Container[str], dialect: Dialect, prefix: str = '') -> bool:
    """Whether a tensor is of a module that its network has and never runs.

    The authors' DLA has a projection in every tree whose channels change, and runs those of leaves only.

    Args:
        name: Name of the tensor, without prefix.
        names: Names of all tensors, with prefix.
        dialect: Whose names these are.
        prefix: Before the network's names.
    """
    tree, _, projection = name.partition('.project.')
    return projection != '' and tree in dialect.dead and f'{prefix}{tree}.tree1.conv1.weight' not in names


def to_float32(name: str, value: Tensor, cast: Counter[str], *, ours: str) -> Tensor:
    """Checks that a tensor can be a weight, and casts it to float32 and counts the cast.

    Args:
        name: Name of the tensor in the file.
        value: The tensor.
        cast: Counts of casts, by original type.
        ours: timm's name. What counts the batches of a norm may be an integer, and stays one.

    Raises:
        CheckpointError: If it is no plain tensor of numbers with as many dimensions as such a weight has, or some are
            NaN or infinite, or too large for float32.
    """
    value = torch.detach(value)  # a new tensor: attributes that a pickle gave to this one can hide its methods
    module, _, last = ours.rpartition('.')
    is_counter = last == 'num_batches_tracked'
    if value.is_meta or value.layout != torch.strided or value.is_quantized or value.is_nested:
        kind = f'of {value.dtype}' if value.dtype not in FLOATS else 'sparse, quantized, nested or without values'
        raise CheckpointError(f'{name} can be no weight: it is {kind}; save plain floating-point tensors')
    if value.dtype not in FLOATS and not (is_counter and value.dtype in INTEGERS):
        raise CheckpointError(f'{name} can be no weight: it is of {value.dtype}; save plain floating-point tensors')
    dimensions = (4,) if CONVOLUTIONS.fullmatch(module) and last == 'weight' else DIMENSIONS.get(last, (1, 2, 3, 4))
    if value.numel() == 0 or value.ndim not in dimensions:
        raise CheckpointError(f'{name} can be no weight: its shape is {tuple(value.shape)}')
    if value.dtype in INTEGERS:
        return value
    weight = value.float()
    if not torch.isfinite(weight).all():
        raise CheckpointError(
            f'{name} holds values that are NaN or infinite; this training failed, take an earlier file'
        )
    if value.dtype != torch.float32:
        cast[str(value.dtype).removeprefix('torch.')] += 1
    return weight


def move_raw_split_last(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reorders channels from equation (1), whose first split is not convolved, to the published code, whose last is."""
    moved = dict(state)
    for name, weight in state.items():
        if name.endswith('.convs.0.weight'):
            block, width = name.removesuffix('convs.0.weight'), len(weight)
            axes = {'conv1.weight': 0, 'conv3.weight': 1}
            axes |= {f'bn1.{part}': 0 for part in ('weight', 'bias', 'running_mean', 'running_var')}
            moved |= {
                block + each: state[block + each].roll(-width, axis)
                for each, axis in axes.items()
                if block + each in state
            }
    return moved


def export(state: Mapping[str, Tensor], dialect: str) -> dict[str, Tensor]:
    """Renames tensors from timm's names to those of another code base, which can then load them.

    Args:
        state: A ResNet-hosted model's, under timm's names.
        dialect: One of `EXPORTS`.

    Raises:
        ValueError: For another dialect, or for a network that this code base does not have.
    """
    if dialect not in EXPORTS:
        raise ValueError(f'there is no export to {dialect!r}; choose from {", ".join(EXPORTS)}')
    convolution = state.get('layer4.0.convs.0.weight')
    if convolution is None or any('.se.' in name for name in state):
        raise ValueError(f'{dialect} has ResNet-hosted Res2Nets without attention only, the model is another')
    if convolution.shape[0] != convolution.shape[1] and dialect != 'official':
        raise ValueError(f'{dialect} has no Res2NeXt: its convolutions have no groups')
    names = DIALECTS[dialect]
    deep = 'conv1.0.weight' in state
    if dialect == 'mmdet' and ('fc.weight' in state or not deep):
        raise ValueError('mmdet has backbones only, with a deep stem: make the model with num_classes=0')
    rows = tuple((ours, theirs) for theirs, ours in names.stems[-1 if deep else 0][1] + names.rows)
    tensors = {ours: theirs for theirs, ours in names.tensors.items()}
    shift = {key: -value for key, value in names.shift.items()}
    blocks = sum(re.fullmatch(r'layer3\.\d+\.conv1\.weight', name) is not None for name in state)
    exported = {}
    for name, value in state.items():
        if names.tensors and name.endswith('num_batches_tracked'):
            continue
        if names.transposed and name == 'fc.weight':
            value = value.t()
        theirs = rename(name, rows, tensors, shift, blocks)
        if theirs is None or name.startswith('maxpool.') or (names.tensors and theirs.startswith('layer')):
            raise ValueError(f'{dialect} has no place for {name}: its networks have the stem and shortcut of v1 or vd')
        exported[full_name(names.prefix, theirs)] = value.contiguous()
    return exported
