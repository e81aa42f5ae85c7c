"""Converts files of weights: other people's to a folder for timm, a model's to a file for other people's code."""

import io
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..models.block import function_of
from ..models.classifier import as_classifier, registered_cfg, require_finite_weights
from ..models.fold import FoldedNorm
from ..models.function import Function
from ..models.variants import ARCHS, WEIGHTS, default_cfg
from .checkpoints import Checkpoint, read_checkpoint
from .dialects import DIALECTS, export
from .errors import UnknownModelError
from .files import PathLike, atomic_write, sha256
from .folder import make_config, require_no_model, write_folder
from .loading import find_architecture, require_same_function
from .recorded import IMAGES

__all__ = ['Conversion', 'convert', 'export_checkpoint', 'require_as_many_labels']


@dataclass(frozen=True)
class Conversion:
    """A file of weights converted to a folder that timm loads."""

    checkpoint: Checkpoint
    name: str  # of the model
    args: dict[str, Any]  # beyond those of its row in ARCHS
    config: dict[str, Any]  # with the checksums of both files
    folder: Path


def convert(
    file: PathLike,
    out: PathLike | None = None,
    *,
    model: str | None = None,
    dialect: str | None = None,
    prefix: str | None = None,
    labels: Sequence[str] | None = None,
    dry_run: bool = False,
    **function: Any,
) -> Conversion:
    """Converts a file of weights to a folder: `timm.create_model('local-dir:OUT', pretrained=True)` loads it.

    Args:
        file: See `read_checkpoint`.
        out: The folder, in which there must not be a model yet. Named after the file, in the current folder, if None.
        model: Name of the model. If None, the model that the file fits.
        dialect: See `read_checkpoint`.
        prefix: See `read_checkpoint`.
        labels: Names of the classes. Those that the file tells if None.
        dry_run: Write nothing.
        **function: See `read_checkpoint`.

    Raises:
        CheckpointError: If the file can't be read, fits no model, or is of a network whose function is not known.
        UnknownModelError: If there is no such model.
        ValueError: If the folder has a model already, or there are not as many labels as classes.
        OSError: If the folder can't be written.
    """
    if model is not None and model not in ARCHS:
        raise UnknownModelError.among(model, ARCHS, ' in this package')
    checkpoint = read_checkpoint(file, dialect=dialect, prefix=prefix, **function)
    folder = Path(out) if out is not None else folder_of(file)
    if not dry_run:
        require_no_model(folder)
    name, args = find_architecture(checkpoint, model)
    network = as_classifier(timm.create_model(name, device='meta', num_classes=checkpoint.num_classes, **args))
    require_same_function(network, checkpoint)
    origin = dict(file=Path(file).name, sha256=sha256(file), dialect=checkpoint.translation.dialect)
    tags = [key for key in WEIGHTS if key.split('.')[0] == name and not args]
    published = [key for key in tags if Path(WEIGHTS[key].cfg.get('url', '')).name == origin['file']]
    if published:
        cfg = registered_cfg(published[0]).to_dict(remove_source=True)
    else:  # images as in timm's configuration, which may be of weights whose licence and other properties these lack
        usual = registered_cfg(name).to_dict()
        cfg = {**default_cfg(name), **{key: usual[key] for key in IMAGES if key in usual}}
    if labels is not None:
        require_as_many_labels(labels, checkpoint.num_classes)
    names = labels or checkpoint.training.labels
    config = make_config(network, name, args, {**cfg, **checkpoint.training.images}, converted_from=origin)
    config.update({'label_names': list(names)} if names else {})
    if not dry_run:
        state = {key: checkpoint.state[key].contiguous() for key in network.state_dict()}
        write_folder(folder, state, config, checkpoint.function)
    return Conversion(checkpoint, name, args, config, folder)


def require_as_many_labels(labels: Sequence[str], num_classes: int) -> None:
    """Raises a ValueError unless there is a name for each class."""
    if len(labels) != num_classes:
        raise ValueError(f'labels has {len(labels)} names for {num_classes} classes')


def folder_of(file: PathLike) -> Path:
    """A folder in the current one with the name of a file, without its suffix and dots before it."""
    name = Path(file).stem.removesuffix('.pth').lstrip('.')  # x of x.pth.tar
    if not name:
        raise ValueError(f'{file} has no name that a folder could have; name one')
    return Path(name)


def export_checkpoint(model: nn.Module, file: PathLike, dialect: str) -> None:
    """Saves a model's weights for another code base, in whose networks they compute the same.

    Args:
        model: A ResNet-hosted model of this package.
        file: File to write, `.pdparams` for PaddleClas, `.pth` for the others. The write is atomic.
        dialect: 'official' (the authors' code), 'mmpretrain', 'mmdet' or 'paddleclas'. A backbone of mmdet may be
            strided, dilated and deformable, its configuration has to say how.

    Raises:
        ValueError: If that code base has no such network, or computes something else with it; or if weights are NaN
            or infinite, or on the meta device.
        OSError: If the file can't be written.
    """
    require_plain_resnet(model, dialect)
    require_finite_weights(model)
    exported = export({name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}, dialect)
    if reasons := export_obstacles(model, dialect):
        raise ValueError(
            f'the weights would load into {dialect} and compute something else there: {", ".join(reasons)}'
        )
    data = io.BytesIO()
    if dialect == 'paddleclas':
        pickle.dump({name: tensor.numpy() for name, tensor in exported.items()}, data, protocol=4)
    else:
        torch.save({'state_dict': exported} if DIALECTS[dialect].prefix else exported, data)
    atomic_write(file, lambda path: Path(path).write_bytes(data.getbuffer()))


def require_plain_resnet(model: nn.Module, dialect: str) -> None:
    """Raises a ValueError for a fused model, and for one with branches that networks of other code bases don't have."""
    if any(isinstance(module, FoldedNorm) for module in model.modules()):
        raise ValueError('a fused model has no norms left to export; export the model that it was made from')
    if branches := [name for name in model.state_dict() if re.match(r'layer\d\.(?!\d+\.)', name)]:
        raise ValueError(f'{dialect} has no place for {branches[0]}: its stages have one branch')


def export_obstacles(model: nn.Module, dialect: str) -> list[str]:
    """What a model computes differently from the networks of another code base that its weights would load into."""
    names = DIALECTS[dialect]
    theirs, ours = names.in_detector or names.function, function_of(model)
    assert theirs is not None  # as of all that can be exported to
    assert ours is not None  # or `export` would have found no Res2Net
    reasons = []
    if fields := [name for name in theirs.differing_fields(ours) if name not in names.options]:
        reasons.append(f'that computes {theirs.as_keywords(fields)} and the model {ours.as_keywords(fields)}')
    if len({*ours.deformable} - {None}) > 1:
        reasons.append('that has one kind of deformable convolution in all stages')
    if any(isinstance(dilation, tuple) for dilation in ours.dilations):
        reasons.append('that has one dilation in all blocks of a stage')
    if ours.dilations == Function.dilations:
        dilated = [name for name, conv in model.named_modules() if getattr(conv, 'dilation', 1) not in (1, (1, 1))]
        reasons += [f'{name} of the model is dilated' for name in dilated[:1]]  # by output_stride
    pool = getattr(getattr(model, 'global_pool', None), 'pool_type', 'avg')
    return reasons if pool in ('', 'avg') else [*reasons, f'its global_pool is {pool!r}']
