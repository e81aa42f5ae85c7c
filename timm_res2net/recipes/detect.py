"""Trains a detector on a data set in COCO's format: torchvision's FCOS on a feature pyramid over any timm model.

    python -m timm_res2net.recipes.detect --data data/coco --train train2017 --val val2017 --output-dir runs/coco \\
        --backbone res2net50d --pretrained --num-train-epochs 12 --bf16
    python -m timm_res2net.recipes.detect --predict photos --output-dir runs/coco

The first command trains, and continues if it is run again after an interruption. It takes all options of transformers'
TrainingArguments, and runs on several GPUs by torchrun or `accelerate launch`. The second finds objects in new images.
"""

import json
from collections import OrderedDict
from dataclasses import dataclass
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
from transformers import set_seed

from .._files import atomic_write_text, make_folder
from . import training
from .arguments import parse_keywords
from .coco import CocoImages, read_image
from .metrics import AREAS, Found, compute_precision, pack_detections, unpack_detections
from .pictures import SHOWN, Panel, draw_grid
from .training import option

STRIDES = 8, 16, 32  # of the features under the pyramid, which adds two more levels


@dataclass
class TrainOptions(training.TrainOptions):
    """Options for training a detector, besides the Trainer's own."""

    channels: int = option(256, 'channels of each pyramid level')
    model_kwargs: list[str] = option([], 'KEY=VALUE arguments of timm.create_model')
    detector_kwargs: list[str] = option([], "KEY=VALUE arguments of torchvision's FCOS, such as min_size and max_size")
    areas: list[int] = option(list(AREAS), 'sides of the squares from which objects are medium and large, in pixels')


@dataclass
class PredictOptions(training.PredictOptions):
    """Options for finding objects in new images."""

    score: float = option(0.3, 'smallest score of an object')


class Pyramid(nn.Module):
    """A feature pyramid over a backbone: levels of stride 8, 16, 32, 64 and 128, with `channels` channels each."""

    def __init__(self, body: Any, channels: int = 256) -> None:
        super().__init__()
        self.body = body
        self.neck = FeaturePyramidNetwork(body.feature_info.channels(), channels, LastLevelP6P7(channels, channels))
        self.out_channels = channels

    def forward(self, x: Tensor) -> 'OrderedDict[str, Tensor]':
        """Computes levels from (N, C, H, W), in float32: torchvision computes coordinates in their data type."""
        levels = self.neck(OrderedDict((str(i), feature) for i, feature in enumerate(self.body(x))))
        return OrderedDict((name, level.float()) for name, level in levels.items())


def create_backbone(name: str, **kwargs: Any) -> nn.Module:
    """Creates a timm model as a feature extractor with strides 8, 16 and 32; ValueError if it lacks one of them."""
    with torch.device('meta'):
        whole: Any = timm.create_model(name, features_only=True, **{**kwargs, 'pretrained': False})
    strides = [each['reduction'] for each in whole.feature_info.info]
    if missing := sorted(set(STRIDES) - set(strides)):
        raise ValueError(f'cannot build a pyramid on {name!r}: its features have strides {strides}, without {missing}')
    indices = [len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES]  # the deepest of each
    return timm.create_model(name, features_only=True, out_indices=indices, **kwargs)


def create_detector(body: Any, classes: int, channels: int = 256, **kwargs: Any) -> FCOS:
    """Creates a detector of `classes` classes, without the background, with so many channels in each pyramid level.

    Keyword arguments are those of torchvision's FCOS, such as `min_size` and `score_thresh`; TypeError for others.
    """
    known = signature(FCOS).parameters.keys() | signature(GeneralizedRCNNTransform).parameters.keys()
    if unknown := kwargs.keys() - known:
        raise TypeError(f"torchvision's FCOS has no argument {min(unknown)!r}")  # it would ignore it
    if channels % 32 or channels < 64:
        raise ValueError(f'cannot use channels={channels}: the norms of FCOS have 32 groups. Use 64, 96, 128, ...')
    config = resolve_model_data_config(body)
    kwargs = dict(image_mean=config['mean'], image_std=config['std'], score_thresh=0.05) | kwargs
    return FCOS(Pyramid(body, channels), classes + 1, **kwargs)


