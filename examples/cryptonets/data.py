"""Real handwritten digits, as tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor

TEST_SIZE = 450  # a quarter of the 1797 digits


class Digits(NamedTuple):
    """Grey values in [0, 1] where 0 is background, so that zero padding continues the paper."""

    train_images: Tensor  # [N, 1, 28, 28] float32
    train_labels: Tensor  # [N] int64
    test_images: Tensor  # [M, 1, 28, 28] float32
    test_labels: Tensor  # [M] int64


def load_digits(seed: int) -> Digits:
    """Reads scikit-learn's digits (8 x 8, part of the package), enlarges them, splits at random."""
    dataset = datasets.load_digits()
    images = torch.tensor(dataset.images, dtype=torch.float32)[:, None] / 16  # [1797, 1, 8, 8]
    images = F.interpolate(images, size=(28, 28), mode="bilinear")  # [1797, 1, 28, 28]
    labels = torch.tensor(dataset.target)  # [1797]

    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order[:TEST_SIZE], order[TEST_SIZE:]
    return Digits(images[train], labels[train], images[test], labels[test])


def jiggle(images: Tensor, turn: float = 0.15, shift: float = 0.1) -> Tensor:
    """Turns and shifts every image by a little of its own: more digits than were written.

    Args:
        images: `[N, 1, H, W]`.
        turn: Largest angle, in radians.
        shift: Largest shift, as a fraction of half the image's size.

    Returns:
        `[N, 1, H, W]`.
    """
    angle = turn * (2 * torch.rand(len(images)) - 1)  # [N]
    dx, dy = shift * (2 * torch.rand(2, len(images)) - 1)  # [N] each
    top = torch.stack([angle.cos(), -angle.sin(), dx], dim=1)  # [N, 3]
    bottom = torch.stack([angle.sin(), angle.cos(), dy], dim=1)  # [N, 3]
    motion = torch.stack([top, bottom], dim=1)  # [N, 2, 3]
    grid = F.affine_grid(motion, list(images.shape), align_corners=False)  # [N, H, W, 2]
    return F.grid_sample(images, grid, align_corners=False)
