"""A network that can read encrypted digits, and what it costs to run it.

Homomorphic encryption adds and multiplies numbers it cannot see, and nothing else: no ReLU, no max.
So the activation is the square and the pools are sums, as in CryptoNets (Gilad-Bachrach et al.,
"CryptoNets: Applying Neural Networks to Encrypted Data", ICML 2016), whose network this is.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Square(nn.Module):
    """`x * x`, element by element: an activation that encryption allows."""

    def forward(self, x: Tensor) -> Tensor:
        """Squares a tensor of any shape."""
        return x * x


def sum_pool() -> nn.AvgPool2d:
    """The paper's scaled mean pool: 3 x 3 sums, as a mean would cost a multiplication."""
    return nn.AvgPool2d(3, stride=1, padding=1, divisor_override=1)


def cryptonet() -> nn.Sequential:
    """The network of the paper, from images `[N, 1, 28, 28]` to logits `[N, 10]`."""
    layers = OrderedDict(
        conv1=nn.Conv2d(1, 5, kernel_size=5, stride=2, padding=1),  # -> [N, 5, 13, 13]
        square1=Square(),
        pool1=sum_pool(),
        conv2=nn.Conv2d(5, 50, kernel_size=5, stride=2),  # -> [N, 50, 5, 5]
        pool2=sum_pool(),
        flatten=nn.Flatten(),
        hidden=nn.Linear(1250, 100),  # -> [N, 100]
        square2=Square(),
        output=nn.Linear(100, 10),  # -> [N, 10]
    )
    return nn.Sequential(layers)


class Step(NamedTuple):
    """One step of a network that computes."""

    name: str
    multiplications: int  # for one image, those with padding's zeros included


@torch.inference_mode(False)  # which would name the operations by other names
@torch.no_grad()
def steps(network: nn.Module, image: Tensor) -> list[Step]:
    """What a network, whatever it is made of, does to one image `[1, 28, 28]`."""
    x = image[None]
    with _Recorder() as recorder:
        network(x)
    return recorder.steps


class _Recorder(TorchDispatchMode):
    """Notes what torch is asked to compute, below all modules."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: tuple = (), keywords: dict | None = None
    ) -> Any:
        """Computes the operation and counts its multiplications."""
        result = operation(*arguments, **(keywords or {}))
        match operation.overloadpacket:
            case aten.convolution:
                c_out, c_in, *_ = arguments[1].shape
                positions = result[0, 0].numel()
                self._note(f"Conv({c_in}, {c_out})", arguments[1].numel() * positions)
            case aten.addmm:
                inputs, outputs = arguments[2].shape
                self._note(f"Linear({inputs}, {outputs})", inputs * outputs)
            case aten.mul if arguments[0] is arguments[1]:
                self._note("x²", result.numel())
            case aten.avg_pool2d:
                self._note("pool", 0)
            case aten.t | aten.view:
                pass  # these compute nothing
            case unknown:
                raise NotImplementedError(f"nobody has said what {unknown} costs")
        return result

    def _note(self, name: str, multiplications: int) -> None:
        self.steps.append(Step(name, multiplications))


def describe(network: list[Step]) -> str:
    """The steps in one line."""
    return " → ".join(step.name for step in network)


def multiplications(network: list[Step]) -> int:
    """Multiplications for one image."""
    return sum(step.multiplications for step in network)


def levels(network: list[Step]) -> int:
    """Multiplications in a row; a sum has none."""
    return sum(step.multiplications > 0 for step in network)


def parameters(network: nn.Module) -> int:
    """Numbers in all weights and biases."""
    return sum(parameter.numel() for parameter in network.parameters())
