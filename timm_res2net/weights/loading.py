"""Loads checkpoints into models, but only into models that compute what the weights were trained for."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import timm
from timm.models import adapt_input_conv
from torch import Tensor, nn

from .._errors import CheckpointError, UnknownModelError, first_line, sanitize
from .._files import PathLike
from ..models.block import spec_of
from ..models.checks import not_finite
from ..models.classifier import model_name, registered_cfg, with_channels
from ..models.spec import NetworkSpec
from ..models.variants import ARCHS
from .checkpoints import Checkpoint, first_convolution, identify, read_checkpoint, with_record
from .config import RECORD, WEIGHTS_FILE, read_config
from .matching import arguments_for, build_outline, describe_mismatch, find_model, format_create_model
from .readers import RawFile, read_file
from .renaming import as_before_compile, find_network

_logger = logging.getLogger(__name__)

DESCRIPTIONS = 'tag', 'description', 'license', 'origin_url'  # keys of timm's pretrained_cfg about weights
SOURCES = 'url', 'file', 'hf_hub_id'


def load_checkpoint(
    model: nn.Module,
    file: PathLike | Checkpoint,
    *,
    dialect: str | None = None,
    prefix: str | None = None,
    weights_from: str | None = None,
    **spec: Any,
) -> Checkpoint:
    """Loads a weights file into a model, if the model computes what the weights were trained for.

    Every tensor of the model must be in the file. Tensors of parts that the model lacks, such as a classifier or the
    last stages of a feature extractor, are left out.

    Args:
        model: A model of this package, possibly wrapped by `features_only`, `torch.compile` or DistributedDataParallel.
        file: A weights file, or the result of `read_checkpoint`.
        dialect, prefix, weights_from: See `read_checkpoint`. Not with a `Checkpoint`.
        **spec: See `read_checkpoint`.

    Returns:
        The checkpoint. It lists the tensors that were dropped, filled in or cast, and the assumed fields of the spec.

    Raises:
        CheckpointError: If the file cannot be read, does not fit, or belongs to a network that computes something else.
            The model stays unchanged.
        TypeError: If the model has no Res2Net block, or an option for reading is passed with a `Checkpoint`.
        ValueError: If the model is on the meta device.

    Example:
        >>> model = timm.create_model('res2net101d', num_classes=0, first_block='mmdet')
        >>> timm_res2net.load_checkpoint(model, 'faster_rcnn_r2_101_fpn.pth').dropped
        {'bbox_head.fc_cls.weight': 'part of another module', ...}
    """
    if spec_of(model) is None:
        raise TypeError(f'cannot load weights: {type(model).__name__} has no Res2Net block')
    checkpoint = read_once(file, dialect=dialect, prefix=prefix, weights_from=weights_from).with_spec(**spec)
    require_same_spec(model, checkpoint)
    wanted = model.state_dict()
    if any(tensor.is_meta for tensor in wanted.values()):
        raise ValueError('cannot load weights: the model is on the meta device. Call model.to_empty(device=...) first')
    wrapper, state = fitting_state(model, checkpoint)
    model.load_state_dict(dict(zip(wanted, (state[name] for name in as_before_compile(wanted)))))
    lacking = {name: 'part that the model lacks' for name in checkpoint.state if wrapper + name not in state}
    return replace(checkpoint, dropped={**checkpoint.dropped, **lacking})


def fitting_state(model: nn.Module, checkpoint: Checkpoint) -> tuple[str, dict[str, Tensor]]:
    """Returns the prefix of a model's names ('body.', 'module.' or '') and a checkpoint's tensors under these names."""
    wanted = as_before_compile(model.state_dict())
    _, wrapper, _, _ = find_network(wanted, 'official')
    parts = {name.removeprefix(wrapper).partition('.')[0] for name in wanted}
    state = {wrapper + name: tensor for name, tensor in checkpoint.state.items() if name.partition('.')[0] in parts}
    problem = describe_mismatch(wanted, state)
    if not problem:
        narrow = {name: tensor.dtype for name, tensor in wanted.items() if tensor.element_size() < 4}
        problem = describe_overflow({name: state[name].to(dtype) for name, dtype in narrow.items()})
    if problem:
        raise CheckpointError(
            f'{checkpoint.file} does not fit {model_name(model)}: {problem}. {suggest_model(checkpoint)}'
        )
    return wrapper, state


def read_once(file: PathLike | Checkpoint, **options: str | None) -> Checkpoint:
    if not isinstance(file, Checkpoint):
        return read_checkpoint(file, **options)
    if any(option is not None for option in options.values()):
        raise TypeError(f'{file.file} was already read. Pass dialect, prefix and weights_from to read_checkpoint')
    return file


def load_model(
    file: PathLike | Checkpoint,
    name: str | None = None,
    *,
    dialect: str | None = None,
    prefix: str | None = None,
    weights_from: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Creates the model that fits a weights file, and loads the weights into it.

    The model computes what the original code computes. Finds the architecture and its arguments, and applies recorded
    `output_stride`, `dilate_pool` and `global_pool` unless an argument overrides them. Adapts weights as timm does:
    sums or repeats those of the first convolution for another number of image channels, and creates a new classifier
    for another number of classes. Copies recorded image settings and class names to the model's `pretrained_cfg`, and
    the facts recorded by `push` to its attribute `record`.

    Args:
        file: A weights file or folder, or the result of `read_checkpoint`.
        name: Name of a timm model. If None, finds model and arguments from the file.
        dialect, prefix, weights_from: See `read_checkpoint`. Not with a `Checkpoint`.
        **kwargs: Keywords of `timm.create_model`, such as `features_only`, `in_chans` and `num_classes`, and fields of
            `NetworkSpec` that the file does not record.

    Returns:
        The model in training mode, as `timm.create_model` returns it.

    Raises:
        CheckpointError: If the file cannot be read, or fits no model or not the named one.
        UnknownModelError: If timm has no model or weights of that name.
        TypeError: If the named model contains no Res2Net.

    Example:
        >>> backbone = timm_res2net.load_model('faster_rcnn_r2_101_fpn.pth', features_only=True)
        >>> [feature.shape for feature in backbone(torch.zeros(1, 3, 64, 64))]  # (N, C, H / stride, W / stride)
    """
    if name is not None:
        require_known(name)
    given = NetworkSpec.from_arguments(kwargs)
    checkpoint = read_once(file, dialect=dialect, prefix=prefix, weights_from=weights_from)
    checkpoint = checkpoint.with_spec(**{field: value for field, value in vars(given).items() if field in kwargs})
    if name is None:
        name, found, _ = find_model(checkpoint)
    else:
        found = arguments_for(checkpoint, name.partition('.')[0], known_only=True)
        require_fit_without_memory(checkpoint, name, found, kwargs)
    kwargs = {'num_classes': checkpoint.num_classes, **found, **kwargs}
    same_classes = kwargs['num_classes'] == checkpoint.num_classes
    labels = (same_classes and checkpoint.labels) or None
    overlay = dict.fromkeys((*DESCRIPTIONS, *SOURCES))  # those of the published weights do not apply
    overlay |= dict(checkpoint.images, num_classes=kwargs['num_classes'], label_names=labels)
    overlay |= kwargs.pop('pretrained_cfg_overlay', {})
    in_chans = kwargs.get('in_chans', 3)
    model: Any = timm.create_model(name, pretrained_cfg_overlay=overlay, **kwargs)
    model.pretrained_cfg.update(with_channels(model.pretrained_cfg, in_chans))
    model.record = dict(checkpoint.record)
    load_checkpoint(model, adapt_weights(checkpoint, model, in_chans, same_classes))
    _logger.info('loaded %s into %s', sanitize(checkpoint.file), format_create_model(name, kwargs))
    return cast(nn.Module, model)


