"""Facts about a model that only its owner knows."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from .._errors import first_line

_logger = logging.getLogger(__name__)

REPOSITORY = re.compile(r'([\w.-]+/)?[\w.-]+', re.ASCII)
LICENSE = re.compile(r'[a-z0-9][a-z0-9.+-]*')  # the Hub's license IDs
URL = re.compile(r"""https?://[^\s<>()\[\]"'`\\]+""")


@dataclass(frozen=True)
class ModelFacts:
    """Facts that `push` writes to the model card and to `config.json`. All are optional.

    Args:
        tag: Name of this set of weights, such as 'in1k'.
        results: Measured accuracy in percent, such as `{'accuracy': 99.5}`.
        dataset: Training and evaluation data: a dataset on the Hub ('imagenet-1k') or a description.
        license: License ID from the Hub ('apache-2.0', case-insensitive), or name and URL of another license.
        base_model: Repository of the model that this one was fine-tuned from, 'user/name'.
        recipe: How the model was trained.

    Raises:
        ValueError: If a value cannot appear on a card.

    Example:
        facts = ModelFacts(results={'accuracy': 99.5}, license='Apache-2.0')
        facts.license  # 'apache-2.0'
    """

    tag: str | None = None
    results: Mapping[str, float] | None = None
    dataset: str | None = None
    license: str | tuple[str, str] | None = None
    base_model: str | None = None
    recipe: str | None = None

    def __post_init__(self) -> None:
        for name in ('tag', 'dataset', 'base_model', 'recipe'):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise ValueError(f'invalid {name} {value!r}: pass a non-empty str or None')
        if self.tag is not None and not re.fullmatch(r'[\w.-]+', self.tag):
            raise ValueError(f'invalid tag {self.tag!r}: use only letters, digits, _, - and .')
        if self.base_model is not None and not REPOSITORY.fullmatch(self.base_model):
            raise ValueError(f'invalid base_model {self.base_model!r}: pass the name of a repository, USER/NAME')
        if self.results is not None:
            object.__setattr__(self, 'results', normalize_results(self.results))
        if self.license is not None:
            object.__setattr__(self, 'license', normalize_license(self.license))

    def as_dict(self) -> dict[str, Any]:
        """Returns the facts that are known."""
        return {key: value for key, value in vars(self).items() if value is not None}

    def completed_by(self, record: Mapping[str, Any]) -> 'ModelFacts':
        """Adds missing facts from the record in a `config.json`; if one of those is invalid, logs it and adds none."""
        recorded = {key: record.get(key) for key in vars(self)}
        try:
            return ModelFacts(**{**recorded, **self.as_dict()})
        except (ValueError, TypeError, AttributeError) as error:
            _logger.warning('ignored the facts recorded with the weights: %s', first_line(error))
            return self


def normalize_results(results: Mapping[str, float]) -> dict[str, float]:
    """Returns results as floats; ValueError unless they are percentages."""
    for metric, value in results.items():
        if not (isinstance(metric, str) and metric.strip()):
            raise ValueError(f'invalid metric {metric!r} in results: pass the name of the metric')
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 100:
            raise ValueError(f'invalid results: {metric} is {value!r}. Pass a percentage from 0 to 100')
    return {metric: float(value) for metric, value in results.items()}


def normalize_license(license: str | tuple[str, str]) -> str | tuple[str, str]:
    """Returns a license ID in the Hub's spelling, or name and URL of another license; ValueError if it is neither."""
    if isinstance(license, str):
        if LICENSE.fullmatch(license.strip().lower()):
            return license.strip().lower()
        raise ValueError(f"invalid license {license!r}: pass a license ID such as 'apache-2.0', or a name and a URL")
    name, url = license
    if not str(name).strip() or not URL.fullmatch(str(url)):
        raise ValueError(f'invalid license {license!r}: pass a name, and a URL that starts with https://')
    return str(name).strip(), str(url)
