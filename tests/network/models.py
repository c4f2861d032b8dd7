"""Whole networks to collapse: published architectures, each with the trap that it sets.

Every entry of `MODELS` says what must be left of it under each policy. Those numbers are derived
by hand, in the comment above the entry, from the rules of exactness and from products counted on
paper ("a 1x1 from 8 to 4 channels: 32 a position"); they are not what an implementation printed.

All sizes are as small as the architecture allows. Parameters and running statistics are drawn
anew from a fixed seed, so that no bias is zero and no BatchNorm the identity, and are float32
numbers: the float64 and float32 versions of a network compute the same function.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

Left = Mapping[str, int]
Rows = Sequence[tuple[str, tuple[str, ...]]]


def as_they_are(inputs: list[Tensor]) -> tuple[Any, ...]:
    return tuple(inputs)


@dataclass(frozen=True)
class Entry:
    """One network and what collapsing must do to it."""

    build: Callable[[], nn.Module]
    sizes: tuple[tuple[int, ...], ...]  # of every input tensor, without the batch
    # How many operations of a kind are left (counted in the exported program). Kinds: conv
    # (transposed too), linear, layers (both together), batch_norm, pool (means too), add, mul, cat.
    cheaper: Left
    always: Left
    # (verdict, layers): some row with this verdict must name all of these layers.
    cheaper_rows: Rows = ()
    always_rows: Rows = ()
    pack: Callable[[list[Tensor]], tuple[Any, ...]] = field(default=as_they_are)

    def inputs(self, batch: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        """Positional arguments of `forward`, with float32 numbers in them whatever the dtype."""
        draw = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(batch, *size, generator=draw).to(dtype) for size in self.sizes]
        return self.pack(tensors)


def redraw(model: nn.Module) -> nn.Module:
    """Gives every parameter and running statistic a value that nothing can pass over."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_().div_((parameter.numel() / parameter.shape[0]) ** 0.5)
            elif name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.5)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model.eval()


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The network in eval mode, the same one at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        return redraw(MODELS[name].build()).to(dtype)


# As the transformers library writes them, without any download --------------------------------


def resnet_basic() -> nn.Module:
    """He et al., arXiv:1512.03385. Trap: `hidden += residual` writes in place."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 12], depths=[2, 1], layer_type="basic", num_labels=5
        )
    )


def resnet_bottleneck() -> nn.Module:
    """He et al., arXiv:1512.03385. Trap: two branches of different inputs meet in one sum."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2], num_labels=5)
    )


def regnet() -> nn.Module:
    """Radosavovic et al., arXiv:2003.13678. Trap: what a gate pools is also read by a mul."""
    from transformers import RegNetConfig, RegNetForImageClassification

    return RegNetForImageClassification(
        RegNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], groups_width=4, num_labels=5
        )
    )


def mobilenet_v2() -> nn.Module:
    """Sandler et al., arXiv:1801.04381. Traps: linear bottlenecks, padding that is not symmetric.

    With output stride 8 the last blocks are dilated. The padding of TensorFlow is an operation of
    its own, of nothing at all before a 1x1.
    """
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(
        MobileNetV2Config(
            depth_multiplier=0.05,
            depth_divisible_by=2,
            min_depth=2,
            output_stride=8,
            finegrained_output=False,
            num_labels=5,
        )
    )


