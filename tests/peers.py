"""What other people's code makes of the same input; used by tests and benchmarks."""

import math

import torch
import torchvision.transforms.v2.functional as F

from spd_fast import reference
from spd_fast.views import COLUMN


def torchvision_views(
    image: torch.Tensor,
    rows: torch.Tensor,
    size,
    dtype: torch.dtype = torch.float64,
    separable_alpha: bool = False,
) -> list[torch.Tensor]:
    """The views of one image by torchvision's float functional operations, one after the other.

    torchvision blurs in two dimensions; `separable_alpha` blurs SmoothBlend's mask along one axis
    after the other instead, as someone who wants speed would.
    """
    decoded = image.permute(2, 0, 1).to(dtype) / 255
    views = []
    for row in rows:
        p = {name: row[i].item() for name, i in COLUMN.items()}
        source = decoded if p["source"] < 0 else views[int(p["source"])]
        box = [int(p[f"crop_{side}"]) for side in ("top", "left", "height", "width")]
        x = F.resized_crop(source, *box, list(size), antialias=True)
        x = torchvision_jitter(x, p, "")
        if p["grayscale"]:
            x = F.rgb_to_grayscale(x, num_output_channels=3)
        kernel = 2 * (size[0] // 20) + 1
        if p["blur_sigma"] > 0 and kernel > 1:
            x = F.gaussian_blur(x, [kernel, kernel], [p["blur_sigma"]] * 2)
        if p["flip"]:
            x = F.horizontal_flip(x)
        if p["patch_kind"]:
            top, left, h, w, y, u = (
                int(p[name])
                for name in (
                    *("patch_top", "patch_left", "patch_height", "patch_width"),
                    *("target_top", "target_left"),
                )
            )
            layer, alpha = torch.zeros_like(x), torch.zeros_like(x)
            patch = F.crop(x, top, left, h, w)
            layer[:, y : y + h, u : u + w] = torchvision_jitter(patch, p, "patch_")
            alpha[:, y : y + h, u : u + w] = 1
            if p["patch_kind"] == 1:
                sigma = [p["alpha_sigma_x"], p["alpha_sigma_y"]]
                kernels = [2 * math.ceil(4 * s) + 1 for s in sigma]
                if separable_alpha:
                    alpha = F.gaussian_blur(alpha[:1], [kernels[0], 1], sigma)
                    alpha = F.gaussian_blur(alpha, [1, kernels[1]], sigma)
                else:
                    alpha = F.gaussian_blur(alpha, kernels, sigma)
            x = (1 - alpha) * x + alpha * layer
        views.append(x)
    return views


def torchvision_jitter(x: torch.Tensor, p: dict, prefix: str) -> torch.Tensor:
    adjust = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
    for op in reference.JITTER_ORDERS[int(p[prefix + "jitter_order"])]:
        x = adjust[op](x, p[prefix + reference.JITTER_OPS[op]])
    return x
