"""A pushed model arrives byte for byte, with facts and a card; an invalid push is refused before any request."""

import hashlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import Hub
from safetensors import safe_open
from safetensors.torch import save_file
from support import ROOT, randomize, tiny
from torch import nn

import timm_res2net
from timm_res2net import load_checkpoint, load_model, pull, push
from timm_res2net._files import sha256
from timm_res2net.hub.push import FILES
from timm_res2net.weights.loading import load_folder

WRITE: dict[str, Any] = dict(token='hf_write')


def digests(hub: Hub, repo_id: str = 'user/net', revision: str = 'main') -> dict[str, str]:
    files = hub.files(repo_id, revision)
    return {name: hashlib.sha256(files[name]).hexdigest() for name in FILES if name in files}


def fine_tuned() -> nn.Module:
    """The embedded model in bfloat16 with three new classes and one image channel."""
    torch.manual_seed(0)
    model = randomize(timm.create_model('test_res2net.digits', pretrained=True, num_classes=3, in_chans=1))
    return model.to(torch.bfloat16).to(memory_format=torch.channels_last).eval()


@pytest.mark.parametrize('labels', [None, ['round', 'straight', 'both']])
def test_pulled_model_has_the_pushed_weights_outputs_and_labels(labels: Any, hub: Hub, tmp_path: Path) -> None:
    model: Any = fine_tuned() if labels else timm.create_model('test_res2net.digits', pretrained=True).eval()
    pushed = push(model, 'user/net', tag='mine', labels=labels, **WRITE)
    back = pull('user/net', cache_dir=tmp_path)
    dtype = next(model.parameters()).dtype
    torch.testing.assert_close(back.to(dtype).state_dict(), model.state_dict(), rtol=0, atol=0)
    x = torch.randn(2, model.in_chans, 32, 32).to(dtype)
    torch.testing.assert_close(back(x), model(x), rtol=0, atol=0)
    cfg = back.pretrained_cfg
    assert cfg['hf_hub_id'] == f'user/net@{pushed.revision}'
    assert list(cfg['label_names']) == (labels or list('0123456789'))
    assert cfg['tag'] == 'mine'


def test_timm_loads_the_pushed_repository_and_folder(hub: Hub, tmp_path: Path) -> None:
    block_args = dict(first_block='paddle', act_layer='silu')
    model = tiny(None, attn_layer='se', global_pool='max', output_stride=8, block_args=block_args)
    push(model, 'user/net', **WRITE)
    push(model, 'user/net', dry_run=tmp_path / 'folder')
    x = torch.randn(1, 3, 64, 64)
    for name in ('hf-hub:user/net', f'local-dir:{tmp_path / "folder"}'):
        options: dict[str, Any] = dict(pretrained=True, cache_dir=str(tmp_path / 'cache'))
        loaded = timm.create_model(name, **options).eval()
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
        adapted = timm.create_model(name, num_classes=2, in_chans=1, **options)
        assert adapted(x[:, :1]).shape == (1, 2)


def test_push_writes_weights_config_card_and_code_with_the_given_facts(hub: Hub, tmp_path: Path) -> None:
    pushed = push(fine_tuned(), 'user/net', license='mit', dataset='somebody/shapes', **WRITE)
    files = hub.files('user/net')
    assert pushed.hashes == digests(hub)
    assert sorted(files) == sorted(['.gitattributes', *FILES])
    config = json.loads(files['config.json'])
    assert config['model_args'] == {'in_chans': 1}
    assert (config['num_classes'], config['pretrained_cfg']['input_size']) == (3, [1, 32, 32])
    assert config['pretrained_cfg']['license'] == 'mit'
    assert 'description' not in config['pretrained_cfg']
    record = config['timm_res2net']
    assert record['sha256'] == pushed.hashes['model.safetensors']
    assert (record['version'], record['dataset']) == (timm_res2net.__version__, 'somebody/shapes')
    (tmp_path / 'weights').write_bytes(files['model.safetensors'])
    with safe_open(tmp_path / 'weights', 'pt') as weights:
        recorded = {'architecture': 'test_res2net', 'model_args': '{"in_chans": 1}', 'first_block': 'official'}
        assert weights.metadata() == {'format': 'pt', **recorded}
    load_checkpoint(fine_tuned(), tmp_path / 'weights')


def test_push_of_an_unchanged_model_makes_no_second_commit(hub: Hub) -> None:
    first = push(tiny(), 'user/net', **WRITE)
    assert push(nn.DataParallel(tiny()), 'user/net', **WRITE).revision == first.revision
    assert len(hub.repos['user/net'].commits) == 2


