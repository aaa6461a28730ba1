"""What is right: every algorithm in plain torch, for any float dtype and device.

Nothing here is fast. Every backend is compared with these functions, and these functions are
compared with torchvision, numpy, scipy and anomalib in the tests.
"""

import math
from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

from spd_fast.views import COLUMN

# ----------------------------------------------------------------------------------------- views

GRAY = (0.2989, 0.587, 0.114)
# Column `jitter_order` counts the permutations of these four in lexicographic order.
JITTER_OPS = ("brightness", "contrast", "saturation", "hue")
JITTER_ORDERS = tuple(permutations(range(4)))


def augment_views(
    images: Sequence[Tensor],
    params: Tensor,
    size: tuple[int, int],
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Views of images: crop + resize, jitter, grayscale, blur, flip, patch, normalise.

    Args:
        images: N uint8 tensors (H_i, W_i, 3).
        params: (N, V, 27), columns as in `spd_fast.views.COLUMNS`.
        size: height and width of a view.
        mean, std: per channel; the result is (view - mean) / std.
        dtype: in which everything is computed; nothing is rounded to 8 bits in between.

    Returns:
        (V, N, 3, height, width) of `dtype`.
    """
    batch = [_views_of_one(image, rows, size, dtype) for image, rows in zip(images, params)]
    views = torch.stack([torch.stack(views) for views in batch], dim=1)
    shape = (1, 1, 3, 1, 1)
    return (views - views.new_tensor(mean).view(shape)) / views.new_tensor(std).view(shape)


def _views_of_one(
    image: Tensor, rows: Tensor, size: tuple[int, int], dtype: torch.dtype
) -> list[Tensor]:
    decoded = image.permute(2, 0, 1).to(dtype) / 255
    made: dict[int, Tensor] = {-1: decoded}

    def make(v: int) -> Tensor:
        if v not in made:
            made[v] = _view(make(int(rows[v, COLUMN["source"]])), rows[v], size)
        return made[v]

    return [make(v) for v in range(len(rows))]


def _view(source: Tensor, row: Tensor, size: tuple[int, int]) -> Tensor:
    """One view (3, height, width) of a (3, H, W) source with values in [0, 1]."""
    p = {name: row[i].item() for name, i in COLUMN.items()}
    top, left = int(p["crop_top"]), int(p["crop_left"])
    box = source[:, top : top + int(p["crop_height"]), left : left + int(p["crop_width"])]
    x = separable(box, resize_matrix(box.shape[1], size[0]), resize_matrix(box.shape[2], size[1]))
    x = _color_jitter(x, p, "")
    if p["grayscale"]:
        x = gray(x).expand(3, -1, -1)
    if p["blur_sigma"] > 0:
        radius = size[0] // 20  # the odd kernel nearest a tenth of the height: 23 at 224
        blurs = [gaussian_matrix(n, p["blur_sigma"], radius) for n in size]
        x = separable(x, *blurs)
    if p["flip"]:
        x = x.flip(2)
    return _paste_patch(x, p) if p["patch_kind"] else x


def _color_jitter(x: Tensor, p: dict[str, float], prefix: str) -> Tensor:
    for op in JITTER_ORDERS[int(p[prefix + "jitter_order"])]:
        value = p[prefix + JITTER_OPS[op]]
        if op == 0 and value != 1:
            x = (x * value).clamp(0, 1)
        elif op == 1 and value != 1:
            x = (value * x + (1 - value) * gray(x).mean()).clamp(0, 1)
        elif op == 2 and value != 1:
            x = (value * x + (1 - value) * gray(x)).clamp(0, 1)
        elif op == 3 and value != 0:
            x = adjust_hue(x, value)
    return x


def gray(x: Tensor) -> Tensor:
    """(3, H, W) -> (1, H, W), the luma that torchvision's adjustments use."""
    return GRAY[0] * x[0:1] + GRAY[1] * x[1:2] + GRAY[2] * x[2:3]


def adjust_hue(x: Tensor, turns: float) -> Tensor:
    """Turn the hue of RGB values in [0, 1] by way of HSV: h = (h + turns) mod 1."""
    r, g, b = x
    value, chroma = x.amax(0), x.amax(0) - x.amin(0)
    safe = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(
        value == r,
        (g - b) / safe,
        torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe),
    )
    hue = (hue / 6 + turns) % 1

    def channel(n: int) -> Tensor:
        k = (n + 6 * hue) % 6
        return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)])


