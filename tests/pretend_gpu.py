"""A GPU that is not there: CPU tensors that say they are on one, and refuse to meet tensors that are not.

    with pretend_gpu():
        model = small_cnn(10, 1, 28).to("cuda")
        model(torch.randn(2, 1, 28, 28))        # RuntimeError, as on a real one

So that code which forgets to move a tensor fails on machines without a GPU too. What is checked is where
tensors are, at every call of a torch function; values are those of the CPU. A tensor of no dimension may come
from the CPU, and so may indices into a tensor on the GPU, as in torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from honeytrace.ops import registry

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")

_MARK = "_on_the_pretended_gpu"
_TO = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.type_as}
_INDEXING = {Tensor.__getitem__, Tensor.index_select, torch.index_select}
_WRITING = {Tensor.__setitem__, Tensor.copy_, Tensor.data.__set__, Tensor.grad.__set__}
_ANYWHERE = {torch._has_compatible_shallow_copy_type}
_NUMPY = {Tensor.numpy, Tensor.__array__}


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor pretends."""
    return bool(tensor.__dict__.get(_MARK, False)) if hasattr(tensor, "__dict__") else False


def _put(value: Any, gpu: bool) -> Any:
    if isinstance(value, Tensor):
        value.__dict__[_MARK] = gpu
    return value


class _Generator(torch.Generator):
    """A generator that says where it is said to be."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls)
        made.gpu = torch.device(device).type == "cuda"
        return made

    def __init__(self, device: Any = "cpu") -> None:
        super().__init__()


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return GPU if on_gpu(args[0]) else CPU
        if func == Tensor.is_cuda.__get__:
            return on_gpu(args[0])
        if func in _TO:
            return self._moved(func, args, kwargs)
        if func in _NUMPY and on_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if func in _ANYWHERE:
            return func(*args, **kwargs)
        if func in _WRITING:
            return self._written(func, args, kwargs)
        device = kwargs.pop("device", None)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        gpu = self._place(func, args, tensors) if device is None else torch.device(device).type == "cuda"
        if device is not None and torch.device(device).type not in ("cpu", "cuda"):
            kwargs["device"] = device
        self._check_generator(func, kwargs.get("generator"), gpu)
        return tree_map(lambda leaf: _put(leaf, gpu), func(*args, **kwargs))

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        tensor, rest = args[0], list(args[1:])
        if func is Tensor.cuda or func is Tensor.cpu:
            rest, kwargs, gpu = [], {}, func is Tensor.cuda
        else:
            gpu = on_gpu(tensor)
            given = kwargs.pop("device", None)
            if rest and isinstance(rest[0], (str, torch.device)):
                given = rest.pop(0)
            elif rest and isinstance(rest[0], Tensor):
                other = rest.pop(0)
                given, kwargs["dtype"] = (GPU if on_gpu(other) else CPU), other.dtype
            if given is not None:
                gpu = torch.device(given).type == "cuda"
        kwargs["dtype"] = next(
            (value for value in rest if isinstance(value, torch.dtype)), kwargs.get("dtype")
        )
        kwargs.pop("non_blocking", None)
        copied = kwargs.pop("copy", False)
        asked = {name: value for name, value in kwargs.items() if value is not None}
        found = Tensor.to(tensor, **asked) if asked else tensor
        if found is tensor and (gpu != on_gpu(tensor) or copied):
            found = tensor.clone()
        return found if found is tensor else _put(found, gpu)

    def _written(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        into = args[0]
        if func in (Tensor.data.__set__, Tensor.grad.__set__):
            found = func(*args, **kwargs)
            if func == Tensor.data.__set__ and isinstance(args[1], Tensor):
                _put(into, on_gpu(args[1]))
            return found
        if func is Tensor.__setitem__:
            indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
            self._check_indices(into, indices)
            value = args[2]
            if isinstance(value, Tensor) and value.dim() and on_gpu(value) != on_gpu(into):
                raise RuntimeError("__setitem__: value and tensor are on different devices")
        return func(*args, **kwargs)

    def _place(self, func: Any, args: Any, tensors: list[Tensor]) -> bool:
        if not tensors:
            return False
        if func in _INDEXING:
            self._check_indices(tensors[0], tensors[1:])
            return on_gpu(tensors[0])
        places = {on_gpu(tensor) for tensor in tensors}
        if len(places) == 1:
            return places.pop()
        if any(tensor.dim() for tensor in tensors if not on_gpu(tensor)):
            name = getattr(func, "__name__", func)
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu: {[(list(t.shape), 'cuda' if on_gpu(t) else 'cpu') for t in tensors]}"
            )
        return True

    @staticmethod
    def _check_indices(tensor: Tensor, indices: list[Tensor]) -> None:
        if not on_gpu(tensor) and any(on_gpu(index) and index.dim() for index in indices):
            raise RuntimeError("indices should be either on cpu or on the same device as the tensor (cpu)")

    @staticmethod
    def _check_generator(func: Any, generator: Any, gpu: bool) -> None:
        if isinstance(generator, torch.Generator) and getattr(generator, "gpu", False) != gpu:
            raise RuntimeError(
                f"{getattr(func, '__name__', func)}: expected a generator on {'cuda' if gpu else 'cpu'}"
            )


@contextlib.contextmanager
def pretend_gpu() -> Iterator[None]:
    """Inside, in this thread, "cuda" is a device that tensors can be on."""
    stand_ins = {
        (torch, "Generator"): _Generator,
        (torch.nn.Parameter, "__new__"): staticmethod(_new_parameter(torch.nn.Parameter.__new__)),
        (torch.random, "fork_rng"): _without_devices(torch.random.fork_rng),
        (torch.cuda, "device"): lambda device: contextlib.nullcontext(),
        (torch.cuda, "manual_seed"): lambda seed: None,
        (torch.cuda, "get_device_name"): lambda device=None: "a GPU that is not there",
        (torch.cuda, "is_available"): lambda: True,
    }
    kept = {(place, name): getattr(place, name) for place, name in stand_ins}
    try:
        for (place, name), value in stand_ins.items():
            setattr(place, name, value)
        # The kernels of a real GPU would be chosen, and there are none.
        with _Mode(), registry.force("reference"):
            yield
    finally:
        for (place, name), value in kept.items():
            setattr(place, name, value)


def _new_parameter(new: Any) -> Any:
    """No torch function, so the mode does not see it."""

    def made(cls: type, data: Any = None, requires_grad: bool = True) -> Tensor:
        parameter: Tensor = new(cls, data, requires_grad)
        return parameter if data is None else _put(parameter, on_gpu(data))

    return made


def _without_devices(fork_rng: Any) -> Any:
    return lambda devices=(): fork_rng(devices=[])
