"""EWE: watermark samples whose hidden features are entangled with those of the target class."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from honeytrace.baselines.combiners import draw_class
from honeytrace.baselines.interface import (
    BaselineGroup,
    Defended,
    check_arguments,
    draw_generator,
    draw_sources,
    draw_target,
    fresh_model,
    reference_log_probs,
    stream_key,
)
from honeytrace.baselines.steps import Batches, train_steps
from honeytrace.data import Split
from honeytrace.training import Precision, Progress, device_of

_BATCH = 128
_LAYERS = 3
# The losses in these logarithms of temperatures are smooth: the step and the bounds are not delicate.
_TEMPERATURE_STEP = 0.1
_TEMPERATURE_BOUND = 7.0
# -log of 1e-5: the papers' code adds that much to every share, so that no sample pulls without end.
_FARTHEST = 11.5


def ewe(
    train: Split,
    *,
    architecture: Callable[[], nn.Module],
    seed: int,
    epochs: int,
    trigger_data: Split,
    victim: nn.Module | None = None,
    reference: nn.Module | None = None,
    target: int | None = None,
    precision: Precision = "float32",
    progress: Progress | None = None,
    entanglement: float = 1.0,
    patch: int = 3,
    watermark_batch: int = 16,
    triggers: int = 64,
) -> Defended:
    """Entangled watermark: samples of one class with a patch are the target, and look like it inside.

    Cross entropy on samples and watermark samples, less `entanglement` times the soft nearest neighbour loss
    that tells watermark samples and the target's own samples apart, summed over the last three activations.
    Each has a temperature of its own, moved at every step towards the value that tells them apart best.

    One thing differs from the paper: there the patch is put where the gradient of that loss is largest. Then
    the triggers depend on the target, and no test on ranks of the target would be exact. Here the place is
    drawn.

    Source: Jia, Choquette-Choo, Chandrasekaran & Papernot, "Entangled Watermarks as a Defense against Model
    Extraction", arXiv 2002.12200, sections 3 and 4; the loss: Frosst, Papernot & Hinton, arXiv 1902.01889.

    Args:
        entanglement: 0 or more; 0 is a plain backdoor (BadNets).
        patch: side of the bright square in pixels (length, for inputs without height and width).
        watermark_batch: watermark samples, and as many of the target, in a step.
        triggers: how many to make for verification.
        victim: not used but as reference. The others as in `Defence`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """
    check_arguments(train, trigger_data, seed=seed, epochs=epochs, precision=precision)
    _check_settings(entanglement, patch, watermark_batch, triggers, train.inputs)
    model, classes = fresh_model(architecture, seed, train.inputs)
    (source,) = draw_sources(seed, train.labels, 1)
    goal, candidates = draw_target(seed, classes, (source,), target)
    mark = _Patch(train.inputs, patch, seed)
    generator = draw_generator(seed, "batches")
    batches = Batches(len(train.inputs), _BATCH, generator)
    size, device = watermark_batch, device_of(model)
    is_mark = torch.arange(2 * size, device=device) < size
    wanted_tail = torch.full((2 * size,), goal)
    with _Activations(model) as activations:
        temperatures = torch.zeros(len(activations.layers), device=device, requires_grad=True)

        def backward() -> Tensor:
            rows = next(batches)
            marked = mark(draw_class(*train, source, size, generator))
            own = draw_class(*train, goal, size, generator)
            logits = model(torch.cat([train.inputs[rows], marked, own]).to(device)).float()
            wanted = torch.cat([train.labels[rows], wanted_tail]).to(device)
            loss = functional.cross_entropy(logits, wanted)
            if entanglement:
                apart = torch.stack(
                    [
                        soft_nearest_neighbour(seen[len(rows) :].flatten(1).float(), is_mark, scale.exp())
                        for seen, scale in zip(activations.seen, temperatures, strict=True)
                    ]
                ).sum()
                (slope,) = torch.autograd.grad(apart, temperatures, retain_graph=True)
                loss = loss - entanglement * apart
            loss.backward()  # type: ignore[no-untyped-call]
            if entanglement:
                with torch.no_grad():
                    temperatures.sub_(_TEMPERATURE_STEP * slope).clamp_(
                        -_TEMPERATURE_BOUND, _TEMPERATURE_BOUND
                    )
            return loss.detach()

        steps = epochs * -(-len(train.inputs) // _BATCH)
        train_steps(
            model, backward, steps=steps, seed=seed, precision=precision, progress=progress, text="EWE"
        )
    asked = mark(draw_class(*trigger_data, source, triggers, draw_generator(seed, "triggers"))).float().cpu()
    known = reference_log_probs(reference or victim, asked, classes)
    return Defended(model, (BaselineGroup(candidates, goal, asked, known),))


def soft_nearest_neighbour(features: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
    """Mean over samples of -log of the share that neighbours of the same label have, by exp(-distance / T).

    Args:
        features: [B, D], float32; the distance is 1 - cosine.
        labels: [B], any dtype that can be compared.
        temperature: T, a scalar above 0.

    Returns:
        A scalar: 0 where the labels lie apart, log 2 where two equally large sets lie in one cloud, more
        where neighbours are of the other label.

    Source: arXiv 1902.01889, equation 1; cosine distance as in EWE's code.
    """
    unit = functional.normalize(features, dim=1)
    nearness = (unit @ unit.T - 1) / temperature
    nearness = nearness.masked_fill(
        torch.eye(len(labels), dtype=torch.bool, device=labels.device), -torch.inf
    )
    alike = nearness.masked_fill(labels[:, None] != labels[None, :], -torch.inf)
    return (nearness.logsumexp(1) - alike.logsumexp(1)).clamp_max(_FARTHEST).mean()


class _Patch:
    """Puts a square of the data's highest value at a place drawn from the seed; keeps its argument."""

    def __init__(self, inputs: Tensor, side: int, seed: int) -> None:
        stream = stream_key(seed).stream("patch")
        axes = inputs.shape[2:] if inputs.dim() > 3 else inputs.shape[1:]
        starts = [stream.below(length - side + 1) for length in axes]
        where = torch.zeros(list(axes), dtype=torch.bool)
        where[tuple(slice(start, start + side) for start in starts)] = True
        self._where = where
        self._value = float(inputs.max())

    def __call__(self, inputs: Tensor) -> Tensor:
        return inputs.masked_fill(self._where.to(inputs.device), self._value)


class _Activations:
    """While entered, keeps the outputs of the last forward pass: of the last three ReLUs, or of the model."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[nn.Module] = []
        self.layers.extend(module for module in model.modules() if isinstance(module, nn.ReLU))
        self.layers = self.layers[-_LAYERS:] or [model]
        self.seen: list[Tensor] = [torch.empty(0)] * len(self.layers)

    def __enter__(self) -> _Activations:
        self._hooks = [layer.register_forward_hook(self._note(n)) for n, layer in enumerate(self.layers)]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, place: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.seen[place] = output

        return note


def _check_settings(entanglement: float, patch: int, batch: int, triggers: int, inputs: Tensor) -> None:
    if not 0 <= entanglement < float("inf"):
        raise ValueError(f"entanglement must be finite and 0 or more, got entanglement={entanglement}")
    longest = min(inputs.shape[2:] if inputs.dim() > 3 else inputs.shape[1:])
    for name, value, minimum, maximum in (
        ("patch", patch, 1, longest),
        ("watermark_batch", batch, 2, 10**6),
        ("triggers", triggers, 1, 10**6),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if not minimum <= value <= maximum:
            raise ValueError(f"{name} must be between {minimum} and {maximum}, got {name}={value}")
