"""Renders model cards from one template: what a model is, what it costs, how to use it, and its license."""

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK as METADATA
from timm.models import PretrainedCfg, get_model_args
from torch import Tensor, nn

from .._errors import UnknownModelError, first_line
from ..models.classifier import Classifier, as_classifier, model_name, registered_cfg
from ..models.variants import ARCHS, WEIGHTS, Weights
from ..weights.config import network_arguments
from .client import require_repo_id
from .facts import REPOSITORY, ModelFacts

_logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name('card.md.jinja')


def card(model: str | nn.Module, *, repo_id: str | None = None, **facts: Any) -> str:
    """Renders the card of published weights, or of a model that is about to be pushed.

    Args:
        model: Name of published weights, such as 'res2net50d.in1k', or a model.
        repo_id: Repository the model is pushed to, 'user/name'.
        **facts: Fields of `ModelFacts`: `tag`, `results`, `dataset`, `license`, `base_model` and `recipe`.

    Returns:
        Markdown that starts with the Hub's metadata.

    Raises:
        ValueError: If no weights of this name are published, or a fact cannot appear on a card.
        TypeError: If facts are given for published weights, or a fact is unknown.

    Example:
        text = timm_res2net.card('res2net50d.in1k')
        text = timm_res2net.card(model, repo_id='you/digits', results={'accuracy': 99.5}, license='mit')
    """
    if isinstance(model, str):
        if given := [key for key, value in {'repo_id': repo_id, **facts}.items() if value is not None]:
            raise TypeError(f'the card of {model!r} has fixed facts, as it is published. Omit {", ".join(given)}')
        return render_published(model)
    known = ModelFacts(**facts)
    if repo_id is not None:
        require_repo_id(repo_id)
    name = model_name(as_classifier(model))
    if name not in ARCHS:
        raise ValueError(f'cannot make a card of {name!r}: it is not a model of this package')
    args = {key: value for key, value in get_model_args(model).items() if key != 'global_pool'}
    overlay = dict(input_size=as_classifier(model).pretrained_cfg['input_size'])
    meta_model = timm.create_model(name, device='meta', pretrained_cfg_overlay=overlay, **args)
    return render(meta_model, known, repo_id or name, repo_id)


def render_published(name: str) -> str:
    if name not in WEIGHTS:
        tags = [key for key in WEIGHTS if key.split('.')[0] == name.split('.')[0]]
        hint = f'Choose from {", ".join(tags)}' if tags else '`timm-res2net list --pretrained` shows all names'
        raise UnknownModelError(f'no published weights {name!r}. {hint}')
    weights, cfg = WEIGHTS[name], registered_cfg(name)
    results, dataset = {'top-1 accuracy': weights.top1}, "scikit-learn's handwritten digits"
    if weights.top5 is not None:
        results, dataset = {**results, 'top-5 accuracy': weights.top5}, 'imagenet-1k'
    facts = ModelFacts(results=results, dataset=dataset, license=cfg.license)
    return render(timm.create_model(name, device='meta'), facts, name, weights=weights, cfg=cfg)


def render(
    model: nn.Module,
    facts: ModelFacts,
    title: str,
    repo_id: str | None = None,
    weights: Weights | None = None,
    cfg: PretrainedCfg | None = None,
) -> str:
    """Fills in the template for a model on the meta device. Published weights also pass `weights` and `cfg`."""
    import jinja2

    network = as_classifier(model.to('meta').eval())  # activations with weights ignore device='meta'
    arch = ARCHS[model_name(network)]
    size = network.pretrained_cfg['input_size'][-1]
    out_indices = arch.out_indices
    neck = out_indices[-4:] if len(out_indices) > 4 else out_indices[1:]  # the levels of a feature pyramid
    shapes, gmacs, activations = measure(network, size)

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    body = environment.from_string(TEMPLATE.read_text(encoding='utf-8')).render(
        facts=facts,
        arch=arch,
        args={**arch.args, **network_arguments(get_model_args(network))},
        escape=escape,
        model=network,
        params=sum(parameter.numel() for parameter in network.parameters()),
        gmacs=gmacs,
        activations=activations,
        shapes=[shapes[index] for index in out_indices],
        neck=neck,
        neck_shapes=[(1, 256, *shapes[index][2:]) for index in neck],
        title=title,
        source=f'hf-hub:{repo_id}' if repo_id else title,
        size=size,
        repo_id=repo_id,
        weights=weights,
        cfg=cfg,
    )
    text = f'---\n{make_metadata(facts, title).to_yaml()}\n---\n\n{body}'
    return f'{text}\n{sign(text)}\n'


