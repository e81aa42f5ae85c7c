"""Trains as timm's train.py does, by timm's public parts in the same order, on a hundred digits in memory.

python tests/train_script.py [--OPTION ...]            or under torchrun
"""

import argparse
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, ParseKwargs, init_distributed_device, random_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import timm_res2net  # noqa: F401 - registers the models
from timm_res2net.recipes.digits import split


def options(argv: list[str] | None) -> argparse.Namespace:
    """The options of train.py that are used here, under the same names."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--model', default='test_res2net')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
    parser.add_argument('--num-classes', type=int, default=10)
    parser.add_argument('--pretrained', action='store_true')
    parser.add_argument('--batch-size', type=int, default=32, help='of one process')
    parser.add_argument('--epochs', type=int, default=2)
    parser.add_argument('--opt', default='sgd')
    parser.add_argument('--lr', type=float, default=0.05)
    parser.add_argument('--layer-decay', type=float)
    parser.add_argument('--mixup', action='store_true')
    parser.add_argument('--amp', action='store_true')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--grad-checkpointing', action='store_true')
    parser.add_argument('--grad-accum-steps', type=int, default=1)
    parser.add_argument('--torchcompile', metavar='BACKEND')
    parser.add_argument('--output', required=True)
    return parser.parse_args(argv, argparse.Namespace(device='cpu'))


def digits(part: str, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A hundred digits, (128, 3, 32, 32) in -1..1, and their classes: the digits' remainders."""
    pixels, labels = split()[part]
    images = torch.as_tensor(pixels[:128], dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    return nn.functional.interpolate(images, scale_factor=4), torch.as_tensor(labels[:128]) % num_classes


def create_model(args: argparse.Namespace) -> nn.Module:
    """Creates the model with the arguments that train.py passes to every model."""
    model = timm.create_model(
        args.model,
        pretrained=args.pretrained,
        in_chans=None,
        num_classes=args.num_classes,
        drop_rate=0.0,
        drop_path_rate=None,
        drop_block_rate=None,
        global_pool=None,
        bn_momentum=None,
        bn_eps=None,
        scriptable=False,
        checkpoint_path='',
        **args.model_kwargs,
    )
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def main(argv: list[str] | None = None) -> list[float]:
    """Trains; the loss of each step, a mean over processes."""
    args = options(argv)
    init_distributed_device(args)  # sets rank, world_size and distributed
    random_seed(0)  # NumPy's, too, for mixup
    model = create_model(args)
    autocast = partial(torch.autocast, 'cpu', torch.bfloat16) if args.amp else nullcontext
    optimizer = create_optimizer_v2(
        model, opt=args.opt, lr=args.lr, weight_decay=0.01, momentum=0.9, layer_decay=args.layer_decay
    )
    ema = ModelEmaV3(model, decay=0.9)
    trained: Any = torch.compile(model, backend=args.torchcompile, fullgraph=True) if args.torchcompile else model
    if args.distributed:
        trained = DistributedDataParallel(trained)
    scheduler, _ = create_scheduler_v2(optimizer, sched='cosine', num_epochs=args.epochs, warmup_epochs=0)
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=args.num_classes) if args.mixup else None
    criterion: nn.Module = SoftTargetCrossEntropy() if args.mixup else nn.CrossEntropyLoss()
    if args.rank == 0:
        Path(args.output).mkdir(exist_ok=True)
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=ema, checkpoint_dir=args.output)

    images, targets = digits('train', args.num_classes)
    losses: list[float] = []
    for epoch in range(args.epochs):
        trained.train()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(args.batch_size * args.world_size * args.grad_accum_steps):
            total = torch.zeros(())
            optimizer.zero_grad()
            for part in batch.split(args.batch_size)[args.rank :: args.world_size]:
                x, target = images[part], targets[part]
                if mixup is not None:
                    x, target = mixup(x, target)
                if args.channels_last:
                    x = x.contiguous(memory_format=torch.channels_last)
                with autocast():
                    loss = criterion(trained(x), target) / args.grad_accum_steps
                loss.backward()
                total += loss.detach()
            optimizer.step()
            ema.update(model)
            if args.distributed:
                dist.all_reduce(total)
            losses.append(total.item() / args.world_size)
        scheduler.step(epoch + 1)
        if args.rank == 0:
            saver.save_checkpoint(epoch, metric=-losses[-1])
    if args.rank == 0:
        Path(args.output, 'losses.json').write_text(json.dumps(losses))
    if args.distributed:
        dist.barrier()  # torch can hang where a process ends while the last exchange is being tidied up
        dist.destroy_process_group()
    return losses


if __name__ == '__main__':
    main()
