"""Finds a Res2Net among a file's tensors, and renames tensors from other code bases' names to timm's and back."""

import re
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._errors import CheckpointError
from ..models.checks import is_finite
from ..models.spec import NetworkSpec
from .dialects import DIALECTS, EXPORTS, Dialect, Rows

PATTERNS = {'letter': r'[a-z]\d*', 'path': r'\w+?'}  # all other fields of a row are numbers
PARTS = {  # the top-level modules of this package's networks
    *('conv1', 'bn1', 'act1', 'maxpool', 'layer1', 'layer2', 'layer3', 'layer4', 'fc', 'base_layer', 'bl_init'),
    *(f'level{i}' for i in range(6)),
}
# Keys that wrap a network without making it part of a larger one.
AVERAGED = {'state_dict_ema', 'model_ema', 'ema_state_dict', 'ema', 'ema_model', 'average_model_state'}
LATEST = {'current_model_state'}  # in Lightning, where 'state_dict' is then the average
WRAPPERS = {'state_dict', 'model', 'model_state', 'module', 'net', *AVERAGED, *LATEST}
TRAINING = re.compile(r'(optim|sched|scaler|amp|loops|callbacks|rng|random|averaging_state|message_hub)', re.IGNORECASE)
COUNTERS = 'total_ops', 'total_params'  # which thop adds to each module
MAX_NETWORKS = 16  # in one file
FOREIGN = {  # names of tensors that only resemble ours, with hints for the error message
    'layer1.0.conv2.weight': '. Its names are those of a plain ResNet, without splits',
    'layer1.0.conv2.0.weight': ". Its names are those of ports of the paper's equation (1), which keep the first "
    'split. No model in this package does that',
}

# Reasons for leaving out a tensor.
OTHER_MODULE = 'part of another module'
CLASSIFIER = 'part of a classifier that is not a single linear layer'
TWIN = 'another copy of the weights'
STATE = 'training state'
UNUSED = 'part of a module that the network never runs'

TensorT = TypeVar('TensorT')  # a tensor, or why it cannot be read
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


@cache
def compile_row(template: str) -> re.Pattern[str]:
    """Compiles one side of a row to a regular expression."""
    escaped = re.escape(template)
    return re.compile(re.sub(r'\\{(\w+)\\}', lambda m: f'(?P<{m[1]}>{PATTERNS.get(m[1], r"[0-9]+")})', escaped))


def rename(
    name: str, rows: Rows, suffixes: Mapping[str, str], offsets: Mapping[str, int], blocks: int = 0
) -> str | None:
    """Renames a tensor by the first matching row; None if no row matches and the tensor is in no module.

    The field {path} depends on the number of `blocks` in stage 3.
    """
    for source, target in rows:
        if match := compile_row(source).match(name):
            fields: dict[str, Any] = {
                key: int(value) + offsets.get(key, 0) if value.isdecimal() else value
                for key, value in match.groupdict().items()
            }
            if 'letter' in fields:  # a, b, c or, in deep stages, a, b1, b2
                letter, number = fields['letter'][0], fields['letter'][1:]
                fields['i'] = int(number or ord(letter) - ord('a'))
            if '{path}' in target:
                fields['path'] = block_path(fields['s'], fields['i'], blocks)
            rest = name[match.end() :]
            return target.format(**fields) + suffixes.get(rest, rest)
    module, dot, rest = name.rpartition('.')
    return module + dot + suffixes.get(rest, rest) if dot and not name.startswith('../') else None


def block_path(stage: int, i: int, blocks: int) -> str:
    """Returns PaddleClas's name of a stage's block `i` (both from 0), for a network with `blocks` blocks in stage 3."""
    is_counted = stage == 2 and blocks > 6 and i > 0
    return f'res{stage + 2}' + (f'b{i}' if is_counted else chr(ord('a') + i))


def full_name(prefix: str, name: str) -> str:
    """Joins a prefix and a name that may begin with '../'."""
    while name.startswith('../'):
        parent = prefix[:-1].rpartition('.')[0]
        prefix, name = parent + '.' if parent else '', name[3:]
    return prefix + name


