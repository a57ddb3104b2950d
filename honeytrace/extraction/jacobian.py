"""Jacobian-based data augmentation: few real inputs, and synthetic ones along the copy's own gradients."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from honeytrace.extraction.interface import Api, Extraction, Labels
from honeytrace.extraction.recipe import Recipe
from honeytrace.extraction.session import Session
from honeytrace.training import Progress, device_of, evaluating, predict

_BATCH = 512


def jbda(
    api: Api,
    pool: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    budget: int | None = None,
    labels: Labels = "soft",
    rounds: int = 8,
    step: float = 0.1,
    seed_share: float = 0.2,
    progress: Progress | None = None,
) -> Extraction:
    """Ask about a few real inputs, then about steps from known ones along the sign of the copy's gradient.

    Papernot et al., "Practical Black-Box Attacks against Machine Learning", arXiv 1602.02697, section 4: in
    each round x' = x + step * sign(d F_c(x) / d x), where F is the copy so far and c the class the API gave
    x. The parents are drawn at random among all that was asked, as in the paper's reservoir variant, so that
    the budget is spent evenly over the rounds. Between rounds the copy learns one epoch more; the final copy
    is trained from scratch.

    Args:
        api, pool, recipe, seed, labels, progress: as `random_queries`.
        budget: number of queries, real and synthetic. Default: the size of the pool.
        rounds: T. Default 8. step: lambda, in the units of the inputs. Default 0.1.
        seed_share: share of the budget that goes to real inputs, in (0, 1). Default 0.2 (10,000 of 50,000, as
            against Neural Honeytrace, arXiv 2501.09328).

    Returns:
        The copy; `indices` name the real input that each query descends from.

    Raises:
        TypeError, ValueError: as `random_queries`, or a setting is out of range.
    """
    session = Session(api, pool, seed=seed, budget=budget, labels=labels, progress=progress, repeats=True)
    return _augmented(session, recipe, rounds, step, seed_share, targeted=False)


def jbda_tr(
    api: Api,
    pool: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    budget: int | None = None,
    labels: Labels = "soft",
    rounds: int = 8,
    step: float = 0.1,
    seed_share: float = 0.2,
    progress: Progress | None = None,
) -> Extraction:
    """`jbda` with steps towards a class drawn at random for each input (targeted random, "T-RND").

    Juuti et al., "PRADA: Protecting Against DNN Model Stealing Attacks", arXiv 1805.02628, section 3.3: x' =
    x - step * sign(d L(F(x), c') / d x) for a random class c' other than the one the API gave.

    Args, returns and errors as `jbda`.
    """
    session = Session(api, pool, seed=seed, budget=budget, labels=labels, progress=progress, repeats=True)
    return _augmented(session, recipe, rounds, step, seed_share, targeted=True)


def _augmented(
    session: Session, recipe: Recipe, rounds: int, step: float, seed_share: float, *, targeted: bool
) -> Extraction:
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be an int of at least 1, got rounds={rounds}")
    if not step > 0:
        raise ValueError(f"step must be above 0, got step={step}")
    seeds = min(int(seed_share * session.budget), len(session.pool)) if 0 < seed_share < 1 else 0
    if seeds < 1 or seeds * 2**rounds < session.budget:
        raise ValueError(
            f"seed_share={seed_share} and rounds={rounds} must reach budget={session.budget}: in (0, 1), "
            "with at least one seed, and no more than twice as many queries after a round as before"
        )
    rows = session.draw(seeds)
    session.ask(session.pool[rows], rows)
    low, high = session.pool.amin().item(), session.pool.amax().item()
    copy = recipe.fresh(session.seed)
    for number in range(rounds, 0, -1):
        queries, answers, indices = session.asked()
        recipe.train_on(
            copy,
            queries,
            session.learnable(answers),
            seed=(session.seed + number) % 2**64,
            epochs=1,
            progress=session.progress,
        )
        count = min(len(queries), -(-session.left // number))
        if count == 0:
            break
        parents = torch.randperm(len(queries), generator=session.generator)[:count].to(queries.device)
        classes = answers[parents] if answers.dim() == 1 else answers[parents].argmax(1)
        if targeted:
            classes = _other_classes(classes, _num_classes(copy, queries), session.generator)
        moved = _stepped(copy, queries[parents], classes, step, targeted=targeted)
        session.ask(moved.clamp(low, high), indices[parents])
    queries, answers, _ = session.asked()
    trained = recipe.train(queries, session.learnable(answers), seed=session.seed, progress=session.progress)
    return session.extraction(*trained)


def _num_classes(model: nn.Module, inputs: Tensor) -> int:
    return predict(model, inputs[:1]).shape[1]


def _other_classes(classes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """For each class another one of 0..count-1, uniformly."""
    shift = torch.randint(1, count, classes.shape, generator=generator).to(classes.device)
    return (classes + shift) % count


def _stepped(model: nn.Module, inputs: Tensor, classes: Tensor, step: float, *, targeted: bool) -> Tensor:
    """Inputs one step up the logit of `classes`, or, targeted, one step down the loss to them."""
    slope = _gradient(model, inputs, classes, loss=targeted)
    return inputs + (-step if targeted else step) * slope.sign()


def _gradient(model: nn.Module, inputs: Tensor, classes: Tensor, *, loss: bool) -> Tensor:
    """Gradient in `inputs` of the cross entropy to `classes`, or of the logit of `classes`."""
    found = []
    device = device_of(model)
    with evaluating(model), torch.enable_grad():
        for batch, wanted in zip(torch.split(inputs, _BATCH), torch.split(classes, _BATCH), strict=True):
            point = batch.detach().to(device).requires_grad_()
            wanted = wanted.to(device)
            logits = model(point)
            if loss:
                value = functional.cross_entropy(logits, wanted, reduction="sum")
            else:
                value = logits.gather(1, wanted[:, None]).sum()
            found.append(torch.autograd.grad(value, point)[0].to(inputs.device))
    return torch.cat(found)
