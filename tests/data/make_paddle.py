"""Makes paddle.tar.xz with PaddleClas' and PaddleDetection's own network code.

    python -m venv VENV && VENV/bin/pip install paddlepaddle requests tqdm pyyaml typeguard
    VENV/bin/pip install --no-deps paddleclas paddledet
    VENV/bin/python tests/data/make_paddle.py

The archive holds, for each of three classifiers, NAME.pdparams as Paddle saves it today, NAME.tar with a file for each
variable as it did before version 2, and NAME.npz with images and the logits that Paddle computes for them; and for
PaddleDetection's backbone of variant d, plain and deformable, the same with feature maps instead of logits, without the
old form. The networks are thin and their weights sparse and rounded, so that the archive is small; statistics of the
norms are random. The deformable network has the other one's values, and besides them only what makes its offsets.

What PaddleDetection's deformable network (`dcn_v2_stages=[1, 2, 3]`, counted from 0) computes; plain equations of this,
with torchvision's deform_conv2d, reproduce every map to 1e-6:

- In a deformable stage all blocks are, the first one too, and in each all three 3x3, each with offsets of its own. In
  all else the function is that of the plain network, also in the first blocks: the stride is in the 3x3 and in what
  makes its offsets, no cascade, the last split averaged without the padding; and the shortcuts are strided 1x1,
  without a pool, since the class does not hand its variant on to its stages.
- `branch2b.k.conv_offset`, a 3x3 with bias, of the same stride and padding of 1, gets what the 3x3 itself gets, after
  the sum. Of its 27 channels 2t and 2t + 1 are y and x for tap t, row by row; the sigmoid of the last nine is the mask.
- The 3x3 itself keeps its name, `branch2b.k.conv.weight`. It has padding and dilation of 1, and no bias.
"""

import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any

os.environ['FLAGS_enable_pir_api'] = '0'  # noqa: SIM112 - whose programs can't save single variables

import numpy as np
import paddle
from reference import bare, pack, random_value, save_reference


def networks() -> tuple[Any, Any, Any]:
    """Imports the plain and the vd classifier, and the backbone of detectors."""
    for name in ('', '.ppcls', '.ppcls.utils', '.ppcls.arch', '.ppcls.arch.backbone', '.ppcls.arch.backbone.model_zoo'):
        bare(f'paddleclas{name}')
    for name in ('', '.core', '.utils', '.modeling', '.modeling.backbones'):
        bare(f'ppdet{name}')
    from paddleclas.ppcls.arch.backbone.model_zoo.res2net import Res2Net
    from paddleclas.ppcls.arch.backbone.model_zoo.res2net_vd import Res2Net_vd
    from ppdet.modeling.backbones.res2net import Res2Net as DetectorRes2Net

    return Res2Net, Res2Net_vd, DetectorRes2Net


def fill(
    net: Any, path: Path, rng: np.random.Generator, drawn: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Gives a network random values, saves it, and returns them by the names of variables.

    What an earlier network has too, it gets from `drawn`, which saves room.
    """
    drawn = {} if drawn is None else drawn
    values = {}
    for name, tensor in net.state_dict().items():
        if name not in drawn:
            positive = name.endswith(('norm.weight', '_variance'))
            drawn[name] = random_value(tuple(tensor.shape), positive, rng)
            if name.endswith('conv_offset.weight'):
                drawn[name] /= 4  # offsets of about a pixel
        values[tensor.name] = drawn[name]
        tensor.set_value(drawn[name])
    net.eval()
    paddle.save(net.state_dict(), f'{path}.pdparams')
    return values


def save_static(make: Any, values: dict[str, np.ndarray], path: Path) -> None:
    """Saves one file for each variable of a network."""
    paddle.enable_static()
    program = paddle.static.Program()
    with paddle.static.program_guard(program, paddle.static.Program()):
        make()(paddle.static.data('image', [1, 3, 64, 64]))
    variables = [variable for variable in program.list_vars() if variable.name in values]
    for variable in variables:
        tensor = paddle.static.global_scope().var(variable.name).get_tensor()
        tensor.set(values[variable.name], paddle.CPUPlace())
    executor = paddle.static.Executor(paddle.CPUPlace())
    with tempfile.TemporaryDirectory() as folder:
        paddle.static.save_vars(executor, folder, main_program=program, vars=variables)
        with tarfile.open(f'{path}.tar', 'w') as archive:
            archive.add(folder, path.name)
    paddle.disable_static()


def main() -> None:
    plain, vd, detector = networks()
    made = {
        'res2net50': lambda: plain(layers=50, scales=4, width=2, class_num=5),
        'res2net50_vd': lambda: vd(layers=50, scales=4, width=2, class_num=5),
        'res2net200_vd': lambda: vd(layers=200, scales=3, width=1, class_num=5),
    }
    with tempfile.TemporaryDirectory() as folder:
        for seed, (name, make) in enumerate(made.items()):
            rng = np.random.default_rng(seed)
            net = make()
            values = fill(net, Path(folder, name), rng)
            save_reference(lambda x, net=net: net(paddle.to_tensor(x)).numpy(), Path(folder, name), rng)
            del net  # a new one may then have variables of the same names
            save_static(make, values, Path(folder, name))

        args = dict(depth=50, width=2, scales=4, variant='d', freeze_norm=False, freeze_at=-1)
        drawn: dict[str, np.ndarray] = {}
        for seed, (name, stages) in enumerate({'detection_d': [-1], 'detection_dcn': [1, 2, 3]}.items(), len(made)):
            rng = np.random.default_rng(seed)
            net = detector(dcn_v2_stages=stages, **args)
            fill(net, Path(folder, name), rng, drawn)
            save_reference(
                lambda x, net=net: [y.numpy() for y in net({'image': paddle.to_tensor(x)})], Path(folder, name), rng
            )
        pack(folder, 'paddle.tar.xz')


if __name__ == '__main__':
    main()
