"""The committed catalogue of models and weights is the generated one, with the numbers of the tables."""

import timm
from support import ROOT

from timm_res2net.hub.catalogue import catalogue
from timm_res2net.models.variants import ARCHS, WEIGHTS

COMMITTED = (ROOT / 'hub_cards' / 'README.md').read_text()


def test_catalogue_committed_is_up_to_date() -> None:
    assert catalogue() == COMMITTED, 'stale: timm-res2net card --all --out hub_cards'


def test_catalogue_lists_every_architecture_in_order() -> None:
    default = {name.split('.')[0]: weights.top1 for name, weights in reversed(WEIGHTS.items())}
    rows = []
    for name, arch in ARCHS.items():
        top1 = f'{default[name]:.2f} %' if name in default and name != 'test_res2net' else ''
        rows.append(f'| `{name}` | {arch.params:,} | {arch.gmacs:.3f} | {top1} |')
    assert '\n'.join(rows) in COMMITTED


def test_catalogue_lists_all_imagenet_weights_with_source_licence_and_card() -> None:
    authors = {'github.com/Res2Net': 'the authors', 'PaddleClas': 'PaddleClas', 'mindcv': 'MindCV'}
    rows = []
    for name, weights in WEIGHTS.items():
        if weights.top5 is not None:
            cfg = timm.get_pretrained_cfg(name)
            who = next(who for part, who in authors.items() if part in cfg.origin_url)
            licence = {'apache-2.0': 'Apache-2.0', 'cc-by-nc-sa-4.0': 'CC BY-NC-SA 4.0'}[cfg.license]
            accuracy = f'{weights.top1:.2f} % | {weights.top5:.2f} %'
            rows.append(f'| [`{name}`]({name}.md) | {accuracy} | {who} | {licence} |')
    assert '\n'.join(rows) in COMMITTED


def test_catalogue_mentions_all_weights() -> None:
    assert [name for name in WEIGHTS if f'[`{name}`]({name}.md)' not in COMMITTED] == []
