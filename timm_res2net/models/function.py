"""What a network computes beyond the names and shapes of its tensors.

A file of weights loads strictly into any network with the same names and shapes. Whether it computes there what it was
trained to compute depends on all that is said here.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from timm.layers import get_act_layer, get_norm_layer
from torch import nn

from .deformable import VERSIONS

__all__ = ['FIRST_BLOCKS', 'STYLES', 'Function', 'Splits', 'activation_name']


class Splits(NamedTuple):
    """What a block does with its splits."""

    cascade: bool  # add each split to the output of the one before it
    last: Literal['kept', 'pooled', 'convolved']


@dataclass(frozen=True)
class FirstBlock:
    """What the first block of a stage computes, by the stage's nominal stride: its stride before any dilation."""

    stride_1: Splits
    stride_2: Splits
    count_include_pad: bool = True  # of the pool

    def splits(self, nominal_stride: int) -> Splits:
        return self.stride_1 if nominal_stride == 1 else self.stride_2


# Three code bases that share all tensor names disagree on the first block of a stage: a file from one of them loads
# strictly into another and computes something else. The authors (and timm, mmpretrain, mindcv) have no cascade and
# pool the last split in every stage; Paddle and mmdet decide by the stride. The authors' networks for CIFAR have a
# grouped convolution instead of the cascade, `scale` convolutions side by side. Going by the nominal stride keeps the
# function when a stage is dilated instead of strided (`output_stride`).
# fmt: off
FIRST_BLOCKS = {
    'official': FirstBlock(Splits(False, 'pooled'),    Splits(False, 'pooled')),
    'paddle':   FirstBlock(Splits(True,  'kept'),      Splits(False, 'pooled'), count_include_pad=False),
    'mmdet':    FirstBlock(Splits(False, 'kept'),      Splits(False, 'pooled')),
    'group':    FirstBlock(Splits(False, 'convolved'), Splits(False, 'convolved')),
}
# fmt: on
STYLES = 'pytorch', 'caffe'  # where a block's stride is: in the 3x3 convolutions, or in the first 1x1 convolution

Dilation = int | tuple[int, ...]  # of all blocks of a stage, or of each (multi-grid)


