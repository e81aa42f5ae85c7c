"""Model cards: what a set of weights is, costs and does, how to use it, its licence. One template for all."""

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any

import jinja2
import timm
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_model_args
from torch import Tensor, nn

from ..models.classifier import Classifier, as_classifier, registered_cfg
from ..models.variants import ARCHS, WEIGHTS
from .client import require_repo_id

__all__ = ['METADATA', 'CardFacts', 'card', 'is_unchanged', 'measure', 'problems_of']

_logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name('card.md.jinja')
# fmt: off
KEYS = {  # of a card's metadata; https://github.com/huggingface/hub-docs/blob/main/modelcard.md
    'base_model', 'base_model_relation', 'datasets', 'inference', 'language', 'library_name', 'license',
    'license_link', 'license_name', 'metrics', 'model-index', 'model_name', 'new_version', 'pipeline_tag', 'tags',
    'thumbnail', 'widget',
}
# fmt: on
METADATA = re.compile(r'\s*---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(?:\r?\n|$)', re.DOTALL)  # a card begins with it
REPOSITORY = re.compile(r'([\w.-]+/)?[\w.-]+', re.ASCII)
LICENSE = re.compile(r'[a-z0-9][a-z0-9.+-]*')  # as the Hub writes them
ADDRESS = re.compile(r"""https?://[^\s<>()\[\]"'`\\]+""")
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


@dataclass(frozen=True)
class CardFacts:
    """What the author of a model says of it; see `card`."""

    tag: str | None = None
    results: Mapping[str, float] | None = None
    dataset: str | None = None
    license: str | tuple[str, str] | None = None
    base_model: str | None = None
    recipe: str | None = None

    def checked(self) -> 'CardFacts':
        """The same, in the Hub's spelling.

        Raises:
            ValueError: For what can't be on a card.
        """
        for name in ('tag', 'dataset', 'base_model', 'recipe'):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise ValueError(f'{name} is {value!r}; give a text, or leave it out')
        if self.tag is not None and not re.fullmatch(r'[\w.-]+', self.tag):
            raise ValueError(f'tag is {self.tag!r}; give letters, digits, _, - and . only')
        if self.base_model is not None and not REPOSITORY.fullmatch(self.base_model):
            raise ValueError(f'base_model is {self.base_model!r}; give the name of a repository, USER/NAME')
        for metric, value in (self.results or {}).items():
            if not (isinstance(metric, str) and metric.strip()):
                raise ValueError(f'results has a metric {metric!r}; name what was measured')
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 100:
                raise ValueError(f'results says {metric} {value!r}; give percent, from 0 to 100')
        license = self.license
        if isinstance(license, str):
            license = license.strip().lower()
            if not LICENSE.fullmatch(license):
                raise ValueError(
                    f'license is {self.license!r}; give one that the Hub knows, such as apache-2.0, or name and address'
                )
        elif license is not None:
            name, address = license
            if not str(name).strip() or not ADDRESS.fullmatch(str(address)):
                raise ValueError(f'license is {name!r} at {address!r}; give a name, and an address with https://')
            license = str(name).strip(), str(address)
        results = self.results and {metric: float(value) for metric, value in self.results.items()}
        return replace(self, license=license, results=results)

    def completed(self, record: Mapping[str, Any]) -> 'CardFacts':
        """The same, and what is missing as it was recorded with the weights, if that can be on a card."""
        license = record.get('license')
        recorded = {**record, 'license': tuple(license) if isinstance(license, list) else license}
        missing = {each.name: recorded.get(each.name) for each in fields(self) if getattr(self, each.name) is None}
        try:
            return replace(self, **missing).checked()
        except (ValueError, TypeError, AttributeError) as error:
            _logger.warning('what was recorded with the weights is left out: %s', error)
            return self


@dataclass(frozen=True)
class CardText:
    """The texts and facts of a card."""

    title: str
    source: str  # the name that create_model takes
    summary: str
    size: int  # of the image, in pixels
    results: Mapping[str, float]
    measured: str  # how
    dataset: str | None
    license: str | tuple[str, str] | None
    base_model: str | None
    recipe: str
    provenance: str
    licence: str
    limits: str


