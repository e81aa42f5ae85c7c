"""torch_pruning prunes these models around the convolutions between splits, as timm's."""

import pytest
import timm
import torch

torch_pruning = pytest.importorskip('torch_pruning')


def prune(model: torch.nn.Module, ignored_layers: list[torch.nn.Module]) -> None:
    importance = torch_pruning.importance.MagnitudeImportance()
    torch_pruning.pruner.MagnitudePruner(
        model, torch.randn(1, 3, 64, 64), importance, pruning_ratio=0.5, ignored_layers=ignored_layers
    ).step()


def test_every_kind_of_trunk_is_pruned_around_the_layers_that_the_readme_ignores(kind: str) -> None:
    model = timm.create_model(kind)
    whole = sum(parameter.numel() for parameter in model.parameters())
    blocks = [module for module in model.modules() if hasattr(module, 'convs')]
    prune(model, [*(layer for block in blocks for layer in (block.conv1, *block.convs)), model.get_classifier()])
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.75 * whole
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_without_ignored_layers_it_fails_as_on_models_of_timm() -> None:
    for model in (timm.create_model('res2net50_26w_4s'), timm.models.res2net.res2net50_26w_4s()):
        with pytest.raises(IndexError):
            prune(model, [model.fc])
