"""Reads and writes recorded facts about weights: in `config.json`, in a file's metadata, or by a training script.

timm, transformers and the Hub store a model as a folder with `config.json` and `model.safetensors`. Both are untrusted:
only arguments of the model's constructor are accepted, with plain and bounded values.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from timm.data import get_img_extensions
from timm.utils import natural_key
from torch import Tensor

from .._errors import CheckpointError, first_line, sanitize
from .._files import PathLike, open_regular, read_text, write_files
from .._images import IMAGE_SETTINGS, check_image_settings
from ..models.classifier import Classifier, with_channels
from ..models.spec import ARGUMENTS, NetworkSpec
from ..models.variants import ARCHS, Arch
from ..version import __version__
from .readers import RawFile

_logger = logging.getLogger(__name__)

WEIGHTS_FILE, CONFIG_FILE = 'model.safetensors', 'config.json'
RECORD = 'timm_res2net'  # key of this package's own record, also in exported files
BUILDER_ARGUMENTS = 'pretrained_strict', 'features_only', 'feature_cfg', 'out_indices'  # which timm records, too
MAX_CONFIG = 5_000_000  # bytes
# Limits of `model_args`: without them, a small file could describe a network that takes hours to build.
MAX_NUMBERS = {'layers': 200, 'levels': 8, 'scale': 64, 'num_classes': 1_000_000}
MAX_NUMBER, MAX_TEXT, MAX_ITEMS, MAX_DEPTH = 4096, 100, 64, 3


def read_config(folder: PathLike, source: str | None = None) -> dict[str, Any]:
    """Reads a folder's `config.json`; error messages show the folder as `source`."""
    where = f'{CONFIG_FILE} of {source or folder}'
    try:
        with open_regular(Path(folder, CONFIG_FILE)) as file:
            content = file.read(MAX_CONFIG + 1)
        if len(content) > MAX_CONFIG:
            raise ValueError(f'it has more than {MAX_CONFIG:,} bytes')
        config = json.loads(content.decode('utf-8-sig'))
        if not isinstance(config, dict):
            raise ValueError(f'it holds a {type(config).__name__}, not a mapping')
        return with_pretrained_cfg(config)
    except OSError as error:
        raise CheckpointError(f'cannot read {where}: {error.strerror or error}') from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f'cannot use {where}: {first_line(error)}') from error


