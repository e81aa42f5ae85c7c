"""What the trunks of our own have in common: a head, and features that can be taken from their parts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import DropPath, calculate_drop_path_rates, create_classifier, get_device_dtype
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .block import Bottle2neck, Layer, set_grad_checkpointing

Layers = Callable[..., list[nn.Module]]


class Trunk(nn.Module):
    """A sequence of parts and a head, with the methods that timm expects of a model.

    A subclass makes the parts, lists the features that can be taken in `feature_info` (as timm does: `num_chs`,
    `reduction` and the part's name as `module`), writes `forward_features` down, and calls `finish`.
    """

    parts: tuple[str, ...]  # names of the modules that make the features, in the order in which they run
    conv_head = False  # a 1x1 convolution as classifier, as DLA has it

    forward_features: Callable[[Tensor], Tensor]

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.feature_info: list[dict[str, Any]] = []

    def finish(
        self,
        num_features: int,
        global_pool: str,
        drop_rate: float,
        drop_path_rate: float,
        zero_init_last: bool,
        **dd: Any,
    ) -> None:
        """Adds stochastic depth and the head to the parts, and initialises all.

        Args:
            num_features: Channels of the last part.
            global_pool: Kind of pooling, '' for none.
            drop_rate: Dropout probability before the classifier.
            drop_path_rate: Stochastic depth probability of the last block, growing linearly from 0 at the first.
            zero_init_last: Let each block be an identity at the start of training.
            **dd: Device and dtype.
        """
        blocks = [module for module in self.modules() if isinstance(module, Bottle2neck)]
        for block, rate in zip(blocks, calculate_drop_path_rates(drop_path_rate, len(blocks))):
            block.drop_path = DropPath(rate) if rate > 0 else None
        self.num_features = num_features
        self.head_drop = nn.Dropout(drop_rate)
        self._make_head(global_pool, **dd)
        self.init_weights(zero_init_last)

    def _make_head(self, global_pool: str, **dd: Any) -> None:
        self.global_pool, self.fc = create_classifier(
            self.num_features, self.num_classes, pool_type=global_pool, use_conv=self.conv_head, **dd
        )
        self.flatten = nn.Flatten(1) if global_pool and self.conv_head else nn.Identity()
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        """Initialises the convolutions for ReLU by their fan-out, and optionally lets each block be an identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        for module in self.modules():
            if zero_init_last and isinstance(module, Bottle2neck):
                module.zero_init_last()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switches gradient checkpointing of the blocks; norm statistics stay exact."""
        set_grad_checkpointing(self, enable)

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """Returns the classifier, or its name."""
        return 'fc' if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one.

        Args:
            num_classes: Classes, 0 for none.
            global_pool: Kind of pooling, the present one if None.
        """
        self.num_classes = num_classes
        self._make_head(self.global_pool.pool_type if global_pool is None else global_pool, **get_device_dtype(self))
        for module in (self.global_pool, self.fc, self.flatten):
            module.train(self.training)

    def _taps(self, indices: int | Sequence[int] | None) -> tuple[list[int], list[str], int]:
        """Indices of features, the parts that compute them all, and the number of parts up to the last one wanted."""
        names = [info['module'] for info in self.feature_info]
        take, last = feature_take_indices(len(names), indices)
        return take, names, self.parts.index(names[last]) + 1

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Runs the parts and returns what some of them computed.

        Args:
            x: (N, in_chans, H, W).
            indices: Of `feature_info`: the last n for an int, those of a list, all if None.
            norm: Without effect, there is no final norm.
            stop_early: Stop after the last part that is to be returned.
            output_fmt: Only 'NCHW'.
            intermediates_only: Leave out the final features.

        Returns:
            Final features and a list of those of parts, or just the list; each (N, C, H / reduction, W / reduction).
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt={output_fmt!r} is not possible; choose 'NCHW'")
        take, names, end = self._taps(indices)
        intermediates = []
        for part in self.parts[:end] if stop_early else self.parts:
            x = getattr(self, part)(x)
            if part in names and names.index(part) in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what some of the features don't need.

        Args:
            indices: Features to keep, as in `forward_intermediates`.
            prune_norm: Without effect, there is no final norm.
            prune_head: Remove the classifier. It goes in any case if the last part does.

        Returns:
            The indices of these features.
        """
        take, _, end = self._taps(indices)
        for part in self.parts[end:]:
            setattr(self, part, nn.Identity())
        if end < len(self.parts):
            self.num_features = self.feature_info[max(take)]['num_chs']
        if prune_head or end < len(self.parts):
            self.reset_classifier(0, '')
        return take

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools and classifies, (N, num_features, H, W) to (N, num_classes), or (N, num_features) if `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return self.flatten(x if pre_logits else self.fc(x))

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images, (N, in_chans, H, W) to (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


def conv_norm_act(
    in_chs: int,
    out_chs: int,
    kernel_size: int,
    stride: int = 1,
    *,
    norm_layer: Layer,
    act_layer: Layer | None = None,
    **dd: Any,
) -> list[nn.Module]:
    """Makes a convolution, its norm, and an activation if there is to be one."""
    conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding=kernel_size // 2, bias=False, **dd)
    layers = [conv, norm_layer(out_chs, **dd)]
    return layers if act_layer is None else [*layers, act_layer(inplace=True)]
