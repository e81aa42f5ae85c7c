"""Finds the registered model and the arguments that fit a checkpoint, as recorded or from the shapes of tensors."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .._errors import CheckpointError, first_line
from ..models.resnet import Res2Net
from ..models.spec import ARGUMENTS, NetworkSpec
from ..models.variants import ARCHS
from .checkpoints import Checkpoint
from .config import beyond_row

SHOWN = *ARGUMENTS['tensors'], 'attn_layer'  # arguments that shapes reveal
DEFAULTS = {key: default for key, default in Res2Net.arguments().items() if key in SHOWN}
MAX_BLOCKS = 128  # in a network that is built for a file; Res2Net-200 has 66
SIZES = 'num_classes', 'in_chans'  # always taken from the tensors


def find_model(checkpoint: Checkpoint, name: str | None = None) -> tuple[str, dict[str, Any], nn.Module]:
    """Finds the model that fits, or checks the named one; returns name, arguments beyond its row, and the outline."""
    problem = ''
    for each, args in candidates(checkpoint, name):
        try:
            outline = build_outline(checkpoint, each, args)
        except Exception as error:  # constructors raise nearly anything for impossible arguments
            problem = problem or f': {first_line(error)}'
            continue
        if not describe_mismatch(outline.state_dict(), checkpoint.state):
            return each, args, outline
    raise CheckpointError(f'cannot use {checkpoint.file}: {explain_misfit(checkpoint, name)}{problem}')


def candidates(checkpoint: Checkpoint, name: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields models that may fit a checkpoint, with arguments: first the recorded one, then guesses from shapes."""
    state = checkpoint.state
    if checkpoint.name is not None and name in (None, checkpoint.name):
        yield checkpoint.name, arguments_for(checkpoint, checkpoint.name)
    on_resnet = {'layer1.0.conv1.weight', 'layer4.0.conv1.weight'} <= state.keys()
    try:
        found = DEFAULTS | resnet_arguments(state) if on_resnet else {}
    except Exception:  # tensors are missing, or have impossible shapes
        return
    options = []
    for each, arch in ARCHS.items():
        has_stem = on_resnet or f'{arch.cfg.get("first_conv", "conv1")}.weight' in state
        if name in (None, each) and (arch.trunk is Res2Net) == on_resnet and has_stem:
            shown = {key: value for key, value in found.items() if value != arch.args.get(key, DEFAULTS[key])}
            options.append((each, arguments_for(checkpoint, each, shown)))
    options.sort(key=lambda option: len(option[1]))
    yield from options[:1] if on_resnet else options  # given these, all ResNet-hosted rows are the same network


def arguments_for(
    checkpoint: Checkpoint, name: str, shown: Mapping[str, Any] | None = None, known_only: bool = False
) -> dict[str, Any]:
    """Returns the arguments, besides its row's, with which a model computes what a checkpoint's network computes.

    Starts from the arguments `shown` by shapes, if given, or else from the recorded ones. With `known_only`, leaves out
    assumed fields of the spec, so that the model's own apply.
    """
    in_chans = {} if checkpoint.in_chans == 3 else {'in_chans': checkpoint.in_chans}
    if name not in ARCHS:
        return in_chans
    arch, recorded, spec = ARCHS[name], checkpoint.model_args, checkpoint.spec or NetworkSpec()
    if shown is None and name == checkpoint.name:
        args = beyond_row(name, {key: value for key, value in recorded.items() if key not in SIZES})
    else:
        uses = [key for key in ARGUMENTS['use'] if recorded.get(key) and key in arch.trunk.arguments()]
        args = {**(shown or {}), **{key: recorded[key] for key in uses}}
    differing = spec.differing_fields(NetworkSpec.from_arguments({**arch.args, **args}))
    known = [field for field in differing if not (known_only and field in checkpoint.assumed)]
    return {**args, **{field: getattr(spec, field) for field in known}, **in_chans}


