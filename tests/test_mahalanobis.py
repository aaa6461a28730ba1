import mmap
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import GAUSSIAN_CASES, gaussian_case, guarded_pages, random_gaussians
from scipy.spatial.distance import mahalanobis
from torch.library import opcheck

from spd_fast import InputError, mahalanobis_map, reference
from spd_fast.ops.factor import converted
from spd_fast.ops.mahalanobis import gaussian_factor, gaussian_update
from spd_fast.reference import dequantize, pack, packed_index, packed_size, quantize, unpack

pytestmark = pytest.mark.usefixtures("two_threads")


def fit(features, channels, blocks, ridge=0.01, **options):
    """Mean and packed factor of images folded in block by block."""
    positions, d = features[0][0, 0].numel(), len(channels)
    mean, scatter = torch.zeros(positions, d), torch.zeros(positions, packed_size(d))
    count = 0
    for start in range(0, len(features[0]), blocks):
        block = [f[start : start + blocks] for f in features]
        gaussian_update(block, channels, count, mean, scatter, **options)
        count += len(block[0])
    covariance = scatter.clone()
    gaussian_factor(covariance, d, count, ridge, **options)
    return mean, scatter, covariance


def structured(features):
    """Correlated channels with a large common mean, the hard case for a running covariance."""
    generator = torch.Generator().manual_seed(1)
    mixed = []
    for f in features:
        mix = torch.randn(f.shape[1], f.shape[1], generator=generator) / f.shape[1] ** 0.5
        mixed.append(torch.einsum("ck,bkhw->bchw", mix, f) * 3 + 20)
    return mixed


# ------------------------------------------------------------------------------------------ layout


