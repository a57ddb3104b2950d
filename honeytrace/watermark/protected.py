"""The protected model: the same module, whose head's answer passes through the watermark.

`protect` copies the modules (their weights are shared, nothing is cloned) and hangs the watermark on the
copied head as a forward hook. So the protected model is of the model's own class, takes the same call, gives
the same kind of output (tensor, tuple, output object), has the same state_dict, and the bare model stays as
it was. Bank, targets and seed live in the hook: not among parameters and buffers, in no repr.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from honeytrace.ops import Bank, WatermarkOutput, watermark
from honeytrace.rule import WatermarkRule
from honeytrace.watermark.head import Head, get_head, sizes_of

Answers = Literal["logits", "probabilities", "labels"]
ANSWERS: tuple[Answers, ...] = ("logits", "probabilities", "labels")

Observe = Callable[[WatermarkOutput], None]
"""Told the marked answers of each call, and which were bent: a secret of the owner's."""

M = TypeVar("M", bound=nn.Module)

_NO_PICKLE = (
    "a protected model is not pickled, for the pickle would hold the trigger bank; "
    "load the watermark's file where it is needed and call protect there"
)


class AnswerHook:
    """Forward hook of the head: (features, logits) -> the marked answer.

    Args:
        bank, target_logits [G, C], planes [P, D], rule, seed: as `honeytrace.ops.watermark` takes them.
        answers: "logits" (as the model gives them), "probabilities" (softmax of them) or "labels" (the logits
            are replaced by one-hot rows of the most probable class: an argmax and a softmax behind the head
            still work).
        constant_time: as `honeytrace.ops.watermark` takes it.
        observe: is told what the watermark did at every call.

    Raises:
        ValueError: answers is none of the three words.
    """

    def __init__(
        self,
        bank: Bank,
        target_logits: Tensor,
        planes: Tensor,
        rule: WatermarkRule,
        seed: int,
        answers: Answers,
        constant_time: bool = False,
        observe: Observe | None = None,
    ) -> None:
        if answers not in ANSWERS:
            raise ValueError(f"answers must be one of {', '.join(map(repr, ANSWERS))}, got {answers!r}")
        self._on: dict[torch.device, tuple[Bank, Tensor, Tensor]] = {
            bank.device: (bank, target_logits, planes)
        }
        self._home = bank.device
        self._rule, self._seed, self._answers = rule, seed, answers
        self._constant_time, self._observe = constant_time, observe

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        features: Tensor = args[0]
        if features.dim() == 2:
            return self._rows(features, output)
        # Each place is answered as if it came alone: a convolution's [B, D, H, W], a sequence's [B, T, D].
        if isinstance(module, nn.Conv2d):
            return self._answer(*(t.movedim(1, -1) for t in (features, output))).movedim(-1, 1)
        return self._answer(features, output)

    def _answer(self, features: Tensor, output: Tensor) -> Tensor:
        """The marked answers [..., C] of features [..., D]."""
        shape = output.shape
        features, output = features.flatten(0, -2), output.flatten(0, -2)
        return self._rows(features, output).reshape(shape)

    def _rows(self, features: Tensor, output: Tensor) -> Tensor:
        bank, target_logits, planes = self._at(features.device)
        if output.dtype == torch.float64:
            # The kernels work in float32. A row whose similarity is 0 must come back bit for bit, so only the
            # bent rows are taken from them.
            marked = self._mark(features.float(), output.float(), bank, target_logits, planes)
            bent = (marked.similarity.amax(dim=1, keepdim=True) > 0).expand_as(output)
            answer = torch.where(bent, marked.logits.double(), output)
        else:
            answer = self._mark(features, output, bank, target_logits, planes).logits
        if self._answers == "probabilities":
            return answer.softmax(dim=-1)
        if self._answers == "labels":
            return nn.functional.one_hot(answer.argmax(dim=-1), answer.shape[-1]).to(answer.dtype)
        return answer

    def _mark(
        self, features: Tensor, logits: Tensor, bank: Bank, target_logits: Tensor, planes: Tensor
    ) -> WatermarkOutput:
        output = watermark(
            features,
            logits,
            bank,
            target_logits,
            planes,
            rule=self._rule,
            seed=self._seed,
            constant_time=self._constant_time,
        )
        if self._observe is not None:
            self._observe(output)
        return output

    def _at(self, device: torch.device) -> tuple[Bank, Tensor, Tensor]:
        held = self._on.get(device)
        if held is None:
            bank, target_logits, planes = self._on[self._home]
            # The first call on a device may come in inference mode, and a later one want gradients.
            with torch.inference_mode(False):
                held = bank.to(device), target_logits.to(device), planes.to(device)
            self._on[device] = held
        return held

    def __repr__(self) -> str:
        return "AnswerHook(<hidden>)"

    def __deepcopy__(self, memo: dict[int, Any]) -> AnswerHook:
        return self  # it holds no state of its own: a copy of the model may share it

    def __reduce__(self) -> NoReturn:
        raise TypeError(_NO_PICKLE)


def protect(model: M, head: str, hook: AnswerHook, features: int, classes: int) -> M:
    """`model` with `hook` on its head; see the module's docstring.

    Raises:
        TypeError: model is no `nn.Module`, a compiled or scripted one, or one that cannot be copied.
        ValueError: the head is missing, or its sizes are not those the watermark was calibrated on.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise TypeError("model must be protected before it is compiled or scripted; pass the plain nn.Module")
    sizes = sizes_of(get_head(model, head))
    if sizes != (features, classes):
        raise ValueError(
            f"the head {head!r} must have {features} features and {classes} classes, as the calibrated model "
            f"had, got {sizes[0]} and {sizes[1]}"
        )
    if is_protected(model):
        raise ValueError("model is protected already; protect the bare model")
    twin = _twin(model)
    marked = get_head(twin, head)
    marked.register_forward_hook(hook)
    marked.__class__ = _own_class(type(marked))
    return twin


def is_protected(model: nn.Module) -> bool:
    """Whether some module of the model answers through a watermark."""
    return any(isinstance(h, AnswerHook) for part in model.modules() for h in part._forward_hooks.values())


def _own_class(kind: type[Head]) -> type[Head]:
    """A subclass of the head's class that no other module has.

    torch.compile finds a compiled graph again by the classes of the modules and does not look at their hooks
    (torch._dynamo.config.skip_nnmodule_hook_guards). Were the class the same, a protected model would run the
    graph that was compiled for the bare one, and answer unmarked; or the graph of another watermark.
    """

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def reduce_ex(self: nn.Module, protocol: int) -> NoReturn:
        raise TypeError(_NO_PICKLE)

    # Names as the class it stands for, so that the model's repr stays what it was.
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**names, "__deepcopy__": deepcopy, "__reduce_ex__": reduce_ex})


def _twin(model: M) -> M:
    """A copy of all modules with the very same parameters and buffers.

    All modules and not only those on the way to the head: a forward pass may reach the head by a second name,
    a list or a bound method, and each of these must lead to the copy, or the answer would leave unmarked.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        # The dictionaries themselves, so that what .to() or load_state_dict does to one is seen by the other.
        for held in (module._parameters, module._buffers):
            memo[id(held)] = held
            memo.update((id(tensor), tensor) for tensor in held.values() if tensor is not None)
        memo.update((id(value), value) for value in vars(module).values() if isinstance(value, Tensor))
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise TypeError(
            f"model must be copyable with copy.deepcopy (its tensors excepted), but {type(model).__name__} "
            f"is not: {error}"
        ) from error
