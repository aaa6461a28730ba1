"""PaDiM beyond the backbone, beside anomalib's own functions.

    python bench/padim.py            # what bench/README.md shows: 9 minutes, 12 GB
    python bench/padim.py --quick    # d = 100 alone: a minute and a half
    python bench/padim.py --memory 32 900    # only the memory of fits of so many images

Every part checks that the results agree before it times them. Peers run in turn with ours in one
process, except where memory is measured: there every contender is a process of its own.

Ours starts from the three layers of the network and gathers its channels; anomalib is given its
embedding, which it has to concatenate and select first. "of read" and "of flops" are shares of what
loops reach that only read memory or only multiply and add, in turn with ours; "GB/s" is what the
former reached meanwhile. What has to be read is the factor, the mean and the layers, where the kept
channels leave out hardly a cache line.
"""

import argparse
import statistics
import subprocess
import sys
import time
from functools import partial

import torch
from anomalib.models.components.stats.multi_variate_gaussian import MultiVariateGaussian
from anomalib.models.image.padim.anomaly_map import AnomalyMapGenerator
from measure import best, best_in_turns, cold, multiplying, peak_memory, reading, share, typical

from spd_fast import PaDiM, mahalanobis_map, reference
from spd_fast.detector import smooth_upsample
from spd_fast.ops.backends import native
from spd_fast.ops.factor import converted
from spd_fast.ops.mahalanobis import gaussian_factor, gaussian_update
from spd_fast.ops.memory import on_huge_pages
from spd_fast.padim import FIT_BLOCK, PRESETS
from spd_fast.reference import packed_size, unpack

GRID = 64  # of 256 x 256 pixels
LAYERS = {100: (64, 128, 256), 550: (256, 512, 1024)}  # channels: ResNet-18, (Wide)ResNet-50


