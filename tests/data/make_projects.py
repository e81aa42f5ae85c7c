r"""Makes projects.json.xz with names and shapes of the tensors next to the Res2Net in larger networks.

    python -m venv VENV && VENV/bin/pip install torch torchvision timm scipy
    for name in AngeLouCN/CaraNet@052ed72 ChunmingHe/FEDER@fac6b2a DengPingFan/Inf-Net@d4dd1e8 \
        DengPingFan/PraNet@95f12bd GewelsJI/PNS-Net@12c7a27 GewelsJI/SINet-V2@5b9844c LnSCV/TSNUNet@6ca44bb \
        MCG-NKU/SOD100K@66d390b MrShardFish/BIS5k@a7e6fc2 QingqiuLi/SCSGNet@b74c9e3 QuantumScriptHub/diffSOD@1b45665 \
        Res2Net/Res2Net-PoolNet@7bef065 SongZeHNU/CCLNet@7262798 UARK-AICV/MEGANet@8ae378d \
        Xiaoqi-Zhao-DLUT/MSNet-M2SNet@6aa1ed2 caitongbo/COVID-19-CT-Segmentaiton@6ef6d89 frazerlin/fcanet@e7de0ed \
        gfq1605694825/DSRNet-main@bc70adc plemeri/InSPyReNet@692ad8a plemeri/LaneSOD@7ef10ca plemeri/UACANet@6b9e54e \
        tansor/VecRoad@ffcb47e taozh2017/CFANet@7b4d91f taozh2017/FAPNet@1c791a1 thograce/BGNet@54e412f \
        thograce/C2FNet@712bae7 weijun88/SANet@68da18e xiefanghhh/MGF-NET@d3c064a zzhanghub/bianet@0d55777; do
        repository=${name%@*}
        git -C FOLDER clone https://github.com/$repository
        git -C FOLDER/${repository#*/} checkout ${name#*@}; done
    VENV/bin/python tests/data/make_projects.py FOLDER

For each network, the file has the prefix of its (first) Res2Net's names, and the names and shapes of all tensors but
those of Res2Nets, biases, and statistics of norms. FEDER has a plain ResNet instead. Their own code builds the models.
`Nothing` replaces imports from other packages and from files that the repositories lack; this does not change tensors.
"""

import contextlib
import importlib
import json
import lzma
import multiprocessing
import sys
import types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
import torch.utils.model_zoo
from numpy import ones
from reference import bare, stub
from torch import nn

INSPYRENET = 'InSPyReNet(res2net101_v1b_26w_4s(False), [64, 256, 512, 1024, 2048], 64, [384, 384])'
CCLNET = "define_G(Options(net_G='crossfusion_res2net50_Transformer_1enc_1dec_64head'), gpu_ids=[])"
# Folder, modules, an expression that builds the network, and prefixes of its Res2Nets.
NETWORKS = {
    'UACANet-S': ('UACANet', 'lib.UACANet', 'UACANet(32, 32, False)', 'resnet.'),
    'UACANet-L': ('UACANet', 'lib.UACANet', 'UACANet(256, 16, False)', 'resnet.'),
    'CANet-S': ('UACANet', 'lib.CANet', 'CANet(32, 32, False)', 'resnet.'),
    'CANet-L': ('UACANet', 'lib.CANet', 'CANet(256, 16, False)', 'resnet.'),
    "UACANet's PraNet": ('UACANet', 'lib.PraNet', 'PraNet(32, 32, False)', 'resnet.'),
    "UACANet's Baseline": ('UACANet', 'lib.Baseline', 'Baseline(32, 32, False)', 'resnet.'),
    'SCSGNet': ('SCSGNet', 'lib.SCSGNet', 'SCSGNet(pretrained=False)', 'resnet.'),
    'MGF-Net': ('MGF-NET', 'lib.MGFNet', 'MGFNet(256, 16, False)', 'resnet.'),
    'BCSNet': ('BIS5k', 'lib.BCSNet_v3', 'BCSNet_v3(pretrained=False)', 'resnet.'),
    'InSPyReNet': ('InSPyReNet', 'lib.InSPyReNet', 'InSPyReNet_Res2Net50(64, False, [384, 384])', 'backbone.'),
    'InSPyReNet-101': ('InSPyReNet', 'lib.InSPyReNet lib.backbones.Res2Net_v1b', INSPYRENET, 'backbone.'),
    'LaneSOD': ('LaneSOD', 'lib.InSPyReNet_Res2Net50', 'InSPyReNet_Res2Net50(64, False)', 'backbone.'),
    'TSNUNet': ('TSNUNet', 'lib.tsnunet', 'TSNUNet_res2net50_v1b_26w_4s(64, False, [384, 384])', 'backbone.'),
    'DSRNet': ('DSRNet-main', 'model.network option', 'Net(get_option())', 'resnet.'),
    'diffSOD': ('diffSOD', 'lib.SalientBranch', 'SalientBranch_Res2Net101(False)', 'backbone_original. backbone_x.'),
    'PoolNet': ('Res2Net-PoolNet', 'networks.poolnet_res2net', 'build_model()', 'base.resnet.'),
    'joint PoolNet': ('Res2Net-PoolNet', 'networks.joint_poolnet_res2net', "build_model('res2net')", 'base.resnet.'),
    'CCLNet': ('CCLNet', 'models.networks', CCLNET, 'resnet.'),
    'COVID PraNet': ('COVID-19-CT-Segmentaiton', 'models.PraNet_Res2Net50', 'PraNet()', 'resnet.'),
    'COVID Inf-Net': ('COVID-19-CT-Segmentaiton', 'models.InfNet_Res2Net50', 'Inf_Net()', 'resnet.'),
    'BiANet': ('bianet', 'models.BiANet_res2_50', 'BiANet()', 'rgb_stream.backbone. dep_stream.backbone.'),
    'PraNet': ('PraNet', 'lib.PraNet_Res2Net', 'PraNet()', 'resnet.'),
    'Inf-Net': ('Inf-Net', 'Code.model_lung_infection.InfNet_Res2Net', 'Inf_Net()', 'resnet.'),
    'SINet-V2': ('SINet-V2', 'lib.Network_Res2Net_GRA_NCD', 'Network(imagenet_pretrained=False)', 'resnet.'),
    'C2FNet': ('C2FNet', 'lib.C2FNet', 'C2FNet()', 'resnet.'),
    'SANet': ('SANet/src', 'model', 'Model(Options(snapshot=None))', 'bkbone.'),
    'MSNet': ('MSNet-M2SNet', 'model.miccai_msnet', 'MSNet()', 'resnet.'),
    'M2SNet': ('MSNet-M2SNet', 'model.miccai_msnet', 'M2SNet()', 'resnet.'),
    'BGNet': ('BGNet', 'net.bgnet', 'Net()', 'resnet.'),
    'CFANet': ('CFANet', 'lib.model', 'CFANet(channel=64)', 'resnet.'),
    'FAPNet': ('FAPNet', 'lib.model', 'FAPNet(channel=64)', 'resnet.'),
    'CaraNet': ('CaraNet', 'CaraNet', 'caranet()', 'resnet.'),
    'CSF': ('SOD100K/CSF+Res2Net', 'networks.csf_res2net', 'build_model()', 'base.'),
    'PNS-Net': ('PNS-Net', 'lib.PNS_Network', 'PNSNet()', 'feature_extractor.'),
    'FCA-Net': ('fcanet', 'model.fcanet', "FCANet(backbone='res2net')", 'backbone_pre. backbone_last.'),
    'FEDER': ('FEDER', 'lib.Network', 'Network()', 'shared_encoder.'),
    'MEGANet': ('MEGANet/MEGANet-Res2Net', 'lib.EGANet', 'EGANetModel()', 'net.'),
    'VecRoad': ('VecRoad', 'model.model', 'build_model()', ''),
}
# Beginnings of a Res2Net's tensor names; the last two are MEGANet's and VecRoad's.
BACKBONE = ('conv1.', 'bn1.', 'layer1.', 'layer2.', 'layer3.', 'layer4.', 'fc.', 'encoder', 'stage_')
LEFT_OUT = ('num_batches_tracked', 'running_mean', 'running_var', 'bias')
OTHERS = ('easydict', 'einops', 'kornia', 'lib2to3', 'mmcv', 'mmseg', 'self_cuda_backend', 'thop')
FILES = ('lib.optim', 'utils', 'lib.backbones.PVT_V2', *(f'lib.modules.dcn.deform_{x}_cuda' for x in ('conv', 'pool')))


