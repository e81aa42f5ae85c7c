"""The part of a network's function that its weights do not show.

A file of weights loads strictly into any network whose tensors have the same names and shapes. Whether that network
computes the function that the weights were trained for depends on everything in this file.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from timm.layers import get_act_layer, get_attn, get_norm_layer
from torch import nn

from .layers import VERSIONS


class Splits(NamedTuple):
    """How a block computes its splits."""

    cascade: bool  # add each split to the output of the one before it
    last: Literal['kept', 'pooled', 'convolved']
    count_include_pad: bool = True  # in the pool


class FirstBlock(NamedTuple):
    """How the first block of a stage computes its splits, by the stage's nominal stride: its stride before dilation."""

    stride_1: Splits
    stride_2: Splits


# Three code bases that share all tensor names disagree on the first block of a stage: a file from one of them loads
# strictly into another and computes something else. The authors (and timm, mmpretrain, mindcv) have no cascade and
# pool the last split in every stage; Paddle and mmdet decide by the stride. The authors' networks for CIFAR have a
# grouped convolution instead of the cascade, `scale` convolutions side by side. Going by the nominal stride keeps the
# function when a stage is dilated instead of strided (`output_stride`).
# fmt: off
FIRST_BLOCKS = {
    'official': FirstBlock(Splits(False, 'pooled'),    Splits(False, 'pooled')),
    'paddle':   FirstBlock(Splits(True,  'kept'),      Splits(False, 'pooled', count_include_pad=False)),
    'mmdet':    FirstBlock(Splits(False, 'kept'),      Splits(False, 'pooled')),
    'group':    FirstBlock(Splits(False, 'convolved'), Splits(False, 'convolved')),
}
# fmt: on
STYLES = 'pytorch', 'caffe'  # position of a block's stride: its 3x3 convolutions, or its first 1x1 convolution
HIDDEN_ATTENTION = ('ceca',)  # timm's names of attention layers whose tensors look like another one's ('eca')

Dilation = int | tuple[int, ...]  # of all blocks of a stage, or of each (multi-grid)


@dataclass(frozen=True)
class NetworkSpec:
    """Choices that change what a network computes, but not the names and shapes of its tensors.

    Networks with equal specs and equal weights compute the same. A model has a spec (`spec_of`), and so does a file of
    weights, as far as it is recorded or known. Weights are loaded only if both specs agree.

    Every field is also a keyword of `timm.create_model`. The geometry is that of training: `output_stride`, which makes
    a trained network denser, is not part of it. `ARGUMENTS` lists the keywords that are not fields.

    Attributes:
        first_block: How the first block of a stage computes its splits, a key of `FIRST_BLOCKS`.
        style: Position of a stage's stride, one of `STYLES`.
        strides: Stride of each of the four stages.
        dilations: Dilation of each of the four stages, or of each block of a stage.
        dilate_first: Whether the first block has its stage's dilation, or that of the previous stage.
        deformable: Version of the deformable convolutions of each of the four stages, None for plain convolutions.
        stem_ceil_mode: Whether the stem's max-pool rounds sizes up.
        shortcut_root: Whether the roots of a DLA add their first input to their output.
        act_layer: timm's name of the activation.
        norm_eps: Epsilon that norms add to variances.
        attn_layer: 'ceca' for circular ECA, which has the tensors of ECA. None for any other attention, which its
            tensors show, and for none.

    Raises:
        ValueError: If a value is not possible.

    Example:
        >>> spec = NetworkSpec('mmdet', style='caffe')
        >>> spec.differing_fields(NetworkSpec())
        ['first_block', 'style']
        >>> spec.as_text()
        {'first_block': 'mmdet', 'style': 'caffe'}
    """

    first_block: str = 'official'
    style: str = 'pytorch'
    strides: tuple[int, ...] = (1, 2, 2, 2)
    dilations: tuple[Dilation, ...] = (1, 1, 1, 1)
    dilate_first: bool = True
    deformable: tuple[str | None, ...] = (None, None, None, None)
    stem_ceil_mode: bool = False
    shortcut_root: bool = False
    act_layer: str = 'relu'
    norm_eps: float = 1e-5
    attn_layer: str | None = None

    def __post_init__(self) -> None:
        for name in ('strides', 'dilations', 'deformable'):
            stages = getattr(self, name)
            if not isinstance(stages, list | tuple) or len(stages) != 4:
                raise ValueError(f'{name}={stages!r} must have an entry for each of 4 stages')
            object.__setattr__(self, name, tuple(map(simplify, stages)))
        require_one_of('first_block', self.first_block, FIRST_BLOCKS)
        require_one_of('style', self.style, STYLES)
        require_one_of('attn_layer', self.attn_layer, (None, *HIDDEN_ATTENTION))
        for version in self.deformable:
            require_one_of('deformable', version, (None, *VERSIONS))
        numbers = [*self.strides]
        for dilation in self.dilations:
            numbers += dilation if isinstance(dilation, tuple) else [dilation]
        if not all(type(number) is int and number > 0 for number in numbers):
            raise ValueError(f'strides={self.strides} and dilations={self.dilations} must be positive integers')
        for name in ('dilate_first', 'stem_ceil_mode', 'shortcut_root'):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f'{name}={getattr(self, name)!r} must be True or False')
        if not self.dilate_first and self.dilations == NetworkSpec.dilations:
            raise ValueError('dilate_first=False has no effect without dilations')
        if not isinstance(self.act_layer, str):
            raise ValueError(f'act_layer={self.act_layer!r} must be the name of an activation')
        if not (isinstance(self.norm_eps, int | float) and 0 <= self.norm_eps < 1):
            raise ValueError(f'norm_eps={self.norm_eps!r} must be a number from 0 to 1')

    def differing_fields(self, other: 'NetworkSpec') -> list[str]:
        """Returns the names of the fields in which two specs differ."""
        return [name for name, value in vars(self).items() if value != getattr(other, name)]

    def as_keywords(self, names: Iterable[str]) -> str:
        """Formats some fields as keyword arguments: `first_block='mmdet', style='caffe'`."""
        return ', '.join(f'{name}={getattr(self, name)!r}' for name in names)

    def as_text(self) -> dict[str, str]:
        """Returns `first_block` and all fields without their default as metadata; other values than str are JSON."""
        names = {'first_block', *self.differing_fields(NetworkSpec())}
        values = {name: getattr(self, name) for name in vars(self) if name in names}
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}

    @staticmethod
    def from_text(text: Mapping[str, str]) -> 'NetworkSpec':
        """Parses metadata of `as_text` and ignores other keys; ValueError if a value is not JSON, or not possible."""
        values: dict[str, Any] = {name: text[name] for name in vars(NetworkSpec()) if name in text}
        try:
            for name in values.keys() - {'first_block', 'style', 'act_layer', 'attn_layer'}:
                values[name] = json.loads(values[name])
            return NetworkSpec(**values)
        except RecursionError:
            raise ValueError('the metadata contains JSON that is nested too deeply') from None

    @staticmethod
    def from_arguments(args: Mapping[str, Any]) -> 'NetworkSpec':
        """Returns the spec of the model that `timm.create_model` makes; ValueError if an argument is not possible."""
        given = {name: args[name] for name in vars(NetworkSpec()) if args.get(name) is not None}
        if 'act_layer' in given:
            try:
                layer = get_act_layer(given['act_layer'])  # returns anything but a name unchanged
            except KeyError:
                layer = None
            if not callable(layer):
                raise ValueError(f'act_layer={given["act_layer"]!r} is not an activation of timm')
            given['act_layer'] = activation_name(layer)
        if 'norm_eps' not in given and args.get('norm_layer') is not None:
            given |= default_eps(args['norm_layer'])
        return NetworkSpec(**{**given, 'attn_layer': hidden_attention(args.get('attn_layer'))})


