"""The four views of an image as made by other libraries, for `bench/augment_views.py`.

Every peer is driven from the same table of parameters, so that all do the same kinds of operation
on the same images; an operation that a row switches off is skipped. Each peer gives four normalised
float32 views of 3 x 224 x 224.
"""

import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageFilter

from spd_fast import reference
from spd_fast.ops.augment_views import IMAGENET_MEAN, IMAGENET_STD
from spd_fast.views import COLUMN

SIZE = 224
BLUR_TAPS = 2 * (SIZE // 20) + 1
MEAN, STD = list(IMAGENET_MEAN), list(IMAGENET_STD)
NEUTRAL = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
UNIT_MEAN, UNIT_STD = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)


class Peer(NamedTuple):
    name: str
    result: str  # beside ours: exact, rounding (to 8 bits at every step), or similar but for ...
    prepare: Callable[[list], Any]  # decoded images, uint8 CHW tensors -> the peer's own input
    views: Callable[[Any, torch.Tensor], list]  # input, (N, 4, 27) -> N lists of 4 views
    # How to see that it does the same work: largest and mean difference to ours on [0, 1], when
    compared: Callable[[Any, torch.Tensor], list]  # what is known to differ is taken out
    neutral: tuple[str, ...]  # of the views, or of the table
    limits: tuple[float, float]


class Library(NamedTuple):
    """A library's functions on its own kind of image."""

    start: Callable  # prepared image -> image
    resized_crop: Callable  # image, top, left, height, width
    crop: Callable
    adjust: tuple[Callable, ...]  # image, factor; in the order of reference.JITTER_OPS
    gray: Callable
    blur: Callable  # image, sigma
    flip: Callable
    finish: Callable  # image -> normalised
    blend: Callable  # image, patch, parameters -> normalised


def chain(library: Library, image, rows: torch.Tensor) -> list:
    source, views, normalised = library.start(image), [], []
    for row in rows.tolist():
        p = dict(zip(COLUMN, row))
        x = source if p["source"] < 0 else views[int(p["source"])]
        x = library.resized_crop(x, *_box(p, "crop"))
        x = jitter(library, x, p, "")
        if p["grayscale"]:
            x = library.gray(x)
        if p["blur_sigma"] > 0:
            x = library.blur(x, p["blur_sigma"])
        if p["flip"]:
            x = library.flip(x)
        views.append(x)
        if p["patch_kind"]:
            patch = jitter(library, library.crop(x, *_box(p, "patch")), p, "patch_")
            normalised.append(library.blend(x, patch, p))
        else:
            normalised.append(library.finish(x))
    return normalised


def jitter(library: Library, x, p: dict, prefix: str):
    for op in reference.JITTER_ORDERS[int(p[prefix + "jitter_order"])]:
        name = reference.JITTER_OPS[op]
        if p[prefix + name] != NEUTRAL[name]:
            x = library.adjust[op](x, p[prefix + name])
    return x


def _box(p: dict, prefix: str) -> list[int]:
    return [int(p[f"{prefix}_{side}"]) for side in ("top", "left", "height", "width")]


def _target(p: dict) -> tuple[slice, slice]:
    top, left = int(p["target_top"]), int(p["target_left"])
    return slice(top, top + int(p["patch_height"])), slice(left, left + int(p["patch_width"]))


def _taps(sigma: float) -> int:
    return 2 * math.ceil(4 * sigma) + 1


def _smooth_blend(x: torch.Tensor, patch: torch.Tensor, p: dict) -> torch.Tensor:
    """SmoothBlend of float tensors, the mask blurred along one axis after the other."""
    y, u = _target(p)
    layer, alpha = torch.zeros_like(x), x.new_zeros(1, SIZE, SIZE)
    layer[:, y, u] = patch
    alpha[:, y, u] = 1
    sigma = [p["alpha_sigma_x"], p["alpha_sigma_y"]]
    alpha = F.gaussian_blur(alpha, [_taps(sigma[0]), 1], sigma)
    alpha = F.gaussian_blur(alpha, [1, _taps(sigma[1])], sigma)
    return (1 - alpha) * x + alpha * layer


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def _to_numpy(x: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.permute(1, 2, 0).cpu().numpy())


