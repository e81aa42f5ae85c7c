"""The family as data: a line for each architecture, a line for each set of weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .biglittle import Res2NetBigLittle
from .cifar import Res2NetCifar
from .dla import Res2NetDla
from .resnet import Res2Net
from .trunk import Trunk

ASSETS = Path(__file__).parents[1] / 'assets'
EMBEDDED = 'test_res2net.digits'  # the only weights that this package contains


@dataclass(frozen=True)
class Arch:
    """One architecture: its cost, trunk, arguments of the trunk, and timm configuration."""

    params: int  # with the classes of its default weights
    gmacs: float  # 10^9 multiply-adds of convolutions and classifier, for one image of 224 x 224 (CIFAR: 32 x 32)
    trunk: type[Res2Net | Trunk]
    args: dict[str, Any]
    out_indices: tuple[int, ...]  # default of timm's features_only; ends with the last feature
    cfg: dict[str, Any]


def resnet(params: int, gmacs: float, layers: Sequence[int], base_width: int, scale: int, **args: Any) -> Arch:
    """Res2Net block in timm's ResNet: blocks of each stage, channels of a split for 64 planes, splits."""
    args = dict(layers=layers, base_width=base_width, scale=scale, **args)
    cfg = dict(first_conv='conv1.0' if args.get('stem_type') == 'deep' else 'conv1')
    return Arch(params, gmacs, Res2Net, args, (0, 1, 2, 3, 4), cfg)


def dla(params: int, gmacs: float, levels: Sequence[int], base_width: int, scale: int, **args: Any) -> Arch:
    """Res2Net block in DLA: depth of each level, channels of a split for 64 planes, splits."""
    args = dict(levels=levels, base_width=base_width, scale=scale, **args)
    return Arch(params, gmacs, Res2NetDla, args, (1, 2, 3, 4, 5), dict(first_conv='base_layer.0'))


def biglittle(params: int, gmacs: float, layers: Sequence[int], base_width: int, scale: int, **args: Any) -> Arch:
    """Res2Net block in Big-Little Net: blocks of each stage, channels of a split for 64 planes, splits."""
    args = dict(layers=layers, base_width=base_width, scale=scale, **args)
    cfg = dict(paper_ids=('arXiv:1904.01169', 'arXiv:1807.03848'))
    return Arch(params, gmacs, Res2NetBigLittle, args, (0, 1, 2, 3, 4), cfg)


def cifar(params: int, gmacs: float, cardinality: int, base_width: int, scale: int, **args: Any) -> Arch:
    """Res2Net block in ResNeXt-29 for CIFAR-100: groups, channels of a split and group for 64 planes, splits."""
    args = dict(cardinality=cardinality, base_width=base_width, scale=scale, **args)
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    size = dict(input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0)
    return Arch(params, gmacs, Res2NetCifar, args, (0, 1, 2, 3), dict(num_classes=100, mean=mean, std=std, **size))


R50, R101, R152, R200 = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3), (3, 12, 48, 3)
DLA60 = (1, 1, 1, 2, 3, 1)
BL101 = (4, 8, 18, 3)
D = dict(stem_type='deep', stem_width=32, avg_down=True)  # the authors' v1b, Paddle's vd
GROUP = dict(first_block='group')  # the trunk's default, repeated because files are compared with these rows
TINY = dict(stem_type='deep', stem_width=8, avg_down=True, channels=(8, 16, 32, 64))

