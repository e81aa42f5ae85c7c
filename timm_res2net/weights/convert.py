"""Converts other projects' weights files to folders for timm, and exports models' weights to other code bases."""

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._errors import UnknownModelError
from .._files import PathLike, atomic_write, sha256
from .._images import IMAGE_SETTINGS
from ..models.block import spec_of
from ..models.checks import require_finite_weights
from ..models.classifier import as_classifier, registered_cfg
from ..models.fold import FoldedNorm
from ..models.resnet import Res2Net
from ..models.variants import ARCHS, WEIGHTS, default_cfg
from .checkpoints import Checkpoint, read_checkpoint
from .config import RECORD, make_config, require_labels, require_no_model, write_folder
from .dialects import DIALECTS
from .loading import require_same_spec
from .matching import find_model, resnet_arguments
from .renaming import rename_for


@dataclass(frozen=True)
class Conversion:
    """A weights file converted to a folder that timm loads."""

    checkpoint: Checkpoint
    name: str  # name of the model
    args: dict[str, Any]  # that differ from the model's row in `ARCHS`
    config: dict[str, Any]  # content of config.json, including checksums
    folder: Path


def convert(
    file: PathLike,
    out: PathLike | None = None,
    *,
    model: str | None = None,
    dialect: str | None = None,
    prefix: str | None = None,
    weights_from: str | None = None,
    labels: Sequence[str] | None = None,
    dry_run: bool = False,
    **spec: Any,
) -> Conversion:
    """Converts a weights file to a folder that `timm.create_model('local-dir:OUT', pretrained=True)` loads.

    If `model` is None, finds it from the file. The folder `out` must not contain a model yet; by default, it is named
    after the file. `labels` replaces the recorded class names. The other arguments are those of `read_checkpoint`.
    """
    if model is not None and model not in ARCHS:
        raise UnknownModelError.among(model, ARCHS, ' in this package')
    checkpoint = read_checkpoint(file, dialect=dialect, prefix=prefix, weights_from=weights_from, **spec)
    folder = Path(out) if out is not None else folder_for(file)
    if not dry_run:
        require_no_model(folder)
    name, args, outline = find_model(checkpoint, model)
    network = as_classifier(outline)
    require_same_spec(network, checkpoint)
    if labels is not None:
        require_labels(labels, checkpoint.num_classes)
    origin = dict(file=Path(file).name, sha256=sha256(checkpoint.file), dialect=checkpoint.dialect)
    cfg = {**describe_weights(name, args, origin['file']), **checkpoint.images}
    config = make_config(network, name, args, cfg, labels or checkpoint.labels, converted_from=origin)
    if not dry_run:
        state = {key: checkpoint.state[key].contiguous() for key in network.state_dict()}
        write_folder(folder, state, config, checkpoint.spec)
    return Conversion(checkpoint, name, args, config, folder)


def describe_weights(name: str, args: dict[str, Any], file: str) -> dict[str, Any]:
    """Returns timm's configuration of the published weights with this file name, or else one without a license."""
    tags = [key for key in WEIGHTS if key.split('.')[0] == name and not args]
    published = [key for key in tags if Path(WEIGHTS[key].cfg.get('url', '')).name == file]
    if published:
        return dict(registered_cfg(published[0]).to_dict(remove_source=True))
    default = registered_cfg(name).to_dict()
    return {**default_cfg(name), **{key: default[key] for key in IMAGE_SETTINGS if key in default}}


def folder_for(file: PathLike) -> Path:
    """Returns the default folder for a converted file: the file's name without suffix and leading dots."""
    name = Path(file).stem.removesuffix('.pth').lstrip('.')  # 'x' for 'x.pth.tar'
    if not name:
        raise ValueError(f'cannot name a folder after {str(file)!r}. Pass out')
    return Path(name)


def export_checkpoint(model: nn.Module, file: PathLike, dialect: str) -> None:
    """Saves a model's weights for another code base, whose network then computes the same outputs.

    Args:
        model: A ResNet-hosted model of this package.
        file: File to write: `.pdparams` for PaddleClas, `.pth` for the others. The write is atomic.
        dialect: 'official' (the authors' code), 'mmpretrain', 'mmdet' or 'paddleclas'. A backbone for mmdet may have
            other strides and dilations, and deformable convolutions: repeat these in mmdet's configuration.

    Raises:
        ValueError: If that code base has no such network or would compute something else, or if weights are not
            finite or on the meta device.
        OSError: If the file cannot be written.

    Example:
        >>> model = timm.create_model('res2net50d', pretrained=True, num_classes=0, first_block='mmdet')
        >>> timm_res2net.export_checkpoint(model, 'mmdet.pth', 'mmdet')
    """
    if any(isinstance(module, FoldedNorm) for module in model.modules()):
        raise ValueError('cannot export a fused model: it has no norms left. Export the model it was made from')
    require_finite_weights(model)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    renamed = rename_for(dialect, state)
    if difference := describe_difference(model, dialect):
        raise ValueError(f'cannot export to {dialect}: the weights would load and compute something else. {difference}')
    spec = spec_of(model)
    assert spec is not None  # otherwise `rename_for` would have raised

    data = io.BytesIO()  # written later, as `torch.save` to a full disk does not raise an OSError
    if dialect == 'paddleclas':
        pickle.dump({name: tensor.numpy() for name, tensor in renamed.items()}, data, protocol=4)
    elif DIALECTS[dialect].prefix:
        torch.save({'state_dict': renamed, RECORD: spec.as_text()}, data)
    else:
        torch.save(renamed, data)
    atomic_write(file, lambda path: Path(path).write_bytes(data.getbuffer()))


def describe_difference(model: nn.Module, dialect: str) -> str:
    """Describes the first difference between a model and the network of another code base; '' if there is none.

    Compares them layer by layer, as strides, dilations, activations and pools have no tensors.
    """
    target, ours = DIALECTS[dialect], spec_of(model)
    theirs = target.detector_spec or target.spec
    assert ours is not None
    assert theirs is not None
    if len({*ours.deformable} - {None}) > 1:
        return f'Its network has one kind of deformable convolution, the model has deformable={ours.deformable}'
    spec = replace(theirs, **{field: getattr(ours, field) for field in target.options})
    if any(isinstance(dilation, tuple) for dilation in spec.dilations):
        return f'Its network has one dilation for all blocks of a stage, the model has dilations={ours.dilations}'
    if names := spec.differing_fields(ours):
        return f'Its network has {spec.as_keywords(names)}, the model has {ours.as_keywords(names)}'
    classes = getattr(model, 'num_classes', 0)
    fields = {field: value for field, value in vars(spec).items() if field != 'shortcut_root'}  # only for DLAs
    args = {**resnet_arguments(model.state_dict()), **fields}
    channels = next(iter(model.parameters())).shape[1]
    outline = Res2Net(**args, num_classes=classes, in_chans=channels, device='meta')
    ignored = 'drop_path', 'drop_block', *(() if classes else ('global_pool.pool', 'global_pool.flatten'))
    layers = {name: str(module) for name, module in model.named_modules() if not [*module.children()]}
    for name, module in outline.named_modules():
        if name in layers and layers[name] != str(module) and not name.endswith(ignored):
            return f'{name} is {module} there and {layers[name]} in the model'
    return ''
