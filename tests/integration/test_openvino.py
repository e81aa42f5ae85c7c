"""OpenVINO computes what fused models compute in torch."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from support import assert_same

from integration.conftest import make
from timm_res2net import optimize

pytest.importorskip('openvino')
pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.mark.parametrize('features', [{}, dict(features_only=True, feature_cls='dict')], ids=str)
def test_optimize_openvino_equals_torch_and_refuses_other_image_sizes(kind: str, features: dict[str, Any]) -> None:
    model = make(kind, **features).eval()
    images = torch.randn(2, 3, 64, 64)
    optimized = optimize(model, images, backend='openvino')
    assert optimized.path == 'fused, float32, OpenVINO'
    for x in (images, images[:1], images.repeat(2, 1, 1, 1), images.to(memory_format=torch.channels_last)):
        assert_same(optimized, model, x, 1e-4)
    if features:
        assert list(optimized(images)) == list(model(images))
    with pytest.raises(ValueError, match=r'images must be \(N, 3, 64, 64\)'):
        optimized(torch.randn(1, 3, 32, 64))


def test_optimize_openvino_bfloat16_returns_dtype_of_input() -> None:
    model, images = make('res2net50_26w_4s').eval(), torch.randn(2, 3, 64, 64)
    optimized = optimize(model, images, dtype=torch.bfloat16, backend='openvino')
    assert optimized(images.bfloat16()).dtype == torch.bfloat16
    assert_same(optimized, model, images, 0.05)


def test_openvino_models_freed_in_any_order_leave_a_process_that_survives_signals() -> None:
    program = """
import os, signal
import timm, torch
from timm_res2net import optimize
x = torch.randn(1, 3, 32, 32)
models = [optimize(timm.create_model('test_res2net').eval(), x, backend='openvino') for _ in range(2)]
del models[0]
del models[0]
signal.signal(signal.SIGUSR1, lambda number, frame: print('survived'))
os.kill(os.getpid(), signal.SIGUSR1)
"""
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, 'survived\n'), done.stderr
