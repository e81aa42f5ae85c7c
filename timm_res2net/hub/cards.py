"""Model cards: what a set of weights is, what it costs and does, how to use it, whose it is. One template for all."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_model_args
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..res2net import ARCHS, ASSETS, WEIGHTS

__all__ = ['LICENSES', 'card', 'is_unchanged', 'measure', 'problems_of']

# Identifiers of licences that the Hub knows and models have; https://huggingface.co/docs/hub/repositories-licenses
# fmt: off
LICENSES = {
    'apache-2.0', 'mit', 'openrail', 'bsd-2-clause', 'bsd-3-clause', 'bsd-3-clause-clear', 'cc0-1.0', 'cc-by-2.0',
    'cc-by-3.0', 'cc-by-4.0', 'cc-by-sa-3.0', 'cc-by-sa-4.0', 'cc-by-nc-2.0', 'cc-by-nc-3.0', 'cc-by-nc-4.0',
    'cc-by-nd-4.0', 'cc-by-nc-nd-3.0', 'cc-by-nc-nd-4.0', 'cc-by-nc-sa-2.0', 'cc-by-nc-sa-3.0', 'cc-by-nc-sa-4.0',
    'artistic-2.0', 'bsl-1.0', 'ecl-2.0', 'epl-1.0', 'epl-2.0', 'eupl-1.1', 'eupl-1.2', 'afl-3.0', 'gpl-2.0',
    'gpl-3.0', 'lgpl-2.1', 'lgpl-3.0', 'agpl-3.0', 'isc', 'mpl-2.0', 'ms-pl', 'ncsa', 'osl-3.0', 'postgresql',
    'unlicense', 'wtfpl', 'zlib', 'unknown', 'other',
}
KEYS = {  # of a card's metadata; https://github.com/huggingface/hub-docs/blob/main/modelcard.md
    'base_model', 'base_model_relation', 'datasets', 'inference', 'language', 'library_name', 'license',
    'license_link', 'license_name', 'metrics', 'model-index', 'model_name', 'new_version', 'pipeline_tag', 'tags',
    'thumbnail', 'widget',
}
# fmt: on
REPOSITORY = re.compile(r'([\w.-]+/)?[\w.-]+')
PAPERS = {
    'Res2NetDla': 'in a DLA trunk ([paper](https://arxiv.org/abs/1707.06484))',
    'Res2NetBigLittle': 'in a Big-Little trunk ([paper](https://arxiv.org/abs/1807.03848))',
}
COMPUTED_BY = {
    'official': "the authors' code computes",
    'paddle': 'PaddleClas computes',
    'mmdet': 'mmdet computes',
    'group': "the authors' code for CIFAR computes",
}


def measure(model: nn.Module, size: int) -> tuple[float, float]:
    """Counts multiply-adds (10^9) and outputs of convolutions and classifier (10^6) for one image.

    Args:
        model: A model on the meta device, in evaluation mode.
        size: Of the image, in pixels.
    """
    outputs = []
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(lambda layer, x, y: outputs.append(y.numel())) for layer in layers]
    in_chans: Any = model.in_chans
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, in_chans, size, size, device='meta'))
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops() / 2e9, sum(outputs) / 1e6


def card(
    model: str | nn.Module,
    *,
    repo_id: str | None = None,
    tag: str | None = None,
    results: Mapping[str, float] | None = None,
    dataset: str | None = None,
    license: str | tuple[str, str] | None = None,
    base_model: str | None = None,
    recipe: str | None = None,
) -> str:
    """Renders the card of published weights, or of a model that is about to be pushed.

    Args:
        model: Name of published weights, such as 'res2net50d.in1k', or a model.
        repo_id: Where the model goes, 'user/name'.
        tag: Name of the set of weights.
        results: What was measured, such as `{'accuracy': 99.5}`, in percent.
        dataset: A dataset of the Hub, or a description of another.
        license: A licence of the Hub, or name and address of another.
        base_model: The model that it was fine-tuned from, 'user/name'.
        recipe: How it was trained.

    Returns:
        Markdown with metadata, as the Hub wants it.

    Raises:
        ValueError: For a name without weights, or an argument that would make a bad card.
    """
    if isinstance(model, str):
        return published_card(model)
    cfg: Any = model.pretrained_cfg
    name = cfg['architecture']
    args = {key: value for key, value in get_model_args(model).items() if key != 'global_pool'}
    trained = f' on {dataset}' if dataset else ''
    origin = f', fine-tuned from [{base_model}](https://huggingface.co/{base_model})' if base_model else ''
    if license is None:
        licence = 'Whoever pushed this model named no licence: ask before you use it.'
    elif isinstance(license, str):
        licence = f'Licence: `{license}`, named by whoever pushed this model.'
    else:
        licence = f'Licence: [{license[0]}]({license[1]}), named by whoever pushed this model.'
    return render(
        model=timm.create_model(name, device='meta', **args),
        title=repo_id or name,
        create=f'hf-hub:{repo_id}' if repo_id else name,
        summary=f'{kind_of(name)} trained{trained}{origin}.',
        size=cfg['input_size'][-1],
        results=dict(results or {}),
        measured='as whoever pushed this model measured it' if results else '',
        dataset=dataset,
        license=license,
        base_model=base_model,
        recipe=(recipe or 'Nothing was said about it').rstrip('.') + '.',
        provenance=f'Pushed by timm_res2net{f" as `{name}.{tag}`" if tag else ""}.',
        licence=licence,
        limits='The model knows only the classes and the kind of images that it was trained on.',
    )


def published_card(name: str) -> str:
    """The card of published weights."""
    if name not in WEIGHTS:
        tags = [key for key in WEIGHTS if key.split('.')[0] == name.split('.')[0]]
        hint = f'there are {", ".join(tags)}' if tags else '`timm-res2net list --pretrained` shows all'
        raise ValueError(f'there are no published weights {name}; {hint}')
    weights, cfg = WEIGHTS[name], timm.get_pretrained_cfg(name)
    imagenet = weights.top5 is not None
    results = {'top-1 accuracy': weights.top1, **({'top-5 accuracy': weights.top5} if weights.top5 is not None else {})}
    noncommercial = cfg.license == 'cc-by-nc-sa-4.0'
    licence = (
        "The weights are under the [licence of the authors' repository]"
        '(https://creativecommons.org/licenses/by-nc-sa/4.0/), CC BY-NC-SA 4.0: name the authors, share what you make '
        'of them alike, and ask them before any commercial use. timm records the licence as unknown.'
        if noncommercial
        else 'The weights are under [Apache-2.0](https://www.apache.org/licenses/LICENSE-2.0), as the repository that '
        'publishes them is: you may use them commercially, if you keep its notices.'
    )
    limits = (
        'It knows the thousand classes of ImageNet-1k, photographs mostly from the web, with their biases.'
        if imagenet
        else 'It knows grey digits of 8 x 8 pixels, white on black, and is there for trying things out.'
    )
    notes = ''.join(f' {note}.' for note in cfg.notes or ())
    return render(
        model=timm.create_model(name, device='meta'),
        title=name,
        create=name,
        summary=f'{kind_of(name.split(".")[0])} {cfg.description}.',
        size=cfg.input_size[-1],
        results=results,
        measured=f'at {cfg.input_size[-1]} pixels, {weights.measured}',
        dataset='imagenet-1k' if imagenet else "scikit-learn's handwritten digits",
        license=cfg.license,
        base_model=None,
        recipe=weights.recipe + '.',
        provenance=f'The weights {origin_of(name)}; see also <{cfg.origin_url}>.',
        licence=licence,
        limits=limits + notes,
    )


def origin_of(name: str) -> str:
    """Says where published weights are."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg.file:
        return 'are a part of the package'
    return f'come from <{cfg.url or f"https://huggingface.co/{cfg.hf_hub_id}"}>'


