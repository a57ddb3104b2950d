"""Data-free extraction: the attacker has no inputs and learns to make them."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from honeytrace.extraction.interface import Api, Extraction, Labels
from honeytrace.extraction.recipe import Recipe
from honeytrace.extraction.session import Session
from honeytrace.training import Progress, device_of, evaluating, seeded

_NOISE = 64
_WIDTH = 64
# The paper's 1e-4 is for 20 million queries; with some ten thousand the generator would hardly move.
_GENERATOR_RATE = 2e-3
_LEAST = 1e-6


def dfme(
    api: Api,
    pool: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    budget: int | None = None,
    labels: Labels = "soft",
    batch: int = 64,
    student_steps: int = 5,
    directions: int = 1,
    epsilon: float = 1e-3,
    progress: Progress | None = None,
) -> Extraction:
    """Train a generator to make inputs on which copy and victim differ, and the copy to agree on them.

    DFME (Truong et al., "Data-Free Model Extraction", arXiv 2011.14779, algorithm 1): the loss is the L1
    distance of the logits, the victim's being its log-probabilities less their mean (section 3.3); the
    generator's gradient through the victim is estimated by forward differences along random directions
    (section 3.2). The paper spends 20 million queries. With a budget of thousands the copies are poor; they
    are trained once more, from scratch, on everything that was asked.

    Args:
        api: must give probabilities.
        pool: tells the shape and the range of the inputs; none of it is sent.
        recipe, seed, labels, progress: as `random_queries`.
        budget: number of queries. Default: the size of the pool.
        batch: inputs made at once. Default 64 (the paper: 256, for larger budgets).
        student_steps: of the copy for one of the generator. Default 5. directions: m, for one gradient.
            Default 1. epsilon: length of a difference, in units of the inputs. Default 1e-3.

    Returns:
        The copy; all `indices` are -1.

    Raises:
        TypeError, ValueError: as `random_queries`, or a setting is out of range.
    """
    for name, value in (("batch", batch), ("student_steps", student_steps), ("directions", directions)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 + (name == "batch"):
            least = 1 + (name == "batch")
            raise ValueError(f"{name} must be an int of at least {least}, got {name}={value!r}")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, got epsilon={epsilon}")
    session = Session(
        api, pool, seed=seed, budget=budget, labels=labels, progress=progress, needs="scores", repeats=True
    )
    duel = _Duel(session, recipe, batch)
    while session.left >= 2:
        if session.left >= (1 + directions + student_steps) * batch:
            duel.teach_generator(directions, epsilon)
        for _ in range(student_steps):
            duel.teach_student()
    if session.left:
        duel.ask(duel.made(2)[: session.left].detach())
    queries, answers, _ = session.asked()
    return session.extraction(
        *recipe.train(queries, session.learnable(answers), seed=seed, progress=progress)
    )


class _Duel:
    """Generator and student, with their optimizers."""

    def __init__(self, session: Session, recipe: Recipe, batch: int) -> None:
        self._session, self._batch = session, batch
        self.student = recipe.fresh(session.seed)
        shape = session.pool.shape[1:]
        low, high = session.pool.amin().item(), session.pool.amax().item()
        self._maker = seeded(lambda: _Maker(tuple(shape), low, high), session.seed).to(session.pool.device)
        self._student_steps = torch.optim.AdamW(self.student.parameters(), lr=recipe.learning_rate)
        self._maker_steps = torch.optim.Adam(self._maker.parameters(), lr=_GENERATOR_RATE)

    def made(self, count: int) -> Tensor:
        """`count` fresh inputs."""
        noise = torch.randn(count, _NOISE, generator=self._session.generator)
        inputs: Tensor = self._maker(noise.to(self._session.pool.device))
        return inputs

    def ask(self, inputs: Tensor) -> Tensor:
        """The victim's logits, up to a constant for each input, as far as its answers tell."""
        nowhere = torch.full((len(inputs),), -1, dtype=torch.int64, device=inputs.device)
        answers = self._session.ask(inputs, nowhere).clamp(min=_LEAST).log()
        return answers - answers.mean(1, keepdim=True)

    def teach_student(self) -> None:
        """One step towards the victim, on fresh inputs."""
        count = min(self._batch, self._session.left)
        if count < 2:  # batch normalisation needs two
            return
        inputs = self.made(count).detach()
        wanted = self.ask(inputs)
        self.student.train()
        with torch.enable_grad():
            own = self.student(inputs.to(device_of(self.student)))
            loss = functional.l1_loss(own, wanted.to(own.device))
            self._student_steps.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        self._student_steps.step()

    def teach_generator(self, directions: int, epsilon: float) -> None:
        """One step towards inputs on which both differ."""
        with torch.enable_grad():
            inputs = self.made(self._batch)
        base = self._difference(inputs.detach())
        size = math.prod(inputs.shape[1:])
        slope = torch.zeros_like(inputs)
        for _ in range(directions):
            drawn = torch.randn(len(inputs), size, generator=self._session.generator).to(inputs.device)
            along = functional.normalize(drawn, dim=1).view_as(inputs)
            change = self._difference(inputs.detach() + epsilon * along) - base
            slope += along * (size / epsilon * change).view(-1, *[1] * (inputs.dim() - 1))
        self._maker_steps.zero_grad(set_to_none=True)
        inputs.backward(-slope / (directions * len(inputs)))  # type: ignore[no-untyped-call]
        self._maker_steps.step()

    @torch.no_grad()
    def _difference(self, inputs: Tensor) -> Tensor:
        """L1 distance of student and victim on each input, [B]."""
        with evaluating(self.student):
            own = self.student(inputs.to(device_of(self.student))).float().to(inputs.device)
        difference: Tensor = (own - self.ask(inputs)).abs().sum(1)
        return difference


class _Maker(nn.Module):
    """From noise [B, 64] to inputs of a shape, within a range: two upsamplings for images, else two
    layers."""

    def __init__(self, shape: tuple[int, ...], low: float, high: float) -> None:
        super().__init__()
        self._shape, self._low, self._high = shape, low, high
        if len(shape) == 3:
            small, middle, whole = ((max(1, shape[1] // n), max(1, shape[2] // n)) for n in (4, 2, 1))
            self.layers = nn.Sequential(
                nn.Linear(_NOISE, _WIDTH * small[0] * small[1]),
                nn.Unflatten(1, (_WIDTH, small[0], small[1])),
                nn.BatchNorm2d(_WIDTH),
                nn.Upsample(size=middle),
                nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1),
                nn.BatchNorm2d(_WIDTH),
                nn.LeakyReLU(0.2),
                nn.Upsample(size=whole),
                nn.Conv2d(_WIDTH, shape[0], 3, padding=1),
                nn.BatchNorm2d(shape[0]),
            )
        else:
            size = math.prod(shape)
            self.layers = nn.Sequential(
                nn.Linear(_NOISE, 2 * _WIDTH), nn.ReLU(), nn.Linear(2 * _WIDTH, size), nn.BatchNorm1d(size)
            )

    def forward(self, noise: Tensor) -> Tensor:
        """Inputs [B, *shape]."""
        made: Tensor = self._low + (self._high - self._low) * self.layers(noise).sigmoid()
        return made.view(len(noise), *self._shape)
