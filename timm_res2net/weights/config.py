"""What a `config.json` may say, checked before anything is built of it, and the model that such a folder makes."""

import hashlib
import inspect
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models import PretrainedCfg, build_model_with_cfg
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..models.classifier import not_finite, registered_cfg
from ..models.variants import ARCHS
from .errors import CheckpointError, first_line
from .files import PathLike, open_regular, temporary_folder
from .folder import CONFIG_FILE, LARGEST_CONFIG, WEIGHTS_FILE
from .loading import adapt_state_dict, describe_mismatch, require_no_overflow
from .readers import NUMBERS
from .recorded import CROP_MODES, INTERPOLATIONS, LARGEST_CROP, LARGEST_SIZE, SMALLEST_CROP

__all__ = ['load_folder', 'make_model', 'require_recorded_weights']

LARGEST = {'layers': 200, 'levels': 8, 'scale': 64, 'num_classes': 1_000_000}  # numbers in `model_args`
LARGEST_OTHER = 4096
CALLS_PER_TENSOR = 40  # of torch, while a network is made; 4 to 12 for those of timm
# What decides how weights are loaded is for the caller, not for the file.
ARGUMENTS = {**inspect.signature(timm.create_model).parameters, **inspect.signature(build_model_with_cfg).parameters}
FORBIDDEN = {'features_only', 'out_indices', 'pruned', *ARGUMENTS}


def is_text(value: object) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str)


def is_number(value: object, most: float = math.inf) -> bool:
    """Whether a value is a number from 0 to `most`."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most


def is_count(value: object) -> bool:
    """Whether a value is a number of classes."""
    return isinstance(value, int) and is_number(value, LARGEST['num_classes'])


def is_size(value: object) -> bool:
    """Whether a value is a size of feature maps."""
    whole = is_list(value, lambda item: isinstance(item, int) and is_number(item, LARGEST_SIZE))
    return whole and len(value) <= 3 and 0 not in value  # type: ignore[arg-type, operator]


def is_image_size(value: object) -> bool:
    """Whether a value is a size of images: channels, height and width."""
    return is_size(value) and len(value) == 3  # type: ignore[arg-type]


def is_crop(value: object) -> bool:
    """Whether a value is the part of an image's side that a crop keeps."""
    return is_number(value, LARGEST_CROP) and value >= SMALLEST_CROP  # type: ignore[operator]


def is_list(value: object, of: Callable[[object], bool]) -> bool:
    """Whether a value is a list whose items are all of a kind."""
    return isinstance(value, list) and all(map(of, value))


def is_texts(value: object) -> bool:
    """Whether a value is a text or a list of texts."""
    return is_text(value) or is_list(value, is_text)


def is_texts_by_name(value: object) -> bool:
    """Whether a value is a list of texts, or texts by their names."""
    return is_list(list(value.values()) if isinstance(value, dict) else value, is_text)


def is_channels(value: object) -> bool:
    """Whether a value is a finite number for each channel of an image."""
    finite = is_list(value, lambda item: is_number(item, sys.float_info.max))
    return finite and 1 <= len(value) <= LARGEST_OTHER  # type: ignore[arg-type]


def is_positive(value: object) -> bool:
    """Whether a value is a positive number for each channel of an image."""
    return is_channels(value) and 0 not in value  # type: ignore[operator]


