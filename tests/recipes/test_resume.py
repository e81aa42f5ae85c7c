"""Detectors and segmenters go on with the data that they began with, wherever it is."""

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from timm_res2net.recipes import detect, segment
from timm_res2net.recipes.training_loop import open_run


@pytest.mark.parametrize('recipe', [detect, segment], ids=['detect', 'segment'])
def test_run_is_resumed_with_data_that_moved_and_refused_with_other_data(
    recipe: ModuleType,
    detection_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def begun(*args: Any, about: dict[str, Any], resume: bool, **options: Any) -> list[Any]:
        open_run(tmp_path / 'run', about, resume)
        (tmp_path / 'run' / 'last.pth').touch()
        return []

    def run(folder: str, *more: str) -> str:
        options = ['--backbone', 'test_res2net', '--workers', '0', *more]
        try:
            recipe.main([str(tmp_path / folder), str(tmp_path / 'run'), *options])
        except SystemExit:
            return capsys.readouterr().err.splitlines()[-1]
        return ''

    monkeypatch.setattr(recipe, 'fit', begun)
    shutil.copytree(detection_set, tmp_path / 'set')
    assert run('set') == ''
    (tmp_path / 'set').rename(tmp_path / 'moved')
    assert run('moved', '--resume') == ''

    files = {part: tmp_path / 'moved' / 'annotations' / f'instances_{part}.json' for part in ('train', 'val')}
    text = files['val'].read_text()
    document = json.loads(text)
    files['val'].write_text(
        json.dumps({**document, 'images': [*document['images'], {**document['images'][0], 'id': 99}]})
    )
    assert 'holds a run with images [48, 16], not [48, 17]; name another folder' in run('moved', '--resume')
    files['val'].write_text(text)
    for file in files.values():
        file.write_text(file.read_text().replace('Trouser', 'Jeans'))
    assert "holds a run with categories ['T-shirt/top', 'Trouser'" in run('moved', '--resume').replace('[[', '[')
