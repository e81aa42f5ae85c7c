"""Uploads a model to the Hugging Face Hub. Verifies that every byte arrived."""

import argparse

from ..hub.push import push
from .options import add_options
from .output import describe_training, print
from .sources import make_source, read_label_names


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument('source', metavar='SOURCE', help='weights file, folder that convert wrote, or model name')
    command.add_argument('repo', metavar='USER/NAME', help='repository, created if it does not exist')
    command.add_argument('--model', metavar='NAME', help='model that the file fits (default: detected)')
    command.add_argument('--tag', help='name of this set of weights')
    command.add_argument('--result', type=result, action='append', metavar='METRIC=PERCENT', help='like accuracy=99.5')
    command.add_argument('--dataset', help='data for training and evaluation, such as imagenet-1k')
    command.add_argument('--license', metavar='ID', help='license ID from the Hub, such as apache-2.0')
    command.add_argument('--license-link', metavar='URL', help='link to a license that has no ID')
    command.add_argument('--base-model', metavar='USER/NAME', help='model that it was fine-tuned from')
    add_options(command, '--labels', '--class-order', '--weights-from')
    command.add_argument('--recipe', metavar='TEXT', help='how it was trained')
    command.add_argument('--private', action='store_true', default=None, help='make a new repository private')
    command.add_argument('--revision', metavar='BRANCH', help='branch, created if it does not exist (default: main)')
    command.add_argument('--create-pr', action='store_true', help='open a pull request')
    command.add_argument('--message', help='commit message')
    command.add_argument('--overwrite-card', action='store_true', help='replace a card that somebody wrote')
    command.add_argument('--dry-run', metavar='DIR', help='write the files to a folder and send nothing')


def run(args: argparse.Namespace) -> None:
    model, checkpoint = make_source(args)
    labels = read_label_names(args)
    if checkpoint is not None:
        cfg = {**model.pretrained_cfg, **({'label_names': labels} if labels else {})}
        print('\n'.join([*describe_training(cfg, model.num_classes, checkpoint), '']))
    pushed = push(
        model,
        args.repo,
        tag=args.tag,
        results=dict(args.result) if args.result else None,
        dataset=args.dataset,
        license=(args.license or 'other', args.license_link) if args.license_link else args.license,
        base_model=args.base_model,
        labels=labels,
        recipe=args.recipe,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.message,
        overwrite_card=args.overwrite_card,
        dry_run=args.dry_run,
    )
    for name, digest in pushed.hashes.items():
        print(f'{digest}  {name}')
    print(f'\nwrote {pushed.folder}; nothing was sent' if pushed.folder else f'\n{pushed.url}')


def result(text: str) -> tuple[str, float]:
    name, _, value = text.partition('=')
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is not METRIC=PERCENT, such as accuracy=99.5') from None