KINDS: dict[str, tuple[Callable[[object], bool], str]] = {  # of values in `pretrained_cfg`
    **dict.fromkeys(('num_classes', 'label_offset'), (is_count, 'a number of classes')),
    **dict.fromkeys(('crop_pct', 'test_crop_pct'), (is_crop, f'a number from {SMALLEST_CROP} to {LARGEST_CROP}')),
    **dict.fromkeys(
        ('input_size', 'test_input_size', 'min_input_size'),
        (is_image_size, f'a size of three numbers from 1 to {LARGEST_SIZE}'),
    ),
    **dict.fromkeys(('pool_size', 'test_pool_size'), (is_size, f'a size from 1 to {LARGEST_SIZE}')),
    'mean': (is_channels, 'a number for each channel'),
    'std': (is_positive, 'a positive number for each channel'),
    'interpolation': (INTERPOLATIONS.__contains__, f'one of {", ".join(INTERPOLATIONS)}'),
    'crop_mode': (CROP_MODES.__contains__, f'one of {", ".join(CROP_MODES)}'),
    **dict.fromkeys(('first_conv', 'classifier', 'paper_ids', 'notes'), (is_texts, 'a text or a list of texts')),
    'label_names': (lambda value: is_list(value, is_text), 'a list of texts'),
    'label_descriptions': (is_texts_by_name, 'texts by name'),
    'fixed_input_size': (lambda value: isinstance(value, bool), 'true or false'),
    'custom_load': (lambda value: isinstance(value, bool) or is_text(value), 'true or false'),
    'state_dict': (lambda value: False, 'null'),
    'url': (is_texts, 'a text or a list of texts'),
}


def checked_config(content: bytes, source: str) -> dict[str, Any]:
    """Reads a `config.json` and checks all that is used of it.

    Args:
        content: The file.
        source: Where it is from, for errors.

    Raises:
        CheckpointError: If it can't be read, or a value is not possible; the message names its key.
    """

    def refuse(problem: str) -> CheckpointError:
        return CheckpointError(f'{CONFIG_FILE} of {source} is of no use: {problem}')

    if len(content) > LARGEST_CONFIG:
        raise refuse(f'it has more than {LARGEST_CONFIG:,} bytes, and none needs as many')
    try:
        config = json.loads(content.decode('utf-8-sig'), parse_constant=float)
    except RecursionError:
        raise refuse('it is nested too deeply') from None
    except ValueError as error:
        raise refuse(first_line(error)[:200]) from None

    def require(key: str, value: object, good: bool, kind: str) -> None:
        if not good:
            text = repr(value)
            raise refuse(f'{key} is {text if len(text) < 80 else f"{text[:80]}..."}, and should be {kind}')

    require('it', config, isinstance(config, dict), 'a mapping')
    if 'pretrained_cfg' not in config:  # as timm wrote it at first: all in one
        top = ('architecture', 'num_classes', 'num_features', 'model_args', 'timm_res2net')
        cfg = {('label_names' if key == 'labels' else key): config[key] for key in config if key not in top}
        config = {**{key: config[key] for key in top if key in config}, 'pretrained_cfg': cfg}
    cfg, args = config['pretrained_cfg'], config.get('model_args', {})
    for key, value in (('pretrained_cfg', cfg), ('model_args', args), ('timm_res2net', config.get('timm_res2net', {}))):
        require(key, value, isinstance(value, dict), 'a mapping')
    name = config.get('architecture')
    require('architecture', name, isinstance(name, str) and timm.is_model(name), 'the name of a model that timm knows')
    for key in cfg:
        known = key in PretrainedCfg.__dataclass_fields__
        require(f'pretrained_cfg.{key}', cfg[key], known, 'left out, as timm has no such key')
        good, kind = KINDS.get(key, (is_text, 'a text'))
        require(f'pretrained_cfg.{key}', cfg[key], cfg[key] is None or good(cfg[key]), kind)
        if key in ('first_conv', 'classifier') and name in ARCHS:  # timm leaves out what they name
            own = getattr(registered_cfg(name), key)
            require(f'pretrained_cfg.{key}', cfg[key], cfg[key] in (None, own), repr(own))
    for key in ('mean', 'std'):
        value, channels = cfg.get(key), (cfg.get('input_size') or [3])[0]
        # timm's own have three whatever the channels are; `with_channels` adapts those, and one.
        fits = value is None or len(value) in (1, 3, channels)
        require(f'pretrained_cfg.{key}', value, fits, f'a number for each of {channels} channels')
    for key, value in args.items():
        require(f'model_args.{key}', value, key not in FORBIDDEN, 'left out, as it is for whoever loads the model')
        most = LARGEST.get(key, LARGEST_OTHER)
        kind = f'made of numbers from 0 to {most:,} and short texts'
        require(f'model_args.{key}', value, is_plain(value, most), kind)
    classes = config.get('num_classes', cfg.get('num_classes', 1000))
    require('num_classes', classes, is_count(classes), 'a number of classes')
    told = args.get('num_classes', classes)
    require('model_args.num_classes', told, told == classes, f'{classes}, as num_classes is')
    for where, key in ((config, 'label_names'), (config, 'label_descriptions'), (cfg, 'label_names')):
        if where.get(key) is not None:
            good, kind = KINDS[key]
            require(key, where[key], good(where[key]), kind)
            if key == 'label_names' and classes and len(where[key]) != classes:
                raise refuse(f'{key} has {len(where[key]):,} names for {classes:,} classes')
    return config


