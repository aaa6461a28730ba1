"""How the DALI operator plans the CUDA kernels, run on the CPU, beside the native views."""

import ctypes
import sys
from shutil import which

import cuda_module
import numpy as np
import pytest
import torch

from spd_fast import augment_views, recipes, sample_view_params
from spd_fast.ops.augment_views import IMAGENET_MEAN, IMAGENET_STD

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or which("g++") is None, reason="needs g++ on Linux"
)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}
# Of normalised values, which span 4.4 where a view spans 1; see docs/gpu.md.
LIMITS = {torch.float32: 4e-3, torch.float16: 8e-3, torch.bfloat16: 4e-2, torch.uint8: 1}
SIZE = (40, 48)


@pytest.fixture(scope="module")
def make_views(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rounds")
    sources = (
        cuda_module.ROOT / "tests/cuda/gpu_rounds.cpp",
        cuda_module.SOURCES / "augment_views.cu",
    )
    objects = {s.name: cuda_module.compile_one(s, directory, ()) for s in sources}
    return ctypes.CDLL(str(cuda_module.link(directory, objects))).make_views


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "recipe", [recipes.simsiam(), recipes.simclr(spd_source="image"), recipes.supervised(spd=False)]
)
def test_the_rounds_make_all_views(make_views, dtype, recipe):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((30, 50), (64, 41))]
    params = sample_view_params(recipe, [i.shape[:2] for i in images], [3, 8], 0, 1, SIZE)
    expected = augment_views(images, params, SIZE, dtype=dtype)
    out = torch.empty_like(expected)
    pixels = np.concatenate([image.ravel() for image in images])
    places = np.array([[0, 30, 50], [images[0].size, 64, 41]])
    normalised = dtype != torch.uint8
    std, mean = np.float32(IMAGENET_STD), np.float32(IMAGENET_MEAN)
    scale = 1 / std if normalised else np.float32([255] * 3)
    shift = -mean / std if normalised else np.zeros(3, np.float32)
    strides = np.array(out.stride())
    arrays = [pixels, places, params.numpy(), strides, scale, shift]
    inputs, formats = arrays[:3], arrays[3:]
    make_views(
        *(ctypes.c_void_p(a.ctypes.data) for a in inputs),
        *(len(images), len(recipe), *SIZE, ctypes.c_void_p(out.data_ptr()), DTYPES[dtype]),
        *(ctypes.c_void_p(a.ctypes.data) for a in formats),
    )
    difference = (out.float() - expected.float()).abs().max().item()
    assert difference <= LIMITS[dtype] and out.float().isfinite().all()