# Every argument of the trunks, by its effect. To rebuild a network from a file, arguments of the first kind must be
# recorded or known, and those of the second can be found from the tensors. One argument is between the two: of all
# norms, tensors only show whether they have running statistics, as every kind of batch norm has.
# fmt: off
ARGUMENTS = {
    'spec':      tuple(field.name for field in fields(NetworkSpec)),
    'tensors':   ('layers', 'levels', 'channels', 'scale', 'base_width', 'cardinality', 'norm_layer', 'alpha', 'beta',
                  'stem_width', 'stem_type', 'replace_stem_pool', 'avg_down', 'down_kernel_size', 'in_chans',
                  'num_classes'),
    'use':       ('output_stride', 'dilate_pool', 'global_pool', 'tap_layer2'),  # of the same trained network
    'training':  ('drop_rate', 'drop_path_rate', 'drop_block_rate', 'zero_init_last'),
    'placement': ('device', 'dtype'),
}
# fmt: on


def simplify(value: Any) -> Any:
    """Returns a list as a tuple, and a list of equal values as that value."""
    if not isinstance(value, list | tuple):
        return value
    return value[0] if len(value) and value.count(value[0]) == len(value) else tuple(value)


def require_one_of(name: str, value: object, choices: Iterable[object]) -> None:
    """Raises a ValueError for a value that is not among the choices."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f'{name}={value!r} is not known; choose from {", ".join(map(str, choices))}')


def default_eps(norm_layer: Any) -> dict[str, float]:
    """Returns the `norm_eps` in the signature of a norm class, its timm name or a partial; ValueError for others."""
    try:
        parameters = inspect.signature(get_norm_layer(norm_layer)).parameters
    except (KeyError, TypeError, AssertionError) as error:  # of timm
        raise ValueError(f'norm_layer={norm_layer!r} is not a norm of timm') from error
    eps = parameters['eps'].default if 'eps' in parameters else None
    return {'norm_eps': eps} if isinstance(eps, int | float) else {}


def activation_name(layer: Callable[..., nn.Module]) -> str:
    """Returns timm's name of an activation class: its words in lower case, joined by '_'.

    Arguments of a partial follow, as in `leaky_relu(negative_slope=0.3)`: it computes something else, and timm has no
    name for it.
    """
    name = getattr(layer, 'func', layer).__name__.removesuffix('Me')  # timm's memory-efficient ones
    name = re.sub(r'(?<=[a-z]{2})(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z]{2})', '_', name).lower()
    keywords = sorted((key, value) for key, value in getattr(layer, 'keywords', {}).items() if key != 'inplace')
    arguments = [*map(repr, getattr(layer, 'args', ())), *(f'{key}={value!r}' for key, value in keywords)]
    return f'{name}({", ".join(arguments)})' if arguments else name


def hidden_attention(layer: object) -> str | None:
    """Returns timm's name of an attention layer if its tensors do not show it (`HIDDEN_ATTENTION`), else None."""
    if isinstance(layer, str):
        return layer.lower() if layer.lower() in HIDDEN_ATTENTION else None
    layer_class = getattr(layer, 'func', layer)
    return next((name for name in HIDDEN_ATTENTION if get_attn(name) is layer_class), None)
