"""Small classifiers, written plainly: what a demo, a test or an evaluation trains in seconds to minutes.

All of them map float32 ``[B, in_channels, H, W]`` to logits ``[B, num_classes]`` and end in an ``nn.Linear``
named ``head``; the input of that layer is the feature vector the watermark works on. Weights come from
PyTorch's global generator: build a model inside ``honeytrace.training.seeded`` to get the same one twice.
`TokenInput` is no model of its own: it makes a Transformers-style text classifier one of a single tensor.
"""

from honeytrace.models.cnn import small_cnn, tiny_cnn
from honeytrace.models.resnet import resnet
from honeytrace.models.token_input import TokenInput
from honeytrace.models.vgg import vgg

__all__ = ["TokenInput", "resnet", "small_cnn", "tiny_cnn", "vgg"]
