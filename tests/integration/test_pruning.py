"""torch_pruning prunes these models around the convolutions between splits, as timm's."""

import pytest
import torch
from test_readme import run

torch_pruning = pytest.importorskip('torch_pruning')


def test_readme_prunes_every_kind_of_trunk(kind: str) -> None:
    made = run('models', 'torch_pruning', **({} if kind == 'res2net50_26w_4s' else {'res2net50_26w_4s': kind}))
    model, pruner = made['model'], made['pruner']
    pruned = sum(parameter.numel() for parameter in model.parameters())
    assert pruned < 0.75 * sum(parameter.numel() for parameter in made['timm'].create_model(kind).parameters())
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    assert pruner.current_step == 1


def test_without_ignored_layers_it_fails_as_on_models_of_timm() -> None:
    timm = pytest.importorskip('timm')
    for model in (timm.create_model('res2net50_26w_4s'), timm.models.res2net.res2net50_26w_4s()):
        importance = torch_pruning.importance.MagnitudeImportance()
        pruner = torch_pruning.pruner.MagnitudePruner(
            model, torch.randn(1, 3, 64, 64), importance, pruning_ratio=0.5, ignored_layers=[model.fc]
        )
        with pytest.raises(IndexError):
            pruner.step()