# fmt: off
ARCHS = {
    #                                         params   GMACs  blocks width scale
    'res2net50_26w_4s':       resnet(   25_699_120,  4.255, R50,     26,  4),
    'res2net50_48w_2s':       resnet(   25_287_304,  4.160, R50,     48,  2),
    'res2net50_14w_8s':       resnet(   25_059_816,  4.179, R50,     14,  8),
    'res2net50_26w_6s':       resnet(   37_051_448,  6.296, R50,     26,  6),
    'res2net50_26w_8s':       resnet(   48_403_776,  8.336, R50,     26,  8),
    'res2net50_18w_4s':       resnet(   18_095_104,  2.898, R50,     18,  4),  # the paper's Res2Net-50-L
    'res2net50_18w_6s':       resnet(   25_158_664,  4.181, R50,     18,  6),  # in the paper's segmentation tables
    'res2net101_26w_4s':      resnet(   45_206_688,  8.067, R101,    26,  4),
    'res2next50':             resnet(   24_671_464,  4.173, R50,      4,  4, cardinality=8),
    'res2net50d':             resnet(   25_718_352,  4.495, R50,     26,  4, **D),
    'res2net101d':            resnet(   45_225_920,  8.307, R101,    26,  4, **D),
    'res2net152d':            resnet(   61_294_480, 12.118, R152,    26,  4, **D),
    'seres2net50_26w_4s':     resnet(   28_230_112,  4.258, R50,     26,  4, attn_layer='se'),
    'res2net50_pd_26w_4s':    resnet(   25_699_120,  4.255, R50,     26,  4, first_block='paddle'),
    'res2net50_pd_14w_8s':    resnet(   25_059_816,  4.179, R50,     14,  8, first_block='paddle'),
    'res2net50_vd_26w_4s':    resnet(   25_718_352,  4.495, R50,     26,  4, first_block='paddle', **D),
    'res2net101_vd_26w_4s':   resnet(   45_225_920,  8.307, R101,    26,  4, first_block='paddle', **D),
    'res2net200_vd_26w_4s':   resnet(   76_215_536, 15.706, R200,    26,  4, first_block='paddle', **D),
    'dla60_res2net':          dla(      20_848_072,  4.123, DLA60,   28,  4),
    'dla60_res2next':         dla(      17_032_984,  3.459, DLA60,    4,  4, cardinality=8),
    'blres2net50_26w_4s':     biglittle(26_845_561,  2.994, R50,     26,  4),
    'blres2net101_26w_4s':    biglittle(42_414_497,  4.059, BL101,   26,  4),
    'blresnet50':             biglittle(26_694_568,  2.856, R50,     64,  1),  # the baseline, which timm lacks
    #                                         params   GMACs  groups width scale
    'res2next29_6c_24w_4s':   cifar(    24_360_932,  3.948, 6,       24,  4, **GROUP),
    'res2next29_8c_25w_4s':   cifar(    33_905_236,  5.505, 8,       25,  4, **GROUP),
    'res2next29_6c_24w_6s':   cifar(    36_801_380,  5.975, 6,       24,  6, **GROUP),
    'seres2next29_6c_24w_4s': cifar(    24_882_740,  3.948, 6,       24,  4, attn_layer='se', **GROUP),
    'seres2next29_8c_25w_4s': cifar(    34_427_044,  5.506, 8,       25,  4, attn_layer='se', **GROUP),
    'seres2next29_6c_24w_6s': cifar(    37_323_188,  5.975, 6,       24,  6, attn_layer='se', **GROUP),
    'resnext29_8c_64w':       cifar(    34_518_948,  5.387, 8,       64,  1),  # the baseline
    'test_res2net':           resnet(      223_582,  0.061, (2, 2, 2, 2), 26, 4, **TINY),
}
# fmt: on


@dataclass(frozen=True)
class Weights:
    """One set of weights: accuracy in %, who measured it, how it was trained, and timm configuration."""

    top1: float
    top5: float | None
    measured: str
    recipe: str
    cfg: dict[str, Any] = field(default_factory=dict)


V1 = (
    '100 epochs on ImageNet-1k by SGD, with label smoothing of 0.1 and random resized crops; evaluated on the central '
    '224 pixels of images resized to 256'
)
V1B = 'On ImageNet-1k, with CutMix and a schedule that the authors have not published; it is their v1b'


def authors(top1: float, top5: float, recipe: str = V1) -> Weights:
    """The authors' ImageNet-1k weights in timm's repositories; accuracy at 224 as timm measured it."""
    description = f"trained by Res2Net's authors on ImageNet-1k; top-1 {top1:.2f} % at 224 px, measured by timm"
    origin = dict(license='cc-by-nc-sa-4.0', origin_url='https://github.com/Res2Net/Res2Net-PretrainedModels')
    return Weights(top1, top5, 'measured by timm', recipe, dict(hf_hub_id='timm/', description=description, **origin))


