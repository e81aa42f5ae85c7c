"""timmx exports these models, although it reparameterizes them in training mode."""

import sys
from pathlib import Path

import pytest
import torch

from timm_res2net.run import main

pytest.importorskip('timmx')


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning', 'ignore::UserWarning')
@pytest.mark.parametrize(
    ('backend', 'file'), [('torchscript', 'net.pt'), ('torch-export', 'net.pt2'), ('openvino', 'net.xml')]
)
def test_timmx_exports_and_verifies(
    backend: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    for name in ('argv', 'path'):  # `main` changes both, as if it owned the process
        monkeypatch.setattr(sys, name, [*getattr(sys, name)])
    with pytest.raises(SystemExit) as ended:
        main(['-m', 'timmx', 'export', backend, 'test_res2net', '--output', str(tmp_path / file)])
    assert ended.value.code in (None, 0)
    assert 'cosine similarity 1.0000' in capsys.readouterr().out
    assert (tmp_path / file).stat().st_size > 100_000
