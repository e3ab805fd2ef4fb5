"""Importing this makes Triton's interpreter compute numbers of bfloat16, which it keeps as raw 16 bits and computes on.

For tests only, in a process that does nothing else. Casts round to nearest even; products and sums are those of
float32, rounded once, as on a GPU. It also makes the interpreter faster, which would go through all of Triton's
language again for every helper that a kernel calls.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.emulator.lanes import from_bf16, to_bf16

COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def widened(handle: TensorHandle) -> TensorHandle:
    """The same numbers as float32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle(from_bf16(np.ascontiguousarray(handle.data)), tl.float32)


def narrowed(values: np.ndarray) -> TensorHandle:
    """Rounded to bfloat16, half to even."""
    return TensorHandle(to_bf16(values), tl.bfloat16)


def repaired_cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: InterpreterBuilder, handle: TensorHandle, target: Any) -> Any:
        to = target.scalar
        if handle.dtype.scalar == to:
            return original(self, handle, target)
        handle = widened(handle)
        if to == tl.bfloat16:
            return narrowed(handle.data.astype(np.float32))
        return handle if handle.dtype.scalar == to else original(self, handle, target)

    return cast


def repaired_dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any, **named: Any) -> Any:
        return original(self, widened(a), widened(b), *rest, **named)

    return dot


def repaired_binary(original: Callable[..., Any]) -> Callable[..., Any]:
    def binary(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, operation: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16 or b.dtype.scalar != tl.bfloat16:
            return original(self, a, b, operation)
        result = operation(widened(a).data, widened(b).data)
        return TensorHandle(result, tl.int1) if operation in COMPARISONS else narrowed(result)

    return binary


def patched_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """The language as a function sees it is interpreted from its first call on, and never compiled again."""
    seen = set()

    def patch(function: Any) -> Any:
        visible = frozenset(name for name, value in function.__globals__.items() if value in (tl, tl.core))
        if visible not in seen:
            original(function)
            seen.add(visible)
        return interpreter._LangPatchScope()

    return patch


interpreter._patch_lang = patched_once(interpreter._patch_lang)
InterpreterBuilder.cast_impl = repaired_cast(InterpreterBuilder.cast_impl)
InterpreterBuilder.create_dot = repaired_dot(InterpreterBuilder.create_dot)
InterpreterBuilder.binary_op = repaired_binary(InterpreterBuilder.binary_op)
