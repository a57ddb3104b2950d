"""Two plain convolutional networks for images of 8 to some 64 pixels a side."""

from collections import OrderedDict

from torch import nn

from honeytrace.models._check import at_least


def small_cnn(num_classes: int, in_channels: int, image_size: int, width: int = 32) -> nn.Module:
    """Three convolutions of 3x3, each followed by a 2x2 maximum, then a hidden layer: the default victim.

    Args:
        num_classes: number of classes C, at least 2.
        in_channels: channels of an image.
        image_size: height and width of an image, at least 8 (three halvings leave one pixel).
        width: channels of the first convolution; the next two have 2 and 4 times as many, and the feature
            vector has 4 * width entries. Default 32: 128 features and 241,770 weights for 28x28 grey images.

    Returns:
        A module from float32 [B, in_channels, image_size, image_size] to logits [B, num_classes].

    Raises:
        TypeError, ValueError: an argument is not an int, or too small.
    """
    _check(num_classes, in_channels, image_size, width, smallest=8)
    side = image_size // 2 // 2 // 2
    features = 4 * width
    return nn.Sequential(
        OrderedDict(
            block1=_block(in_channels, width, kernel=3),
            block2=_block(width, 2 * width, kernel=3),
            block3=_block(2 * width, 4 * width, kernel=3),
            flatten=nn.Flatten(),
            hidden=nn.Linear(4 * width * side * side, features),
            relu=nn.ReLU(),
            head=nn.Linear(features, num_classes),
        )
    )


def tiny_cnn(num_classes: int, in_channels: int, image_size: int, width: int = 16) -> nn.Module:
    """Two convolutions of 5x5 and one hidden layer: the smaller, different surrogate (LeNet's plan).

    Source of the plan: LeCun et al., "Gradient-Based Learning Applied to Document Recognition" (1998), II.B.

    Args:
        num_classes: number of classes C, at least 2.
        in_channels: channels of an image.
        image_size: height and width of an image, at least 4 (two halvings leave one pixel).
        width: channels of the first convolution; the second has twice as many, and the feature vector has
            4 * width entries. Default 16: 64 features.

    Returns:
        A module from float32 [B, in_channels, image_size, image_size] to logits [B, num_classes].

    Raises:
        TypeError, ValueError: an argument is not an int, or too small.
    """
    _check(num_classes, in_channels, image_size, width, smallest=4)
    side = image_size // 2 // 2
    features = 4 * width
    return nn.Sequential(
        OrderedDict(
            block1=_block(in_channels, width, kernel=5),
            block2=_block(width, 2 * width, kernel=5),
            flatten=nn.Flatten(),
            hidden=nn.Linear(2 * width * side * side, features),
            relu=nn.ReLU(),
            head=nn.Linear(features, num_classes),
        )
    )


def _block(in_channels: int, out_channels: int, *, kernel: int) -> nn.Sequential:
    """Convolution that keeps the size, 2x2 maximum, batch normalisation, ReLU.

    The maximum comes first because whatever follows it then sees a quarter of the values: on a CPU the
    element-wise layers would otherwise cost about as much as the convolution. No bias: batch normalisation
    would take it away again.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def _check(num_classes: int, in_channels: int, image_size: int, width: int, *, smallest: int) -> None:
    at_least("num_classes", num_classes, 2)
    at_least("in_channels", in_channels, 1)
    at_least("image_size", image_size, smallest)
    at_least("width", width, 1)
