"""OpenVINO computes what fused models compute in torch."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from support import assert_same, tiny

from integration.conftest import KINDS, digits, make
from timm_res2net import optimize

openvino = pytest.importorskip('openvino')
pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.mark.parametrize(
    ('name', 'arguments'),
    [*((name, {}) for name in KINDS), ('res2net50_26w_4s', dict(features_only=True, feature_cls='dict'))],
    ids=str,
)
def test_optimize_openvino_equals_torch_and_refuses_other_image_sizes(name: str, arguments: dict[str, Any]) -> None:
    model = make(name, **arguments).eval()
    images = torch.randn(2, 3, 64, 64)
    optimized = optimize(model, images, backend='openvino')
    assert optimized.path == 'fused, float32, OpenVINO'
    for x in (images, images[:1], images.repeat(2, 1, 1, 1), images.to(memory_format=torch.channels_last)):
        assert_same(optimized, model, x, 1e-4)
    if arguments:
        assert list(optimized(images)) == list(model(images))
    with pytest.raises(ValueError, match=r'images must be \(N, 3, 64, 64\)'):
        optimized(torch.randn(1, 3, 32, 64))


def test_optimize_openvino_bfloat16_returns_dtype_of_input() -> None:
    model, images = tiny(), torch.randn(2, 3, 64, 64)
    optimized = optimize(model, images, dtype=torch.bfloat16, backend='openvino')
    assert optimized(images.bfloat16()).dtype == torch.bfloat16
    assert_same(optimized, model, images, 0.05)


def test_optimize_openvino_int8_is_quantized_and_close() -> None:
    pytest.importorskip('nncf')
    model = timm.create_model('test_res2net.digits', pretrained=True).eval()
    images = digits('train', 16)
    optimized = optimize(model, images, dtype=torch.int8)
    assert optimized.path == 'fused, int8, OpenVINO'
    assert_same(optimized, model, images[:8], 0.2)
    with pytest.raises(AssertionError):
        assert_same(optimized, model, images[:8], 1e-4)


def test_openvino_model_is_compiled_for_the_first_shape_and_once_for_all_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_model, shapes = openvino.Core.compile_model, []

    def recorded(core: Any, model: Any, *args: Any) -> Any:
        shapes.append(str(model.inputs[0].get_partial_shape()))
        return compile_model(core, model, *args)

    monkeypatch.setattr(openvino.Core, 'compile_model', recorded)
    optimized = optimize(tiny(), torch.randn(2, 3, 32, 32), backend='openvino')
    assert shapes == ['[2,3,32,32]']
    for batch in (2, 1, 5, 2, 3):
        assert len(optimized(torch.randn(batch, 3, 32, 32))) == batch
    assert shapes == ['[2,3,32,32]', '[?,3,32,32]']


def test_openvino_model_called_from_two_threads_keeps_their_images_apart() -> None:
    optimized = optimize(tiny(), torch.randn(1, 3, 64, 64), backend='openvino')
    images = torch.randn(200, 3, 64, 64).split(1)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(optimized, images))
    torch.testing.assert_close(found, [optimized(image) for image in images])


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
