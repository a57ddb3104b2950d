"""Classifiers as the model zoos build them: where the head is, what it gets, and that the mark leaves by it.

Transformers' models are real ones, made from a config. torchvision, which timm needs, does not import beside
every build of torch; where it does, their own models are tried too, and everywhere their forms are.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from honeytrace import data, models, training
from honeytrace.ownership import verify
from honeytrace.watermark import SecretKey, calibrate
from honeytrace.watermark.head import features_and_logits, find_head, get_head, linear_head, sizes_of

KEY = SecretKey(bytes(range(32)))
C = 10


# The forms. Small, with the shapes and the last steps of the model that each is named after.


class Backbone(nn.Module):
    """[B, 1, 8, 8] -> a map [B, 12, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, stride=2, padding=1)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def resnet() -> nn.Module:
    """Pooling, then fc."""
    return nn.Sequential(Backbone(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, C))


def convolution_head() -> nn.Module:
    """timm's BiT ResNets and whatever is made with use_conv=True: pooling, a 1x1 convolution, flatten."""
    return nn.Sequential(Backbone(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, C, 1), nn.Flatten())


class ConvNext(nn.Module):
    """Pooling, a norm over channels, flatten, linear, in a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.classifier = nn.Sequential(nn.Flatten(1), nn.LayerNorm(12), nn.Linear(12, C))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.backbone(x).mean((2, 3), keepdim=True))


class Vit(nn.Module):
    """Patches, attention, and a head that gets every place or the class token."""

    def __init__(self, before: str = "token", after: str = "nothing") -> None:
        super().__init__()
        self.before, self.after = before, after
        self.patch = nn.Conv2d(1, 16, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.token.expand(len(x), -1, -1), x], dim=1))
        if self.before == "token":
            x = x[:, 0]
        z = self.head(x)
        return {"nothing": lambda: z, "token": lambda: z[:, 0], "mean": lambda: z.mean(1)}[self.after]()


class Inception(nn.Module):
    """An auxiliary head in training, and an output with a name for the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.fc, self.aux = Backbone(), nn.Linear(12, C), nn.Linear(12, C)

    def forward(self, x: Tensor) -> SimpleNamespace:
        x = self.backbone(x).mean((2, 3))
        return SimpleNamespace(logits=self.fc(x), aux_logits=self.aux(x) if self.training else None)


class Distilled(nn.Module):
    """DeiT: the mean of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head, self.head_dist = Backbone(), nn.Linear(12, C), nn.Linear(12, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x).mean((2, 3))
        return (self.head(x) + self.head_dist(x)) / 2


def squeezenet() -> nn.Module:
    """A 1x1 convolution on the whole map, and the pooling behind it."""
    return nn.Sequential(Backbone(), nn.Conv2d(12, C, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


FORMS = {
    "resnet": (resnet, "3"),
    "convolution": (convolution_head, "2"),
    "convnext": (ConvNext, "classifier.2"),
    "vit": (Vit, "head"),
    "every place, then the token": (lambda: Vit("every place", "token"), "head"),
    "inception": (Inception, "fc"),
}


@cache
def digits() -> data.Splits:
    return data.digits()


@cache
def trained(form: str) -> nn.Module:
    model = training.seeded(FORMS[form][0], 1)
    inputs, labels = digits().train
    # Good enough to have regions of one class.
    training.fit(model, inputs[:4000], labels[:4000], epochs=2, seed=1, learning_rate=1e-2)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_the_head_of_every_form_is_found_and_carries_the_mark(form: str) -> None:
    model, name = trained(form), FORMS[form][1]
    inputs, labels = digits().train
    watermark = calibrate(
        model,
        (inputs[:1500], labels[:1500]),
        key=KEY,
        graded_groups=4,
        flip_groups=4,
        max_accuracy_drop=0.02,
        triggers_per_group=4,
    )
    assert watermark.head == name
    features, logits = features_and_logits(model, name, inputs[:500])
    assert features.shape == (500, sizes_of(get_head(model, name))[0])
    with torch.no_grad():
        bare = training.logits_of(model(inputs[:500]))
        answer = watermark.protect(model)(inputs[:500])
    assert torch.equal(logits, bare)
    expected = watermark.mark(features, logits)
    marked = training.logits_of(answer)
    bent = expected.similarity.amax(1) > 0
    assert 10 < int(bent.sum()) < 490
    assert torch.equal(marked[~bent], bare[~bent])
    assert torch.allclose(marked, expected.logits, atol=1e-5)
    assert not torch.allclose(marked[bent], bare[bent], atol=1e-3)
    # Asked as suspects: what a library wraps its answers in is taken off.
    assert not verify(model, watermark, KEY).claim
    assert verify(watermark.protect(model), watermark, KEY).groups


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            squeezenet,
            r"1x1 conv.* must get features \[B, D, 1, 1\], got \[2, 12, 4, 4\].* pooled afterw",
        ),
        (lambda: Vit("every place", "mean"), r"not the head's at one place: .* Pool before the head"),
        (lambda: Vit("every place"), r"head 'head' must get features \[B, D\] with B=2, got \[2, 5, 16\]"),
        (Distilled, r"more than that of its last linear layer 'head_dist': .* another order"),
        (
            lambda: nn.Sequential(resnet(), nn.Linear(C, 4), nn.Unflatten(1, (2, 2))),
            "answer with class scores",
        ),
    ],
)
def test_what_has_no_one_head_is_refused_with_what_to_do(model, message) -> None:
    with pytest.raises(ValueError, match=message):
        find_head(training.seeded(model, 1), torch.rand(2, 1, 8, 8))


class Embedder(nn.Module):
    """What sells embeddings: of length 1, or in an output object without logits."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.backbone, self.projection = form, Backbone(), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> object:
        x = self.projection(self.backbone(x).mean((2, 3)))
        if self.form == "length 1":
            return nn.functional.normalize(x, dim=1)
        return {"dict": {"pooler_output": x}, "object": SimpleNamespace(last_hidden_state=x[:, None])}[
            self.form
        ]


