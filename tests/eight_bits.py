"""Measures the error of int8 for every trunk, block and scale, and the accuracy of the embedded digits model.

    python tests/eight_bits.py int8.json

Exports full-size networks with random weights in int8 to OpenVINO and ONNX, and compares them with their float32 models
on crops of scikit-image's photographs, which also calibrate them. Each takes a minute or two. After an interruption,
run the script again to continue with the next.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from support import randomize
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from timm_res2net._files import atomic_write_text
from timm_res2net.deploy.bench import environment
from timm_res2net.deploy.export import export
from timm_res2net.deploy.exported import load_exported
from timm_res2net.models.classifier import class_names
from timm_res2net.models.variants import EMBEDDED
from timm_res2net.recipes import digits
from timm_res2net.recipes.multi_scale import whole_photographs
from timm_res2net.vision.validate import labeled_images, validate

MODELS = (
    *('res2net50_48w_2s', 'res2net50_26w_4s', 'res2net50_26w_6s', 'res2net50_26w_8s'),  # several scales
    *('res2net50d', 'res2net50_vd_26w_4s', 'seres2net50_26w_4s', 'res2next50'),  # several blocks
    *('dla60_res2net', 'blres2net50_26w_4s', 'res2next29_6c_24w_4s'),  # several trunks
)
SUFFIXES = {'openvino': '.xml', 'onnx': '.onnx'}
SIDE = 128  # pixels of a crop


def crops(model: nn.Module) -> Tensor:
    """Preprocesses two corners of each photograph, (32, 3, H, W), at a size that fits the model."""
    config = resolve_model_data_config(model)
    side = min(SIDE, config['input_size'][1])
    transform: Any = create_transform(**{**config, 'input_size': (3, side, side), 'crop_pct': 1.0})
    found = []
    for photograph in whole_photographs('RGB'):
        width, height = photograph.size
        for left, top in ((0, 0), (width - SIDE, height - SIDE)):
            found.append(transform(photograph.crop((left, top, left + SIDE, top + SIDE))))
    return torch.stack(found)


def measure(name: str) -> dict[str, Any]:
    """Measures the root mean square difference of the logits in int8, relative to the float32 logits."""
    torch.manual_seed(0)
    model = randomize(timm.create_model(name)).eval()
    images = crops(model)
    found: dict[str, Any] = dict(model=name)
    with TemporaryDirectory() as folder:
        for runtime, suffix in SUFFIXES.items():
            done = export(model, f'{folder}/net{suffix}', precision='int8', images=images, size=images.shape[-1])
            found[runtime] = round(done.mean_difference, 4)
    return found


def measure_digits() -> dict[str, Any]:
    """Measures the same for the embedded model, and its accuracy on the held-out digits, in %."""
    model = timm.create_model(EMBEDDED, pretrained=True).eval()
    with TemporaryDirectory() as folder:
        digits.main([f'{folder}/digits'])
        images = labeled_images(f'{folder}/digits/val', class_names(model))
        found: dict[str, Any] = dict(model=EMBEDDED, top1=round(validate(model, images).top1, 2))
        for runtime, suffix in SUFFIXES.items():
            done = export(model, f'{folder}/net{suffix}', precision='int8', images=f'{folder}/digits/train')
            found[runtime] = round(done.mean_difference, 4)
            found[f'{runtime}_top1'] = round(validate(load_exported(done.file), images).top1, 2)
    return found


def main() -> None:
    """Measures the models that are not in the file yet, and adds them one by one."""
    file = Path(sys.argv[1])
    results = json.loads(file.read_text())['results'] if file.exists() else []
    for name in (*MODELS, EMBEDDED):
        if name not in [each['model'] for each in results]:
            results.append(measure_digits() if name == EMBEDDED else measure(name))
            document = dict(environment=environment(), results=results)
            atomic_write_text(file, json.dumps(document, indent=1) + '\n')


if __name__ == '__main__':
    main()
