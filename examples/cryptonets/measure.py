"""Measures two networks against each other, and the ways to fuse against each other."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cryptonets.data import Digits
from cryptonets.network import describe, levels, multiplications, parameters, steps
from cryptonets.timing import medians
from cryptonets.ways import WAYS, Size, by_one_hot_images


@dataclass(frozen=True)
class NetworkFacts:
    """One network, on the test digits."""

    layers: str
    depth: int  # layers in a row
    multiplications: int  # for one image
    levels: int  # multiplications in a row
    parameters: int
    right: int  # digits read correctly
    seconds_alone: float  # for an image that comes alone
    seconds_in_batch: float  # per image, with all test digits in one batch


@dataclass(frozen=True)
class Agreement:
    """How far two networks answer alike."""

    digits: int
    same_predictions: int
    largest_logit: float
    difference: float  # largest difference of two logits


@dataclass(frozen=True)
class WayFacts:
    """One way to make the fused layer."""

    seconds: float
    error: float  # largest difference from the layer made in float64


@torch.inference_mode()
def measure_networks(
    networks: dict[str, nn.Module], digits: Digits, *, seconds: float
) -> dict[str, NetworkFacts]:
    """Facts of each network by name; timing takes `2 * seconds` for each."""
    images, labels = digits.test_images, digits.test_labels  # [M, 1, 28, 28], [M]
    alone, batch = (
        medians({name: partial(net, x) for name, net in networks.items()}, seconds=seconds)
        for x in (images[:1], images)
    )
    computed = {name: steps(network, images[0]) for name, network in networks.items()}
    return {
        name: NetworkFacts(
            layers=describe(computed[name]),
            depth=len(computed[name]),
            multiplications=multiplications(computed[name]),
            levels=levels(computed[name]),
            parameters=parameters(network),
            right=int((network(images).argmax(dim=1) == labels).sum()),
            seconds_alone=alone[name],
            seconds_in_batch=batch[name] / len(images),
        )
        for name, network in networks.items()
    }


@torch.inference_mode()
def measure_agreement(before: nn.Module, after: nn.Module, images: Tensor) -> Agreement:
    """Compares the logits and predictions of two networks on `images` `[M, 1, 28, 28]`."""
    old, new = before(images), after(images)  # [M, 10] each
    return Agreement(
        digits=len(images),
        same_predictions=int((old.argmax(dim=1) == new.argmax(dim=1)).sum()),
        largest_logit=old.abs().max().item(),
        difference=(old - new).abs().max().item(),
    )


def measure_ways(
    conv: nn.Conv2d, linear: nn.Linear, input_size: Size, *, seconds: float
) -> dict[str, WayFacts]:
    """Times every way to fuse the two layers and holds its result against float64."""
    exact = by_one_hot_images(deepcopy(conv).double(), deepcopy(linear).double(), input_size)
    times = medians(
        {name: partial(way, conv, linear, input_size) for name, way in WAYS.items()},
        seconds=seconds,
    )

    def error(result: tuple[Tensor, Tensor]) -> float:
        return max((a - b).abs().max().item() for a, b in zip(result, exact, strict=True))

    return {
        name: WayFacts(times[name], error(way(conv, linear, input_size)))
        for name, way in WAYS.items()
    }
