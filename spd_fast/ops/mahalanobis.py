"""PaDiM's operations: distances to per-position Gaussians, and fitting those Gaussians.

The Gaussians of a grid of P positions in d channels are a mean (P, d) and a packed triangle
(P, packed_size(d)), whose layout `spd_fast.reference.packed_index` defines. While fitting, the
triangle holds the scatter of the features; `gaussian_factor` turns it into the whitening factor.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spd_fast import reference
from spd_fast.errors import InputError
from spd_fast.ops.backends import (
    OPERATIONS,
    call,
    cuda_backend,
    native,
    native_backend,
    not_for_triton,
    not_on_cpu,
    not_on_one_gpu,
    reference_backend,
    select,
    stream_of,
    thread_count,
    triton_backend,
)
from spd_fast.ops.factor import FACTOR_DTYPES, blocks_of_matrices, factor_width
from spd_fast.reference import packed_size

# What csrc/mahalanobis.cu takes: registers hold the sums, shared memory the features.
CUDA_IMAGES, CUDA_LAYERS, CUDA_CHANNELS = 4, 4, 3000


def mahalanobis_map(
    features: Sequence[Tensor],
    channels: Tensor,
    mean: Tensor,
    factor: Tensor,
    *,
    threads: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Mahalanobis distance of every grid position: sqrt((x - mu)^T S^-1 (x - mu)), S^-1 = W^T W.

    The kept channels are gathered straight from the layers; the concatenation is never made.

    Args:
        features: float layers (B, C_l, h_l, w_l), the finest first; its h x w is the grid, which
            the others are brought to by nearest neighbour.
        channels: (d,) int64 indices into the concatenated channels. On a GPU, where looking at them
            would hold up the stream, one out of range is taken for a feature of 0.
        mean: (P, d) float32, P = h * w.
        factor: (P, packed_size(d)), the packed W, float32, float16 or bfloat16; or int8 as
            `spd_fast.reference.quantize` makes it.
        threads: CPU threads; 0 = torch.get_num_threads().
        backend: "reference", "native", "cuda", "triton" or "auto"; see `spd_fast.ops.backends`.

    Returns:
        (B, h, w) float32 distances.

    Raises:
        InputError: an argument has the wrong shape or dtype; the message names it.
    """
    arguments = (list(features), channels, mean, factor, threads, backend)
    return call("mahalanobis_map", _run_map, *arguments)


def _run_map(
    features: Sequence[Tensor],
    channels: Tensor,
    mean: Tensor,
    factor: Tensor,
    threads: int = 0,
    backend: str | None = None,
) -> Tensor:
    _check(features, channels, mean, factor, "factor", tuple(FACTOR_DTYPES.values()))
    chosen = select("mahalanobis_map", backend, features, channels, mean, factor)
    return chosen.function(features, channels, mean, factor, threads)


_map_op = torch.library.custom_op("spd_fast::mahalanobis_map", _run_map, mutates_args=())


@_map_op.register_fake
def _(features, channels, mean, factor, threads=0, backend=None) -> Tensor:
    batch, _, height, width = features[0].shape
    return features[0].new_empty(batch, height, width, dtype=torch.float32)


def gaussian_update(
    features: Sequence[Tensor],
    channels: Tensor,
    count: int,
    mean: Tensor,
    scatter: Tensor,
    *,
    threads: int = 0,
    backend: str | None = None,
) -> None:
    """Fold a batch of images into the running mean (P, d) and packed scatter, in place.

    Args are as in `mahalanobis_map`; `count` images were folded in before. The result does not
    depend on how the images are cut into batches, but for rounding.
    """
    arguments = (list(features), channels, count, mean, scatter, threads, backend)
    call("gaussian_update", _run_update, *arguments, mutated=[mean, scatter])


def _run_update(
    features: Sequence[Tensor],
    channels: Tensor,
    count: int,
    mean: Tensor,
    scatter: Tensor,
    threads: int = 0,
    backend: str | None = None,
) -> None:
    _check(features, channels, mean, scatter, "scatter", (torch.float32,))
    if not len(features[0]):  # no image: the mean of nothing would be NaN
        return
    chosen = select("gaussian_update", backend, features, channels, mean, scatter)
    chosen.function(features, channels, count, mean, scatter, threads)


_update_op = torch.library.custom_op(
    "spd_fast::gaussian_update", _run_update, mutates_args=("mean", "scatter")
)


@_update_op.register_fake
def _(features, channels, count, mean, scatter, threads=0, backend=None) -> None:
    return None


