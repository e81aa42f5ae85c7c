"""From a file of weights to a model, whatever code base wrote the file."""

import inspect
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import timm
import torch
from timm.models import adapt_input_conv
from timm.models.resnet import ResNet
from torch import Tensor, nn

from ..models.block import function_of
from ..models.classifier import model_name, not_finite, registered_cfg, with_channels
from ..models.function import Function
from ..models.resnet import Res2Net
from ..models.variants import ARCHS, Arch
from .checkpoints import Checkpoint, read_checkpoint, recognise
from .dialects import DIALECTS, find_network, is_dead, to_float32
from .errors import CheckpointError, UnknownModelError, printable
from .files import PathLike
from .readers import Contents

__all__ = [
    'adapt_state_dict',
    'find_architecture',
    'format_create_model',
    'load_checkpoint',
    'load_model',
    'require_known',
    'require_no_overflow',
    'require_same_function',
]

_logger = logging.getLogger(__name__)

DISPUTED = 'first_block', 'style', 'strides', 'dilations', 'stem_ceil_mode'  # in which published code differs

# Arguments of a ResNet-hosted network that can be found from its tensors' shapes, and their defaults.
SIGNATURE = {**inspect.signature(ResNet).parameters, **inspect.signature(Res2Net).parameters}
DEFAULTS: dict[str, Any] = {
    key: SIGNATURE[key].default
    for key in (
        *('layers', 'base_width', 'scale', 'cardinality', 'stem_type', 'stem_width', 'avg_down', 'attn_layer'),
        *('channels', 'replace_stem_pool'),
    )
}
MOST_BLOCKS = 128  # of a network that is made for a file; Res2Net-200 has 66


def load_checkpoint(
    model: nn.Module,
    file: PathLike | Checkpoint,
    *,
    dialect: str | None = None,
    prefix: str | None = None,
    **function: Any,
) -> Checkpoint:
    """Loads a file of weights into a model that computes what the weights were trained for.

    Every tensor of the model must be in the file. What the file has beyond is dropped where it belongs to a part that
    the model lacks: a classifier, or the last stages of a feature extractor.

    Args:
        model: A model of this package, also within `features_only`, `torch.compile` or DistributedDataParallel.
        file: A file, or the checkpoint that `read_checkpoint` returned.
        dialect: See `read_checkpoint`. None for a checkpoint.
        prefix: See `read_checkpoint`. None for a checkpoint.
        **function: See `read_checkpoint`.

    Returns:
        The checkpoint, with what was dropped, filled in, cast, and assumed.

    Raises:
        CheckpointError: If the file can't be read, doesn't fit, or is of a network that computes something else. The
            model is not changed.
        TypeError: If the model holds no Res2Net, or an argument is given that a checkpoint leaves without effect.
    """
    if function_of(model) is None:
        raise TypeError(
            f'a {type(model).__name__} has no Res2Net block to load weights into; if it was made of a model, load that'
        )
    checkpoint = read_once(file, dialect, prefix).stating(**function)
    try:
        require_same_function(model, checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f'{error}. {suggest_model(checkpoint)}') from None
    wanted = model.state_dict()
    if any(tensor.is_meta for tensor in wanted.values()):
        raise ValueError('the model is on the meta device and has no room for weights; move it by to_empty first')
    wrapper, state = fitting_state(model, checkpoint)
    model.load_state_dict({name: state[name] for name in wanted})
    lacking = {name: 'of a part that the model lacks' for name in checkpoint.state if wrapper + name not in state}
    dropped = {**checkpoint.translation.dropped, **lacking}
    return replace(checkpoint, translation=replace(checkpoint.translation, dropped=dropped))


def fitting_state(model: nn.Module, checkpoint: Checkpoint) -> tuple[str, dict[str, Tensor]]:
    """The tensors of a checkpoint under a model's names, and what precedes these in it: 'body.', 'module.' or nothing.

    Raises:
        CheckpointError: If they are not those of the model.
    """
    wanted = model.state_dict()
    _, wrapper, _ = find_network(wanted, 'official')
    parts = {name.removeprefix(wrapper).partition('.')[0] for name in wanted}
    state = {wrapper + name: tensor for name, tensor in checkpoint.state.items() if name.partition('.')[0] in parts}
    if problems := describe_mismatch(wanted, state):
        raise CheckpointError(
            f'{checkpoint.file} does not fit {model_name(model)}: {problems}. {suggest_model(checkpoint)}'
        )
    return wrapper, state