def as_before_compile(tensors: Mapping[str, TensorT]) -> dict[str, TensorT]:
    """Returns tensors under their names without torch.compile, which may wrap the whole network or parts of it."""
    renamed = {name.replace('_orig_mod.', ''): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise CheckpointError('it holds tensors with the same name, compiled and not compiled')
    return renamed


def find_network(
    tensors: Mapping[str, Tensor],
    dialect: str | None = None,
    prefix: str | None = None,
    weights_from: str | None = None,
) -> tuple[str, str, Rows, str | None]:
    """Finds the only Res2Net in a file: its dialect, prefix, rows, and the kind of weights chosen, if there are two."""
    for key in DIALECTS if dialect is None else [dialect]:
        matches = find_prefixes(tensors, DIALECTS[key])
        if prefix is not None:
            matches = {each: rows for each, rows in matches.items() if strip_wrappers(each) == prefix} or {
                each: rows for each, rows in matches.items() if prefix and f'.{each}'.endswith(f'.{prefix}')
            }
        if not matches:
            continue
        kept, chosen = choose_weights(matches, tensors, weights_from)
        if len(kept) > 1:
            several = ', '.join(map(repr, kept))
            raise CheckpointError(f'it holds several Res2Nets, under {several}. Pass one of these as prefix')
        return key, kept[0], matches[kept[0]], chosen
    raise CheckpointError(describe_absence(tensors, dialect, prefix))


def describe_absence(names: Collection[str], dialect: str | None, prefix: str | None) -> str:
    wanted = (f' in the dialect {dialect!r}' if dialect else '') + ('' if prefix is None else f' under {prefix!r}')
    first = ', '.join(list(names)[:3]) or 'none'
    hints = [hint for end, hint in FOREIGN.items() if any(name.endswith(end) for name in names)]
    return f'it holds no Res2Net{wanted} among {len(names)} tensors (first: {first}){"".join(hints)}'


def find_prefixes(names: Collection[str], dialect: Dialect) -> dict[str, Rows]:
    """Finds all networks of a dialect; returns the rows that rename each one, keyed by its prefix."""
    found = {}
    for name in names:
        for anchor in dialect.anchors:
            prefix = name.removesuffix(anchor)
            if prefix == name or not f'.{prefix}'.endswith('.'):
                continue
            for stem, rows in dialect.stems:
                if full_name(prefix, stem) in names:
                    found[prefix] = rows + dialect.rows
    if len(found) > MAX_NETWORKS:
        raise CheckpointError(f'it holds {len(found)} Res2Nets, more than any weights file')
    return found


def strip_wrappers(prefix: str) -> str:
    while prefix.partition('.')[0] in WRAPPERS:
        prefix = prefix.partition('.')[2]
    return prefix


def path_in_model(prefix: str) -> str:
    """Returns the part of a prefix that averaged and latest weights share."""
    parts = prefix.split('.')
    last = max((i for i, part in enumerate(parts) if part in AVERAGED | LATEST), default=-1)
    return strip_wrappers('.'.join(parts[last + 1 :]))


def is_averaged(prefix: str, names: Container[str], siblings: Iterable[str]) -> bool:
    parts = {*prefix.split('.')}
    if 'ema_state_dict.steps' in names:  # mmengine swaps the two, so that 'state_dict' is the average
        return 'ema_state_dict' not in parts
    if any(LATEST & {*sibling.split('.')} for sibling in siblings):
        return not LATEST & parts
    return bool(AVERAGED & parts)


def choose_weights(
    prefixes: Collection[str], tensors: Mapping[str, Tensor], weights_from: str | None
) -> tuple[list[str], str | None]:
    """Chooses between averaged and latest weights, and leaves out further names of the same tensors.

    Returns the remaining prefixes, and 'ema' or 'model' if the file has both.
    """
    averaged = [prefix for prefix in prefixes if is_averaged(prefix, tensors, prefixes)]
    latest = [prefix for prefix in prefixes if prefix not in averaged]
    chosen = None
    if averaged and latest:
        chosen = weights_from or 'ema'
    elif weights_from == ('model' if averaged else 'ema'):
        raise CheckpointError(f'it has no {"averaged" if latest else "latest"} weights. Leave out weights_from')
    kept = (latest if chosen == 'model' else averaged) or latest
    unique: list[str] = []
    for prefix in sorted(kept, key=len):
        if not any(is_same_network(tensors, prefix, other) for other in unique):
            unique.append(prefix)
    return unique, chosen


def is_same_network(tensors: Mapping[str, Tensor], prefix: str, other: str) -> bool:
    """Whether the tensors under two prefixes share memory: one network under two names."""
    inside = {name: value for name, value in tensors.items() if name.startswith(prefix)}
    twins = ((value, tensors.get(other + name[len(prefix) :])) for name, value in inside.items())
    return all(twin is not None and twin.data_ptr() == value.data_ptr() for value, twin in twins)


def rename_tensors(
    tensors: Mapping[str, Tensor], unsupported: Mapping[str, str], dialect: str, prefix: str, rows: Rows
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Renames a network's tensors to timm's names; also returns why each other tensor was left out."""
    names = DIALECTS[dialect]
    state: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    parent = full_name(prefix, '../')
    for full in (*tensors, *unsupported):
        inside = full.startswith(prefix)
        sibling = '../' + full.removeprefix(parent) if prefix and full.startswith(parent) else '../'
        ours = rename(full[len(prefix) :] if inside else sibling, rows, names.suffixes, names.offsets)
        if ours is not None and inside and ours.rpartition('.')[2] in COUNTERS:
            dropped[full] = STATE
        elif ours is None or (inside and ours.partition('.')[0] not in PARTS):
            if inside and is_of_block(full[len(prefix) :], rows):
                raise CheckpointError(f'{full} belongs to a block, but no block in this package has such a tensor')
            dropped[full] = explain_other(full, prefix, tensors)
        elif inside and is_unused(ours, tensors, prefix):
            dropped[full] = UNUSED
        elif full in unsupported:
            raise CheckpointError(f'{full} cannot be a weight: {unsupported[full]}. Save plain floating-point tensors')
        elif ours in state:
            raise CheckpointError(f'{full} and another tensor both become {ours}')
        else:
            state[ours] = tensors[full]
    dropped |= drop_unusual_classifier(state, names)
    if names.transposed and 'fc.weight' in state:
        state['fc.weight'] = state['fc.weight'].transpose(0, -1).contiguous()
    if not names.stem_norm:
        state |= identity_norm('bn1', len(state['conv1.6.weight']))
    return state, dropped


def explain_other(name: str, prefix: str, names: Container[str]) -> str:
    if name.startswith(prefix) and prefix + name[len(prefix) :].partition('.')[2] in names:
        return STATE  # an optimizer's, whose own name precedes that of the weight
    if TRAINING.match(name):
        return STATE
    path, own = path_in_model(prefix), path_in_model(name)
    twin = prefix + own.removeprefix(path)
    return TWIN if own.startswith(path) and twin != name and twin in names else OTHER_MODULE


def drop_unusual_classifier(state: dict[str, Tensor], dialect: Dialect) -> dict[str, str]:
    """Removes a classifier that is not one linear layer on pooled features; returns its names with the reason."""
    names = [name for name in state if name.startswith('fc.')]
    weight, last = state.get('fc.weight'), state.get('layer4.0.conv3.weight')
    if {*names} <= {'fc.weight', 'fc.bias'} and weight is not None and weight.ndim in (2, 4):
        features = weight.shape[0 if dialect.transposed else 1]
        # global_pool='catavgmax' doubles their number
        if last is None or last.ndim != 4 or features in (len(last), 2 * len(last)):
            return {}
    for name in names:
        del state[name]
    return dict.fromkeys(names, CLASSIFIER)


def has_modules_around(
    prefix: str, dropped: Mapping[str, str], tensors: Mapping[str, Tensor], has_classifier: bool
) -> bool:
    """Whether a network is part of a larger one, even if the file does not contain the rest."""
    cut = bool({*prefix.split('.')[:-1]} - WRAPPERS) and not has_classifier
    others = (name for name, why in dropped.items() if why == OTHER_MODULE)
    return cut or any(name not in tensors or tensors[name].ndim > 0 for name in others)


def identity_norm(name: str, channels: int) -> dict[str, Tensor]:
    zero, one = torch.zeros(channels), torch.ones(channels)
    tensors = dict(weight=one, bias=zero, running_mean=zero, running_var=one - NetworkSpec.norm_eps)
    return {f'{name}.{part}': tensor.clone() for part, tensor in tensors.items()}


def is_of_block(name: str, rows: Rows) -> bool:
    """Whether a name begins like those of the blocks that the rows rename."""
    starts = {source[: match.end()] for source, _ in rows if (match := re.search(r'\{(i|letter)\}', source))}
    return any(compile_row(start).match(name) for start in starts)


def is_unused(name: str, names: Container[str], prefix: str) -> bool:
    """Whether a tensor belongs to the projection of a DLA tree that consists of trees: only trees of blocks run one."""
    tree, _, projection = name.partition('.project.')
    return tree.startswith('level') and projection != '' and f'{prefix}{tree}.tree1.conv1.weight' not in names


def to_weight(name: str, value: Tensor, cast: Counter[str]) -> Tensor:
    """Checks that a tensor can be a weight and casts it to float32, counting the original types in `cast`."""
    value = torch.detach(value)
    if name.endswith('num_batches_tracked') and value.dtype in INTEGERS:
        return value
    if value.dtype not in FLOATS:
        raise CheckpointError(f'{name} cannot be a weight: its type is {value.dtype}. Save floating-point tensors')
    weight = value.float()
    if not is_finite(weight):
        raise CheckpointError(f'{name} has NaN or infinite values: the training diverged. Use an earlier checkpoint')
    if name.endswith('running_var') and (weight < 0).any():
        raise CheckpointError(f'{name} has a negative variance: the file is damaged, or not of this kind of network')
    if value.dtype != torch.float32:
        cast[str(value.dtype).removeprefix('torch.')] += 1
    return weight


def rename_for(dialect: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a ResNet-hosted model's tensors for a code base of `EXPORTS`; ValueError if it has no such network."""
    if dialect not in EXPORTS:
        raise ValueError(f'cannot export to {dialect!r}. Choose from {", ".join(EXPORTS)}')
    convolution = state.get('layer4.0.convs.0.weight')
    if convolution is None or any('.se.' in name or '.big.' in name for name in state):
        raise ValueError(f'cannot export to {dialect}: it only has ResNet-hosted Res2Nets without attention')
    if convolution.shape[0] != convolution.shape[1] and dialect != 'official':
        raise ValueError(f'cannot export to {dialect}: it has no Res2NeXt (grouped 3x3 convolutions)')
    names = DIALECTS[dialect]
    deep = 'conv1.0.weight' in state
    if dialect == 'mmdet' and ('fc.weight' in state or not deep):
        raise ValueError('cannot export to mmdet: it only has backbones, with a deep stem. Pass num_classes=0')
    rows = tuple((ours, theirs) for theirs, ours in names.stems[-1 if deep else 0][1] + names.rows)
    suffixes = {ours: theirs for theirs, ours in names.suffixes.items()}
    offsets = {key: -value for key, value in names.offsets.items()}
    blocks = sum(re.fullmatch(r'layer3\.\d+\.conv1\.weight', name) is not None for name in state)
    renamed = {}
    for name, value in state.items():
        if names.suffixes and name.endswith('num_batches_tracked'):
            continue
        theirs = rename(name, rows, suffixes, offsets, blocks)
        if theirs is None or name.startswith('maxpool.') or (names.suffixes and theirs.startswith('layer')):
            raise ValueError(f'cannot export to {dialect}: none of its networks has {name}')
        value = value.t() if names.transposed and name == 'fc.weight' else value
        renamed[full_name(names.prefix, theirs)] = value.contiguous()
    return renamed
