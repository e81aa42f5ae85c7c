"""Trains a semantic segmenter: a decoder of segmentation_models_pytorch over any timm model.

    python -m timm_res2net.recipes.segment --data VOCdevkit/VOC2012 --classes 21 --output-dir runs/voc --pretrained
    python -m timm_res2net.recipes.segment --data polyps --train TrainDataset --val TestDataset/CVC-300 --binary \\
        --output-dir runs/polyps --pretrained --size 352
    python -m timm_res2net.recipes.segment --predict photos --output-dir runs/polyps

The first two commands train, on a data set in one of the layouts that `masks.py` lists; pixels with label 255 are
ignored. Run the same command again to continue after an interruption. All options of transformers' TrainingArguments
apply, and torchrun or `accelerate launch` uses several GPUs. The last command segments new images.
"""

from argparse import Namespace
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

from .._files import atomic_write, make_folder
from . import training
from .masks import IGNORED, MaskedImages, augment, require_foreground
from .metrics import average_scores, compute_iou, count_pixels, score_binary
from .pictures import SHOWN, Panel, draw_grid, paint_labels

STRIDE = 32  # decoders need images with sides that are multiples of this


class Segmenter(nn.Module):
    """A model of segmentation_models_pytorch that takes images in 0..1, of any size."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer('mean', torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer('std', torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Computes logits, (N, 3, H, W) to (N, classes, H, W)."""
        height, width = x.shape[-2:]
        padded = F.pad((x - self.mean) / self.std, (0, -width % STRIDE, 0, -height % STRIDE))
        logits: Tensor = self.model(padded)
        return logits[..., :height, :width]


def create_segmenter(
    architecture: str, backbone: str, classes: int, pretrained: bool = False, **kwargs: Any
) -> Segmenter:
    """Creates a segmenter with an architecture of smp, such as 'unet'; `classes` includes the background.

    Keyword arguments are those of the architecture, such as `decoder_channels`. KeyError for an unknown architecture.
    """
    import segmentation_models_pytorch as smp

    weights = 'imagenet' if pretrained else None
    model = smp.create_model(architecture, f'tu-{backbone}', encoder_weights=weights, classes=classes, **kwargs)
    config = resolve_model_data_config(model.encoder.model)
    return Segmenter(model, config['mean'], config['std'])


def load_segmenter(folder: str | Path) -> Segmenter:
    """Loads the best model of a finished run, in evaluation mode; ValueError if the folder has none.

    Example:
        segmenter = load_segmenter('runs/voc')
        segmenter(torch.rand(1, 3, 200, 300)).shape  # (1, 21, 200, 300)
    """
    run = training.read_run(folder)
    model = create_segmenter(run['architecture'], run['backbone'], len(run['names']), **run['architecture_kwargs'])
    return training.load_best(model, folder)


def compute_loss(binary: bool, model: Any, batch: dict[str, Any]) -> Tensor:
    """Computes the mean cross entropy over pixels that are not ignored, plus the Dice loss for binary masks."""
    logits, masks = model(torch.stack(batch['image'])).float(), torch.stack(batch['mask'])
    counted = masks != IGNORED
    loss = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction='sum') / counted.sum().clamp(min=1)
    if binary:
        truth, found = (masks == 1).float(), logits.softmax(dim=1)[:, 1] * counted
        loss = loss + 1 - (2 * (truth * found).sum() + 1) / (truth.sum() + found.sum() + 1)
    return loss


@torch.no_grad()
def draw_examples(model: Segmenter, dataset: MaskedImages, out: Path) -> None:
    """Draws the first images, with their true and their predicted labels."""
    panels = []
    for index in range(min(SHOWN, len(dataset))):
        image, mask = dataset.read(index)
        found = model(image[None].to(model.mean.device))[0].argmax(dim=0).cpu()
        panels.append(Panel(f'{index + 1}: image', image))
        for title, labels in (('truth', mask), ('found', found)):
            present = sorted(set(labels.unique().tolist()) - {0, IGNORED})
            panels.append(Panel(f'{index + 1}: {title}', paint_labels(labels), labels=present))
    draw_grid(panels, dataset.names[1:], str(out), columns=6)


def train(options: Namespace, args: Any) -> None:
    """Trains a segmenter, and draws the labels that it predicts."""
    if options.size % STRIDE:
        raise ValueError(f'cannot use --size {options.size}: it must be a multiple of {STRIDE}')
    threshold = options.threshold if options.binary else None
    train_set = MaskedImages(options.data, options.train, options.classes, threshold, partial(augment, options.size))
    val_set = MaskedImages(options.data, options.val, options.classes, threshold)
    require_foreground(val_set)
    name, count = options.architecture, len(train_set.names)
    model = create_segmenter(name, options.backbone, count, options.pretrained, **options.architecture_kwargs)
    body = model.model.get_submodule('encoder.model')
    training.prepare_backbone(body, options)
    trainer = training.RecipeTrainer(
        partial(compute_loss, options.binary),
        score_binary if options.binary else count_pixels,
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=val_set,
        compute_metrics=average_scores if options.binary else compute_iou,
    )
    training.train(trainer, options, body, draw_examples)


@torch.no_grad()
def predict(images: Iterable[tuple[Path, Tensor]], options: Namespace, args: Any) -> None:
    """Writes a PNG for each new image to predictions/: probabilities as gray levels if binary, else colored labels."""
    run, model = training.read_run(args.output_dir), load_segmenter(args.output_dir).to(args.device)
    out = make_folder(Path(args.output_dir, 'predictions'))
    count = 0
    for file, image in images:
        count += 1
        logits = model(image[None].to(args.device))[0].cpu()
        picture = to_pil_image(logits.softmax(dim=0)[1] if run['binary'] else paint_labels(logits.argmax(dim=0)))
        atomic_write(out / f'{file.stem}.png', partial(picture.save, format='PNG'))
    print(f'Segmented {count} images: {out}')


def main(argv: Sequence[str] | None = None) -> None:
    parser = training.make_parser(__doc__, metric='mIoU')
    parser.add_argument('--classes', type=int, help='number of labels in the masks, including the background')
    parser.add_argument('--binary', action='store_true', help='masks are gray images, see --threshold')
    parser.add_argument(
        '--threshold', type=int, default=128, help='with --binary: lowest level of the foreground (0..255)'
    )
    parser.add_argument('--architecture', default='unet', help='architecture of segmentation_models_pytorch')
    parser.add_argument('--architecture-kwargs', **training.KEYWORDS, help='arguments of that architecture')
    parser.add_argument('--size', type=int, default=512, help='side of the square crops to train on, in pixels')
    training.run(parser, argv, train, predict)


if __name__ == '__main__':
    main()
