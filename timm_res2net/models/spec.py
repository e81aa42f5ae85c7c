"""Choices that change what a network computes but leave no trace in its weights.

Weights load strictly into any network with the same tensor names and shapes. Whether that network also computes what
they were trained to compute depends on the choices in this file.
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

    cascade: bool  # add the output of each convolution to the next split
    last: Literal['kept', 'pooled', 'convolved']  # what happens to the last split
    count_include_pad: bool = True  # in the pool


LATER_BLOCK = Splits(cascade=True, last='kept')

# Code bases that share all tensor names disagree on the first block of a stage, so a file from one of them loads
# strictly into another and computes something else. The authors (and timm, mmpretrain, mindcv) never cascade and always
# pool the last split; Paddle and mmdet decide by the stride. The authors' networks for CIFAR run `scale` convolutions
# side by side, that is, one grouped convolution.
# fmt: off
FIRST_BLOCKS = {
    #           in a stage of stride 1       of stride 2
    'official': (Splits(False, 'pooled'),    Splits(False, 'pooled')),
    'paddle':   (Splits(True,  'kept'),      Splits(False, 'pooled', count_include_pad=False)),
    'mmdet':    (Splits(False, 'kept'),      Splits(False, 'pooled')),
    'group':    (Splits(False, 'convolved'), Splits(False, 'convolved')),
}
# fmt: on
STYLES = 'pytorch', 'caffe'  # position of a block's stride: its 3x3 convolutions, or its first 1x1 convolution
HIDDEN_ATTENTION = ('ceca',)  # timm's attention layers with the same tensors as another one ('eca')

Dilation = int | tuple[int, ...]  # of all blocks of a stage, or of each (multi-grid)


@dataclass(frozen=True)
class NetworkSpec:
    """Choices that change what a network computes, but not the names and shapes of its tensors.

    Networks with equal specs and equal weights compute the same. A model has a spec (`spec_of`), and so does a
    weights file, as far as its spec is recorded or known. Weights are loaded only if both specs agree.

    Every field is also a keyword of `timm.create_model`. Strides and dilations are those of training: `output_stride`,
    which runs a trained network on a denser grid, is not a field. `ARGUMENTS` groups all keywords by their effect.

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
        attn_layer: 'ceca' for circular ECA, which has the same tensors as ECA. None for every other kind, which its
            tensors show, and for no attention.

    Raises:
        ValueError: If a value is invalid.

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
        """Returns `first_block` and all fields that differ from their default, as JSON unless they are strings."""
        values = {name: getattr(self, name) for name in ('first_block', *self.differing_fields(NetworkSpec()))}
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}

    @staticmethod
    def from_text(text: Mapping[str, str]) -> 'NetworkSpec':
        """Parses the output of `as_text` and ignores other keys; ValueError if a value is not JSON, or invalid."""
        values: dict[str, Any] = {name: text[name] for name in vars(NetworkSpec()) if name in text}
        try:
            for name in values.keys() - {'first_block', 'style', 'act_layer', 'attn_layer'}:
                values[name] = json.loads(values[name])
            return NetworkSpec(**values)
        except RecursionError:
            raise ValueError('the metadata contains JSON that is nested too deeply') from None

    @staticmethod
    def from_arguments(args: Mapping[str, Any]) -> 'NetworkSpec':
        """Returns the spec of the model that `timm.create_model` makes with these; ValueError if one is invalid."""
        given = {name: args[name] for name in vars(NetworkSpec()) if args.get(name) is not None}
        given['attn_layer'] = hidden_attention(args.get('attn_layer'))
        if 'act_layer' in given:
            given['act_layer'] = activation_name(given['act_layer'])
        if 'norm_eps' not in given and args.get('norm_layer') is not None:
            given['norm_eps'] = default_eps(args['norm_layer'])
        return NetworkSpec(**given)


# Every argument of the trunks, by its effect. To rebuild a network from a file, arguments of the first kind must be
# recorded or known; those of the second can be inferred from the tensors. For norm_layer, tensors show only whether it
# has running statistics, as every kind of batch norm does.
# fmt: off
ARGUMENTS = {
    'spec':      tuple(field.name for field in fields(NetworkSpec)),
    'tensors':   ('layers', 'levels', 'channels', 'scale', 'base_width', 'cardinality', 'norm_layer', 'alpha', 'beta',
                  'stem_width', 'stem_type', 'replace_stem_pool', 'avg_down', 'down_kernel_size', 'in_chans',
                  'num_classes'),
    'use':       ('output_stride', 'dilate_pool', 'global_pool'),  # of the same trained network
    'training':  ('drop_rate', 'drop_path_rate', 'drop_block_rate', 'zero_init_last'),
    'placement': ('device', 'dtype'),
}
# fmt: on


def simplify(value: Any) -> Any:
    """Returns a list as a tuple, or as one of its values if all are equal; anything else unchanged."""
    if not isinstance(value, list | tuple):
        return value
    return value[0] if value and value.count(value[0]) == len(value) else tuple(value)


def require_one_of(name: str, value: object, choices: Iterable[object]) -> None:
    choices = list(choices)
    if value not in choices:
        raise ValueError(f'{name}={value!r} is not known: choose from {", ".join(map(repr, choices))}')


def default_eps(norm_layer: Any) -> float:
    """Returns the default epsilon of a norm class, its timm name or a partial; ValueError for anything else."""
    try:
        parameters = inspect.signature(get_norm_layer(norm_layer)).parameters
    except (KeyError, TypeError, AssertionError) as error:  # raised by timm
        raise ValueError(f'norm_layer={norm_layer!r} is not a timm norm') from error
    eps = parameters['eps'].default if 'eps' in parameters else None
    return eps if isinstance(eps, int | float) else NetworkSpec.norm_eps


def activation_name(act_layer: str | Callable[..., nn.Module]) -> str:
    """Returns timm's name of an activation: the words of its class in lower case, joined by '_'.

    Arguments of a partial are appended, as in `leaky_relu(negative_slope=0.3)`, because they change the function.
    """
    try:
        layer: Any = get_act_layer(act_layer)  # returns a class unchanged
    except KeyError:
        layer = None
    if not callable(layer):
        raise ValueError(f'act_layer={act_layer!r} is not a timm activation')
    name = getattr(layer, 'func', layer).__name__.removesuffix('Me')  # suffix of timm's memory-efficient classes
    name = re.sub(r'(?<=[a-z]{2})(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z]{2})', '_', name).lower()
    keywords = sorted((key, value) for key, value in getattr(layer, 'keywords', {}).items() if key != 'inplace')
    arguments = [*map(repr, getattr(layer, 'args', ())), *(f'{key}={value!r}' for key, value in keywords)]
    return f'{name}({", ".join(arguments)})' if arguments else name


def hidden_attention(layer: object) -> str | None:
    """Returns timm's name of an attention layer that tensors do not show (`HIDDEN_ATTENTION`), else None."""
    if isinstance(layer, str):
        return layer.lower() if layer.lower() in HIDDEN_ATTENTION else None
    layer_class = getattr(layer, 'func', layer)
    return next((name for name in HIDDEN_ATTENTION if get_attn(name) is layer_class), None)