class Nothing(nn.Module):
    """Stands for any import from a missing module: a function, a layer, or mmcv's registry."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @staticmethod
    def register_module() -> Any:
        return lambda cls: cls


class Missing(MetaPathFinder, Loader):
    """Finds the modules in `OTHERS` and `FILES`, unless something else does."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        missing = f'{name}.'.startswith(tuple(f'{each}.' for each in OTHERS + FILES))
        return ModuleSpec(name, self, is_package=True) if missing else None

    def exec_module(self, module: types.ModuleType) -> None:
        module.bce_iou_loss = Nothing  # as it is imported by `*`
        module.__getattr__ = lambda name: getattr(Nothing, name) if name.startswith('__') else Nothing


def build(folder: Path, name: str) -> dict[str, Any]:
    """Builds a network and lists its tensors. Needs its own process, as the networks' modules share names."""
    where, modules, expression, prefixes = NETWORKS[name]
    sys.argv[1:] = []  # DSRNet reads it
    sys.path.insert(0, str(folder / where))
    sys.meta_path.append(Missing())
    stub('cv2', MORPH_ELLIPSE=0, getGaussianKernel=lambda n, _: ones(n), getStructuringElement=lambda _, n: ones(n))
    # No weights are loaded, and nothing moves to a GPU: a moved tensor would no longer be a parameter.
    torch.load = torch.hub.load_state_dict_from_url = torch.utils.model_zoo.load_url = lambda *args, **kwargs: {}
    nn.Module.load_state_dict = lambda *args, **kwargs: None
    nn.Module.cuda = lambda self: self
    torch.Tensor.cuda = torch.Tensor.clone
    torch.Tensor.item = lambda self: 0.0  # drop rates; tensors on the meta device have no values
    names = {'Options': types.SimpleNamespace}
    with torch.device('meta'), contextlib.redirect_stdout(None):
        for module in modules.split():
            if '.' in module:
                bare(module.partition('.')[0])
            names |= vars(importlib.import_module(module))
        shapes = {key: list(tensor.shape) for key, tensor in eval(expression, names).state_dict().items()}
    before = prefixes.split() or ['']
    own = tuple(prefix + start for prefix in before for start in BACKBONE)
    others = {key: shapes[key] for key in shapes if not key.startswith(own) and key.split('.')[-1] not in LEFT_OUT}
    return {'prefix': before[0], 'tensors': others}


def main(folder: Path) -> None:
    with multiprocessing.get_context('spawn').Pool(1, maxtasksperchild=1) as pool:
        made = dict(zip(NETWORKS, pool.starmap(build, [(folder, name) for name in NETWORKS], chunksize=1)))
    with lzma.open(Path(__file__).with_name('projects.json.xz'), 'wt', preset=9 | lzma.PRESET_EXTREME) as file:
        json.dump(made, file)


if __name__ == '__main__':
    main(Path(sys.argv[1]))
