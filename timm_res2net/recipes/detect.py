"""Trains a detector on a data set in COCO's format: torchvision's FCOS on a feature pyramid over any timm model.

    python -m timm_res2net.recipes.detect --data data/coco --train train2017 --val val2017 --output-dir runs/coco \\
        --backbone res2net50d --pretrained --num-train-epochs 12 --bf16
    python -m timm_res2net.recipes.detect --predict photos --output-dir runs/coco

The first command trains; run it again to continue after an interruption. All options of transformers' TrainingArguments
apply, and torchrun or `accelerate launch` uses several GPUs. The second command finds objects in new images.
"""

import json
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, nms
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms import v2

from .._files import atomic_write_text, make_folder
from . import training
from .coco import CocoImages
from .metrics import AREAS, compute_precision, pack_detections
from .pictures import SHOWN, Panel, draw_grid

STRIDES = [8, 16, 32]  # of the features under the pyramid, which adds two more levels


class Pyramid(nn.Module):
    """A feature pyramid over a backbone: levels of stride 8, 16, 32, 64 and 128, with `channels` channels each."""

    def __init__(self, body: Any, channels: int = 256) -> None:
        super().__init__()
        self.body = body
        self.neck = FeaturePyramidNetwork(body.feature_info.channels(), channels, LastLevelP6P7(channels, channels))
        self.out_channels = channels

    def forward(self, x: Tensor) -> 'OrderedDict[str, Tensor]':
        """Computes levels from (N, C, H, W), in float32 because torchvision computes coordinates in their data type."""
        levels = self.neck(OrderedDict((str(i), feature) for i, feature in enumerate(self.body(x))))
        return OrderedDict((name, level.float()) for name, level in levels.items())


def create_backbone(name: str, **kwargs: Any) -> nn.Module:
    """Creates a timm model that computes its last three features; ValueError if their strides are not 8, 16 and 32."""
    body: Any = timm.create_model(name, features_only=True, out_indices=(-3, -2, -1), **kwargs)
    if (strides := body.feature_info.reduction()) != STRIDES:
        raise ValueError(f'cannot build a pyramid on {name!r}: its last features have strides {strides}, not {STRIDES}')
    return body


def create_detector(body: Any, classes: int, channels: int = 256, **kwargs: Any) -> FCOS:
    """Creates a detector over a backbone. `classes` excludes the background; pyramid levels have `channels` channels.

    Keyword arguments are those of torchvision's FCOS, such as `min_size` and `score_thresh`; TypeError for others.
    """
    known = signature(FCOS).parameters.keys() | signature(GeneralizedRCNNTransform).parameters.keys()
    if unknown := kwargs.keys() - known:
        raise TypeError(f"torchvision's FCOS has no argument {min(unknown)!r}")  # FCOS would ignore it
    config = resolve_model_data_config(body)
    kwargs = dict(image_mean=config['mean'], image_std=config['std'], score_thresh=0.05) | kwargs
    return FCOS(Pyramid(body, channels), classes + 1, **kwargs)


def load_detector(folder: str | Path) -> FCOS:
    """Loads the best model of a finished run, in evaluation mode; ValueError if the folder has none."""
    run = training.read_run(folder)
    body = create_backbone(run['backbone'], **run['model_kwargs'])
    model = create_detector(body, len(run['names']), run['channels'], **run['detector_kwargs'])
    return training.load_best(model, folder)


def compute_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    return torch.stack(list(model(batch['image'], batch['target']).values())).sum()


def make_trainer(
    model: FCOS, args: Any, train_set: CocoImages, val_set: CocoImages, areas: Sequence[int]
) -> training.RecipeTrainer:
    """Makes the Trainer of a detector; `compute_precision` takes the `areas`."""
    return training.RecipeTrainer(
        compute_loss,
        pack_detections,
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=val_set,
        compute_metrics=partial(compute_precision, val_set, areas),
    )


@torch.no_grad()
def find_objects(model: FCOS, image: Tensor, score: float = 0.3) -> dict[str, Tensor]:
    """Finds objects in an image, (3, H, W) in 0..1: the most likely one at each place, whatever its class.

    Returns boxes (N, 4) as corners, labels (N,) from 1, and scores (N,), none below `score`, on the CPU.
    """
    found = model([image.to(next(model.parameters()).device)])[0]
    sure = (found['scores'] >= score) & (found['labels'] > 0)  # 0 is FCOS's background class
    found = {name: value[sure].cpu() for name, value in found.items()}
    kept = nms(found['boxes'], found['scores'], 0.5)  # the detector itself suppresses within each class
    return {name: value[kept] for name, value in found.items()}


def draw_examples(model: FCOS, dataset: CocoImages, out: Path) -> None:
    """Draws the first images twice: with their true and with their detected objects."""
    panels = []
    for index in range(min(SHOWN, len(dataset))):
        image, truth = dataset[index]['image'], dataset[index]['target']
        for title, objects in (('truth', truth), ('found', find_objects(model, image))):
            panels.append(Panel(f'{index + 1}: {title}', image, objects['boxes'].tolist(), objects['labels'].tolist()))
    draw_grid(panels, dataset.names, str(out))


def train(options: Namespace, args: Any) -> None:
    """Trains a detector, and draws the objects that it finds."""
    train_set = CocoImages(options.data, options.train, v2.RandomHorizontalFlip())
    val_set = CocoImages(options.data, options.val)
    body = create_backbone(options.backbone, pretrained=options.pretrained, **options.model_kwargs)
    training.prepare_backbone(body, options)
    model = create_detector(body, len(train_set.names), options.channels, **options.detector_kwargs)
    training.train(make_trainer(model, args, train_set, val_set, options.areas), options, body, draw_examples)


def predict(images: Iterable[tuple[Path, Tensor]], options: Namespace, args: Any) -> None:
    """Writes predictions/objects.json with the objects in new images, and a picture of each image."""
    model, names = load_detector(args.output_dir).to(args.device), training.read_run(args.output_dir)['names']
    out, results = make_folder(Path(args.output_dir, 'predictions')), []
    for file, image in images:
        found = find_objects(model, image, options.score)
        boxes, labels, scores = (found[name].tolist() for name in ('boxes', 'labels', 'scores'))
        draw_grid([Panel(file.name, image, boxes, labels)], names, str(out / f'{file.stem}.png'), columns=1)
        objects = [
            dict(box=box, name=names[label - 1], score=score) for box, label, score in zip(boxes, labels, scores)
        ]
        results.append(dict(file=str(file), objects=objects))
    atomic_write_text(out / 'objects.json', json.dumps(results, indent=1) + '\n')
    print(f'Found {sum(len(each["objects"]) for each in results)} objects in {len(results)} images: {out}')


def main(argv: Sequence[str] | None = None) -> None:
    parser = training.make_parser(__doc__, metric='AP')
    parser.add_argument('--model-kwargs', **training.KEYWORDS, help='arguments of timm.create_model')
    parser.add_argument('--channels', type=int, default=256, help='channels of each pyramid level')
    parser.add_argument(
        '--detector-kwargs', **training.KEYWORDS, help="arguments of torchvision's FCOS, such as min_size and max_size"
    )
    parser.add_argument(
        '--areas', nargs=2, type=int, default=list(AREAS), help='smallest sides of medium and large objects, in pixels'
    )
    parser.add_argument('--score', type=float, default=0.3, help='with --predict: lowest score of an object')
    training.run(parser, argv, train, predict)


if __name__ == '__main__':
    main()
