"""Image settings from untrusted files are valid, or refused with an error that names the key."""

import math
from typing import Any

import pytest
from timm.data import create_transform

from timm_res2net._images import CROP_MODES, INTERPOLATIONS, check_image_settings

SETTINGS: dict[str, Any] = dict(
    input_size=[3, 224, 224],
    interpolation='bicubic',
    mean=[0.5, 0, 0.4],
    std=[1, 0.2, 0.3],
    crop_pct=1,
    crop_mode='center',
)


def test_check_image_settings_returns_known_settings_with_tuples() -> None:
    assert check_image_settings({}) == {}
    assert check_image_settings({'crop_pct': None, 'classifier': 'fc', 'mean': [0.5]}) == {'mean': (0.5,)}
    assert check_image_settings(SETTINGS) == {
        key: tuple(value) if isinstance(value, list) else value for key, value in SETTINGS.items()
    }


def test_check_image_settings_accepts_every_mode_of_timms_transforms() -> None:
    for interpolation in INTERPOLATIONS:
        create_transform(**check_image_settings({**SETTINGS, 'interpolation': interpolation}))
    for crop_mode in CROP_MODES:
        create_transform(**check_image_settings({**SETTINGS, 'crop_mode': crop_mode}))


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        *(('input_size', value) for value in ([3, 30_000, 30_000], [0, 8, 8], [3, 8], [3, 8.0, 8], 'abc', 8)),
        *(('mean', value) for value in ([math.nan] * 3, [math.inf], [10**400], [-0.1], [], ['0.5'], 0.5, [0.5] * 5000)),
        *(('std', value) for value in ([0.0] * 3, [math.nan], list[int](), [1, -1], dict[str, int]())),
        *(('crop_pct', value) for value in (1e-9, 2.5, math.nan, math.inf, '1', [1.0])),
        *(('interpolation', value) for value in ('cubic', 3, ['bicubic'], '')),
        *(('crop_mode', value) for value in ('middle', int, ['center'])),
    ],
)
def test_check_image_settings_refuses_an_invalid_value_and_names_its_key(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f'^{key} must be .*, got ') as caught:
        check_image_settings({**SETTINGS, key: value})
    assert len(str(caught.value)) < 200
