"""Transfer learning: the copy knows another task before it learns the victim's."""

from torch import Tensor, nn

from honeytrace.extraction.interface import Api, Extraction, Labels
from honeytrace.extraction.recipe import Recipe
from honeytrace.extraction.session import Session
from honeytrace.training import Progress, seeded
from honeytrace.watermark.head import find_head, linear_head


def transfer(
    api: Api,
    pool: Tensor,
    recipe: Recipe,
    *,
    pretraining: tuple[Tensor, Tensor],
    seed: int,
    budget: int | None = None,
    labels: Labels = "soft",
    pretraining_epochs: int | None = None,
    progress: Progress | None = None,
) -> Extraction:
    """Train the copy on another labelled task, replace its head, and fine-tune all of it on the answers.

    Pretrained surrogates are what KnockoffNets start from (Orekondy, Schiele & Fritz, arXiv 1812.02766,
    section 5.1); against watermarks, "transfer learning" of Lukas et al., arXiv 2108.04974, section V.

    Args:
        api, pool, recipe, seed, budget, labels, progress: as `random_queries`.
        pretraining: inputs [M, ...] of the pool's shape and labels int64 [M] of the other task.
        pretraining_epochs: default: the recipe's epochs.

    Raises:
        TypeError, ValueError: as `random_queries`; the other task does not fit the pool; the copy is nothing
            but its head.
    """
    session = Session(api, pool, seed=seed, budget=budget, labels=labels, progress=progress)
    inputs, known = _other_task(pretraining, pool)
    copy = recipe.fresh(seed)
    name = find_head(copy, pool[:2])
    if not name:
        raise ValueError("the surrogate must have more than its head: there would be nothing to transfer")
    head = linear_head(copy, name)
    classes = int(known.max()) + 1
    other = seeded(lambda: nn.Linear(head.in_features, classes), seed).to(head.weight.device)
    copy.set_submodule(name, other)
    recipe.train_on(
        copy, inputs, known, seed=(seed + 1) % 2**64, epochs=pretraining_epochs, progress=progress
    )
    copy.set_submodule(name, head)
    queries, targets = session.ask_at_random()
    history = recipe.train_on(copy, queries, targets, seed=seed, progress=progress)
    return session.extraction(copy, history)


def _other_task(pretraining: tuple[Tensor, Tensor], pool: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(pretraining, tuple) or len(pretraining) != 2:
        raise TypeError(f"pretraining must be a pair (inputs, labels), got {type(pretraining).__name__}")
    inputs, known = pretraining
    if inputs.shape[1:] != pool.shape[1:]:
        raise ValueError(
            f"pretraining must have inputs of the pool's shape {list(pool.shape[1:])}, "
            f"got {list(inputs.shape[1:])}"
        )
    if known.dim() != 1 or known.is_floating_point() or len(known) != len(inputs) or len(known) == 0:
        raise ValueError(
            f"pretraining must have integer labels [M] with M={len(inputs)}, got {known.dtype} "
            f"{list(known.shape)}"
        )
    return inputs, known
