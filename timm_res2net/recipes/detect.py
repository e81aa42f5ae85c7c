"""Trains a detector on any set in COCO's format: torchvision's FCOS on a feature pyramid over any model of timm.

    python -m timm_res2net.recipes.detect data/coco runs/coco --train train2017 --val val2017 \\
        --backbone res2net50d --pretrained --show found.png

The set is a folder with images in NAME/ and annotations/instances_NAME.json. The detector is FCOS because it has no
anchors, whose sizes and shapes have to be chosen anew for each set. AP is that of pycocotools. The run's folder keeps
the best model and the last; --resume goes on where a run was stopped, and draws what a finished one finds. torchrun
starts several processes.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import FCOS
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, nms
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from .arguments import Keywords, make_parser, positive, reported
from .backbones import add_arguments, begin, choices_of, data_of, end, prepare
from .coco import AREAS, SHOWN, CocoImages, Target, average_precision, draw, save_sheet
from .training_loop import Settings, batches_of, fit, gather, settings_of, share_of

__all__ = ['Pyramid', 'create_backbone', 'create_detector', 'evaluate', 'train']

STRIDES = 8, 16, 32  # of the features that the pyramid is built on; two more levels follow
SURE = 0.3  # the score from which on a box is drawn

Batch = tuple[tuple[Tensor, ...], tuple[Target, ...]]


class Pyramid(nn.Module):
    """A feature pyramid over a backbone: levels of stride 8, 16, 32, 64 and 128.

    Args:
        body: A model of timm with `features_only`, whose features have strides 8, 16 and 32.
        channels: Of each level.
    """

    def __init__(self, body: Any, channels: int = 256) -> None:
        super().__init__()
        self.body = body
        self.neck = FeaturePyramidNetwork(body.feature_info.channels(), channels, LastLevelP6P7(channels, channels))
        self.out_channels = channels

    def forward(self, x: Tensor) -> 'OrderedDict[str, Tensor]':
        """Computes levels from (N, C, H, W), in float32: torchvision gives their data type to coordinates."""
        levels = self.neck(OrderedDict((str(i), feature) for i, feature in enumerate(self.body(x))))
        return OrderedDict((name, level.float()) for name, level in levels.items())


def create_backbone(name: str, **kwargs: Any) -> nn.Module:
    """Makes a feature extractor with strides 8, 16 and 32.

    Args:
        name: timm's name of the model.
        **kwargs: Of `timm.create_model`.

    Raises:
        ValueError: If the model lacks such a stride.
    """
    whole: Any = timm.create_model(name, features_only=True, **{**kwargs, 'pretrained': False})
    strides = [each['reduction'] for each in whole.feature_info.info]
    if missing := sorted(set(STRIDES) - set(strides)):
        raise ValueError(f'{name} has features of strides {strides}; a pyramid needs {missing}, too')
    indices = [len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES]  # the deepest of each
    return timm.create_model(name, features_only=True, out_indices=indices, **kwargs)


def create_detector(body: nn.Module, classes: int, channels: int = 256, **kwargs: Any) -> FCOS:
    """Makes a detector.

    Args:
        body: Of `create_backbone`.
        classes: Without the background.
        channels: Of the pyramid's levels.
        **kwargs: Of torchvision's FCOS, such as `min_size`, `max_size` and `score_thresh`.

    Raises:
        TypeError: If FCOS knows no such argument.
        ValueError: If there can't be so many channels.
    """
    known = signature(FCOS).parameters.keys() | signature(GeneralizedRCNNTransform).parameters.keys()
    if unknown := kwargs.keys() - known:
        raise TypeError(f"torchvision's FCOS has no argument {min(unknown)}")  # it would ignore it
    if channels % 32 or channels < 64:
        raise ValueError(f'channels={channels} is not possible: norms of FCOS have 32 groups; give 64, 96, 128, ...')
    config = resolve_model_data_config(body)
    options = dict(image_mean=config['mean'], image_std=config['std'], score_thresh=0.05) | kwargs
    return FCOS(Pyramid(body, channels), classes + 1, **options)


class Mirrored(Dataset[tuple[Tensor, Target]]):
    """Mirrors every other image of a set, by chance."""

    def __init__(self, images: Dataset[tuple[Tensor, Target]]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image, target = self.images[index]
        if torch.rand(()) < 0.5:
            left, top, right, bottom = target['boxes'].unbind(dim=1)
            width = image.shape[2]
            target = {**target, 'boxes': torch.stack([width - right, top, width - left, bottom], dim=1)}
            image = image.flip(2)
        return image, target


def collate(samples: Sequence[tuple[Tensor, Target]]) -> Batch:
    """Images of any sizes, and their targets."""
    images, targets = zip(*samples)
    return images, targets


def losses(device: torch.device, model: nn.Module, batch: Batch) -> Tensor:
    """The sum of the detector's losses."""
    images, targets = batch
    moved = [{name: value.to(device) for name, value in target.items()} for target in targets]
    found: dict[str, Tensor] = model([image.to(device) for image in images], moved)
    return torch.stack(list(found.values())).sum()


