"""Residual networks in the form usual for small images (no halving before the first stage)."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from honeytrace.models._check import at_least

# Blocks in each of the four stages: the paper's table 1.
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def resnet(num_classes: int, in_channels: int, *, depth: int = 18, width: int = 64) -> nn.Module:
    """ResNet-`depth` for small images (He et al., arXiv 1512.03385, table 1 with the stem of section 4.2).

    The stem is one 3x3 convolution, as the paper has it for CIFAR-10, in place of the 7x7 convolution and
    the pooling it has for ImageNet. Any image size works: the last step is a mean over the image.

    Args:
        num_classes: number of classes C, at least 2.
        in_channels: channels of an image.
        depth: 18 (default) or 34.
        width: channels of the first stage, default 64 as in the paper; the feature vector has 8 * width.

    Returns:
        A module from float32 [B, in_channels, H, W] to logits [B, num_classes].

    Raises:
        TypeError, ValueError: an argument is not an int, too small, or `depth` is none of the two.
    """
    at_least("num_classes", num_classes, 2)
    at_least("in_channels", in_channels, 1)
    at_least("width", width, 1)
    if depth not in _BLOCKS:
        raise ValueError(f"depth must be one of {sorted(_BLOCKS)}, got depth={depth}")
    blocks: list[nn.Module] = []
    channels = width
    for stage, repeats in enumerate(_BLOCKS[depth]):
        for repeat in range(repeats):
            stride = 2 if stage > 0 and repeat == 0 else 1
            blocks.append(ResidualBlock(channels, width * 2**stage, stride=stride))
            channels = width * 2**stage
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(_convolution(in_channels, width), nn.BatchNorm2d(width), nn.ReLU()),
            blocks=nn.Sequential(*blocks),
            mean=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(channels, num_classes),
        )
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a short cut (the "basic block" of arXiv 1512.03385, figure 5 left).

    Maps float32 [B, in_channels, H, W] to [B, out_channels, ceil(H / stride), ceil(W / stride)]. The short
    cut is the identity, or a 1x1 convolution where the shape changes (the paper's option B).
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _convolution(in_channels, out_channels, stride=stride),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            _convolution(out_channels, out_channels),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, out_channels, ceil(H / stride), ceil(W / stride)]."""
        return torch.relu(self.residual(inputs) + self.shortcut(inputs))


def _convolution(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias: the batch normalisation behind it would take a bias away again."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
