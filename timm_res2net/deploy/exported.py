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

LARGEST_INPUT = 2**28  # values in a batch, 1 GB: callers allocate batches of the size in the metadata
STRINGS = 'architecture', 'license', 'origin_url', 'tag', 'hf_hub_id'  # in `pretrained_cfg`


class ExportedModel(ForInference):
    """A model loaded from an exported file, run on the CPU by the runtime of its format.

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
            ValueError: If the images are integers, or have a shape that the model was not exported for.
            CheckpointError: If the file fails to run, or its outputs do not match its metadata.
        """
        outputs = run_batch(self.run_checked, images, self.record['input'])
        return finish(outputs if self.record['features'] else outputs[0], images.cpu().float())

    def run_checked(self, images: Tensor) -> list[Tensor]:
        """Runs images; CheckpointError if that fails, or if the outputs do not match the record."""
        try:
            outputs = self.run(images)
        except Exception as error:  # runtimes can raise anything
            raise CheckpointError(f'cannot run {self.file.name!r}: {first_line(error)}') from error
        shapes = [tuple(output.shape) for output in outputs]
        is_complete = len(shapes) == len(self.record['outputs'])
        are_batches = all(len(shape) >= 2 and shape[0] == len(images) for shape in shapes)
        if not (is_complete and are_batches) or (self.num_classes and shapes[0][1] != self.num_classes):
            raise CheckpointError(f'outputs of {self.file.name!r} do not match its metadata: {sanitize(shapes)}')
        return outputs


def load_exported(file: PathLike, *, trust: bool = False) -> ExportedModel:
    """Loads a file that `export` wrote, to be run by its own runtime on the CPU.

    `.onnx` and `.xml` files describe a network: no code in them runs, and no other file is opened. A `.pt2` file is a
    program of torch, and loading it can run any code. The metadata is checked like an untrusted `config.json`. A
    malicious network can still take a lot of time and memory to run.

    Args:
        file: .onnx, .xml with its .bin in the same folder, or .pt2.
        trust: Load a .pt2 file even though it can run any code. Only pass it if you know the author.

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
                raise ValueError('it has no timm_res2net metadata. Was it written by timm_res2net.export?')
            record = parse_record(text)
            return ExportedModel(path, start(record['precision']), record).eval()
    except ImportError:
        raise
    except Exception as error:  # runtimes can raise anything for a damaged file
        raise CheckpointError(f'cannot load {str(path)!r}: {first_line(error)}') from error


def parse_record(text: str) -> dict[str, Any]:
    """Parses the record in a file's metadata; ValueError names the first invalid entry."""
    record = json.loads(text)
    if not isinstance(record, dict):
        raise ValueError('its metadata is not a mapping')
    for key, is_valid in ENTRIES.items():
        reason = sanitize(repr(record.get(key)), 80)
        try:
            valid = is_valid(record)
        except Exception as error:  # entries may be absent or of any type
            valid, reason = False, first_line(error)
        if not valid:
            raise ValueError(f'invalid {key!r} in its metadata: {reason}')
    return record


def has_valid_input(record: dict[str, Any]) -> bool:
    """Checks the shape of a batch, in which None means any size."""
    sizes = [1 if size is None else size for size in record['input']]
    are_sizes = all(type(size) is int and 1 <= size <= LARGEST_SIZE for size in sizes)
    return len(sizes) == 4 and are_sizes and prod(sizes) <= LARGEST_INPUT


def has_valid_cfg(record: dict[str, Any]) -> bool:
    """Checks that `pretrained_cfg` is complete and consistent with the other entries."""
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


ENTRIES: dict[str, Callable[[dict[str, Any]], bool]] = {
    'architecture': lambda record: isinstance(record['architecture'], str),
    'function': lambda record: isinstance(record['function'], dict) and bool(NetworkSpec.from_text(record['function'])),
    'precision': lambda record: record['precision'] in PRECISIONS,
    'features': lambda record: type(record['features']) is bool,
    'input': has_valid_input,
    'outputs': lambda record: len(record['outputs']) > 0 and are_strings([each['name'] for each in record['outputs']]),
    'pretrained_cfg': has_valid_cfg,
}
