"""Makes the models of the family and registers them with timm.

This file is neither in models/ nor in weights/ because making a pretrained model takes both. Its name matters: timm
names a module after the file that registers it, so `timm.list_models(module='res2net')` lists the family.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import timm.models.dla
import timm.models.res2net
import torch
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models import _registry as timm_registry
from torch import Tensor, nn

from .hub.pull import fetch_file
from .models.cifar import Res2NetCifar
from .models.classifier import registered_cfg
from .models.recompute import FeatureDict, FeatureGetter, FeatureHook, FeatureList
from .models.resnet import Res2Net
from .models.spec import NetworkSpec
from .models.variants import ARCHS, WEIGHTS, Arch, default_cfg
from .weights.checkpoints import Checkpoint, read_checkpoint
from .weights.config import WEIGHTS_FILE
from .weights.download import download
from .weights.loading import adapt_state_dict, require_no_overflow, require_same_spec

__all__ = ['register', 'unregister']  # register_model adds the models

GEOMETRY = 'style', 'strides', 'dilations', 'dilate_first', 'deformable', 'stem_ceil_mode'  # of Res2Net only
source_of = attrgetter('url', 'file', 'hf_hub_id', 'state_dict')  # of timm's configuration
FEATURE_CLASSES = {'list': FeatureList, 'dict': FeatureDict, 'hook': FeatureHook, 'getter': FeatureGetter}

with_weights = {name.split('.')[0] for name in WEIGHTS}
cfgs: dict[str, dict[str, Any] | PretrainedCfg] = {
    **{name: default_cfg(name.split('.')[0], **weights.cfg) for name, weights in WEIGHTS.items()},
    **{name: default_cfg(name) for name in ARCHS if name not in with_weights},
}
default_cfgs = generate_default_cfgs(cfgs)  # timm's registry looks for this name


def create(name: str, pretrained: bool = False, block_args: dict[str, Any] | None = None, **kwargs: Any) -> nn.Module:
    """Makes a model of the family. timm passes `block_args` to the blocks; here they are merged into `kwargs`."""
    arch = ARCHS[name]
    kwargs = normalize_arguments(name, kwargs, block_args or {})
    options: dict[str, Any] = dict(
        feature_cfg=dict(out_indices=arch.out_indices), pretrained_filter_fn=adapt_state_dict
    )
    checkpoint = None
    if pretrained:
        cfg = resolve_pretrained_cfg(name, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        spec = require_published_spec(arch, cfg, kwargs)
        checkpoint = read_weights(cfg, kwargs.get('cache_dir'))
    if checkpoint is None:
        return build_model_with_cfg(arch.trunk, name, pretrained, **options, **{**arch.args, **kwargs})
    if not checkpoint.is_part:  # what the file leaves open is assumed to be as in the model
        spec = spec or NetworkSpec.from_arguments({**arch.args, **kwargs})
        checkpoint = checkpoint.with_spec(**{field: getattr(spec, field) for field in checkpoint.assumed})
    # timm loads the checkpoint's tensors, and adapts them to other channels and classes.
    source = {**cfg.to_dict(), 'source': '', 'custom_load': False, 'state_dict': dict(checkpoint.state)}
    kwargs.update(pretrained_cfg=PretrainedCfg(**source), pretrained_cfg_overlay=None)
    options['pretrained_filter_fn'] = require_backbone if kwargs.get('pretrained_strict', True) else None
    model: Any = build_model_with_cfg(arch.trunk, name, True, **options, **{**arch.args, **kwargs})
    require_same_spec(model, checkpoint)
    require_no_overflow(model, checkpoint.file)
    model.pretrained_cfg.update(source=cfg.source, custom_load=cfg.custom_load)
    for each in (model, getattr(model, 'model', model)):  # timm's FeatureGetterNet copies the configuration
        each.pretrained_cfg.pop('state_dict', None)
    return model


def normalize_arguments(name: str, kwargs: dict[str, Any], block_args: dict[str, Any]) -> dict[str, Any]:
    """Merges `block_args` into `kwargs`, drops `output_stride=None`, and checks those of `features_only`."""
    if twice := sorted(kwargs.keys() & block_args.keys()):
        raise TypeError(f'{name} got {", ".join(twice)} both as a keyword and in block_args. Pass it once.')
    kwargs = {**kwargs, **block_args}
    if ARCHS[name].trunk is not Res2Net and (given := [key for key in GEOMETRY if key in kwargs]):
        raise ValueError(f'{name} does not support {given[0]}: the geometry of {ARCHS[name].trunk.__name__} is fixed')
    if kwargs.get('output_stride', 32) is None:  # transformers passes None for the default
        del kwargs['output_stride']
    feature_cfg = kwargs.pop('feature_cfg', None) or {}  # timm takes the arguments of features_only from here, too
    if kwargs.get('features_only'):
        kwargs = {**feature_cfg, **kwargs}
        require_features(name, kwargs.get('out_indices'), ARCHS[name].out_indices[-1] + 1)
        feature_cls = kwargs.get('feature_cls', 'list')
        kwargs['feature_cls'] = FEATURE_CLASSES.get(feature_cls, feature_cls)
    return kwargs


def require_features(name: str, out_indices: int | Sequence[int] | None, count: int) -> None:
    """Raises ValueError if indices are not among the `count` features of a model; an int n means the last n."""
    indices = range(-out_indices, 0) if isinstance(out_indices, int) else () if out_indices is None else out_indices
    if not all(-count <= index < count for index in indices):
        raise ValueError(
            f'out_indices={out_indices!r} is out of range: {name} has {count} features, '
            f'0 to {count - 1} or, from the end, -{count} to -1'
        )


def require_published_spec(arch: Arch, cfg: PretrainedCfg, kwargs: dict[str, Any]) -> NetworkSpec | None:
    """Returns the spec of published weights, None for others; ValueError if the model would compute something else."""
    names = [key for key in (*WEIGHTS, *ARCHS) if key.partition('.')[0] == cfg.architecture]
    is_published = source_of(cfg) in [source_of(registered_cfg(key)) for key in names]
    if not is_published and cfg.source not in ('hf-hub', 'local-dir'):
        return None
    saved = kwargs.get('pretrained_model_args') or {}
    published, wanted = (NetworkSpec.from_arguments({**arch.args, **args}) for args in (saved, kwargs))
    if fields := published.differing_fields(wanted):
        raise ValueError(
            f'cannot load weights {cfg.tag or ""} of {cfg.architecture}: they need {published.as_keywords(fields)} and '
            f'would compute something else with {wanted.as_keywords(fields)}. To start from them anyway, load their '
            'state_dict() into a model made without pretrained=True.'
        )
    return published


def read_weights(cfg: PretrainedCfg, cache_dir: str | Path | None) -> Checkpoint | None:
    """Reads weights from a file, a URL, a folder or the Hub; returns None if reading is left to timm.

    timm's reader is the last resort: it keeps a partial file when a connection breaks, and crashes if a safetensors
    file shrinks while it is read.
    """
    if cfg.state_dict:
        return None
    if cfg.source == 'local-dir':
        path = Path(str(cfg.file), WEIGHTS_FILE)
        return read_checkpoint(path) if path.is_file() else None
    if cfg.hf_hub_id and (cfg.source == 'hf-hub' or not cfg.file):
        found = fetch_file(cfg.hf_hub_id, cfg.hf_hub_filename or WEIGHTS_FILE, cache_dir)
        return None if found is None else replace(read_checkpoint(found), file=f'{found.name} of {cfg.hf_hub_id}')
    if cfg.file:
        return read_checkpoint(cfg.file)
    if not isinstance(cfg.url, str):
        return None
    url = cfg.url
    folder = cache_dir or Path(torch.hub.get_dir(), 'checkpoints')
    return download(url, folder, lambda path: replace(read_checkpoint(path), file=url))


def require_backbone(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's `pretrained_filter_fn`: RuntimeError if the tensors of the backbone are not those of the model.

    timm itself ignores differences when it replaces or removes the classifier.
    """
    wanted = model.state_dict()
    differing = {'Missing': wanted.keys() - state.keys(), 'Unexpected': state.keys() - wanted.keys()}
    for kind, names in differing.items():
        if others := sorted(name for name in names if not name.startswith('fc.')):
            raise RuntimeError(f'{kind} key(s) in state_dict: {", ".join(map(repr, others))}')
    return state


