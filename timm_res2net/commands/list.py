"""Lists models and weights."""

import argparse
import json
from fnmatch import fnmatch
from typing import Any

from ..models.classifier import registered_cfg
from ..models.variants import ARCHS, WEIGHTS
from .output import print, print_table

SORT_KEYS: dict[str, Any] = {
    'params': lambda entry: entry['params'],
    'gmacs': lambda entry: entry['gmacs'],
    'top1': lambda entry: (entry['top1_on'] != 'imagenet-1k', -(entry['top1'] or 0)),  # digits are another task
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument('pattern', nargs='?', default='*', metavar='PATTERN', help="such as '*50*'")
    command.add_argument('--pretrained', action='store_true', help='only models with weights')
    command.add_argument('--max-params', type=float, metavar='M', help='at most M million parameters')
    command.add_argument('--sort', choices=SORT_KEYS, help='smallest (params, gmacs) or most accurate (top1) first')
    command.add_argument('--json', action='store_true', help='machine-readable output')


def run(args: argparse.Namespace) -> None:
    found = [
        entry
        for entry in list_family()
        if (fnmatch(entry['name'], args.pattern) or fnmatch(entry['arch'], args.pattern))
        and (entry['weights'] or not args.pretrained)
        and (args.max_params is None or entry['params'] <= args.max_params * 1e6)
    ]
    if args.sort:
        found.sort(key=SORT_KEYS[args.sort])
    if not found:
        raise ValueError('no model matches. Choose another PATTERN or --max-params, or leave out --pretrained')
    if args.json:
        print(json.dumps(found, indent=2))
        return
    rows = [('name', 'params', 'GMACs', 'top-1', 'license', 'weights')]
    for entry in found:
        top1 = '-' if entry['top1'] is None else f'{entry["top1"]:.2f} %'
        cost = f'{entry["params"] / 1e6:.2f} M', f'{entry["gmacs"]:.3f}'
        rows.append((entry['name'], *cost, top1, entry['license'] or '-', entry['weights'] or '-'))
    print_table(rows, left=(0, 4, 5))
    print('\nGMACs at 224 x 224, or at 32 x 32 for the 29-layer CIFAR networks.')
    print('Top-1 on ImageNet-1k at 224 x 224, or on the held-out third of the digits.')


def list_family() -> list[dict[str, Any]]:
    """Returns an entry for each set of weights, and for each architecture without any."""
    entries = []
    for arch, variant in ARCHS.items():
        for name in [key for key in WEIGHTS if key.split('.')[0] == arch] or [arch]:
            entry: dict[str, Any] = dict(name=name, arch=arch, params=variant.params, gmacs=variant.gmacs)
            entry |= dict(top1=None, top1_on=None, license=None, weights=None)
            if name in WEIGHTS:
                weights, cfg = WEIGHTS[name], registered_cfg(name)
                data = 'digits' if weights.top5 is None else 'imagenet-1k'
                source = 'in this package' if cfg.file else cfg.url or f'hf-hub:{cfg.hf_hub_id}'
                entry |= dict(top1=weights.top1, top1_on=data, license=cfg.license, weights=source)
            entries.append(entry)
    return entries