def convnext() -> nn.Module:
    """Liu et al., arXiv:2201.03545. Trap: layer scale acts on the last axis, before a permute."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(
        ConvNextConfig(
            num_stages=2, patch_size=2, hidden_sizes=[8, 12], depths=[1, 1], num_labels=5
        )
    )


def _segformer(**more: Any) -> Any:
    from transformers import SegformerConfig

    return SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 12],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        num_labels=5,
        **more,
    )


def segformer() -> nn.Module:
    """Xie et al., arXiv:2105.15203. Trap: a Linear over tokens, with bias, before a padded conv."""
    from transformers import SegformerForImageClassification

    return SegformerForImageClassification(_segformer())


def segformer_segmentation() -> nn.Module:
    """Xie et al., arXiv:2105.15203. Trap: a head of several inputs, upsampled."""
    from transformers import SegformerForSemanticSegmentation

    return SegformerForSemanticSegmentation(_segformer(decoder_hidden_size=8))


def poolformer() -> nn.Module:
    """Yu et al., arXiv:2111.11418. Trap: `pool(x) - x`, where the rim is a mean of fewer values."""
    from transformers import PoolFormerConfig, PoolFormerForImageClassification

    return PoolFormerForImageClassification(
        PoolFormerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            hidden_sizes=[8, 12],
            patch_sizes=[3, 3],
            strides=[2, 2],
            padding=[1, 1],
            mlp_ratio=2.0,
            num_labels=5,
        )
    )


def swin() -> nn.Module:
    """Liu et al., arXiv:2103.14030. Trap: windows are moved into the batch axis and back again."""
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(
        SwinConfig(
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[2, 1],
            num_heads=[2, 2],
            window_size=2,
            mlp_ratio=2.0,
            num_labels=5,
        )
    )


def vit() -> nn.Module:
    """Dosovitskiy et al., arXiv:2010.11929. Traps: a constant token in a cat, a constant added."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=20,
            image_size=8,
            patch_size=4,
            num_labels=5,
        )
    )


# Networks of their own -------------------------------------------------------------------------


class CryptoNets(nn.Module):
    """Gilad-Bachrach et al., "CryptoNets", ICML 2016: the whole network that they train.

    Its pools are sums ("scaled mean pool"): mean pools with padding, times a constant. Between the
    two squares everything is one affine map from 5x13x13 to 100 numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 5, 5, stride=2, padding=1)
        self.pool = nn.AvgPool2d(3, stride=1, padding=1)
        self.second = nn.Conv2d(5, 50, 5, stride=2)
        self.hidden = nn.Linear(1250, 100)
        self.last = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).square()
        x = 9 * self.pool(x)
        x = 9 * self.pool(self.second(x))
        return self.last(self.hidden(x.flatten(1)).square())


def conv_bn(*arguments: Any, **keywords: Any) -> nn.Sequential:
    conv = nn.Conv2d(*arguments, **keywords, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))


class RepVGGBlock(nn.Module):
    """Three branches that read the same: 3x3, 1x1 and, where the shape allows, nothing at all."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.dense = conv_bn(in_channels, out_channels, 3, stride, padding=1, groups=groups)
        self.one = conv_bn(in_channels, out_channels, 1, stride, groups=groups)
        same = in_channels == out_channels and stride == 1
        self.identity = nn.BatchNorm2d(in_channels) if same else None

    def forward(self, x: Tensor) -> Tensor:
        branches = self.dense(x) + self.one(x)
        return F.relu(branches if self.identity is None else branches + self.identity(x))


class RepVGG(nn.Module):
    """Ding et al., arXiv:2101.03697. Trap: a bare BatchNorm is a branch, also beside groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            RepVGGBlock(3, 6, stride=2), RepVGGBlock(6, 6), RepVGGBlock(6, 6, groups=2)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.stages(x)).flatten(1))


class ACB(nn.Module):
    """Ding et al., "ACNet", arXiv:1908.03930. Trap: the paddings of 3x3, 1x3 and 3x1 differ."""

    def __init__(self) -> None:
        super().__init__()
        self.square = conv_bn(3, 4, 3, padding=1)
        self.row = conv_bn(3, 4, (1, 3), padding=(0, 1))
        self.column = conv_bn(3, 4, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.square(x) + self.row(x) + self.column(x))


class DBB(nn.Module):
    """Ding et al., "Diverse Branch Block", arXiv:2103.13425, with padding where torch puts it.

    Trap: the shift of the inner BatchNorms does not reach the zeros that the second layers pad
    with, so that the sum is one convolution with a bias per output position.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dense = conv_bn(4, 4, 3, padding=1)
        self.one = conv_bn(4, 4, 1)
        self.sequence = nn.Sequential(*conv_bn(4, 4, 1), *conv_bn(4, 4, 3, padding=1))
        self.average = nn.Sequential(
            *conv_bn(4, 4, 1), nn.AvgPool2d(3, stride=1, padding=1), nn.BatchNorm2d(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x) + self.one(x) + self.sequence(x) + self.average(x))


