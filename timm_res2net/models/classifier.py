"""The static type of the family's models, whatever their trunk."""

from collections.abc import Callable, Mapping
from typing import Any, cast

from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.layers import SelectAdaptivePool2d
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn

from .trunk import FeatureInfo

__all__ = [
    'Classifier',
    'as_classifier',
    'class_names',
    'image_config',
    'model_name',
    'not_finite',
    'registered_cfg',
    'require_finite_weights',
    'with_channels',
]


class Classifier(nn.Module):
    """What this package asks of a model. Only for type checkers: `Res2Net` and `Trunk` have all this by themselves."""

    num_classes: int
    in_chans: int
    num_features: int
    pretrained_cfg: dict[str, Any]
    feature_info: list[FeatureInfo]
    global_pool: SelectAdaptivePool2d
    forward_features: Callable[[Tensor], Tensor]
    forward_head: Callable[[Tensor], Tensor]
    forward_intermediates: Callable[..., Any]
    get_classifier: Callable[[], nn.Module]


def as_classifier(model: nn.Module) -> Classifier:
    """Returns the model under its static type.

    Raises:
        TypeError: If it is not a classification model as timm makes them.
    """
    lacking = [name for name in ('num_classes', 'pretrained_cfg', 'forward_head') if not hasattr(model, name)]
    if lacking:
        raise TypeError(
            f'a {type(model).__name__} is no classification model: it has no {lacking[0]}. '
            'Give a model of this package, as create_model made it'
        )
    return cast(Classifier, model)


def model_name(model: nn.Module) -> str:
    """The name under which a model is registered, or its class if it has none."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    return str(cfg.get('architecture') or type(model).__name__)


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """The names of those tensors that have NaN or infinity in them; one on the meta device has nothing in it."""
    known = {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and not tensor.is_meta}
    return [name for name, tensor in known.items() if not tensor.float().isfinite().all()]


def require_finite_weights(model: nn.Module) -> None:
    """Raises a ValueError for weights that are not all there, or not all finite."""
    state = model.state_dict()
    if absent := [name for name, tensor in state.items() if tensor.is_meta]:
        raise ValueError(f'{len(absent)} of the tensors are on the meta device, without values (first: {absent[0]})')
    if bad := not_finite(state):
        raise ValueError(f'{len(bad)} of the tensors have NaN or infinity in them (first: {bad[0]})')


def registered_cfg(name: str) -> PretrainedCfg:
    """timm's configuration of a registered model or of one of its sets of weights.

    Raises:
        RuntimeError: If there are no such weights.
    """
    cfg = get_pretrained_cfg(name)
    assert cfg is not None  # every model of the family, and of timm, has one
    return cfg


def with_channels(cfg: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """timm's configuration for images of so many channels.

    timm's own has three means and deviations whatever `in_chans` is, and can't normalise other images then. If they are
    not as many as channels, each channel gets their mean.
    """
    fitted = {**cfg, 'input_size': (channels, *cfg['input_size'][1:])}
    for key in ('mean', 'std'):
        values = cfg.get(key) or ()
        if len(values) not in (0, channels):
            fitted[key] = (sum(values) / len(values),) * channels
    return fitted


def image_config(model: nn.Module, channels: int | None = None) -> dict[str, Any]:
    """timm's configuration of a model's images, for images in files.

    Args:
        model: The model.
        channels: Of its images; those that it says itself if None.

    Raises:
        ValueError: If these are not three, or one, for which an image is read as grey.
    """
    config = resolve_model_data_config(model)
    channels = channels or getattr(model, 'in_chans', config['input_size'][0])
    if channels not in (1, 3):
        raise ValueError(
            f'{model_name(model)} takes images of {channels} channels, and files have 3, or 1 if read as grey; '
            'give it tensors'
        )
    return with_channels(config, channels)


def class_names(model: nn.Module) -> list[str]:
    """Names of a model's classes: its own, ImageNet's if it has as many, else just numbers."""
    net = cast(Classifier, model)
    num_classes, names = net.num_classes, net.pretrained_cfg.get('label_names')
    if names and len(names) == num_classes:
        return list(names)
    subset = infer_imagenet_subset(model)
    if subset is None:
        return [f'class {index}' for index in range(num_classes)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(index) for index in range(num_classes)]
