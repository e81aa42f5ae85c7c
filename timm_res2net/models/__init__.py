"""The networks: the Res2Net block, the trunks that host it, and the table of variants."""

import re

import timm

OLDEST_TIMM = (
    '1.0.31'  # as in pyproject.toml; a checkout of an older one can be in the way of the one that is installed
)


def require_timm() -> None:
    """Raises an ImportError if timm is older than the oldest that these networks can be built on."""
    found, oldest = ([int(part) for part in re.findall(r'\d+', text)[:3]] for text in (timm.__version__, OLDEST_TIMM))
    if found < oldest:
        raise ImportError(f'timm_res2net needs timm >= {OLDEST_TIMM}, found {timm.__version__} at {timm.__file__}')


require_timm()