def build_outline(checkpoint: Checkpoint, name: str, args: Mapping[str, Any]) -> nn.Module:
    """Builds a model on the meta device, with a checkpoint's numbers of channels and classes."""
    if arch := ARCHS.get(name.partition('.')[0]):
        require_buildable(checkpoint, {**arch.args, **args})
    sizes = dict(num_classes=checkpoint.num_classes, in_chans=checkpoint.in_chans)
    return timm.create_model(name, **{**args, **sizes, 'pretrained': False, 'device': 'meta'})


def require_buildable(checkpoint: Checkpoint, args: Mapping[str, Any]) -> None:
    """Raises ValueError for an impossible spec, or for more blocks than the file's tensors allow: these take hours."""
    NetworkSpec.from_arguments(args)
    blocks = sum(args.get('layers', ())) + sum(2**depth for depth in args.get('levels', ()))
    if blocks > MAX_BLOCKS or blocks * max(1, args.get('scale', 4) - 1) > len(checkpoint.state):
        raise ValueError(f'a network of {blocks} blocks has more tensors than the file')


def explain_misfit(checkpoint: Checkpoint, name: str | None) -> str:
    has_stage_4 = any(each.startswith('layer4.') for each in checkpoint.state)
    is_resnet = {'layer1.0.downsample.1.weight', 'layer3.0.conv1.weight'} <= checkpoint.state.keys()
    if checkpoint.name is None and name is None and is_resnet and not has_stage_4:
        advice = 'Load the file into a model with features_only=True and out_indices=(0, 1, 2, 3)'
        return f'stage 4 (layer4) is missing. {advice}'
    return f'its tensors do not match {name or "any model in this package"}'


def describe_mismatch(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Describes how names and shapes of tensors differ; '' if they match. Ignores extra batch counters."""
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted and not name.endswith('num_batches_tracked')]
    shapes = [name for name in wanted if name in given and given[name].shape != wanted[name].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of the model's tensors are missing (first: {missing[0]})")
    if unexpected:
        problems.append(f'{len(unexpected)} tensors are unknown to the model (first: {unexpected[0]})')
    if shapes:
        name = shapes[0]
        sizes = f'{tuple(given[name].shape)} instead of {tuple(wanted[name].shape)}'
        problems.append(f'{len(shapes)} have a different shape (first: {name}, {sizes})')
    return ', '.join(problems)


def format_create_model(name: str, args: Mapping[str, object]) -> str:
    return f'timm.create_model({", ".join([repr(name), *(f"{key}={value!r}" for key, value in args.items())])})'


def resnet_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Derives a ResNet-hosted network's arguments from shapes; KeyError if tensors are missing."""
    stages = 'layer1', 'layer2', 'layer3', 'layer4'
    firsts = [name for name in state if name.endswith('.conv1.weight')]  # of each block
    planes = tuple(len(state[f'{stage}.0.conv3.weight']) // 4 for stage in stages)
    widths = [state[f'{stage}.0.convs.0.weight'].shape[1] for stage in stages]
    width, width_of_group = state['layer4.0.convs.0.weight'].shape[:2]
    found: dict[str, Any] = dict(
        layers=tuple(sum(name.startswith(f'{stage}.') for name in firsts) for stage in stages),
        channels=planes,
        base_width=base_width(widths, planes),
        scale=len(state['layer4.0.conv1.weight']) // width,
        cardinality=width // width_of_group,
    )
    if 'conv1.0.weight' in state:
        found.update(stem_type='deep', stem_width=len(state['conv1.0.weight']))
    if 'maxpool.0.weight' in state:  # a convolution in place of the max pool
        found['replace_stem_pool'] = True
    if state.get('layer2.0.downsample.1.weight', torch.empty(0)).ndim == 4:
        found['avg_down'] = True
    if 'layer4.0.se.fc1.weight' in state:
        found['attn_layer'] = 'se'
    elif 'layer4.0.se.conv.weight' in state:
        found['attn_layer'] = 'eca'
    return found


def base_width(widths: Sequence[int], planes: Sequence[int]) -> float:
    """Returns the least base width with floor(planes * base_width / 64) channels per split, an int if possible."""
    least: float = max(-(-64 * width // plane) for width, plane in zip(widths, planes))
    if any(plane * least // 64 != width for width, plane in zip(widths, planes)):
        least = max(64 * width / plane for width, plane in zip(widths, planes))
    return least
