"""timmx, which reparameterizes models in training mode before it exports them, takes these models."""

import sys
from pathlib import Path

import pytest
import torch

import timm_res2net  # noqa: F401

app = pytest.importorskip('timmx.cli').app


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning', 'ignore::UserWarning')
@pytest.mark.parametrize(
    ('backend', 'file'), [('torchscript', 'net.pt'), ('torch-export', 'net.pt2'), ('openvino', 'net.xml')]
)
def test_timmx_exports_and_verifies(
    backend: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(sys, 'argv', ['timmx', 'export', backend, 'test_res2net', '--output', str(tmp_path / file)])
    with pytest.raises(SystemExit) as ended:
        app()
    assert ended.value.code in (None, 0)
    assert 'cosine similarity 1.0000' in capsys.readouterr().out
    assert (tmp_path / file).stat().st_size > 100_000
