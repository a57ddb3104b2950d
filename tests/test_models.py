"""The classifiers: shapes, head, sizes they take, errors."""

import functools

import pytest
import torch
from torch import nn

from honeytrace.models import resnet, small_cnn, tiny_cnn, vgg
from honeytrace.training import seeded

MODELS = {
    "small_cnn": lambda channels, size: small_cnn(7, channels, size, width=4),
    "tiny_cnn": lambda channels, size: tiny_cnn(7, channels, size, width=4),
    "vgg11": lambda channels, size: vgg(7, channels, size, depth=11, width=4),
    "vgg16": lambda channels, size: vgg(7, channels, size, width=2),
    "resnet18": lambda channels, size: resnet(7, channels, width=4),
    "resnet34": lambda channels, size: resnet(7, channels, depth=34, width=2),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32), (2, 9)])
def test_logits_have_one_column_a_class_and_the_head_is_linear(name: str, channels: int, size: int) -> None:
    model = seeded(functools.partial(MODELS[name], channels, size), 0).eval()
    heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert heads[-1] is model.head
    seen: list[torch.Tensor] = []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    logits = model(torch.rand(3, channels, size, size))
    assert logits.shape == (3, 7)
    assert logits.isfinite().all()
    assert seen[0].shape == (3, model.head.in_features)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_gives_what_its_rows_give_alone(name: str) -> None:
    model = seeded(functools.partial(MODELS[name], 1, 8), 0).eval()
    images = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(torch.cat([model(image[None]) for image in images]), model(images))


def test_published_sizes() -> None:
    def size(model: nn.Module) -> int:
        return sum(weight.numel() for weight in model.parameters())

    # VGG16: 14,710,464 convolution weights, 4,224 channels normalised (scale and shift), 512 x 10 + 10 in
    # the head. ResNet-18 with a 3x3 stem: the count that its many CIFAR-10 versions report.
    with torch.device("meta"):
        assert size(vgg(10, 3, 32)) == 14_710_464 + 2 * 4_224 + 5_130
        assert size(resnet(10, 3)) == 11_173_962
        assert size(small_cnn(10, 1, 28)) == 241_770


def test_same_seed_same_weights() -> None:
    first, again, other = (seeded(lambda: small_cnn(3, 1, 8), seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small_cnn(1, 1, 28), r"num_classes must be at least 2, got num_classes=1"),
        (lambda: small_cnn(10, 0, 28), r"in_channels must be at least 1, got in_channels=0"),
        (lambda: small_cnn(10, 1, 7), r"image_size must be at least 8, got image_size=7"),
        (lambda: small_cnn(10, 1, 28, width=0), r"width must be at least 1, got width=0"),
        (lambda: tiny_cnn(10, 1, 3), r"image_size must be at least 4, got image_size=3"),
        (lambda: vgg(10, 3, 32, depth=17), r"depth must be one of \[11, 13, 16, 19\], got depth=17"),
        (lambda: resnet(10, 3, depth=50), r"depth must be one of \[18, 34\], got depth=50"),
    ],
)
def test_impossible_arguments_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_types_are_named() -> None:
    with pytest.raises(TypeError, match="num_classes must be an int, got float"):
        small_cnn(10.0, 1, 28)
    with pytest.raises(TypeError, match="width must be an int, got bool"):
        vgg(10, 3, 32, width=True)