def with_pretrained_cfg(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration in the current layout; early versions of timm wrote all keys to one mapping."""
    resaved = 'transformers_version' in config  # possibly with weights other than those that our record describes
    flat = {key: value for key, value in config.items() if key not in ('model_args', RECORD)}
    parts = {
        'model_args': config.get('model_args') or {},
        RECORD: {} if resaved else config.get(RECORD) or {},
        'pretrained_cfg': config.get('pretrained_cfg') or flat,
    }
    for key, value in parts.items():
        if not isinstance(value, dict):
            raise ValueError(f'{key} must be a mapping, got {sanitize(repr(value), 80)}')
    return {**config, **parts}


def check_model_args(arch: Arch, args: Mapping[str, Any]) -> None:
    """Raises ValueError if a recorded argument is unknown to the model's constructor, or has an impossible value."""
    allowed = {*arch.trunk.arguments()} - {*ARGUMENTS['placement']}
    for key, value in args.items():
        if key not in allowed:
            raise ValueError(f'model_args.{sanitize(key)} is not an argument of {arch.trunk.__name__}')
        largest = MAX_NUMBERS.get(key, MAX_NUMBER)
        if not is_plain(value, largest):
            must = f'must consist of numbers from 0 to {largest:,} and short strings'
            raise ValueError(f'model_args.{key} {must}, got {sanitize(repr(value), 80)}')


def beyond_row(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that differ from those of the model's row in `ARCHS`; JSON turns tuples into lists."""
    row, values = ARCHS[name].args, {key: tuple(each) if isinstance(each, list) else each for key, each in args.items()}
    return {key: args[key] for key, value in values.items() if row.get(key) != value}


def is_plain(value: object, largest: float, depth: int = MAX_DEPTH) -> bool:
    """Whether a value consists of numbers from 0 to `largest`, short strings, and short lists and mappings of these."""
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, str):
        return len(value) <= MAX_TEXT
    if isinstance(value, dict):
        return is_plain([*value, *value.values()], largest, depth)
    if isinstance(value, list | tuple):
        return depth > 0 and len(value) <= MAX_ITEMS and all(is_plain(item, largest, depth - 1) for item in value)
    return isinstance(value, int | float) and 0 <= value <= largest


def recorded_model(raw: RawFile, config: Mapping[str, Any], source: str) -> tuple[str | None, dict[str, Any]]:
    """Returns the recorded model's name, a key of `ARCHS`, and its arguments; (None, {}) if none is recorded."""
    sources: list[tuple[Any, Any]] = [
        (raw.metadata.get('architecture'), json.loads(raw.metadata.get('model_args', '{}'))),
        train_script_model(raw.values),
        (config.get('architecture'), config.get('model_args')),
        lightning_model(raw.values.get('hyper_parameters') or {}, source),
    ]
    for recorded, args in sources:
        name = str(recorded).partition('.')[0]
        if name in ARCHS:
            known = {key: value for key, value in network_arguments(args or {}).items() if value is not None}
            check_model_args(ARCHS[name], known)
            return name, known
        if name.startswith(('local-dir:', 'hf-hub:', 'hf_hub:')):
            problem = 'but does not record what that network computes. Pass its first_block, unless it is the default.'
            _logger.warning('%s records the model %s, %s', sanitize(source), sanitize(recorded), problem)
    return None, {}


def network_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a network among those of `timm.create_model`, with `block_args` merged into them."""
    merged = {**args, **(args.get('block_args') or {})}
    return {key: value for key, value in merged.items() if key not in ('block_args', *BUILDER_ARGUMENTS)}


def lightning_model(parameters: Mapping[str, Any], source: str) -> tuple[str | None, dict[str, Any]]:
    """Returns the name and arguments of the only model among Lightning's hyperparameters.

    A nested mapping is the model's if all of its keys are arguments of networks. Arguments next to the name may belong
    to another module, so a warning lists them.
    """
    names = {value for value in parameters.values() if isinstance(value, str) and value.partition('.')[0] in ARCHS}
    if len(names) != 1:
        return None, {}
    known = {name for group in ARGUMENTS.values() for name in group}
    args = {key: value for key, value in parameters.items() if key in (*ARGUMENTS['spec'], *ARGUMENTS['use'])}
    if args:
        shown = ', '.join(f'{key}={value!r}' for key, value in args.items())
        advice = 'If these are of another module, pass the right ones.'
        _logger.warning('%s: took %s from its hyper_parameters. %s', sanitize(source), sanitize(shown), advice)
    for each in parameters.values():
        if isinstance(each, dict) and each.keys() <= known:
            args |= each
    return names.pop(), args


def train_script_model(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the model's name and arguments as recorded by timm's train script, or a similar script."""
    recorded = values.get('args')
    args: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    given = next((each for each in (args.get('model_kwargs'), values.get('model_args')) if isinstance(each, dict)), {})
    pool = {'global_pool': args['gp']} if args.get('gp') else {}
    return values.get('arch') or args.get('model'), {**pool, **given}


def recorded_spec(raw: RawFile, name: str | None, args: Mapping[str, Any]) -> NetworkSpec | None:
    """Returns the recorded spec, or the spec of the recorded model; None if neither is recorded."""
    for recorded in (raw.metadata, raw.values.get(RECORD) or {}):
        if 'first_block' in recorded:
            return NetworkSpec.from_text(recorded)
    return None if name is None else NetworkSpec.from_arguments({**ARCHS[name].args, **args})


def recorded_images(raw: RawFile, config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns the recorded image settings; ignores impossible ones from a training script, with a warning."""
    args = raw.values.get('args')
    if not isinstance(args, dict):
        return check_image_settings(config.get('pretrained_cfg') or {})
    given = {key: args[key] for key in IMAGE_SETTINGS if args.get(key)}
    if size := args.get('img_size'):
        given.setdefault('input_size', [args.get('in_chans') or 3, size, size])
    try:
        return check_image_settings(given)
    except ValueError as error:
        _logger.warning('ignored image settings in %s: %s', sanitize(source), first_line(error))
        return {}


def warn_of_class_map(raw: RawFile, source: str) -> None:
    """Warns if timm's train script read the order of the classes from a file that only the user has."""
    args = raw.values.get('args')
    if isinstance(args, dict) and args.get('class_map'):
        shown = sanitize(source), sanitize(str(args['class_map']))
        _logger.warning('the classes in %s are in the order of %s (--class-map). Pass that file as --labels.', *shown)


def recorded_labels(config: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    """Returns the class names in a configuration, () if it has none; raises ValueError if they are invalid."""
    names = config.get('label_names') or (config.get('pretrained_cfg') or {}).get('label_names')
    if not names:
        return ()
    require_labels(names, num_classes, 'label_names')
    return tuple(names)


def require_labels(labels: Sequence[str], num_classes: int, key: str = 'labels') -> None:
    """Raises ValueError unless `labels` is a list with one name per class."""
    if not isinstance(labels, list | tuple) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f'{key} must be a list of str')
    if len(labels) != num_classes:
        raise ValueError(f'{key} has {len(labels):,} names for {num_classes:,} classes')


def read_labels(path: str) -> list[str]:
    """Reads class names, one per line of a file, or per folder of images in a folder; ValueError if that fails."""
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


def require_no_model(folder: Path) -> None:
    """Raises ValueError if a folder already holds a model or one of its files."""
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if os.path.lexists(folder / name):
            raise ValueError(f'cannot write {folder}: it already contains {name}. Choose another folder')


def make_config(
    model: Classifier,
    name: str,
    args: Mapping[str, Any],
    cfg: Mapping[str, Any],
    labels: Sequence[str] = (),
    **record: Any,
) -> dict[str, Any]:
    """Returns the content of a `config.json`; `record` has the facts that this package adds about the weights."""
    cfg = with_channels(cfg, args.get('in_chans', 3))
    return dict(
        architecture=name,
        num_classes=model.num_classes,
        num_features=model.num_features,
        model_args=beyond_row(name, args),
        pretrained_cfg={**cfg, 'custom_load': False, 'num_classes': model.num_classes},
        **({'label_names': [*labels]} if labels else {}),
        **{RECORD: dict(version=__version__, **record)},
    )


def write_folder(folder: Path, state: dict[str, Tensor], config: dict[str, Any], spec: NetworkSpec | None) -> None:
    """Writes both or neither of `config.json` and `model.safetensors`, with model and spec in its metadata."""
    args = json.dumps(config['model_args'], sort_keys=True)
    metadata = {'format': 'pt', 'architecture': config['architecture'], 'model_args': args}
    metadata |= spec.as_text() if spec is not None else {}
    weights = serialize(state, metadata)
    config[RECORD]['sha256'] = hashlib.sha256(weights).hexdigest()
    write_files(folder, {CONFIG_FILE: (json.dumps(config, indent=2) + '\n').encode(), WEIGHTS_FILE: weights})


def serialize(state: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Serializes to safetensors with sorted metadata, which the library itself writes in random order."""
    content = save(state, metadata)
    end = 8 + int.from_bytes(content[:8], 'little')
    header = json.loads(content[8:end])
    header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
    text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode().ljust(end - 8)
    return len(text).to_bytes(8, 'little') + text + content[end:]
