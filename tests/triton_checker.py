"""Watches the memory that kernels touch under Triton's interpreter.

The interpreter runs one program after the other and reads wherever a pointer points. This reports
what would go wrong on a GPU: a load or store outside the tensors that were passed, and two programs
of a launch that touch the same address when one of them writes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


@contextmanager
def checked(*others: torch.Tensor) -> Iterator[None]:
    """In this block a launch raises triton's InterpreterError for what it does wrong. It may touch
    its arguments, and `others`, to which it comes by arithmetic with addresses."""
    watch = _Watch()
    originals = {name: getattr(InterpreterBuilder, name) for name in _KINDS}
    prepare = GridExecutor._init_args_hst

    def watched(name: str):
        def call(builder, *arguments):
            pointers = arguments[_KINDS[name].pointers]
            mask = arguments[_KINDS[name].mask]
            watch.see(_KINDS[name].kind, builder.grid_idx, pointers, mask)
            return originals[name](builder, *arguments)

        return call

    def start(executor, arguments, keywords):
        found = prepare(executor, arguments, keywords)  # what the interpreter copies to the host
        watch.launch([*found[0], *found[1].values(), *others])
        return found

    GridExecutor._init_args_hst = start
    for name in _KINDS:
        setattr(InterpreterBuilder, name, watched(name))
    try:
        yield
    finally:
        GridExecutor._init_args_hst = prepare
        for name, original in originals.items():
            setattr(InterpreterBuilder, name, original)


class _Kind(NamedTuple):
    kind: str
    pointers: int
    mask: int


# The interpreter's operations, and which of their arguments are the pointers and the mask. Loads
# and stores without a mask come here too, with a mask of ones.
_KINDS = {
    "create_masked_load": _Kind("load", 0, 1),
    "create_masked_store": _Kind("store", 0, 2),
    "create_atomic_rmw": _Kind("atomic", 1, 3),
}


class _Watch:
    def launch(self, arguments: list) -> None:
        """A new launch: what it may touch, and nothing touched yet."""
        self.tensors = [_extent(tensor) for tensor in _tensors(arguments)]
        self.writer: dict[int, tuple] = {}  # program by byte address
        self.readers: dict[int, set] = {}

    def see(self, kind: str, program: tuple, pointers, mask) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        wanted = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        addresses = pointers.data.astype(np.int64)[wanted]
        inside = np.zeros(len(addresses), bool)
        for start, end in self.tensors:
            inside |= (addresses >= start) & (addresses + size <= end)
        program = tuple(map(int, program))
        if not inside.all():
            raise IndexError(f"{kind} of {(~inside).sum()} elements out of bounds in {program}")
        if kind == "atomic":
            return
        different, times = np.unique(addresses, return_counts=True)
        if kind == "store" and (times > 1).any():
            raise RuntimeError(f"program {program} stores twice at one address")
        for address in different.tolist():
            before = self.writer.get(address, program)
            if before != program:
                raise RuntimeError(f"race: {kind} in {program} of what {before} stores")
            readers = self.readers.setdefault(address, set())
            if kind == "load":
                readers.add(program)
                continue
            if readers - {program}:
                raise RuntimeError(f"race: store in {program} of what {min(readers)} loads")
            self.writer[address] = program


def _tensors(arguments: list) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _tensors(argument)
        elif hasattr(argument, "data_ptr"):
            yield argument


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    elements = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()