@dataclass(frozen=True)
class Function:
    """What a network computes. All fields are keywords of `timm.create_model`; `Res2Net` explains them.

    The geometry is that of training: `output_stride`, which makes a dense network of a trained one, is not part of it.
    Other trunks than ResNet have one geometry only, and the defaults here.

    Raises:
        ValueError: For a value that is not possible.
    """

    first_block: str = 'official'
    style: str = 'pytorch'
    strides: tuple[int, ...] = (1, 2, 2, 2)
    dilations: tuple[Dilation, ...] = (1, 1, 1, 1)
    dilate_first: bool = True
    deformable: tuple[str | None, ...] = (None, None, None, None)
    stem_ceil_mode: bool = False
    act_layer: str = 'relu'  # timm's name of it
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ('strides', 'dilations', 'deformable'):
            stages = as_tuple(getattr(self, name))  # of the lists in JSON
            if not isinstance(stages, tuple) or len(stages) != 4:
                raise ValueError(f'{name}={stages} must have an entry for each of 4 stages')
            object.__setattr__(self, name, tuple(each[0] if is_constant(each) else each for each in stages))
        require_one_of('first_block', self.first_block, FIRST_BLOCKS)
        require_one_of('style', self.style, STYLES)
        for version in self.deformable:
            require_one_of('deformable', version, (None, *VERSIONS))
        numbers = [*self.strides, *(each for dilation in self.dilations for each in as_sequence(dilation))]
        if not all(type(number) is int and number > 0 for number in numbers):
            raise ValueError(f'strides={self.strides} and dilations={self.dilations} must be positive integers')
        for name in ('dilate_first', 'stem_ceil_mode'):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f'{name}={getattr(self, name)!r} must be True or False')
        if not self.dilate_first and self.dilations == Function.dilations:
            raise ValueError('dilate_first=False has no effect without dilations')
        if not isinstance(self.act_layer, str):
            raise ValueError(f'act_layer={self.act_layer!r} must be the name of an activation')
        if not (isinstance(self.norm_eps, int | float) and 0 <= self.norm_eps < 1):
            raise ValueError(f'norm_eps={self.norm_eps!r} must be a number from 0 to 1')

    def differing_fields(self, other: 'Function') -> list[str]:
        """Names of the fields in which two functions differ."""
        return [name for name, value in vars(self).items() if value != getattr(other, name)]

    def as_keywords(self, names: Iterable[str]) -> str:
        """Some fields, as in a call."""
        return ', '.join(f'{name}={getattr(self, name)!r}' for name in names)

    def as_text(self) -> dict[str, str]:
        """`first_block` and all that is not the default, as the metadata of a file: words as they are, else JSON."""
        names = {'first_block', *self.differing_fields(Function())}
        values = {name: getattr(self, name) for name in vars(self) if name in names}
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}

    @staticmethod
    def from_text(text: Mapping[str, str]) -> 'Function':
        """The function that the metadata of a file states, see `as_text`.

        Raises:
            ValueError: For a value that is no JSON, or not possible.
        """
        usual = vars(Function())
        stated = {name: text[name] for name in usual if name in text}
        values: dict[str, Any] = {
            name: value if isinstance(usual[name], str) else json.loads(value) for name, value in stated.items()
        }
        return Function(**values)

    @staticmethod
    def from_arguments(args: Mapping[str, Any]) -> 'Function':
        """The function of the model that `timm.create_model` makes with some arguments, which may be others, too.

        Raises:
            ValueError: For a value that is not possible.
        """
        stated = {name: args[name] for name in vars(Function()) if args.get(name) is not None}
        if 'act_layer' in stated:
            try:
                layer = get_act_layer(stated['act_layer'])  # itself if it is no name
            except KeyError:
                layer = None
            if not callable(layer):
                raise ValueError(f'act_layer={stated["act_layer"]!r} is no activation of timm')
            stated['act_layer'] = activation_name(layer)
        if 'norm_eps' not in stated and args.get('norm_layer') is not None:
            stated |= default_eps(args['norm_layer'])
        return Function(**stated)


def as_tuple(value: Any) -> Any:
    """A sequence, and all sequences in it, as tuples."""
    return tuple(as_tuple(each) for each in value) if isinstance(value, list | tuple) else value


def is_constant(value: Any) -> bool:
    """Whether a value is a tuple of one value, once or more often."""
    return isinstance(value, tuple) and len(value) > 0 and value.count(value[0]) == len(value)


def as_sequence(value: Any) -> tuple[Any, ...]:
    """A tuple as it is, and anything else in one."""
    return value if isinstance(value, tuple) else (value,)


def require_one_of(name: str, value: object, choices: Iterable[object]) -> None:
    """Raises a ValueError for a value that is none of the choices."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f'{name}={value!r} is not known; choose from {", ".join(map(str, choices))}')


def default_eps(norm_layer: Any) -> dict[str, float]:
    """What a norm class, its name in timm, or a partial of it adds to variances by default, if its signature tells.

    Raises:
        ValueError: For what is no norm.
    """
    try:
        parameters = inspect.signature(get_norm_layer(norm_layer)).parameters
    except (KeyError, TypeError, AssertionError) as error:  # of timm
        raise ValueError(f'norm_layer={norm_layer!r} is no norm of timm') from error
    eps = parameters['eps'].default if 'eps' in parameters else None
    return {'norm_eps': eps} if isinstance(eps, int | float) else {}


def activation_name(layer: Callable[..., nn.Module]) -> str:
    """timm's name of an activation class: its words in lower case, joined by '_'.

    Arguments of a partial follow, as in `leaky_relu(negative_slope=0.3)`: it computes something else, and timm has no
    name for it.
    """
    name = getattr(layer, 'func', layer).__name__.removesuffix('Me')  # timm's memory-efficient ones
    name = re.sub(r'(?<=[a-z]{2})(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z]{2})', '_', name).lower()
    keywords = sorted((key, value) for key, value in getattr(layer, 'keywords', {}).items() if key != 'inplace')
    arguments = [*map(repr, getattr(layer, 'args', ())), *(f'{key}={value!r}' for key, value in keywords)]
    return f'{name}({", ".join(arguments)})' if arguments else name
