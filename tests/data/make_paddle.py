"""Makes paddle.tar.xz with networks built by PaddleClas's and PaddleDetection's own code.

    python -m venv VENV && VENV/bin/pip install paddlepaddle requests tqdm pyyaml typeguard
    VENV/bin/pip install --no-deps paddleclas paddledet
    git -C FOLDER clone -b release/0.5 https://github.com/PaddlePaddle/PaddleDetection
    VENV/bin/python tests/data/make_paddle.py FOLDER

For each of three classifiers, the archive has NAME.pdparams, as Paddle saves it today, and NAME.tar with one file per
variable, as Paddle saved before version 2. PaddleDetection's variant d backbones are NAME.pdparams, and
`detection_dcn_static` is from its older code. Functions of Paddle 3 replace the paddle.fluid functions of the same
names that the code of release/0.5 calls.

PaddleDetection's deformable network (`dcn_v2_stages=[1, 2, 3]`, counted from 0) has strided 1x1 shortcuts without a
pool, as the class does not pass its variant on to its stages. `branch2b.k.conv_offset` computes the offsets
of `branch2b.k.conv` from the same input.

The code for static graphs, before version 2 (`dcn_v2_stages: [3, 4, 5]`, the stem is 1), computes the same except for
the shortcuts: at stride 2, they are AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), then a 1x1. According to
its configuration, mask_rcnn_res2net50_vd_26w_4s_fpn_dcnv2_1x.tar, the only deformable Res2Net that PaddleDetection
published, computes this too; the file itself was not available. Its offsets come from
`res3a_branch2b_1_conv_offset.w_0` and `.b_0`; the 3x3 is `res3a_branch2b_1_weights`.
"""

import copy
import os
import re
import sys
import tarfile
import tempfile
import types
from pathlib import Path
from typing import Any

os.environ['FLAGS_enable_pir_api'] = '0'  # noqa: SIM112 - PIR programs can't save single variables

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle.base.layer_helper import LayerHelper
from paddle.static import nn as static_nn
from reference import bare, pack, random_value, save_reference, stub


def networks() -> tuple[Any, Any, Any]:
    """Imports the plain classifier, the vd classifier and the detector backbone."""
    for name in ('', '.ppcls', '.ppcls.utils', '.ppcls.arch', '.ppcls.arch.backbone', '.ppcls.arch.backbone.model_zoo'):
        bare(f'paddleclas{name}')
    for name in ('', '.core', '.utils', '.modeling', '.modeling.backbones'):
        bare(f'ppdet{name}')
    from paddleclas.ppcls.arch.backbone.model_zoo.res2net import Res2Net
    from paddleclas.ppcls.arch.backbone.model_zoo.res2net_vd import Res2Net_vd
    from ppdet.modeling.backbones.res2net import Res2Net as DetectorRes2Net

    return Res2Net, Res2Net_vd, DetectorRes2Net


def static_detector(folder: Path) -> Any:
    """Imports the detector backbone from before version 2."""

    def sigmoid(x: Any) -> Any:  # Paddle 3's own does not accept these programs' variables
        helper = LayerHelper('sigmoid')
        y = helper.create_variable_for_type_inference(x.dtype)
        helper.append_op(type='sigmoid', inputs={'X': x}, outputs={'Out': y})
        return y

    def pool2d(
        input: Any, pool_size: int, pool_type: str, pool_stride: int, pool_padding: int, ceil_mode: bool = False
    ) -> Any:
        pool = dict(avg=F.avg_pool2d, max=F.max_pool2d)[pool_type]
        return pool(input, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode)

    fluid = stub(
        'paddle.fluid',
        ParamAttr=paddle.ParamAttr,
        framework=types.SimpleNamespace(
            _get_var=lambda name: paddle.static.default_main_program().global_block().var(name)
        ),
        layers=types.SimpleNamespace(
            batch_norm=static_nn.batch_norm,
            concat=paddle.concat,
            conv2d=static_nn.conv2d,
            deformable_conv=static_nn.common.deformable_conv,
            elementwise_add=lambda x, y, act, name: getattr(F, act)(x + y),
            pool2d=pool2d,
            sigmoid=sigmoid,
            split=lambda input, num_or_sections, dim: paddle.split(input, num_or_sections, dim),
        ),
    )
    paddle.fluid = fluid
    constant = paddle.nn.initializer.Constant
    stub('paddle.fluid.framework', Variable=paddle.static.Variable)
    stub('paddle.fluid.initializer', Constant=constant, ConstantInitializer=constant)
    stub('paddle.fluid.param_attr', ParamAttr=paddle.ParamAttr)
    stub('paddle.fluid.regularizer', L2Decay=paddle.regularizer.L2Decay)

    for name in [name for name in sys.modules if name.split('.')[0] == 'ppdet']:  # the newer version
        del sys.modules[name]
    sys.path.insert(0, str(folder / 'PaddleDetection'))
    for name in ('', '.core', '.modeling', '.modeling.backbones'):
        bare(f'ppdet{name}')
    from ppdet.modeling.backbones.res2net import Res2Net

    return Res2Net


