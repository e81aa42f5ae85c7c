"""The Res2Net block, the one idea that every network of this package is built from.

A bottleneck's 3x3 convolution over `scale * width` channels becomes a cascade of `scale - 1` convolutions over `width`
channels each: every split is added to what the split before it became, and the last split passes as it is. Counted in
pixels of its stage, the i-th output of an undilated block has seen 2i + 3 of them across, so one block sees several
scales at once. Paper: `Res2Net: A New Multi-scale Backbone Architecture` - https://arxiv.org/abs/1904.01169
"""

import copy
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from timm.layers import create_attn, get_norm_layer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

Layer = Callable[..., nn.Module]

# The first block of a stage differs from the others, and three bodies of code that share all tensor names disagree on
# how: a file from one of them loads strictly into another and computes something else. The authors (and timm,
# mmpretrain and mindcv) break the cascade and pool the last split in every stage; Paddle and mmdet look at the stride.
# In the authors' networks for CIFAR a grouped convolution takes the place of the cascade, `scale` convolutions side by
# side. The columns are a stage's nominal step, so that dilating it (`output_stride`) does not change its function.
# fmt: off
FIRST_BLOCKS = {
    #            step 1                 step 2                 the average counts
    #            cascade  last split    cascade  last split    the padding
    'official': ((False,  'pooled'),    (False,  'pooled'),    True),
    'paddle':   ((True,   'kept'),      (False,  'pooled'),    False),
    'mmdet':    ((False,  'kept'),      (False,  'pooled'),    True),
    'group':    ((False,  'convolved'), (False,  'convolved'), True),
}
# fmt: on


