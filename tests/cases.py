"""The inputs over which every backend is compared with the reference."""

import ctypes
import mmap

import torch

from spd_fast import recipes, sample_view_params
from spd_fast.reference import packed_size
from spd_fast.views import COLUMN

# name -> (image sizes, view size, recipe)
VIEW_CASES = {
    "photo": ([(375, 500)], (224, 224), recipes.simsiam()),
    "ragged": ([(60, 80), (81, 33), (47, 47)], (64, 64), recipes.simsiam()),
    "tiny images": ([(1, 1), (1, 9), (7, 1), (2, 3)], (32, 32), recipes.simclr()),
    "upscaling": ([(9, 7)], (120, 120), recipes.simclr()),
    "wide image": ([(12, 700)], (48, 48), recipes.supervised()),
    "odd view": ([(90, 101), (64, 64)], (37, 53), recipes.moco()),
    "view of one pixel": ([(30, 20)], (1, 1), recipes.simsiam()),
    "view of one row": ([(30, 20)], (1, 9), recipes.simsiam(local_aug="cutpaste")),
    "view of one column": ([(30, 20)], (60, 1), recipes.simsiam()),
    "large photo": ([(901, 1203)], (96, 96), recipes.simclr()),
    "wide view": ([(20, 90)], (20, 600), recipes.simsiam()),
    "large view": ([(200, 300)], (330, 290), recipes.simsiam()),
    "cutpaste": ([(50, 60)], (56, 56), recipes.simsiam(local_aug="cutpaste")),
    "spd from the image": ([(50, 60)], (56, 56), recipes.simsiam(spd_source="image")),
    "no spd": ([(50, 60), (20, 30)], (40, 40), recipes.simsiam(spd=False)),
}


def guarded_pages(count: int = 1) -> torch.Tensor:
    """Bytes of memory before and after which reading ends the process."""
    page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
    memory = mmap.mmap(-1, (count + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guarded in (start, start + (count + 1) * page):
        assert libc.mprotect(ctypes.c_void_p(guarded), page, 0) == 0  # PROT_NONE
    return torch.frombuffer(memory, dtype=torch.uint8)[page : (count + 1) * page]


def noise_images(sizes, seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 256, (h, w, 3), dtype=torch.uint8, generator=generator) for h, w in sizes
    ]


def view_case(name: str, epoch: int = 0):
    """Images, parameter table and view size of a named case."""
    sizes, size, recipe = VIEW_CASES[name]
    params = sample_view_params(recipe, sizes, range(len(sizes)), epoch, seed=3, size=size)
    return noise_images(sizes), params, size


def every_operation_on(params: torch.Tensor, order: int) -> torch.Tensor:
    """The same table with every stage switched on and a given jitter order."""
    params = params.clone()
    values = {
        "jitter_order": order,
        "brightness": 1.3,
        "contrast": 0.7,
        "saturation": 1.25,
        "hue": -0.08,
        "blur_sigma": 1.1,
        "patch_jitter_order": 23 - order,
        "patch_hue": 0.21,
        "flip": 1,
    }
    for name, value in values.items():
        params[..., COLUMN[name]] = value
    return params


# name -> (batch, [(channels, height, width), ...], d)
GAUSSIAN_CASES = {
    "one channel": (1, [(1, 3, 4)], 1),
    "three layers": (3, [(8, 8, 8), (16, 4, 4), (32, 2, 2)], 20),
    "full panels": (8, [(16, 6, 6), (16, 3, 3)], 24),
    "odd grids": (5, [(10, 9, 7), (20, 5, 4), (12, 3, 2)], 33),
    "one position": (9, [(12, 1, 1)], 12),
    "many images": (21, [(30, 5, 5), (40, 3, 3)], 57),
    "two images": (2, [(20, 3, 5), (20, 2, 3)], 25),
    "seven images": (7, [(40, 2, 3)], 40),
    "long panels": (5, [(160, 1, 2)], 150),
}


def gaussian_case(name: str, seed: int = 0):
    """Feature maps and a sorted list of kept channels."""
    batch, layers, d = GAUSSIAN_CASES[name]
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(batch, *shape, generator=generator) for shape in layers]
    total = sum(shape[0] for shape in layers)
    channels = torch.randperm(total, generator=generator)[:d].sort().values
    return features, channels


def random_gaussians(positions: int, d: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """A mean (P, d) and a packed lower triangle, whose diagonal is far from zero."""
    from spd_fast.reference import pack

    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(positions, d, generator=generator)
    lower = torch.randn(positions, d, d, generator=generator).tril() / d**0.5
    lower.diagonal(dim1=1, dim2=2).copy_(1 + torch.rand(positions, d, generator=generator))
    factor = pack(lower)
    assert factor.shape == (positions, packed_size(d))
    return mean, factor


def exact_map(features, channels, mean, factor) -> torch.Tensor:
    """`mahalanobis_map` in float64."""
    from spd_fast.reference import mahalanobis_map

    features = [f.double() for f in features]
    return mahalanobis_map(features, channels, mean.double(), factor.double())


# name -> (points, dimensions, how they lie)
POINT_CASES = {
    "one point": (1, 3, "normal"),
    "one dimension": (50, 1, "normal"),
    "odd dimensions": (200, 33, "normal"),
    "whole partial sums": (300, 64, "normal"),
    "beyond early abandonment": (150, 300, "normal"),
    "ties everywhere": (400, 6, "integers"),
    "copies": (120, 40, "copies"),
    "all the same": (20, 40, "same"),
    "far from the origin": (200, 70, "far"),
    "two tight clusters": (300, 3, "clusters"),
    "in a plane": (200, 90, "plane"),
    "tiny": (100, 40, "tiny"),
    "huge": (100, 40, "huge"),
}


def point_case(name: str, seed: int = 0) -> torch.Tensor:
    """(N, D) float32 points."""
    n, d, kind = POINT_CASES[name]
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(n, d, generator=generator)
    if kind == "integers":
        points = points.round()
    if kind == "copies":
        points = points[torch.randint(n // 3, (n,), generator=generator)]
    if kind == "same":
        points = points[:1].expand(n, d)
    if kind == "far":  # a common part 10^6 times larger than the differences
        points = 1e-4 * points + 100
    if kind == "clusters":  # far apart: coordinates round by as much as neighbours differ
        points = 2e-4 * points + 700 * (torch.arange(n) % 2)[:, None]
    if kind == "plane":
        points = points[:, :2] @ torch.randn(2, d, generator=generator)
    return points * {"tiny": 1e-20, "huge": 1e14}.get(kind, 1.0)
