"""Triton's interpreter for the tests: rounds as a GPU does, integer overflows are errors, calls are cheap."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


class _Both:
    def __init__(self, *scopes: Any):
        self.scopes = scopes

    def restore(self) -> None:
        for scope in reversed(self.scopes):
            scope.restore()


IN_TURN = 16  # how many values a thread adds up one after the other


def _sum(reduction: Any, operand: Any) -> Any:
    """A sum over an axis as a GPU has it: in a tree over the threads, in turn in each of them.

    NumPy adds all values of an axis in turn if it is not the last one, which loses digits that no GPU loses.
    """
    data, axis = operand.handle.data, reduction.axis
    while axis is not None and data.shape[axis] > IN_TURN:
        first, second = np.split(data, 2, axis)
        data = first + second
    return reduction.to_tensor(np.sum(data, axis=axis, keepdims=reduction.keep_dims), operand.dtype)


def _fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """x y + z rounded once: a product of two float32 is exact in float64."""
    if z.data.dtype != np.float32:
        return interpreter.TensorHandle(x.data * y.data + z.data, z.dtype.scalar)
    wide = x.data.astype(np.float64) * y.data + z.data
    return interpreter.TensorHandle(wide.astype(np.float32), z.dtype.scalar)


def _truncate(builder: Any, source: Any, dtype: Any) -> Any:
    """To bfloat16 the nearest, ties to even; the interpreter cuts off."""
    if not (source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16):
        return builder.cast_impl(source, dtype)
    bits = np.ascontiguousarray(source.data).view(np.uint32)
    nearest = np.where(np.isnan(source.data), 0x7FC00000, bits + (0x7FFF + (bits >> 16 & 1)))
    return interpreter.TensorHandle((nearest >> 16).astype(np.uint16), dtype.scalar)


def _quiet(run: Callable[..., Any]) -> Callable[..., Any]:
    """NumPy warns of 0/0 in lanes that a kernel selects away, and of what the interpreter asks of it."""

    @functools.wraps(run)
    def quiet(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run(*args, **kwargs)

    return quiet


def prepare() -> None:
    """For the rest of this process."""
    # Every addition and multiplication of 32-bit integers is checked: on a GPU it would wrap.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)

    interpreter.GridExecutor.__call__ = _quiet(interpreter.GridExecutor.__call__)
    interpreter.ReduceOps.sum = _sum
    interpreter.InterpreterBuilder.create_fma = _fma
    interpreter.InterpreterBuilder.create_fp_trunc = _truncate

    # Each call from one kernel function to another patches triton.language again, which is most of its time:
    # patch all of it once a launch instead.
    patch = interpreter._patch_lang
    interpreter._patch_lang = lambda function: _Both(patch(function), patch(tl.sum.fn))
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)

    # Arguments are copied to the CPU and back, the whole storage of each; they are there already, and a
    # storage may be a file of gigabytes that holds a few values.
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None