def measure(model: Classifier, size: int) -> tuple[float, float]:
    """Counts multiply-adds (10^9) and outputs of convolutions and classifier (10^6) for one image.

    Args:
        model: A model on the meta device, in evaluation mode.
        size: Height and width of the image, in pixels.
    """
    macs = activations = 0

    def count(layer: nn.Module, inputs: object, output: Tensor) -> None:
        nonlocal macs, activations
        macs += output.numel() * layer.get_parameter('weight')[0].numel()  # multiply-adds of each output
        activations += output.numel()

    layers = [module for module in model.modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    model(torch.empty(1, model.in_chans, size, size, device='meta'))
    for hook in hooks:
        hook.remove()
    return macs / 1e9, activations / 1e6


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
        results: Measured accuracy in percent, such as `{'accuracy': 99.5}`.
        dataset: A dataset of the Hub, or a description of another.
        license: A licence of the Hub, or name and URL of another.
        base_model: The model that it was fine-tuned from, 'user/name'.
        recipe: How it was trained.

    Returns:
        Markdown with metadata, as the Hub wants it.

    Raises:
        ValueError: For a name without weights, or an argument that would make a bad card.
    """
    if isinstance(model, str):
        facts = dict(repo_id=repo_id, tag=tag, results=results, dataset=dataset, license=license)
        facts.update(base_model=base_model, recipe=recipe)
        if given := [key for key, value in facts.items() if value is not None]:
            raise TypeError(f'the card of published weights takes no {" and no ".join(given)}')
        return published_card(model)
    license = CardFacts(tag, results, dataset, license, base_model, recipe).checked().license
    if repo_id is not None:
        require_repo_id(repo_id)
    network = as_classifier(model)
    cfg = network.pretrained_cfg
    name = cfg['architecture']
    if name not in ARCHS:
        raise ValueError(f'{name} is no model of this package, so there is no card of it')
    args = {key: value for key, value in get_model_args(model).items() if key != 'global_pool'}
    trained = f' trained on {plain(dataset)}' if dataset else ''
    origin = f', fine-tuned from [{base_model}](https://huggingface.co/{base_model})' if base_model else ''
    if license is None:
        licence = 'The owner of the repository named no licence: ask before you use it.'
    elif isinstance(license, str):
        licence = f'Licence: `{license}`, named by the owner of the repository.'
    else:
        licence = f'Licence: [{plain(license[0])}]({license[1]}), named by the owner of the repository.'
    text = CardText(
        title=repo_id or name,
        source=f'hf-hub:{repo_id}' if repo_id else name,
        summary=f'{describe_architecture(name)}{trained}{origin}.',
        size=cfg['input_size'][-1],
        results=results or {},
        measured='as measured by the owner of the repository' if results else '',
        dataset=dataset,
        license=license,
        base_model=base_model,
        recipe=plain(recipe or 'Not described').rstrip('.') + '.',
        provenance=f'Pushed by timm_res2net{f" as `{name}.{tag}`" if tag else ""}.',
        licence=licence,
        limits='The model knows only the classes and the kind of images that it was trained on.',
    )
    return render(as_classifier(timm.create_model(name, device='meta', **args)), text)


def published_card(name: str) -> str:
    """The card of published weights."""
    if name not in WEIGHTS:
        tags = [key for key in WEIGHTS if key.split('.')[0] == name.split('.')[0]]
        hint = f'there are {", ".join(tags)}' if tags else '`timm-res2net list --pretrained` shows all'
        raise ValueError(f'there are no published weights {name}; {hint}')
    weights, cfg = WEIGHTS[name], registered_cfg(name)
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
    text = CardText(
        title=name,
        source=name,
        summary=f'{describe_architecture(name.split(".")[0])} {cfg.description}.',
        size=cfg.input_size[-1],
        results=results,
        measured=f'at {cfg.input_size[-1]} pixels, {weights.measured}',
        dataset='imagenet-1k' if imagenet else "scikit-learn's handwritten digits",
        license=cfg.license,
        base_model=None,
        recipe=weights.recipe + '.',
        provenance=f'The weights {describe_origin(name)}; see also <{cfg.origin_url}>.',
        licence=licence,
        limits=limits + ''.join(f' {note}.' for note in cfg.notes or ()),
    )
    return render(as_classifier(timm.create_model(name, device='meta')), text)


def describe_origin(name: str) -> str:
    """Says where published weights are, after 'The weights'."""
    cfg = registered_cfg(name)
    if cfg.file:
        return 'are a part of the package'
    return f'come from <{cfg.url or f"https://huggingface.co/{cfg.hf_hub_id}"}>'


def describe_architecture(name: str) -> str:
    """Says what an architecture is, and ends in 'It was'."""
    arch = ARCHS[name]
    scale, cardinality = arch.args['scale'], arch.args.get('cardinality', 1)
    kind = 'A bottleneck' if scale == 1 else f'Res2Net blocks of {scale} splits'
    grouped = f' with {cardinality} groups' if cardinality > 1 else ''
    attention = ' and squeeze-and-excitation' if arch.args.get('attn_layer') == 'se' else ''
    trunk = PAPERS.get(arch.trunk.__name__, 'in a ResNet trunk')
    function = COMPUTED_BY[arch.args.get('first_block', 'official')]
    return (
        f'`{name}`: {kind}{grouped}{attention} ([paper](https://arxiv.org/abs/1904.01169)) {trunk}. The first blocks '
        f'of its stages compute what {function}. It was'
    )


def render(model: Classifier, text: CardText) -> str:
    """Fills in the template; sizes and shapes are measured.

    Args:
        model: The model on the meta device.
        text: The rest.
    """
    body = render_body(model.eval(), text)
    whole = f'---\n{metadata(text).to_yaml()}\n---\n\n{body}'
    return f'{whole}\n{signature(whole)}\n'


def render_body(model: Classifier, text: CardText) -> str:
    """The card without its metadata."""
    out_indices = ARCHS[model.pretrained_cfg['architecture']].out_indices
    x = torch.empty(1, model.in_chans, text.size, text.size, device='meta')
    features = model.forward_intermediates(x, intermediates_only=True)
    neck = out_indices[-4:] if len(out_indices) > 4 else out_indices[1:]  # the levels of a feature pyramid
    gmacs, activations = measure(model, text.size)

    def create_model(arguments: str = '') -> str:
        return f"timm.create_model('{text.source}', pretrained=True{', ' if arguments else ''}{arguments})"

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE.read_text()).render(
        text=text,
        plain=plain,
        create=create_model,
        model=model,
        params=sum(parameter.numel() for parameter in model.parameters()),
        gmacs=gmacs,
        activations=activations,
        shapes=[tuple(features[index].shape) for index in out_indices],
        neck=neck,
        neck_shapes=[(1, 256, *features[index].shape[2:]) for index in neck],
    )


def plain(text: str) -> str:
    """Escapes a text for Markdown, in one line, so that a reader sees the same characters and nothing else.

    Underscores within words and single characters that mean nothing stay as they are.
    """
    escaped = re.sub(r'([\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])|!(?=\[))', r'\\\1', ' '.join(text.split()))
    escaped = re.sub(r'^([#+=-])', r'\\\1', escaped)  # what makes a heading or a list of a paragraph
    return re.sub(r'^(\d+)(?=[.)])', r'\1\\', escaped)


def metadata(text: CardText) -> ModelCardData:
    """The card's metadata, as the Hub wants it."""
    dataset, license = text.dataset, text.license
    hub_dataset = dataset if dataset and REPOSITORY.fullmatch(dataset) else None
    dataset_name = 'ImageNet-1k' if dataset == 'imagenet-1k' else dataset or 'custom'
    evaluated = [
        EvalResult('image-classification', hub_dataset or 'custom', dataset_name, 'accuracy', value, metric_name=metric)
        for metric, value in text.results.items()
    ]
    return ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        license='other' if isinstance(license, tuple) else license,
        license_name=re.sub(r'[^a-z0-9.]+', '-', license[0].lower()) if isinstance(license, tuple) else None,
        license_link=license[1] if isinstance(license, tuple) else None,
        datasets=[hub_dataset] if hub_dataset else None,
        metrics=['accuracy'] if text.results else None,
        base_model=text.base_model,
        tags=['image-classification', 'timm', 'res2net'],
        model_name=text.title if text.results else None,
        eval_results=evaluated or None,
    )


def signature(text: str) -> str:
    """The last line of a generated card: a checksum by which `is_unchanged` finds edits."""
    return f'<!-- made by timm_res2net: {hashlib.sha256(text.strip().encode()).hexdigest()[:16]} -->'


def is_unchanged(text: str) -> bool:
    """Whether nobody has edited a card since this package generated it."""
    above, _, last = text.strip().rpartition('\n')
    return last == signature(above)


def problems_of(text: str) -> list[str]:
    """Checks a card without the Hub. Which licences exist only the Hub knows, see `client.problems_on_hub`.

    Returns:
        A line for each problem; nothing for a good card.
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
    if meta.get('license') == 'other' and not (meta.get('license_name') and meta.get('license_link')):
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
