"""`augment_views`: all augmented views of a batch of images in one call."""

import math
from collections.abc import Sequence

import numpy as np
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
from spd_fast.ops.memory import on_huge_pages
from spd_fast.ops.view_rounds import Round, Stored, make_views
from spd_fast.views import COLUMNS, INTEGER_COLUMNS, PATCH_KINDS, view_size

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_ALPHA_SIGMA = 1e4  # pixels; the kernel has 4 sigma taps on either side
MAX_SIDE = 1 << 24  # whole numbers are exact in the float32 table up to here
# What csrc/augment_views.cu takes: a tile and what its blur reads fit into 48 KB.
CUDA_VIEWS, CUDA_HEIGHT = 16, 339
CUDA_TILE, TRITON_TILE = (64, MAX_SIDE), (16, 64)  # of a view, made by one block or program
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)

Image = np.ndarray | Tensor


def augment_views(
    images: Sequence[Image] | Image | tuple[Image, Image],
    params: Tensor,
    size: int | tuple[int, int] = 224,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    out: Tensor | None = None,
    threads: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Make V augmented views of each of N images (paper section 3.2, appendix C).

    The result is a pure function of the arguments: all randomness is in `params`. Order: crop and
    antialiased bilinear resize, colour jitter, grayscale, blur, flip, patch, normalise.

    Args:
        images: a list of N uint8 arrays (H_i, W_i, 3); or one dense uint8 batch (N, H, W, 3); or a
            ragged batch: a pair of one flat uint8 buffer and an (N, 3) int64 table of offset,
            height and width.
        params: (N, V, 27) from `sample_view_params`.
        size: height and width of the views, pixels.
        dtype: float32, float16, bfloat16, or uint8. uint8 views are not normalised: they hold the
            view in 0..255, rounded to nearest.
        channels_last: memory order of each view.
        mean, std: per channel, of values in [0, 1].
        out: written to instead of a new tensor; its shape, dtype and strides then decide, `size`,
            `dtype` and `channels_last` do not. It may be a slice `batch[:, i:j]` of a larger one.
        threads: CPU threads; 0 = torch.get_num_threads().
        backend: "reference", "native", "cuda", "triton" or "auto"; see `spd_fast.ops.backends`.

    Returns:
        (V, N, 3, height, width): views first, so that `out[k]` is one contiguous batch.

    Raises:
        InputError: an argument has the wrong shape, dtype or range; the message names it.
    """
    if not isinstance(params, Tensor):
        raise InputError(f"params must be a float32 tensor, got {type(params).__name__}")
    buffers, layout = _as_buffers(images)
    if out is None:
        out = _empty_views(params, size, dtype, channels_last, buffers[0].device)
    arguments = (buffers, layout, params, out, list(mean), list(std), threads, backend)
    call("augment_views", _run, *arguments, mutated=[out])
    return out


def _run(
    buffers: Sequence[Tensor],
    layout: Tensor,
    params: Tensor,
    out: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    threads: int = 0,
    backend: str | None = None,
) -> None:
    check(buffers, layout, params, out, mean, std)
    if out.numel():
        chosen = select("augment_views", backend, buffers, layout, params, out)
        chosen.function(buffers, layout, params, out, mean, std, threads)


_op = torch.library.custom_op("spd_fast::augment_views", _run, mutates_args=("out",))


@_op.register_fake
def _(buffers, layout, params, out, mean, std, threads=0, backend=None) -> None:
    return None


def _as_buffers(images) -> tuple[list[Tensor], Tensor]:
    """Contiguous uint8 buffers of any shape, and the (N, 4) table of buffer, offset, height, width;
    what is contiguous is not copied."""
    if isinstance(images, tuple) and len(images) == 2 and np.ndim(images[0]) == 1:
        pixels, table = _as_tensor(images[0]), torch.as_tensor(images[1])
        if table.ndim != 2 or table.shape[1] != 3:
            raise InputError(
                f"a ragged batch needs an (N, 3) table of offset, height and width, got "
                f"{tuple(table.shape)}"
            )
        if table.is_floating_point() or table.is_complex():
            raise InputError(f"a ragged batch's table must hold whole numbers, got {table.dtype}")
        return [pixels.contiguous()], torch.cat([torch.zeros_like(table[:, :1]), table], 1).long()
    if isinstance(images, np.ndarray | Tensor):
        batch = _as_tensor(images)
        if batch.ndim != 4 or batch.shape[3] != 3:
            raise InputError(f"a dense batch must be (N, H, W, 3), got {tuple(batch.shape)}")
        n, height, width, _ = batch.shape
        table = [[0, i * height * width * 3, height, width] for i in range(n)]
        return [batch.contiguous()], torch.tensor(table, dtype=torch.int64).view(-1, 4)
    # A GPU has soon made the views of hundreds of images, so no loop over these does more than it
    # must.
    tensors = [image if type(image) is Tensor else _as_tensor(image) for image in images]
    shapes = [tensor.shape for tensor in tensors]
    for i, shape in enumerate(shapes):
        if len(shape) != 3 or shape[2] != 3:
            raise InputError(f"images[{i}] must be (H, W, 3), got {tuple(shape)}")
    layout = np.zeros((len(tensors), 4), np.int64)
    if tensors:
        layout[:, 0] = np.arange(len(tensors))
        layout[:, 2], layout[:, 3], _ = zip(*shapes)
    buffers = [tensor.contiguous() for tensor in tensors]
    return buffers or [torch.empty(0, dtype=torch.uint8)], torch.from_numpy(layout)


def _as_tensor(image: Image) -> Tensor:
    if isinstance(image, Tensor):
        return image
    if not isinstance(image, np.ndarray):
        raise InputError(f"an image must be a numpy array or a tensor, got {type(image).__name__}")
    # torch knows no negative strides, and warns about arrays that it must not write to.
    plain = image.flags.writeable and all(stride >= 0 for stride in image.strides)
    return torch.from_numpy(image if plain else image.copy())


def _empty_views(
    params: Tensor,
    size: int | tuple[int, int],
    dtype: torch.dtype,
    channels_last: bool,
    device: torch.device,
) -> Tensor:
    if params.ndim != 3 or params.shape[2] != len(COLUMNS):
        raise InputError(f"params must be (N, V, {len(COLUMNS)}), got {tuple(params.shape)}")
    height, width = view_size(size)
    n, v, _ = params.shape
    shape = (v, n, height, width, 3) if channels_last else (v, n, 3, height, width)
    views = on_huge_pages(torch.empty(shape, dtype=dtype, device=device))
    return views.permute(0, 1, 4, 2, 3) if channels_last else views


def check(
    buffers: Sequence[Tensor],
    layout: Tensor,
    params: Tensor,
    out: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Refuse what no backend can take. The tables are on the CPU, so nothing synchronises."""
    uint8 = torch.uint8
    for i, buffer in enumerate(buffers):
        if buffer.dtype is not uint8:
            raise InputError(f"images must be uint8, got {buffer.dtype} (image or buffer {i})")
        if not buffer.is_contiguous():
            raise InputError(f"buffers must be contiguous, number {i} is not")
    if layout.device.type != "cpu":
        raise InputError(f"the images' table must be on the CPU, got {layout.device}")
    if layout.dtype != torch.int64 or layout.ndim != 2 or layout.shape[1] != 4:
        raise InputError(f"layout must be (N, 4) int64, got {layout.dtype} {tuple(layout.shape)}")
    if params.requires_grad or out.requires_grad:
        raise InputError("params and out must not require gradients: views have none")
    if params.device.type != "cpu" or params.dtype != torch.float32:
        raise InputError(
            f"params must be float32 on the CPU, got {params.dtype} on {params.device}"
        )
    n = len(layout)
    if params.ndim != 3 or params.shape[0] != n or params.shape[2] != len(COLUMNS):
        raise InputError(
            f"params must be ({n}, V, {len(COLUMNS)}) for {n} images, got {tuple(params.shape)}"
        )
    v = params.shape[1]
    if out.ndim != 5 or out.shape[:3] != (v, n, 3):
        raise InputError(f"out must be ({v}, {n}, 3, height, width), got {tuple(out.shape)}")
    if out.dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {out.dtype}")
    if any(n > 1 and stride == 0 for n, stride in zip(out.shape, out.stride())):
        raise InputError("out must not be an expanded tensor: its elements share memory")
    if max(out.shape[3:]) >= MAX_SIDE:
        raise InputError(f"a view's sides must be below {MAX_SIDE} pixels, got {tuple(out.shape)}")
    if out.device.type == "cpu" and out.data_ptr() % out.itemsize:
        raise InputError("out must begin at a multiple of its elements' size in memory")
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, (*mean, *std))):
        raise InputError(f"mean and std need 3 finite values, got {mean} and {std}")
    if not all(s > 0 for s in std):
        raise InputError(f"std must be above 0, got {std}")
    if n and v:
        sizes = [buffer.numel() for buffer in buffers]
        tables = layout.contiguous().numpy(), params.contiguous().numpy()
        height, width = out.shape[3:]
        # For a few images, as a loader has them, numpy takes as long as making a view.
        if native is None or not native.views_are_valid(sizes, *tables, height, width):
            explain(sizes, *tables, height, width)
            if native is not None:
                raise InputError("the images' layout or params are not valid")


