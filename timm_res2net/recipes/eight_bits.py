"""Measures what 8 bits cost for every kind of trunk and scale, on photographs, and for the digits model its accuracy.

    python -m timm_res2net.recipes.eight_bits int8.json

Full-size networks with random weights are exported in 8 bits to OpenVINO and ONNX, and compared with their float32
models on crops of scikit-image's photographs, with which they are also calibrated; a minute or two each. Run again, it
goes on where it was stopped.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from ..deploy.bench import environment
from ..deploy.export import export
from ..deploy.runtimes import load_exported
from ..models.classifier import class_names
from ..models.variants import EMBEDDED
from ..vision.validate import labelled_images, validate
from ..weights.files import atomic_write_text, read_text, require_writable
from . import digits
from .arguments import make_parser, reported
from .multi_scale import whole_photographs

MODELS = (
    *('res2net50_48w_2s', 'res2net50_26w_4s', 'res2net50_26w_6s', 'res2net50_26w_8s'),  # the scale
    *('res2net50d', 'res2net50_vd_26w_4s', 'seres2net50_26w_4s', 'res2next50'),  # the block
    *('dla60_res2net', 'blres2net50_26w_4s', 'res2next29_6c_24w_4s'),  # the trunk
)
SUFFIXES = {'openvino': '.xml', 'onnx': '.onnx'}
SIDE = 128  # pixels of a crop, of which each photograph gives two


def randomise(model: nn.Module) -> nn.Module:
    """Gives every norm statistics, weights and biases as unlike as those of a trained network.

    timm zero-initialises the last norm of a block, so that a fresh network is a chain of shortcuts, whatever is wrong
    in its branches.
    """
    norm: Any
    for norm in model.modules():
        if getattr(norm, 'running_mean', None) is not None:
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
        if isinstance(norm, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
    return model


def random_model(name: str) -> nn.Module:
    """A full-size network with random weights and norms, always the same."""
    torch.manual_seed(0)
    return randomise(timm.create_model(name)).eval()


def crops(model: nn.Module) -> Tensor:
    """Two corners of each photograph, (32, 3, H, W), preprocessed for a model; for CIFAR's networks made as small."""
    config = resolve_model_data_config(model)
    side = min(SIDE, config['input_size'][1])
    transform: Any = create_transform(**{**config, 'input_size': (3, side, side), 'crop_pct': 1.0})
    return torch.stack([transform(corner) for photograph in whole_photographs('RGB') for corner in corners(photograph)])


def corners(photograph: Image.Image) -> list[Image.Image]:
    """The upper left and the lower right corner."""
    width, height = photograph.size
    return [photograph.crop((0, 0, SIDE, SIDE)), photograph.crop((width - SIDE, height - SIDE, width, height))]


def cost(name: str) -> dict[str, Any]:
    """Differences of a network's logits in 8 bits, the root of the mean square relative to that of the model's."""
    model = random_model(name)
    images = crops(model)
    found: dict[str, Any] = dict(model=name)
    with TemporaryDirectory() as folder:
        for runtime, suffix in SUFFIXES.items():
            done = export(model, f'{folder}/net{suffix}', precision='int8', images=images, size=images.shape[-1])
            found[runtime] = round(done.mean_difference, 4)
    return found


def cost_for_digits() -> dict[str, Any]:
    """What 8 bits cost the embedded model: differences as in `cost`, and its accuracy on the held-out digits, in %."""
    model = timm.create_model(EMBEDDED, pretrained=True).eval()
    with TemporaryDirectory() as folder:
        digits.main([f'{folder}/digits'])
        images = labelled_images(f'{folder}/digits/val', class_names(model))
        found: dict[str, Any] = dict(model=EMBEDDED, top1=round(validate(model, images).top1, 2))
        for runtime, suffix in SUFFIXES.items():
            done = export(model, f'{folder}/net{suffix}', precision='int8', images=f'{folder}/digits/train')
            found[runtime] = round(done.mean_difference, 4)
            found[f'{runtime}_top1'] = round(validate(load_exported(done.file), images).top1, 2)
    return found


def main(argv: list[str] | None = None) -> None:
    """Measures what the file does not hold yet, and prints all of it."""
    parser = make_parser(__doc__)
    parser.add_argument('file', type=Path, help='JSON to write to')
    parser.add_argument('--models', nargs='+', choices=MODELS, default=MODELS, metavar='NAME', help='default: all')
    args = parser.parse_args(argv)
    with reported(parser):
        require_writable(args.file)
        results = json.loads(read_text(args.file))['results'] if args.file.exists() else []
        for name in (*args.models, EMBEDDED):
            if name not in [each['model'] for each in results]:
                results.append(cost_for_digits() if name == EMBEDDED else cost(name))
                document = dict(environment=environment(), results=results)
                atomic_write_text(args.file, json.dumps(document, indent=1) + '\n')
    for each in results:
        accuracy = f', {each["top1"]} %: {each["openvino_top1"]} %, {each["onnx_top1"]} %' if 'top1' in each else ''
        print(f'{each["model"]}: OpenVINO {each["openvino"]:.1%}, ONNX {each["onnx"]:.1%}{accuracy}')


if __name__ == '__main__':
    main()
