"""Makes the family's models and registers them with timm.

This file is above the networks and the files of weights, because making a pretrained model takes both. timm names a
model's module after the last part of the file that registers it: `timm.list_models(module='res2net')` lists the family.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm.models.dla
import timm.models.res2net
import torch
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    load_pretrained,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models import _registry as timm_registry
from torch import nn

from .hub.pull import bring_file
from .models.block import function_of
from .models.function import Function
from .models.recompute import FeatureDict, FeatureGetter, FeatureHook, FeatureList
from .models.resnet import Res2Net
from .models.variants import ARCHS, WEIGHTS, Arch, default_cfg
from .weights.checkpoints import Checkpoint, read_checkpoint
from .weights.download import download
from .weights.folder import WEIGHTS_FILE
from .weights.loading import adapt_state_dict, require_no_overflow, require_same_function

__all__ = ['register', 'unregister']  # register_model adds the models

GEOMETRY = 'style', 'strides', 'dilations', 'dilate_first', 'deformable', 'stem_ceil_mode'  # of Res2Net only
FEATURE_CLASSES = {'list': FeatureList, 'dict': FeatureDict, 'hook': FeatureHook, 'getter': FeatureGetter}

with_weights = {name.split('.')[0] for name in WEIGHTS}
cfgs: dict[str, dict[str, Any] | PretrainedCfg] = {
    **{name: default_cfg(name.split('.')[0], **weights.cfg) for name, weights in WEIGHTS.items()},
    **{name: default_cfg(name) for name in ARCHS if name not in with_weights},
}
default_cfgs = generate_default_cfgs(cfgs)  # timm's registry takes the configurations from this name


def create(name: str, pretrained: bool = False, block_args: dict[str, Any] | None = None, **kwargs: Any) -> nn.Module:
    """Makes a model of the family.

    Args:
        name: Key of `ARCHS`.
        pretrained: Load weights.
        block_args: More keyword arguments; timm's name for those that concern the blocks.
        **kwargs: Arguments of the trunk, which override those of `ARCHS`, and of timm's `build_model_with_cfg`.

    Raises:
        TypeError: For an argument that the trunk doesn't know or that is given twice.
        ValueError: For an argument that the trunk doesn't support, or weights that don't fit it.
        ConnectionError: If weights can't be downloaded.
        HfHubHTTPError: If the Hub refuses them.
    """
    arch = ARCHS[name]
    kwargs = normalise_arguments(name, kwargs, block_args or {})
    trunk: Callable[..., nn.Module] = arch.trunk
    if pretrained:
        cfg = resolve_pretrained_cfg(name, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        of_weights = function_of_weights(arch, cfg, kwargs)
        checkpoint = read_weights(cfg, kwargs.get('cache_dir'))
        if checkpoint is not None:
            strict = kwargs.get('pretrained_strict', True)
            features = kwargs.get('features_only', False)
            trunk = partial(loaded_trunk, arch.trunk, cfg, checkpoint, of_weights, strict, features)
            pretrained = False
    return build_model_with_cfg(
        trunk,
        name,
        pretrained,
        feature_cfg=dict(out_indices=arch.out_indices),
        pretrained_filter_fn=adapt_state_dict,
        **{**arch.args, **kwargs},
    )


def normalise_arguments(name: str, kwargs: dict[str, Any], block_args: dict[str, Any]) -> dict[str, Any]:
    """Merges both kinds of arguments, drops `output_stride=None`, and checks and replaces those of `features_only`."""
    if twice := sorted(kwargs.keys() & block_args.keys()):
        raise TypeError(f'{name} got {", ".join(twice)} both by keyword and in block_args; give it once')
    kwargs = {**kwargs, **block_args}
    if ARCHS[name].trunk is not Res2Net and (given := [key for key in GEOMETRY if key in kwargs]):
        raise ValueError(f'{name} has no {given[0]}: its {ARCHS[name].trunk.__name__} has one geometry only')
    if kwargs.get('output_stride', 32) is None:  # what transformers passes for the default
        del kwargs['output_stride']
    if kwargs.get('features_only'):
        tap = kwargs.get('tap_layer2', False)
        count = ARCHS[name].features + tap
        require_features(name, kwargs.get('out_indices'), count)
        if tap:  # one more than the default takes
            kwargs.setdefault('out_indices', tuple(range(count)))
        feature_cls = kwargs.get('feature_cls', 'list')
        kwargs['feature_cls'] = FEATURE_CLASSES.get(feature_cls, feature_cls)
    return kwargs


def require_features(name: str, out_indices: int | Sequence[int] | None, count: int) -> None:
    """Raises a ValueError for other features than a model's `count`; an int means that many of the last ones."""
    indices = range(-out_indices, 0) if isinstance(out_indices, int) else out_indices or ()
    if not all(-count <= index < count for index in indices):
        raise ValueError(
            f'out_indices={out_indices!r} goes beyond the features of {name}: it has {count}, 0 to {count - 1} or, '
            f'from the end, -{count} to -1'
        )