def explain(
    sizes: Sequence[int], layout: np.ndarray, params: np.ndarray, height: int, width: int
) -> None:
    """Say what is wrong with the tables (N, 4) and (N, V, 27) for buffers of these sizes."""
    _check_layout(sizes, layout)
    _check_rows(layout, params, height, width)


def _check_layout(sizes: Sequence[int], layout: np.ndarray) -> None:
    index, offset, height, width = layout.T
    if (layout < 0).any() or (layout[:, 2:] < 1).any() or (index >= len(sizes)).any():
        raise InputError("every image needs an offset of at least 0 and at least 1 x 1 pixels")
    if (layout[:, 2:] >= MAX_SIDE).any():
        raise InputError(f"an image's sides must be below {MAX_SIDE} pixels")
    room = np.array(sizes)[index]
    # Written so that no product or sum can overflow, whatever the offset.
    beyond = ((offset > room) | (height * width * 3 > room - offset)).nonzero()[0]
    if len(beyond):
        i = int(beyond[0])
        raise InputError(f"image {i} of {height[i]} x {width[i]} reaches past its buffer's end")


def _columns(*names: str) -> np.ndarray:
    return np.array([COLUMNS.index(name) for name in names])


# Boxes of a row by their columns: top, left, height, width.
_CROP = _columns("crop_top", "crop_left", "crop_height", "crop_width")
_PATCH = _columns("patch_top", "patch_left", "patch_height", "patch_width")
_TARGET = _columns("target_top", "target_left", "patch_height", "patch_width")
_ORDERS = _columns("jitter_order", "patch_jitter_order")
_NOT_NEGATIVE = _columns("blur_sigma", "alpha_sigma_y", "alpha_sigma_x", "brightness", "contrast")
_ALPHA_SIGMAS = _columns("alpha_sigma_y", "alpha_sigma_x")
_INTEGERS = _columns(*INTEGER_COLUMNS)
_SOURCE, _KIND = _columns("source", "patch_kind")


