"""Loads exported files, and checks their metadata before using them."""

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from .._errors import CheckpointError, first_line, sanitize
from .._files import PathLike
from .._images import IMAGE_SETTINGS, LARGEST_SIZE, check_image_settings
from ..models.spec import NetworkSpec
from .backends import PRECISIONS, find_backend, requires_extra
from .inference import ForInference, Run, finish, run_batch

LARGEST_INPUT = 2**28  # values in a batch, 1 GB: callers make whole batches of the size that a file asks for
STRINGS = 'architecture', 'license', 'origin_url', 'tag', 'hf_hub_id'  # in `pretrained_cfg`


class ExportedModel(ForInference):
    """A model in an exported file, which its backend runs on the CPU.

    Attributes:
        record: The file's metadata: `architecture`, `function`, `precision`, `pretrained_cfg`, `outputs` and more, see
            `timm_res2net.export`.
        pretrained_cfg: timm's configuration, for `timm.data.resolve_model_data_config`.
        num_classes: Number of classes; 0 if the model returns features.
    """

    def __init__(self, file: Path, run: Run, record: dict[str, Any]) -> None:
        super().__init__()
        self.file = file
        self.run = run
        self.record = record
        cfg = record['pretrained_cfg']
        known = (*STRINGS, 'label_names', 'num_classes')
        self.pretrained_cfg = {key: cfg[key] for key in known if key in cfg} | check_image_settings(cfg)
        self.num_classes: int = cfg['num_classes']
        self.path = f'{find_backend(file).format}, {record["precision"]}'

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Runs floating-point images (N, C, H, W); returns logits (N, num_classes) or a list of features in float32.

        The outputs of an image with NaN or infinity are NaN.

        Raises:
            ValueError: If the images have another shape than the model was exported for, or are integers.
            CheckpointError: If the file fails to run, or its outputs are not those that its metadata describe.
        """
        outputs = run_batch(self.run_checked, images, self.record['input'])
        return finish(outputs if self.record['features'] else outputs[0], images.cpu().float())

    def run_checked(self, images: Tensor) -> list[Tensor]:
        """Runs images, and raises a CheckpointError if that fails or gives other outputs than the record describes."""
        try:
            outputs = self.run(images)
        except Exception as error:  # runtimes raise anything
            raise CheckpointError(f'cannot run {self.file.name!r}: {first_line(error)}') from error
        is_described = len(outputs) == len(self.record['outputs']) and all(
            output.dim() >= 2 and len(output) == len(images) for output in outputs
        )
        if not is_described or outputs[0].shape[1] != (self.num_classes or outputs[0].shape[1]):
            shapes = ', '.join(str(tuple(output.shape)) for output in outputs[:8])
            raise CheckpointError(f'outputs of {self.file.name!r} are not those that its metadata describe: {shapes}')
        return outputs

    def extra_repr(self) -> str:
        return f'{self.record["architecture"]}: {self.path}'


def load_exported(file: PathLike, *, trust: bool = False) -> ExportedModel:
    """Loads a file that `export` wrote, to be run by its own runtime on the CPU.

    `.onnx` and `.xml` files describe a network: no code in them runs, and no other file is opened. A `.pt2` file is a
    program of torch, and loading it can run any code. Metadata are checked as an untrusted `config.json` is. A hostile
    network can still take much time and memory to run.

    Args:
        file: .onnx, .xml with its .bin in the same folder, or .pt2.
        trust: Load a .pt2 file although it can run any code, because you know its author. Others need no trust.

    Returns:
        The model in evaluation mode, with its `record`.

    Raises:
        CheckpointError: If the file cannot be read, was not written by `export`, or needs `trust`.
        ImportError: If its runtime is not installed.
        ValueError: If its suffix is unknown.

    Example:
        >>> model = timm.create_model('test_res2net.digits', pretrained=True).eval()
        >>> done = timm_res2net.export(model, 'net.onnx')
        >>> timm_res2net.load_exported(done.file)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    path = Path(file)
    backend = find_backend(path)
    if not path.is_file():
        raise CheckpointError(f'cannot load {str(path)!r}: no such file')
    if backend.runs_code and not trust:
        raise CheckpointError(
            f'cannot load {str(path)!r}: a {path.suffix} file is a program and can run any code. If you know its '
            'author, pass trust=True (--trust); .onnx and .xml files need no trust.'
        )
    try:
        with requires_extra(f'{str(path)!r}'):
            text, start = backend.load(path)
            if not text:
                raise ValueError('its metadata do not describe a model. Was it written by timm_res2net.export?')
            record = parse_record(text)
            return ExportedModel(path, start(record['precision']), record).eval()
    except ImportError:
        raise
    except Exception as error:  # runtimes raise anything for a damaged file
        raise CheckpointError(f'cannot load {str(path)!r}: {first_line(error)}') from error


def parse_record(text: str) -> dict[str, Any]:
    """Parses the record in a file's metadata; ValueError names an entry that is not possible."""
    record = json.loads(text)
    if not isinstance(record, dict):
        raise ValueError('its metadata are not a mapping')
    for key, is_possible in RECORD.items():
        reason = sanitize(repr(record.get(key)), 80)
        try:
            possible = is_possible(record)
        except Exception as error:  # entries may be absent or of any type
            possible, reason = False, first_line(error)
        if not possible:
            raise ValueError(f'{key} in its metadata is not possible: {reason}')
    return record


def has_possible_input(record: dict[str, Any]) -> bool:
    """Checks the shape of a batch, in which None is any size."""
    sizes = [1 if size is None else size for size in record['input']]
    are_sizes = all(type(size) is int and 1 <= size <= LARGEST_SIZE for size in sizes)
    return len(sizes) == 4 and are_sizes and prod(sizes) <= LARGEST_INPUT


def has_possible_cfg(record: dict[str, Any]) -> bool:
    """Checks that the `pretrained_cfg` is complete and fits the other entries."""
    cfg = record['pretrained_cfg']
    settings, names = check_image_settings(cfg), cfg['label_names']
    size = settings['input_size']
    return (
        settings.keys() == IMAGE_SETTINGS.keys()
        and prod(size) <= LARGEST_INPUT
        and all(wanted in (None, have) for wanted, have in zip(record['input'][1:], size))
        and size[0] == len(settings['mean']) == len(settings['std'])
        and type(cfg['num_classes']) is int
        and len(names) == cfg['num_classes']
        and are_strings([*names, *(cfg[key] for key in STRINGS if key in cfg)])
    )


def are_strings(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


RECORD: dict[str, Callable[[dict[str, Any]], bool]] = {
    'architecture': lambda record: isinstance(record['architecture'], str),
    'function': lambda record: isinstance(record['function'], dict) and bool(NetworkSpec.from_text(record['function'])),
    'precision': lambda record: record['precision'] in PRECISIONS,
    'features': lambda record: type(record['features']) is bool,
    'input': has_possible_input,
    'outputs': lambda record: len(record['outputs']) > 0 and are_strings([each['name'] for each in record['outputs']]),
    'pretrained_cfg': has_possible_cfg,
}
