"""A model of one's own, as the README's commands take it: two factories, and a script that writes the files.

Run as a script, it trains a digit classifier and leaves in the working directory: victim.safetensors,
owner.npz (training data of the owner), triggers.npz (images nobody has seen) and pool.npz (the attacker's
queries).
"""

import numpy as np
from safetensors.torch import save_file
from torch import nn

from honeytrace import data, models, training


def victim() -> nn.Module:
    """The model that is sold."""
    return models.small_cnn(10, 1, 8)


def surrogate() -> nn.Module:
    """What the attacker trains: another architecture."""
    return models.tiny_cnn(10, 1, 8)


def main() -> None:
    """Train the victim and write the files."""
    splits = data.digits()
    model = training.seeded(victim, 1)
    training.fit(model, *splits.train, epochs=5, seed=1)
    print(f"victim: {training.accuracy(model, *splits.test):.2%} of the test images")
    save_file(model.state_dict(), "victim.safetensors")
    for name, part in (("owner", splits.train), ("triggers", splits.test), ("pool", splits.pool)):
        np.savez_compressed(f"{name}.npz", inputs=part.inputs.numpy(), labels=part.labels.numpy())


if __name__ == "__main__":
    main()
