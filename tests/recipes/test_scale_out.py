"""The table of the cost of training on many GPUs is computed from the real models."""

import pytest
import timm
from support import ROOT

from timm_res2net.recipes.scale_out import main, rows, table


def test_scale_out_table_of_real_model_is_in_readme(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    printed = capsys.readouterr().out
    assert printed in (ROOT / 'timm_res2net' / 'recipes' / 'README.md').read_text()
    params = sum(p.numel() for p in timm.create_model('res2net50_26w_4s', device='meta').parameters())
    assert printed == '\n'.join(table(rows(params, images_per_second=851))) + '\n'


def test_scale_out_rows_follow_from_model_size_and_speed_of_one_gpu() -> None:
    one, two, *_, most = rows(params=1_000_000, images_per_second=100, batch_size=50)
    assert (one.batch, one.steps, one.sent, one.bandwidth) == (50, 25_624, 0, 0)
    assert one.seconds == pytest.approx(12_812)  # half a second for each step
    assert two.sent == 4_000_000  # each sends half of 4 MB to add up, and half to hand on the sums
    assert two.bandwidth == pytest.approx(4_000_000 / (0.5 * 2 / 3))
    assert (most.gpus, most.batch, most.warmup_epochs) == (64, 3200, 5)
    assert most.lr == pytest.approx(1.25)
    assert most.sent == pytest.approx(2 * 63 / 64 * 4_000_000)
    assert most.seconds == pytest.approx(most.steps * 0.5)


def test_scale_out_row_of_four_gpus_equals_paper() -> None:
    four = rows(params=1, images_per_second=1)[2]
    assert (four.gpus, four.batch, four.lr, four.warmup_epochs) == (4, 256, 0.1, 0)


def test_scale_out_wrong_argument_exits_with_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match='2'):
        main(['--batch-size', '0'])
    assert '0 is not above zero' in capsys.readouterr().err