def test_push_to_a_new_branch_or_a_pull_request_leaves_main_unchanged(hub: Hub, tmp_path: Path) -> None:
    main, branch, proposed = (
        push(tiny(num_classes=count), 'user/net', **options, **WRITE)
        for count, options in ((4, {}), (2, dict(revision='v2')), (3, dict(create_pr=True)))
    )
    revisions = {'main': main.revision, 'v2': branch.revision, 'refs/pr/2': proposed.revision}
    assert hub.repos['user/net'].branches == revisions
    assert proposed.url == f'{os.environ["HF_ENDPOINT"]}/user/net/discussions/2'
    assert digests(hub, revision='refs/pr/2') == proposed.hashes
    for revision, count in (('v2', 2), (main.revision, 4)):
        assert pull('user/net', revision=revision, cache_dir=tmp_path).num_classes == count


def test_dry_run_writes_the_files_once_keeps_a_card_and_sends_no_request(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / 'README.md').write_text('Meine Wörter.', encoding='utf-8')
    done = push(tiny(), 'user/net', dry_run=tmp_path)
    assert done.folder == tmp_path
    with pytest.raises(ValueError, match='it already contains model'):
        push(tiny(), 'user/net', dry_run=tmp_path)
    assert done.hashes == {name: sha256(tmp_path / name) for name in FILES}
    assert (tmp_path / 'README.md').read_text(encoding='utf-8').endswith('Meine Wörter.')
    assert hub.log == []


# transformers


