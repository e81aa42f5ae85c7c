"""The models run in onnxruntime as they do in torch."""

import logging
from pathlib import Path

import pytest
import torch

from integration.conftest import make

onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_onnx_export_in_onnxruntime_equals_torch(kind: str, tmp_path: Path) -> None:
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    model = make(kind, num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.onnx.export(model, (x,), tmp_path / 'model.onnx', dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-3, atol=1e-4)