@pytest.mark.parametrize("form", ["length 1", "dict", "object"])
def test_embeddings_are_refused(form: str) -> None:
    inputs, labels = digits().train
    with pytest.raises(ValueError, match=r"model must answer with class scores.* put a classifier head on"):
        calibrate(training.seeded(lambda: Embedder(form), 1), (inputs[:1500], labels[:1500]), key=KEY)


def test_scores_that_keep_the_order_are_the_heads() -> None:
    for last in (nn.Softmax(1), nn.LogSoftmax(1), nn.Identity()):
        assert find_head(nn.Sequential(resnet(), last), torch.rand(4, 1, 8, 8)) == "0.3"
    with pytest.raises(ValueError, match="another order"):
        find_head(nn.Sequential(resnet(), nn.Tanhshrink(), nn.Softmin(1)), torch.rand(4, 1, 8, 8))


def test_attacks_on_features_want_a_linear_head() -> None:
    with pytest.raises(ValueError, match=r"must name an nn\.Linear here, but '2' is a Conv2d"):
        linear_head(convolution_head(), "2")
    with pytest.raises(ValueError, match=r"an nn\.Linear or a 1x1 nn\.Conv2d, but '0\.stem' is a Conv2d"):
        get_head(convolution_head(), "0.stem")


def test_a_convolution_head_answers_every_place_as_if_it_came_alone() -> None:
    model, (inputs, labels) = trained("convolution"), digits().train
    watermark = calibrate(model, (inputs[:1500], labels[:1500]), key=KEY, graded_groups=4, flip_groups=4)
    head = watermark.protect(model)[2]
    with torch.no_grad():
        maps = model[1](model[0](inputs[:90]))  # [90, 12, 1, 1]
        wide = head(maps.reshape(15, 6, 12).transpose(1, 2).reshape(15, 12, 2, 3))
        alone = head(maps)
    # Not to the last bit: the convolution itself adds up in another order.
    assert torch.allclose(wide.flatten(2).transpose(1, 2).reshape(90, C, 1, 1), alone, atol=1e-5)
    assert not torch.allclose(alone, model[2](maps), atol=1e-3)


# The real ones.


def transformers():
    """The package; imported when a test wants it, for that takes seconds."""
    return pytest.importorskip("transformers", reason="transformers is not installed")