def static_name(name: str) -> str:
    """Returns the name of a variable in PaddleDetection before version 2."""
    layer, part, tensor = name.rsplit('.', 2)
    layer = re.sub(r'^res(\d)\.blocks\.(\d)\.', lambda match: f'res{match[1]}{"abcdef"[int(match[2])]}_', layer)
    layer = re.sub(r'\.(\d)$', lambda match: f'_{int(match[1]) + 1}', layer.removeprefix('res1.'))
    if part == 'norm':
        return f'bn{layer[3:]}_' + dict(weight='scale', bias='offset').get(tensor, tensor[1:])
    return layer + ('_weights' if part == 'conv' else f'_conv_offset.{tensor[0]}_0')


def fill(
    net: Any, path: Path, rng: np.random.Generator, drawn: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Fills a network with random values, saves it, and returns the values keyed by variable name.

    To save space, reuses the values of earlier networks, in `drawn`.
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


def save_static(make: Any, values: dict[str, np.ndarray], path: Path, rng: np.random.Generator | None = None) -> None:
    """Saves one file per variable of a network; with `rng`, also saves images and the maps computed from them."""
    paddle.enable_static()
    program = paddle.static.Program()
    with paddle.static.program_guard(program, paddle.static.Program()):
        outputs = make()(paddle.static.data('image', [None, 3, None, None]))
    variables = [variable for variable in program.list_vars() if variable.name in values]
    for variable in variables:
        tensor = paddle.static.global_scope().var(variable.name).get_tensor()
        tensor.set(values[variable.name], paddle.CPUPlace())
    executor = paddle.static.Executor(paddle.CPUPlace())
    with tempfile.TemporaryDirectory() as folder:
        paddle.static.save_vars(executor, folder, main_program=program, vars=variables)
        with tarfile.open(f'{path}.tar', 'w') as archive:
            archive.add(folder, path.name)
    if rng:
        maps = list(outputs.values())
        save_reference(lambda x: executor.run(program, feed={'image': x}, fetch_list=maps), path, rng)
    paddle.disable_static()


def main(code: Path) -> None:
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
            del net  # so that a new network can have the same variable names
            save_static(make, values, Path(folder, name))

        args = dict(depth=50, width=2, scales=4, variant='d', freeze_norm=False, freeze_at=-1)
        drawn: dict[str, np.ndarray] = {}
        for seed, (name, stages) in enumerate({'detection_d': [-1], 'detection_dcn': [1, 2, 3]}.items(), len(made)):
            rng = np.random.default_rng(seed)
            net = detector(dcn_v2_stages=stages, **args)
            fill(net, Path(folder, name), rng, drawn)
            same_images = copy.deepcopy(rng)
            save_reference(
                lambda x, net=net: [y.numpy() for y in net({'image': paddle.to_tensor(x)})], Path(folder, name), rng
            )
        static = static_detector(code)
        save_static(
            lambda: static(depth=50, width=2, scales=4, variant='d', dcn_v2_stages=[3, 4, 5]),
            {static_name(name): value for name, value in drawn.items()},
            Path(folder, 'detection_dcn_static'),
            same_images,
        )
        pack(folder, 'paddle.tar.xz')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