class NormAndPad(nn.Module):
    """A BatchNorm that pads with what it makes of zero: written into the border, in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.norm(x), (1, 1, 1, 1))
        norm = self.norm
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        border = (norm.bias - norm.running_mean * scale).view(1, -1, 1, 1)
        y[:, :, :1, :] = border
        y[:, :, -1:, :] = border
        y[:, :, :, :1] = border
        y[:, :, :, -1:] = border
        return y


class DBBPadded(nn.Module):
    """The Diverse Branch Block as its authors' code has it, with BNAndPadLayer.

    Trap: assignments to slices. Who overlooks that they write into `y` loses the border.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dense = conv_bn(4, 4, 3, padding=1)
        self.sequence = nn.Sequential(
            nn.Conv2d(4, 4, 1, bias=False), NormAndPad(4), *conv_bn(4, 4, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x) + self.sequence(x))


class CollapsibleBlock(nn.Module):
    """A k x k convolution into many channels, then a 1x1; and x itself where the shape allows."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(in_channels, 12, kernel_size, padding=kernel_size // 2)
        self.narrow = nn.Conv2d(12, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(self.wide(x))
        return y + x if y.shape[1] == x.shape[1] else y


class SESR(nn.Module):
    """Bhardwaj et al., "SESR", arXiv:2103.09404: super-resolution by a factor of two.

    Traps: short residuals inside affine blocks, long ones across activations, the image (one
    channel) broadcast onto four, and a PixelShuffle of the sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = CollapsibleBlock(1, 3, 5)
        self.blocks = nn.ModuleList(CollapsibleBlock(3, 3, 3) for _ in range(2))
        self.activations = nn.ModuleList(nn.PReLU(3) for _ in range(3))
        self.last = CollapsibleBlock(3, 4, 5)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.activations[0](self.first(x))
        y = first
        for block, activation in zip(self.blocks, self.activations[1:], strict=True):
            y = activation(block(y))
        return self.shuffle(self.last(y + first) + x)


class ExpandNet(nn.Module):
    """Guo et al., "ExpandNets", arXiv:1811.10495: every layer a product of several.

    Trap: the padding of a 3x3 sits on the 1x1 before it. Its bias is in the padded rim as well, so
    that this is exact as one convolution, whereas padding on the 3x3 would not be.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear_kernel = nn.Sequential(
            nn.Conv2d(3, 8, 1, padding=1), nn.Conv2d(8, 12, 3, stride=2), nn.Conv2d(12, 4, 1)
        )
        self.large_kernel = nn.Sequential(
            nn.Conv2d(4, 12, 3, padding=2), nn.Conv2d(12, 4, 3, bias=False)
        )
        self.dense = nn.Sequential(
            nn.Flatten(), nn.Linear(168, 32), nn.Linear(32, 24), nn.Linear(24, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(F.relu(self.large_kernel(F.relu(self.linear_kernel(x)))))


class Generator(nn.Sequential):
    """Radford et al., "DCGAN", arXiv:1511.06434: transposed convolutions, each with a BatchNorm.

    Trap: the weight of a transposed convolution has its output channels second and split by
    groups; the middle layer has two.
    """

    def __init__(self) -> None:
        super().__init__(
            nn.ConvTranspose2d(6, 8, 4, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 4, 4, 2, 1, groups=2, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 3, (4, 3), (2, 1), 1, bias=False),
            nn.Tanh(),
        )


class Adapted(nn.Module):
    """Hu et al., "LoRA", arXiv:2106.09685, on a convolution: `base(x) + scale * up(down(x))`."""

    def __init__(self, groups: int, adapter_groups: int, rank: int, scale: float) -> None:
        super().__init__()
        self.base = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        self.down = nn.Conv2d(8, rank, 3, padding=1, groups=adapter_groups, bias=False)
        self.up = nn.Conv2d(rank, 8, 1, groups=adapter_groups, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.up(self.down(x))


class LoRA(nn.Module):
    """Adapters on a dense and on grouped convolutions. Trap: the merged groups, and their price."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = Adapted(1, 1, 2, 1.5)
        self.grouped = Adapted(2, 2, 4, -0.5)
        self.mixed = Adapted(2, 1, 2, 0.25)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.mixed(F.relu(self.grouped(F.relu(self.dense(x))))))