class Bottle2neck(nn.Module):
    """Res2Net bottleneck: 1x1 convolution, cascade of 3x3 convolutions over splits of the channels, 1x1 convolution.

    Tensor names are those of timm and of the authors: `conv1 bn1 convs.k bns.k conv3 bn3 se downsample`. With `scale=1`
    it is the plain ResNe(X)t bottleneck.

    Args:
        inplanes: Input channels.
        planes: Base of the block's widths: it has `planes * expansion` output channels.
        stride: Stride of the 3x3 convolutions and of the pool beside them, 1 or 2.
        downsample: Projection for the shortcut, None for the identity. In timm's ResNet the first block of every stage
            has one (unless that is stage 1 and keeps the channels of the stem) and no other block does, which is how a
            block knows its position where `first` is not given.
        cardinality: Groups of each 3x3 convolution; above 1 this is Res2NeXt.
        base_width: Channels of one split for 64 planes; a split has `floor(planes * base_width / 64) * cardinality`.
        scale: Number of splits.
        dilation: Dilation of the blocks that follow in the stage.
        first_dilation: Dilation of this block's 3x3 convolutions, `dilation` if None.
        first: Whether this block is the first one of its stage.
        first_block: What a first block computes: 'official', 'paddle' or 'mmdet', after whose code does it, or 'group'.
        last_act: Whether an activation follows the residual add.
        dilate_pool: Dilate the average pool like the convolutions beside it. Only so does a dilated network compute, on
            a denser grid, what the undilated one does; timm leaves the pool undilated.
        act_layer: Activation class, one instance for each site (hooks and attribution methods tell sites apart).
        norm_layer: Norm class.
        attn_layer: Attention class or its name in timm, right before the residual add, where the paper (3.2.2) has SE.
        drop_block: Makes the DropBlock layer that follows the concatenated splits.
        drop_path: Stochastic depth layer of the residual branch.
        reduce_first: For timm's ResNet, which passes it to each block. Only 1.
        aa_layer: For timm's ResNet, which passes it to each block. Only None.
        device: Device of the tensors.
        dtype: Data type of the tensors.

    Raises:
        ValueError: For an argument that the block can't honour.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        cardinality: int = 1,
        base_width: int = 26,
        scale: int = 4,
        dilation: int = 1,
        first_dilation: int | None = None,
        first: bool | None = None,
        first_block: str = 'official',
        last_act: bool = True,
        dilate_pool: bool = False,
        act_layer: Layer = nn.ReLU,
        norm_layer: Layer = nn.BatchNorm2d,
        attn_layer: str | Layer | None = None,
        drop_block: Layer | None = None,
        drop_path: nn.Module | None = None,
        reduce_first: int = 1,
        aa_layer: Layer | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if first_block not in FIRST_BLOCKS:
            raise ValueError(f'first_block={first_block!r} is not known; choose from {", ".join(FIRST_BLOCKS)}')
        if scale < 1 or cardinality < 1:
            raise ValueError(f'scale={scale} and cardinality={cardinality} must be at least 1')
        if reduce_first != 1:
            raise ValueError(f'a Res2Net block has no block_reduce_first={reduce_first}; set base_width instead')
        if aa_layer is not None:
            raise ValueError(f'a Res2Net block has no aa_layer={aa_layer}: its strided convolutions are not blurred')
        width = int(planes * base_width / 64) * cardinality
        if width < 1:
            raise ValueError(f'base_width={base_width} leaves no channel in a split of a block with {planes} planes')
        outplanes = planes * self.expansion
        first_dilation = first_dilation or dilation
        step = stride * dilation // first_dilation

        self.scale = scale
        self.first_block = first_block
        self.cascade, last_split, count_include_pad = True, 'kept', True
        if downsample is not None if first is None else first:
            *steps, count_include_pad = FIRST_BLOCKS[first_block]
            self.cascade, last_split = steps[min(step, 2) - 1]

        self.conv1 = nn.Conv2d(inplanes, width * scale, 1, bias=False, **dd)
        self.bn1 = norm_layer(width * scale, **dd)
        self.act1 = act_layer(inplace=True)

        num_convs = scale if last_split == 'convolved' else max(1, scale - 1)
        grid: dict[str, Any] = dict(stride=stride, padding=first_dilation, dilation=first_dilation)
        grouped = partial(nn.Conv2d, width, width, 3, groups=cardinality, bias=False, **grid, **dd)
        self.convs = nn.ModuleList(grouped() for _ in range(num_convs))
        self.bns = nn.ModuleList(norm_layer(width, **dd) for _ in range(num_convs))
        self.acts = nn.ModuleList(act_layer(inplace=True) for _ in range(num_convs))
        self.pool: nn.Module = nn.Identity()
        if last_split == 'pooled' and dilate_pool and first_dilation > 1:
            self.pool = DilatedAvgPool2d(first_dilation, count_include_pad)
        elif last_split == 'pooled':
            self.pool = nn.AvgPool2d(3, stride, padding=1, count_include_pad=count_include_pad)
        self.drop_block = nn.Identity() if drop_block is None else drop_block()

        self.conv3 = nn.Conv2d(width * scale, outplanes, 1, bias=False, **dd)
        self.bn3 = norm_layer(outplanes, **dd)
        self.se = attention(attn_layer, outplanes, **dd)
        self.downsample = downsample
        self.drop_path = drop_path
        self.act3 = act_layer(inplace=True) if last_act else nn.Identity()

    def zero_init_last(self) -> None:
        """Makes the block an identity at the start of training: the last norm's weight becomes zero."""
        weight = getattr(self.bn3, 'weight', None)
        if weight is not None:
            nn.init.zeros_(weight)

    @torch.jit.ignore
    def fuse(self) -> 'Bottle2neck':
        """Makes a block for inference that computes the same; `timm.utils.reparameterize_model` calls this.

        Batch norms become part of the convolutions before them. Where no cascade orders the convolutions, they and what
        happens to the last split become one grouped convolution.

        Raises:
            ValueError: If the block is in training mode.
        """
        require_evaluation(self)
        block = copy.deepcopy(self)
        fold_norms(block)
        for i, (conv, bn) in enumerate(zip(block.convs, block.bns)):
            block.bns[i] = folded(conv, bn)
        if isinstance(block.downsample, nn.Sequential):
            fold_norms(block.downsample)
        block.merge_splits()
        return block.eval()  # new modules begin in training mode

    @torch.jit.ignore
    def merge_splits(self) -> None:
        """Makes one grouped convolution of those that run side by side and of what happens to the last split.

        One convolution has one activation behind it, which the last split meets, too. ReLU leaves that alone, averaged
        or not, as it comes from a ReLU. Left as they are: a cascade, splits that another activation would change, norms
        that are not folded, and an average that no convolution computes, as it doesn't count the padding or has another
        dilation.
        """
        conv: Any = self.convs[0]
        if self.cascade or len(self.convs) == 1 or not all(isinstance(bn, nn.Identity) for bn in self.bns):
            return
        weights: list[Any] = [each.weight for each in self.convs]  # (width, width / cardinality, 3, 3) each
        none = torch.zeros_like(conv.weight[:, 0, 0, 0])
        biases: list[Any] = [none if each.bias is None else each.bias for each in self.convs]
        if len(self.convs) < self.scale:
            kernel = kernel_of(self.pool, conv)
            if kernel is None or not isinstance(self.act1, nn.ReLU | nn.ReLU6):
                return
            same = torch.eye(conv.weight.shape[1]).repeat(conv.groups, 1)  # output channel i is made of input channel i
            weights.append((same[:, :, None, None] * kernel).to(conv.weight))
            biases.append(none)
        grid = dict(stride=conv.stride, padding=conv.padding, dilation=conv.dilation)
        width, groups = conv.in_channels * self.scale, conv.groups * self.scale
        dd = dict(device=conv.weight.device, dtype=conv.weight.dtype)
        merged = nn.Conv2d(width, width, conv.kernel_size, groups=groups, **grid, **dd)
        merged.weight, merged.bias = (nn.Parameter(torch.cat(each).detach()) for each in (weights, biases))
        self.convs, self.bns, self.acts = nn.ModuleList([merged]), self.bns[:1], self.acts[:1]
        self.pool, self.scale = nn.Identity(), 1

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Runs the block.

        Args:
            x: (N, inplanes, H, W).
            shortcut: (N, planes * expansion, H / stride, W / stride) to add to the branch, for a trunk that projects
                shortcuts by itself (DLA). The block's own, from `x`, if None.

        Returns:
            (N, planes * expansion, H / stride, W / stride), sizes rounded up.
        """
        y = self.act1(self.bn1(self.conv1(x)))  # (N, scale * width, H, W)
        splits = y.chunk(self.scale, dim=1)  # scale x (N, width, H, W)
        outs: list[Tensor] = []
        for i, (conv, bn, act) in enumerate(zip(self.convs, self.bns, self.acts)):
            y = outs[-1] + splits[i] if self.cascade and i > 0 else splits[i]
            outs.append(act(bn(conv(y))))  # (N, width, H / stride, W / stride), the i-th has seen 2i + 3 pixels across
        if len(outs) < self.scale:
            outs.append(self.pool(splits[-1]))
        y = torch.cat(outs, dim=1) if self.scale > 1 else outs[0]  # (N, scale * width, H / stride, W / stride)
        y = self.drop_block(y)

        y = self.bn3(self.conv3(y))  # (N, planes * expansion, H / stride, W / stride)
        if self.se is not None:
            y = self.se(y)
        if self.drop_path is not None:
            y = self.drop_path(y)
        if shortcut is None:
            shortcut = x if self.downsample is None else self.downsample(x)
        y += shortcut
        return self.act3(y)


def norm_maker(norm_layer: str | Layer) -> Layer:
    """Makes a norm class, given itself or its name in timm, take device and dtype, which torchvision's doesn't."""
    layer = get_norm_layer(norm_layer)
    parameters = inspect.signature(layer).parameters
    if 'device' in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return layer

    def made(num_features: int, device: Any = None, dtype: Any = None, **kwargs: Any) -> nn.Module:
        return layer(num_features, **kwargs).to(device=device, dtype=dtype)

    return made


def first_blocks(model: nn.Module) -> set[str]:
    """What the first blocks of a model compute, keys of `FIRST_BLOCKS`; without splits they are all the same."""
    return {block.first_block for block in model.modules() if isinstance(block, Bottle2neck) and block.scale > 1}


def attention(attn_layer: str | Layer | None, channels: int, **dd: Any) -> nn.Module | None:
    """Makes timm's attention layer of that name or class, None for None; ValueError for a name that timm lacks."""
    try:
        return create_attn(attn_layer, channels, **dd)
    except AssertionError as error:
        raise ValueError(f"attn_layer={attn_layer!r} is no attention layer of timm; 'se' or 'eca' are") from error


