"""The packed whitening factors of a grid of positions, in the dtypes that they are kept in.

float32, float16 and bfloat16 are laid out by `spd_fast.reference.packed_index`, int8 by
`spd_fast.reference.quantize`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from spd_fast.errors import InputError
from spd_fast.ops.memory import give_back, on_huge_pages
from spd_fast.reference import dequantize, pack, packed_size, quantize

FACTOR_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
BLOCK = 64  # positions converted at a time
BLOCK_BYTES = 1 << 26  # of float64 matrices made at a time


def find_dtype(factor_dtype: str) -> torch.dtype:
    """
    Raises:
        InputError: not one of `FACTOR_DTYPES`.
    """
    if factor_dtype not in FACTOR_DTYPES:
        raise InputError(f"factor_dtype is {', '.join(FACTOR_DTYPES)}; got {factor_dtype!r}")
    return FACTOR_DTYPES[factor_dtype]


def factor_width(d: int, dtype: torch.dtype) -> int:
    """Elements of one position's factor."""
    return packed_size(d) + (64 * -(-d // 8) if dtype == torch.int8 else 0)


def factor_from(
    triangles: Callable[[slice], Tensor], positions: int, d: int, dtype: torch.dtype, device
) -> Tensor:
    """(positions, factor_width) of the (P, d, d) triangles that a function gives for a slice."""
    factor = _empty(positions, d, dtype, device)
    for block in blocks_of_matrices(positions, d):
        factor[block] = _rounded(pack(triangles(block)), dtype)
    return factor


def blocks_of_matrices(positions: int, d: int) -> list[slice]:
    """Positions whose (d, d) float64 matrices take 64 MB."""
    step = max(1, BLOCK_BYTES // (8 * d * d))
    return [slice(start, start + step) for start in range(0, positions, step)]


def converted(factor: Tensor, d: int, dtype: torch.dtype, consume: bool = False) -> Tensor:
    """The factor in another of the dtypes, or itself.

    consume: nobody uses the one given afterwards. Its memory is given back as it is read, where
    `give_back` can, so that both never stand side by side.
    """
    if factor.dtype == dtype:
        return factor
    result = _empty(len(factor), d, dtype, factor.device)
    for to, rows in zip(result.split(BLOCK), factor.split(BLOCK)):
        to.copy_(_rounded(rows, dtype))
        if consume:
            give_back(factor, rows)
    return result


def _empty(positions: int, d: int, dtype: torch.dtype, device) -> Tensor:
    shape = positions, factor_width(d, dtype)
    return on_huge_pages(torch.empty(shape, dtype=dtype, device=device))


def _rounded(factor: Tensor, dtype: torch.dtype) -> Tensor:
    if factor.dtype == torch.int8:
        factor = dequantize(factor)
    return quantize(factor) if dtype == torch.int8 else factor.to(dtype)