@pytest.mark.parametrize("d", [1, 7, 8, 9, 100])
def test_packed_layout(d):
    rows, columns, places = packed_index(d)
    assert len(set(places.tolist())) == len(rows) == d * (d + 1) // 2
    assert places.max() < packed_size(d)
    assert all(
        p == 32 * (i // 8) * (i // 8 + 1) + 8 * k + i % 8
        for i, k, p in zip(rows.tolist(), columns.tolist(), places.tolist())
    )
    lower = torch.randn(3, d, d).tril()
    assert torch.equal(unpack(pack(lower), d), lower)


def test_embedding_equals_interpolate_and_concatenate():
    features, channels = gaussian_case("three layers")
    grid = features[0].shape[2:]
    whole = torch.cat([F.interpolate(f, size=grid, mode="nearest") for f in features], 1)
    assert torch.equal(reference.embed(features, channels), whole[:, channels])


# ------------------------------------------------------------------- reference against numpy, scipy


@pytest.mark.parametrize("name", ["three layers", "odd grids", "many images"])
def test_reference_distance_equals_scipy(name):
    features, channels = gaussian_case(name)
    x = reference.embed(features, channels).double().flatten(2).numpy()  # (B, d, P)
    mean = x.mean(0).T
    inverses = []
    for p in range(x.shape[2]):
        covariance = np.cov(x[:, :, p], rowvar=False) + 0.01 * np.eye(x.shape[1])
        inverses.append(np.linalg.inv(covariance))
    whitening = [np.linalg.inv(np.linalg.cholesky(np.linalg.inv(i))) for i in inverses]
    lower = torch.from_numpy(np.stack(whitening))
    ours = reference.mahalanobis_map(
        [f.double() for f in features], channels, torch.from_numpy(mean), pack(lower)
    )
    for b in range(len(x)):
        for p in range(0, x.shape[2], 5):
            theirs = mahalanobis(x[b, :, p], mean[p], inverses[p])
            assert ours[b].flatten()[p].item() == pytest.approx(theirs, rel=1e-8)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("name", ["three layers", "odd grids", "many images"])
def test_streaming_fit_equals_numpy_cov(name, block, backend):
    features, channels = gaussian_case(name)
    features = structured(
        [f.repeat(4, 1, 1, 1) + torch.randn(4 * len(f), *f.shape[1:]) for f in features]
    )
    mean, scatter, factor = fit(features, channels, block, backend=backend)
    n, d = len(features[0]), len(channels)
    x = reference.embed(features, channels).double().flatten(2).numpy()
    covariance = unpack(scatter, d).double() / (n - 1)
    for p in range(x.shape[2]):
        exact = np.atleast_2d(np.cov(x[:, :, p], rowvar=False))
        ours = (covariance[p] + covariance[p].tril(-1).T).numpy()
        scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
        assert np.abs(ours - exact).max() <= 1e-4 * scale.max()
        assert np.abs(mean[p].double().numpy() / x[:, :, p].mean(0) - 1).max() < 1e-4
        w = unpack(factor, d)[p].double().numpy()
        identity = w @ (exact + 0.01 * np.eye(d)) @ w.T
        assert np.abs(identity - np.eye(d)).max() < 2e-3


# -------------------------------------------------------------------- native against the reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("name", GAUSSIAN_CASES)
def test_native_map_equals_reference(name, dtype):
    features, channels = gaussian_case(name)
    mean, factor = random_gaussians(features[0][0, 0].numel(), len(channels))
    factor = converted(factor, len(channels), dtype)
    exact = reference.mahalanobis_map(
        [f.double() for f in features],
        channels,
        mean.double(),
        converted(factor, len(channels), torch.float32).double(),
    )
    plain = mahalanobis_map(features, channels, mean, factor, backend="reference")
    native = mahalanobis_map(features, channels, mean, factor, backend="native")
    allowed = 2 * (plain - exact).abs().max() + 1e-5
    assert native.dtype == torch.float32
    assert (native - exact).abs().max() <= allowed
    for order in (torch.contiguous_format, torch.channels_last):
        single = [f[:1].contiguous(memory_format=order) for f in features]  # has its own kernel
        native = mahalanobis_map(single, channels, mean, factor, backend="native")
        assert (native - exact[:1]).abs().max() <= allowed


@pytest.mark.parametrize("name", GAUSSIAN_CASES)
def test_int8_element_is_off_by_half_a_step_of_its_row(name):
    """Against numpy, row by row; the diagonal is exact."""
    features, channels = gaussian_case(name)
    d = len(channels)
    _, factor = random_gaussians(features[0][0, 0].numel(), d)
    w = unpack(factor, d).numpy()
    w[:, 5:6] *= 1000  # another row's size must not matter
    rounded = unpack(dequantize(quantize(pack(torch.from_numpy(w)))), d).numpy()
    for exact, ours in zip(w, rounded):
        assert np.array_equal(np.diag(exact), np.diag(ours))
        others = exact - np.diag(np.diag(exact))
        steps = np.abs(others).max(1, keepdims=True) / 127
        assert (np.abs(others - (ours - np.diag(np.diag(ours)))) <= 0.5001 * steps).all()


def test_int8_of_empty_huge_and_broken_rows():
    w = torch.randn(1, 16, 16).tril()
    w[0, 3] = 0
    w[0, 5, :6] = 3e38
    w[0, 9, 2], w[0, 12, 4] = torch.nan, torch.inf
    rounded = unpack(dequantize(quantize(pack(w))), 16)
    assert (rounded[0, 3] == 0).all()
    assert torch.allclose(rounded[0, 5], w[0, 5], rtol=1e-6)
    assert torch.equal(rounded.isfinite().all(2), w.isfinite().all(2))


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory as Linux does")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("d", [1, 7, 8, 9, 25, 150])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 2)])
def test_nothing_beside_the_arguments_is_read(shape, d, dtype):
    positions = shape[0] * shape[1]
    channels, (mean, factor) = torch.arange(d), random_gaussians(positions, d)
    factor, features = converted(factor, d, dtype), torch.randn(5, d, *shape)

    def guarded(tensor, at_end):
        pages = guarded_pages(-(-tensor.nbytes // mmap.PAGESIZE))
        place = pages[-tensor.nbytes :] if at_end else pages[: tensor.nbytes]
        return place.view(tensor.dtype).view_as(tensor).copy_(tensor)

    for batch in (1, 5):
        arguments = features[:batch], mean, factor
        expected = mahalanobis_map([features[:batch]], channels, mean, factor)
        for at_end in (False, True):
            x, m, w = (guarded(tensor, at_end) for tensor in arguments)
            assert torch.equal(mahalanobis_map([x], channels, m, w, backend="native"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 5])
def test_nothing_is_left_over_from_the_call_before(batch, order, dtype):
    """A thread keeps its memory, and the rows past d of the factor are zero: times NaN they are
    NaN."""
    images = torch.randn(batch, 16, 2, 3).contiguous(memory_format=order)
    for d, x in (16, images * torch.nan), (9, images):
        mean, factor = random_gaussians(6, d)
        factor = converted(factor, d, dtype)
        found = mahalanobis_map([x], torch.arange(d), mean, factor, threads=1, backend="native")
    assert found.isfinite().all()


def test_int8_map_stays_within_a_percent_on_correlated_features():
    generator = torch.Generator().manual_seed(0)
    base = [torch.rand(1, 40 << i, 16 >> i, 16 >> i, generator=generator) for i in range(3)]
    noise = [torch.randn(40, *b.shape[1:], generator=generator) for b in base]
    features = structured([b + 0.3 * n for b, n in zip(base, noise)])
    channels = torch.arange(0, 280, 2)
    mean, _, factor = fit([f[:32] for f in features], channels, 32)
    for batch in (8, 1):  # one image has a kernel of its own
        test = [f[-batch:] for f in features]
        exact = mahalanobis_map(test, channels, mean, factor)
        rounded = mahalanobis_map(test, channels, mean, quantize(factor), backend="native")
        relative = (rounded - exact).abs() / exact
        assert relative.max() < 1e-2 and relative.mean() < 3e-3
        assert not torch.equal(rounded, exact)


@pytest.mark.parametrize("name", GAUSSIAN_CASES)
def test_native_is_exact_on_small_integers(name):
    """Every product and sum is a whole number below 2^24: nothing may be rounded."""
    features, channels = gaussian_case(name)
    features = [(2 * f).round() for f in features]
    positions, d = features[0][0, 0].numel(), len(channels)
    mean = torch.randint(-2, 3, (positions, d)).float()
    factor = pack(torch.randint(-3, 4, (positions, d, d)).float().tril())
    native, plain = (
        mahalanobis_map(features, channels, mean, factor, backend=b)
        for b in ("native", "reference")
    )
    assert torch.equal(native, plain)


@pytest.mark.parametrize("name", GAUSSIAN_CASES)
def test_native_fit_equals_reference(name):
    features, channels = gaussian_case(name)
    features = [f.repeat(3, 1, 1, 1) + torch.randn(3 * len(f), *f.shape[1:]) for f in features]
    for native, plain in zip(
        fit(features, channels, 5, backend="native"),
        fit(features, channels, 5, backend="reference"),
    ):
        if native.shape[1] == packed_size(len(channels)):
            native, plain = unpack(native, len(channels)), unpack(plain, len(channels))
        # 15 images of up to 150 channels: float32 keeps few digits of such a factor.
        torch.testing.assert_close(native, plain, atol=5e-3, rtol=2e-3)


def test_padding_of_the_factor_is_zero():
    features, channels = gaussian_case("odd grids")
    _, _, factor = fit(features, channels, 5, backend="native")
    used = torch.zeros(factor.shape[1], dtype=torch.bool)
    used[packed_index(len(channels))[2]] = True
    assert (factor[:, ~used] == 0).all()


def test_memory_order_of_features_does_not_matter():
    features, channels = gaussian_case("odd grids")
    mean, factor = random_gaussians(features[0][0, 0].numel(), len(channels))
    expected = mahalanobis_map(features, channels, mean, factor)
    channels_last = [f.to(memory_format=torch.channels_last) for f in features]
    assert torch.equal(mahalanobis_map(channels_last, channels, mean, factor), expected)
    sliced = [torch.stack([f, f], 2)[:, :, 0] for f in features]
    assert torch.equal(mahalanobis_map(sliced, channels, mean, factor), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("shape", [(5, 70), (4, 64), (1, 33), (3, 1)])
@pytest.mark.parametrize("batch", [1, 2, 6, 33])
def test_map_of_many_tiles_equals_reference(shape, batch, dtype):
    """Values that stand for the next position, rows and columns without a partner, layers whose
    cells cover one, two and several positions, a number that is not whole, or a part of one."""
    height, width = shape
    sizes = [shape, (-(-height // 2), -(-width // 2)), (-(-height // 3), -(-width // 4)), (9, 90)]
    features = [torch.randn(batch, 8, *size) for size in sizes]
    channels = torch.randperm(32)[:27]  # not sorted, so that layers come by turns
    planar, last = torch.contiguous_format, torch.channels_last
    for kept in (channels, channels.sort().values, channels[:1]):
        mean, factor = random_gaussians(height * width, len(kept))
        factor = converted(factor, len(kept), dtype)
        expected = mahalanobis_map(features, kept, mean, factor, backend="reference")
        for orders in ([planar] * 4, [last] * 4, [planar, last] * 2, [last, planar] * 2):
            maps = [f.contiguous(memory_format=order) for f, order in zip(features, orders)]
            found = mahalanobis_map(maps, kept, mean, factor, backend="native")
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_images_do_not_depend_on_each_other(order, dtype):
    """To the last bit, whatever their number, though one of them is not finite."""
    features = [torch.randn(17, 90, 2, 3), torch.randn(17, 80, 1, 2)]
    for f in features:
        f[7] = torch.nan
    channels = torch.randperm(170)[:150].sort().values
    mean, factor = random_gaussians(6, 150)
    factor = converted(factor, 150, dtype)

    def score(first, end):
        images = [f[first:end].contiguous(memory_format=order) for f in features]
        return mahalanobis_map(images, channels, mean, factor, backend="native")

    expected = score(0, 17)
    assert expected.isnan().flatten(1).all(1).tolist() == [i == 7 for i in range(17)]
    assert expected.isfinite().flatten(1).all(1).tolist() == [i != 7 for i in range(17)]
    for end in range(2, 17):
        assert torch.equal(score(0, end).nan_to_num(), expected[:end].nan_to_num())
    for first in range(17):  # one image has a kernel of its own
        torch.testing.assert_close(
            score(first, first + 1), expected[first : first + 1], rtol=1e-4, atol=0, equal_nan=True
        )


def test_threads_do_not_matter():
    """More positions than one of them takes at a time."""
    features = [torch.randn(6, 16, 13, 15), torch.randn(6, 20, 7, 8)]
    channels = torch.arange(0, 36, 2)
    gaussians = fit(features, channels, 5, threads=1)
    mean, _, factor = gaussians
    expected = mahalanobis_map(features, channels, mean, factor, threads=1)
    plain = mahalanobis_map(features, channels, mean, factor, backend="reference")
    torch.testing.assert_close(expected, plain, rtol=1e-4, atol=0)
    for threads in (2, 3, 7):
        again = fit(features, channels, 5, threads=threads)
        assert all(torch.equal(a, b) for a, b in zip(again, gaussians))
        found = mahalanobis_map(features, channels, mean, factor, threads=threads)
        assert torch.equal(found, expected)


# ------------------------------------------------------------------------------- schema and errors


def test_schemas_and_fakes():
    features, channels = gaussian_case("three layers")
    mean, factor = random_gaussians(64, len(channels))
    utils = ("test_schema", "test_faketensor")
    opcheck(
        torch.ops.spd_fast.mahalanobis_map.default,
        (features, channels, mean, factor),
        test_utils=utils,
    )
    opcheck(
        torch.ops.spd_fast.gaussian_update.default,
        (features, channels, 0, mean, factor),
        test_utils=utils,
    )
    eye = pack(torch.eye(len(channels)).repeat(64, 1, 1))
    opcheck(
        torch.ops.spd_fast.gaussian_factor.default, (eye, len(channels), 3, 0.1), test_utils=utils
    )


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_one_image_and_singular_covariance_are_refused(backend):
    scatter = torch.zeros(4, packed_size(10))
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        gaussian_factor(scatter, 10, 1, 0.01, backend=backend)
    with pytest.raises(InputError, match="not positive definite"):
        gaussian_factor(scatter, 10, 5, 0.0, backend=backend)


@pytest.mark.parametrize("seed", range(4))
def test_covariances_of_few_images_are_taken(seed):
    """A condition of 5e6: blocks must be solved, multiplying by their inverse loses too much."""
    features = 60 * torch.randn(5, 40, 4, 4, generator=torch.Generator().manual_seed(seed))
    mean, factor = torch.zeros(16, 40), torch.zeros(16, packed_size(40))
    gaussian_update([features], torch.arange(40), 0, mean, factor)
    gaussian_factor(factor, 40, 5, 0.01, backend="native")
    w = unpack(factor, 40).double()
    assert (w @ w.mT).diagonal(dim1=1, dim2=2).max() < 3 / 0.01  # 1 / the least eigenvalue


@pytest.mark.parametrize("d", [96, 104, 121, 289])
def test_factor_of_many_channels(d):
    """One run of blocks of the inverse, or several, and the last panels by themselves."""
    a = torch.randn(2, d, 2 * d, generator=torch.Generator().manual_seed(0)).double()
    covariance = a @ a.mT / d
    factor = pack((9 * covariance).float())
    gaussian_factor(factor, d, 10, 0.01, backend="native")
    lower = torch.linalg.cholesky(covariance + 0.01 * torch.eye(d))
    identity = unpack(factor, d).double() @ lower
    assert (identity - torch.eye(d)).abs().max() < 1e-5


def test_bad_input_is_named():
    features, channels = gaussian_case("three layers")
    mean, factor = random_gaussians(64, len(channels))
    for arguments, message in [
        (([f[0] for f in features], channels, mean, factor), "features must be a list"),
        ((features, channels.int(), mean, factor), r"channels must be \(d,\) int64"),
        ((features, channels + 50, mean, factor), r"channels must be in 0..55"),
        ((features, channels, mean[:, :3], factor), r"mean must be float32 \(64, 20\)"),
        ((features, channels, mean, factor[:, :9]), r"factor must be \(64, 384\)"),
        ((features, channels, mean, factor.double()), "torch.float64"),
        ((features, channels, mean, factor.to(torch.int8)), r"factor must be \(64, 576\)"),
    ]:
        with pytest.raises(InputError, match=message):
            mahalanobis_map(*arguments)
    with pytest.raises(InputError, match="no bfloat16 factor on the CPU"):
        mahalanobis_map(features, channels, mean, factor.bfloat16(), backend="native")
    with pytest.raises(InputError, match=r"scatter must be \(64, 384\) of torch.float32"):
        gaussian_update(features, channels, 0, mean, quantize(factor))
    assert mahalanobis_map(features, channels, mean, factor.bfloat16()).isfinite().all()