def require_evaluation(module: nn.Module) -> None:
    """Raises a ValueError for a module in training mode, whose norms don't compute what a convolution can."""
    if any(each.training for each in module.modules()):
        raise ValueError(
            f'this {type(module).__name__} is in training mode, where its norms take the statistics of each batch; '
            'fuse it after .eval()'
        )


class Folded(nn.Identity):
    """Stands where a norm was that is part of the convolution before it now."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def train(self, mode: bool = True) -> 'Folded':
        """Raises a ValueError for training: without its norms a network would learn something else, and worse."""
        if mode:
            raise ValueError('a fused model has no norms left to train with; train the model that it was made from')
        return super().train(False)


def folded(conv: nn.Module | None, norm: nn.Module) -> nn.Module:
    """Folds a norm into the convolution that runs before it, if that can be.

    Returns:
        What has to take the place of the norm: itself if it was not folded.
    """
    frozen = isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm | FrozenBatchNorm2d)
    if not isinstance(conv, nn.Conv2d) or not frozen or norm.running_mean is None:
        return norm
    if not isinstance(getattr(norm, 'act', None), nn.Identity | None):  # timm has norms with an activation
        return norm
    statistics: Any = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
    return Folded()


def fold_norms(module: nn.Module) -> None:
    """Folds norms into convolutions among the children of a module that runs them in their order."""
    before = None
    for name, child in list(module.named_children()):
        setattr(module, name, folded(before, child))
        before = child[-1] if isinstance(child, nn.Sequential) and len(child) else child  # as in a deep stem


def kernel_of(pool: nn.Module, conv: nn.Conv2d) -> Tensor | None:
    """The 3x3 kernel by which a convolution beside a pool computes the same, None if none does."""
    if isinstance(pool, nn.Identity):
        return F.pad(torch.ones(1, 1), [1, 1, 1, 1]) if conv.stride == (1, 1) else None
    dilation = pool.dilation if isinstance(pool, DilatedAvgPool2d) else 1
    return torch.full((3, 3), 1 / 9) if pool.count_include_pad and conv.dilation == (dilation, dilation) else None


class DilatedAvgPool2d(nn.Module):
    """Average over neighbours that are `dilation` apart, at stride 1. torch's pool has no dilation.

    Args:
        dilation: Distance of neighbours, in pixels.
        count_include_pad: Whether positions beyond the border count (as zeros).
        kernel_size: 3 for a pixel and those around it, 2 for a pixel and those to its right and below.
    """

    def __init__(self, dilation: int, count_include_pad: bool = True, kernel_size: int = 3) -> None:
        super().__init__()
        self.dilation = dilation
        self.count_include_pad = count_include_pad
        self.kernel_size = kernel_size

    def total(self, x: Tensor) -> Tensor:
        """Sums the neighbourhoods, (N, C, H, W) to (N, C, H, W): rows first, then columns."""
        d, before = self.dilation, self.dilation * (self.kernel_size - 2)
        x = F.pad(x, [before, d, before, d])
        if self.kernel_size == 2:
            x = x[:, :, :-d] + x[:, :, d:]
            return x[..., :-d] + x[..., d:]
        x = x[:, :, : -2 * d] + x[:, :, d:-d] + x[:, :, 2 * d :]
        return x[..., : -2 * d] + x[..., d:-d] + x[..., 2 * d :]

    def forward(self, x: Tensor) -> Tensor:
        """Averages the neighbourhoods, (N, C, H, W) to (N, C, H, W)."""
        if self.count_include_pad:
            return self.total(x) / (self.kernel_size * self.kernel_size)
        return self.total(x) / self.total(torch.ones_like(x[:1, :1]))

    def extra_repr(self) -> str:
        return f'dilation={self.dilation}, count_include_pad={self.count_include_pad}, kernel_size={self.kernel_size}'


class Stage(nn.Sequential):
    """Blocks in sequence, each of them checkpointed while `grad_checkpointing` is set."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, buffers_of=block)
            else:
                x = block(x)
        return x


