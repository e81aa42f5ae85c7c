"""Model cards are correct and valid, and every example in them prints the stated output."""

import contextlib
import html
import io
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from support import ROOT, slow_but, tiny
from torch import nn

from timm_res2net import card
from timm_res2net.hub import cards
from timm_res2net.hub.client import problems_on_hub
from timm_res2net.hub.push import merge_cards
from timm_res2net.models.variants import ARCHS, WEIGHTS

FOLDER = ROOT / 'hub_cards'
ONE_OF_EACH_TRUNK = 'test_res2net.digits', 'dla60_res2net.in1k'
PUSHED: dict[str, Any] = dict(
    repo_id='user/net',
    tag='mine',
    results={'accuracy': 91.25},
    dataset='somebody/shapes',
    license='mit',
    base_model='timm/res2net50d.in1k',
    recipe='Ten epochs of everything',
)


def metadata_of(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split('---\n')[1])


def test_card_is_committed_for_all_published_weights() -> None:
    assert {path.name for path in FOLDER.glob('*.md')} == {'README.md', *(f'{name}.md' for name in WEIGHTS)}


@pytest.mark.parametrize('name', slow_but([*ONE_OF_EACH_TRUNK, 'res2net50_vd_26w_4s.ssld_in1k'], WEIGHTS))
def test_card_committed_is_up_to_date_and_valid(name: str) -> None:
    text = (FOLDER / f'{name}.md').read_text()
    assert text == card(name), 'stale: timm-res2net card --all --out hub_cards'
    assert cards.problems_of(text) == []
    assert cards.is_unchanged(text)


@pytest.mark.parametrize('name', WEIGHTS)
def test_card_numbers_equal_tables(name: str) -> None:
    text, arch, weights = (FOLDER / f'{name}.md').read_text(), ARCHS[name.split('.')[0]], WEIGHTS[name]
    cfg = timm.get_pretrained_cfg(name)
    model = timm.create_model(name, device='meta')
    assert f'| parameters | {sum(p.numel() for p in model.parameters()):,} |' in text
    if cfg.input_size[-1] == 224:
        assert f'| parameters | {arch.params:,} |' in text
        assert f'| multiply-adds | {arch.gmacs:.3f} G |' in text
    meta = metadata_of(text)
    assert meta['license'] == cfg.license
    values = {metric['name']: metric['value'] for metric in meta['model-index'][0]['results'][0]['metrics']}
    assert values['top-1 accuracy'] == weights.top1
    assert values.get('top-5 accuracy') == weights.top5
    assert f'| top-1 accuracy | {weights.top1:.2f} % |' in text
    assert (cfg.url or cfg.hf_hub_id or 'are a part of the package') in text
    assert str(cfg.origin_url) in text