def digits(top1: float) -> Weights:
    """Weights in this package, trained by its own recipe; accuracy on the part of the data that was held out."""
    measured = 'on the held-out third, where the recipe was chosen among three, so it is slightly optimistic'
    recipe = "By timm's train.py with the package's recipes/digits.yaml, two minutes on two CPU cores"
    cfg = dict(
        file=str(ASSETS / f'{EMBEDDED}.safetensors'),
        license='apache-2.0',
        origin_url='https://archive.ics.uci.edu/dataset/80',
        description=(
            f"trained by timm_res2net on scikit-learn's handwritten digits; top-1 {top1:.2f} % on the held-out third"
        ),
        num_classes=10,
        label_names=tuple('0123456789'),
        input_size=(3, 32, 32),
        pool_size=(1, 1),
        crop_pct=1.0,
        interpolation='bicubic',
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    return Weights(top1, None, measured, recipe, cfg)


def paddle(top1: float, top5: float, name: str) -> Weights:
    """PaddleClas' own ImageNet-1k weights at its address; accuracy at 224 as PaddleClas publishes it."""
    distilled = name.endswith('ssld')
    how = 'distilled (SSLD)' if distilled else 'trained'
    description = f'{how} by PaddleClas on ImageNet-1k; top-1 {top1:.2f} % at 224 px, published by PaddleClas'
    resize = (
        "PaddleClas resizes with OpenCV's bilinear interpolation, which does not antialias; timm's preprocessing does. "
        'This is expected to change top-1 by about 0.1 % (not measured)'
    )
    recipe = (
        "By PaddleClas' distillation from a stronger teacher, SSLD"
        if distilled
        else "On ImageNet-1k with mixup of 0.2, by PaddleClas' configuration of that name"
    )
    url = f'https://paddle-imagenet-models-name.bj.bcebos.com/dygraph/{name}_pretrained.pdparams'
    origin = dict(license='apache-2.0', origin_url='https://github.com/PaddlePaddle/PaddleClas', notes=(resize,))
    cfg = dict(url=url, custom_load=True, description=description, **origin)
    return Weights(top1, top5, 'as published by PaddleClas', recipe, cfg)


def mindcv(top1: float, top5: float, file: str) -> Weights:
    """MindCV's own ImageNet-1k weights at its address; accuracy at 224 as MindCV publishes it."""
    description = f'trained by MindCV on ImageNet-1k; top-1 {top1:.2f} % at 224 px, published by MindCV'
    resize = (
        "MindCV resizes with MindSpore's bilinear interpolation, timm's preprocessing with Pillow's; the effect "
        'on accuracy was not measured'
    )
    recipe = "On ImageNet-1k, by MindCV's configuration of that name on Ascend processors"
    url = f'https://download.mindspore.cn/toolkits/mindcv/res2net/{file}.ckpt'
    origin = dict(license='apache-2.0', origin_url='https://github.com/mindspore-lab/mindcv', notes=(resize,))
    cfg = dict(url=url, custom_load=True, description=description, **origin)
    return Weights(top1, top5, 'as published by MindCV', recipe, cfg)


# fmt: off
WEIGHTS = {  # an architecture's first row is its default
    #                                           top-1   top-5
    'res2net50_26w_4s.in1k':            authors(77.994, 93.860),
    'res2net50_26w_4s.mindcv_in1k':      mindcv(79.35, 94.64, 'res2net50-f42cf71b'),
    'res2net50_48w_2s.in1k':            authors(77.528, 93.562),
    'res2net50_14w_8s.in1k':            authors(78.142, 93.852),
    'res2net50_26w_6s.in1k':            authors(78.586, 94.120),
    'res2net50_26w_8s.in1k':            authors(78.950, 94.280),
    'res2net101_26w_4s.in1k':           authors(79.192, 94.466),
    'res2net101_26w_4s.mindcv_in1k':     mindcv(79.56, 94.70, 'res2net101-8ae60132'),
    'res2next50.in1k':                  authors(78.238, 93.904),
    'res2net50d.in1k':                  authors(80.280, 95.028, V1B),
    'res2net50d.mindcv_in1k':            mindcv(80.32, 95.09, 'res2net50_v1b-99304e92'),
    'res2net101d.in1k':                 authors(81.236, 95.346, V1B),
    'res2net101d.mindcv_in1k':           mindcv(81.14, 95.41, 'res2net101_v1b-7e6db001'),
    'res2net50_pd_26w_4s.paddle_in1k':   paddle(79.33, 94.57, 'Res2Net50_26w_4s'),
    'res2net50_pd_14w_8s.paddle_in1k':   paddle(79.46, 94.70, 'Res2Net50_14w_8s'),
    'res2net50_vd_26w_4s.ssld_in1k':     paddle(83.1, 96.6, 'Res2Net50_vd_26w_4s_ssld'),
    'res2net50_vd_26w_4s.paddle_in1k':   paddle(79.75, 94.91, 'Res2Net50_vd_26w_4s'),
    'res2net101_vd_26w_4s.ssld_in1k':    paddle(83.9, 97.1, 'Res2Net101_vd_26w_4s_ssld'),
    'res2net101_vd_26w_4s.paddle_in1k':  paddle(80.64, 95.22, 'Res2Net101_vd_26w_4s'),
    'res2net200_vd_26w_4s.ssld_in1k':    paddle(85.13, 97.42, 'Res2Net200_vd_26w_4s_ssld'),
    'res2net200_vd_26w_4s.paddle_in1k':  paddle(81.21, 95.71, 'Res2Net200_vd_26w_4s'),
    'dla60_res2net.in1k':               authors(78.480, 94.204),
    'dla60_res2next.in1k':              authors(78.488, 94.144),
    'test_res2net.digits':               digits(99.499),
}
# fmt: on


def default_cfg(name: str, **cfg: Any) -> dict[str, Any]:
    """Makes timm's configuration of an architecture or of its weights; `cfg` overrides."""
    imagenet: dict[str, Any] = dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation='bilinear',
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv='conv1',
        classifier='fc',
        paper_name='Res2Net: A New Multi-scale Backbone Architecture',
        paper_ids='arXiv:1904.01169',
    )
    return {**imagenet, **ARCHS[name].cfg, **cfg}
