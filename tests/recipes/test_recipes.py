"""Recipes work with timm's train script, and the digits data set is written as an image folder."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from PIL import Image

import timm_res2net
from timm_res2net.__main__ import main
from timm_res2net.recipes import digits
from timm_res2net.recipes.digits import split


def test_digits_split_holds_out_one_third_of_each_class() -> None:
    parts = split()
    assert {name: len(labels) for name, (_, labels) in parts.items()} == {'train': 1198, 'val': 599}
    share = np.bincount(parts['val'][1]) / (np.bincount(parts['train'][1]) + np.bincount(parts['val'][1]))
    np.testing.assert_allclose(share, 1 / 3, atol=0.01)


def test_digits_main_writes_image_folder(tmp_path: Path) -> None:
    digits.main([str(tmp_path)])
    for part, (images, labels) in split().items():
        assert sorted(path.name for path in (tmp_path / part).iterdir()) == list('0123456789')
        assert sum(1 for _ in (tmp_path / part).rglob('*.png')) == len(images)
        with Image.open(tmp_path / part / str(labels[5]) / '0005.png') as image:
            np.testing.assert_array_equal(np.asarray(image), images[5])


RECIPES = sorted(Path(timm_res2net.__file__).parent.glob('recipes/*.yaml'))


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda path: path.name)
def test_recipe_fits_the_model_it_names(recipe: Path) -> None:
    options = yaml.safe_load(recipe.read_text())
    cfg = timm.create_model(options['model'], device='meta').default_cfg
    assert options['num_classes'] == cfg['num_classes']
    assert tuple(options.get('input_size', (3, 224, 224))) == cfg['input_size']
    assert f'--config timm_res2net/recipes/{recipe.name}' in recipe.read_text()


@pytest.mark.skipif('TIMM_SCRIPTS' not in os.environ, reason="TIMM_SCRIPTS does not name the folder of timm's train.py")
@pytest.mark.parametrize('recipe', RECIPES, ids=lambda path: path.name)
def test_recipe_keys_are_options_of_timm_train_script(recipe: Path) -> None:
    code = f"""if True:
        import sys, train
        known = {{action.dest for action in train.parser._actions}}
        sys.argv = ['train.py', '--config', {str(recipe)!r}]
        args, _ = train._parse_args()
        import yaml
        options = yaml.safe_load(open({str(recipe)!r}))
        assert set(options) <= known, set(options) - known
        assert {{key: getattr(args, key) for key in options}} == options
    """
    environment = {**os.environ, 'PYTHONPATH': os.environ['TIMM_SCRIPTS']}
    subprocess.run([sys.executable, '-c', code], env=environment, check=True)


def test_recipe_command_lists_prints_and_writes_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['recipe']) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [recipe.stem for recipe in RECIPES]
    for recipe in RECIPES:
        assert main(['recipe', recipe.stem]) == 0
        assert capsys.readouterr().out == recipe.read_text()
        assert main(['recipe', recipe.stem, '--out', str(tmp_path / 'a.yaml')]) == 0
        assert (tmp_path / 'a.yaml').read_text() == recipe.read_text()
        capsys.readouterr()
    with pytest.raises(SystemExit, match='2'):
        main(['recipe', 'imagnet'])
    assert "no recipe 'imagnet'. Choose from cifar100, digits, imagenet" in capsys.readouterr().err
