"""Image settings of a model, in timm's form: size, crop, interpolation, mean and standard deviation."""

from collections.abc import Mapping
from typing import Any

from timm.data import resolve_model_data_config
from torch import nn

from .classifier import model_name


def with_channels(cfg: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Fits image settings to a number of channels.

    timm's settings have three means and deviations whatever `in_chans` is, and cannot normalize other images. If their
    number differs from the channels, every channel gets their average.
    """
    fitted = {**cfg, 'input_size': (channels, *cfg['input_size'][1:])}
    for key in ('mean', 'std'):
        values = cfg.get(key) or ()
        if len(values) not in (0, channels):
            fitted[key] = (sum(values) / len(values),) * channels
    return fitted


def image_config(model: nn.Module, channels: int | None = None) -> dict[str, Any]:
    """Returns the settings that prepare image files for a model with 1 or 3 channels, `in_chans` if None is given."""
    config = resolve_model_data_config(model)
    channels = channels or getattr(model, 'in_chans', config['input_size'][0])
    if channels not in (1, 3):
        raise ValueError(
            f'{model_name(model)} takes images of {channels} channels, but image files have 3, or 1 in grayscale. '
            'Call it with tensors.'
        )
    return with_channels(config, channels)
