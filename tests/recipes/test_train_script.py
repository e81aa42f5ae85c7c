"""The networks train as in timm's train script, with its options, and sharded by FSDP."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from support import TINY, tiny
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, random_seed
from torch.distributed.fsdp import fully_shard

from timm_res2net import load_model
from timm_res2net.models.recompute import Stage
from timm_res2net.recipes import multi_scale

# Arguments that train.py passes to every model.
CREATED: dict[str, Any] = {
    **dict(in_chans=None, drop_rate=0.0, drop_path_rate=None, drop_block_rate=None, global_pool=None),
    **dict(bn_momentum=None, bn_eps=None, scriptable=False, checkpoint_path=''),
}


def test_training_as_in_timms_script_reduces_the_loss_and_its_checkpoint_loads(
    fashion_mnist: Path, tmp_path: Path
) -> None:
    pixels, labels = multi_scale.fashion_mnist(fashion_mnist, train=True)
    images, targets = torch.tensor(pixels)[:, None].expand(-1, 3, -1, -1) / 127.5 - 1, torch.tensor(labels)
    random_seed(0)  # NumPy's as well, for mixup
    args = Namespace(model='test_res2net', num_classes=10, model_kwargs=TINY)

    # The same parts as in train.py, in the same order.
    model: Any = timm.create_model('test_res2net', num_classes=10, **CREATED, **TINY)
    model.set_grad_checkpointing(enable=True)
    model.to(memory_format=torch.channels_last)
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=10)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=3e-3, weight_decay=0.01, layer_decay=0.9)
    ema = ModelEmaV3(model, decay=0.9)
    scheduler, _ = create_scheduler_v2(optimizer, sched='cosine', num_epochs=3, warmup_epochs=0)
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=ema, checkpoint_dir=str(tmp_path))
    losses: list[float] = []
    for epoch in range(3):
        model.train()
        for batch in torch.randperm(len(images)).split(20):
            x, target = mixup(images[batch], targets[batch])
            with torch.autocast('cpu', torch.bfloat16):
                loss = SoftTargetCrossEntropy()(model(x.contiguous(memory_format=torch.channels_last)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
            losses.append(loss.item())
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=-losses[-1])
    assert sum(losses[-5:]) < sum(losses[:5])
    loaded = load_model(tmp_path / 'last.pth.tar').eval()
    torch.testing.assert_close(loaded(images[:8]), ema.module(images[:8]))


@pytest.mark.slow
def test_fsdp2_sharded_stages_take_same_step_as_whole_model(images: torch.Tensor, tmp_path: Path) -> None:
    whole, sharded = tiny().train(), tiny().train()
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        for module in sharded.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = True
                fully_shard(module)
        fully_shard(sharded)
        for model in (whole, sharded):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            model(images).square().sum().backward()
            optimizer.step()
        for name, expected in whole.named_parameters():
            found: Any = sharded.get_parameter(name)
            torch.testing.assert_close(found.full_tensor(), expected.data)
        torch.testing.assert_close(dict(sharded.named_buffers()), dict(whole.named_buffers()))
    finally:
        dist.destroy_process_group()