def read_once(file: PathLike | Checkpoint, dialect: str | None, prefix: str | None) -> Checkpoint:
    """Reads a file with `read_checkpoint`, or returns a checkpoint that was read already."""
    if not isinstance(file, Checkpoint):
        return read_checkpoint(file, dialect=dialect, prefix=prefix)
    if dialect is not None or prefix is not None:
        raise TypeError(f'{file.file} was read already: give dialect and prefix to read_checkpoint')
    return file


def load_model(
    file: PathLike | Checkpoint,
    name: str | None = None,
    *,
    dialect: str | None = None,
    prefix: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Makes the model that a file of weights fits, with the weights.

    Other image channels and classes are adapted as timm does: the first convolution's weights are summed or repeated,
    and a classifier for other classes is a new one. The model dilates and pools as the file states (`output_stride`,
    `dilate_pool`, `global_pool`), if no argument says otherwise. What the file tells of its images and classes, as
    those of timm's train script do, is in the model's `pretrained_cfg`. Its attribute `record` is what this package
    recorded of the weights, if it wrote them with the `config.json` beside them.

    Args:
        file: A file, or the checkpoint that `read_checkpoint` returned.
        name: Name of the model. If None, model and arguments are found from the file.
        dialect: See `read_checkpoint`. None for a checkpoint.
        prefix: See `read_checkpoint`. None for a checkpoint.
        **kwargs: For `timm.create_model`, such as `features_only`, `in_chans` and `num_classes`, and for
            `read_checkpoint` what the network computes.

    Returns:
        The model in training mode, as `timm.create_model` returns it.

    Raises:
        CheckpointError: If the file can't be read, or fits no model, or not the named one.
        UnknownModelError: If there is no such model; the message names those most alike.
        TypeError: If the named model holds no Res2Net.
    """
    if name is not None:
        require_known(name)
    given = Function.from_arguments(kwargs)
    checkpoint = read_once(file, dialect, prefix).stating(
        **{key: getattr(given, key) for key in vars(given) if key in kwargs}
    )
    first_conv = first_convolution(checkpoint)
    in_chans = checkpoint.state[first_conv].shape[1]
    sizes = {'num_classes': checkpoint.num_classes, **({} if in_chans == 3 else {'in_chans': in_chans})}
    if name is None:
        name, found = find_architecture(checkpoint)
    else:
        found = told_arguments(checkpoint, name)
        # First without memory: a small file can state sizes that would take all there is.
        options = dict(pretrained=False, device='meta', in_chans=in_chans)
        outline = timm.create_model(name, **{**sizes, **found, **kwargs, **options})
        if kwargs.get('num_classes', checkpoint.num_classes) == checkpoint.num_classes and function_of(outline):
            fitting_state(outline, checkpoint)
    kwargs = {**sizes, **found, **kwargs}
    # The names that are registered are of the classes of other weights.
    names = checkpoint.training.labels if kwargs['num_classes'] == checkpoint.num_classes else ()
    overlay = {**checkpoint.training.images, 'label_names': names or None, **kwargs.pop('pretrained_cfg_overlay', {})}
    model: Any = timm.create_model(name, pretrained_cfg_overlay=overlay, **kwargs)
    model.pretrained_cfg.update(with_channels(model.pretrained_cfg, kwargs.get('in_chans', 3)))
    model.record = dict(checkpoint.training.record)
    assumed = f'; assumed, as nothing in it tells: {", ".join(checkpoint.assumed)}' if checkpoint.assumed else ''
    images = f'; images: {checkpoint.training.images or "as is usual for the model, nothing in it tells"}'
    shown = printable(checkpoint.file)
    _logger.info('%s is loaded into %s%s%s', shown, format_create_model(name, kwargs), assumed, images)
    state = dict(checkpoint.state)
    if kwargs['num_classes'] != checkpoint.num_classes:
        state = {key: tensor for key, tensor in state.items() if not key.startswith('fc.')}
        state |= {key: tensor for key, tensor in model.state_dict().items() if key.startswith('fc.')}
    if kwargs.get('in_chans', 3) != in_chans:
        state[first_conv] = adapt_input_conv(kwargs['in_chans'], state[first_conv], base_chans=in_chans)
    load_checkpoint(model, replace(checkpoint, translation=replace(checkpoint.translation, state=state)))
    return cast(nn.Module, model)


def require_known(name: str) -> None:
    """Raises an UnknownModelError if `timm.create_model` knows no model of a name, or no weights of its tag."""
    arch, _, tag = name.partition('.')
    if ':' in name:  # hf-hub:..., local-dir:...
        return
    if not timm.is_model(arch):
        raise UnknownModelError.among(arch, timm.list_models())
    try:
        registered_cfg(name)
    except RuntimeError:
        tags = ', '.join(timm.list_pretrained(f'{arch}.*'))
        raise UnknownModelError(f'there are no weights {tag} of {arch}; there are {tags or "none"}') from None


def told_arguments(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The arguments that a named model needs to compute what a file tells, without what is only assumed."""
    arch = ARCHS.get(name.partition('.')[0])
    if arch is None or checkpoint.function is None:
        return {}
    require_activation(checkpoint)
    arguments = differing_arguments(checkpoint.function, Function.from_arguments(arch.args))
    told = {key: value for key, value in arguments.items() if key not in checkpoint.assumed}
    return {**told, **stated_uses(checkpoint, arch)}


def first_convolution(checkpoint: Checkpoint) -> str:
    """The name of the weight of a network's first convolution.

    Raises:
        CheckpointError: If it is missing.
    """
    for stem, _ in DIALECTS['official'].stems:
        if stem in checkpoint.state:
            return stem
    raise CheckpointError(f'{checkpoint.file} can not be used: the first convolution of its network is missing')


def require_activation(checkpoint: Checkpoint) -> None:
    """Raises a CheckpointError if timm has no activation of the name that a file states, so no model can be made."""
    try:
        Function.from_arguments(vars(checkpoint.function or Function()))
    except ValueError as error:
        raise CheckpointError(f'{checkpoint.file} is of a network that no model here is: {error}') from error


def stated_uses(checkpoint: Checkpoint, arch: Arch) -> dict[str, Any]:
    """What a file states of output stride and pooling, as far as an architecture has these arguments."""
    return {key: value for key, value in checkpoint.uses.items() if key in ('global_pool', *arch.trunk.densest)}


def adapt_state_dict(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames weights that timm has read to timm's names, if they have others. timm's `pretrained_filter_fn`.

    Raises:
        CheckpointError: If some can be no weights, or they are of a network that computes something else than the
            model.
    """
    # timm may have mapped them from a file, which can change after they were checked: copy, then check.
    state_dict = {key: each.clone() if isinstance(each, Tensor) else each for key, each in state_dict.items()}
    dialect, prefix, _ = find_network(state_dict)
    if dialect == 'official' and not prefix:  # timm's names, but for the modules that the authors' DLA never runs
        state = {
            key: to_float32(key, tensor, Counter(), ours=key)
            for key, tensor in state_dict.items()
            if isinstance(tensor, Tensor) and not is_dead(key, state_dict, DIALECTS[dialect])
        }
    else:
        checkpoint = recognise(Contents(state_dict), 'the file')
        require_same_function(model, checkpoint)
        state = checkpoint.state
    if problem := describe_overflow(model.state_dict(), state):
        raise CheckpointError(f'the file does not fit {model_name(model)}: {problem}')
    return state


def require_same_function(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raises a CheckpointError if a model computes something else than the network that weights are of."""
    ours, theirs, file = function_of(model), checkpoint.function, checkpoint.file
    if ours is None:
        return
    if theirs is None:
        given = ours.as_keywords(['first_block'])
        raise CheckpointError(
            f'{file} {checkpoint.unknown}. If yours computes what the model does, load it with {given}'
        )
    fields = ours.differing_fields(theirs)
    if not fields:
        if checkpoint.translation.is_part and {'strides', 'dilations'} <= set(checkpoint.assumed):
            unsaid = [name for name in checkpoint.assumed if name in DISPUTED]
            _logger.warning(
                "%s: its tensors' names do not tell %s of the network. The usual is assumed: %s. If its own code does "
                'otherwise, say so by these keywords',
                file,
                ', '.join(unsaid),
                theirs.as_keywords(unsaid),
            )
        return
    told = theirs.as_keywords(name for name in fields if name not in checkpoint.assumed)
    assumed = theirs.as_keywords(name for name in fields if name in checkpoint.assumed)
    states = [f'is of a network with {told}'] if told else []
    states += [f'does not tell whether its network has {assumed}, which is usual'] if assumed else []
    way = f'Make the model with {theirs.as_keywords(fields)}'
    if 'deformable' not in fields:  # which its tensors tell
        given = ours.as_keywords(fields)
        way += f', or, if you know the file to be of such a network as the model is, load it with {given}'
    raise CheckpointError(
        f'{file} {" and ".join(states)}; the model has {ours.as_keywords(fields)}: the weights would load and compute '
        f'something else. {way}'
    )


def describe_mismatch(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Describes how two sets of tensors differ, '' if they don't; a batch counter too many is no difference."""
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted and not name.endswith('num_batches_tracked')]
    shapes = [name for name in wanted if name in given and given[name].shape != wanted[name].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of the model's tensors are not in it (first: {missing[0]})")
    if unexpected:
        problems.append(f'{len(unexpected)} in it are unknown to the model (first: {unexpected[0]})')
    if shapes:
        name = shapes[0]
        sizes = f'{tuple(given[name].shape)} for {tuple(wanted[name].shape)}'
        problems.append(f'{len(shapes)} have another shape (first: {name}, {sizes})')
    if overflow := describe_overflow(wanted, given):
        problems.append(overflow)
    return ', '.join(problems)


def describe_overflow(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Describes which numbers would be infinite in a model, as its types are narrower or they were summed; or ''."""
    types = {name: tensor.dtype for name, tensor in wanted.items() if tensor.is_floating_point() and name in given}
    names = [name for name, dtype in types.items() if not given[name].to(dtype).isfinite().all()]
    return f'{len(names)} hold numbers too large for its {types[names[0]]} (first: {names[0]})' if names else ''


def require_no_overflow(model: nn.Module, source: str) -> None:
    """Raises a CheckpointError if weights became infinite in a model, by summed channels or in half precision."""
    if bad := not_finite(model.state_dict()):
        raise CheckpointError(
            f'{source} has numbers too large for the model that was asked for: {len(bad)} of its tensors would have '
            f'infinity in them (first: {bad[0]})'
        )


def suggest_model(checkpoint: Checkpoint) -> str:
    """Says which model a checkpoint fits."""
    try:
        name, args = find_architecture(checkpoint)
    except CheckpointError:
        return 'No model of this package is like it'
    args = {**args, **({} if checkpoint.num_classes == 1000 else {'num_classes': checkpoint.num_classes})}
    return f'It fits {format_create_model(name, args)}'


def format_create_model(name: str, args: Mapping[str, object]) -> str:
    """The call of `timm.create_model`, as Python code."""
    return f'timm.create_model({", ".join([repr(name), *(f"{key}={value!r}" for key, value in args.items())])})'


def find_architecture(checkpoint: Checkpoint, name: str | None = None) -> tuple[str, dict[str, Any]]:
    """Finds the registered model that a checkpoint fits.

    Args:
        checkpoint: The checkpoint.
        name: The only model to consider.

    Returns:
        Its name, and its arguments beyond those of its row in `ARCHS`.

    Raises:
        CheckpointError: If there is none.
    """
    require_activation(checkpoint)
    state, function = checkpoint.state, checkpoint.function or Function()
    on_resnet = {'layer1.0.conv1.weight', 'layer4.0.conv1.weight'} <= state.keys()
    only = '' if name is None else f', or not those of {name}'
    refusal = CheckpointError(f'{checkpoint.file} has tensors that are those of no model of this package{only}')
    try:
        found = resnet_arguments(state) if on_resnet else {}
    except (LookupError, ValueError, ZeroDivisionError):  # some are missing, or have other shapes than in any network
        raise refusal from None
    candidates = []
    for each, arch in ARCHS.items():
        if name not in (None, each) or (arch.trunk is Res2Net) != on_resnet:
            continue
        first_conv = state.get(f'{arch.cfg.get("first_conv", "conv1")}.weight')
        if first_conv is None and not on_resnet:
            continue
        args = {}
        if on_resnet:  # with its arguments, any row makes the same network
            args = {key: found.get(key, DEFAULTS[key]) for key in DEFAULTS if found.get(key) != arch.args.get(key)}
            args |= differing_arguments(function, Function.from_arguments(arch.args))
        if first_conv is not None and first_conv.shape[1] != 3:
            args['in_chans'] = first_conv.shape[1]
        args |= stated_uses(checkpoint, arch)
        candidates.append((each, args))
    candidates.sort(key=lambda candidate: len(candidate[1]))
    for each, args in candidates[:1] if on_resnet else candidates:  # take the one that needs the fewest
        options: dict[str, Any] = dict(device='meta', num_classes=checkpoint.num_classes)
        try:
            model = timm.create_model(each, **options, **args)
        except (ValueError, RuntimeError, ZeroDivisionError):  # of channels that no groups divide, or that overflow
            continue
        if describe_mismatch(model.state_dict(), state):
            continue
        args |= differing_arguments(function, function_of(model) or function)
        try:
            timm.create_model(each, **options, **args)
        except ValueError as error:
            raise CheckpointError(f'{checkpoint.file} is of a network that no model here is: {error}') from error
        return each, args
    raise refusal


def differing_arguments(function: Function, other: Function) -> dict[str, Any]:
    """The arguments that make a network of a function instead of one of another."""
    return {name: getattr(function, name) for name in function.differing_fields(other)}


def resnet_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Finds a ResNet-hosted network's arguments, where they are not the defaults, from the shapes of its tensors."""
    layers: tuple[int, ...] = ()
    while f'layer{len(layers) + 1}.0.conv1.weight' in state:
        stage = f'layer{len(layers) + 1}'
        layers += (sum(name.startswith(f'{stage}.') and name.endswith('.conv1.weight') for name in state),)
    if len(layers) != 4:
        raise LookupError(f'there are {len(layers)} stages, the next one is not complete')
    planes = tuple(len(state[f'layer{stage + 1}.0.conv3.weight']) // 4 for stage in range(len(layers)))
    block = f'layer{len(layers)}.0'
    width, width_of_group = state[f'{block}.convs.0.weight'].shape[:2]
    # A group has floor(planes * base_width / 64) channels. Take the least base_width that gives those of all stages, an
    # integer if there is one.
    groups = [state[f'layer{stage + 1}.0.convs.0.weight'].shape[1] for stage in range(len(layers))]
    base_width: float = max(-(-64 * group // plane) for group, plane in zip(groups, planes))
    if any(plane * base_width // 64 != group for group, plane in zip(groups, planes)):
        base_width = max(64 * group / plane for group, plane in zip(groups, planes))
    found: dict[str, Any] = dict(
        layers=layers,
        base_width=base_width,
        scale=len(state[f'{block}.conv1.weight']) // width,
    )
    if sum(layers) > MOST_BLOCKS or sum(layers) * (found['scale'] - 1) > len(state):  # before such a network is made
        raise LookupError('there are not as many convolutions as its shapes imply, or more blocks than in any network')
    if width != width_of_group:
        found['cardinality'] = width // width_of_group
    if 'conv1.0.weight' in state:
        found.update(stem_type='deep', stem_width=len(state['conv1.0.weight']))
    if 'maxpool.0.weight' in state:  # a convolution
        found['replace_stem_pool'] = True
    if state.get('layer2.0.downsample.1.weight', torch.empty(0)).ndim == 4:
        found['avg_down'] = True
    if planes != DEFAULTS['channels']:
        found['channels'] = planes
    if f'{block}.se.fc1.weight' in state:
        found['attn_layer'] = 'se'
    elif f'{block}.se.conv.weight' in state:
        found['attn_layer'] = 'eca'
    return found
