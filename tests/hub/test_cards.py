"""Cards and the catalogue are correct, current and valid, and the examples print what their comments show."""

import contextlib
import html
import io
import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from support import ROOT, slow_but, small, tiny
from torch import nn

from timm_res2net import ModelFacts, UnknownModelError, card, push
from timm_res2net.hub import cards
from timm_res2net.models.variants import WEIGHTS

FOLDER = ROOT / 'hub_cards'
CATALOGUE = (FOLDER / 'README.md').read_text()


def metadata_of(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split('---\n')[1])


@cache
def card_without_facts() -> str:
    return card(tiny())


@pytest.mark.parametrize('name', slow_but(['test_res2net.digits', 'dla60_res2net.in1k'], WEIGHTS))
def test_card_is_current(name: str) -> None:
    assert (FOLDER / f'{name}.md').read_text() == card(name), 'stale: run python hub_cards/make_cards.py'


def test_every_published_set_of_weights_has_a_card_and_the_catalogue_is_current() -> None:
    assert {path.name for path in FOLDER.glob('*.md')} == {'README.md', *(f'{name}.md' for name in WEIGHTS)}
    script = runpy.run_path(str(FOLDER / 'make_cards.py'))
    assert script['render_catalogue']() == CATALOGUE, 'stale: run python hub_cards/make_cards.py'