def gaussian_factor(
    scatter: Tensor,
    d: int,
    count: int,
    ridge: float,
    *,
    threads: int = 0,
    backend: str | None = None,
) -> None:
    """Turn the packed scatter (P, packed_size(d)) of `count` images into the factor, in place.

    S = scatter / (count - 1) + ridge * I = L L^T, W = L^-1.

    Raises:
        InputError: fewer than 2 images, or a covariance that is not positive definite (its
            features were constant and the ridge is 0, or they were not finite).
    """
    arguments = (scatter, d, count, ridge, threads, backend)
    call("gaussian_factor", _run_factor, *arguments, mutated=[scatter])


def _run_factor(
    scatter: Tensor,
    d: int,
    count: int,
    ridge: float,
    threads: int = 0,
    backend: str | None = None,
) -> None:
    if count < 2:
        raise InputError(f"a covariance needs at least 2 images, got {count}")
    if scatter.shape[1:] != (packed_size(d),) or scatter.dtype != torch.float32:
        raise InputError(
            f"scatter must be float32 (P, {packed_size(d)}) for d = {d}, got {scatter.dtype} "
            f"{tuple(scatter.shape)}"
        )
    chosen = select("gaussian_factor", backend, scatter)
    chosen.function(scatter, d, count, ridge, threads)


_factor_op = torch.library.custom_op(
    "spd_fast::gaussian_factor", _run_factor, mutates_args=("scatter",)
)


@_factor_op.register_fake
def _(scatter, d, count, ridge, threads=0, backend=None) -> None:
    return None


