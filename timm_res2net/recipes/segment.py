"""Trains a semantic segmenter: a decoder of segmentation_models_pytorch over any timm model.

    python -m timm_res2net.recipes.segment --data VOCdevkit/VOC2012 --classes 21 --output-dir runs/voc --pretrained
    python -m timm_res2net.recipes.segment --data polyps --train TrainDataset --val TestDataset/CVC-300 --binary \\
        --output-dir runs/polyps --pretrained --size 352
    python -m timm_res2net.recipes.segment --predict photos --output-dir runs/polyps

The first two commands train; run one again to continue after an interruption. They take all options of transformers'
TrainingArguments, and run on several GPUs by torchrun or `accelerate launch`. `masks.py` lists the layouts of data sets
that are read. Pixels with label 255 are ignored. The last command segments new images.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image
from transformers import set_seed

from .._files import atomic_write, make_folder
from . import training
from .arguments import parse_keywords
from .coco import IGNORED, read_image
from .masks import Masked, augment, open_part, require_foreground
from .metrics import average_scores, compute_iou, count_pixels, score_binary
from .pictures import SHOWN, Panel, draw_grid, paint_labels
from .training import option

STRIDE = 32  # decoders need images whose sides are multiples of it


@dataclass
class TrainOptions(training.TrainOptions):
    """Options for training a segmenter, besides the Trainer's own."""

    classes: int | None = option(None, 'number of labels in the masks, with the background; not for COCO')
    binary: bool = option(False, 'masks are grey: foreground from --threshold on')
    threshold: int = option(128, 'with --binary: level, in 0..255, from which a pixel is foreground')
    architecture: str = option('unet', 'architecture of segmentation_models_pytorch')
    architecture_kwargs: list[str] = option([], 'KEY=VALUE arguments of that architecture')
    size: int = option(512, 'side of the square crops to train on, in pixels')


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
    """Creates a segmenter of `classes` classes with the background, with an architecture of smp, such as 'unet'.

    Keyword arguments are those of the architecture, such as `decoder_channels`; KeyError if there is no such one.
    """
    import segmentation_models_pytorch as smp

    weights = 'imagenet' if pretrained else None
    model = smp.create_model(architecture, f'tu-{backbone}', encoder_weights=weights, classes=classes, **kwargs)
    config = resolve_model_data_config(model.encoder.model)
    return Segmenter(model, config['mean'], config['std'])


def load_segmenter(folder: str | Path) -> Segmenter:
    """Loads the best model of a finished run, in evaluation mode.

    Raises:
        ValueError: If the folder has no finished run.

    Example:
        segmenter = load_segmenter('runs/voc')
        segmenter(torch.rand(1, 3, 200, 300)).shape  # (1, 21, 200, 300)
    """
    run = training.read_run(folder)
    model = create_segmenter(run['architecture'], run['backbone'], len(run['names']), **run['architecture_kwargs'])
    return training.load_best(model, folder)


def compute_loss(binary: bool, model: Any, batch: dict[str, Any]) -> Tensor:
    """Computes the mean cross entropy of the pixels that are not ignored, plus the Dice loss for binary masks."""
    logits, masks = model(torch.stack(batch['image'])).float(), torch.stack(batch['mask'])
    counted = masks != IGNORED
    loss = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction='sum') / counted.sum().clamp(min=1)
    if binary:
        truth, found = (masks == 1).float(), logits.softmax(dim=1)[:, 1] * counted
        loss = loss + 1 - (2 * (truth * found).sum() + 1) / (truth.sum() + found.sum() + 1)
    return loss


@torch.no_grad()
def draw_examples(model: Segmenter, dataset: Masked, out: Path) -> None:
    """Draws the first images next to their true and found labels."""
    panels = []
    for index in range(min(SHOWN, len(dataset))):
        image, mask = dataset.read(index)
        found = model(image[None].to(model.mean.device))[0].argmax(dim=0).cpu()
        panels.append(Panel(f'{index + 1}: image', image))
        for title, labels in (('truth', mask), ('found', found)):
            present = sorted(set(labels.unique().tolist()) - {0, IGNORED})
            panels.append(Panel(f'{index + 1}: {title}', paint_labels(labels), labels=present))
    draw_grid(panels, dataset.names[1:], str(out), columns=6)


def train(options: TrainOptions, args: Any) -> None:
    """Trains a segmenter by these options and TrainingArguments, and draws what it finds."""
    set_seed(args.seed)
    if options.size % STRIDE:
        raise ValueError(f'cannot use --size {options.size}: it is not a multiple of {STRIDE}')
    folder, threshold = Path(options.data), options.threshold if options.binary else None
    images = open_part(folder, options.train, options.classes, threshold, partial(augment, options.size))
    dataset = open_part(folder, options.val, options.classes, threshold)
    if images.names != dataset.names:
        raise ValueError(f'{options.train!r} and {options.val!r} have different categories')
    require_foreground(dataset, threshold)
    keywords, count = parse_keywords(options.architecture_kwargs), len(images.names)
    model = create_segmenter(options.architecture, options.backbone, count, options.pretrained, **keywords)
    body = model.model.get_submodule('encoder.model')
    training.prepare_backbone(body, options.weights, options.frozen_stages, options.frozen_norms)
    trainer = training.RecipeTrainer(
        partial(compute_loss, options.binary),
        score_binary if options.binary else count_pixels,
        model=model,
        args=args,
        train_dataset=images,
        eval_dataset=dataset,
        compute_metrics=average_scores if options.binary else compute_iou,
    )
    if training.train(trainer, options, body, names=images.names, architecture_kwargs=keywords):
        draw_examples(model.eval(), dataset, Path(args.output_dir, 'examples.png'))


@torch.no_grad()
def predict(options: training.PredictOptions) -> None:
    """Writes a PNG for each new image to predictions/: grey probabilities if binary, else labels in their colours."""
    run, model = training.read_run(options.output_dir), load_segmenter(options.output_dir).to(options.device)
    out, files = make_folder(Path(options.output_dir, 'predictions')), training.find_pictures(options.predict)
    for file in files:
        logits = model(read_image(file)[None].to(options.device))[0].cpu()
        picture = to_pil_image(logits.softmax(dim=0)[1] if run['binary'] else paint_labels(logits.argmax(dim=0)))
        atomic_write(out / f'{file.stem}.png', partial(picture.save, format='PNG'))
    print(f'Segmented {len(files)} images: {out}')


def main(argv: list[str] | None = None) -> None:
    """Trains a segmenter, or segments new images by a trained one."""
    predicting = training.PredictOptions, predict
    training.run_recipe(argv, __doc__, (TrainOptions, train), predicting, metric='mIoU')


if __name__ == '__main__':
    main()
