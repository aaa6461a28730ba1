"""PaDiM's distances and fit beside anomalib's own functions, on the same features.

    python bench/padim.py [--d 100] [--grid 56] [--batches 1 8 32] [--threads 2]

Checks first that both give the same distances, then times them in turn. The last columns are the
shares of this machine's read bandwidth and multiply-add peak, measured in the same run.
"""

import argparse
import time

import torch
from anomalib.models.components.stats.multi_variate_gaussian import MultiVariateGaussian
from anomalib.models.image.padim.anomaly_map import AnomalyMapGenerator

from spd_fast import mahalanobis_map
from spd_fast.ops.backends import native
from spd_fast.ops.mahalanobis import gaussian_factor, gaussian_update
from spd_fast.reference import packed_size

IMAGES = 64


def best(job, seconds: float = 1.0) -> float:
    """Shortest time of a job in seconds, over at least `seconds` and 3 runs."""
    times = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    return min(times)


def machine_limits() -> tuple[float, float]:
    """Read bandwidth (bytes / s) and multiply-add rate (flop / s) that torch reaches here."""
    large = torch.ones(1 << 27)
    bandwidth = large.numel() * 4 / best(large.sum)
    a = torch.randn(2048, 2048)
    return bandwidth, 2 * 2048**3 / best(lambda: a @ a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=100)
    parser.add_argument("--grid", type=int, default=56)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    d, positions = options.d, options.grid**2
    train = torch.randn(IMAGES, d, options.grid, options.grid)
    channels = torch.arange(d)

    theirs = MultiVariateGaussian()
    start = time.perf_counter()
    theirs.fit(train)
    fit_theirs = time.perf_counter() - start
    start = time.perf_counter()
    mean, factor = torch.zeros(positions, d), torch.zeros(positions, packed_size(d))
    for i in range(0, IMAGES, 16):
        gaussian_update([train[i : i + 16]], channels, i, mean, factor)
    gaussian_factor(factor, d, IMAGES, 0.01 + 1e-5)
    fit_ours = time.perf_counter() - start
    print(
        f"d {d}, grid {options.grid} x {options.grid}, {options.threads} threads, "
        f"{native.build_config()['instruction_set']}"
    )
    print(
        f"fit of {IMAGES} images: anomalib {fit_theirs:.2f} s, spd-fast {fit_ours:.2f} s, "
        f"ratio {fit_theirs / fit_ours:.1f}"
    )

    bandwidth, peak = machine_limits()
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, multiply-add {peak / 1e9:.0f} GFLOP/s")
    print(f"{'':<18}{'anomalib ms':>12}{'ours ms':>9}{'ratio':>7}{'of read':>9}{'of flops':>9}")
    generator = AnomalyMapGenerator()
    for batch in options.batches:
        x = torch.randn(batch, d, options.grid, options.grid)
        expected = generator.compute_distance(x, [theirs.mean, theirs.inv_covariance])[:, 0]
        time_theirs = best(
            lambda x=x: generator.compute_distance(x, [theirs.mean, theirs.inv_covariance])
        )
        for dtype, tolerance in ((torch.float32, 1e-3), (torch.float16, 3e-3)):
            w = factor.to(dtype)
            ours = mahalanobis_map([x], channels, mean, w)
            error = ((ours - expected).abs() / expected).max().item()
            assert error < tolerance, f"distances differ by {error}"
            time_ours = best(lambda x=x, w=w: mahalanobis_map([x], channels, mean, w))
            read = w.numel() * w.element_size() / time_ours / bandwidth
            flops = 2 * w.numel() * batch / time_ours / peak
            name = f"batch {batch}, {str(dtype).removeprefix('torch.')}"
            print(
                f"{name:<18}{1e3 * time_theirs:>12.1f}{1e3 * time_ours:>9.1f}"
                f"{time_theirs / time_ours:>7.1f}{read:>9.0%}{flops:>9.0%}"
            )


if __name__ == "__main__":
    main()
