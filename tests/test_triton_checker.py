"""Kernels with a fault each: the checks that the real kernels pass must find them."""

import pytest
import torch

pytestmark = [pytest.mark.triton, pytest.mark.interpreted]

triton = pytest.importorskip("triton")
tl = triton.language

from triton.runtime.errors import InterpreterError  # noqa: E402
from triton_checker import checked  # noqa: E402


@triton.jit
def shifted(x, out, n, by, step: tl.constexpr, bound: tl.constexpr):
    """out[i] = x[i + by] for i < n - by."""
    i = tl.program_id(0) * step + tl.arange(0, 16)
    value = tl.load(x + i + by, mask=i < n - by + bound, other=0.0)
    tl.store(out + i, value, mask=i < n - by)


@triton.jit
def total(x, out, n, atomic: tl.constexpr):
    """out[0] += x[i]"""
    i = tl.program_id(0) * 16 + tl.arange(0, 16)
    value = tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0)
    if atomic:
        tl.atomic_add(out, value)
    else:
        tl.store(out, tl.load(out) + value)


@triton.jit
def unmasked(x, out):
    i = tl.arange(0, 16)
    tl.store(out + i, tl.load(x + i))


@triton.jit
def halved(x, out, of_tuple: tl.constexpr):
    """Two neighbours to one place."""
    i = tl.arange(0, 16)
    tl.store((out[0] if of_tuple else out) + i // 2, tl.load(x + i))


def vectors():
    return torch.arange(100.0), torch.zeros(100)


def test_a_kernel_without_fault_passes():
    x, out = vectors()
    with checked():
        shifted[(7,)](x, out, 100, 3, 16, 0)
    assert torch.equal(out[:97], x[3:])
    with checked():
        total[(7,)](x, out[99:], 100, True)
    assert out[99] == x.sum()
    strided = torch.zeros(40)[::2]
    with checked():
        unmasked[(1,)](x, strided)  # within the extent, though not what its shape says


@pytest.mark.parametrize(
    "kernel, arguments, message",
    [
        (shifted, (100, 3, 16, 1), r"load of 1 elements out of bounds in \(6, 0, 0\)"),
        (shifted, (100, -1, 16, 0), "out of bounds"),
        (shifted, (101, 1, 16, 0), "store of 1 elements out of bounds|load of 1"),
        (shifted, (100, 3, 15, 0), "race: store in"),
        (total, (100, False), "race: load in"),
    ],
)
def test_a_fault_is_found(kernel, arguments, message):
    x, out = vectors()
    with pytest.raises(InterpreterError, match=message), checked():
        kernel[(7,)](x, out, *arguments)


def test_a_race_with_an_earlier_reader_is_found():
    x, _ = vectors()
    with pytest.raises(InterpreterError, match="race: store in .* of what .* loads"), checked():
        shifted[(7,)](x, x, 100, 3, 16, 0)


def test_reading_past_the_end_without_a_mask_is_found():
    x, out = vectors()
    with pytest.raises(InterpreterError, match="load of 1 elements"), checked():
        unmasked[(1,)](x[:15], out)
    with pytest.raises(InterpreterError, match="store of 3 elements"), checked():
        unmasked[(1,)](x, out[:13])


@pytest.mark.parametrize("of_tuple", [False, True])
def test_two_stores_to_one_place_are_found(of_tuple):
    x, out = vectors()
    with pytest.raises(InterpreterError, match="stores twice"), checked():
        halved[(1,)](x, (out,) if of_tuple else out, of_tuple)


def test_nothing_is_watched_afterwards():
    x, out = vectors()
    with pytest.raises(InterpreterError), checked():
        total[(7,)](x, out, 100, False)
    total[(7,)](x, out, 100, False)
