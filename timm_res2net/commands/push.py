"""`timm-res2net push`: uploads a model to the Hub."""

import argparse

from ..hub.push import push
from ..weights.recorded import read_labels
from .options import Commands, add_labels, add_timeout
from .output import describe_training, print
from .sources import make_source

__all__ = ['add_push']


def add_push(commands: Commands) -> None:
    """Adds the arguments of `push`."""
    command = commands.add_parser(
        'push',
        help='upload a model to the Hub',
        description='Uploads a model to the Hugging Face Hub: safetensors, configuration and card, all verified.',
    )
    command.add_argument('source', metavar='SOURCE', help='a file of weights, a folder that convert made, or a name')
    command.add_argument('repo', metavar='USER/NAME', help='where to put it')
    command.add_argument('--model', metavar='NAME', help='the model that the file fits (default: found out)')
    command.add_argument('--tag', help='name of this set of weights')
    command.add_argument('--result', type=result, action='append', metavar='WHAT=PERCENT', help='such as accuracy=99.5')
    command.add_argument('--dataset', help='what it was trained and measured on, such as imagenet-1k')
    command.add_argument('--license', metavar='ID', help='such as apache-2.0')
    command.add_argument('--license-link', metavar='URL', help='of a licence that the Hub does not know')
    command.add_argument('--base-model', metavar='USER/NAME', help='what it was fine-tuned from')
    add_labels(command)
    command.add_argument('--recipe', metavar='TEXT', help='how it was trained')
    command.add_argument('--private', action='store_true', default=None, help='make the repository private')
    command.add_argument('--revision', metavar='BRANCH', help='made if it does not exist (default: main)')
    command.add_argument('--create-pr', action='store_true', help='propose it by a pull request')
    command.add_argument('--message', help='of the commit')
    command.add_argument('--overwrite-card', action='store_true', help='also a card that somebody wrote')
    command.add_argument('--dry-run', metavar='DIR', help='write a folder instead, and show what would be sent')
    add_timeout(command)
    command.set_defaults(run=run_push)


def run_push(args: argparse.Namespace) -> int:
    """Uploads a model, or writes what would be uploaded."""
    model, converted = make_source(args)
    labels = read_labels(args.labels) if args.labels is not None else None
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
        timeout=args.timeout,
    )
    for name, digest in pushed.hashes.items():
        print(f'{digest}  {name}')
    print(f'\nwrote {pushed.folder}; nothing was sent' if pushed.folder else f'\n{pushed.url}')
    if converted is not None:
        cfg = {**model.pretrained_cfg, **({'label_names': labels} if labels else {})}
        print('\n'.join(describe_training(converted.training, cfg, model.num_classes)))
    return 0


def result(text: str) -> tuple[str, float]:
    """An argument that is a name and a percentage."""
    name, _, value = text.partition('=')
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is no WHAT=PERCENT, such as accuracy=99.5') from None
