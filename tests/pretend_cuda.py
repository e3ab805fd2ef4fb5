"""A GPU that is not there: tensors that say they are on CUDA and compute on the CPU.

An operation on tensors of both devices is refused here as there, so that code which puts a tensor on the wrong device
fails on any machine. It says nothing about kernels or speed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map

CUDA = torch.device("cuda:0")
# Beneath its face: the only device but the CPU's own whose gradients autograd computes on the caller's thread.
_BENEATH = torch.device("lazy:0")
# Operations that CUDA, too, lets read from both sides.
_CROSSING = {"_to_copy", "copy_", "index", "index_put_", "_index_put_impl_", "set_"}


class _There(torch.Tensor):
    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "_There":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=_BENEATH,
        )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    def __repr__(self, **_: Any) -> str:
        return f"There({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Renaming(TorchFunctionMode):
    """PyTorch without CUDA does not get to see its name."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def renamed(one: Any) -> Any:
            if isinstance(one, str) and one.startswith("cuda"):
                return _BENEATH
            return _BENEATH if isinstance(one, torch.device) and one.type == "cuda" else one

        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.tolist:
            args = [one.cpu() for one in args]
        kwargs = {key: renamed(one) for key, one in (kwargs or {}).items()}
        if func is torch.Tensor.backward:  # what its hooks call comes here as well
            gradient = torch.ones_like(args[0]) if kwargs["gradient"] is None else kwargs["gradient"]
            with self:
                return _engine_run_backward(
                    (args[0],), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        if func is torch.tensor and kwargs.get("device") == _BENEATH:  # it fills memory itself
            return func(*args, **kwargs | {"device": "cpu"}).to(_BENEATH)
        return func(*map(renamed, args), **kwargs)


class _Dispatch(TorchDispatchMode):
    """Sees what makes tensors from nothing, or from tensors of the CPU."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor)]
    there = [one for one in tensors if isinstance(one, _There)]
    here = [one for one in tensors if not isinstance(one, _There) and one.dim()]
    name = func.overloadpacket.__name__
    if there and here and name not in _CROSSING:
        raise RuntimeError(f"{func}: expected all tensors on the same device, but found cuda:0 and cpu")
    asked = kwargs.get("device")
    outward = bool(there) if asked is None else torch.device(asked) == _BENEATH
    if outward and asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}

    def unwrapped(one: Any) -> Any:
        return one.held if isinstance(one, _There) else one

    wrappers = {id(one.held): one for one in there} | {id(one): one for one in tensors if not isinstance(one, _There)}

    def wrapped(one: Any) -> Any:
        if not isinstance(one, torch.Tensor):
            return one
        known = wrappers.get(id(one))
        return known if known is not None else _There(one) if outward else one

    made = tree_map(wrapped, func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs)))
    return return_and_correct_aliasing(func, args, kwargs, made) if there else made


@contextmanager
def pretend_cuda() -> Iterator[None]:
    """Inside, "cuda" is a device like any other, and torch.cuda.is_available() says so."""
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        _Renaming(),
        _Dispatch(),
    ):
        yield