def _paste_patch(x: Tensor, p: dict[str, float]) -> Tensor:
    """(1 - alpha) x + alpha u, u = zero but for the jittered patch at the target (paper 3.2).

    alpha is the target box blurred by a Gaussian (SmoothBlend) or the box itself (CutPaste). A box
    is a product of two intervals and the Gaussian is separable, so alpha(y, x) = a(y) b(x) exactly.
    """
    _, height, width = x.shape
    h, w = int(p["patch_height"]), int(p["patch_width"])
    top, left = int(p["patch_top"]), int(p["patch_left"])
    y0, x0 = int(p["target_top"]), int(p["target_left"])
    u = torch.zeros_like(x)
    u[:, y0 : y0 + h, x0 : x0 + w] = _color_jitter(
        x[:, top : top + h, left : left + w], p, "patch_"
    )
    sigmas = (p["alpha_sigma_y"], p["alpha_sigma_x"]) if p["patch_kind"] == 1 else (0.0, 0.0)
    a = _blurred_interval(height, y0, h, sigmas[0]).to(x)
    b = _blurred_interval(width, x0, w, sigmas[1]).to(x)
    alpha = a[:, None] * b[None, :]
    return (1 - alpha) * x + alpha * u


def _blurred_interval(n: int, start: int, length: int, sigma: float) -> Tensor:
    """(n,) float64: one inside [start, start + length), zero outside, Gaussian-blurred."""
    interval = torch.zeros(n, dtype=torch.float64)
    interval[start : start + length] = 1
    if sigma <= 0:
        return interval
    return gaussian_matrix(n, sigma, alpha_radius(sigma)) @ interval


def alpha_radius(sigma: float) -> int:
    """Radius of SmoothBlend's kernel, ceil(4 sigma): 65 taps at sigma 8."""
    return -int(-4 * sigma // 1)


# ------------------------------------------------------------------ linear maps along one axis


def separable(x: Tensor, along_y: Tensor, along_x: Tensor) -> Tensor:
    """Apply one matrix to the rows and one to the columns of (..., H, W)."""
    return along_y.to(x) @ x @ along_x.to(x).mT


def resize_matrix(n_in: int, n_out: int) -> Tensor:
    """(n_out, n_in) float64: antialiased bilinear resize, a triangle as wide as the scale."""
    scale = n_in / n_out
    centre = scale * (torch.arange(n_out, dtype=torch.float64)[:, None] + 0.5)
    pixel = torch.arange(n_in, dtype=torch.float64)[None, :] + 0.5
    weights = (1 - (pixel - centre).abs() / max(scale, 1)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def upsample_matrix(n_in: int, n_out: int) -> Tensor:
    """(n_out, n_in) float64: bilinear without antialias, corners not aligned, edges clamped."""
    position = (torch.arange(n_out, dtype=torch.float64) + 0.5) * (n_in / n_out) - 0.5
    position = position.clamp(0, n_in - 1)[:, None]
    pixel = torch.arange(n_in, dtype=torch.float64)[None, :]
    return (1 - (pixel - position).abs()).clamp(min=0)


def nearest_matrix(n_in: int, n_out: int) -> Tensor:
    """(n_out, n_in) float64: nearest neighbour, place i reads place i * n_in // n_out."""
    source = torch.arange(n_out)[:, None] * n_in // n_out
    return (source == torch.arange(n_in)).double()


def gaussian_matrix(n: int, sigma: float, radius: int, border: str = "reflect") -> Tensor:
    """(n, n) float64: convolution with a normalised Gaussian of 2 radius + 1 taps.

    border: "reflect" mirrors about the edge pixel's centre (torch), "symmetric" about its outer
    side, so that the edge pixel is repeated (scipy's "reflect").
    """
    offset = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offset.double() / sigma) ** 2)
    weights = weights / weights.sum()
    source = torch.arange(n)[:, None] + offset
    if border == "reflect":
        period = max(2 * n - 2, 1)
        source = source % period
        source = torch.minimum(source, period - source) if n > 1 else source * 0
    else:
        source = source % (2 * n)
        source = torch.minimum(source, 2 * n - 1 - source)
    matrix = torch.zeros(n, n, dtype=torch.float64)
    return matrix.scatter_add_(1, source, weights.expand(n, -1).contiguous())


