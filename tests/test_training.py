"""The training loop: learns, gives the same bits for the same seed, leaves no trace outside, names errors."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from honeytrace import training
from honeytrace.models import small_cnn, tiny_cnn
from honeytrace.training import accuracy, excess_loss, fit, predict, seeded


def quarters(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy 8x8 images whose label says which quarter is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    images = 0.4 * torch.rand(count, 1, 8, 8, generator=generator)
    for row, label in enumerate(labels.tolist()):
        images[row, 0, 4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 0.5
    return images, labels


def weights(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    return quarters(200)


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 5e-3), ("sgd", 5e-2)])
@pytest.mark.parametrize("soft", [False, True])
def test_learns_labels_and_probabilities(
    images: tuple[Tensor, Tensor], optimizer: str, rate: float, soft: bool
) -> None:
    inputs, labels = images
    targets = 0.9 * functional.one_hot(labels, 4).float() + 0.025 if soft else labels
    model = seeded(lambda: small_cnn(4, 1, 8, width=8), 0)
    history = fit(
        model, inputs, targets, epochs=6, seed=0, batch_size=32, learning_rate=rate, optimizer=optimizer
    )
    assert accuracy(model, *quarters(200, seed=1)) >= 0.95
    assert len(history.loss) == len(history.accuracy) == 6
    assert history.loss[-1] < 0.6 * history.loss[0]
    assert history.accuracy[-1] > 0.95


@pytest.mark.parametrize(
    ("processor", "expected"),
    [({"avx512_bf16": True}, "bfloat16"), ({"avx512_bf16": False, "avx2": True}, "float32"), ({}, "float32")],
)
def test_the_fastest_precision_is_what_the_processor_multiplies(monkeypatch, processor, expected) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    assert training.fastest_precision() == expected
    assert training.fastest_precision("cuda") == "tensorfloat32"
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert training.fastest_precision() == "float32"


def test_tensorfloat32_is_float32_without_a_gpu(images: tuple[Tensor, Tensor]) -> None:
    models = [seeded(lambda: small_cnn(4, 1, 8, width=8), 0) for _ in range(2)]
    for model, precision in zip(models, ("float32", "tensorfloat32"), strict=True):
        fit(model, *images, epochs=1, seed=0, precision=precision)
    assert same(*map(weights, models))
    assert not torch.backends.cuda.matmul.allow_tf32


def test_bfloat16_learns_in_half_precision_with_weights_and_updates_in_float32(
    images: tuple[Tensor, Tensor],
) -> None:
    seen: list[torch.dtype] = []

    class Head(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            logits = super().forward(input)
            if self.training:
                seen.append(logits.dtype)
            return logits

    def model() -> nn.Module:
        return nn.Sequential(small_cnn(16, 1, 8, width=8), Head(16, 4))

    copies = [seeded(model, 0) for _ in range(2)]
    for copy in copies:
        fit(copy, *images, epochs=6, seed=0, batch_size=32, learning_rate=5e-3, precision="bfloat16")
    assert set(seen) == {torch.bfloat16}
    assert all(weight.dtype == torch.float32 for weight in copies[0].parameters())
    assert same(weights(copies[0]), weights(copies[1]))
    assert accuracy(copies[0], *quarters(200, seed=1)) >= 0.95


def test_an_objective_replaces_the_loss_and_sees_how_far_the_training_is(
    images: tuple[Tensor, Tensor],
) -> None:
    inputs, labels = images
    models = [seeded(lambda: small_cnn(4, 1, 8, width=8), 0) for _ in range(3)]
    places: list[float] = []

    def plain(batch: Tensor, wanted: Tensor, place: float) -> tuple[Tensor, Tensor]:
        places.append(place)
        logits = models[1](batch)
        return functional.cross_entropy(logits.float(), wanted), logits

    def turned(batch: Tensor, wanted: Tensor, place: float) -> tuple[Tensor, Tensor]:
        logits = models[2](batch)
        return functional.cross_entropy(logits.float(), (wanted + 1) % 4), logits

    histories = [
        fit(model, inputs, labels, epochs=8, seed=0, batch_size=25, learning_rate=5e-3, objective=objective)
        for model, objective in zip(models, (None, plain, turned), strict=True)
    ]
    assert same(weights(models[0]), weights(models[1]))
    assert histories[0] == histories[1]
    assert places == [step / 64 for step in range(64)]
    # What the loss wants is learned, and the accuracy is still that of the targets.
    assert histories[2].accuracy[-1] < 0.2
    assert accuracy(models[2], inputs, (labels + 1) % 4) > 0.8


def test_same_seed_same_bits_and_another_seed_others(images: tuple[Tensor, Tensor]) -> None:
    def trained(seed: int, noise: int) -> tuple[list[Tensor], training.History]:
        torch.manual_seed(noise)  # the global state must not matter
        model = seeded(lambda: nn.Sequential(small_cnn(4, 1, 8, width=4), nn.Dropout(0.2)), 5)
        history = fit(model, *images, epochs=2, seed=seed, augment=jitter)
        return weights(model), history

    def jitter(batch: Tensor, generator: torch.Generator) -> Tensor:
        return batch + 0.01 * torch.randn(batch.shape, generator=generator)

    first, first_history = trained(3, noise=1)
    again, again_history = trained(3, noise=2)
    other, _ = trained(4, noise=1)
    assert same(first, again)
    assert first_history == again_history
    assert not same(first, other)


def test_the_global_random_state_is_left_alone(images: tuple[Tensor, Tensor]) -> None:
    before = torch.get_rng_state()
    model = seeded(lambda: nn.Sequential(small_cnn(4, 1, 8, width=4), nn.Dropout(0.5)), 0)
    fit(model, *images, epochs=1, seed=0)
    predict(model, images[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_sees_every_batch_and_does_not_change_the_order(images: tuple[Tensor, Tensor]) -> None:
    sizes: list[int] = []

    def unchanged(batch: Tensor, generator: torch.Generator) -> Tensor:
        sizes.append(len(batch))
        torch.rand(3, generator=generator)
        return batch

    plain, watched = (seeded(lambda: tiny_cnn(4, 1, 8, width=4), 0) for _ in range(2))
    fit(plain, *images, epochs=2, seed=0, batch_size=64)
    fit(watched, *images, epochs=2, seed=0, batch_size=64, augment=unchanged)
    assert sizes == [50] * 8  # four equal batches, not three of 64 and one of 8
    assert same(weights(plain), weights(watched))


def test_one_sample_more_than_a_batch_makes_no_batch_of_one(images: tuple[Tensor, Tensor]) -> None:
    model = seeded(lambda: small_cnn(4, 1, 8, width=4), 0)
    fit(model, images[0][:33], images[1][:33], epochs=1, seed=0, batch_size=32)
    assert all(value.isfinite().all() for value in weights(model))


def test_progress_counts_batches_to_the_end(images: tuple[Tensor, Tensor]) -> None:
    told: list[tuple[int, int, str]] = []
    model = seeded(lambda: tiny_cnn(4, 1, 8, width=2), 0)
    fit(model, *images, epochs=2, seed=0, batch_size=100, progress=lambda *report: told.append(report))
    assert [report[:2] for report in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert told[-1][2].startswith("epoch 2 of 2, loss ")


def test_the_learning_rate_rises_then_falls() -> None:
    rates = [training._one_cycle(step, 100) for step in range(100)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 20 <= top <= 30
    assert 0 < min(rates) < 0.05
    assert 0.95 < max(rates) <= 1
    assert 0 < training._one_cycle(0, 1) <= 1


def test_weights_keep_their_layout_and_the_model_ends_in_evaluation_mode(
    images: tuple[Tensor, Tensor],
) -> None:
    model = seeded(lambda: small_cnn(4, 1, 8, width=4), 0)
    before = {name: weight.stride() for name, weight in model.named_parameters()}
    fit(model, *images, epochs=1, seed=0)
    assert {name: weight.stride() for name, weight in model.named_parameters()} == before
    assert not any(module.training for module in model.modules())


def test_vectors_are_inputs_too_and_frozen_weights_stay() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)), 0)
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    inputs = torch.rand(20, 5)
    fit(model, inputs, (inputs[:, 0] > 0.5).int(), epochs=2, seed=0)
    assert torch.equal(model[0].weight, frozen)


def test_a_single_sample_can_be_fitted() -> None:
    model = seeded(lambda: nn.Linear(3, 2), 0)
    assert len(fit(model, torch.rand(1, 3), torch.tensor([1]), epochs=3, seed=0).loss) == 3


def test_predict_is_the_models_answer_and_restores_every_mode(images: tuple[Tensor, Tensor]) -> None:
    model = seeded(lambda: small_cnn(4, 1, 8, width=4), 0).train()
    model.block1.eval()
    modes = [module.training for module in model.modules()]
    answers = predict(model, images[0], batch_size=64)
    assert [module.training for module in model.modules()] == modes
    assert not answers.requires_grad
    assert not answers.is_inference()  # it may become a target, which autograd then saves
    torch.testing.assert_close(answers, model.eval()(images[0]))
    assert predict(model, images[0][:0]).shape == (0, 4)


def test_excess_loss_is_the_divergence_from_target_to_model(images: tuple[Tensor, Tensor]) -> None:
    inputs, labels = images
    model = seeded(lambda: small_cnn(4, 1, 8, width=4), 0)
    log_probabilities = predict(model, inputs).double().log_softmax(1)
    expected = -log_probabilities[torch.arange(len(labels)), labels]
    torch.testing.assert_close(excess_loss(model, inputs, labels).double(), expected, rtol=1e-5, atol=1e-6)
    targets = torch.rand(len(inputs), 4).softmax(1)
    targets[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    kl = functional.kl_div(log_probabilities, targets.double(), reduction="none").sum(1)
    torch.testing.assert_close(excess_loss(model, inputs, targets).double(), kl, rtol=1e-5, atol=1e-6)
    perfect = excess_loss(model, inputs, log_probabilities.exp().float())
    torch.testing.assert_close(perfect, torch.zeros(len(inputs)), rtol=0, atol=1e-5)


BAD_DATA = [
    (
        torch.rand(4, 3).int(),
        torch.zeros(4).long(),
        TypeError,
        "inputs must be floating point, or token ids .* got torch.int32",
    ),
    (torch.rand(0, 3), torch.zeros(0).long(), ValueError, r"inputs must have shape \[N, ...\] with N >= 1"),
    (torch.rand(4), torch.zeros(4).long(), ValueError, r"got \[4\]"),
    (torch.rand(4, 3), torch.zeros(5).long(), ValueError, r"with N=4 as in inputs, got shape \[5\]"),
    (torch.rand(4, 3), torch.zeros(4), TypeError, r"integer labels, got torch.float32"),
    (torch.rand(4, 3), torch.zeros(4, 2).long(), TypeError, r"floating point probabilities, got torch.int64"),
    (torch.rand(4, 3), torch.tensor([0, 1, -1, 0]), ValueError, "labels of 0 or more, got -1"),
    (torch.rand(4, 3), torch.tensor([0, 1, 2, 0]), ValueError, "labels below the model's C=2, got 2"),
    (torch.rand(4, 3), torch.full((4, 2), 0.6), ValueError, "rows that sum to 1"),
    (torch.rand(4, 3), torch.tensor([[1.5, -0.5]] * 4), ValueError, "smallest entry -0.5"),
    (torch.rand(4, 3), torch.full((4, 2), torch.nan), ValueError, "rows that sum to 1"),
    (torch.rand(4, 3), torch.full((4, 5), 0.2), ValueError, r"the model's C=2 classes, got shape \[4, 5\]"),
]


@pytest.mark.parametrize(("inputs", "targets", "error", "message"), BAD_DATA)
def test_bad_data_is_named(inputs: Tensor, targets: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit(nn.Linear(3, 2), inputs, targets, epochs=1, seed=0)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got epochs=0"),
        ({"epochs": 1.5}, TypeError, "epochs must be an int, got float"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got seed=-1"),
        ({"seed": 2**64}, ValueError, r"seed must be below 2\*\*64"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be finite and above 0"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be finite and 0 or more"),
        ({"optimizer": "lion"}, ValueError, 'optimizer must be "adamw" or "sgd", got optimizer=\'lion\''),
        (
            {"precision": "half"},
            ValueError,
            "precision must be one of float32, bfloat16, tensorfloat32, got 'half'",
        ),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit(nn.Linear(3, 2), torch.rand(4, 3), torch.zeros(4).long(), **{"epochs": 1, "seed": 0, **settings})


def test_the_largest_seed_works() -> None:
    fit(
        seeded(lambda: nn.Linear(3, 2), 2**64 - 1),
        torch.rand(4, 3),
        torch.zeros(4).long(),
        epochs=1,
        seed=2**64 - 1,
    )


def test_bad_models_are_named() -> None:
    inputs, labels = torch.rand(4, 3), torch.zeros(4).long()
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        predict(lambda x: x, inputs)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(nn.Linear(3, 2).requires_grad_(False), inputs, labels, epochs=1, seed=0)
    with pytest.raises(ValueError, match=r"logits of shape \[B, C\] with B=4, got \[12\]"):
        predict(nn.Flatten(0), inputs)
    with pytest.raises(FloatingPointError, match="the loss became nan in epoch 1 of 1"):
        fit(nn.Linear(3, 2), inputs * torch.nan, labels, epochs=1, seed=0)
    with pytest.raises(TypeError, match="labels must be integers"):
        accuracy(nn.Linear(3, 2), inputs, torch.full((4, 2), 0.5))


def test_a_failed_training_puts_the_layout_back() -> None:
    model = seeded(lambda: small_cnn(4, 3, 8, width=4), 0)
    with pytest.raises(FloatingPointError):
        fit(model, torch.full((4, 3, 8, 8), torch.nan), torch.zeros(4).long(), epochs=1, seed=0)
    assert all(weight.is_contiguous() for weight in model.parameters())
