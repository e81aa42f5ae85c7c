"""torch_pruning prunes these models, as timm's, except for the layers that depend on the splits."""

import pytest
import timm
import torch

torch_pruning = pytest.importorskip('torch_pruning')


def test_every_trunk_is_pruned_if_the_layers_listed_in_the_readme_are_ignored(kind: str) -> None:
    model = timm.create_model(kind)
    whole = sum(parameter.numel() for parameter in model.parameters())
    blocks = [module for module in model.modules() if hasattr(module, 'convs')]
    ignored = [*(layer for block in blocks for layer in (block.conv1, *block.convs)), model.get_classifier()]
    importance = torch_pruning.importance.MagnitudeImportance()
    x = torch.randn(1, 3, 64, 64)
    torch_pruning.pruner.MagnitudePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=ignored).step()
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.75 * whole
    assert model(x).shape == (1, 1000)
