"""The table of what 8 bits cost is measured model by model, and goes on where it was stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm

from timm_res2net.models.variants import ARCHS
from timm_res2net.recipes import eight_bits
from timm_res2net.recipes.eight_bits import MODELS, crops, main


def test_crops_are_two_of_each_photograph_of_the_size_of_the_model() -> None:
    images = crops(timm.create_model('test_res2net'))
    assert images.shape == (32, 3, 32, 32)
    assert len(images.flatten(1).unique(dim=0)) == 32
    assert crops(timm.create_model('res2net50_26w_4s', device='meta')).shape == (32, 3, 128, 128)


def test_models_are_of_every_trunk_and_of_scale_2_4_6_and_8() -> None:
    assert {ARCHS[name].trunk for name in MODELS} == {arch.trunk for arch in ARCHS.values()}
    assert {2, 4, 6, 8} <= {ARCHS[name].args.get('scale') for name in MODELS}


def test_main_measures_what_the_file_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []

    def cost(name: str) -> dict[str, Any]:
        measured.append(name)
        return dict(model=name, openvino=0.02, onnx=0.03)

    monkeypatch.setattr(eight_bits, 'cost', cost)
    monkeypatch.setattr(eight_bits, 'cost_for_digits', lambda: cost('test_res2net.digits'))
    file = tmp_path / 'int8.json'
    main([str(file), '--models', 'res2net50d'])
    main([str(file), '--models', 'res2net50d', 'res2next50'])
    assert measured == ['res2net50d', 'test_res2net.digits', 'res2next50']
    document = json.loads(file.read_text())
    assert [each['model'] for each in document['results']] == measured
    assert 'processor' in document['environment']
    assert capsys.readouterr().out.endswith('res2next50: OpenVINO 2.0%, ONNX 3.0%\n')
