"""VGG with batch normalisation, in the form usual for 32x32 images (one linear layer at the end)."""

from collections import OrderedDict

from torch import nn

from honeytrace.models._check import at_least

# Convolutions in each of the five stages: configurations A, B, D, E of the paper's table 1.
_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
# Channels of each stage, in multiples of the first stage's.
_CHANNELS = (1, 2, 4, 8, 8)


def vgg(
    num_classes: int, in_channels: int, image_size: int, *, depth: int = 16, width: int = 64
) -> nn.Module:
    """VGG-`depth` with batch normalisation (Simonyan & Zisserman, arXiv 1409.1556, table 1).

    For small images, as in the code of Neural Honeytrace: the three linear layers of the paper become one,
    behind a mean over what is left of the image. A stage's halving is left out once the image is one pixel.

    Args:
        num_classes: number of classes C, at least 2.
        in_channels: channels of an image.
        image_size: height and width of an image; 32 is what the plan is made for, 8 works.
        depth: 11, 13, 16 (default) or 19 layers with weights, in the paper's count.
        width: channels of the first stage, default 64 as in the paper; the feature vector has 8 * width.

    Returns:
        A module from float32 [B, in_channels, image_size, image_size] to logits [B, num_classes].

    Raises:
        TypeError, ValueError: an argument is not an int, too small, or `depth` is none of the four.
    """
    at_least("num_classes", num_classes, 2)
    at_least("in_channels", in_channels, 1)
    at_least("image_size", image_size, 1)
    at_least("width", width, 1)
    if depth not in _STAGES:
        raise ValueError(f"depth must be one of {sorted(_STAGES)}, got depth={depth}")
    layers: list[nn.Module] = []
    channels, side = in_channels, image_size
    for repeats, multiple in zip(_STAGES[depth], _CHANNELS, strict=True):
        for _ in range(repeats):
            # No bias: batch normalisation would take it away again.
            convolution = nn.Conv2d(channels, multiple * width, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(multiple * width), nn.ReLU()]
            channels = multiple * width
        if side > 1:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    return nn.Sequential(
        OrderedDict(
            stages=nn.Sequential(*layers),
            mean=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(channels, num_classes),
        )
    )