def _check_rows(layout: np.ndarray, params: np.ndarray, height: int, width: int) -> None:
    """Every box inside its image or view, every choice in range, no circle of sources."""
    if not np.isfinite(params).all():
        raise InputError("params hold NaN or infinity")
    views = params.shape[1]

    def refuse(bad: np.ndarray, what: str, columns: np.ndarray | None = None) -> None:
        if bad.any():
            i, k, *column = np.argwhere(bad)[0]
            name = "" if columns is None else COLUMNS[columns[column[0]]] + " "
            raise InputError(f"params of image {i}, view {k}: {name}{what}")

    whole = params[..., _INTEGERS]
    refuse(whole != np.floor(whole), "must be a whole number", _INTEGERS)
    source, kind = params[..., _SOURCE], params[..., _KIND]
    refuse((source < -1) | (source >= views), f"source must be -1 or a view index below {views}")
    room = np.where((source < 0)[..., None], layout[:, None, 2:], [height, width])
    refuse(
        _outside(params[..., _CROP], room), "the crop box is empty or reaches outside its source"
    )
    orders = params[..., _ORDERS]
    refuse((orders < 0) | (orders > 23), "must be 0..23", _ORDERS)
    refuse(params[..., _NOT_NEGATIVE] < 0, "must not be negative", _NOT_NEGATIVE)
    kinds = list(PATCH_KINDS.values())
    refuse((kind < min(kinds)) | (kind > max(kinds)), f"patch_kind must be one of {kinds}")
    if kind.any():
        sigmas = params[..., _ALPHA_SIGMAS]
        too_wide = (kind > 0)[..., None] & (sigmas > MAX_ALPHA_SIGMA)
        refuse(too_wide, f"must be at most {MAX_ALPHA_SIGMA:g}", _ALPHA_SIGMAS)
        box_outside = _outside(params[..., _PATCH], (height, width))
        box_outside |= _outside(params[..., _TARGET], (height, width))
        refuse((kind > 0) & box_outside, "the patch or its target is outside the view")
    if (source >= np.arange(views)).any():  # views made from earlier ones cannot form a circle
        reached = source.astype(np.int64)  # follow every chain V steps: it must have ended
        for _ in range(views):
            following = np.take_along_axis(source.astype(np.int64), reached.clip(min=0), 1)
            reached = np.where(reached >= 0, following, reached)
        refuse(reached >= 0, "the views are made from each other in a circle")