def is_plain(value: object, most: float, depth: int = 3) -> bool:
    """Whether a value is made of numbers from 0 to `most`, short texts, and short lists and mappings of such."""
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, str):
        return len(value) <= 100
    if isinstance(value, dict):
        return is_plain(list(value), most, depth) and is_plain(list(value.values()), most, depth)
    if isinstance(value, list):
        return depth > 0 and len(value) <= 64 and all(is_plain(item, most, depth - 1) for item in value)
    return is_number(value, most)


def checked_weights(content: bytes, source: str) -> dict[str, Tensor]:
    """Reads `model.safetensors`.

    Raises:
        CheckpointError: If it holds something else, numbers that are not finite or of a type that no weights have, or
            variances below zero.
    """
    try:
        state = safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f'{WEIGHTS_FILE} of {source} is cut, or is no file of safetensors: {first_line(error)}'
        ) from None
    for name, tensor in state.items():
        if tensor.dtype not in NUMBERS:
            raise CheckpointError(
                f'{WEIGHTS_FILE} of {source} has {name} of {tensor.dtype}; save plain floating-point tensors'
            )
    if bad := not_finite(state):
        raise CheckpointError(f'{WEIGHTS_FILE} of {source} has NaN or infinity in {bad[0]}')
    for name, tensor in state.items():
        if name.endswith('running_var') and (tensor < 0).any():  # its root would be NaN
            raise CheckpointError(f'{WEIGHTS_FILE} of {source} has a variance below zero in {name}')
    return state


class Meter(TorchFunctionMode):
    """Raises a ValueError if this thread calls torch far more often than for making a network of so many tensors.

    Making one, also without memory, takes as long as the network is large. torch's hooks of new parameters would tell
    more exactly, but those of one thread disturb the others.
    """

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.tensors, self.left = tensors, CALLS_PER_TENSOR * tensors + 4000

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch._C._set_grad_enabled:  # by which `torch.no_grad` ends, also after the error
            self.left -= 1
            if self.left < 0:
                raise ValueError(f'it would have far more tensors than the {self.tensors:,} of its weights')
        return func(*args, **(kwargs or {}))


def require_fit(config: Mapping[str, Any], state: dict[str, Tensor], source: str) -> None:
    """Raises a CheckpointError unless weights are those of a configuration, before the model takes any memory."""
    args = config.get('model_args', {})
    classes = config.get('num_classes', config['pretrained_cfg'].get('num_classes', 1000))
    try:
        with Meter(len(state)):
            model = timm.create_model(config['architecture'], device='meta', **{**args, 'num_classes': classes})
    except Exception as error:  # a network can refuse its arguments in any way
        raise CheckpointError(f'{CONFIG_FILE} of {source} describes no network: {first_line(error)}') from error
    wanted = model.state_dict()
    need = sum(parameter.numel() for parameter in model.parameters())
    have = sum(tensor.numel() for tensor in state.values())
    if need > have:
        raise CheckpointError(
            f'{CONFIG_FILE} of {source} describes a network of {need:,} numbers, and its weights have only {have:,}'
        )
    if config['architecture'] not in ARCHS:  # only timm knows what it renames
        return
    try:
        adapted = adapt_state_dict(dict(state), model)
    except CheckpointError as error:
        raise CheckpointError(f'{WEIGHTS_FILE} of {source} can not be used: {error}') from error
    if problems := describe_mismatch(wanted, adapted):
        raise CheckpointError(f'{WEIGHTS_FILE} of {source} does not fit its {CONFIG_FILE}: {problems}')


