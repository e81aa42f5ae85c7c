"""What a file of weights tells of its training: how images are prepared, and the names of the classes."""

import json
import logging
import math
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.data import create_transform, get_img_extensions, resolve_data_config
from timm.utils import natural_key
from torch import Tensor

from ..models.classifier import registered_cfg
from ..models.variants import ARCHS
from .errors import first_line, printable
from .files import PathLike, read_text, sha256
from .folder import CONFIG_FILE, LARGEST_CONFIG, WEIGHTS_FILE
from .readers import Contents

__all__ = ['IMAGES', 'Training', 'read_labels', 'recorded_training']

_logger = logging.getLogger(__name__)

IMAGES = 'input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode'
# An image is resized to its size divided by crop_pct, then cropped: a small file can state what takes all memory.
LARGEST_SIZE, SMALLEST_CROP, LARGEST_CROP = 4096, 0.5, 2
INTERPOLATIONS = 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos'  # that timm knows
CROP_MODES = 'center', 'squash', 'border'  # timm takes any other text for the first


@dataclass(frozen=True)
class Training:
    """How images are prepared, what classes are called, and what a push recorded; empty where that is not known."""

    images: Mapping[str, Any] = field(default_factory=dict)  # some of `IMAGES`, as in timm's configuration of weights
    labels: tuple[str, ...] = ()
    labels_from: str = ''
    record: Mapping[str, Any] = field(default_factory=dict)  # results, licence and others, as `push` takes them


def recorded_training(contents: Contents, file: PathLike, num_classes: int, config: Mapping[str, Any]) -> Training:
    """What timm's train script recorded in a file, or else the configuration beside it.

    The train script names the data folder; class names are those of its folders, if it is on this machine.
    """
    args = contents.nested.get('args')
    args = vars(args) if isinstance(args, Namespace) else args
    if isinstance(args, Mapping):
        labels, source = labels_of_data(args, num_classes)
        return Training(images_of_training(contents.nested.get('arch'), args, str(file)), labels, source)
    config_file = Path(file).with_name(CONFIG_FILE)
    if 'pretrained_cfg' not in config:  # of other code
        return Training()
    try:
        images = images_of_config(config['pretrained_cfg'], config_file)
        names = config.get('label_names') or ()
        labels = tuple(map(str, names)) if isinstance(names, list) and len(names) == num_classes else ()
        record = record_of_weights(file, config)
    except Exception as error:  # whatever an unknown configuration makes timm raise
        _logger.warning('%s is not used: %s', printable(config_file), first_line(error))
        return Training()
    return Training(images, labels, str(config_file) if labels else '', record)


def record_of_weights(file: PathLike, config: Mapping[str, Any]) -> dict[str, Any]:
    """What this package recorded of weights in the configuration beside them; nothing if it was of other weights."""
    record = config.get('timm_res2net')
    if not isinstance(record, dict) or 'sha256' not in record or record['sha256'] != sha256(file):
        return {}
    return {'tag': config['pretrained_cfg'].get('tag'), **record}


def config_beside(file: PathLike) -> dict[str, Any]:
    """The configuration beside a `model.safetensors`, as timm and transformers write it; empty if there is none."""
    config_file = Path(file).with_name(CONFIG_FILE)
    if Path(file).name != WEIGHTS_FILE or not config_file.is_file():
        return {}
    try:
        if config_file.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f'it has more than {LARGEST_CONFIG:,} bytes')
        config = json.loads(read_text(config_file))
    except (ValueError, OSError, RecursionError) as error:
        _logger.warning('%s is not used: %s', printable(config_file), first_line(error))
        return {}
    return config if isinstance(config, dict) else {}


def images_of_training(arch: object, args: Mapping[str, Any], file: str) -> dict[str, Any]:
    """How timm's train script prepared images to validate: as its arguments say, else as is usual for the model."""
    name = str(arch)
    known = name.partition('.')[0] in ARCHS
    try:
        cfg: dict[str, Any] = registered_cfg(name).to_dict() if known else {}
    except RuntimeError:  # a tag that is gone
        cfg = registered_cfg(name.partition('.')[0]).to_dict()
    channels = args.get('in_chans')
    fits = isinstance(channels, int) and 1 <= channels <= LARGEST_SIZE  # timm repeats a single mean as often

    def resolve(some: Mapping[str, Any]) -> dict[str, Any]:
        resolved: dict[str, Any] = resolve_data_config({'in_chans': channels if fits else None, **some}, cfg)
        return resolved

    good = good_images(args, ('img_size', *IMAGES), resolve, file)
    if not known and not good:
        return {}
    images = checked_images(resolve(good))
    stated = {'input_size', *good} if 'img_size' in good else {*good}
    return {key: value for key, value in images.items() if known or key in stated}