def created_without_download(create: Any) -> Any:
    """Makes a `timm.create_model` that uses constant weights instead of downloading pretrained ones."""

    def stub(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        assert pretrained
        kwargs = {'num_classes': timm.get_pretrained_cfg(name).num_classes, **kwargs} if '.' in name else kwargs
        model = create(name.split('.')[0], device='meta', **kwargs).to_empty(device='cpu')
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(0.01)
        model.pretrained_cfg = timm.get_pretrained_cfg(name).to_dict()
        return model

    return stub


def run_examples(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs each block of Python and compares what it prints with the comments below."""
    monkeypatch.chdir(folder)
    Image.new('RGB', (320, 240), 'teal').save('photo.jpg')
    blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        assert block.startswith('import timm, timm_res2net')
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(block, {})
        assert printed.getvalue().splitlines() == [line[2:] for line in block.splitlines() if line.startswith('# ')]


# The template is the same for all; one card of each trunk shows it.
@pytest.mark.parametrize('name', slow_but(ONE_OF_EACH_TRUNK, WEIGHTS))
def test_card_examples_print_stated_output(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, 'create_model', created_without_download(timm.create_model))
    run_examples((FOLDER / f'{name}.md').read_text(), tmp_path, monkeypatch)


def test_pushed_card_examples_print_stated_output(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from timm_res2net import push

    push(tiny(in_chans=3), 'user/net', token='hf_write')
    run_examples(hub.files('user/net')['README.md'].decode(), tmp_path, monkeypatch)


def test_card_of_model_contains_given_metadata() -> None:
    text = card(tiny(), **PUSHED)
    meta = metadata_of(text)
    assert meta['license'] == 'mit'
    assert meta['datasets'] == ['somebody/shapes']
    assert meta['base_model'] == 'timm/res2net50d.in1k'
    assert meta['metrics'] == ['accuracy']
    assert meta['model-index'][0]['results'][0]['metrics'][0]['value'] == 91.25
    assert '# user/net' in text
    assert "timm.create_model('hf-hub:user/net', pretrained=True)" in text
    assert 'Ten epochs of everything.' in text
    assert 'fine-tuned from [timm/res2net50d.in1k]' in text
    assert '| accuracy | 91.25 % |' in text
    assert cards.problems_of(text) == []


def test_card_of_model_without_metadata_invents_none() -> None:
    text = card(tiny())
    assert not {'license', 'datasets', 'metrics', 'base_model', 'model-index'} & metadata_of(text).keys()
    assert 'named no licence' in text
    assert 'Not described.' in text
    assert cards.problems_of(text) == []


def test_card_license_unknown_to_hub_has_name_and_link() -> None:
    meta = metadata_of(card(tiny(), license=('Our Own Licence', 'https://example.org/licence')))
    assert (meta['license'], meta['license_name']) == ('other', 'our-own-licence')
    assert meta['license_link'] == 'https://example.org/licence'


def test_card_quotes_special_characters_of_yaml() -> None:
    text = card(tiny(), dataset='digits: "8 x 8", 10 % # held out', results={'accuracy': 1.0}, recipe='a: b')
    assert metadata_of(text)['model-index'][0]['results'][0]['dataset']['name'] == 'digits: "8 x 8", 10 % # held out'
    assert cards.problems_of(text) == []


def rendered(text: str) -> str:
    """Markdown as HTML."""
    return pytest.importorskip('markdown_it').MarkdownIt('gfm-like', {'linkify': False}).render(text)


@pytest.mark.parametrize(
    'text',
    [
        '[here](javascript:alert(1)) ![x](https://example.org)',
        '<script>alert(1)</script> &lt; <!-- a',
        'a | b || `code` ~~no~~ *strong* __strong__ snake_case $x$',
        '# no heading',
        '- no list',
        '1. no list',
        'first\n\n## second\n---\nthird',
        'C:\\[x]',
        '===',
    ],
)
def test_plain_text_is_read_as_it_was_written_and_as_nothing_else(text: str) -> None:
    words = ' '.join(text.split())
    assert rendered(cards.plain(text)) == f'<p>{html.escape(words).replace("&#x27;", chr(39))}</p>\n'


def test_card_escapes_all_texts() -> None:
    evil = '[x](javascript:alert(1)) | <b>'
    text = card(tiny(), dataset=evil, recipe=evil, results={evil: 5.0}, license=(evil, 'https://example.org/licence'))
    body = text.split('---\n', 2)[2]
    assert body.count('\\[x\\](javascript:alert(1)) \\| \\<b\\>') == 4
    assert '[x](javascript' not in body
    assert cards.problems_of(text) == []


@pytest.mark.parametrize('license', ['MIT', 'Apache-2.0', ' apache-2.0 '])
def test_card_spells_license_as_the_hub_does(license: str) -> None:
    assert metadata_of(card(tiny(), license=license))['license'] == license.strip().lower()


def test_is_unchanged_detects_edits_and_merge_cards_keeps_edited_text() -> None:
    text = card(tiny())
    assert cards.is_unchanged(text)
    assert not cards.is_unchanged(text.replace('## Limits', '## Bounds'))
    assert not cards.is_unchanged('')
    written = '---\nlicense: mit\n---\nMy words.\n'
    assert merge_cards(written, text).endswith('---\nMy words.\n')
    assert merge_cards(text, written) == written


@pytest.mark.parametrize(
    ('text', 'problem'),
    [
        ('no metadata', 'does not begin with metadata'),
        ('---\n: [\n---\n', 'can not be read'),
        ('---\n- a\n---\n', 'mapping|dict'),
        ('---\n\n---\n', 'no mapping'),
        ('---\nlicence: mit\n---\n', "the key 'licence' means nothing"),
        ('---\nlicense: other\n---\n', 'needs license_name'),
        ('---\ndatasets: [a b]\n---\n', "'a b' in datasets"),
        ('---\nbase_model: a/b/c\n---\n', "'a/b/c' in base_model"),
        ('---\nlibrary_name: timm\n---\nimport timm\n', 'no example imports timm_res2net'),
        ('---\nmodel-index:\n- name: a\n  results:\n  - task: {type: b}\n---\n', 'can not be read|no dataset'),
    ],
)
def test_problems_of_finds_problem_of_invalid_card(text: str, problem: str) -> None:
    found = cards.problems_of(text)
    assert any(re.search(problem, line) for line in found), found


def test_problems_on_hub_reports_license_unknown_to_hub(hub: Any) -> None:
    assert problems_on_hub(card(tiny())) == []
    assert 'license' in problems_on_hub('---\nlicense: made-up\n---\n')[0]


def test_problems_on_hub_offline_returns_no_problems() -> None:
    assert problems_on_hub('---\nlicense: made-up\n---\n') == []


def test_card_of_unpublished_weights_raises_with_suggestion() -> None:
    with pytest.raises(ValueError, match=r'there are res2net50d\.in1k, res2net50d\.mindcv_in1k'):
        card('res2net50d.in22k')
    with pytest.raises(ValueError, match='--pretrained` shows all'):
        card('res2net152d')


def test_measure_counts_gmacs_and_outputs_of_convolutions_and_classifier() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)).to('meta')
    model.in_chans = 3  # type: ignore[assignment]
    gmacs, activations = cards.measure(model.eval(), 8)
    assert (gmacs, activations) == ((8 * 8 * 4 * 27 + 256 * 5) / 1e9, (8 * 8 * 4 + 5) / 1e6)


def test_card_round_trip_through_model_card_changes_nothing() -> None:
    text = card('res2net50d.in1k')
    assert str(ModelCard(text)) == text


def test_card_without_dataset_does_not_say_that_the_model_was_trained() -> None:
    model = timm.create_model('test_res2net', device='meta')
    assert ' trained' not in card(model).partition('\n# ')[2].partition('\n## ')[0]
    assert ' trained on imagenet-1k, fine-tuned from ' in card(model, dataset='imagenet-1k', base_model='user/net')


def test_card_of_another_model_raises_value_error() -> None:
    with pytest.raises(ValueError, match='resnet18 is no model of this package'):
        card(timm.create_model('resnet18', device='meta'))