# ---------------------------------------------------------------------- packed triangular factor


def packed_size(d: int) -> int:
    """Elements of a lower triangle of order d, stored in panels of 8 rows."""
    panels = -(-d // 8)
    return 32 * panels * (panels + 1)


def packed_index(d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows i, columns k <= i and places of the triangle: (i, k) at 32 r (r + 1) + 8 k + i % 8.

    r = i // 8 is the panel, so one column of a panel is 8 contiguous rows: one vector register, or
    one 16-byte load in half precision. Places that no (i, k <= i < d) names hold zero.
    """
    rows, columns = torch.tril_indices(d, d)
    panel = rows // 8
    return rows, columns, 32 * panel * (panel + 1) + 8 * columns + rows % 8


def pack(matrices: Tensor) -> Tensor:
    """(P, d, d) -> (P, packed_size(d)); the upper triangle is not read."""
    rows, columns, places = packed_index(matrices.shape[-1])
    packed = matrices.new_zeros(matrices.shape[0], packed_size(matrices.shape[-1]))
    packed[:, places] = matrices[:, rows, columns]
    return packed


def unpack(packed: Tensor, d: int) -> Tensor:
    """(P, packed_size(d)) -> (P, d, d) with a zero upper triangle."""
    rows, columns, places = packed_index(d)
    matrices = packed.new_zeros(packed.shape[0], d, d)
    matrices[:, rows, columns] = packed[:, places]
    return matrices


def quantize(packed: Tensor) -> Tensor:
    """(P, packed_size(d)) -> int8 (P, packed_size(d) + 64 ceil(d / 8)), each row with a scale.

    Panel r is 64 (r + 2) bytes from 32 r (r + 3) on: float32 scales of its 8 rows, float32 elements
    of the 8 on the diagonal, and its columns as in `packed_index`, 8 rows of a byte. The diagonal
    stands apart because it is the largest of most rows of a whitening factor: in the row's scale it
    would make all others' error several times as large.
    """
    panels = math.isqrt(packed.shape[1] // 32)
    parts = []
    for r in range(panels):
        columns = packed[:, 32 * r * (r + 1) :][:, : 64 * (r + 1)].float().unflatten(1, (-1, 8))
        diagonal = columns[:, 8 * r :].diagonal(dim1=1, dim2=2)
        others = columns.clone()
        others[:, 8 * r :].diagonal(dim1=1, dim2=2).zero_()
        scale = others.abs().amax(1) / 127
        rounded = (others / scale.clamp_min(1e-30)[:, None]).round().to(torch.int8).flatten(1)
        parts += [scale.view(torch.int8), diagonal.contiguous().view(torch.int8), rounded]
    return torch.cat(parts, 1)


def dequantize(quantized: Tensor) -> Tensor:
    """What `quantize` made -> (P, packed_size(d)) float32."""
    parts = []
    for r in range(math.isqrt(quantized.shape[1] // 32) - 1):
        panel = quantized[:, 32 * r * (r + 3) :][:, : 64 * (r + 2)]
        scale, diagonal = panel[:, :64].contiguous().view(torch.float32).split(8, 1)
        columns = panel[:, 64:].unflatten(1, (-1, 8)) * scale[:, None]
        columns[:, 8 * r :].diagonal(dim1=1, dim2=2).copy_(diagonal)
        parts.append(columns.flatten(1))
    return torch.cat(parts, 1)


# ----------------------------------------------------------------------------------------- PaDiM


def embed(features: Sequence[Tensor], channels: Tensor) -> Tensor:
    """The kept channels of all layers on the first layer's grid, by nearest neighbour.

    Args:
        features: layers (B, C_l, h_l, w_l), the finest first.
        channels: (d,) int64 indices into the concatenated channels.

    Returns:
        (B, d, h, w) with h, w of the first layer. Grid row y reads row y * h_l // h of layer l.
    """
    height, width = features[0].shape[2:]
    layers = []
    for layer in features:
        rows = torch.arange(height, device=layer.device) * layer.shape[2] // height
        columns = torch.arange(width, device=layer.device) * layer.shape[3] // width
        layers.append(layer[:, :, rows][:, :, :, columns])
    return torch.cat(layers, 1)[:, channels]


def mahalanobis_map(
    features: Sequence[Tensor], channels: Tensor, mean: Tensor, factor: Tensor
) -> Tensor:
    """Distance of every position to its Gaussian: ||W (x - mu)||, with S^-1 = W^T W.

    Args:
        features, channels: as in `embed`.
        mean: (P, d), P = h * w.
        factor: (P, packed_size(d)), W = L^-1 where S = L L^T; or `quantize` of it.

    Returns:
        (B, h, w) in mean's dtype.
    """
    if factor.dtype == torch.int8:
        factor = dequantize(factor)
    x = embed(features, channels).to(mean.dtype)
    batch, d, height, width = x.shape
    delta = x.flatten(2).permute(2, 1, 0) - mean[:, :, None]  # (P, d, B)
    distance = (unpack(factor.to(mean.dtype), d) @ delta).norm(dim=1)  # (P, B)
    return distance.T.reshape(batch, height, width)


def gaussian_update(
    features: Sequence[Tensor], channels: Tensor, count: int, mean: Tensor, scatter: Tensor
) -> None:
    """Fold a block of images into the running mean and scatter of every position, in place.

    With m and S_b the mean and scatter of the K new images about their own mean, and n images
    before: scatter += S_b + n K / (n + K) (m - mean)(m - mean)^T, mean += K / (n + K) (m - mean).
    No difference of large numbers is taken, so the diagonal never turns negative.

    Args:
        features, channels: as in `embed`.
        count: n, images folded in before.
        mean: (P, d). scatter: (P, packed_size(d)).
    """
    x = embed(features, channels).to(mean.dtype)
    new, d = x.shape[:2]
    x = x.flatten(2).permute(2, 0, 1)  # (P, K, d)
    block_mean = x.mean(1)
    centred = x - block_mean[:, None]
    delta = block_mean - mean
    shift = (count * new / (count + new)) * delta[:, :, None] * delta[:, None, :]
    scatter += pack(centred.mT @ centred + shift)
    mean += delta * (new / (count + new))


def gaussian_factor(scatter: Tensor, d: int, count: int, ridge: float) -> None:
    """Turn the scatter of `count` images into the whitening factor W, in place.

    S = scatter / (count - 1) + ridge I = L L^T, W = L^-1.
    """
    covariance = unpack(scatter, d) / (count - 1)
    covariance.diagonal(dim1=1, dim2=2).add_(ridge)
    lower = torch.linalg.cholesky(covariance)
    identity = torch.eye(d, dtype=lower.dtype, device=lower.device).expand_as(lower)
    scatter.copy_(pack(torch.linalg.solve_triangular(lower, identity, upper=False)))


def smooth_upsample_matrix(
    n_in: int,
    n_out: int,
    sigma: float = 4.0,
    radius: int = 16,
    border: str = "symmetric",
    upsampling: str = "bilinear",
) -> Tensor:
    """(n_out, n_in) float64: upsampling, then a Gaussian, as one linear map of an axis.

    The anomaly map is A_y D A_x^T: both steps are linear and separable, so nothing is approximated.
    `upsampling` is "bilinear" or "nearest".
    """
    upsample = {"bilinear": upsample_matrix, "nearest": nearest_matrix}[upsampling]
    return gaussian_matrix(n_out, sigma, radius, border) @ upsample(n_in, n_out)