def load_detector(folder: str | Path) -> FCOS:
    """Loads the best model of a finished run, in evaluation mode; ValueError if there is none.

    Example:
        detector = load_detector('runs/coco')
        found = detector([torch.rand(3, 480, 640)])[0]  # boxes (N, 4), labels (N,) from 1, scores (N,)
    """
    run = training.read_run(folder)
    body = create_backbone(run['backbone'], **run['model_kwargs'])
    model = create_detector(body, len(run['names']), run['channels'], **run['detector_kwargs'])
    return training.load_best(model, folder)


def compute_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """Adds up the losses of a torchvision detector."""
    return torch.stack(list(model(batch['image'], batch['target']).values())).sum()


def make_trainer(model: FCOS, args: Any, images: Any, dataset: CocoImages, areas: Any) -> training.RecipeTrainer:
    """Makes the Trainer of a detector: it trains on `images`, with items as of `CocoImages`, evaluates on `dataset`."""
    return training.RecipeTrainer(
        compute_loss,
        pack_detections,
        model=model,
        args=args,
        train_dataset=images,
        eval_dataset=dataset,
        compute_metrics=partial(compute_precision, dataset, tuple(areas)),
    )


@torch.no_grad()
def find_objects(model: FCOS, image: Tensor, score: float = 0.3) -> Found:
    """Finds objects in an image, (3, H, W) in 0..1: at each place the one with the highest score, of any class."""
    batch = dict(image=[image.to(next(model.parameters()).device)])
    found = unpack_detections(pack_detections(model, batch)[0].cpu(), score)
    kept = nms(found['boxes'], found['scores'], 0.5)  # the detector itself suppresses within each class
    return {name: value[kept] for name, value in found.items()}


def draw_examples(model: FCOS, dataset: CocoImages, out: Path) -> None:
    """Draws the truth next to the detections of the first images."""
    panels = []
    for index in range(min(SHOWN, len(dataset))):
        image, truth = dataset[index]['image'], dataset[index]['target']
        for title, objects in (('truth', truth), ('found', find_objects(model, image))):
            panels.append(Panel(f'{index + 1}: {title}', image, objects['boxes'], objects['labels'].tolist()))
    draw_grid(panels, dataset.names, str(out))


def train(options: TrainOptions, args: Any) -> None:
    """Trains a detector by these options and TrainingArguments, and draws what it finds."""
    set_seed(args.seed)
    images = CocoImages(Path(options.data), options.train, v2.RandomHorizontalFlip())
    dataset = CocoImages(Path(options.data), options.val)
    if images.names != dataset.names:
        raise ValueError(f'{options.train!r} and {options.val!r} have different categories')
    model_kwargs, detector_kwargs = parse_keywords(options.model_kwargs), parse_keywords(options.detector_kwargs)
    body = create_backbone(options.backbone, pretrained=options.pretrained, **model_kwargs)
    training.prepare_backbone(body, options.weights, options.frozen_stages, options.frozen_norms)
    model = create_detector(body, len(images.names), options.channels, **detector_kwargs)
    more = dict(names=images.names, model_kwargs=model_kwargs, detector_kwargs=detector_kwargs)
    if training.train(make_trainer(model, args, images, dataset, options.areas), options, body, **more):
        draw_examples(model.eval(), dataset, Path(args.output_dir, 'examples.png'))


def predict(options: PredictOptions) -> None:
    """Writes the objects in new images to predictions/: all to objects.json, and a picture of each image."""
    model = load_detector(options.output_dir).to(options.device)
    names = training.read_run(options.output_dir)['names']
    out, results = make_folder(Path(options.output_dir, 'predictions')), []
    for file in training.find_pictures(options.predict):
        image = read_image(file)
        found = find_objects(model, image, options.score)
        labels = found['labels'].tolist()
        draw_grid([Panel(file.name, image, found['boxes'], labels)], names, str(out / f'{file.stem}.png'), columns=1)
        rows = zip(found['boxes'].tolist(), labels, found['scores'].tolist())
        objects = [dict(box=box, name=names[label - 1], score=score) for box, label, score in rows]
        results.append(dict(file=str(file), objects=objects))
    atomic_write_text(out / 'objects.json', json.dumps(results, indent=1) + '\n')
    print(f'Found {sum(len(each["objects"]) for each in results)} objects in {len(results)} images: {out}')


def main(argv: list[str] | None = None) -> None:
    """Trains a detector, or finds objects by a trained one."""
    training.run_recipe(argv, __doc__, (TrainOptions, train), (PredictOptions, predict), metric='AP')


if __name__ == '__main__':
    main()
