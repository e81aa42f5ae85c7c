"""The loop of the recipes keeps the best model, and a run that was stopped ends where one that wasn't does."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from timm_res2net.recipes.training_loop import Settings, best_weights, fit

SETTINGS = Settings(epochs=4, batch_size=4, lr=0.1, warmup_epochs=1)


class Noise:
    """Batches of random numbers, others in each epoch."""

    def __init__(self, count: int = 3) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.randn(self.count, 4, 2))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.2), nn.Linear(3, 1))


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


def run(folder: Path, settings: Settings = SETTINGS, stop_in_epoch: int = 99, **options: Any) -> tuple[Any, Any]:
    """Trains, or stops in the middle of an epoch, as a kill does."""
    model, file = network(), folder / 'history.json'
    epochs = [len(json.loads(file.read_text())) if file.exists() else 0]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if epochs[0] >= stop_in_epoch:
            raise KeyboardInterrupt
        return squared(model, batch)

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert not model.training
        epochs[0] += 1
        return dict(score=[0.0, 5.0, 1.0, 2.0][epochs[0] - 1], other=9.0)

    history = fit(model, Noise(), loss, evaluate, settings, folder, progress=False, **options)
    return model.state_dict(), history


@pytest.mark.parametrize('opt', ['sgd', 'adamw'])
def test_run_that_was_stopped_ends_at_the_weights_of_one_that_was_not(opt: str, tmp_path: Path) -> None:
    settings = replace(SETTINGS, opt=opt, clip_grad=0.5, amp='bfloat16')
    whole, history = run(tmp_path / 'whole', settings)
    for stop in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / 'parts', settings, stop_in_epoch=stop, resume=stop > 1)
    resumed, resumed_history = run(tmp_path / 'parts', settings, resume=True)
    assert history == resumed_history
    assert len(history) == 4
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    again, _ = run(tmp_path / 'parts', settings, resume=True)  # which has nothing left to do
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_run_keeps_the_weights_of_the_epoch_with_the_best_score(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_in_epoch=2)
    second = torch.load(tmp_path / 'last.pth')['model']
    last, history = run(tmp_path, resume=True)
    best = best_weights(tmp_path)
    assert [each['score'] for each in history] == [0.0, 5.0, 1.0, 2.0]
    assert all(torch.equal(best[name], second[name]) for name in best)
    assert not torch.equal(best['0.weight'], last['0.weight'])
    assert json.loads((tmp_path / 'history.json').read_text()) == history


def test_learning_rate_warms_up_and_falls(tmp_path: Path) -> None:
    _, history = run(tmp_path / 'cosine')
    rates = [each['lr'] for each in history]
    assert rates[1] > rates[2] > rates[3] < 0.02
    _, history = run(tmp_path / 'poly', replace(SETTINGS, sched='poly', decay_rate=0.9, warmup_epochs=0))
    rates = [each['lr'] for each in history]
    assert rates == pytest.approx([0.1 * (1 - (3 * epoch - 1) / 12) ** 0.9 for epoch in (1, 2, 3, 4)], rel=1e-3)


@pytest.mark.parametrize('warmup_epochs', [0, 0.5])
def test_multistep_decays_after_its_milestones_and_not_one_step_before(warmup_epochs: float, tmp_path: Path) -> None:
    settings = replace(SETTINGS, sched='multistep', decay_milestones=(1, 3), warmup_epochs=warmup_epochs)
    rates: list[float] = []
    model = network()

    def step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rates.append(optimizer.param_groups[0]['lr'])

    with register_optimizer_step_pre_hook(step):
        history = fit(model, Noise(2), squared, lambda model: dict(score=0.0), settings, tmp_path, progress=False)
    start = 0.1 if warmup_epochs == 0 else 0.0001
    assert rates == pytest.approx([start, 0.1, 0.01, 0.01, 0.01, 0.01, 0.001, 0.001])
    assert [each['lr'] for each in history] == pytest.approx([0.1, 0.01, 0.01, 0.001])


def test_run_in_a_folder_with_another_one_is_refused(tmp_path: Path) -> None:
    run(tmp_path, about=dict(backbone='a'))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match='holds a run; add --resume to go on with it, or name another folder'):
        run(tmp_path, about=dict(backbone='a'))
    with pytest.raises(ValueError, match=r'holds a run with lr 0\.1, not 0\.2; name another folder'):
        run(tmp_path, replace(SETTINGS, lr=0.2), about=dict(backbone='a'), resume=True)
    with pytest.raises(ValueError, match='holds a run with backbone a, not b; name another folder'):
        run(tmp_path, about=dict(backbone='b'), resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return squared(model, batch) * torch.inf

    with pytest.raises(ValueError, match='the loss of step 0 of epoch 1 is inf; try a smaller --lr'):
        fit(network(), Noise(), loss, lambda model: {}, SETTINGS, tmp_path, progress=False)
    assert not (tmp_path / 'last.pth').exists()
    _, history = run(tmp_path, replace(SETTINGS, lr=0.05))  # in the same folder, which lost no epoch
    assert len(history) == 4


@pytest.mark.parametrize('name', ['last.pth', 'settings.json'])
@pytest.mark.parametrize('keep', [0, 10, 0.5, 0.99], ids=str)
def test_run_with_a_damaged_file_names_it(name: str, keep: float, tmp_path: Path) -> None:
    run(tmp_path)
    file = tmp_path / name
    content = file.read_bytes()
    file.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(ValueError, match=rf'{name} is damaged \(.*\); restore a copy of it, or delete'):
        run(tmp_path, resume=True)


def test_best_weights_that_are_damaged_or_lost_name_their_file(tmp_path: Path) -> None:
    run(tmp_path)
    for content in (b'', b'no weights', (tmp_path / 'last.pth').read_bytes()):
        (tmp_path / 'best.pth').write_bytes(content)
        with pytest.raises(ValueError, match=r'best\.pth is damaged'):
            best_weights(tmp_path)
    (tmp_path / 'best.pth').unlink()
    with pytest.raises(FileNotFoundError, match=r'best\.pth'):
        best_weights(tmp_path)


def test_run_that_fills_the_disk_names_the_file(tmp_path: Path) -> None:
    resource = pytest.importorskip('resource')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r'best\.pth can not be written: '):
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ['settings.json']


@pytest.mark.parametrize('name', ['lr', 'momentum', 'weight_decay', 'decay_rate', 'warmup_epochs', 'clip_grad'])
def test_setting_that_is_not_finite_is_named(name: str) -> None:
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=f'^--{name.replace("_", "-")} {value} is no finite number$'):
            replace(SETTINGS, **{name: value})


def test_optimizer_that_is_unknown_leaves_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='sdg'):
        run(tmp_path / 'run', replace(SETTINGS, opt='sdg'))
    assert not (tmp_path / 'run').exists()