def entrypoint(name: str, arch: Arch) -> Callable[..., nn.Module]:
    """Makes the function that timm registers for an architecture."""

    def fn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(name, pretrained, **kwargs)

    args = ', '.join(f'{key}={value!r}' for key, value in arch.args.items())
    size = 32 if arch.trunk is Res2NetCifar else 224
    cost = f'{arch.params / 1e6:.1f} M parameters, {arch.gmacs:.1f} G multiply-adds'
    fn.__name__ = fn.__qualname__ = name
    fn.__doc__ = f"""Makes {name}: {cost} at {size} pixels.

    The network is `{arch.trunk.__name__}({args})`.

    Args:
        pretrained: Load weights, those of the tag if the model name has one. They are listed by
            `timm.list_models('{name}.*', pretrained=True)`.
        **kwargs: Arguments of `{arch.trunk.__name__}`, which override the ones above: `num_classes`, `in_chans`,
            `output_stride`, `drop_path_rate` and others; and of timm's `build_model_with_cfg`, such as `features_only`.

    Example:
        >>> model = timm.create_model('{name}', num_classes=10).eval()
        >>> model(torch.randn(1, 3, {size}, {size})).shape
        torch.Size([1, 10])
    """
    return fn


globals().update({name: entrypoint(name, arch) for name, arch in ARCHS.items()})


def register() -> None:
    """Registers the family with timm, replacing timm's models of the same names. Importing the package does this."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # timm warns about names that it already has; we replace them on purpose
        for name in ARCHS:
            register_model(globals()[name])
            if own := timm_entrypoint(name):  # so that `timm.list_models(module='dla')` still lists the name
                timm_registry._module_to_models[own.__module__.rpartition('.')[2]].add(name)


def timm_entrypoint(name: str) -> Callable[..., nn.Module] | None:
    """Returns the function that makes timm's own model of this name, or None if timm has none."""
    return getattr(timm.models.res2net, name, None) or getattr(timm.models.dla, name, None)


def unregister() -> None:
    """Restores timm's own models and removes the rest of the family from timm's registry."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name in ARCHS:
            if own := timm_entrypoint(name):
                register_model(own)
            elif timm_registry.is_model(name):  # timm has no public way to remove a model
                timm_registry._clear_model_entries(name)
                del timm_registry._model_entrypoints[name]


register()
