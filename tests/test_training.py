"""What timm's train script does works: in one process and in several, interrupted and resumed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import train_script
from conftest import tiny
from timm.layers import convert_sync_batchnorm
from torch import nn

SMALL = 'layers=(1,1,1,1) channels=(8,8,8,8) stem_width=8 base_width=32 scale=3'
KINDS = {
    'test_res2net': SMALL,
    'dla60_res2net': 'levels=(1,1,1,1,1,1) channels=(8,8,16,16,16,32)',
    'blres2net50_26w_4s': 'layers=(2,2,2,1) base_width=8',
    'res2next29_6c_24w_4s': 'layers=(1,1,1) channels=(8,8,16) cardinality=1',
}


def train(folder: Path, *arguments: str) -> list[float]:
    return train_script.main(['--output', str(folder), *arguments])


def weights(folder: Path) -> Any:
    return torch.load(folder / 'last.pth.tar', map_location='cpu', weights_only=False)


@pytest.mark.parametrize('name', KINDS)
def test_every_trunk_trains_with_everything_at_once(name: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    options = '--opt adamw --lr 3e-3 --layer-decay 0.9 --mixup --amp --channels-last --grad-checkpointing'
    losses = train(
        tmp_path,
        *options.split(),
        *('--torchcompile', 'aot_eager', '--model', name, '--epochs', '3', '--model-kwargs', *KINDS[name].split()),
    )
    assert len(losses) == 12
    assert sum(losses[-4:]) < sum(losses[:4])
    assert weights(tmp_path)['epoch'] == 2


def test_a_run_that_was_killed_resumes_to_the_same_weights(tmp_path: Path) -> None:
    common = ('--epochs', '3', '--model-kwargs', *SMALL.split())
    whole = train(tmp_path / 'whole', *common)
    begun = train(tmp_path / 'begun', '--stop-after', '1', *common)
    rest = train(tmp_path / 'rest', '--resume', str(tmp_path / 'begun' / 'last.pth.tar'), *common)
    assert begun + rest == whole
    for key in ('state_dict', 'state_dict_ema'):
        torch.testing.assert_close(weights(tmp_path / 'rest')[key], weights(tmp_path / 'whole')[key], rtol=0, atol=0)


def torchrun(folder: Path, *arguments: str) -> list[float]:
    """Trains in two processes."""
    script = str(Path(train_script.__file__))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', script]
    done = subprocess.run([*command, '--output', str(folder), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / 'losses.json').read_text())


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    # Norms see the half of a batch that their process has; the one process takes the halves one after the other.
    options = ['--epochs', '2', '--grad-checkpointing', '--model-kwargs', *SMALL.split()]
    two = torchrun(tmp_path / 'two', '--batch-size', '16', *options)
    one = train(tmp_path / 'one', '--batch-size', '16', '--grad-accum-steps', '2', *options)
    assert len(one) == 8
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)


def test_sharded_stages_take_the_step_that_whole_ones_take() -> None:
    script = str(Path(__file__).parent / 'shard_script.py')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('equal') == 2


def test_norms_become_synchronized_ones_and_keep_what_they_compute(images: torch.Tensor) -> None:
    model = tiny()
    converted = convert_sync_batchnorm(tiny())
    count = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == count
    torch.testing.assert_close(converted(images), model(images), rtol=0, atol=0)


def test_fine_tuning_starts_from_the_embedded_weights(tmp_path: Path) -> None:
    losses = train(tmp_path, '--pretrained', '--num-classes', '2', '--epochs', '4', '--lr', '0.01')  # odd or even
    assert losses[-1] < 0.35 < losses[0]
    before = timm.create_model('test_res2net.digits', pretrained=True, num_classes=2).state_dict()
    after = weights(tmp_path)['state_dict']
    assert after.keys() == before.keys()