def kind_of(name: str) -> str:
    """Says what an architecture is."""
    arch = ARCHS[name]
    scale, cardinality = arch.args['scale'], arch.args.get('cardinality', 1)
    kind = 'A bottleneck' if scale == 1 else f'Res2Net blocks of {scale} splits'
    grouped = f' with {cardinality} groups' if cardinality > 1 else ''
    attention = ' and squeeze-and-excitation' if arch.args.get('attn_layer') == 'se' else ''
    trunk = PAPERS.get(arch.trunk.__name__, 'in a ResNet trunk')
    function = COMPUTED_BY[
        arch.args.get('first_block', 'group' if arch.trunk.__name__ == 'Res2NetCifar' else 'official')
    ]
    return (
        f'`{name}`: {kind}{grouped}{attention} ([paper](https://arxiv.org/abs/1904.01169)) {trunk}. The first blocks '
        f'of its stages compute what {function}. It was'
    )


def render(
    model: Any,
    title: str,
    create: str,
    size: int,
    results: dict[str, float],
    dataset: str | None,
    license: Any,
    **text: Any,
) -> str:
    """Fills the template in; what can be measured is measured on a model on the meta device."""
    import jinja2

    model.eval()
    x = torch.empty(1, model.in_chans, size, size, device='meta')
    name = model.pretrained_cfg['architecture']
    features: list[Tensor] = model.forward_intermediates(x, intermediates_only=True)
    shapes = [tuple(features[index].shape) for index in ARCHS[name].out_indices]
    levels = ARCHS[name].out_indices[-4:] if len(shapes) > 4 else ARCHS[name].out_indices[1:]
    gmacs, activations = measure(model, size)
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(
        (ASSETS / 'card.md.jinja').read_text()
    )

    def call(arguments: str = '') -> str:
        return f"timm.create_model('{create}', pretrained=True{', ' if arguments else ''}{arguments})"

    body = template.render(
        title=title,
        create=call,
        size=size,
        results=results,
        params=sum(parameter.numel() for parameter in model.parameters()),
        gmacs=gmacs,
        activations=activations,
        in_chans=model.in_chans,
        num_classes=model.num_classes,
        num_features=model.num_features,
        shapes=shapes,
        neck=levels,
        neck_shapes=[(1, 256, *features[index].shape[2:]) for index in levels],
        **text,
    )
    of_hub = dataset if dataset and REPOSITORY.fullmatch(dataset) else None
    name_of_data = 'ImageNet-1k' if dataset == 'imagenet-1k' else dataset or 'custom'
    where = of_hub or 'custom', name_of_data
    evaluated = [
        EvalResult('image-classification', *where, 'accuracy', value, metric_name=metric)
        for metric, value in results.items()
    ]
    named = isinstance(license, tuple)
    data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        license='other' if named else license,
        license_name=re.sub(r'[^a-z0-9.]+', '-', license[0].lower()) if named else None,
        license_link=license[1] if named else None,
        datasets=[of_hub] if of_hub else None,
        metrics=['accuracy'] if results else None,
        base_model=text['base_model'],
        tags=['image-classification', 'timm', 'res2net'],
        model_name=title if results else None,
        eval_results=evaluated or None,
    )
    whole = f'---\n{data.to_yaml()}\n---\n\n{body}'
    return f'{whole}\n{signature(whole)}\n'