def require_fit_without_memory(
    checkpoint: Checkpoint, name: str, found: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> None:
    """Raises CheckpointError if a named model does not fit; checks without memory, as a file may ask for a huge one."""
    try:
        outline = build_outline(checkpoint, name, {**found, **kwargs})
    except Exception as error:
        if not found:  # the caller's arguments are impossible, not those of the file
            raise
        raise CheckpointError(f'cannot build {name} for {checkpoint.file}: {first_line(error)}') from error
    if spec_of(outline) is not None:
        fitting_state(outline, checkpoint)


def adapt_weights(checkpoint: Checkpoint, model: nn.Module, in_chans: int, same_classes: bool) -> Checkpoint:
    """Adapts a checkpoint to other numbers of image channels and classes, as timm does."""
    state, first_conv = dict(checkpoint.state), first_convolution(checkpoint.state)
    if not same_classes:
        state = {key: tensor for key, tensor in state.items() if not key.startswith('fc.')}
        state |= {key: tensor for key, tensor in model.state_dict().items() if key.startswith('fc.')}
    if in_chans != checkpoint.in_chans:
        state[first_conv] = adapt_input_conv(in_chans, state[first_conv], base_chans=checkpoint.in_chans)
        if problem := describe_overflow({first_conv: state[first_conv]}):
            raise CheckpointError(f'{checkpoint.file} does not fit {in_chans} channels: {problem}')
    return replace(checkpoint, state=state)


def load_folder(folder: PathLike, source: str | None = None, **kwargs: Any) -> nn.Module:
    """Creates the model stored in a folder with `config.json` and `model.safetensors`, in evaluation mode.

    `source` is the folder's name in messages; the other arguments are those of `timm.create_model`.
    """
    source = source or str(folder)
    config = read_config(folder, source)
    name, recorded = config.get('architecture'), config[RECORD].get('sha256')
    if not isinstance(name, str) or name not in ARCHS:
        where = f'hf-hub:{source}' if source != str(folder) else f'local-dir:{folder}'
        raise CheckpointError(
            f'cannot load {source}: {sanitize(repr(name), 80)} is not a model of this package. '
            f'Use timm.create_model({where!r}, pretrained=True)'
        )
    path, shown = Path(folder, WEIGHTS_FILE), f'{WEIGHTS_FILE} of {source}'
    checkpoint = with_record(identify(read_file(path, shown), shown, config=config), path, config)
    if checkpoint.dropped:
        raise CheckpointError(f'cannot load {source}: its model has no tensor {next(iter(checkpoint.dropped))}')
    if recorded is not None and not checkpoint.record:
        raise CheckpointError(
            f'cannot load {shown}: config.json was written for another file (SHA-256 {recorded!s:.64}). '
            'One of the two files was replaced: ask the owner, or convert the weights again'
        )
    classes = config.get('num_classes')
    if classes not in (None, checkpoint.num_classes):
        problem = f'it has {checkpoint.num_classes} classes, but config.json specifies {classes!r}'
        raise CheckpointError(f'cannot load {shown}: {problem}')
    cfg = config['pretrained_cfg']
    known = {key: cfg[key] for key in DESCRIPTIONS if isinstance(cfg.get(key), str)}
    overlay = {**known, **kwargs.pop('pretrained_cfg_overlay', {})}
    return load_model(checkpoint, name, **kwargs, pretrained_cfg_overlay=overlay).eval()


def require_known(name: str) -> None:
    """Raises UnknownModelError if timm has no such model, or no weights with that tag."""
    arch, _, tag = name.partition('.')
    if ':' in name:  # hf-hub:..., local-dir:...
        return
    if not timm.is_model(arch):
        raise UnknownModelError.among(arch, timm.list_models())
    try:
        registered_cfg(name)
    except RuntimeError:
        tags = ', '.join(timm.list_pretrained(f'{arch}.*'))
        raise UnknownModelError(f'no weights {tag!r} of {arch}. Available: {tags or "none"}') from None


def adapt_state_dict(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames and checks weights that timm has read; timm calls this as `pretrained_filter_fn`."""
    # timm may have memory-mapped the file, which can still change after a check: copy first, then check.
    tensors = {key: each.clone() for key, each in state_dict.items() if isinstance(each, Tensor)}
    checkpoint = identify(RawFile(tensors), 'the file')
    if checkpoint.dialect == 'official' and not checkpoint.prefix:  # timm's names: the caller knows what they compute
        checkpoint = checkpoint.with_spec(**vars(spec_of(model) or NetworkSpec()))
    require_same_spec(model, checkpoint)
    return checkpoint.state


def require_same_spec(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if a model and a checkpoint's network compute different things; logs assumptions."""
    ours, theirs, file = spec_of(model), checkpoint.spec, checkpoint.file
    if ours is None:
        return
    if theirs is None:
        given = ours.as_keywords(['first_block'])
        raise CheckpointError(
            f'cannot use {file}: {checkpoint.unsupported}. If its network does compute the same, pass {given}'
        )
    fields = ours.differing_fields(theirs)
    if not fields:
        if assumptions := describe_assumptions(checkpoint):
            _logger.warning('%s: %s', sanitize(file), assumptions)
        return
    known = {name: 'assumed' if name in checkpoint.assumed else checkpoint.provenance[name] for name in fields}
    how = ', '.join(f'{name} is {each}' for name, each in known.items())
    advice = f'Create the model with {theirs.as_keywords(fields)}'
    if 'deformable' not in fields:  # those are proved by tensors
        advice += f'; or, if the file really is from such a network, pass {ours.as_keywords(fields)}'
    raise CheckpointError(
        f'{file} does not fit: its network has {theirs.as_keywords(fields)} ({how}), the model '
        f'has {ours.as_keywords(fields)}. The weights would load and compute something else. {advice}. '
        f'{suggest_model(checkpoint)}'
    )


def describe_assumptions(checkpoint: Checkpoint) -> str:
    """Describes in one line the assumed fields of a network that is part of a larger one; '' if there are none."""
    spec = checkpoint.spec
    if not checkpoint.is_part or not checkpoint.assumed or spec is None:
        return ''
    why = f'inferred from the tensors of {checkpoint.project}' if checkpoint.project else 'not recorded in the file'
    return f'assumed {spec.as_keywords(checkpoint.assumed)} ({why}). Pass these keywords to change them.'


def describe_overflow(state: Mapping[str, Tensor]) -> str:
    """Describes which tensors have overflowed; '' if none has."""
    bad = not_finite(state)
    return f'{len(bad)} tensors hold numbers too large for {state[bad[0]].dtype} (first: {bad[0]})' if bad else ''


def require_no_overflow(model: nn.Module, source: str) -> None:
    """Raises CheckpointError if weights became infinite in a model, by summed channels or in half precision."""
    if problem := describe_overflow(model.state_dict()):
        raise CheckpointError(f'{source} does not fit {model_name(model)}: {problem}')


def suggest_model(checkpoint: Checkpoint) -> str:
    try:
        name, args, _ = find_model(checkpoint)
    except CheckpointError:
        return 'No model of this package fits it'
    args = {**args, **({} if checkpoint.num_classes == 1000 else {'num_classes': checkpoint.num_classes})}
    return f'It fits {format_create_model(name, args)}'
