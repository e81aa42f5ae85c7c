"""Facts about weights that are recorded: in `config.json`, in a file's own metadata, or by a training script.

A folder with `config.json` and `model.safetensors` is how timm, transformers and the Hub store a model. Its content is
untrusted and checked before use: only arguments that the model's constructor has, with plain and bounded values.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.data import get_img_extensions, resolve_data_config
from timm.utils import natural_key
from torch import Tensor

from .._errors import CheckpointError, first_line, sanitize
from .._files import PathLike, open_regular, read_text, sha256, sync, temporary_folder
from .._images import check_image_settings
from ..models.classifier import Classifier, registered_cfg, with_channels
from ..models.spec import ARGUMENTS, NetworkSpec
from ..models.variants import ARCHS, Arch
from ..version import __version__
from .readers import RawFile

_logger = logging.getLogger(__name__)

WEIGHTS_FILE, CONFIG_FILE = 'model.safetensors', 'config.json'
RECORD = 'timm_res2net'  # the key of our own record
MAX_CONFIG = 5_000_000  # bytes
IMAGES = 'input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode'
# Numbers in `model_args`: a small file could describe a network that takes hours to make.
MAX_NUMBERS = {'layers': 200, 'levels': 8, 'scale': 64, 'num_classes': 1_000_000}
MAX_NUMBER, MAX_TEXT, MAX_ITEMS, MAX_DEPTH = 4096, 100, 64, 3
DATA_ARGUMENTS = 'img_size', *IMAGES  # of timm's train script


# Reading what is recorded


def read_config(folder: PathLike, source: str | None = None) -> dict[str, Any]:
    """Reads and checks a folder's `config.json`, which keeps unknown keys; messages call it `source`."""
    where = f'{CONFIG_FILE} of {source or folder}'
    try:
        with open_regular(Path(folder, CONFIG_FILE)) as file:
            content = file.read(MAX_CONFIG + 1)
        if len(content) > MAX_CONFIG:
            raise ValueError(f'it has more than {MAX_CONFIG:,} bytes')
        config = json.loads(content.decode('utf-8-sig'))
        if not isinstance(config, dict):
            raise ValueError(f'it holds a {type(config).__name__}, not a mapping')
        config = with_pretrained_cfg(config)
        if isinstance(config.get('architecture'), str) and config['architecture'] in ARCHS:
            check_config(config)
    except OSError as error:
        raise CheckpointError(f'cannot read {where}: {error.strerror or error}') from error
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f'cannot use {where}: {first_line(error)}') from error
    return config


