"""Works out what training on 1 to 64 GPUs asks for: batch, learning rate, and the network between them.

    python -m timm_res2net.recipes.scale_out --model res2net50_26w_4s --images-per-second 851

The speed of one GPU is what timm's benchmark.py measures (`--bench train --amp --channels-last`). The default is timm's
own figure for an RTX 3090, https://github.com/huggingface/pytorch-image-models/blob/main/results/
benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv.
"""

import math
from dataclasses import dataclass

from ..models.variants import ARCHS
from .arguments import make_parser, positive

GPUS = 1, 2, 4, 8, 16, 32, 64
IMAGENET = 1_281_167  # training images


@dataclass(frozen=True)
class Row:
    """What a number of GPUs asks for."""

    gpus: int
    batch: int  # images of all GPUs together
    lr: float  # of SGD, in proportion to the batch
    warmup_epochs: int
    steps: int  # of an epoch
    seconds: float  # of an epoch, with communication hidden
    sent: float  # bytes that a GPU sends, and receives, in each step
    bandwidth: float  # bytes per second each way, at which that takes no longer than the backward pass


def rows(params: int, images_per_second: float, batch_size: int = 64, lr_at_256: float = 0.1) -> list[Row]:
    """Works out a row for each number of GPUs.

    The learning rate grows with the batch and warms up for five epochs once that is larger than the paper's 256
    (https://arxiv.org/abs/1706.02677). DistributedDataParallel averages float32 gradients by a ring, in which each of N
    GPUs sends 2 (N - 1) / N of all gradients, during the backward pass, which is two thirds of a step's computation.

    Args:
        params: Parameters of the model.
        images_per_second: Training images that one GPU computes.
        batch_size: Images of one GPU.
        lr_at_256: Learning rate for a batch of 256.
    """
    found = []
    for gpus in GPUS:
        batch = gpus * batch_size
        step = batch_size / images_per_second
        steps = math.ceil(IMAGENET / batch)
        sent = 2 * (gpus - 1) / gpus * 4 * params
        row = Row(
            gpus=gpus,
            batch=batch,
            lr=lr_at_256 * batch / 256,
            warmup_epochs=5 if batch > 256 else 0,
            steps=steps,
            seconds=steps * step,
            sent=sent,
            bandwidth=sent / (step * 2 / 3),
        )
        found.append(row)
    return found


def table(found: list[Row]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [
        '| GPUs | batch | learning rate | warm-up epochs | steps per epoch | epoch | sent per GPU and step | needs |',
        '|---:' * 8 + '|',
    ]
    for row in found:
        network = f'{row.sent / 1e6:.0f} MB | {row.bandwidth / 1e9:.1f} GB/s' if row.sent else '- | -'
        lines.append(
            f'| {row.gpus} | {row.batch:,} | {row.lr:g} | {row.warmup_epochs} | {row.steps:,} | '
            f'{row.seconds / 60:.1f} min | {network} |'
        )
    return lines


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument('--model', default='res2net50_26w_4s', choices=ARCHS, metavar='NAME')
    parser.add_argument('--batch-size', type=positive, default=64, help='images of one GPU (default: 64)')
    parser.add_argument('--images-per-second', type=positive, default=851, help='of one GPU in training (default: 851)')
    parser.add_argument('--lr', type=float, default=0.1, help='for a batch of 256 (default: 0.1)')
    args = parser.parse_args(argv)
    print('\n'.join(table(rows(ARCHS[args.model].params, args.images_per_second, args.batch_size, args.lr))))


if __name__ == '__main__':
    main()