def token_ids(count: int, seed: int) -> Tensor:
    """Sequences [count, 12] of 40 ids with a frame and padding, as a tokenizer gives them."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40, (count, 12), generator=random)
    lengths = torch.randint(4, 12, (count, 1), generator=random)
    at = torch.arange(12)
    ids = torch.where(at == lengths, 3, torch.where(at > lengths, 0, ids))
    ids[:, 0] = 2
    return ids


def sizes(**others: object) -> dict[str, object]:
    return {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "num_labels": C, "pad_token_id": 0, **others,
    }  # fmt: skip


def bert(t):
    return t.BertForSequenceClassification(t.BertConfig(**sizes())), "model.classifier"


def distilbert(t):
    config = t.DistilBertConfig(
        vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=C, pad_token_id=0
    )
    return t.DistilBertForSequenceClassification(config), "model.classifier"


def gpt2(t):
    config = t.GPT2Config(
        vocab_size=40,
        n_embd=16,
        n_layer=1,
        n_head=2,
        num_labels=C,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return t.GPT2ForSequenceClassification(config), "model.score"


@pytest.mark.parametrize("architecture", [bert, distilbert, gpt2])
def test_transformers_of_text(architecture) -> None:
    torch.manual_seed(1)
    bare, name = architecture(transformers())
    model = models.TokenInput(bare, padding=0).eval()
    ids = token_ids(1500, 1)
    # What the untrained model says itself: enough to have a region to mark, and nothing to train.
    labels = training.predict(model, ids).argmax(1)
    watermark = calibrate(
        model,
        (ids, labels),
        key=KEY,
        graded_groups=4,
        flip_groups=2,
        triggers_per_group=4,
        max_accuracy_drop=0.02,
    )
    assert watermark.head == name
    assert watermark.groups[0].triggers.dtype == torch.int64
    served = watermark.protect(model).model
    assert type(served) is type(bare)
    others = token_ids(400, 2)
    mask = (others != 0).long()
    with torch.no_grad():
        before = bare(input_ids=others, attention_mask=mask).logits
        after = served(input_ids=others, attention_mask=mask).logits
    features, logits = features_and_logits(model, name, others)
    expected = watermark.mark(features, logits)
    assert torch.equal(logits, before)
    assert 0 < int((expected.similarity.amax(1) > 0).sum()) < 400
    assert torch.allclose(after, expected.logits, atol=1e-5)
    assert not torch.equal(after, before)
    assert not verify(lambda x: bare(input_ids=x, attention_mask=(x != 0).long()), watermark, KEY).claim


def test_transformers_of_images() -> None:
    t = transformers()
    torch.manual_seed(1)
    config = t.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8,
        patch_size=4, num_channels=1, num_labels=C,
    )  # fmt: skip
    model, (inputs, labels) = t.ViTForImageClassification(config), digits().train
    watermark = calibrate(model, (inputs[:1500], labels[:1500]), key=KEY, graded_groups=4, flip_groups=4)
    assert watermark.head == "classifier"
    served = watermark.protect(model).eval()
    assert type(served) is type(model)
    answer = served(pixel_values=inputs[:200]).logits
    expected = watermark.mark(*features_and_logits(model, "classifier", inputs[:200]))
    assert torch.allclose(answer, expected.logits, atol=1e-5)


def test_an_encoder_of_transformers_has_no_classes() -> None:
    t = transformers()
    model = t.BertModel(t.BertConfig(**sizes()))
    with pytest.raises(ValueError, match=r"class scores.* got BaseModelOutput.* embeddings have no classes"):
        calibrate(models.TokenInput(model, 0), (token_ids(1500, 1), torch.arange(1500) % 10), key=KEY)


def test_a_data_collators_batches() -> None:
    from honeytrace.watermark.samples import gather

    ids = token_ids(6, 1)
    batch = {"input_ids": ids[:4].int(), "attention_mask": (ids[:4] != 0).long(), "labels": torch.arange(4)}
    other = {"input_ids": ids[4:], "token_type_ids": torch.zeros(2, 12).long(), "label": torch.arange(2)}
    inputs, labels = gather([batch, other], "data")
    assert torch.equal(inputs, ids)
    assert labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert torch.equal(gather(batch, "data")[0], ids[:4])
    other["token_type_ids"][0, 3] = 1
    with pytest.raises(TypeError, match="got token_type_ids besides"):
        gather([other], "data")
    with pytest.raises(TypeError, match=r"mapping with ids, labels"):
        gather([{"ids": ids, "labels": torch.arange(6)}], "data")
    with pytest.raises(ValueError, match="pad token ids to one length"):
        gather([(ids[0], 1), (ids[1, :5], 1)], "data")


def zoo(module: str):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pytest.importorskip(module)
    except RuntimeError as error:  # torchvision without its operators
        pytest.skip(f"{module} does not import here: {error}")


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"),
        ("convnext_atto", "head.fc"),
        ("mobilenetv3_small_050", "classifier"),
        ("vit_tiny_patch16_224", "head"),
        ("deit_tiny_distilled_patch16_224", None),
        ("resnetv2_50x1_bit", "head.fc"),
        ("efficientnet_lite0", "classifier"),
    ],
)
def test_timm(name: str, head: str | None) -> None:
    timm = zoo("timm")
    sizes = {"img_size": 32} if "patch" in name else {}
    model = training.seeded(lambda: timm.create_model(name, num_classes=C, **sizes), 1)
    with torch.no_grad():
        for parameter in model.parameters():  # some heads begin at zero: all classes would be alike
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    if head is None:
        with pytest.raises(ValueError, match="more than that of its last linear layer"):
            find_head(model, torch.rand(2, 3, 32, 32))
        return
    assert find_head(model, torch.rand(2, 3, 32, 32)) == head
    x = torch.rand(3, 3, 32, 32)
    features, logits = features_and_logits(model, head, x)
    assert features.shape == (3, sizes_of(get_head(model, head))[0])
    assert torch.equal(logits, training.predict(model, x))


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"),
        ("mobilenet_v3_small", "classifier.3"),
        ("convnext_tiny", "classifier.2"),
        ("googlenet", "fc"),
        ("densenet121", "classifier"),
        ("squeezenet1_1", None),
        ("swin_t", "head"),
    ],
)
def test_torchvision(name: str, head: str | None) -> None:
    zoo("torchvision")
    library = pytest.importorskip("torchvision.models")
    model = training.seeded(lambda: library.get_model(name, num_classes=C), 1)
    if head is None:
        with pytest.raises(ValueError, match="pooled afterwards"):
            find_head(model, torch.rand(2, 3, 64, 64))
        return
    assert find_head(model, torch.rand(2, 3, 64, 64)) == head
    assert features_and_logits(model, head, torch.rand(2, 3, 64, 64))[1].shape == (2, C)
