"""Trains a semantic segmenter: a decoder of segmentation_models_pytorch over any model of timm.

    python -m timm_res2net.recipes.segment VOCdevkit/VOC2012 runs/voc --classes 21 --backbone res2net50d --pretrained
    python -m timm_res2net.recipes.segment data/coco runs/coco --train train2017 --val val2017 --show found.png

The set is a folder of one of three kinds, with parts that have a NAME:

    annotations/instances_NAME.json, NAME/                                COCO's; the smallest object counts
    ImageSets/Segmentation/NAME.txt, JPEGImages/, SegmentationClass/      VOC's
    images/NAME/, masks/NAME/                                             a mask of the same stem for each image

Masks are images of one channel whose levels are labels, 0 for the background; 255 counts for nothing. The best model is
that with the highest mean intersection over union. A run that was stopped goes on with --resume; torchrun starts
several processes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.tv_tensors import Image as ImageTensor
from torchvision.tv_tensors import Mask
from torchvision.utils import draw_segmentation_masks

from ..deploy.images import readable_suffixes
from ..weights.files import read_text
from .arguments import Keywords, make_parser, positive, reported
from .backbones import add_arguments, begin, choices_of, data_of, end, prepare
from .coco import IGNORED, SHOWN, CocoImages, enlarge, read_image, save_sheet, semantic_mask
from .training_loop import batches_of, fit, gather, settings_of, share_of

__all__ = ['Masked', 'create_segmenter', 'evaluate', 'open_part', 'train_augmentation']

STRIDE = 32  # decoders want images that are a multiple of it

Pair = tuple[Tensor, Tensor]
Augmentation = Callable[[ImageTensor, Mask], tuple[ImageTensor, Mask]]


class Masked(Dataset[Pair]):
    """Images, (3, H, W) in 0..1, and the label of each pixel, (H, W).

    Args:
        read: Returns the image and the mask of an index.
        names: Of the images.
        classes: Labels that there can be, with the background.
        augment: Changes both.

    Raises:
        ValueError: If there can't be so many classes.
    """

    def __init__(
        self, read: Callable[[int], Pair], names: Sequence[str], classes: int, augment: Augmentation | None = None
    ) -> None:
        if classes > IGNORED:
            raise ValueError(f'there are {classes} classes, and labels are 0 to {IGNORED - 1}')
        self.read, self.names, self.classes, self.augment = read, names, classes, augment
        self.categories: list[str] = []  # names of the classes, if they are known

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Pair:
        image, mask = self.read(index)
        name = self.names[index]
        if image.shape[1:] != mask.shape:
            raise ValueError(f'{name} has {tuple(image.shape[1:])} pixels, and its mask {tuple(mask.shape)}')
        wrong = mask[((mask < 0) | (mask >= self.classes)) & (mask != IGNORED)]
        if len(wrong):
            raise ValueError(f'the mask of {name} has label {int(wrong[0])}, of {self.classes} classes')
        if self.augment is None:
            return image, mask.long()
        changed, changed_mask = self.augment(ImageTensor(image), Mask(mask.to(torch.uint8)))
        return changed.as_subclass(Tensor), changed_mask.as_subclass(Tensor).long()


def train_augmentation(size: int) -> Augmentation:
    """Makes what resizes to half to twice the own size, crops or fills to a square of `size` pixels, and mirrors."""
    fill: Any = {ImageTensor: 0.5, Mask: IGNORED}
    crop = v2.RandomCrop((size, size), pad_if_needed=True, fill=fill)
    return partial(augment, v2.Compose([crop, v2.RandomHorizontalFlip()]))


def augment(crop: Augmentation, image: ImageTensor, mask: Mask) -> tuple[ImageTensor, Mask]:
    """Resizes an image and its mask by chance, and crops them."""
    factor = 0.5 + 1.5 * torch.rand(()).item()
    height, width = (max(1, round(side * factor)) for side in mask.shape)
    return crop(*v2.Resize((height, width))(image, mask))


def open_part(folder: Path, name: str, classes: int | None, augment: Augmentation | None = None) -> Masked:
    """Opens a part of a set.

    Args:
        folder: The set.
        name: Of the part.
        classes: Labels that there can be; None for a set of COCO, which says that.
        augment: Changes images and masks.

    Raises:
        ValueError: If it is no set of a known kind, or the number of classes isn't known, or not possible.
    """
    if (folder / 'annotations').is_dir():
        dataset = CocoImages(folder, name)
        if classes not in (None, len(dataset.names) + 1):
            raise ValueError(f'{folder} has {len(dataset.names)} categories and the background; leave --classes out')
        masked = Masked(partial(read_coco, dataset), dataset.files, len(dataset.names) + 1, augment)
        masked.categories = dataset.names
        return masked
    if classes is None:
        raise ValueError(f'{folder} does not say how many classes its masks have; give --classes')
    files = files_of(folder, name)
    return Masked(partial(read_files, files), [str(image) for image, _ in files], classes, augment)


def files_of(folder: Path, name: str) -> list[tuple[Path, Path]]:
    """Images and masks of a part; ValueError if there are none, or an image has no mask."""
    names = folder / 'ImageSets' / 'Segmentation' / f'{name}.txt'
    if names.is_file():
        stems = read_text(names).split()
        images, masks = folder / 'JPEGImages', folder / 'SegmentationClass'
        files = [(images / f'{stem}.jpg', masks / f'{stem}.png') for stem in stems]
    else:
        found = {path.stem: path for path in pictures(folder / 'masks' / name)}
        shown = pictures(folder / 'images' / name)
        if lacking := [path for path in shown if path.stem not in found]:
            text = f'{len(lacking)} of {len(shown)} images have no mask in masks/{name}'
            raise ValueError(f'{text} ({lacking[0]} first)')
        files = [(path, found[path.stem]) for path in shown]
    if not files:
        raise ValueError(f'{folder} has no part {name}: no {names}, and no images/{name} with masks/{name}')
    return files


def pictures(folder: Path) -> list[Path]:
    """The files in a folder that have a suffix of images, in order, without hidden ones."""
    suffixes = readable_suffixes()
    return sorted(
        path
        for path in folder.glob('*')
        if path.is_file() and path.suffix.lower() in suffixes and not path.name.startswith('.')
    )


def require_foreground(dataset: Masked) -> None:
    """Raises a ValueError if masks hold 0 and 255 only, as those of two colours do; the first other label ends it."""
    found: set[int] = set()
    for index in range(len(dataset)):
        found.update(dataset[index][1].unique().tolist())
        if not found <= {0, IGNORED}:
            return
    if IGNORED in found:
        raise ValueError(
            f'the masks of {len(dataset)} images, from {dataset.names[0]} on, hold 0 and {IGNORED} only; {IGNORED} '
            'counts for nothing; save labels 0, 1 and so on'
        )


def read_files(files: list[tuple[Path, Path]], index: int) -> Pair:
    """Reads an image and its mask; ValueError if that is not possible."""
    pixels, path = read_image(files[index][0]), files[index][1]
    try:
        with Image.open(path) as mask:
            labels = np.array(mask)
    except OSError as error:
        raise ValueError(f'{path} can not be read: {error}') from error
    if labels.ndim != 2 or labels.dtype.kind not in 'biu':
        raise ValueError(f'{path} has colours or fractions; a mask has one channel of integers, which are labels')
    return pixels, torch.from_numpy(labels.astype(np.int64))


def read_coco(dataset: CocoImages, index: int) -> Pair:
    """Reads an image of a set of COCO, and the labels of its pixels; ValueError if that is not possible."""
    image = dataset.image(index)
    return image, semantic_mask(dataset, index, (image.shape[1], image.shape[2]))


class Segmenter(nn.Module):
    """A model of segmentation_models_pytorch that takes images in 0..1."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer('mean', torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer('std', torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Computes logits, (N, 3, H, W) in 0..1 to (N, classes, H, W), of images of any size."""
        height, width = x.shape[-2:]
        filled = F.pad((x - self.mean) / self.std, (0, -width % STRIDE, 0, -height % STRIDE))
        logits: Tensor = self.model(filled)
        return logits[..., :height, :width]


