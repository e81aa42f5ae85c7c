"""The folder format of a model: `config.json` and `model.safetensors`, as timm, transformers and the Hub read it."""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..models.classifier import Classifier, with_channels
from ..models.function import Function
from ..version import __version__
from .errors import first_line
from .files import lock, sha256, sync, temporary_folder

__all__ = [
    'CONFIG_FILE',
    'LARGEST_CONFIG',
    'WEIGHTS_FILE',
    'make_config',
    'require_no_model',
    'write_folder',
]

WEIGHTS_FILE, CONFIG_FILE = 'model.safetensors', 'config.json'
LARGEST_CONFIG = 5_000_000  # bytes


def require_no_model(folder: Path) -> None:
    """Raises a ValueError if the folder holds a model already, or one of its files, or is none.

    A configuration of this package without weights is no model: the process that wrote it was killed.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f'{folder} is no folder; name another')
    present = [name for name in (WEIGHTS_FILE, CONFIG_FILE) if os.path.lexists(folder / name)]
    if present and not (present == [CONFIG_FILE] and is_ours(folder / CONFIG_FILE)):
        raise ValueError(f'{folder} has a {present[0]} already; name another folder, or move it away')


def is_ours(file: Path) -> bool:
    """Whether this package wrote a configuration together with weights."""
    try:
        return bool(json.loads(file.read_bytes())['timm_res2net']['sha256'])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def make_config(
    model: Classifier, name: str, args: Mapping[str, Any], cfg: Mapping[str, Any], **record: object
) -> dict[str, Any]:
    """Makes the contents of a `config.json`.

    Args:
        model: The weights' model.
        name: The name that it is registered under.
        args: Its other arguments, without the number of classes, which transformers passes by itself.
        cfg: timm's configuration of the weights.
        **record: What this package records of them, under a key of its own.
    """
    cfg = with_channels(cfg, args.get('in_chans', 3))
    return dict(
        architecture=name,
        num_classes=model.num_classes,
        num_features=model.num_features,
        **({'model_args': dict(args)} if args else {}),
        pretrained_cfg={**cfg, 'custom_load': False, 'num_classes': model.num_classes},
        timm_res2net=dict(version=__version__, **record),
    )


def write_folder(folder: Path, state: dict[str, Tensor], config: dict[str, Any], function: Function | None) -> None:
    """Writes weights and configuration, both or neither, and records the checksum of the weights in `config`.

    Raises:
        OSError: If the folder can't be written.
        ValueError: If another process has written a model to it meanwhile.
        TypeError: If the configuration holds a value that JSON can't.
    """
    metadata = {'format': 'pt'}
    if function is not None:
        metadata.update(function.as_text())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder.parent) as temporary:
            complete = temporary / 'complete'
            complete.mkdir()
            save_weights(state, complete / WEIGHTS_FILE, metadata)
            config['timm_res2net']['sha256'] = sha256(complete / WEIGHTS_FILE)
            (complete / CONFIG_FILE).write_text(json.dumps(config, indent=2) + '\n')
            shutil.copymode(complete / CONFIG_FILE, complete / WEIGHTS_FILE)  # safetensors lets only the owner read
            for path in (complete / WEIGHTS_FILE, complete / CONFIG_FILE, complete):
                sync(path)
            move_model(complete, folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f'{folder} can not be written: {first_line(error)}') from error


def move_model(complete: Path, folder: Path) -> None:
    """Moves a model's folder to its place, or its files to a folder that has others; one process at a time."""
    if not folder.exists():
        try:
            os.rename(complete, folder)
            sync(folder.parent)
            return
        except OSError:
            if not folder.exists():
                raise
    handle = None
    with suppress(OSError):
        handle = lock(folder, wait=True)
    try:
        require_no_model(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):  # in this order: a configuration alone tells that it is unfinished
            os.replace(complete / name, folder / name)
        sync(folder)
    finally:
        if handle is not None:
            os.close(handle)


def save_weights(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Saves safetensors, the same bytes for the same weights: the library writes metadata in random order."""
    save_file(state, path, metadata)
    with open(path, 'r+b') as file:
        size = int.from_bytes(file.read(8), 'little')
        header = json.loads(file.read(size))
        header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
        text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size
        file.seek(8)
        file.write(text)