def set_grad_checkpointing(model: nn.Module, enable: bool = True) -> None:
    """Switches gradient checkpointing in every part of a model that knows how."""
    for module in model.modules():
        if module is not model and 'grad_checkpointing' in vars(module):
            vars(module)['grad_checkpointing'] = enable


def checkpoint(run: Callable[..., Tensor], *args: Any, buffers_of: nn.Module) -> Tensor:
    """Runs a function and keeps only its arguments; the backward pass computes the rest once more.

    timm's counterpart lets the second run update the running statistics of the norms again. Here it leaves them alone,
    so a step with checkpointing ends with the same model as a step without.

    Args:
        run: What to run.
        *args: What to run it on.
        buffers_of: The module whose norms run.
    """
    # The compiler takes no context, and needs none: it recomputes values, and from torch 2.9 on repeats no update.
    if torch.compiler.is_compiling():
        return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False)
    contexts = nullcontext(), SpareBuffers(buffers_of)
    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False, context_fn=lambda: contexts)


class SpareBuffers:
    """Context in which a module works on, and updates, copies of its buffers. It can be entered again and again."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.buffers: list[tuple[nn.Module, str, Tensor]] = []

    def __enter__(self) -> None:
        owners = self.module.modules()
        self.buffers = [(owner, *item) for owner in owners for item in owner.named_buffers(recurse=False)]
        for owner, name, buffer in self.buffers:
            setattr(owner, name, buffer.clone())

    def __exit__(self, *error: object) -> None:
        for owner, name, buffer in self.buffers:
            setattr(owner, name, buffer)