def _outside(box: np.ndarray, room: np.ndarray | tuple[int, int]) -> np.ndarray:
    start, length = box[..., :2], box[..., 2:]
    return ((start < 0) | (length < 1) | (start + length > room)).any(-1)


def _run_reference(buffers, layout, params, out, mean, std, threads) -> None:
    images = [
        buffers[b].view(-1)[offset : offset + h * w * 3].view(h, w, 3)
        for b, offset, h, w in layout.tolist()
    ]
    if out.dtype == torch.uint8:
        views = reference.augment_views(images, params, out.shape[3:])
        out.copy_((views * 255).round().clamp(0, 255))
    else:
        out.copy_(reference.augment_views(images, params, out.shape[3:], mean, std))


def _run_native(buffers, layout, params, out, mean, std, threads) -> None:
    # numpy has no bfloat16: its bits cross as uint16.
    view = out.view(torch.uint16) if out.dtype == torch.bfloat16 else out
    native.augment_views(
        [b.numpy() for b in buffers],
        layout.contiguous().numpy(),
        params.contiguous().numpy(),
        view.numpy(),
        str(out.dtype).removeprefix("torch."),
        list(mean),
        list(std),
        thread_count(threads),
    )


def _gpu_reasons(layout, params, out) -> list[str]:
    """Of both GPU backends."""
    reasons = []
    sources = params[..., _SOURCE]
    if (sources != sources[:1]).any():
        reasons.append("one view has different sources in different images")
    most = torch.iinfo(torch.int32).max
    if 3 * int(layout[:, 2:].prod(1).max()) > most:
        reasons.append("an image has more than 2^31 bytes")
    if sum((n - 1) * stride for n, stride in zip(out.shape[2:], out.stride()[2:])) > most:
        reasons.append("a view of out spans more than 2^31 elements")
    return reasons


def _cuda_reasons(buffers, layout, params, out) -> list[str]:
    reasons = not_on_one_gpu([*buffers, out]) + _gpu_reasons(layout, params, out)
    if out.shape[0] > CUDA_VIEWS or out.shape[3] > CUDA_HEIGHT:
        reasons.append(f"takes at most {CUDA_VIEWS} views of {CUDA_HEIGHT} rows")
    return reasons


def _triton_reasons(buffers, layout, params, out) -> list[str]:
    return not_for_triton([*buffers, out]) + _gpu_reasons(layout, params, out)


def _run_cuda(buffers, layout, params, out, mean, std, threads) -> None:
    stored = _stored(out, mean, std)
    make_views(_make_round_in_cuda, buffers, layout, params, out, *stored, CUDA_TILE)


def _make_round_in_cuda(work: Round) -> None:
    n_views, n, _, height, width = work.target.views.shape

    def described(stored: Stored) -> tuple:
        views, scales, shifts = stored
        dtype = str(views.dtype).removeprefix("torch.")
        return views.data_ptr(), dtype, views.stride(), scales, shifts, len(views)

    native.cuda_augment_round(
        work.views,
        *(t.data_ptr() for t in (work.pixels, work.images, work.params)),
        *(n, n_views, height, width),
        work.source and described(work.source),
        described(work.target),
        described(work.fine),
        work.scratch.data_ptr(),
        work.packed,
        work.sums.data_ptr(),
        work.sums.shape[1],
        work.boxes.data_ptr(),
        work.boxes.shape[2],
        work.paste_fine,
        stream_of(work.target.views),
    )


def _run_triton(buffers, layout, params, out, mean, std, threads) -> None:
    from spd_fast.kernels.augment_views import make_round  # imports triton, which takes a while

    stored = _stored(out, mean, std)
    make_views(make_round, buffers, layout, params, out, *stored, TRITON_TILE)


def _stored(out: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[tuple, tuple]:
    """Scale and shift of each channel, from a view's values to those of `out`."""
    if out.dtype == torch.uint8:
        return (255.0,) * 3, (0.0,) * 3
    return tuple(1 / s for s in std), tuple(-m / s for m, s in zip(mean, std))


def _native_reasons(buffers, layout, params, out) -> list[str]:
    return not_on_cpu([*buffers, out])


OPERATIONS["augment_views"] = (
    native_backend(_run_native, _native_reasons),
    cuda_backend(_run_cuda, _cuda_reasons),
    triton_backend(_run_triton, _triton_reasons),
    reference_backend(_run_reference),
)
