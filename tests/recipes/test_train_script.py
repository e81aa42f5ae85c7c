"""The networks train as in timm's train script, with its options, and sharded by FSDP."""

from argparse import Namespace
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import Hub
from support import ROOT, randomise, slow_but, torchrun
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.models import group_modules
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, freeze, random_seed
from torch import nn

from timm_res2net import pull
from timm_res2net.__main__ import main
from timm_res2net.recipes.digits import split

KINDS: dict[str, dict[str, Any]] = {  # a small network for each trunk
    'test_res2net': dict(layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), stem_width=8, base_width=32, scale=3),
    'dla60_res2net': dict(levels=(1, 1, 1, 1, 1, 1), channels=(8, 8, 16, 16, 16, 32)),
    'blres2net50_26w_4s': dict(layers=(2, 2, 2, 1), base_width=8),
    'res2next29_6c_24w_4s': dict(layers=(1, 1, 1), channels=(8, 8, 16), cardinality=1),
}
CREATED: dict[str, Any] = dict(  # arguments that train.py passes to every model
    in_chans=None,
    drop_rate=0.0,
    drop_path_rate=None,
    drop_block_rate=None,
    global_pool=None,
    bn_momentum=None,
    bn_eps=None,
    scriptable=False,
    checkpoint_path='',
)


def digits(part: str, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns 128 digits, (128, 3, 32, 32) in -1..1, and their classes: the digits modulo `num_classes`."""
    pixels, labels = split()[part]
    images = torch.as_tensor(pixels[:128], dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    return nn.functional.interpolate(images, scale_factor=4), torch.as_tensor(labels[:128]) % num_classes


def train(
    folder: Path, name: str, epochs: int, num_classes: int, options: dict[str, Any], everything: bool, **kwargs: Any
) -> list[float]:
    """Trains as timm's train.py does, with its parts in the same order, on 128 digits; returns all losses.

    `options` go to the optimizer. `everything` adds mixup, mixed precision, channels last, checkpointing, and
    a compiled model.
    """
    random_seed(0)  # NumPy's as well, for mixup
    model: Any = timm.create_model(name, num_classes=num_classes, **CREATED, **kwargs)
    trained = model
    autocast: Any = nullcontext
    mixup: Any = None
    criterion: nn.Module = nn.CrossEntropyLoss()
    if everything:
        model.set_grad_checkpointing(enable=True)
        model.to(memory_format=torch.channels_last)
        trained = torch.compile(model, backend='aot_eager', fullgraph=True)
        autocast = partial(torch.autocast, 'cpu', torch.bfloat16)
        mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=num_classes)
        criterion = SoftTargetCrossEntropy()
    optimizer = create_optimizer_v2(model, weight_decay=0.01, momentum=0.9, **options)
    ema = ModelEmaV3(model, decay=0.9)
    scheduler, _ = create_scheduler_v2(optimizer, sched='cosine', num_epochs=epochs, warmup_epochs=0)
    args = Namespace(model=name, num_classes=num_classes)
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=ema, checkpoint_dir=str(folder))

    images, targets = digits('train', num_classes)
    losses: list[float] = []
    for epoch in range(epochs):
        trained.train()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(32):
            x, target = images[batch], targets[batch]
            if everything:
                x, target = mixup(x, target)
                x = x.contiguous(memory_format=torch.channels_last)
            with autocast():
                loss = criterion(trained(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
            losses.append(loss.item())
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=-losses[-1])
    return losses


@pytest.mark.parametrize('name', slow_but(['test_res2net'], ['test_res2net', 'dla60_res2net']))
def test_train_every_trunk_with_all_options_reduces_loss(name: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    options = dict(opt='adamw', lr=3e-3, layer_decay=0.9)
    losses = train(tmp_path, name, 3, 10, options, everything=True, **KINDS[name])
    assert len(losses) == 12
    assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.slow
def test_fsdp2_sharded_stages_take_same_step_as_whole_model() -> None:
    done = torchrun(str(ROOT / 'tests' / 'shard_script.py'))
    # Not the exit status: on a busy machine, gloo's threads can abort a process that is done and about to exit.
    assert done.stdout.count('equal') == 2, done.stderr


def test_push_and_pull_fine_tuned_model_keep_outputs_and_accuracy(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HF_TOKEN', 'hf_write')
    options = dict(opt='sgd', lr=0.01)
    losses = train(tmp_path, 'test_res2net', 4, 2, options, everything=False, pretrained=True)  # odd or even
    assert losses[-1] < 0.35 < losses[0]
    checkpoint = str(tmp_path / 'last.pth.tar')
    assert main(['push', checkpoint, 'user/parity', '--model', 'test_res2net', '--license', 'apache-2.0']) == 0
    pulled = pull('user/parity', cache_dir=tmp_path / 'cache')
    trained = timm.create_model('test_res2net', num_classes=2, checkpoint_path=checkpoint).eval()
    images, targets = digits('val', num_classes=2)
    with torch.no_grad():
        truth, found = trained(images), pulled(images)
    torch.testing.assert_close(found, truth, rtol=0, atol=0)
    assert (found.argmax(dim=1) == targets).float().mean() > 0.9


@pytest.mark.parametrize('name', KINDS)
def test_freeze_keeps_frozen_stages_and_trains_all_others(name: str, images: torch.Tensor) -> None:
    torch.manual_seed(0)
    model: Any = randomise(timm.create_model(name, num_classes=4, **KINDS[name]))
    groups = group_modules(model, model.group_matcher(coarse=True))
    frozen = [module for group in (0, 1) for module in groups[group]]  # stem and first stage
    freeze(model, frozen)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(images).square().sum().backward()
    optimizer.step()
    same = {key.rpartition('.')[0] for key, tensor in model.state_dict().items() if torch.equal(tensor, before[key])}
    assert same == set(frozen)