def run_examples(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs each Python block, compares its output with the comments below it, and counts the blocks."""
    monkeypatch.chdir(folder)
    Image.new('RGB', (320, 240), 'teal').save('photo.jpg')
    blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(block, {})
        assert printed.getvalue().splitlines() == [line[2:] for line in block.splitlines() if line.startswith('# ')]
    return len(blocks)


def test_examples_of_an_embedded_card_print_their_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_examples(card('test_res2net.digits'), tmp_path, monkeypatch) == 4


@pytest.mark.slow
def test_examples_of_a_pushed_card_print_their_comments(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(in_chans=1, num_classes=1, pretrained_cfg_overlay=dict(input_size=(1, 64, 64)))
    dla = timm.create_model('dla60_res2net', **options, **small('dla60_res2net'))
    for model in (tiny(), dla):
        push(model, 'user/net', token='hf_write')
        assert run_examples(hub.files('user/net')['README.md'].decode(), tmp_path, monkeypatch) == 5


@pytest.mark.parametrize(('num_classes', 'function'), [(0, None), (1, 'sigmoid()  # one logit'), (2, 'softmax(dim=1)')])
def test_card_uses_sigmoid_for_one_class_and_softmax_for_more(num_classes: int, function: str | None) -> None:
    text = card(tiny(num_classes=num_classes))
    assert ('### Classify an image' in text) == (function is not None)
    assert function is None or f'.{function}' in text


def test_card_of_a_model_whose_activations_have_weights_counts_the_same_multiply_adds() -> None:
    costs = [re.findall('.*multiply-adds.*', card(tiny(act_layer=name))) for name in ('relu', 'prelu')]
    assert costs[0] == costs[1] != []


def test_card_contains_the_given_facts() -> None:
    origin = dict(dataset='somebody/shapes', base_model='timm/res2net50d.in1k', recipe='Ten epochs of everything')
    text = card(tiny(), repo_id='user/net', tag='mine', results={'accuracy': 91.25}, license=' MIT ', **origin)
    meta = metadata_of(text)
    assert meta['license'] == 'mit'  # as the Hub spells it
    assert meta['datasets'] == ['somebody/shapes']
    assert meta['base_model'] == 'timm/res2net50d.in1k'
    assert meta['model-index'][0]['results'][0]['metrics'][0]['value'] == 91.25
    assert '# user/net' in text
    assert "timm.create_model('hf-hub:user/net', pretrained=True)" in text
    assert 'Ten epochs of everything.' in text
    assert 'were trained on somebody/shapes and fine-tuned from [timm/res2net50d.in1k]' in text
    assert '| accuracy | 91.25 % |' in text
    assert str(ModelCard(text)) == text


def test_card_describes_the_model_and_not_its_row() -> None:
    text = card(tiny('mmdet', scale=2, attn_layer='se', block_args=dict(cardinality=2)))
    assert 'Res2Net blocks of 2 splits with 2 groups and squeeze-and-excitation' in text
    assert 'same function as in mmdet.' in text


def test_card_without_facts_invents_none() -> None:
    text = card_without_facts()
    assert not {'license', 'datasets', 'metrics', 'base_model', 'model-index'} & metadata_of(text).keys()
    assert 'has not named a license' in text
    assert 'Not described.' in text
    assert 'The weights were' not in text


@pytest.mark.parametrize(
    ('facts', 'message'),
    [
        (dict(results={'accuracy': float('nan')}), r'invalid results: accuracy is nan\. Pass a percentage'),
        (dict(results={'accuracy': 9950}), r'invalid results: accuracy is 9950\. Pass a percentage'),
        (dict(results={'accuracy': '99'}), "invalid results: accuracy is '99'"),
        (dict(results={' ': 99}), "invalid metric ' ' in results"),
        (dict(tag='a b'), "invalid tag 'a b': use only letters"),
        (dict(dataset=' '), "invalid dataset ' ': pass a non-empty str"),
        (dict(base_model='x](javascript:alert(1))'), 'invalid base_model .*: pass the name of a repository'),
        (dict(license='Our Own'), "invalid license 'Our Own': pass a license ID"),
        (dict(license=('Our Own', 'javascript:alert(1)')), 'invalid license .*: pass a name, and a URL'),
    ],
    ids=str,
)
def test_fact_that_cannot_be_on_a_card_is_refused(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelFacts(**facts)


@pytest.mark.parametrize(
    ('model', 'facts', 'message'),
    [
        ('res2net50d.in22k', {}, r"in22k'\. Choose from res2net50d\.in1k, res2net50d\.mindcv_in1k"),
        ('res2net152d', {}, r"weights 'res2net152d'\. `timm-res2net list --pretrained` shows all names"),
        ('test_res2net.digits', dict(license='mit'), 'fixed facts, as it is published. Omit license'),
        (nn.Identity(), dict(licence='mit'), 'licence'),
        (timm.create_model('test_resnet'), {}, "'test_resnet': it is not a model of this package"),
    ],
)
def test_card_of_unknown_model_or_facts_is_refused(model: Any, facts: dict[str, Any], message: str) -> None:
    with pytest.raises((UnknownModelError, ValueError, TypeError), match=message):
        card(model, **facts)


@pytest.mark.parametrize(
    'text',
    [
        '[here](javascript:alert(1)) ![x](https://example.org)',
        '<script>alert(1)</script> &lt; <!-- a',
        'a | b || `code` ~~no~~ *strong* __strong__ snake_case $x$',
        '# no heading',
        '1. no list',
        'first\n\n## second\n---\nthird',
        'C:\\[x]',
        '===',
    ],
)
def test_escaped_text_renders_as_it_was_written(text: str) -> None:
    markdown = pytest.importorskip('markdown_it').MarkdownIt('gfm-like', {'linkify': False})
    words = html.escape(' '.join(text.split())).replace('&#x27;', "'")
    assert markdown.render(cards.escape(text)) == f'<p>{words}</p>\n'


def test_card_escapes_every_fact() -> None:
    evil = '[x](javascript:alert(1)) | <b>'
    text = card(tiny(), dataset=evil, recipe=evil, results={evil: 5.0}, license=(evil, 'https://example.org/license'))
    body = text.split('---\n', 2)[2]
    assert body.count('\\[x\\](javascript:alert(1)) \\| \\<b\\>') == 4
    assert '[x](javascript' not in body


def test_generated_card_is_recognized_until_somebody_edits_it() -> None:
    text = card_without_facts()
    assert cards.is_generated(text)
    assert not cards.is_generated(text.replace('## Limits', '## Bounds'))
    assert not cards.is_generated('')


def test_merged_card_keeps_hand_written_text_and_gets_the_metadata(caplog: pytest.LogCaptureFixture) -> None:
    generated = card_without_facts()
    for written, kept, metadata in (
        ('# Bäume\r\nund Äste\r\n', '# Bäume\nund Äste\n', {}),
        ('\ufeff---\nlanguage: de\n---\n# Bäume\n', '# Bäume\n', {'language': 'de'}),
        ('---\ntags: [a, timm]\n---\nMy net.', 'My net.', {'tags': ['a', 'timm', 'image-classification', 'res2net']}),
        ('---\nmodel-index: trees\n---\n# Trees\n', '# Trees\n', {'model-index': 'trees'}),
    ):
        merged = cards.merge_cards(written.encode(), generated)
        assert merged.endswith(f'---\n{kept}')
        assert metadata_of(merged) == {**metadata_of(generated), **metadata}
        assert cards.merge_cards(merged.encode(), generated) == merged
        assert ('kept the results in the existing card' in caplog.text) == ('model-index' in metadata)


@pytest.mark.parametrize('written', [b'B\xe4ume', b'---\ntags:\n\t- tabs\n---\n', b'---\n- a list\n---\n'])
def test_card_that_cannot_be_merged_is_refused(written: bytes) -> None:
    with pytest.raises(ValueError, match=r'cannot keep the existing README\.md: .*, or pass overwrite_card=True$'):
        cards.merge_cards(written, card_without_facts())
