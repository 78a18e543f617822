"""A CPU that passes for a GPU, so that code for one can be run where there is none.

While `pretend_gpu()` lasts, tensors that are made on or moved to "cuda" are those of the CPU, but
say that they are on "cuda:0"; an operation between tensors of both devices raises, as torch's own
does, and so does numpy() of one that is on the "GPU". What is intercepted are calls from Python,
which are all that a model in Python makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_iter, tree_map

from tersor import cuda

GPU = torch.device("cuda", 0)
_MARK = "_pretends_to_be_on_a_gpu"  # of a storage
_ADDMM = torch.addmm
# What may be called with a tensor of each; the last is what sets the data of a parameter.
_BETWEEN = ("copy_", "_has_compatible_shallow_copy_type", "__set__")


def is_there(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return not tensor.is_meta and getattr(tensor.untyped_storage(), _MARK, False)


def _mark(tensor: Any) -> Any:
    if isinstance(tensor, Tensor):
        with torch._C.DisableTorchFunction():
            if not tensor.is_meta:
                setattr(tensor.untyped_storage(), _MARK, True)
    return tensor


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = (resolve_name(func) or getattr(func, "__name__", "")).removeprefix("torch.Tensor.")
        if name == "device.__get__":
            return GPU if is_there(args[0]) else func(*args)
        if name in ("is_cuda.__get__", "is_cpu.__get__") and not args[0].is_meta:
            return is_there(args[0]) == (name == "is_cuda.__get__")
        name = name.rpartition(".")[2]
        if name in ("to", "cpu"):
            return self._to((*args, "cpu") if name == "cpu" else args, kwargs)
        asked = torch.device(kwargs.pop("device")) if kwargs.get("device") is not None else None
        tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
        there = [is_there(each) for each in tensors]
        if name == "numpy" and any(there):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name in _BETWEEN:
            return func(*args, **kwargs)
        if asked is None:
            self._check(name, tensors)
        elif asked.type != "cuda":
            kwargs["device"] = asked
        if func is _ADDMM and "out_dtype" in kwargs:
            to, out = kwargs.pop("out_dtype"), kwargs.pop("out")
            assert out.dtype == to == torch.float32 and args[1].dtype == args[2].dtype
            return out.copy_(_ADDMM(args[0], args[1].to(to), args[2].to(to)))
        result = func(*args, **kwargs)
        on_gpu = any(there) if asked is None else asked.type == "cuda"
        return tree_map(_mark, result) if on_gpu else result

    def _to(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor, *rest = args
        target = kwargs.pop("device", None)
        others = []
        for each in rest:
            if isinstance(each, Tensor):  # like that one
                target = GPU if is_there(each) else "cpu"
                others.append(each.dtype)
            elif isinstance(each, (str, torch.device)):
                target = each
            elif isinstance(each, torch.dtype):
                others.append(each)
            # The rest says in what way to copy.
        moved = Tensor.to(tensor, *others, **kwargs) if others or kwargs else tensor
        if target is None:
            return _mark(moved) if is_there(tensor) else moved
        target = torch.device(target)
        if target.type == "meta":
            return Tensor.to(moved, "meta")
        if is_there(tensor) == (target.type == "cuda"):
            return _mark(moved) if is_there(tensor) else moved
        if not moved.is_meta:
            moved = Tensor.clone(moved)
        return _mark(moved) if target.type == "cuda" else moved

    def _check(self, name: str, tensors: list[Tensor]) -> None:
        real = [each for each in tensors if not each.is_meta]
        there = [each for each in real if is_there(each)]
        stray = [each for each in real if not is_there(each) and each.dim() > 0]
        if there and stray:
            shapes = ", ".join(str(list(each.shape)) for each in stray)
            raise RuntimeError(f"{name}: expected all tensors on one device; {shapes} on the CPU")


@contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While it lasts, there is a GPU, if none that tersor's CUDA kernels run on."""
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "unavailable", lambda *device: None)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "get_device_name", lambda *device: "a pretended GPU")
        patch.setattr(torch.cuda, "get_device_capability", lambda *device: (7, 5))
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *device: None)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda *device: 0)
        with _Mode():
            yield