def signature(text: str) -> str:
    """The last line of a card, by which `is_unchanged` knows it."""
    return f'<!-- made by timm_res2net: {hashlib.sha256(text.strip().encode()).hexdigest()[:16]} -->'


def is_unchanged(text: str) -> bool:
    """Whether a card is as this package made it, so that nobody's words are lost with it."""
    above, _, last = text.strip().rpartition('\n')
    return last == signature(above)


def problems_of(text: str) -> list[str]:
    """Checks a card without a Hub.

    Returns:
        What is wrong with it, a line each; nothing for a good one.
    """
    block = re.match(r'---\r?\n(.*?)\r?\n---\s*\n', text, re.DOTALL)
    if block is None:
        return ['it does not begin with metadata between two lines of ---']
    try:
        meta = yaml.safe_load(block[1])
        loaded = ModelCard(text)
    except (yaml.YAMLError, ValueError) as error:
        return [f'its metadata can not be read: {" ".join(str(error).split())}']
    if not isinstance(meta, dict):
        return ['its metadata is no mapping']
    found = [f'the key {key!r} means nothing to the Hub' for key in meta if key not in KEYS]
    if ModelCard(str(loaded)).data.to_dict() != loaded.data.to_dict():
        found.append('its metadata does not survive being loaded and saved')
    license = meta.get('license')
    if license is not None and license not in LICENSES:
        found.append(f'{license!r} is no licence that the Hub knows; say other, with license_name and license_link')
    if license == 'other' and not (meta.get('license_name') and meta.get('license_link')):
        found.append('licence other needs license_name and license_link')
    for key in ('datasets', 'base_model'):
        for value in [meta[key]] if isinstance(meta.get(key), str) else meta.get(key) or []:
            if not REPOSITORY.fullmatch(str(value)):
                found.append(f'{value!r} in {key} is no name of a repository')
    for entry in meta.get('model-index') or []:
        for result in entry.get('results') or [{}]:
            missing = [key for key in ('task', 'dataset', 'metrics') if key not in result]
            found += [f'a result in model-index has no {key}' for key in missing]
    if meta.get('library_name') == 'timm' and 'import timm, timm_res2net' not in text:
        found.append('no example imports timm_res2net, without which timm does not know the model')
    return found
