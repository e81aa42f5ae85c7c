"""Classifiers as timm makes them: their static type, name, classes, and image settings."""

from collections.abc import Callable, Mapping
from typing import Any, cast

from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.layers import SelectAdaptivePool2d
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn


class Classifier(nn.Module):
    """The attributes of models that this package uses, for type checkers only."""

    num_classes: int
    in_chans: int
    num_features: int
    pretrained_cfg: dict[str, Any]
    feature_info: list[dict[str, Any]]
    global_pool: SelectAdaptivePool2d
    forward_features: Callable[[Tensor], Tensor]
    forward_head: Callable[[Tensor], Tensor]
    forward_intermediates: Callable[..., Any]
    get_classifier: Callable[[], nn.Module]


def as_classifier(model: nn.Module) -> Classifier:
    """Casts a model to its static type; TypeError if timm did not make it as a classifier."""
    lacking = [name for name in ('num_classes', 'pretrained_cfg', 'forward_head') if not hasattr(model, name)]
    if lacking:
        raise TypeError(
            f'{type(model).__name__} is not a classification model: it has no {lacking[0]!r}. '
            'Pass a model made by timm.create_model.'
        )
    return cast(Classifier, model)


def model_name(model: nn.Module) -> str:
    """Returns the name under which a model is registered, or the name of its class."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    return str(cfg.get('architecture') or type(model).__name__)


def registered_cfg(name: str) -> PretrainedCfg:
    """Returns timm's configuration of a registered model or set of weights; RuntimeError if there is none."""
    cfg = get_pretrained_cfg(name)
    assert cfg is not None  # every registered model has one
    return cfg


def class_names(model: nn.Module) -> list[str]:
    """Returns the class names of a model: its own, else those of the ImageNet subset of that size, else numbers."""
    net = cast(Classifier, model)
    num_classes, names = net.num_classes, net.pretrained_cfg.get('label_names')
    if names and len(names) == num_classes:
        return list(names)
    subset = infer_imagenet_subset(model)
    if subset is None:
        return [f'class {index}' for index in range(num_classes)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(index) for index in range(num_classes)]


def with_channels(cfg: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Fits image settings to a number of channels.

    timm's settings have three means and deviations regardless of `in_chans`. Where these do not fit, every channel gets
    their average.
    """
    fitted = {**cfg, 'input_size': (channels, *cfg['input_size'][1:])}
    for key in ('mean', 'std'):
        values = cfg.get(key) or ()
        if len(values) not in (0, channels):
            fitted[key] = (sum(values) / len(values),) * channels
    return fitted


def image_config(model: nn.Module, channels: int | None = None) -> dict[str, Any]:
    """Returns the settings that prepare image files for a model of 1 or 3 channels, by default its `in_chans`."""
    config = resolve_model_data_config(model)
    channels = channels or getattr(model, 'in_chans', config['input_size'][0])
    if channels not in (1, 3):
        raise ValueError(
            f'{model_name(model)} takes images with {channels} channels, but image files have 3, or 1 in grayscale. '
            'Call it with tensors.'
        )
    return with_channels(config, channels)