def create_segmenter(
    architecture: str, backbone: str, classes: int, pretrained: bool = False, **kwargs: Any
) -> Segmenter:
    """Makes a segmenter.

    Args:
        architecture: segmentation_models_pytorch's name, such as 'unet', 'fpn', 'deeplabv3plus'.
        backbone: timm's name of a model.
        classes: With the background.
        pretrained: Begin with timm's weights.
        **kwargs: Of the model of segmentation_models_pytorch, such as `decoder_channels`.

    Raises:
        ImportError: If segmentation_models_pytorch is not installed.
        KeyError: If there is no such architecture.
        RuntimeError: If timm has no such model.
    """
    import segmentation_models_pytorch as smp

    weights = 'imagenet' if pretrained else None
    model = smp.create_model(architecture, f'tu-{backbone}', encoder_weights=weights, classes=classes, **kwargs)
    config = resolve_model_data_config(model.encoder.model)
    return Segmenter(model, config['mean'], config['std'])


def loss(device: torch.device, model: nn.Module, batch: Pair) -> Tensor:
    """Mean cross entropy of the pixels that count; 0 if none does, where torch's mean is not a number."""
    images, masks = (each.to(device) for each in batch)
    total = F.cross_entropy(model(images).float(), masks, ignore_index=IGNORED, reduction='sum')
    return total / (masks != IGNORED).sum().clamp(min=1)