class Inception(nn.Module):
    """Szegedy et al., arXiv:1409.4842: four branches and their concatenation, here linear ones.

    Trap: reductions to few channels, and pooling before a 1x1, are there because they are cheap.
    """

    def __init__(self) -> None:
        super().__init__()
        self.one = conv_bn(8, 4, 1)
        self.three = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), *conv_bn(8, 4, 3, padding=1))
        self.five = nn.Sequential(nn.Conv2d(8, 1, 1, bias=False), *conv_bn(1, 4, 5, padding=2))
        self.pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1), *conv_bn(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], 1))


class LowRank(nn.Module):
    """Denton et al., arXiv:1404.0736: a product of thin matrices in place of a square one.

    Trap: 64 -> 8 -> 64 is eight times dearer in one piece than the two are. Where two such follow
    each other only the middle is worth a merge.
    """

    def __init__(self) -> None:
        super().__init__()
        self.thin = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 64))
        self.chain = nn.Sequential(
            nn.Linear(64, 8), nn.Linear(8, 64), nn.Linear(64, 8), nn.Linear(8, 64)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.chain(F.relu(self.thin(x))))


class Rectangular(nn.Module):
    """A net for 7 x 12 images with other strides, kernels and paddings along each axis.

    Trap: padding between two convolutions hides values of the first, so that one convolution is
    wrong on the rim: DingXiaoH/DiverseBranchBlock#9. A Linear is right and dear.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0))
        self.second = nn.Conv2d(4, 5, 3, padding=(1, 2))
        self.head = nn.Linear(260, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.first(x))).flatten(1))


class SharedModule(nn.Module):
    """One convolution with its BatchNorm, called twice, as recurrent networks do.

    Source: Liang and Hu, "Recurrent convolutional neural network", CVPR 2015. Trap: what is folded
    into the convolution for one call is there at the other as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.last = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return F.relu(self.last(self.conv(y)))


class TiedWeights(nn.Module):
    """Weights used twice: by two layers, and transposed as in a tied autoencoder.

    Source: Press and Wolf, arXiv:1608.05859. Trap: a merge into one of them must not be seen by the
    others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 10)
        self.second = nn.Linear(10, 10)
        self.second.weight = self.first.weight
        self.second_norm = nn.BatchNorm1d(10)
        self.back_norm = nn.BatchNorm1d(10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        z = F.relu(self.second_norm(self.second(y)))
        return self.back_norm(F.linear(z, self.first.weight.t()))


class TokenNorm(nn.Module):
    """Graham et al., "LeViT", arXiv:2104.01136: a BatchNorm behind each Linear on tokens.

    Trap: for the BatchNorm the batch and the tokens are one axis, which is parted again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.up_norm = nn.BatchNorm1d(6)
        self.down = nn.Linear(6, 4)
        self.down_norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y = F.hardswish(self.up_norm(y.flatten(0, 1)).reshape_as(y))
        z = self.down(y)
        return x + self.down_norm(z.flatten(0, 1)).reshape_as(z)


class TwoInTwoOut(nn.Module):
    """An image and a vector give logits and a gate, in the manner of FiLM (arXiv:1709.07871).

    Trap: `right` feeds two layers and `logits` is a sum over both inputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.left = nn.Linear(4, 6)
        self.right = nn.Linear(5, 6)
        self.right_norm = nn.BatchNorm1d(6)
        self.gate = nn.Linear(6, 2)

    def forward(self, image: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        left = self.left(self.pool(F.relu(self.norm(self.conv(image)))).flatten(1))
        right = self.right_norm(self.right(vector))
        return left + right, torch.sigmoid(self.gate(right))


class Nested(nn.Module):
    """Inputs and outputs in dicts, lists and tuples, as detectors have them.

    Trap: the order of the tensors, and an input that is handed out as it came.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.identity = nn.Identity()
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(4, 4)

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        signal, (vector, untouched) = batch["signal"], batch["more"]
        y = self.identity(self.norm(self.dropout(self.conv(signal))))
        return {"last": [F.relu(y), untouched], "first": (self.linear(2 * vector + 1),)}