@pytest.mark.slow
def test_transformers_round_trip_keeps_the_fine_tuned_weights(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip('transformers')
    monkeypatch.setenv('HF_TOKEN', 'hf_write')
    push(fine_tuned().float(), 'user/net', labels=['a', 'b', 'c'], results={'accuracy': 91.5})
    tuned = transformers.AutoModelForImageClassification.from_pretrained('user/net')
    assert tuned.config.id2label == {0: 'a', 1: 'b', 2: 'c'}
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(tuned.eval()(x).logits, pull('user/net')(x))  # `tuned` has another memory format
    optimizer = torch.optim.SGD(tuned.train().parameters(), lr=0.01)
    tuned(x, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    tuned.eval().push_to_hub('user/tuned')
    for model in (pull('user/tuned'), timm.create_model('hf-hub:user/tuned', pretrained=True).eval()):
        torch.testing.assert_close(model(x), tuned(x).logits)
    push(pull('user/tuned'), 'user/again')
    torch.testing.assert_close(pull('user/again')(x), tuned(x).logits)
    assert '91.50' not in hub.files('user/again')['README.md'].decode()  # that was the accuracy before fine-tuning


CODE = """if True:
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
    model = AutoModelForImageClassification.from_pretrained({folder!r}, trust_remote_code=True)
    AutoModel.from_pretrained({folder!r}, trust_remote_code=True)
    AutoImageProcessor.from_pretrained({folder!r}, trust_remote_code=True)
    model.save_pretrained({folder!r} + '/again')
    AutoModelForImageClassification.from_pretrained({folder!r} + '/again', trust_remote_code=True)
"""


@pytest.mark.slow  # it starts a process that imports transformers
def test_transformers_loads_a_pushed_model_with_trust_remote_code(tmp_path: Path) -> None:
    pytest.importorskip('transformers')
    push(tiny(), 'user/net', dry_run=tmp_path / 'folder')
    code = CODE.format(folder=str(tmp_path / 'folder'))
    environment = {**os.environ, 'HF_MODULES_CACHE': str(tmp_path / 'modules')}
    subprocess.run([sys.executable, '-c', code], check=True, env=environment)


@pytest.mark.slow  # it imports much of transformers
def test_pushed_code_names_the_package_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('transformers')
    monkeypatch.setitem(sys.modules, 'timm_res2net', None)
    with pytest.raises(ImportError, match=r'this model needs timm_res2net: run `pip install \.`'):
        runpy.run_path(str(ROOT / 'timm_res2net' / 'hub' / 'register.py'))


def test_unchanged_model_keeps_its_facts_and_a_changed_one_loses_them(hub: Hub, tmp_path: Path) -> None:
    facts: dict[str, Any] = dict(results={'accuracy': 91.5}, dataset='somebody/shapes', license='MIT', recipe='By hand')
    push(tiny(), 'user/net', tag='mine', base_model='timm/res2net50d.in1k', labels=list('abcd'), **facts, **WRITE)
    model = pull('user/net', cache_dir=tmp_path)
    push(model, 'user/copy', recipe='Otherwise', **WRITE)
    config, copy = (json.loads(hub.files(name)['config.json']) for name in ('user/net', 'user/copy'))
    assert config['pretrained_cfg'] == copy['pretrained_cfg']
    assert config['pretrained_cfg']['license'] == 'mit'
    assert copy['timm_res2net'] == {**config['timm_res2net'], 'recipe': 'Otherwise'}
    assert copy['label_names'] == list('abcd')
    assert '| accuracy | 91.50 % |' in hub.files('user/copy')['README.md'].decode()
    with torch.no_grad():
        model.fc.bias.add_(1)
    push(model, 'user/changed', **WRITE)
    assert json.loads(hub.files('user/changed')['config.json'])['timm_res2net'].keys() == {'version', 'sha256'}
    assert '91.50' not in hub.files('user/changed')['README.md'].decode()


def test_file_next_to_its_config_keeps_its_facts_until_it_is_replaced(tmp_path: Path) -> None:
    def push_to(name: str, model: nn.Module, **facts: Any) -> Any:
        push(model, 'user/net', dry_run=tmp_path / name, **facts)
        return json.loads((tmp_path / name / 'config.json').read_text())

    file = tmp_path / 'net' / 'model.safetensors'
    config = push_to('net', tiny(), tag='mine', results={'accuracy': 91.5}, license=('Ours', 'https://a.org'))
    copy = push_to('copy', load_model(file))
    assert copy['timm_res2net'] == config['timm_res2net']
    assert copy['pretrained_cfg']['tag'] == 'mine'
    save_file(randomize(tiny()).state_dict(), file)
    replaced = push_to('replaced', load_model(file))
    assert replaced['timm_res2net'].keys() == {'version', 'sha256'}
    assert replaced['pretrained_cfg'].get('tag') != 'mine'


def test_recorded_facts_that_cannot_be_on_a_card_are_ignored(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / 'folder'
    push(tiny(), 'user/net', dry_run=folder)
    config = json.loads((folder / 'config.json').read_text())
    config['timm_res2net'].update(license=['x', 'javascript:alert(1)'], results=[3], base_model={'a': 1})
    (folder / 'config.json').write_text(json.dumps(config))
    push(load_folder(folder), 'user/net', **WRITE)
    assert 'javascript' not in str(hub.files('user/net'))


def test_push_keeps_a_hand_written_card_unless_told_to_replace_it(hub: Hub) -> None:
    hub.put('user/net', {'README.md': b'---\nlanguage: en\nlicense: mit\n---\n# My net\n\nFor my students.\n'})
    for _ in range(2):
        push(tiny(), 'user/net', license='apache-2.0', **WRITE)
        card = hub.files('user/net')['README.md'].decode()
        assert card.endswith('---\n# My net\n\nFor my students.\n')
        assert {'language: en', 'license: apache-2.0', 'library_name: timm'} <= set(card.splitlines())
        assert len(hub.repos['user/net'].commits) == 2
    push(tiny(), 'user/net', overwrite_card=True, **WRITE)
    assert 'For my students' not in hub.files('user/net')['README.md'].decode()


def changed(name: str, module: nn.Module) -> nn.Module:
    """The tiny network with a module added or replaced after create_model."""
    model = tiny()
    setattr(model, name, module)
    return model


CHANGED = 'it was changed after create_model'


@pytest.mark.parametrize(
    ('make', 'arguments', 'message'),
    [
        (lambda: changed('maxpool', nn.AvgPool2d(3, 2, 1)), {}, CHANGED),  # another function
        (lambda: changed('fc', nn.Linear(32, 7)), {}, CHANGED),
        (lambda: changed('more', nn.Linear(2, 2)), {}, CHANGED),
        (lambda: changed('act1', nn.PReLU(init=float('nan'))), {}, r"NaN or infinity.*\(first: 'act1\.weight'\)"),
        (lambda: tiny().to('meta'), {}, r"meta device.*\(first: 'conv1\.0"),
        (lambda: timm.create_model('test_resnet'), {}, 'cannot push a ResNet: it is not a model of this package'),
        (lambda: timm.create_model('test_res2net', features_only=True), {}, 'classification model'),
        (lambda: timm.create_model('test_res2net', norm_layer=nn.BatchNorm2d), {}, r'config\.json cannot hold'),
        (tiny, dict(labels=['a']), 'labels has 1 names for 4 classes'),
        (tiny, dict(labels=['a', 'b', 'c', 4]), 'labels must be a list of str'),
        (tiny, dict(timeout=5), "unexpected keyword argument 'timeout'"),
    ],
)
def test_invalid_arguments_are_refused_with_and_without_dry_run(
    make: Any, arguments: dict[str, Any], message: str, hub: Hub, tmp_path: Path
) -> None:
    for options in (WRITE, dict(dry_run=tmp_path / 'new' / 'folder')):
        with pytest.raises((ValueError, TypeError), match=message):
            push(make(), **{'repo_id': 'user/net', **arguments, **options})
    assert list(tmp_path.iterdir()) == []
    assert hub.log == []