def make_model(config: bytes, weights: bytes, source: str, **kwargs: Any) -> nn.Module:
    """Makes the model of a `config.json` with the weights of a `model.safetensors`.

    Args:
        config: The contents of the one.
        weights: The contents of the other.
        source: Where they are from, for errors.
        **kwargs: For `timm.create_model`, such as `num_classes` or `features_only`.

    Returns:
        The model in evaluation mode. Its attribute `record` is what this package recorded of the weights.

    Raises:
        CheckpointError: If one of the files is of no use, they don't fit each other, or weights would be infinite.
        OSError: If the folder for temporary files can't be written.
    """
    checked = checked_config(config, source)
    require_fit(checked, checked_weights(weights, source), source)
    with temporary_folder(Path(tempfile.gettempdir())) as folder:  # nobody changes files there between check and use
        try:
            (folder / CONFIG_FILE).write_text(json.dumps(checked))
            (folder / WEIGHTS_FILE).write_bytes(weights)
        except OSError as error:
            raise OSError(f'{folder} can not be written, from where timm reads: {error.strerror}') from error
        try:
            model = timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs)
        except CheckpointError as error:  # names the temporary file
            path, shown = str(folder / WEIGHTS_FILE), f'{WEIGHTS_FILE} of {source}'
            raise CheckpointError(str(error).replace(path, shown)) from None
        except RuntimeError as error:
            if not any(word in str(error) for word in ('state_dict', 'input_size')):
                raise
            raise CheckpointError(
                f'{WEIGHTS_FILE} of {source} does not fit its {CONFIG_FILE}: {first_line(error)}'
            ) from error
    if checked['architecture'] not in ARCHS:  # those of this package have looked
        require_no_overflow(model, f'{WEIGHTS_FILE} of {source}')
    cfg = getattr(model, 'pretrained_cfg', None)
    if isinstance(cfg, dict):
        cfg.pop('file', None)
    model.record = checked.get('timm_res2net', {})
    return model.eval()


def require_recorded_weights(config: bytes, weights: bytes, source: str) -> None:
    """Raises a CheckpointError if this package wrote a `config.json` with other weights, or if it is of no use."""
    recorded = checked_config(config, source).get('timm_res2net', {}).get('sha256')
    if recorded is not None and recorded != hashlib.sha256(weights).hexdigest():
        raise CheckpointError(
            f'{WEIGHTS_FILE} of {source} is not the file that its {CONFIG_FILE} was written with: it should have '
            f'SHA-256 {str(recorded)[:80]}. Somebody replaced one of them: ask the owner, or, if it was you, '
            '`timm-res2net convert` the weights to a new folder'
        )


def load_folder(folder: PathLike, **kwargs: Any) -> nn.Module:
    """Makes the model of a folder that `convert`, `push` or `pull` wrote, see `make_model`.

    Raises:
        CheckpointError: If a file is missing, can't be read or is of no use, or the weights are not those that the
            configuration was written with.
        OSError: If the folder for temporary files can't be written.
    """
    files = []
    for name, most in ((CONFIG_FILE, LARGEST_CONFIG + 1), (WEIGHTS_FILE, -1)):
        try:
            with open_regular(Path(folder, name)) as file:
                files.append(file.read(most))
        except OSError as error:
            raise CheckpointError(f'{name} of {folder} can not be read: {error.strerror or error}') from error
    require_recorded_weights(files[0], files[1], str(folder))
    return make_model(files[0], files[1], str(folder), **kwargs)
