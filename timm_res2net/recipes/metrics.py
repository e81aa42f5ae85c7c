"""Metrics of detectors and segmenters, as pairs of functions for `RecipeTrainer`.

The first function of a pair measures each image of a batch and returns a tensor (N, ...). The second computes the
metrics from the measurements of all images.
"""

import contextlib
import io
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .coco import CocoImages
from .masks import IGNORED

AREAS = 32, 96  # sides, in pixels, of the squares from which objects are medium and large; COCO's own
METRICS = 'AP', 'AP50', 'AP75', 'APs', 'APm', 'APl'


def pack_detections(model: Any, batch: dict[str, Any]) -> Tensor:
    """Detects objects; returns (N, most objects, 6): corners, score and label, padded with -1."""
    most = getattr(model, 'module', model).detections_per_img
    rows = [torch.cat([f['boxes'], f['scores'][:, None], f['labels'][:, None]], dim=1) for f in model(batch['image'])]
    return torch.stack([F.pad(each, (0, 0, 0, most - len(each)), value=-1) for each in rows])


def compute_precision(dataset: CocoImages, areas: Sequence[int], evaluation: Any) -> dict[str, float]:
    """Computes COCO's average precision, in %, from packed detections and the indices of their images.

    Returns AP (mean over overlaps of 0.5 to 0.95), AP50, AP75, and AP of small, medium and large objects (APs, APm,
    APl): -1 where the set has none of that size, 0 if nothing was found. Boxes without area do not count. `areas` are
    the sides, in pixels, of the squares from which objects are medium and large.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    categories = {label: category for category, label in dataset.labels.items()}
    ids = [dataset.ids[index] for index in evaluation.label_ids]
    results = [
        dict(image_id=image_id, category_id=categories[label], bbox=[x, y, right - x, bottom - y], score=score)
        for image_id, rows in zip(ids, evaluation.predictions.tolist())
        for x, y, right, bottom, score, label in rows
        if label > 0  # neither padding nor FCOS's background class
    ]
    if not results:
        return dict.fromkeys(METRICS, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        # pycocotools treats an object with id 0 as missing, and keeps only one of those with the same id.
        shown = [each for each in dataset.objects if min(each['bbox'][2:]) > 0]
        numbered = [{**each, 'id': number} for number, each in enumerate(shown, 1)]
        truth.dataset = {**dataset.coco.dataset, 'annotations': numbered}
        truth.createIndex()
        evaluated: Any = COCOeval(truth, truth.loadRes(results), 'bbox')
        edges = 0, areas[0] ** 2, areas[1] ** 2, 1e10
        evaluated.params.imgIds = sorted(set(ids))
        evaluated.params.areaRng = [[0, 1e10], *map(list, pairwise(edges))]
        evaluated.evaluate()
        evaluated.accumulate()
        evaluated.summarize()
    return {name: round(100 * float(x), 3) if x >= 0 else -1.0 for name, x in zip(METRICS, evaluated.stats)}


def count_pixels(model: Any, batch: dict[str, Any]) -> Tensor:
    """Counts the pixels of each image by true and found label: (N, classes, classes)."""
    counts = []
    for image, mask in zip(batch['image'], batch['mask']):
        logits = model(image[None])[0]
        classes, kept = len(logits), mask != IGNORED
        pairs = mask[kept] * classes + logits.argmax(dim=0)[kept]
        counts.append(torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes))
    return torch.stack(counts)


def compute_iou(evaluation: Any) -> dict[str, float]:
    """Computes the mean intersection over union of all classes that occur, and the share of correct pixels, in %."""
    total = torch.from_numpy(evaluation.predictions).sum(dim=0).double()
    if not total.any():
        raise ValueError(f'cannot evaluate: all pixels of all images have label {IGNORED}, which is ignored')
    hits, union = total.diag(), total.sum(dim=0) + total.sum(dim=1) - total.diag()
    iou = 100 * (hits / union)[union > 0]
    return dict(mIoU=round(iou.mean().item(), 3), pixel_accuracy=round(100 * (hits.sum() / total.sum()).item(), 3))


def score_binary(model: Any, batch: dict[str, Any]) -> Tensor:
    """Computes Dice, intersection over union, and mean absolute error of each image: (N, 3)."""
    scores = []
    for image, mask in zip(batch['image'], batch['mask']):
        probability, truth = model(image[None])[0].float().softmax(dim=0)[1], mask == 1
        found = probability >= 0.5
        hits, total = (found & truth).sum().float(), found.sum() + truth.sum()
        dice = 2 * hits / total if total else torch.ones_like(hits)  # there was nothing to find, and nothing was found
        scores.append(torch.stack([dice, dice / (2 - dice), (probability - truth.float()).abs().mean()]))
    return torch.stack(scores)


def average_scores(evaluation: Any) -> dict[str, float]:
    """Computes the means over images, in 0..1."""
    return dict(zip(('mDice', 'mIoU', 'MAE'), evaluation.predictions.mean(axis=0).round(4).tolist()))