def with_pretrained_cfg(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration in its present form; timm first wrote all keys in one mapping."""
    resaved = 'transformers_version' in config  # with other weights than those that our record is about
    record = {} if resaved else config.get(RECORD) or {}
    config = {**config, 'model_args': config.get('model_args') or {}, RECORD: record}
    cfg = config.get('pretrained_cfg') or {key: config[key] for key in config if key not in ('model_args', RECORD)}
    for key, value in (('model_args', config['model_args']), (RECORD, config[RECORD]), ('pretrained_cfg', cfg)):
        if not isinstance(value, dict):
            raise ValueError(f'{key} must be a mapping, got {sanitize(repr(value), 80)}')
    return {**config, 'pretrained_cfg': cfg}


def check_config(config: Mapping[str, Any]) -> None:
    """Raises ValueError for an impossible value; the message names its key."""
    arch, cfg, classes = ARCHS[config['architecture']], config['pretrained_cfg'], recorded_classes(config)
    check_model_args(arch, config['model_args'])
    check_image_settings(cfg)
    if classes is not None and not (type(classes) is int and 0 <= classes <= MAX_NUMBERS['num_classes']):
        raise ValueError(f'num_classes must be a number of classes, got {sanitize(repr(classes), 80)}')
    names = config.get('label_names') or cfg.get('label_names') or ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError('label_names must be a list of str')
    if names and classes is not None and len(names) != classes:
        raise ValueError(f'label_names has {len(names):,} names for {classes:,} classes')
    for key in ('first_conv', 'classifier'):  # timm skips the weights of the layers that these name
        own = getattr(registered_cfg(config['architecture']), key)
        if cfg.get(key) not in (None, own):
            raise ValueError(f'pretrained_cfg.{key} must be {own!r}, got {sanitize(repr(cfg[key]), 80)}')


def recorded_classes(config: Mapping[str, Any]) -> Any:
    """Returns the number of classes in a configuration, which has three places for it."""
    places = config, config['model_args'], config['pretrained_cfg']
    return next((place['num_classes'] for place in places if place.get('num_classes') is not None), None)


def check_model_args(arch: Arch, args: Mapping[str, Any]) -> None:
    """Raises ValueError for recorded arguments that the model's constructor lacks, or with impossible values."""
    allowed = {*arch.trunk.arguments()} - {*ARGUMENTS['placement']}
    for key, value in args.items():
        if key not in allowed:
            raise ValueError(f'model_args.{sanitize(key)} is not an argument of {arch.trunk.__name__}')
        largest = MAX_NUMBERS.get(key, MAX_NUMBER)
        if not is_plain(value, largest):
            must = f'must be made of numbers from 0 to {largest:,} and short text'
            raise ValueError(f'model_args.{key} {must}, got {sanitize(repr(value), 80)}')


def beyond_row(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that differ from those of the model's row in `ARCHS`; JSON has lists for tuples."""
    row, values = ARCHS[name].args, {key: tuple(each) if isinstance(each, list) else each for key, each in args.items()}
    return {key: args[key] for key, value in values.items() if row.get(key) != value}


def is_plain(value: object, largest: float, depth: int = MAX_DEPTH) -> bool:
    """Whether a value is made of numbers from 0 to `largest`, short text, and short lists and mappings of these."""
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, str):
        return len(value) <= MAX_TEXT
    if isinstance(value, dict):
        return is_plain([*value, *value.values()], largest, depth)
    if isinstance(value, list | tuple):
        return depth > 0 and len(value) <= MAX_ITEMS and all(is_plain(item, largest, depth - 1) for item in value)
    return isinstance(value, int | float) and 0 <= value <= largest


def recorded_model(raw: RawFile, config: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Returns the key of `ARCHS` and the arguments that a file records, or None and no arguments."""
    parameters = raw.values.get('hyper_parameters') or {}
    names = {value for value in parameters.values() if isinstance(value, str) and value.partition('.')[0] in ARCHS}
    spec = {key: value for key, value in parameters.items() if key in ARGUMENTS['spec']}
    sources: list[tuple[Any, Any]] = [
        (raw.metadata.get('architecture'), json.loads(raw.metadata.get('model_args', '{}'))),
        train_script_model(raw.values),
        (config.get('architecture'), config.get('model_args')),
        (names.pop() if len(names) == 1 else None, spec),
    ]
    for name, args in sources:
        name = str(name).partition('.')[0]
        if name in ARCHS:
            known = {key: value for key, value in (args or {}).items() if value is not None}
            check_model_args(ARCHS[name], known)
            return name, known
    return None, {}


def train_script_model(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the name and arguments of the model in a checkpoint of timm's train script, or of one like it."""
    recorded = values.get('args')
    args: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    given = next((each for each in (args.get('model_kwargs'), values.get('model_args')) if isinstance(each, dict)), {})
    pool = {'global_pool': args['gp']} if args.get('gp') else {}
    name = values.get('arch') or args.get('model')
    return (name if isinstance(name, str) else None), {**pool, **given}


def recorded_spec(raw: RawFile, name: str | None, args: Mapping[str, Any]) -> NetworkSpec | None:
    """Returns the spec that a file records; None if it records none."""
    for text in (raw.metadata, raw.values.get(RECORD) or {}):
        if 'first_block' in text:
            return NetworkSpec.from_text(text)
    return None if name is None else NetworkSpec.from_arguments({**ARCHS[name].args, **args})


def recorded_images(raw: RawFile, config: Mapping[str, Any], name: str | None, source: str) -> dict[str, Any]:
    """Returns recorded settings of image preprocessing; for a training script, what timm made of its arguments."""
    args = raw.values.get('args')
    if not isinstance(args, dict):
        return check_image_settings(config.get('pretrained_cfg') or {})
    try:
        given = {key: args[key] for key in DATA_ARGUMENTS if args.get(key)}
        sizes = [args.get('in_chans') or 3, *2 * [given['img_size']]] if 'img_size' in given else None
        checked = check_image_settings({**given, 'input_size': given.get('input_size') or sizes})
        if name is None and not checked:
            return {}
        cfg = registered_cfg(name).to_dict() if name is not None else {}
        resolved = check_image_settings(resolve_data_config({'in_chans': args.get('in_chans'), **checked}, cfg))
    except (ValueError, TypeError) as error:
        _logger.warning('ignored image settings in %s: %s', sanitize(source), first_line(error))
        return {}
    return resolved if name is not None else {key: resolved[key] for key in checked}


def recorded_labels(config: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    """Returns the names of the classes in a configuration."""
    names = config.get('label_names') or (config.get('pretrained_cfg') or {}).get('label_names') or ()
    return tuple(names) if len(names) == num_classes else ()


def read_labels(path: str) -> list[str]:
    """Reads the names of classes from a text file, one per line, or from a data folder, one per subfolder.

    Raises:
        ValueError: If it cannot be read.
    """
    if not os.path.isdir(path):
        return [line.strip() for line in read_text(path).splitlines() if line.strip()]
    root = next((Path(path, part) for part in ('train', 'training') if Path(path, part).is_dir()), Path(path))
    suffixes = set(get_img_extensions())
    try:
        folders = [each for each in root.iterdir() if each.is_dir()]
        names = [each.name for each in folders if any(file.suffix.lower() in suffixes for file in each.iterdir())]
    except OSError as error:
        raise ValueError(f'cannot read {path}: {error.strerror}') from error
    return sorted(names, key=natural_key)


# Writing a folder


def require_no_model(folder: Path) -> None:
    """Raises ValueError if a folder already holds a model or one of its files, or is not a folder.

    A `config.json` of ours without weights is what remains of a write that was killed, and may be replaced.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f'cannot write {folder}: it is not a folder. Choose another name')
    present = [name for name in (WEIGHTS_FILE, CONFIG_FILE) if os.path.lexists(folder / name)]
    if present and not (present == [CONFIG_FILE] and is_unfinished(folder / CONFIG_FILE)):
        raise ValueError(f'cannot write {folder}: it already has a {present[0]}. Choose another folder')


def is_unfinished(file: Path) -> bool:
    """Whether this package wrote a `config.json` and was killed before it wrote the weights."""
    try:
        return bool(json.loads(file.read_bytes())[RECORD]['sha256'])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def make_config(
    model: Classifier,
    name: str,
    args: Mapping[str, Any],
    cfg: Mapping[str, Any],
    labels: Sequence[str] = (),
    **record: Any,
) -> dict[str, Any]:
    """Makes the content of a `config.json`; `record` is what this package records about the weights."""
    cfg = with_channels(cfg, args.get('in_chans', 3))
    args = beyond_row(name, args)
    return dict(
        architecture=name,
        num_classes=model.num_classes,
        num_features=model.num_features,
        model_args=dict(args),
        pretrained_cfg={**cfg, 'custom_load': False, 'num_classes': model.num_classes},
        **({'label_names': [*labels]} if labels else {}),
        **{RECORD: dict(version=__version__, **record)},
    )


def write_folder(folder: Path, state: dict[str, Tensor], config: dict[str, Any], spec: NetworkSpec | None) -> None:
    """Writes `config.json` and `model.safetensors`, whose metadata also records model and spec; both or neither."""
    args = json.dumps(config['model_args'], sort_keys=True)
    metadata = {'format': 'pt', 'architecture': config['architecture'], 'model_args': args}
    metadata |= spec.as_text() if spec is not None else {}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder.parent) as temporary:
            complete = temporary / 'complete'
            complete.mkdir()
            save_weights(state, complete / WEIGHTS_FILE, metadata)
            config[RECORD]['sha256'] = sha256(complete / WEIGHTS_FILE)
            (complete / CONFIG_FILE).write_text(json.dumps(config, indent=2) + '\n')
            shutil.copymode(complete / CONFIG_FILE, complete / WEIGHTS_FILE)  # safetensors lets only the owner read
            for path in (complete / WEIGHTS_FILE, complete / CONFIG_FILE, complete):
                sync(path)
            move_into_place(complete, folder)
            sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f'cannot write {folder}: {first_line(error)}') from error


def move_into_place(complete: Path, folder: Path) -> None:
    """Renames a folder, or moves its two files into one that exists; ValueError if another process was faster."""
    if not folder.exists():
        try:
            os.rename(complete, folder)
        except OSError:
            require_no_model(folder)
            raise
    else:
        require_no_model(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):  # a configuration alone shows an unfinished write
            os.replace(complete / name, folder / name)


def save_weights(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Saves safetensors, with the same bytes for the same weights: the library writes metadata in random order."""
    save_file(state, path, metadata)
    with open(path, 'r+b') as file:
        size = int.from_bytes(file.read(8), 'little')
        header = json.loads(file.read(size))
        header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
        text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size
        file.seek(8)
        file.write(text)