def objects(found: Target) -> Target:
    """What was found, on the CPU; without the background, which FCOS has a score for, too."""
    kept = found['labels'] > 0
    return {name: value[kept].cpu() for name, value in found.items()}


def evaluate(
    dataset: CocoImages,
    areas: tuple[int, int],
    batch_size: int,
    workers: int,
    device: torch.device,
    model: nn.Module,
) -> dict[str, float]:
    """COCO's average precisions of a detector on a set; each process runs it on a share of the images."""
    found = []
    for images, targets in DataLoader(share_of(dataset), batch_size, num_workers=workers, collate_fn=collate):
        outputs = model([image.to(device) for image in images])
        for target, output in zip(targets, outputs):
            found.append((int(target['image_id']), objects(output)))
    return average_precision(dataset, gather(found), areas)


def train(
    model: nn.Module,
    images: Dataset[tuple[Tensor, Target]],
    dataset: CocoImages,
    settings: Settings,
    folder: Path,
    *,
    areas: tuple[int, int] = AREAS,
    workers: int = 0,
    device: torch.device | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Trains a detector of torchvision.

    Args:
        model: Takes lists of images and targets, as all detectors of torchvision do.
        images: To train with.
        dataset: To evaluate with.
        settings: How to train.
        folder: Where the run lives.
        areas: Pixels across of a square at which medium and large objects begin.
        workers: Processes that read images.
        device: Where to train, the CPU if None.
        **options: Of `fit`.

    Returns:
        Learning rate, loss and average precisions of each epoch.

    Raises:
        ValueError: See `batches_of` and `fit`.
        OSError: If the folder can't be written.
    """
    device = device or torch.device('cpu')
    batches = batches_of(Mirrored(images), settings, workers, collate)
    check = partial(evaluate, dataset, areas, settings.batch_size, workers, device)
    return fit(model.to(device), batches, partial(losses, device), check, settings, folder, device=device, **options)


def show(dataset: CocoImages, model: nn.Module, out: str, device: torch.device) -> None:
    """Draws what a detector finds in the first images of a set, with classes and scores; the surest of one place."""
    pictures = []
    with torch.no_grad():
        for index in range(min(SHOWN, len(dataset))):
            image = dataset.image(index)
            found = objects(model([image.to(device)])[0])
            kept = nms(found['boxes'], found['scores'], 0.5)  # a detector does that for each class
            kept = kept[found['scores'][kept] >= SURE]
            labels, scores = found['labels'][kept].tolist(), found['scores'][kept].tolist()
            texts = [f'{dataset.names[label - 1]} {score:.2f}' for label, score in zip(labels, scores)]
            pictures.append(draw(image, found['boxes'][kept], texts))
    save_sheet(pictures, out)


def main(argv: list[str] | None = None) -> None:
    """Trains a detector, prints its average precisions, and draws what it finds."""
    parser = make_parser(__doc__)
    parser.add_argument('data', type=Path, help="a set in COCO's format")
    parser.add_argument('--channels', type=positive, default=256, help='of the pyramid (default: 256)')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=Keywords, help='of timm.create_model')
    parser.add_argument('--detector-kwargs', nargs='*', default={}, action=Keywords, help="of torchvision's FCOS")
    parser.add_argument(
        '--areas', nargs=2, type=positive, default=AREAS, help='pixels across of squares: small | medium | large'
    )
    add_arguments(parser, 'res2net50d')
    args = parser.parse_args(argv)
    about = choices_of(args, 'channels', 'areas', 'model_kwargs', 'detector_kwargs')
    with reported(parser):
        settings = settings_of(args)
        begin(args)
        images, dataset = CocoImages(args.data, args.train), CocoImages(args.data, args.val)
        if images.names != dataset.names:
            raise ValueError(f'{args.train} and {args.val} have other categories')
        about |= data_of(images, dataset, images.names)
        body = create_backbone(args.backbone, pretrained=args.pretrained, **args.model_kwargs)
        prepare(body, args.weights, args.frozen_stages, args.frozen_norms)
        model = create_detector(body, len(images.names), args.channels, **args.detector_kwargs)
        history = train(
            model,
            images,
            dataset,
            settings,
            Path(args.out),
            areas=tuple(args.areas),
            workers=args.workers,
            device=args.device,
            about=about,
            resume=args.resume,
        )
        end(args, model, history, partial(show, dataset))


if __name__ == '__main__':
    main()
