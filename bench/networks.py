"""Published networks in the sizes they were published in, to collapse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """One network: how it is built, the size of a sample, and where it is from."""

    name: str
    build: Callable[[], nn.Module]
    size: tuple[int, ...]
    source: str

    def inputs(self, batch: int, seed: int = 0) -> Tensor:
        """Random samples; of two batches the smaller one is the beginning of the larger one."""
        draw = torch.Generator().manual_seed(seed)
        return torch.cat([torch.randn(1, *self.size, generator=draw) for _ in range(batch)])

    @torch.no_grad()
    def trained(self) -> nn.Module:
        """The network in eval mode, every BatchNorm with the statistics of what it meets."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build()
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = 1.0
        model.train()(self.inputs(8, seed=1))
        return model.eval()


def _conv_bn(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class _Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def _cryptonets() -> nn.Module:
    def pool() -> nn.Module:
        return nn.AvgPool2d(3, stride=1, padding=1, divisor_override=1)

    return nn.Sequential(
        nn.Conv2d(1, 5, 5, stride=2, padding=1), _Square(),
        pool(), nn.Conv2d(5, 50, 5, stride=2), pool(), nn.Flatten(), nn.Linear(1250, 100),
        _Square(), nn.Linear(100, 10),
    )  # fmt: skip


class _RepVGGBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.dense, self.one = _conv_bn(c_in, c_out, 3, stride), _conv_bn(c_in, c_out, 1, stride)
        self.identity = nn.BatchNorm2d(c_in) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x) + self.one(x)
        return F.relu(y if self.identity is None else y + self.identity(x))


def _repvgg_stage() -> nn.Module:
    return nn.Sequential(_RepVGGBlock(48, 96, stride=2), *(_RepVGGBlock(96, 96) for _ in range(3)))


class _CollapsibleBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(c_in, 256, kernel, padding=kernel // 2)
        self.narrow = nn.Conv2d(256, c_out, 1)
        self.residual = c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(self.wide(x))
        return y + x if self.residual else y


class _SESR(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(_CollapsibleBlock(1, 16, 5), nn.PReLU(16))
        blocks = (nn.Sequential(_CollapsibleBlock(16, 16, 3), nn.PReLU(16)) for _ in range(5))
        self.blocks = nn.Sequential(*blocks)
        self.last = _CollapsibleBlock(16, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return F.pixel_shuffle(self.last(self.blocks(first) + first) + x, 2)


class _BasicBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        convs = _conv_bn(c_in, c_out, 3, stride), nn.ReLU(), _conv_bn(c_out, c_out, 3)
        self.body = nn.Sequential(*convs)
        self.shortcut = nn.Identity() if stride == 1 else _conv_bn(c_in, c_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _resnet18() -> nn.Module:
    shapes = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    stages = [
        block
        for c_in, c_out, stride in shapes
        for block in (_BasicBlock(c_in, c_out, stride), _BasicBlock(c_out, c_out, 1))
    ]
    return nn.Sequential(
        _conv_bn(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *stages,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000),
    )  # fmt: skip


class _InvertedResidual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = expand * c_in
        widen = [_conv_bn(c_in, wide, 1), nn.ReLU6()] if expand > 1 else []
        depthwise = [_conv_bn(wide, wide, 3, stride, groups=wide), nn.ReLU6()]
        self.body = nn.Sequential(*widen, *depthwise, _conv_bn(wide, c_out, 1))
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y + x if self.residual else y


def _mobilenet_v2() -> nn.Module:
    # expansion, channels, blocks, stride of the first one: table 2 of the paper
    table = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
             (6, 160, 3, 2), (6, 320, 1, 1)]  # fmt: skip
    blocks, c_in = [], 32
    for expand, c_out, count, stride in table:
        for number in range(count):
            blocks.append(_InvertedResidual(c_in, c_out, 1 if number else stride, expand))
            c_in = c_out
    return nn.Sequential(
        _conv_bn(3, 32, 3, 2), nn.ReLU6(), *blocks, _conv_bn(320, 1280, 1), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, 1000),
    )  # fmt: skip


def _dcgan() -> nn.Module:
    def up(c_in: int, c_out: int, stride: int, padding: int) -> list[nn.Module]:
        conv = nn.ConvTranspose2d(c_in, c_out, 4, stride, padding, bias=False)
        return [conv, nn.BatchNorm2d(c_out), nn.ReLU()]

    return nn.Sequential(
        *up(100, 512, 1, 0), *up(512, 256, 2, 1), *up(256, 128, 2, 1), *up(128, 64, 2, 1),
        nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False), nn.Tanh(),
    )  # fmt: skip


NETWORKS = [
    Network("cryptonets", _cryptonets, (1, 28, 28), "Gilad-Bachrach et al., ICML 2016"),
    Network("repvgg_stage", _repvgg_stage, (48, 56, 56), "RepVGG-A0, arXiv:2101.03697"),
    Network("sesr_m5", _SESR, (1, 64, 64), "SESR, arXiv:2103.09404"),
    Network("resnet18", _resnet18, (3, 224, 224), "He et al., arXiv:1512.03385"),
    Network("mobilenet_v2", _mobilenet_v2, (3, 224, 224), "Sandler et al., arXiv:1801.04381"),
    Network("dcgan", _dcgan, (100, 1, 1), "Radford et al., arXiv:1511.06434"),
]