def _to_pil(x: torch.Tensor) -> Image.Image:
    return Image.fromarray(_to_numpy(x))


# ------------------------------------------------------------------------------------ torchvision


def _torchvision(start: Callable, blur: Callable, to_float: Callable) -> Library:
    return Library(
        start=start,
        resized_crop=lambda x, *box: F.resized_crop(x, *box, [SIZE, SIZE], antialias=True),
        crop=F.crop,
        adjust=(F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue),
        gray=lambda x: F.rgb_to_grayscale(x, num_output_channels=3),
        blur=blur,
        flip=F.horizontal_flip,
        finish=lambda x: F.normalize(to_float(x), MEAN, STD),
        blend=lambda x, patch, p: F.normalize(
            _smooth_blend(to_float(x), to_float(patch), p), MEAN, STD
        ),
    )


def _to_float(x: torch.Tensor) -> torch.Tensor:
    return F.to_dtype(x, torch.float32, scale=True)


def _blur(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return F.gaussian_blur(x, [BLUR_TAPS, BLUR_TAPS], [sigma, sigma])


FLOAT = _torchvision(_to_float, _blur, _as_it_is)
UINT8 = _torchvision(_as_it_is, _blur, _to_float)
# The recipes of SimSiam and MoCo blur PIL images with PIL's own filter.
PIL = _torchvision(
    _as_it_is,
    lambda x, sigma: x.filter(ImageFilter.GaussianBlur(radius=sigma)),
    lambda x: _to_float(F.pil_to_tensor(x)),
)


# ----------------------------------------------------------------------------------------- kornia


def kornia() -> Library:
    from kornia import color, enhance, filters, geometry

    def resized_crop(x, top, left, height, width):
        box = x[..., top : top + height, left : left + width]
        return geometry.resize(box, (SIZE, SIZE), antialias=True)

    def normalised(x):
        return enhance.normalize(x, x.new_tensor(MEAN), x.new_tensor(STD))[0]

    return Library(
        start=lambda x: _to_float(x)[None],
        resized_crop=resized_crop,
        crop=lambda x, top, left, h, w: x[..., top : top + h, left : left + w],
        adjust=(  # those of several definitions that are torchvision's
            enhance.adjust_brightness_accumulative,
            enhance.adjust_contrast_with_mean_subtraction,
            enhance.adjust_saturation_with_gray_subtraction,
            lambda x, turns: enhance.adjust_hue(x, 2 * math.pi * turns),
        ),
        gray=lambda x: color.rgb_to_grayscale(x).expand(-1, 3, -1, -1),
        blur=lambda x, sigma: filters.gaussian_blur2d(x, (BLUR_TAPS, BLUR_TAPS), (sigma, sigma)),
        flip=geometry.hflip,
        finish=normalised,
        blend=lambda x, patch, p: normalised(_smooth_blend(x[0], patch[0], p)[None]),
    )


# --------------------------------------------------------------------------------- albumentations


def albumentations() -> Library:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # importing it asks the network for news
    import albucore
    import cv2
    from albumentations.augmentations.blur import functional as blur
    from albumentations.augmentations.crops import functional as crops
    from albumentations.augmentations.geometric import functional as geometric
    from albumentations.augmentations.pixel import functional as pixel

    cv2.setNumThreads(0)
    mean, std = (np.array(values, dtype=np.float32) for values in (MEAN, STD))

    def crop(x, top, left, height, width):
        return crops.crop(x, left, top, left + width, top + height)

    def finish(x):  # as its Normalize and ToTensorV2
        scale = np.float32(255 if x.dtype == np.uint8 else 1)
        normalised = albucore.normalize(x, mean * scale, 1 / (std * scale))
        return torch.from_numpy(normalised.transpose(2, 0, 1))

    def blend(x, patch, p):
        y, u = _target(p)
        layer, alpha = np.zeros(x.shape, np.float32), np.zeros((SIZE, SIZE), np.float32)
        layer[y, u] = albucore.to_float(patch, max_value=255)
        alpha[y, u] = 1
        sigma = (p["alpha_sigma_x"], p["alpha_sigma_y"])
        alpha = cv2.GaussianBlur(alpha, [_taps(s) for s in sigma], *sigma)[..., None]
        return finish((1 - alpha) * albucore.to_float(x, max_value=255) + alpha * layer)

    return Library(
        start=_as_it_is,
        resized_crop=lambda x, *box: geometric.resize(
            crop(x, *box), (SIZE, SIZE), cv2.INTER_LINEAR
        ),
        crop=crop,
        adjust=(
            pixel.adjust_brightness_torchvision,
            pixel.adjust_contrast_torchvision,
            pixel.adjust_saturation_torchvision,
            pixel.adjust_hue_torchvision,
        ),
        gray=lambda x: pixel.to_gray(x, 3, "weighted_average"),
        blur=lambda x, sigma: pixel.separable_convolve(
            x, kernel=blur.create_gaussian_kernel_1d(sigma, 0)
        ),
        flip=geometric.hflip,
        finish=finish,
        blend=blend,
    )


# ------------------------------------------------------------------------------------------- DALI


def dali_pipeline(
    job: dict[str, Any], batch: int, encoded: bool = False, device: str = "cpu", **settings
):
    """The four views by DALI's own operators. The arguments of one batch come in as arrays:
    job["rows"] (N, 4, 27), and job["images"], decoded or encoded. On a "gpu" decoded images do so
    too: they are copied there."""
    from nvidia.dali import fn, pipeline_def, types

    box = ("top", "left", "height", "width")
    twist = ("brightness", "contrast", "saturation", "hue")
    prefixes = ("", "patch_")

    def arguments() -> Iterator[np.ndarray]:
        """Of each view: crop's start and end, jitter on, its amounts, blur on, sigma, flip."""
        rows = job["rows"].numpy()
        for v in range(4):
            p = {name: rows[:, v, i] for name, i in COLUMN.items()}
            start, length = (
                np.stack([p[f"crop_{side}"] for side in sides], 1) for sides in (box[:2], box[2:])
            )
            yield from (start, start + length)
            # A saturation of 0 is a gray image.
            p["saturation"] = p["saturation"] * (1 - p["grayscale"])
            amounts = [[p[prefix + name] for name in twist] for prefix in prefixes]
            yield np.any([a != NEUTRAL[n] for a, n in zip(amounts[0], twist)], axis=0)
            for brightness, contrast, saturation, hue in amounts[: 2 if v == 3 else 1]:
                yield from (brightness, contrast, saturation, 360 * hue)
            yield from (p["blur_sigma"] > 0, p["blur_sigma"], p["flip"].astype(np.int32))
        place, size, target = (
            np.stack([p[name] for name in names], 1)
            for names in (
                ("patch_top", "patch_left"),
                ("patch_height", "patch_width"),
                ("target_top", "target_left"),
            )
        )
        yield from (place, size, target, target[:, None].astype(np.int32))

    count = 4 * 10 + 4 + 4

    @pipeline_def(
        batch_size=batch,
        device_id=0 if device == "gpu" else None,
        enable_conditionals=True,
        **settings,
    )
    def pipeline():
        layout = None if encoded else "HWC"
        images = fn.external_source(lambda: job["images"], layout=layout, no_copy=True)
        if encoded:
            images = fn.decoders.image(images)
        given = fn.external_source(
            lambda: [np.ascontiguousarray(a) for a in arguments()], num_outputs=count
        )
        if device == "gpu":
            images = images.gpu()
        given, views, normalised = list(given), [], []

        def take(n: int) -> list:
            taken, given[:n] = given[:n], []
            return taken

        def color_twist(x, amounts):
            return fn.color_twist(x, **dict(zip(twist, amounts)))

        for v in range(4):
            start, end, jittered = take(3)
            amounts = take(4)
            patch_amounts = take(4) if v == 3 else None
            blurred, sigma, flip = take(3)
            x = fn.resize(
                images if v < 2 else views[0],
                roi_start=start,
                roi_end=end,
                size=[SIZE, SIZE],
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
            if jittered:
                x = color_twist(x, amounts)
            if blurred:
                x = fn.gaussian_blur(x, sigma=sigma)
            x = fn.flip(x, horizontal=flip)
            views.append(x)
            if v == 3:
                place, size, target, targets = take(4)
                patch = fn.slice(
                    x, place, size, axes=(0, 1), normalized_anchor=False, normalized_shape=False
                )
                patch = color_twist(patch, patch_amounts)
                layer = fn.multi_paste(patch, out_anchors=targets, output_size=[SIZE, SIZE])
                alpha = fn.constant(fdata=0.0, shape=[SIZE, SIZE, 1], layout="HWC", device=device)
                alpha = fn.erase(alpha, anchor=target, shape=size, axis_names="HW", fill_value=1.0)
                alpha = fn.gaussian_blur(alpha, sigma=8.0, window_size=65)
                x = (1 - alpha) * x + alpha * layer
            normalised.append(
                fn.crop_mirror_normalize(
                    x,
                    dtype=types.FLOAT,
                    output_layout="CHW",
                    mean=[255 * m for m in MEAN],
                    std=[255 * s for s in STD],
                )
            )
        return tuple(normalised)

    built = pipeline()
    built.build()
    return built


def dali(batch: int, device: str = "cpu") -> Peer:
    job: dict[str, Any] = {}
    built = dali_pipeline(
        job,
        batch,
        device=device,
        num_threads=1,
        exec_async=False,
        exec_pipelined=False,
        exec_dynamic=False,
        prefetch_queue_depth=1,
    )

    def views(images: list[np.ndarray], rows: torch.Tensor) -> list:
        job.update(images=images, rows=rows)
        made = [torch.from_dlpack(output.as_tensor()) for output in built.run()]
        return [[view[i] for view in made] for i in range(len(images))]

    return Peer(
        f"DALI, {device.upper()} operators",
        "similar: contrast, hue",  # contrast about mid-gray, hue as a rotation in YIQ
        lambda pixels: [_to_numpy(x) for x in pixels],
        views,
        views,
        ("contrast", "hue", "patch_contrast", "patch_hue"),
        (0.1, 0.004),
    )


# --------------------------------------------------------------------------------- all the peers


def _each(library: Library) -> Callable:
    return lambda images, rows: [chain(library, image, r) for image, r in zip(images, rows)]


def installed_peers(batch: int) -> Iterator[Peer]:
    """All peers that can be imported; a line is printed for one that cannot."""
    for name, result, library, kind, resize, limits in (
        ("torchvision v2, float tensors", "exact", lambda: FLOAT, _as_it_is, None, (1e-4, 1e-5)),
        ("torchvision v2, uint8 tensors", "rounding", lambda: UINT8, _as_it_is, None, (0.1, 0.02)),
        ("torchvision v2, PIL images", "rounding, blur", lambda: PIL, _to_pil, None, (0.2, 0.02)),
        # kornia blurs before it resizes, OpenCV does not antialias
        ("kornia, float tensors", "similar: resize", kornia, _as_it_is, FLOAT, (1e-3, 1e-4)),
        ("albumentations, uint8", "similar: resize", albumentations, _to_numpy, UINT8, (0.2, 0.02)),
    ):
        try:
            made = library()
        except ImportError as error:
            print(f"{name}: left out, not installed ({error})")
            continue
        compared = made._replace(resized_crop=_resize_as(resize, kind)) if resize else made
        prepare = partial(_prepare, kind)
        yield Peer(name, result, prepare, _each(made), _each(compared), (), limits)
    try:
        yield dali(batch)
    except ImportError as error:
        print(f"DALI: left out, not installed ({error})")


def _prepare(kind: Callable, pixels: list) -> list:
    return [kind(x) for x in pixels]


def _resize_as(library: Library, kind: Callable) -> Callable:
    """torchvision's crop and resize, for an image of the given kind."""

    def resized_crop(x, *box):
        if kind is _to_numpy:
            return _to_numpy(library.resized_crop(torch.from_numpy(x).permute(2, 0, 1), *box))
        return library.resized_crop(x, *box)

    return resized_crop