def measure(model: Classifier, size: int) -> tuple[list[tuple[int, ...]], float, float]:
    """Returns the shapes of a model's features of an image, its multiply-adds (in 10^9) and activations (in 10^6)."""
    macs = activations = 0

    def count(layer: nn.Module, inputs: object, output: Tensor) -> None:
        nonlocal macs, activations
        macs += output.numel() * layer.get_parameter('weight')[0].numel()  # multiply-adds per output value
        activations += output.numel()

    layers = [module for module in model.modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    x, features = model.forward_intermediates(torch.empty(1, model.in_chans, size, size, device='meta'))
    model.forward_head(x)
    for hook in hooks:
        hook.remove()
    return [tuple(feature.shape) for feature in features], macs / 1e9, activations / 1e6


def escape(text: str) -> str:
    """Joins the lines of a plain text and escapes Markdown in it, except for underscores within words."""
    escaped = re.sub(r'([\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])|!(?=\[))', r'\\\1', ' '.join(text.split()))
    escaped = re.sub(r'^([#+=-])', r'\\\1', escaped)  # would start a heading or a list
    return re.sub(r'^(\d+)(?=[.)])', r'\1\\', escaped)  # would start a numbered list


def make_metadata(facts: ModelFacts, title: str) -> ModelCardData:
    dataset, license, results = facts.dataset, facts.license, facts.results or {}
    hub_dataset = dataset if dataset and REPOSITORY.fullmatch(dataset) else None
    dataset_name = 'ImageNet-1k' if dataset == 'imagenet-1k' else dataset or 'custom'
    evaluated = [
        EvalResult('image-classification', hub_dataset or 'custom', dataset_name, 'accuracy', value, metric_name=metric)
        for metric, value in results.items()
    ]
    return ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        license='other' if isinstance(license, tuple) else license,
        license_name=re.sub(r'[^a-z0-9.]+', '-', license[0].lower()) if isinstance(license, tuple) else None,
        license_link=license[1] if isinstance(license, tuple) else None,
        datasets=[hub_dataset] if hub_dataset else None,
        metrics=['accuracy'] if results else None,
        base_model=facts.base_model,
        tags=['image-classification', 'timm', 'res2net'],
        model_name=title if results else None,
        eval_results=evaluated or None,
    )


def sign(text: str) -> str:
    """Returns the last line of a generated card: a checksum that lets `is_generated` detect edits."""
    return f'<!-- made by timm_res2net: {hashlib.sha256(text.strip().encode()).hexdigest()[:16]} -->'


def is_generated(text: str) -> bool:
    """Returns whether this package generated a card and nobody has edited it since."""
    above, _, last = text.strip().rpartition('\n')
    return last == sign(above)


def merge_cards(written: bytes, generated: str) -> str:
    """Adds new metadata to a card that somebody wrote; ValueError if it is not UTF-8 or its metadata is invalid."""
    import yaml

    new: dict[str, Any] = yaml.safe_load(generated.split('---\n')[1])
    try:
        text = written.decode('utf-8-sig').replace('\r\n', '\n')
        if not text.strip() or is_generated(text):
            return generated
        block = METADATA.match(text)
        old = yaml.safe_load(block[2]) or {} if block else {}
        if old.get('model-index') and 'model-index' not in new:
            _logger.warning('kept the results in the existing card: are they those of the new weights?')
        tags = old.get('tags') or []
        tags = [tags] if isinstance(tags, str) else tags
        merged = {**old, **new, 'tags': [*dict.fromkeys([*tags, *new['tags']])]}
        metadata = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True, width=10_000)
    except (yaml.YAMLError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f'cannot keep the existing README.md: {first_line(error)}. Correct it, or pass overwrite_card=True'
        ) from error
    return f'---\n{metadata}---\n{text[block.end() :] if block else text}'
