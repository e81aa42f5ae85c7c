"""The networks: the Res2Net block, the trunks that host it, and the table of variants."""

import re

import timm

OLDEST_TIMM = '1.0.31'  # as in pyproject.toml


def require_timm() -> None:
    """Raises ImportError for an older timm, such as a checkout on the path that hides the installed one."""
    found, oldest = ([int(part) for part in re.findall(r'\d+', text)[:3]] for text in (timm.__version__, OLDEST_TIMM))
    if found < oldest:
        raise ImportError(f'timm_res2net needs timm >= {OLDEST_TIMM}, found {timm.__version__} at {timm.__file__}')


require_timm()