def function_of_weights(arch: Arch, cfg: PretrainedCfg, kwargs: dict[str, Any]) -> Function | None:
    """What published weights mean, None for other weights, of which their file tells.

    Raises:
        ValueError: If the model that is asked for would compute something else.
    """
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    if overlay.keys() & {'url', 'file', 'hf_hub_id', 'state_dict'}:
        return None
    saved = kwargs.get('pretrained_model_args') or {}
    of_weights, wanted = (Function.from_arguments({**arch.args, **args}) for args in (saved, kwargs))
    if fields := of_weights.differing_fields(wanted):
        raise ValueError(
            f'{" ".join(filter(None, ("weights", cfg.tag)))} of {cfg.architecture} are of a network with '
            f'{of_weights.as_keywords(fields)} and would compute something else with {wanted.as_keywords(fields)}. '
            'Leave that out. To start from them all the same, make the model without pretrained=True and give it the '
            'state_dict() of one that has them'
        )
    return of_weights


def read_weights(cfg: PretrainedCfg, cache_dir: str | Path | None) -> Checkpoint | None:
    """Reads weights that are in a file, at a URL, in a folder or on the Hub; None for what timm reads by itself.

    timm keeps a partial file after a broken connection, and maps safetensors: a file that becomes shorter meanwhile
    ends the process.
    """
    if cfg.state_dict:
        return None
    if cfg.source == 'local-dir':
        path = Path(str(cfg.file), WEIGHTS_FILE)
        return read_checkpoint(path) if path.is_file() else None
    if cfg.hf_hub_id and (cfg.source == 'hf-hub' or not cfg.file):
        found = bring_file(cfg.hf_hub_id, cfg.hf_hub_filename or WEIGHTS_FILE, cache_dir)
        return None if found is None else replace(read_checkpoint(found), file=f'{found.name} of {cfg.hf_hub_id}')
    if cfg.file:
        return read_checkpoint(cfg.file)
    if not isinstance(cfg.url, str):
        return None
    url = cfg.url
    folder = cache_dir or Path(torch.hub.get_dir(), 'checkpoints')
    return download(url, folder, lambda path: replace(read_checkpoint(path), file=url))


def loaded_trunk(
    trunk: type[nn.Module],
    cfg: PretrainedCfg,
    checkpoint: Checkpoint,
    of_weights: Function | None,
    strict: bool,
    features: bool,
    **kwargs: Any,
) -> nn.Module:
    """Makes a trunk and loads a checkpoint; timm adapts the classifier and the number of image channels.

    A trunk for features keeps its own classifier, which timm removes after that, and the checkpoint need not have one.
    """
    model: Any = trunk(**kwargs)
    function = of_weights or function_of(model)
    if function and not checkpoint.translation.is_part:  # who gives the file of a lone network knows what it computes
        checkpoint = checkpoint.stating(**{name: getattr(function, name) for name in checkpoint.assumed})
    require_same_function(model, checkpoint)
    own = {name: tensor for name, tensor in model.state_dict().items() if features and name.startswith('fc.')}
    source = {**cfg.to_dict(), 'source': '', 'state_dict': {**checkpoint.state, **own}, 'custom_load': False}
    load_pretrained(model, source, num_classes=model.num_classes, in_chans=model.in_chans, strict=strict)
    require_no_overflow(model, checkpoint.file)
    return model


def entrypoint(name: str, arch: Arch) -> Callable[..., nn.Module]:
    """Makes the function that timm registers for an architecture."""

    def fn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(name, pretrained, **kwargs)

    args = ', '.join(f'{key}={value!r}' for key, value in arch.args.items())
    fn.__name__ = fn.__qualname__ = name
    fn.__doc__ = f'Makes {name}: {arch.trunk.__name__}({args}).'
    return fn


for name, arch in ARCHS.items():
    globals()[name] = entrypoint(name, arch)


def register() -> None:
    """Registers the family with timm, in the place of timm's own models of the same names. Importing does this."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # timm warns of each name that it has already; taking it over is the purpose
        for name in ARCHS:
            register_model(globals()[name])


def timm_entrypoint(name: str) -> Callable[..., nn.Module] | None:
    """The function by which timm makes its own model of that name, None if it has none."""
    return getattr(timm.models.res2net, name, None) or getattr(timm.models.dla, name, None)


def unregister() -> None:
    """Gives timm its own models back and removes the others from its registry."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name in ARCHS:
            if own := timm_entrypoint(name):
                register_model(own)
            elif timm_registry.is_model(name):  # timm has no public way to remove a model
                timm_registry._clear_model_entries(name)
                del timm_registry._model_entrypoints[name]


register()
