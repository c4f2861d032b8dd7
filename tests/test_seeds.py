"""The three questions that the package answers, asked as they were asked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import linfuse_ext as lf


def test_forum_convolution_and_linear_collapse_into_one() -> None:
    """Conv 5 -> 50, kernel 5, stride 2 on 13 x 13, into Linear 1250 -> 100: 845 -> 100."""
    torch.manual_seed(2023)
    conv, linear = nn.Conv2d(5, 50, 5, 2), nn.Linear(1250, 100)
    fused = lf.fuse_conv_linear(conv, linear, (13, 13))
    assert (fused.in_features, fused.out_features) == (845, 100)
    # one-hot images, the answer that was given
    with torch.no_grad():
        bias = linear(conv(torch.zeros(1, 5, 13, 13)).flatten(1))
        images = torch.eye(845).reshape(845, 5, 13, 13)
        weight = (linear(conv(images).flatten(1)) - bias).T
    torch.testing.assert_close(fused.weight.detach(), weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(fused.bias.detach(), bias[0], atol=1e-6, rtol=0)
    x = torch.randn(5, 5, 13, 13)
    y = linear(conv(x).flatten(1))
    assert torch.allclose(fused(x.flatten(1)), y, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("kernel", [3, 4])
def test_gist_convolution_to_fully_connected(stride: int, padding: int, kernel: int) -> None:
    """2 -> 5 channels on a 6 x 7 image, all of the gist's settings, to its own 1e-6."""
    image = torch.rand(1, 2, 6, 7)
    conv = nn.Conv2d(2, 5, kernel, stride=stride, padding=padding)
    linear = lf.conv_to_linear(conv, image.shape[2:])
    y = conv(image)
    assert (linear(image.flatten()).reshape(y.shape) - y).abs().max() <= 1e-6


def test_answer_composed_kernels_as_matrices() -> None:
    """Two full convolutions in a row: the product of their matrices is the matrix of one."""
    first, second = torch.rand(100, 1, 3, 3).double(), torch.rand(2, 100, 5, 5).double()
    merged = torch.conv2d(first.permute(1, 0, 2, 3), second.flip(-1, -2), padding=4).permute(
        1, 0, 2, 3
    )
    one, _ = lf.functional.conv_to_affine(first, None, 6, padding=2)
    two, _ = lf.functional.conv_to_affine(second, None, 8, padding=4)
    both, _ = lf.functional.conv_to_affine(merged, None, 6, padding=6)
    torch.testing.assert_close(two @ one, both)