def random_layers(d: int, images: int, grid: int = GRID, seed: int = 0) -> list[torch.Tensor]:
    """Features like a network's: not negative, with channels last."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.rand(images, channels, grid >> i, grid >> i, generator=generator).to(
            memory_format=torch.channels_last
        )
        for i, channels in enumerate(LAYERS[d])
    ]


def kept_channels(d: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(sum(LAYERS[d]), generator=generator)[:d].sort().values


def fit(layers: list[torch.Tensor], channels: torch.Tensor):
    positions, d = layers[0][0, 0].numel(), len(channels)
    mean = torch.zeros(positions, d)
    factor = on_huge_pages(torch.empty(positions, packed_size(d))).zero_()
    for i in range(0, len(layers[0]), FIT_BLOCK):
        block = [layer[i : i + FIT_BLOCK] for layer in layers]
        gaussian_update(block, channels, i, mean, factor)
    gaussian_factor(factor, d, len(layers[0]), PRESETS["anomalib"].ridge)
    return mean, factor


def inverse_of(factor: torch.Tensor, d: int) -> torch.Tensor:
    """What anomalib keeps, (P, d, d)."""
    inverse = torch.empty(len(factor), d, d, device=factor.device)
    for to, rows in zip(inverse.split(64), factor.split(64)):
        w = unpack(rows, d)
        torch.bmm(w.mT, w, out=to)
    return inverse


def table_of_scores(d: int, batches: list[int]) -> None:
    channels = kept_channels(d)
    mean, factor = fit(random_layers(d, 2 * FIT_BLOCK), channels)
    inverse = inverse_of(factor, d)
    tolerances = {"float32": 1e-4, "float16": 1e-3, "int8": 1e-2}
    factors = {name: converted(factor, d, getattr(torch, name)) for name in tolerances}
    generator = AnomalyMapGenerator()
    print(f"\nd = {d}, {GRID} x {GRID} positions")
    print(f"{'':<20}{'anomalib ms':>12}{'ours ms':>9}{'ratio':>7}{'of read':>9}", end="")
    print(f"{'GB/s':>6}{'of flops':>10}{'difference':>12}")
    bandwidths, peaks = [], []
    for batch in batches:
        layers = random_layers(d, batch, seed=1)
        embedding = reference.embed(layers, channels).contiguous()
        gaussians = [mean.T.contiguous(), inverse]
        expected = generator.compute_distance(embedding, gaussians)[:, 0]
        jobs = {"anomalib": partial(generator.compute_distance, embedding, gaussians)}
        differences = {}
        for name, w in factors.items():
            ours = mahalanobis_map(layers, channels, mean, w)
            differences[name] = ((ours - expected).abs() / expected).max().item()
            assert differences[name] < tolerances[name], f"distances differ: {differences}"
            jobs[name] = partial(mahalanobis_map, layers, channels, mean, w)
        times = best_in_turns(jobs)
        theirs = times["anomalib"]
        for name, w in factors.items():
            needed = sum(t.nbytes for t in (w, mean, *layers))
            read, speeds = share(jobs[name], needed, reading(torch.get_num_threads()))
            bandwidth = statistics.median(speeds) / 1e9
            bandwidths += speeds
            operations = 2 * factor.numel() * batch
            flops, speeds = share(jobs[name], operations, multiplying(torch.get_num_threads()))
            peaks += speeds
            print(
                f"batch {batch:<3}{name:<11}{1e3 * theirs:>12.1f}{1e3 * times[name]:>9.1f}"
                f"{theirs / times[name]:>7.1f}{read:>9.0%}{bandwidth:>6.0f}{flops:>10.0%}"
                f"{differences[name]:>12.0e}"
            )
    if d == 100:  # more is mostly reading, even for a grid of 4 x 4
        few = random_layers(d, 1, grid=4)
        call = partial(mahalanobis_map, few, channels, mean[:16], factor[:16])
        warm, not_warm = best(call), statistics.median(cold(call) for _ in range(15))
        print(f"a call for 4 x 4: {1e3 * warm:.2f} ms, with cold caches {1e3 * not_warm:.2f} ms")
    for what, speeds in (("reading, GB/s", bandwidths), ("multiplying, GFLOP/s", peaks)):
        low, *_, high = statistics.quantiles(speeds, n=20)
        print(f"{what}: {low / 1e9:.0f} to {high / 1e9:.0f}, nine times of ten")


def lines_of_fit(d: int, grid: int) -> None:
    """Anomalib's inversion of 550 channels fails inside MKL with several threads ("SLASWP" in
    torch 2.14), and takes minutes at the full grid: one thread and a small grid for both."""
    layers, channels = random_layers(d, FIT_BLOCK, grid), kept_channels(d)
    embedding = reference.embed(layers, channels).contiguous()
    torch.set_num_threads(1)
    gaussian = MultiVariateGaussian()
    pairs = []  # in turns, as the speed of a shared machine changes
    for _ in range(3):
        start = time.perf_counter()
        gaussian.fit(embedding)
        theirs = time.perf_counter() - start
        pairs.append((theirs, typical(lambda: fit(layers, channels))))
    mean, factor = fit(layers, channels)
    w = unpack(factor[:16], d)
    identity = w @ torch.linalg.inv(gaussian.inv_covariance[:16].double()).float() @ w.mT
    difference = (identity - torch.eye(d)).abs().max().item()
    assert difference < 1e-2, f"the covariances differ by {difference}"
    theirs, ours = (statistics.median(times) for times in zip(*pairs))
    ratios = sorted(peer / own for peer, own in pairs)
    # A ridge this large makes any numbers a covariance, which is as much work as another until,
    # after six times, most of it is denormal.
    factorise = partial(gaussian_factor, factor, d, FIT_BLOCK, 1e3)
    factorisation, _ = share(factorise, 2 / 3 * d**3 * grid**2, multiplying(1), 5)
    update = partial(gaussian_update, layers, channels, 0, mean, factor)
    scatter, _ = share(update, 2 * packed_size(d) * grid**2 * FIT_BLOCK, multiplying(1))
    print(
        f"fit of {FIT_BLOCK} images, d = {d}, {grid} x {grid} positions, one thread: anomalib ",
        end="",
    )
    print(f"{theirs:.2f} s, ours {ours:.2f} s, ratios {', '.join(f'{r:.1f}' for r in ratios)}")
    print(f"    of flops: scatter {scatter:.0%}, factorisation {factorisation:.0%}")


def table_of_maps(batches: list[int]) -> None:
    print(f"\nmap of {4 * GRID} x {4 * GRID}{'anomalib ms':>12}{'ours ms':>9}{'ratio':>7}")
    generator, size = AnomalyMapGenerator(), (4 * GRID, 4 * GRID)
    for batch in batches:
        distances = 10 + torch.rand(batch, GRID, GRID)

        def theirs(distances=distances):
            return generator.smooth_anomaly_map(generator.up_sample(distances[:, None], size))

        def ours(distances=distances):
            return smooth_upsample(distances, size, border="reflect")

        difference = (theirs()[:, 0] - ours()).abs().max().item()
        assert difference < 1e-3, f"the maps differ by {difference}"
        a, b = best_in_turns({"anomalib": theirs, "ours": ours}).values()
        print(f"batch {batch:<12}{1e3 * a:>12.1f}{1e3 * b:>9.2f}{a / b:>7.0f}")


def fit_whole(images: int, factor_dtype: str) -> None:
    """Fit WideResNet-50 with d = 550 on pictures of noise; prints the memory before and at most."""
    torch.manual_seed(0)
    model = PaDiM("wide_resnet50_2", None, "anomalib", factor_dtype, weights="random")
    for _ in range(2):
        model.features(torch.randn(16, 3, 4 * GRID, 4 * GRID))
    before = peak_memory()
    sizes = [16] * (images // 16) + [images % 16] * (images % 16 > 0)
    model.fit(torch.randn(size, 3, 4 * GRID, 4 * GRID) for size in sizes)
    print(f"{before / 1e9:.2f} {peak_memory() / 1e9:.2f}")


def table_of_memory(numbers: list[int]) -> None:
    packed = 4 * GRID**2 * packed_size(550) / 1e9
    print(f"\npeak memory of a whole fit, WideResNet-50, d = 550 ({packed:.2f} GB of factor), GB")
    print(f"{'images':<12}{'factor':>9}{'network alone':>15}{'fit':>7}{'more':>7}{'/ factor':>10}")
    for images in numbers:
        for dtype in ("float32", "int8"):
            command = [sys.executable, __file__, "--fit-whole", str(images), dtype]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            before, peak = map(float, run.stdout.split()[-2:])
            print(
                f"{images:<12}{dtype:>9}{before:>15.2f}{peak:>7.2f}{peak - before:>7.2f}"
                f"{(peak - before) / packed:>10.2f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="d = 100 only, no memory")
    parser.add_argument("--fit", action="store_true", help="only the time of fits")
    parser.add_argument("--memory", type=int, nargs="+", metavar="IMAGES", help="only the memory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fit-whole", nargs=2, metavar=("IMAGES", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.fit_whole:
        fit_whole(int(options.fit_whole[0]), options.fit_whole[1])
        return
    print(f"{options.threads} threads, {native.build_config()['instruction_set']}", end=", ")
    print(f"torch {torch.__version__}")
    if options.memory:
        table_of_memory(options.memory)
        return
    if not options.fit:
        table_of_scores(100, [1, 8, 32])
        if not options.quick:
            table_of_scores(550, [1, 8, 32])
        table_of_maps([1, 8, 32])
        print()
    lines_of_fit(100, GRID)
    if not options.quick:
        lines_of_fit(550, GRID // 4)
    if not options.quick and not options.fit:
        table_of_memory([32, 96])


if __name__ == "__main__":
    main()
