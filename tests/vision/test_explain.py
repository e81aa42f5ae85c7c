"""Class activation maps average to the logits, and receptive fields have the paper's sizes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support import small, tiny
from torch import Tensor, nn

from timm_res2net import class_activation_map, receptive_field
from timm_res2net.__main__ import main
from timm_res2net._images import bundled_digits
from timm_res2net.models.block import Bottle2neck
from timm_res2net.vision.explain import explain, radius
from timm_res2net.vision.predict import predict


@pytest.mark.parametrize('name', ['test_res2net', 'dla60_res2net'])  # classify by a linear layer, a convolution
def test_class_activation_map_mean_equals_score_without_bias(name: str, build: Any, images: Tensor) -> None:
    model = build(name)
    images = images[..., :32, :32]
    scores = model(images)
    for classes in (None, [3, 5]):
        maps = class_activation_map(model, images, classes)
        wanted = scores.argmax(dim=1).tolist() if classes is None else classes
        bias = model.get_classifier().bias[wanted]
        expected = torch.stack([score[index] for score, index in zip(scores, wanted)]) - bias
        torch.testing.assert_close(torch.from_numpy(maps.mean((1, 2))), expected.detach(), rtol=1e-4, atol=1e-4)
        assert maps.shape[1:] == model.forward_features(images).shape[2:]


def test_class_activation_map_takes_one_class_for_each_image(images: Tensor) -> None:
    model = tiny()
    maps = class_activation_map(model, images, torch.tensor([3, 1]))
    np.testing.assert_array_equal(maps, class_activation_map(model, images, [3, 1]))
    for classes in ([3], [3, 4], [-1, 0]):
        with pytest.raises(ValueError, match='an index from 0 to 3 for each of 2 images'):
            class_activation_map(model, images, classes)


def test_class_activation_map_without_classifier_on_average_pooling_raises(images: Tensor) -> None:
    for options in (dict(num_classes=0), dict(global_pool='max')):
        with pytest.raises(ValueError, match='it has no classifier after average pooling'):
            class_activation_map(tiny(**options), images)


class SingleBlock(nn.Module):
    """A model that is only one block. Its weights are all one, and its norms do nothing."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.block = Bottle2neck(64, 16, base_width=8, norm_layer=nn.Identity, **arguments)
        for parameter in self.block.parameters():
            nn.init.ones_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def supports(fields: np.ndarray) -> list[int]:
    """Returns the side of the square that each field covers; fails if it is not a full square."""
    sizes = []
    for field in fields:
        rows, columns = np.nonzero(field)
        size = int(rows.max() - rows.min()) + 1
        assert np.count_nonzero(field) == size**2 == (int(columns.max() - columns.min()) + 1) ** 2
        sizes.append(size)
    return sizes


@pytest.mark.parametrize(
    ('arguments', 'sizes'),
    [
        (dict(scale=1), [3]),
        (dict(scale=2), [3, 1]),
        (dict(scale=8), [3, 5, 7, 9, 11, 13, 15, 1]),
        (dict(scale=4, first=True), [3, 3, 3, 3]),  # no cascade
    ],
    ids=str,
)
def test_receptive_field_of_split_i_in_cascade_spans_2i_plus_3_pixels(arguments: Any, sizes: list[int]) -> None:
    fields = receptive_field(SingleBlock(**arguments).eval(), 'block', torch.rand(2, 64, 33, 33), of_block=True)
    assert supports(fields) == sizes
    np.testing.assert_allclose(fields.sum((1, 2)), 1, rtol=1e-5)


def test_receptive_field_has_size_of_image_or_of_block_input() -> None:
    model = timm.create_model('test_res2net.digits', pretrained=True).eval()
    noise = torch.randn(2, 3, 96, 96)
    in_image = receptive_field(model, 'layer2.1', noise)
    in_block = receptive_field(model, 'layer2.1', noise, of_block=True)
    assert in_image.shape == (4, 96, 96)
    assert in_block.shape == (4, 12, 12)
    assert supports(in_block)[:3] == [3, 5, 7]
    radii = [radius(field) for field in in_image]
    assert radii[3] < radii[0] < radii[1] < radii[2]


@pytest.mark.parametrize(
    'use',
    [
        class_activation_map,
        lambda model, images: receptive_field(model, 'layer2.0', images),
        lambda model, images: next(predict(model, [bundled_digits()[0][0]], Image.Image.copy)),
    ],
)
def test_predictions_and_explanations_refuse_training_mode(use: Any, images: Tensor) -> None:
    model = timm.create_model('test_res2net')
    with pytest.raises(ValueError, match=r'is in training mode.*Call its \.eval\(\) first'):
        use(model, images)
    assert model.get_buffer('bn1.num_batches_tracked') == 0


@pytest.mark.parametrize(('rows', 'columns', 'expected'), [([], [], 0), ([4], [4], 0), ([1, 7, 4, 4], [4, 4, 1, 7], 3)])
def test_radius_is_zero_for_an_empty_field_or_one_pixel_and_exact_for_a_ring(
    rows: list[int], columns: list[int], expected: int
) -> None:
    field = np.zeros((9, 9), np.float32)
    field[rows, columns] = 1
    assert radius(field) == expected


def test_receptive_field_leaves_model_unchanged(images: Tensor) -> None:
    model = tiny()
    before = model(images)
    for without_gradients in (torch.no_grad(), torch.inference_mode()):
        with without_gradients:
            receptive_field(model, 'layer2.1', images)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)


def test_receptive_field_and_explain_of_unknown_parts_raise_and_list_choices(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"no block 'layer9\.0' in this model\. Its blocks: layer1\.0, layer2\.0, "):
        receptive_field(tiny(), 'layer9.0', images)
    with pytest.raises(ValueError, match=r'no stage 5 in this model\. Choose 1 to 4: layer1, layer2, layer3, layer4'):
        explain(tiny(), bundled_digits()[0][0], 5)


@pytest.mark.parametrize(('name', 'block'), [('test_res2net', 'layer1.1'), ('dla60_res2net', 'level2.tree2')])
def test_explain_measures_the_second_block_of_a_stage(name: str, block: str) -> None:
    model = timm.create_model(name, pretrained_cfg_overlay=dict(input_size=(3, 32, 32)), **small(name)).eval()
    explanation = explain(model, bundled_digits()[0][0], 1)
    assert explanation.block == block
    assert (len(explanation.predictions), len(explanation.fields)) == (3, len(explanation.radii))


def test_explain_command_draws_bundled_digit_in_colors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(['explain']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[1] == '3'
    assert lines[3].startswith('layer2.1: radius of each split in pixels')
    with Image.open('explain.png') as picture:
        pixels = np.asarray(picture.convert('RGB')).astype(int)
    assert pixels.shape[0] > 700
    assert (np.ptp(pixels, axis=2) > 60).mean() > 0.05  # the map, the bars and the receptive fields have colors