class PreActivation(nn.Module):
    """He et al., "Identity mappings", arXiv:1603.05027: BatchNorm and ReLU before each convolution.

    Trap: a BatchNorm behind a sum, or behind a value that is read elsewhere too, has no layer to go
    into.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(5))
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(4))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in range(2):
            y = x
            for number in (2 * block, 2 * block + 1):
                y = self.convs[number](F.relu(self.norms[number](y)))
            x = x + y
        return self.head(self.pool(F.relu(self.norms[4](x))).flatten(1))


class KeepsIntermediate(nn.Module):
    """Returns values from the middle of affine stretches, as feature extractors do.

    Trap (Marabou#736): a merged layer no longer computes what somebody else reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.second = nn.Conv2d(3, 4, 3)
        self.second_norm = nn.BatchNorm2d(4)
        self.third = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = self.first(x)
        behind = self.second_norm(self.second(self.norm(before)))
        return before, behind, F.relu(self.third(behind))


class Separable3d(nn.Module):
    """Tran et al., "R(2+1)D", arXiv:1711.11248: space, then time, here with nothing in between.

    Trap: the second layer pads, but only along the axis on which the first does nothing: exact as
    one convolution, axis by axis. It is also dearer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.space = nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.time = nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.norm = nn.BatchNorm3d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.time(self.space(x))))


class CausalBlock(nn.Module):
    """Dilated convolution with weight normalisation, of which the values of the future are cut."""

    def __init__(self, in_channels: int, dilation: int) -> None:
        super().__init__()
        self.ahead = 2 * dilation
        conv = nn.Conv1d(in_channels, 4, 3, padding=self.ahead, dilation=dilation)
        self.conv = weight_norm(conv)
        self.dropout = nn.Dropout(0.2)
        self.residual = nn.Conv1d(in_channels, 4, 1) if in_channels != 4 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(F.relu(self.conv(x)[:, :, : -self.ahead]))
        return F.relu(y + self.residual(x))


class TCN(nn.Module):
    """Bai et al., arXiv:1803.01271. Traps: parametrised weights, a slice, the last step only."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(CausalBlock(2, 1), CausalBlock(4, 2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)[:, :, -1])


def nest(tensors: list[Tensor]) -> tuple[Any, ...]:
    signal, vector, untouched = tensors
    return ({"signal": signal, "more": (vector, untouched)},)


PUBLISHED: dict[str, Entry] = {
    # Stem 1, first stage 2 blocks x 2, second stage 2 + 1 shortcut: 8 convolutions, each with a
    # BatchNorm. Pool of 12x3x4 (144 additions) and Linear 12 -> 5 (60) against one Linear
    # 144 -> 5 (720): dearer, but exact.
    "resnet_basic": Entry(
        resnet_basic,
        ((3, 24, 32),),
        {"conv": 8, "linear": 1, "batch_norm": 0, "pool": 1},
        {"conv": 8, "linear": 1, "batch_norm": 0, "pool": 0},
        [
            (
                "fused",
                ("resnet.embedder.embedder.convolution", "resnet.embedder.embedder.normalization"),
            ),
            ("declined", ("resnet.pooler", "classifier.1")),
        ],
        [("fused", ("resnet.pooler", "classifier.1"))],
    ),
    # Stem 1; one block of 3 + 1 shortcut; one of 3 + 1, one of 3.
    "resnet_bottleneck": Entry(
        resnet_bottleneck,
        ((3, 24, 32),),
        {"conv": 12, "linear": 1, "batch_norm": 0, "pool": 1},
        {"conv": 12, "linear": 1, "batch_norm": 0, "pool": 0},
    ),
    # Stem 1; blocks of 3 + 1 shortcut + 2 in the gate, the same, and 3 + 2: 18. Each gate pools
    # and then maps C -> r by a 1x1: C (H W + r) against C H W r, dearer for r > 1 (r is 2, 2, 4).
    "regnet": Entry(
        regnet,
        ((3, 24, 32),),
        {"conv": 18, "linear": 1, "batch_norm": 0, "pool": 4},
        {"layers": 19, "batch_norm": 0, "pool": 0},
    ),
    # Stem 3, 16 blocks x 3, last 1: 52. A projection and the next expansion are one affine map
    # unless a residual reads the value between them: behind the stem, 2 -> 2 -> 12 (4 + 24, one
    # 2 -> 12 is 24: cheaper), and behind the last block, 48 -> 16 -> 64 (768 + 1024, one
    # 48 -> 64 is 3072: dearer).
    "mobilenet_v2": Entry(
        mobilenet_v2,
        ((3, 32, 24),),
        {"conv": 51, "linear": 1, "batch_norm": 0, "pool": 1},
        {"conv": 50, "linear": 1, "batch_norm": 0, "pool": 0},
        [
            (
                "fused",
                (
                    "mobilenet_v2.conv_stem.reduce_1x1.convolution",
                    "mobilenet_v2.layer.0.expand_1x1.convolution",
                ),
            ),
            (
                "declined",
                (
                    "mobilenet_v2.layer.15.reduce_1x1.convolution",
                    "mobilenet_v2.conv_1x1.convolution",
                ),
            ),
        ],
    ),
    # Patches 1, a depthwise layer in each of 2 blocks, 1 between the stages; 2 x 2 Linears and the
    # head. The layer scales go into the Linears before them.
    "convnext": Entry(
        convnext,
        ((3, 8, 12),),
        {"conv": 4, "linear": 5, "mul": 0},
        {"layers": 9, "mul": 0},
        [("fused", ("convnext.encoder.stages.0.layers.0.pwconv2",))],
    ),
    # 2 patch embeddings, 1 sequence reduction, 2 depthwise layers; 2 x 6 Linears and the head.
    # fc1 (C -> 2C, 2 C^2) and the depthwise 3x3 on 2C (18 C) against a dense 3x3 C -> 2C (18 C^2):
    # dearer; padding hides the bias of fc1, so a map or a Linear, and still one layer.
    # The mean over 6 tokens of 12 and Linear 12 -> 5: 72 + 60 against 360.
    "segformer": Entry(
        segformer,
        ((3, 16, 24),),
        {"conv": 5, "linear": 13, "pool": 1},
        {"layers": 16, "pool": 0},
        [
            (
                "declined",
                (
                    "segformer.stages.0.blocks.0.mlp.fc1",
                    "segformer.stages.0.blocks.0.mlp.dwconv.dwconv",
                ),
            )
        ],
    ),
    # The BatchNorm of the head goes into the 1x1 before it. That 1x1 could itself be pulled back
    # through the concatenation and the upsampling into both projections; no number is required.
    "segformer_segmentation": Entry(
        segformer_segmentation, ((3, 16, 24),), {"batch_norm": 0}, {"batch_norm": 0}
    ),
    # 2 patch embeddings, 2 x 2 pointwise layers. The layer scales go into the second of these;
    # those behind the pools stay, unless pool, difference and scale become a Linear each (no conv:
    # the rim is scaled in another way). Mean of 12x3x4 and Linear 12 -> 5: 144 + 60 against 720.
    "poolformer": Entry(
        poolformer,
        ((3, 12, 16),),
        {"conv": 6, "linear": 1, "pool": 3, "mul": 2},
        {"conv": 6, "linear": 3, "pool": 0, "mul": 0},
        [("declined", ("poolformer.encoder.block.0.0.pooling.pool",))],
        [("fused", ("poolformer.encoder.block.0.0.pooling.pool",))],
    ),
    # Patches 1; 3 x (query, key, value, output, 2 in the MLP), the patch merging and the head.
    "swin": Entry(
        swin, ((3, 16, 16),), {"conv": 1, "linear": 20, "pool": 1}, {"layers": 21, "pool": 0}
    ),
    # Patches 1; 2 x (query, key, value, output, 2 in the MLP) and the head.
    "vit": Entry(vit, ((3, 8, 8),), {"conv": 1, "linear": 13}, {"layers": 14}),
}

SMALL: dict[str, Entry] = {
    # Products between the squares: sums 9 * 845, conv 125 * 50 * 25 = 156250, sums 9 * 1250, Linear
    # 125000; one Linear 845 -> 100 has 84500, and 84600 parameters in place of 131400.
    "cryptonets": Entry(
        CryptoNets,
        ((1, 28, 28),),
        {"conv": 1, "linear": 2, "pool": 0, "mul": 0},
        {"conv": 1, "linear": 2, "pool": 0, "mul": 0},
        [("fused", ("pool", "second", "hidden"))],
        [("fused", ("pool", "second", "hidden"))],
    ),
    # One convolution a block, in groups where both branches are. Pool of 6x4x5 and Linear 6 -> 4:
    # 120 + 24 against 480.
    "repvgg": Entry(
        RepVGG,
        ((3, 8, 9),),
        {"conv": 3, "linear": 1, "batch_norm": 0, "add": 0, "pool": 1},
        {"conv": 3, "linear": 1, "batch_norm": 0, "add": 0, "pool": 0},
        [
            ("fused", ("stages.1.dense.0", "stages.1.one.0", "stages.1.identity")),
            ("declined", ("pool", "head")),
        ],
        [("fused", ("pool", "head"))],
    ),
    "acb": Entry(
        ACB,
        ((3, 7, 9),),
        {"conv": 1, "batch_norm": 0, "add": 0},
        {"conv": 1, "batch_norm": 0, "add": 0},
        [("fused", ("square.0", "square.1", "row.0", "row.1", "column.0", "column.1"))],
    ),
    # A position: 144 + 16 + (16 + 144) + (16 + 36) products and sums against 144. One add is left:
    # that of the map.
    "dbb": Entry(
        DBB,
        ((4, 7, 9),),
        {"conv": 1, "batch_norm": 0, "pool": 0, "add": 1},
        {"conv": 1, "batch_norm": 0, "pool": 0, "add": 1},
        [("fused", ("dense.0", "one.0", "sequence.0", "sequence.2", "average.0", "average.2"))],
    ),
    # Nothing is required behind the assignments; the other branch is a convolution and a BatchNorm.
    "dbb_padded": Entry(DBBPadded, ((4, 7, 9),), {}, {}, [("fused", ("dense.0", "dense.1"))]),
    # First, two blocks, last: one convolution each, the short residuals inside. The two long ones
    # are left.
    "sesr": Entry(
        SESR,
        ((1, 6, 7),),
        {"conv": 4, "add": 2},
        {"layers": 4},
        [("fused", ("blocks.0.wide", "blocks.0.narrow"))],
    ),
    # 3x3 from 3 to 4 channels; 5x5 from 4 to 4 (25 * 16 a position, against 2 * 9 * 48); 168 -> 5.
    "expandnet": Entry(
        ExpandNet,
        ((3, 12, 14),),
        {"conv": 2, "linear": 1},
        {"conv": 2, "linear": 1},
        [
            ("fused", ("linear_kernel.0", "linear_kernel.1", "linear_kernel.2")),
            ("fused", ("large_kernel.0", "large_kernel.1")),
            ("fused", ("dense.1", "dense.2", "dense.3")),
        ],
    ),
    "dcgan": Entry(
        Generator,
        ((6, 1, 1),),
        {"conv": 3, "batch_norm": 0},
        {"conv": 3, "batch_norm": 0},
        [("fused", ("0", "1")), ("fused", ("3", "4"))],
    ),
    # A position, dense: 576 + 144 + 16 against 576. Grouped: 288 + 144 + 16 against 288. Mixed:
    # 288 + 144 + 16 = 448 against a dense 576: three layers stay, the scale goes into `up`.
    "lora": Entry(
        LoRA,
        ((8, 5, 6),),
        {"conv": 5, "mul": 0, "add": 1},
        {"conv": 3, "mul": 0, "add": 0},
        [
            ("fused", ("dense.base", "dense.down", "dense.up")),
            ("fused", ("grouped.base", "grouped.down", "grouped.up")),
        ],
        [("fused", ("mixed.base", "mixed.down", "mixed.up"))],
    ),
    # A position: one 32; three 64 + 288 against 288; five 8 + 100 against 800; pooled 72 + 32
    # against 288; all in one 5x5 from 8 to 16 channels 3200. Only `three` is worth it.
    "inception": Entry(
        Inception,
        ((8, 6, 7),),
        {"conv": 5, "batch_norm": 0, "pool": 1, "cat": 1},
        {"conv": 1, "batch_norm": 0, "pool": 0, "cat": 0},
        [("fused", ("three.0", "three.1", "three.2"))],
        [("fused", ("one.0", "three.0", "three.1", "five.0", "five.1", "pooled.0", "pooled.1"))],
    ),
    # 64 -> 8 -> 64: 1024 products against 4096. The chain of four: 2048, in one piece 4096, but its
    # middle 8 -> 64 -> 8 is 64 in place of 1024, and 64 -> 8 -> 8 then 512: two layers, 1024.
    "low_rank": Entry(
        LowRank,
        ((64,),),
        {"linear": 4},
        {"linear": 2},
        [("declined", ("thin.0", "thin.1")), ("fused", ("chain.1", "chain.2"))],
        [("fused", ("thin.0", "thin.1")), ("fused", ("chain.0", "chain.1", "chain.2", "chain.3"))],
    ),
    # Products: 18 * 4 * 44 + 36 * 5 * 52 = 12528, as a Linear 252 -> 260 they are 65520.
    "rectangular": Entry(
        Rectangular,
        ((3, 7, 12),),
        {"conv": 2, "linear": 1},
        {"conv": 0, "linear": 2},
        [("declined", ("first", "second"))],
        [("fused", ("first", "second"))],
    ),
    # Whether each call gets a layer of its own is left open.
    "shared_module": Entry(SharedModule, ((3, 5, 6),), {"conv": 2}, {"conv": 2}),
    "tied_weights": Entry(
        TiedWeights,
        ((10,),),
        {"linear": 3, "batch_norm": 0},
        {"linear": 3, "batch_norm": 0},
        [("fused", ("second", "second_norm"))],
    ),
    # Whether what happens between the two reshapes is found is left open.
    "token_norm": Entry(TokenNorm, ((5, 4),), {"linear": 2}, {"linear": 2}),
    # Pool of 4x3x4 and Linear 4 -> 6: 48 + 24 against 288. `right` is read twice: it stays.
    "two_in_two_out": Entry(
        TwoInTwoOut,
        ((2, 5, 6), (5,)),
        {"conv": 1, "linear": 3, "batch_norm": 0, "pool": 1, "add": 1},
        {"conv": 1, "linear": 3, "batch_norm": 0, "pool": 0, "add": 1},
        [("fused", ("right", "right_norm")), ("declined", ("pool", "left"))],
        [("fused", ("pool", "left"))],
    ),
    "nested": Entry(
        Nested,
        ((2, 7), (4,), (3,)),
        {"conv": 1, "linear": 1, "batch_norm": 0, "add": 0, "mul": 0},
        {"conv": 1, "linear": 1, "batch_norm": 0, "add": 0, "mul": 0},
        [("fused", ("conv", "norm"))],
        pack=nest,
    ),
    # Of 5 BatchNorms two follow a convolution that nothing else reads. Pool of 4x5x6 and Linear
    # 4 -> 3: 120 + 12 against 360.
    "pre_activation": Entry(
        PreActivation,
        ((2, 5, 6),),
        {"conv": 5, "batch_norm": 3, "pool": 1, "add": 2},
        {"conv": 5, "batch_norm": 3, "pool": 0, "add": 2},
        [("fused", ("convs.0", "norms.1")), ("fused", ("convs.2", "norms.3"))],
    ),
    # `norm` goes into `second`, which does not pad; `second_norm` too. `before` and `behind` are
    # read outside.
    "keeps_intermediate": Entry(
        KeepsIntermediate,
        ((2, 6, 7),),
        {"conv": 3, "batch_norm": 0},
        {"conv": 3, "batch_norm": 0},
        [("fused", ("norm", "second", "second_norm"))],
    ),
    # A position: 72 + 48 against 216.
    "separable_3d": Entry(
        Separable3d,
        ((2, 4, 5, 6),),
        {"conv": 2, "batch_norm": 0},
        {"conv": 1, "batch_norm": 0},
        [("fused", ("time", "norm"))],
        [("fused", ("space", "time", "norm"))],
    ),
    # Two causal layers, a 1x1 on the residual of the first block, the head on the last step.
    "tcn": Entry(TCN, ((2, 9),), {"conv": 3, "linear": 1}, {"layers": 4}),
}

MODELS = {**PUBLISHED, **SMALL}