def evaluate(dataset: Masked, workers: int, device: torch.device, model: nn.Module) -> dict[str, float]:
    """Intersection over union in %, the mean over classes that occur, and the share of pixels that are right.

    Each process looks at a share of the images, one at a time, in their own size.

    Raises:
        ValueError: If no pixel counts.
    """
    classes = dataset.classes
    confusion = torch.zeros(classes * classes, dtype=torch.int64)  # truth, found
    for image, mask in DataLoader(share_of(dataset), num_workers=workers):
        found = model(image.to(device)).argmax(dim=1).cpu()
        counts = mask != IGNORED
        confusion += torch.bincount(mask[counts] * classes + found[counts], minlength=classes * classes)
    total = torch.stack(gather([confusion])).sum(dim=0).reshape(classes, classes).double()
    if not total.any():
        raise ValueError(f'no pixel of the {len(dataset)} images to evaluate with counts: all have label {IGNORED}')
    hits, union = total.diag(), total.sum(dim=0) + total.sum(dim=1) - total.diag()
    iou = 100 * (hits / union)[union > 0]
    return dict(mIoU=round(iou.mean().item(), 3), pixels=round(100 * (hits.sum() / total.sum()).item(), 3))


def show(dataset: Masked, model: nn.Module, out: str, device: torch.device) -> None:
    """Draws the labels that a segmenter finds in the first images of a set."""
    pictures = []
    with torch.no_grad():
        for index in range(min(SHOWN, len(dataset))):
            image, _ = dataset[index]
            found = model(image[None].to(device)).argmax(dim=1).cpu()
            masks = found == torch.arange(1, dataset.classes)[:, None, None]
            pixels = (image * 255).round().to(torch.uint8)
            both = torch.cat([pixels, draw_segmentation_masks(pixels, masks, alpha=0.6)], dim=2)
            pictures.append(enlarge(both, width=600))
    save_sheet(pictures, out)


def main(argv: list[str] | None = None) -> None:
    """Trains a segmenter, prints its mean intersection over union, and draws what it finds."""
    parser = make_parser(__doc__)
    parser.add_argument('data', type=Path, help='a set')
    add_arguments(parser, 'res2net50d')
    parser.add_argument('--classes', type=positive, help='labels in the masks, with the background; not for COCO')
    parser.add_argument('--architecture', default='unet', help='of segmentation_models_pytorch (default: unet)')
    parser.add_argument('--architecture-kwargs', nargs='*', default={}, action=Keywords, help='of that')
    parser.add_argument('--size', type=positive, default=512, help='pixels across of a training image (default: 512)')
    args = parser.parse_args(argv)
    about = choices_of(args, 'classes', 'architecture', 'architecture_kwargs', 'size')
    with reported(parser):
        settings = settings_of(args)
        begin(args)
        if args.size % STRIDE:
            raise ValueError(f'--size {args.size} is no multiple of {STRIDE}')
        images = open_part(args.data, args.train, args.classes, train_augmentation(args.size))
        dataset = open_part(args.data, args.val, args.classes)
        if args.classes is not None:  # of masks in files
            require_foreground(dataset)
        about |= data_of(images, dataset, [images.categories, dataset.categories])
        model = create_segmenter(
            args.architecture, args.backbone, images.classes, args.pretrained, **args.architecture_kwargs
        )
        prepare(model.model.get_submodule('encoder.model'), args.weights, args.frozen_stages, args.frozen_norms)
        batches = batches_of(images, settings, args.workers)
        check = partial(evaluate, dataset, args.workers, args.device)
        options: dict[str, Any] = dict(about=about, resume=args.resume, device=args.device)
        history = fit(
            model.to(args.device), batches, partial(loss, args.device), check, settings, Path(args.out), **options
        )
        end(args, model, history, partial(show, dataset))


if __name__ == '__main__':
    main()
