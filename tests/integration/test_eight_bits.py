"""Measures a row of the table of 8-bit accuracy again."""

import json

import pytest
from eight_bits import cost

from timm_res2net.models.variants import ASSETS

pytest.importorskip('nncf')


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_cost_of_8_bits_is_that_of_the_table() -> None:
    rows = {row['model']: row for row in json.loads((ASSETS / 'int8.json').read_text())['results']}
    name = 'res2next29_6c_24w_4s'
    found = cost(name)
    for runtime in ('openvino', 'onnx'):
        assert found[runtime] == pytest.approx(rows[name][runtime], rel=0.25)  # kernels of other processors round else
