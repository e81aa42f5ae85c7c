"""The networks train as timm's train script trains: with its options, in one process and in several."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import train_script
from hub_server import Hub
from support import ROOT, randomise, slow_but, torchrun
from timm.models import group_modules
from timm.utils import freeze

from timm_res2net import pull
from timm_res2net.__main__ import main

KINDS: dict[str, dict[str, Any]] = {  # small networks on each trunk
    'test_res2net': dict(layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), stem_width=8, base_width=32, scale=3),
    'dla60_res2net': dict(levels=(1, 1, 1, 1, 1, 1), channels=(8, 8, 16, 16, 16, 32)),
    'blres2net50_26w_4s': dict(layers=(2, 2, 2, 1), base_width=8),
    'res2next29_6c_24w_4s': dict(layers=(1, 1, 1), channels=(8, 8, 16), cardinality=1),
}


def options_of(name: str) -> list[str]:
    """The options of timm's scripts for such a network."""
    kwargs = [f'{key}={value}'.replace(' ', '') for key, value in KINDS[name].items()]
    return ['--model', name, '--model-kwargs', *kwargs]


def train(folder: Path, *arguments: str) -> list[float]:
    return train_script.main(['--output', str(folder), *arguments])


@pytest.mark.parametrize('name', slow_but(['test_res2net'], ['test_res2net', 'dla60_res2net']))
def test_train_every_trunk_with_all_options_reduces_loss(name: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    options = '--opt adamw --lr 3e-3 --layer-decay 0.9 --mixup --amp --channels-last --grad-checkpointing'
    more = '--torchcompile aot_eager --epochs 3'
    losses = train(tmp_path, *options.split(), *more.split(), *options_of(name))
    assert len(losses) == 12
    assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.slow
def test_train_two_processes_has_losses_of_one_process(tmp_path: Path) -> None:
    # Norms see the half of a batch that their process has; the one process takes the halves one after the other.
    options = ['--epochs', '2', '--grad-checkpointing', *options_of('test_res2net')]
    done = torchrun(train_script.__file__, '--output', str(tmp_path / 'two'), '--batch-size', '16', *options)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / 'two' / 'losses.json').read_text())
    one = train(tmp_path / 'one', '--batch-size', '16', '--grad-accum-steps', '2', *options)
    assert len(one) == 8
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_fsdp2_sharded_stages_take_same_step_as_whole_model() -> None:
    done = torchrun(str(ROOT / 'tests' / 'shard_script.py'))
    # Not the status: on a busy machine gloo's threads can abort a process that has done all and is about to exit.
    assert done.stdout.count('equal') == 2, done.stderr


def test_push_and_pull_fine_tuned_model_keep_outputs_and_accuracy(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HF_TOKEN', 'hf_write')
    losses = train(tmp_path, '--pretrained', '--num-classes', '2', '--epochs', '4', '--lr', '0.01')  # odd or even
    assert losses[-1] < 0.35 < losses[0]
    checkpoint = str(tmp_path / 'last.pth.tar')
    assert main(['push', checkpoint, 'user/parity', '--model', 'test_res2net', '--license', 'apache-2.0']) == 0
    pulled = pull('user/parity', cache_dir=tmp_path / 'cache')
    trained = timm.create_model('test_res2net', num_classes=2, checkpoint_path=checkpoint).eval()
    images, targets = train_script.digits('val', num_classes=2)
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