def images_of_config(cfg: Mapping[str, Any], file: PathLike) -> dict[str, Any]:
    """How timm prepares images by its configuration of weights, without what is not possible in that."""

    def resolve(some: Mapping[str, Any]) -> dict[str, Any]:
        resolved: dict[str, Any] = resolve_data_config({'in_chans': None}, some)
        return resolved

    good = good_images(cfg, IMAGES, resolve, file)
    images = checked_images(resolve(good))
    return {key: value for key, value in images.items() if key in good or not cfg.get(key)}


def good_images(
    stated: Mapping[str, Any], keys: Iterable[str], resolve: Callable[[dict[str, Any]], dict[str, Any]], file: PathLike
) -> dict[str, Any]:
    """Those settings of images that are possible, each with the ones before it; a warning names each other one."""
    good: dict[str, Any] = {}
    for key in keys:
        value = stated.get(key)
        if isinstance(value, Tensor) or not value:
            continue
        try:
            checked_images(resolve({**good, key: value}))
        except Exception as error:  # whatever values of another script make timm raise
            _logger.warning('%s of the images in %s is not used: %s', key, printable(file), first_line(error))
        else:
            good[key] = value
    return good


def checked_images(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values with their types, after timm has made a transform of them; an error for what is not possible."""
    images: dict[str, Any] = dict(
        input_size=tuple(int(size) for size in config['input_size']),
        interpolation=str(config['interpolation']),
        mean=tuple(float(value) for value in config['mean']),
        std=tuple(float(value) for value in config['std']),
        crop_pct=float(config['crop_pct']),
        crop_mode=str(config['crop_mode']),
    )
    channels, height, width = images['input_size']
    possible = (
        min(channels, height, width) >= 1
        and max(channels, height, width) <= LARGEST_SIZE
        and SMALLEST_CROP <= images['crop_pct'] <= LARGEST_CROP
        and 0 <= min(images['mean']) <= max(images['mean']) < math.inf
        and 0 < min(images['std']) <= max(images['std']) < math.inf
        and images['interpolation'] in INTERPOLATIONS
        and images['crop_mode'] in CROP_MODES
    )
    if not possible:
        raise ValueError(
            f'{images} are no settings of images: sizes are from 1 to {LARGEST_SIZE}, crop_pct is from {SMALLEST_CROP} '
            f'to {LARGEST_CROP}, mean is not negative, std is positive, interpolation is one of '
            f'{", ".join(INTERPOLATIONS)}, and crop_mode one of {", ".join(CROP_MODES)}'
        )
    create_transform(**images)
    return images


def labels_of_data(args: Mapping[str, Any], num_classes: int) -> tuple[tuple[str, ...], str]:
    """Names of the classes, from the data that the arguments of timm's train script name, and where they are from."""
    folder, class_map = args.get('data_dir') or args.get('data'), args.get('class_map')
    if args.get('dataset') or not isinstance(folder, str):  # a dataset of another kind than a folder of images
        return (), ''
    if not os.path.isdir(folder):  # never opened: a stranger's file can name a pipe without end, or a device
        _logger.info('the classes have no names: %s is no folder here', printable(folder))
        return (), ''
    sources = [folder]
    if isinstance(class_map, str) and class_map:
        paths = (path for path in (class_map, os.path.join(folder, class_map)) if os.path.isfile(path))
        sources = [path for path in paths if path.endswith('.txt')][:1]
    for source in sources:
        try:
            folders = read_labels(folder)
            labels = folders if source == folder else read_labels(source)
        except ValueError as error:
            _logger.info('the classes have no names: %s', first_line(error))
        else:
            # A stranger's file can name any folder and text of whoever reads it, and a push publishes what comes of
            # that. So a text tells no more than the order of folders, as it does in timm, which has no images of other
            # lines; and of folders only the names are taken, of those that have images, if as many as the classes.
            if not {*labels} <= {*folders}:
                shown = printable(source), printable(folder)
                _logger.info('%s is no class map: not all of its lines are names of folders in %s', *shown)
            elif len(labels) == num_classes:
                return tuple(labels), source
            else:
                _logger.info('%s has %d classes and the weights have %d', printable(source), len(labels), num_classes)
    return (), ''


def read_labels(path: str) -> list[str]:
    """Reads names of classes from a text file, a line each, or a folder of data, a folder each in timm's order.

    Raises:
        ValueError: If it can't be read.
    """
    if not os.path.isdir(path):
        return [line.strip() for line in read_text(path).splitlines() if line.strip()]
    root = next((Path(path, part) for part in ('train', 'training') if Path(path, part).is_dir()), Path(path))
    suffixes = set(get_img_extensions())
    try:
        folders = [each for each in root.iterdir() if each.is_dir()]
        names = [each.name for each in folders if any(file.suffix.lower() in suffixes for file in each.iterdir())]
    except OSError as error:
        raise ValueError(f'{path} can not be read: {error.strerror}') from error
    return sorted(names, key=natural_key)
