"""Every example in a README runs, and every number is that of the package."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support import ROOT

from timm_res2net.models.biglittle import Res2NetBigLittle
from timm_res2net.models.cifar import Res2NetCifar
from timm_res2net.models.variants import ARCHS, ASSETS, WEIGHTS

README = (ROOT / 'README.md').read_text()


def strides(name: str) -> tuple[int, ...]:
    """Output strides that a model can have."""
    return {Res2NetCifar: (1, 2, 4), Res2NetBigLittle: (16, 32)}.get(ARCHS[name].trunk, (8, 16, 32))


def python(code: str) -> str:
    """Runs code in an interpreter of its own that treats warnings as errors."""
    command = [sys.executable, '-W', 'error', '-c', code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_readme_shows_the_family_as_it_is() -> None:
    default = {name.split('.')[0]: weights.top1 for name, weights in reversed(WEIGHTS.items())}
    for name, arch in ARCHS.items():
        top1 = f'{default[name]:.2f} %' if name in default and name != 'test_res2net' else ''
        assert f'| `{name}` | {arch.params:,} | {arch.gmacs:.3f} | {top1} |' in README


def test_readme_shows_all_weights_as_they_are() -> None:
    authors = {'github.com/Res2Net': 'the authors', 'PaddleClas': 'PaddleClas', 'mindcv': 'MindCV'}
    rows = []
    for name, weights in WEIGHTS.items():
        if weights.top5 is not None:
            cfg = timm.get_pretrained_cfg(name)
            who = next(who for part, who in authors.items() if part in cfg.origin_url)
            licence = {'apache-2.0': 'Apache-2.0', 'cc-by-nc-sa-4.0': 'CC BY-NC-SA 4.0'}[cfg.license]
            rows.append(f'| `{name}` | {weights.top1:.2f} % | {weights.top5:.2f} % | {who} | {licence} |')
    assert '\n'.join(rows) in README


EXAMPLES = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


def example(part: str) -> str:
    """The only example in the README that has this part in it."""
    (found,) = (each for each in EXAMPLES if part in each)
    return found


def test_readme_shows_the_pyramid_of_every_model() -> None:
    rows = {}
    for name in ARCHS:
        model = timm.create_model(name, device='meta')
        pyramid = ', '.join(f'{info["reduction"]}: {info["num_chs"]}' for info in model.feature_info)
        rows.setdefault((pyramid, ', '.join(map(str, strides(name)))), []).append(f'`{name}`')
    for (pyramid, possible), names in rows.items():
        assert f'| {", ".join(names)} | {pyramid} | {possible} |' in README


def test_readme_shows_the_speed_that_was_measured() -> None:
    rows: dict[str, list[str]] = {}
    for each in json.loads((ASSETS / 'speed.json').read_text())['inference']:
        rows.setdefault(f'| {each["batch"]} | {each["way"]}, {each["dtype"]} | ', []).append(f'{each["ratio"]:.2f}')
    assert len(rows) > 10
    for begin, ratios in rows.items():
        assert begin + ' | '.join(ratios) + ' |' in README


def test_the_readme_example_of_speed_runs() -> None:
    code = example('print(fast.path)').replace('224, 224', '32, 32').replace('res2net50_26w_4s', 'test_res2net')
    printed = python(f'import timm, timm_res2net\n{code}\nprint(tuple(logits.shape), logits.dtype)')
    assert printed == 'fused, channels last, bfloat16, compiled\n(8, 10) torch.float32\n'


def test_readme_examples_run(tmp_path: Path) -> None:
    code = example('85.13 %') + example('faster_rcnn_r2_101_fpn.pth')
    for name in ('res2net50d', 'res2net200_vd_26w_4s'):  # which would be downloaded
        code = code.replace(f"'{name}', pretrained=True", f"'{name}'")
    detector = timm.create_model('res2net101d', num_classes=0).state_dict()
    detector = {name.replace('bn1.', 'stem.7.') if name.startswith('bn1') else name: t for name, t in detector.items()}
    detector = {f'backbone.{re.sub("^conv1", "stem", name)}': tensor for name, tensor in detector.items()}
    torch.save({'state_dict': detector}, tmp_path / 'faster_rcnn_r2_101_fpn.pth')
    python(f'import os; os.chdir({str(tmp_path)!r})\n{code}')


def test_the_readme_example_of_the_hub_runs(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HF_TOKEN', 'hf_write')
    code = example('timm_res2net.push').replace('you/', 'user/')
    exec(f'import timm, timm_res2net\n{code}', namespace := {})
    assert namespace['model'].pretrained_cfg['hf_hub_id'].startswith('user/digits@')


def test_the_readme_examples_of_backbones_run() -> None:
    exec(f'import timm, torch\n{example("ops import FeaturePyramidNetwork")}', made := {})
    assert [level.shape[-1] for level in made['levels'].values()] == [56, 28, 14, 7]
    exec(f'import timm, torch\n{example("FasterRCNN")}', made := {})
    assert made['found'][0].keys() == {'boxes', 'labels', 'scores'}
