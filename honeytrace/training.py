"""Training and asking a classifier: one plain loop that gives the same weights for the same seed."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

_Module = TypeVar("_Module", bound=nn.Module)

Precision: TypeAlias = Literal["float32", "bfloat16", "tensorfloat32"]
"""What a training step computes in: float32; bfloat16 in the forward pass; or, on a GPU, float32 whose
factors in convolutions and matrix products are rounded to 11 bits (NVIDIA's TF32)."""

# Share of all steps in which the learning rate rises.
_RISE = 0.25

# Steps on a GPU between two looks at the loss: each look waits for all that was launched.
_LOOK = 16

_recording: ContextVar[bool] = ContextVar("recording", default=False)

# Bytes of samples that are moved to the model's device at once, and not batch by batch.
_MOVED_AT_ONCE = 2**30


class Progress(Protocol):
    """What long work reports to, so that whoever calls can draw a bar."""

    def __call__(self, done: int, total: int, text: str) -> None:
        """`done` of `total` steps are over; `text` says in a few words where the work stands."""


class Augment(Protocol):
    """A random change of a training batch."""

    def __call__(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Changed copy of `batch` [B, ...]; all its randomness comes from `generator`, on the same device."""


class Objective(Protocol):
    """The loss of a batch, for training that does not stop at plain cross entropy."""

    def __call__(self, batch: Tensor, wanted: Tensor, place: float) -> tuple[Tensor, Tensor]:
        """Loss (a number) and the model's logits [B, C].

        Args:
            batch: [B, ...], augmented, where the model's weights are.
            wanted: its targets, as given to `fit`: labels int64 [B] or probabilities float32 [B, C].
            place: share of the training that is over, in [0, 1).
        """


class History(NamedTuple):
    """What `fit` saw, one entry for each epoch: averages over the epoch's batches while they were learned."""

    loss: tuple[float, ...]
    """Mean loss: cross entropy to the targets, in nats, or what the objective gave."""
    accuracy: tuple[float, ...]
    """Share of samples whose predicted label was the target's (its most probable class for soft targets)."""


def fastest_precision(device: str | torch.device = "cpu") -> Precision:
    """What small models train in fastest: on a GPU tensorfloat32, elsewhere bfloat16 where the processor
    multiplies it, else float32.

    Without instructions of its own bfloat16 is emulated, at a fraction of float32's speed. On a GPU autocast
    would add launches, of which small models have too many; and cuDNN's repeatable float32 convolutions of
    5x5 filters take many times what those on tensor cores take (docs/evaluation.md).
    """
    if torch.device(device).type != "cpu":
        return "tensorfloat32"
    # Torch before 2.10 has no word for it.
    capabilities = getattr(torch.cpu, "get_capabilities", dict[str, Any])()
    known = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16")
    return "bfloat16" if any(capabilities.get(name, False) for name in known) else "float32"


def seeded(factory: Callable[[], _Module], seed: int) -> _Module:
    """Call `factory` with PyTorch's CPU generator set to `seed`, and put the generator back afterwards.

    Args:
        factory: makes a model on the CPU, for example ``lambda: small_cnn(10, 1, 28)``.
        seed: 0 to 2**64 - 1.

    Raises:
        TypeError, ValueError: `seed` is not an int, or out of range.
    """
    _check_seed(seed)
    with _own_randomness(seed, torch.device("cpu")):
        return factory()


def fit(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    epochs: int,
    seed: int,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    weight_decay: float = 0.01,
    augment: Augment | None = None,
    precision: Precision = "float32",
    objective: Objective | None = None,
    progress: Progress | None = None,
) -> History:
    """Train `model` in place on labels or on probabilities, by cross entropy or an objective of one's own.

    The learning rate rises linearly over the first quarter of all steps and falls to 0 along a cosine
    (the one-cycle policy of Smith & Topin, arXiv 1708.07120). Every epoch goes through all samples once, in
    an order of its own. The same arguments on the same machine with the same number of threads give the same
    weights bit for bit; the global random state is neither read nor changed (a dropout layer draws from
    `seed`).

    Args:
        model: maps [B, ...] to logits [B, C], or what `logits_of` finds them in. It is trained where its
            weights are; samples are moved there (1 GiB at once, more of them batch by batch). Left in
            evaluation mode.
        inputs: floating point [N, ...], or token ids int64 [N, T].
        targets: integer labels [N] in 0..C-1, or probabilities [N, C] (rows sum to 1 within 1e-3).
        epochs: passes over the data, at least 1.
        seed: 0 to 2**64 - 1; fixes the order of the samples, `augment` and dropout.
        batch_size: the data is cut into ceil(N / batch_size) batches as equal as possible, so that no tiny
            last batch upsets batch normalisation. Default 128.
        learning_rate: the highest one of the cycle. Default 3e-3, for AdamW.
        optimizer: "adamw" (arXiv 1711.05101) or "sgd" with Nesterov momentum 0.9.
        weight_decay: default 0.01; decoupled for "adamw".
        augment: changes each batch before it is learned.
        precision: "float32" (default); "bfloat16": the forward pass under autocast, weights and updates in
            float32 (where the processor has bfloat16 instructions a step takes half the time or less); or
            "tensorfloat32", which is float32 where there is no GPU.
        objective: gives loss and logits of each batch. It calls the model itself, which may then be anything
            that holds the weights to train (two copies, a copy with a second head). Runs under `precision`.
            Default: cross entropy of ``model(batch)``.
        progress: told of every batch; on a GPU of every 16th.

    Returns:
        Loss and accuracy of each epoch.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.
        FloatingPointError: the loss became infinite or NaN (on a GPU it is looked at every 16 steps).
    """
    labels = _check_training_data(inputs, targets)
    check_settings(
        epochs=epochs,
        seed=seed,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimizer=optimizer,
        weight_decay=weight_decay,
        precision=precision,
    )
    targets = targets.long() if labels else targets.float()
    device = device_of(model)
    if inputs.nbytes + targets.nbytes <= _MOVED_AT_ONCE:
        inputs, targets = inputs.to(device), targets.to(device)
    batches = math.ceil(len(inputs) / batch_size)
    order = torch.Generator().manual_seed(seed)
    # A stream of its own for augmentation, so that turning it on leaves the order of the samples as it was.
    changes = torch.Generator(device=inputs.device).manual_seed((seed + 1) % 2**64)
    optimizing = _make_optimizer(model, optimizer, learning_rate, weight_decay)
    step = _Step(
        model,
        inputs,
        targets,
        optimizing,
        precision=precision,
        objective=objective,
        augment=augment,
        changes=changes,
    )
    take = _Recorded(step) if _recording.get() and _Recorded.fits(step) else step
    total, losses, accuracies = epochs * batches, list[float](), list[float]()
    rows: Sequence[Tensor] = ()

    def learn(done: int) -> Tensor:
        nonlocal rows
        number = done % batches
        if number == 0:
            shuffled = torch.randperm(len(inputs), generator=order).to(inputs.device)
            rows = shuffled.tensor_split(batches)
        take(rows[number], done / total)
        if number == batches - 1:
            losses.append(float(step.loss_sum) / len(inputs))
            accuracies.append(int(step.hits) / len(inputs))
            step.loss_sum.zero_()
            step.hits.zero_()
        return step.loss

    descend(
        model,
        learn,
        optimizing,
        steps=total,
        seed=seed,
        learning_rate=learning_rate,
        precision=precision,
        place=lambda done: f"epoch {done // batches + 1} of {epochs}",
        progress=progress,
    )
    return History(tuple(losses), tuple(accuracies))


def descend(
    model: nn.Module,
    learn: Callable[[int], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    seed: int,
    learning_rate: float,
    precision: Precision,
    place: Callable[[int], str],
    progress: Progress | None,
) -> None:
    """The loop of every training here: `steps` times the rate of the one-cycle policy, a step, a look at the
    loss.

    Args:
        model: trained in place, in training mode; left in evaluation mode.
        learn: takes a step, 0 to steps - 1, with `optimizer`, and gives its loss (a number), detached.
        seed: what a dropout layer draws from; the global random state stays as it was.
        learning_rate: the highest one of the cycle. The others as in `fit`.
        place: says where a step lies, for errors and for `progress`.

    Raises:
        FloatingPointError: the loss became infinite or NaN.
    """
    device = device_of(model)
    look = 1 if device.type == "cpu" else _LOOK
    with _own_randomness(seed, device), _repeatable(precision), _channels_last(model):
        model.train()
        for done in range(steps):
            rate = learning_rate * _one_cycle(done, steps)
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            loss = learn(done)
            if (done + 1) % look and done + 1 < steps:
                continue
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss became {value} in {place(done)}; lower the learning rate "
                    f"(learning_rate={learning_rate}) or look for infinite values in inputs"
                )
            if progress is not None:
                progress(done + 1, steps, f"{place(done)}, loss {value:.3f}")
    model.eval()


@contextmanager
def recorded_steps() -> Iterator[None]:
    """Inside, `fit` on a GPU records its step as a CUDA graph and replays it: for small models, of which a
    step's many launches take far longer than its work.

    The weights are the same bit for bit. It is for models whose forward pass does the same every time:
    whatever Python decides in it (by a random number of its own, or by a value it reads from a tensor) is
    decided once, when the step is recorded. Training with an objective, with augmentation, by "sgd", or on
    data too large for the GPU is not recorded.
    """
    before = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(before)


class _Step:
    """One step of `fit`: the loss of a batch, its gradient, an update.

    Attributes:
        loss: of the last batch; loss_sum, hits: sums over the samples of an epoch, where the model is.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Precision,
        objective: Objective | None,
        augment: Augment | None,
        changes: torch.Generator,
    ) -> None:
        self.model, self.inputs, self.targets, self.optimizer = model, inputs, targets, optimizer
        self.objective, self.augment, self.changes = objective, augment, changes
        self.device = device_of(model)
        self.halved = precision == "bfloat16"
        self.loss = torch.zeros((), device=self.device)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.hits = torch.zeros((), dtype=torch.int64, device=self.device)
        self._checked = False

    def __call__(self, chosen: Tensor, place: float) -> None:
        """Learn the samples `chosen` int64 [B]; `place` of the training in [0, 1)."""
        batch = self.inputs[chosen]
        if self.augment is not None:
            batch = self.augment(batch, self.changes)
        wanted = self.targets[chosen.to(self.targets.device)].to(self.device)
        batch = _arranged(batch.to(self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.halved):
            if self.objective is not None:
                loss, logits = self.objective(batch, wanted, place)
            else:
                logits = logits_of(self.model(batch))
        _check_logits(logits, wanted)
        if not self._checked:
            _check_classes(logits, self.targets)
            self._checked = True
        if self.objective is None:
            loss = functional.cross_entropy(logits.float(), wanted)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        best = wanted if wanted.dim() == 1 else wanted.argmax(1)
        self.loss.copy_(loss.detach())
        self.loss_sum += self.loss.double() * len(chosen)
        self.hits += (logits.detach().argmax(1) == best).sum()


class _Recorded:
    """A step that is taken by replaying a CUDA graph, one for each size of batch."""

    # Before a recording libraries must have set themselves up and the optimizer its state.
    _WARM_UP = 3

    def __init__(self, step: _Step) -> None:
        self._step = step
        self._aside = torch.cuda.Stream(step.device)  # type: ignore[no-untyped-call]
        self._taken: dict[int, int] = {}
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @staticmethod
    def fits(step: _Step) -> bool:
        """Whether nothing in the step changes from one time to the next but the samples and the rate."""
        return (
            step.device.type == "cuda"
            and step.inputs.is_cuda
            and step.objective is None
            and step.augment is None
            and isinstance(step.optimizer, torch.optim.AdamW)
        )

    def __call__(self, chosen: Tensor, place: float) -> None:
        size = len(chosen)
        taken = self._taken.get(size, 0)
        self._taken[size] = taken + 1
        if taken < self._WARM_UP:
            self._aside.wait_stream(torch.cuda.current_stream(self._step.device))
            with torch.cuda.stream(self._aside):
                self._step(chosen, place)
            torch.cuda.current_stream(self._step.device).wait_stream(self._aside)
            return
        if size not in self._graphs:
            graph, samples = torch.cuda.CUDAGraph(), chosen.clone()
            with torch.cuda.device(self._step.device), torch.cuda.graph(graph):
                self._step(samples, place)
            self._graphs[size] = graph, samples
        graph, samples = self._graphs[size]
        samples.copy_(chosen)
        graph.replay()


def logits_of(answer: Any) -> Tensor:
    """The scores in what a model returned.

    Args:
        answer: a tensor; a mapping with "logits", or an object with `.logits`, as Transformers and
            torchvision give them; or a tuple or list whose first entry is the tensor.

    Raises:
        ValueError: it is none of these: a model that gives embeddings has no scores.
    """
    if isinstance(answer, Mapping):
        found = answer.get("logits")
    elif isinstance(answer, (tuple, list)) and not hasattr(answer, "logits"):
        found = answer[0] if answer else None
    else:
        found = getattr(answer, "logits", answer)
    if isinstance(found, Tensor):
        return found
    fields = set(answer) if isinstance(answer, Mapping) else set(dir(answer))
    embeds = sorted(fields & {"last_hidden_state", "pooler_output", "image_embeds", "text_embeds"})
    raise ValueError(
        "model must answer with class scores: a tensor of shape [B, C], a tuple that begins with one, or an "
        f"object with logits; got {type(answer).__name__}"
        + (f" with {embeds[0]}: embeddings have no classes, put a classifier head on them" if embeds else "")
    )


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter lies: where its batches belong. The CPU for a model without any.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@torch.no_grad()
def predict(model: nn.Module, inputs: Tensor, *, batch_size: int = 512) -> Tensor:
    """Logits [N, C] of `model` on `inputs` [N, ...], in evaluation mode and without gradients.

    Every submodule is put back into the mode it was in. Batches are moved to where the model's weights are;
    the answer comes back on the device of `inputs`, in the dtype the model gives.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value, or the model's answer is not [B, C].
    """
    _check_int("batch_size", batch_size, 1)
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a tensor, got {type(inputs).__name__}")
    if inputs.dim() < 2:
        raise ValueError(f"inputs must have shape [N, ...], got {list(inputs.shape)}")
    device = device_of(model)
    answers: list[Tensor] = []
    with evaluating(model):
        for batch in torch.split(inputs, batch_size):
            logits = logits_of(model(batch.to(device)))
            _check_logits(logits, batch)
            answers.append(logits.to(inputs.device))
    return torch.cat(answers)


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor, *, batch_size: int = 512) -> float:
    """Share in [0, 1] of `inputs` [N, ...] whose largest logit is that of `labels` (integer [N]).

    Raises:
        TypeError, ValueError: as `predict`; also when the labels do not fit the inputs, or N is 0.
    """
    if not _check_training_data(inputs, labels):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    found = predict(model, inputs, batch_size=batch_size).argmax(1)
    return float((found == labels.to(found.device)).double().mean())


@torch.no_grad()
def excess_loss(model: nn.Module, inputs: Tensor, targets: Tensor, *, batch_size: int = 512) -> Tensor:
    """How badly `model` fits each sample: cross entropy to its target less the target's own entropy.

    That is the Kullback-Leibler divergence from target to model, 0 for a perfect fit; for labels it is the
    plain cross entropy. Float32 [N] in nats, on the device of `inputs`.

    Args:
        model, inputs, batch_size: as in `predict`.
        targets: integer labels [N] or probabilities [N, C], as in `fit`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.
    """
    labels = _check_training_data(inputs, targets)
    targets = (targets.long() if labels else targets.float()).to(inputs.device)
    logits = predict(model, inputs, batch_size=batch_size).float()
    _check_classes(logits, targets)
    if labels:
        return functional.cross_entropy(logits, targets, reduction="none")
    return functional.cross_entropy(logits, targets, reduction="none") + torch.xlogy(targets, targets).sum(1)


def check_settings(
    *,
    epochs: int,
    seed: int,
    batch_size: int = 1,
    learning_rate: float = 1.0,
    optimizer: str = "adamw",
    weight_decay: float = 0.0,
    precision: str = "float32",
) -> None:
    """Raise what `fit` would raise for these settings: for work that must not fail after costly steps.

    Raises:
        TypeError, ValueError: a setting has a wrong type or value.
    """
    _check_int("epochs", epochs, 1)
    _check_int("batch_size", batch_size, 1)
    _check_seed(seed)
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate must be finite and above 0, got learning_rate={learning_rate}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be finite and 0 or more, got weight_decay={weight_decay}")
    if optimizer not in ("adamw", "sgd"):
        raise ValueError(f'optimizer must be "adamw" or "sgd", got optimizer={optimizer!r}')
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")


def _one_cycle(step: int, total: int) -> float:
    """Share of the highest learning rate at `step` of 0..total-1: a linear rise, then half a cosine."""
    place = (step + 1) / (total + 1)
    if place < _RISE:
        return place / _RISE
    return 0.5 * (1 + math.cos(math.pi * (place - _RISE) / (1 - _RISE)))


def _make_optimizer(
    model: nn.Module, name: str, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if not weights:
        raise ValueError("model has no weight that requires a gradient: there is nothing to train")
    if name == "adamw":
        return adamw(weights, learning_rate, weight_decay)
    return torch.optim.SGD(weights, lr=learning_rate, weight_decay=weight_decay, momentum=0.9, nesterov=True)


def adamw(weights: list[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, on a GPU as one kernel for all weights: small models are done in less than its launches take.
    There the rate is a tensor, as a recorded step needs it."""
    if not weights[0].is_cuda:
        return torch.optim.AdamW(weights, lr=learning_rate, weight_decay=weight_decay)
    rate = torch.tensor(learning_rate, device=weights[0].device)
    return torch.optim.AdamW(weights, lr=rate, weight_decay=weight_decay, fused=True, capturable=True)


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the default generators of CPU and `device` start from `seed`; outside, they are as before.

    Not ``torch.manual_seed``: that would also touch the generators of all other devices.
    """
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def _repeatable(precision: Precision) -> Iterator[None]:
    """Inside, a GPU takes only algorithms that give the same sums every time, and multiplies float32 exactly
    or as `precision` allows."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32
    cudnn.deterministic, cudnn.benchmark = True, False
    cudnn.allow_tf32 = products.allow_tf32 = precision == "tensorfloat32"
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32 = before


@contextmanager
def _channels_last(model: nn.Module) -> Iterator[None]:
    """Keep the model's convolution weights channels-last while it trains.

    oneDNN then need not rearrange anything: a quarter to a third off the time of a step on a CPU. The layout
    is put back at the end, for others (safetensors among them) want contiguous weights.
    """
    rearranged = [weight for weight in model.parameters() if weight.dim() == 4 and weight.is_contiguous()]
    try:
        for weight in rearranged:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for weight in rearranged:
            weight.data = weight.data.contiguous()
            weight.grad = None


def _arranged(batch: Tensor) -> Tensor:
    return batch.contiguous(memory_format=torch.channels_last) if batch.dim() == 4 else batch


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; outside, each submodule's own mode (a caller may have frozen some of them)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check_training_data(inputs: Tensor, targets: Tensor) -> bool:
    """Whether `targets` are labels [N] (True) or probabilities [N, C] (False); anything else raises."""
    for name, value in (("inputs", inputs), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not inputs.is_floating_point() and not (inputs.dtype == torch.int64 and inputs.dim() == 2):
        raise TypeError(f"inputs must be floating point, or token ids int64 [N, T], got {inputs.dtype}")
    if inputs.dim() < 2 or len(inputs) == 0:
        raise ValueError(f"inputs must have shape [N, ...] with N >= 1, got {list(inputs.shape)}")
    if targets.dim() not in (1, 2) or len(targets) != len(inputs):
        raise ValueError(
            f"targets must be labels [N] or probabilities [N, C] with N={len(inputs)} as in inputs, "
            f"got shape {list(targets.shape)}"
        )
    if targets.dim() == 1:
        if targets.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
            raise TypeError(f"targets of shape [N] must be integer labels, got {targets.dtype}")
        if int(targets.min()) < 0:
            raise ValueError(f"targets must be labels of 0 or more, got {int(targets.min())}")
        return True
    if not targets.is_floating_point():
        raise TypeError(f"targets of shape [N, C] must be floating point probabilities, got {targets.dtype}")
    off = (targets.float().sum(1) - 1).abs().max().item()
    if not off <= 1e-3 or targets.min() < 0:
        raise ValueError(
            "targets of shape [N, C] must be probabilities (0 or more, rows that sum to 1 within 1e-3); "
            f"smallest entry {targets.min().item():.3g}, largest error of a row's sum {off:.3g}"
        )
    return False


def _check_logits(logits: Tensor, batch: Tensor) -> None:
    """The model's answer to a batch of B samples must be [B, C]."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(batch):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model must give logits of shape [B, C] with B={len(batch)}, got {got}")


def _check_classes(logits: Tensor, targets: Tensor) -> None:
    """The targets (checked before) must speak of the model's own classes."""
    classes = logits.shape[1]
    if targets.dim() == 2 and targets.shape[1] != classes:
        raise ValueError(
            f"targets must have one column for each of the model's C={classes} classes, "
            f"got shape {list(targets.shape)}"
        )
    if targets.dim() == 1 and int(targets.max()) >= classes:
        raise ValueError(f"targets must be labels below the model's C={classes}, got {int(targets.max())}")


def _check_int(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {name}={value}")


def _check_seed(seed: int) -> None:
    _check_int("seed", seed, 0)
    if seed >= 2**64:
        raise ValueError(f"seed must be below 2**64, got seed={seed}")
