"""What only a GPU can show: streams, captured graphs, torch.compile, the device's arithmetic."""

from contextlib import contextmanager

import pytest
import torch
from cases import (
    GAUSSIAN_CASES,
    VIEW_CASES,
    exact_map,
    gaussian_case,
    random_gaussians,
    view_case,
)

from spd_fast import PaDiM, augment_views, mahalanobis_map, reference
from spd_fast.ops.mahalanobis import gaussian_factor, gaussian_update

pytestmark = pytest.mark.cuda
BACKENDS = ("cuda", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def tf32():
    """Allowed, since no result may depend on it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@contextmanager
def no_waiting():
    """Whatever would wait for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gaussians(name: str, dtype=torch.float32, images: int = 4):
    """Arguments of `mahalanobis_map` on the GPU, and the exact result."""
    features, channels = gaussian_case(name)
    features = [f[:images] for f in features]
    mean, factor = random_gaussians(features[0][0, 0].numel(), len(channels))
    factor = factor.to(dtype)
    exact = exact_map(features, channels, mean, factor)
    arguments = [f.cuda() for f in features], channels.cuda(), mean.cuda(), factor.cuda()
    return arguments, exact


def views(name: str):
    images, params, size = view_case(name)
    exact = reference.augment_views(images, params, size, dtype=torch.float64)
    return [image.cuda() for image in images], params, size, exact


IDENTITY = dict(mean=(0, 0, 0), std=(1, 1, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GAUSSIAN_CASES)
def test_distances(name, dtype, backend):
    for images in (1, 2, 3, 4):
        arguments, exact = gaussians(name, dtype, images)
        found = mahalanobis_map(*arguments, backend=backend).cpu()
        torch.testing.assert_close(found, exact.float(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", VIEW_CASES)
def test_views(name, backend):
    images, params, size, exact = views(name)
    found = augment_views(images, params, size, backend=backend, **IDENTITY).cpu()
    assert (found - exact).abs().max() <= 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
def test_views_in_either_order(dtype, backend):
    images, params, size, exact = views("ragged")
    options = dict(dtype=dtype, backend=backend, **IDENTITY)
    planes, found = (
        augment_views(images, params, size, channels_last=order, **options).cpu().float()
        for order in (False, True)
    )
    one = 255 if dtype == torch.uint8 else 1
    allowed = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 5e-3, torch.uint8: 1.5}
    assert (found - one * exact).abs().max() <= allowed[dtype]
    assert torch.equal(found, planes) or backend == "triton"


@pytest.mark.parametrize("backend", BACKENDS)
def test_distances_do_not_wait_and_follow_the_stream(backend):
    arguments, exact = gaussians("three layers")
    mahalanobis_map(*arguments, backend=backend)
    layers = [torch.zeros_like(f) for f in arguments[0]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # whoever takes another stream reads zeros
        for layer, f in zip(layers, arguments[0]):
            layer.copy_(f)
        with no_waiting():
            found = mahalanobis_map(layers, *arguments[1:], backend=backend)
    stream.synchronize()
    torch.testing.assert_close(found.cpu(), exact.float(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_do_not_wait(backend):
    images, params, size, exact = views("ragged")
    with no_waiting():
        found = augment_views(images, params, size, backend=backend, **IDENTITY)
    assert (found.cpu() - exact).abs().max() <= 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_distances_in_a_graph(backend):
    (features, *rest), exact = gaussians("three layers")
    layers = [torch.zeros_like(f) for f in features]
    mahalanobis_map(layers, *rest, backend=backend)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = mahalanobis_map(layers, *rest, backend=backend)
    for order in (slice(None), [2, 1, 0]):
        for layer, f in zip(layers, features):
            layer.copy_(f[order])
        graph.replay()
        torch.testing.assert_close(found.cpu(), exact[order].float(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_in_a_graph_read_pinned_parameters_again(backend):
    images, params, size = view_case("ragged")
    _, others, _ = view_case("ragged", epoch=1)
    images = [image.cuda() for image in images]
    table = params.pin_memory()
    out = torch.empty(4, 3, 3, *size, device="cuda")
    augment_views(images, table, out=out, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        augment_views(images, table, out=out, backend=backend)
    for its in (params, others, params):
        torch.cuda.synchronize()
        table.copy_(its)
        graph.replay()
        expected = augment_views(images, its, size, backend=backend)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_distances_compiled(backend):
    arguments, exact = gaussians("three layers")

    @torch.compile(fullgraph=True)
    def doubled(features, *rest):
        return 2 * mahalanobis_map(features, *rest, backend=backend)

    found = doubled(*arguments).cpu() / 2
    torch.testing.assert_close(found, exact.float(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_past_2_to_the_31_elements(backend):
    images, params, _ = view_case("no spd")
    size = (336, 384)  # CUDA takes no more rows
    n = 1 + (1 << 31) // (2 * 3 * size[0] * size[1])
    images = [images[0].cuda()] * n
    out = torch.empty(2, n, 3, *size, dtype=torch.float16, device="cuda")
    assert out.numel() > 1 << 31
    augment_views(images, params[:1].repeat(n, 1, 1), out=out, backend=backend)
    assert torch.equal(out[:, 0], out[:, -1])


@pytest.mark.parametrize("name", ["odd grids", "many images"])
def test_a_fit_equals_that_of_the_cpu(name):
    features, channels = gaussian_case(name)
    positions, d = features[0][0, 0].numel(), len(channels)
    found = []
    for device in ("cpu", "cuda"):
        mean = torch.zeros(positions, d, device=device)
        scatter = torch.zeros(positions, reference.packed_size(d), device=device)
        layers = [f.to(device) for f in features]
        gaussian_update(layers, channels.to(device), 0, mean, scatter)
        gaussian_factor(scatter, d, len(layers[0]), 0.01)
        found.append((mean.cpu(), reference.unpack(scatter.cpu(), d)))
    for cpu, gpu in zip(*found):
        torch.testing.assert_close(gpu, cpu, atol=2e-3, rtol=1e-3)


def test_padim_equals_that_of_the_cpu(tmp_path):
    images = torch.rand(12, 3, 64, 64)
    model = PaDiM("resnet18", n_features=40, weights="random").fit(images.split(4))
    model.save(tmp_path / "padim.pt")
    maps, scores = model.score(images[:3])
    for moved in (
        PaDiM.load(tmp_path / "padim.pt", device="cuda"),
        PaDiM("resnet18", n_features=40, weights="random", device="cuda").fit(
            part.cuda() for part in images.split(4)
        ),
    ):
        its_maps, its_scores = moved.score(images[:3].cuda())
        torch.testing.assert_close(its_maps.cpu(), maps, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(its_scores.cpu(), scores, rtol=2e-3, atol=2e-3)