def _check(
    features: Sequence[Tensor],
    channels: Tensor,
    mean: Tensor,
    packed: Tensor,
    name: str,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Refuse what no backend can take; `name` is what the packed triangle is called."""
    if not features or any(f.ndim != 4 or f.shape[0] != features[0].shape[0] for f in features):
        shapes = [tuple(f.shape) for f in features]
        raise InputError(f"features must be a list of (B, C, H, W) with one B, got {shapes}")
    if any(not f.is_floating_point() or not f.shape[2] or not f.shape[3] for f in features):
        raise InputError("features must be floating point and at least 1 x 1")
    total = sum(f.shape[1] for f in features)
    if channels.ndim != 1 or channels.dtype != torch.int64 or not len(channels):
        raise InputError(
            f"channels must be (d,) int64, got {channels.dtype} {tuple(channels.shape)}"
        )
    if channels.is_cpu:
        first, last = map(int, channels.aminmax())
        if first < 0 or last >= total:
            raise InputError(
                f"channels must be in 0..{total - 1}, as the features have {total}; got "
                f"{first}..{last}"
            )
    positions, d = features[0].shape[2] * features[0].shape[3], len(channels)
    if mean.shape != (positions, d) or mean.dtype != torch.float32:
        raise InputError(
            f"mean must be float32 ({positions}, {d}) for a grid of {features[0].shape[2]} x "
            f"{features[0].shape[3]} and {d} channels, got {mean.dtype} {tuple(mean.shape)}"
        )
    if packed.dtype not in dtypes or packed.shape != (positions, factor_width(d, packed.dtype)):
        width = factor_width(d, packed.dtype if packed.dtype in dtypes else dtypes[0])
        raise InputError(
            f"{name} must be ({positions}, {width}) of {' or '.join(map(str, dtypes))}, "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )


def _native_reasons(features, channels, mean, packed) -> list[str]:
    reasons = not_on_cpu([*features, channels, mean, packed])
    if packed.dtype == torch.bfloat16:
        reasons.append("no bfloat16 factor on the CPU")
    if not (mean.is_contiguous() and packed.is_contiguous()):
        reasons.append("mean and packed triangle must be contiguous")
    return reasons


def _cuda_reasons(features, channels, mean, packed) -> list[str]:
    reasons = not_on_one_gpu([*features, channels, mean, packed])
    batch, d = len(features[0]), len(channels)
    if batch > CUDA_IMAGES:
        reasons.append(f"takes at most {CUDA_IMAGES} images at a time, got {batch}")
    if len(features) > CUDA_LAYERS or d > CUDA_CHANNELS:
        reasons.append(f"takes at most {CUDA_LAYERS} layers and {CUDA_CHANNELS} channels")
    if packed.dtype == torch.int8:
        reasons.append("no int8 factor in CUDA")
    if any(f.dtype != torch.float32 for f in features):
        reasons.append("features must be float32")
    if not (channels.is_contiguous() and mean.is_contiguous() and packed.is_contiguous()):
        reasons.append("channels, mean and packed triangle must be contiguous")
    if packed.data_ptr() % 16:
        reasons.append("the packed triangle must begin at a multiple of 16 bytes")
    return reasons


def _map_cuda(features, channels, mean, factor, threads) -> Tensor:
    batch, _, height, width = features[0].shape
    out = mean.new_empty(batch, height, width)
    if batch:
        with torch.cuda.device_of(mean):
            native.cuda_mahalanobis_map(
                [(f.data_ptr(), f.shape[1:], f.stride()) for f in features],
                channels.data_ptr(),
                mean.data_ptr(),
                factor.data_ptr(),
                str(factor.dtype).removeprefix("torch."),
                len(channels),
                batch,
                height,
                width,
                out.data_ptr(),
                stream_of(mean),
            )
    return out


def _triton_reasons(features, channels, mean, packed) -> list[str]:
    reasons = not_for_triton([*features, channels, mean, packed])
    if packed.dtype == torch.int8:
        reasons.append("no int8 factor in Triton")
    if not (channels.is_contiguous() and mean.is_contiguous() and packed.is_contiguous()):
        reasons.append("channels, mean and packed triangle must be contiguous")
    return reasons


def _map_triton(features, channels, mean, factor, threads) -> Tensor:
    from spd_fast.kernels import mahalanobis  # imports triton, which takes a while

    return mahalanobis.mahalanobis_map(features, channels, mean, factor)


def _arrays(features: Sequence[Tensor]) -> list:
    return [f.float().numpy() for f in features]


def _map_native(features, channels, mean, factor, threads) -> Tensor:
    batch, _, height, width = features[0].shape
    out = torch.empty(batch, height, width)
    native.mahalanobis_map(
        _arrays(features),
        channels.contiguous().numpy(),
        mean.numpy(),
        factor.numpy(),
        out.numpy(),
        thread_count(threads),
    )
    return out


def _update_native(features, channels, count, mean, scatter, threads) -> None:
    native.gaussian_update(
        _arrays(features),
        channels.contiguous().numpy(),
        count,
        mean.numpy(),
        scatter.numpy(),
        thread_count(threads),
    )


def _factor_reasons(scatter) -> list[str]:
    reasons = not_on_cpu([scatter])
    if not scatter.is_contiguous():
        reasons.append("the packed triangle must be contiguous")
    return reasons


def _factor_native(scatter, d, count, ridge, threads) -> None:
    bad = native.gaussian_factor(scatter.numpy(), d, count, ridge, thread_count(threads))
    if bad >= 0:
        raise InputError(
            f"the covariance of position {bad} is not positive definite: features are not finite, "
            f"or so large that {ridge:g} is lost when it is added to their variances"
        )


def _exactly(tensor: Tensor) -> Tensor:
    """What matrices are multiplied in: on a GPU float32 may mean TF32, which has 11 bits."""
    return tensor.double() if tensor.is_cuda else tensor.float()


def _blocks(
    features: Sequence[Tensor], channels: Tensor, mean: Tensor
) -> Iterator[tuple[slice, list[Tensor], Tensor]]:
    """Positions that are few enough for their matrices to be made whole, their features as one row
    of a grid, and the channels of these."""
    x = reference.embed(features, channels).flatten(2)[:, :, None]
    every = torch.arange(len(channels), device=x.device)
    for block in blocks_of_matrices(len(mean), len(channels)):
        yield block, [x[..., block]], every


def _map_reference(features, channels, mean, factor, threads) -> Tensor:
    batch, _, height, width = features[0].shape
    parts = [
        reference.mahalanobis_map(layers, every, _exactly(mean[block]), factor[block])
        for block, layers, every in _blocks(features, channels, mean)
    ]
    return torch.cat(parts, 2).view(batch, height, width).float()


def _update_reference(features, channels, count, mean, scatter, threads) -> None:
    for block, layers, every in _blocks(features, channels, mean):
        exact_mean, exact_scatter = _exactly(mean[block]), _exactly(scatter[block])
        reference.gaussian_update(layers, every, count, exact_mean, exact_scatter)
        mean[block], scatter[block] = exact_mean, exact_scatter


def _factor_reference(scatter, d, count, ridge, threads) -> None:
    try:
        for block in blocks_of_matrices(len(scatter), d):
            exact = _exactly(scatter[block])
            reference.gaussian_factor(exact, d, count, ridge)
            scatter[block] = exact
    except torch.linalg.LinAlgError as error:
        raise InputError(f"a covariance is not positive definite: {error}") from error


OPERATIONS["mahalanobis_map"] = (
    native_backend(_map_native, _native_reasons),
    cuda_backend(_map_cuda, _cuda_reasons),
    triton_backend(_map_triton, _triton_reasons),
    reference_backend(_map_reference),
)
OPERATIONS["gaussian_update"] = (
    native_backend(_update_native, _native_reasons),
    reference_backend(_update_reference),
)
OPERATIONS["gaussian_factor"] = (
    native_backend(_factor_native, _factor_reasons),
    reference_backend(_factor_reference),
)
