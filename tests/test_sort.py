"""The compiled sort of the metrics, and the metrics without it."""

import subprocess
import sys

import numpy as np
import pytest

from spd_fast import metrics


def numbers_to_sort():
    rng = np.random.default_rng(5)
    normal = rng.standard_normal(70_000)
    yield "normal", normal
    yield "ties", np.round(normal * 20) / 20
    yield "one octave", 1 + rng.random(70_000)
    for width in (9, 12, 15):  # bits in which float32 differ
        yield f"{width} bits", 1 + rng.integers(0, 1 << width, 70_000) / (1 << 23)
    yield "any size", np.concatenate([np.exp(60 * normal), -np.exp(60 * normal)])
    yield "denormal", normal * 1e-41
    yield "zeros", np.where(normal > 0, 0.0, -0.0)
    yield "equal", np.full(70_000, -3.5)
    yield "ends", np.array([np.inf, -np.inf, 0.0, 1.0, -1.0] * 100)
    for n in (0, 1, 2, 255, 256, 257):
        yield f"{n} numbers", normal[:n]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("values", [pytest.param(v, id=name) for name, v in numbers_to_sort()])
def test_sort_is_numpys(values, dtype):
    pytest.importorskip("spd_fast._sort", reason="not compiled: metrics sort by numpy itself")
    with np.errstate(over="ignore"):
        values = values.astype(dtype)
    ours = values.copy()
    metrics.sort(ours, np.empty_like(ours))
    np.testing.assert_array_equal(ours, np.sort(values))
    negative = np.signbit(values).sum()
    assert np.signbit(ours[:negative]).all()  # -0 comes before 0
    assert not np.signbit(ours[negative:]).any()


def test_sort_refuses_what_it_would_misread():
    sort = pytest.importorskip("spd_fast._sort", reason="not compiled").sort
    a, b = np.zeros((2, 10))
    for values, scratch in [(a, a), (a[1:], a[:-1]), (a, b[:9]), (a, np.zeros((2, 5)))]:
        with pytest.raises(ValueError, match="values and scratch must"):
            sort(values, scratch)
    sort(a[:5], a[5:])
    for values, scratch in [
        (a[::2], b[::2]),
        (a.astype(int), b),
        (a, b.astype(np.float32)),
        (a[:0].tolist(), b[:0]),
    ]:
        with pytest.raises(TypeError):
            sort(values, scratch)
    a.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        sort(a, b)


def test_metrics_without_the_compiled_sort():
    code = (
        "import sys\nsys.modules['spd_fast._sort'] = None\n"
        "from spd_fast.metrics import image_metrics\n"
        "print(image_metrics([0.1, 0.9, 0.4, 0.3], [0, 1, 0, 1]).au_roc, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0.75", "False"]
