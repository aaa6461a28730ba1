"""The GPU backends on this machine's GPU, beside other libraries.

    python bench/gpu.py                         # prints the tables
    python bench/gpu.py --write                 # also writes them down, as `make gpu` does
    python bench/gpu.py --device cpu --small    # to try the program where there is no GPU

Results are compared before anything is timed. Times are medians of events on the stream. A rate is
that of the least bytes: views read every image once and are written once, distances read the factor
once; "of copy" is its share of what a copy within the device reaches in the same run, which reads
and writes.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import peers_views
import torch
from anomalib.models.components.stats.multi_variate_gaussian import MultiVariateGaussian
from anomalib.models.image.padim.anomaly_map import AnomalyMapGenerator
from padim import inverse_of, kept_channels, random_layers

from spd_fast import augment_views, mahalanobis_map, recipes, reference, sample_view_params
from spd_fast.info import MEASURED
from spd_fast.ops.backends import OPERATIONS
from spd_fast.ops.mahalanobis import gaussian_factor, gaussian_update
from spd_fast.padim import PRESETS
from spd_fast.reference import pack, packed_size, unpack

ROOT = Path(__file__).parents[1]
SIZE = 224
FORMATS = (
    ("float32", False),
    ("float16", False),
    ("float16", True),  # channels last
    ("bfloat16", False),
    ("uint8", False),
)
# These images are pure noise, of which float16 misses the 2e-3 of docs/gpu.md. Of uint8 a step, and
# half of one by which the exact result is rounded.
ALLOWED = {"float32": 1e-3, "float16": 4e-3, "bfloat16": 8e-3, "uint8": 1.5 / 255}
TOLERANCE = {"float32": 1e-4, "float16": 1e-3}  # of distances, relative to anomalib's
IDENTITY = {"mean": (0, 0, 0), "std": (1, 1, 1)}


class Row(NamedTuple):
    what: str
    backend: str
    milliseconds: float
    rate: float | None = None  # bytes / s
    beside: str = ""  # ratios to the others


def seconds(job: Callable, device: str) -> float:
    """Of one call; the median over at least 10 that take half a second together, or of 3 that take
    more than 3 seconds."""
    for _ in range(2):
        job()
    times: list[float] = []
    other = torch.empty((256 << 20) * (device == "cuda"), dtype=torch.uint8, device=device)
    while sum(times) < 0.5 or len(times) < (10 if sum(times) < 3 else 3):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            other.zero_()  # what a cache held of the last turn
            start.record()
            job()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            job()
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def copy_rate(device: str, size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def backends_of(operation: str, device: str) -> list[str]:
    """Those that can run here, without the reference."""
    return [
        backend.name
        for backend in OPERATIONS[operation]
        if backend.device == device and not backend.missing()
    ]


# ------------------------------------------------------------------------------------------ views


def views_rows(device: str, small: bool) -> Iterator[Row]:
    n, height, width = (4, 60, 80) if small else (256, 375, 500)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=generator)
    params = sample_view_params(recipes.simsiam(), [(height, width)] * n, range(n), 0, 0)
    if device == "cuda":
        params = params.pin_memory()
    images = list(pixels.to(device))
    exact = reference.augment_views(
        list(pixels[:4]), params[:4], (SIZE, SIZE), dtype=torch.float64, **IDENTITY
    )
    few, quickest = min(n, 64), ("", float("inf"))
    for dtype, channels_last in FORMATS:
        options = {"dtype": getattr(torch, dtype), "channels_last": channels_last}
        least = 3 * n * (height * width + 4 * SIZE**2 * options["dtype"].itemsize)
        for backend in backends_of("augment_views", device):
            make = partial(augment_views, size=SIZE, backend=backend, **options)
            found = make(images[:4], params[:4], **IDENTITY).cpu().double()
            difference = (found / (255 if dtype == "uint8" else 1) - exact).abs().max().item()
            assert difference <= 1.01 * ALLOWED[dtype], f"{backend}, {dtype}: {difference}"
            spent = seconds(partial(make, images, params), device)
            order = "NHWC" if channels_last else "NCHW"
            what = f"four views of {n} images of {width} x {height}, {dtype}, {order}"
            yield Row(what, backend, 1e3 * spent, least / spent)
            if dtype == "float32":
                spent = seconds(partial(make, images[:few], params[:few]), device)
                quickest = min(quickest, (backend, spent), key=lambda its: its[1])
    for peer in gpu_peers(few, device):
        try:
            prepared = peer.prepare([x.permute(2, 0, 1) for x in images[:few]])
            check_peer(peer, prepared, images[:few], params[:few])
            spent = seconds(partial(peer.views, prepared, params[:few]), device)
        except Exception as error:  # another library's: the others are still of use
            print(f"{peer.name}: failed: {error}")
            continue
        beside = f"{spent / quickest[1]:.0f} times as long as {quickest[0]}"
        yield Row(f"the same of {few} images, float32", peer.name, 1e3 * spent, None, beside)


def gpu_peers(batch: int, device: str) -> Iterator[peers_views.Peer]:
    for peer in peers_views.installed_peers(batch):
        if "float tensors" in peer.name:
            yield peer
    if device == "cuda":
        try:
            yield peers_views.dali(batch, "gpu")
        except Exception as error:  # not installed, or it does not take this GPU
            print(f"DALI: left out: {error}")


def check_peer(peer: peers_views.Peer, prepared, images: list, params: torch.Tensor) -> None:
    """Its views are ours, but for what is known to differ."""
    params = params.clone()
    for name in peer.neutral:
        neutral = peers_views.NEUTRAL[name.removeprefix("patch_")]
        params[..., peers_views.COLUMN[name]] = neutral
    ours = augment_views(images, params, SIZE).cpu()
    theirs = peer.compared(prepared, params)
    theirs = torch.stack([torch.stack([v.cpu() for v in views]) for views in theirs], 1)
    difference = ((ours - theirs) * peers_views.UNIT_STD).abs()
    largest, mean = difference.max().item(), difference.mean().item()
    # Both may be that far from what is exact.
    limit = max(peer.limits[0], 2 * ALLOWED["float32"])
    assert largest <= limit, f"{peer.name} differs by {largest}"
    assert mean <= max(peer.limits[1], 2e-4), f"{peer.name} differs by {mean} on average"


# ------------------------------------------------------------------------------------------ PaDiM


def padim_rows(device: str, small: bool) -> Iterator[Row]:
    for d in (100,) if small else (100, 550):
        grid = 16 if small else 64
        channels = kept_channels(d).to(device)
        yield row_of_fit(grid, channels)
        mean, factor = gaussians(grid**2, d, device)
        anomalib = [mean.T.contiguous(), inverse_of(factor, d)]
        lower = unpack(factor, d)
        for batch in (1, 4) if small else (1, 4, 8, 32):
            layers = [x.to(device) for x in random_layers(d, batch, grid, seed=1)]
            embedding = reference.embed(layers, channels).contiguous()
            theirs = partial(AnomalyMapGenerator().compute_distance, embedding, anomalib)
            slow = seconds(theirs, device)
            plain = seconds(partial(plain_distances, embedding, mean, lower), device)
            for dtype in TOLERANCE:
                arguments = layers, channels, mean, factor.to(getattr(torch, dtype))
                for row in rows_of_distances(arguments, theirs()[:, 0]):
                    ours = row.milliseconds / 1e3
                    beside = f"anomalib {slow / ours:.1f}, plain torch {plain / ours:.1f} times"
                    yield row._replace(beside=beside)


def rows_of_distances(arguments: tuple, expected: torch.Tensor) -> Iterator[Row]:
    layers, channels, _, factor = arguments
    batch, _, grid, _ = layers[0].shape
    dtype, device = str(factor.dtype).removeprefix("torch."), factor.device.type
    for backend in backends_of("mahalanobis_map", device):
        (found,) = (b for b in OPERATIONS["mahalanobis_map"] if b.name == backend)
        if found.reasons(*arguments):
            continue
        ours = mahalanobis_map(*arguments, backend=backend)
        difference = ((ours - expected).abs() / expected).max().item()
        assert difference < TOLERANCE[dtype], f"{backend}, {dtype}: {difference}"
        spent = seconds(partial(mahalanobis_map, *arguments, backend=backend), device)
        what = f"distances, d {len(channels)}, {grid} x {grid}, batch {batch}, {dtype} factor"
        yield Row(what, backend, 1e3 * spent, factor.nbytes / spent)


def plain_distances(embedding, mean, lower) -> torch.Tensor:
    x = embedding.flatten(2).permute(2, 1, 0) - mean[:, :, None]
    return torch.bmm(lower, x).norm(dim=1)


def row_of_fit(grid: int, channels: torch.Tensor, images: int = 32) -> Row:
    d, device = len(channels), channels.device.type
    layers = [x.to(device) for x in random_layers(d, images, grid)]
    embedding = reference.embed(layers, channels).contiguous()

    def ours() -> torch.Tensor:
        mean = torch.zeros(grid**2, d, device=device)
        factor = torch.zeros(grid**2, packed_size(d), device=device)
        gaussian_update(layers, channels, 0, mean, factor)
        gaussian_factor(factor, d, images, PRESETS["anomalib"].ridge)
        return factor

    gaussian = MultiVariateGaussian()
    gaussian.fit(embedding)
    w = unpack(ours()[:16], d)
    identity = w @ torch.linalg.inv(gaussian.inv_covariance[:16].double()).float() @ w.mT
    difference = (identity - torch.eye(d, device=device)).abs().max().item()
    assert difference < 1e-2, f"the covariances differ by {difference}"
    spent = seconds(ours, device)
    slow = seconds(lambda: gaussian.fit(embedding), device)
    what = f"fit of {images} images, d {d}, {grid} x {grid}"
    return Row(what, "auto", 1e3 * spent, None, f"anomalib {slow / spent:.1f} times")


def gaussians(positions: int, d: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and factors of well-conditioned covariances."""
    own = {"generator": torch.Generator(device).manual_seed(2), "device": device}
    mean = torch.rand(positions, d, **own)
    factor = torch.empty(positions, packed_size(d), device=device)
    for rows in factor.split(256):
        lower = torch.randn(len(rows), d, d, **own).tril() / d**0.5
        lower.diagonal(dim1=1, dim2=2).copy_(1 + torch.rand(len(rows), d, **own))
        rows.copy_(pack(lower))
    return mean, factor


# ------------------------------------------------------------------------------------------ tables

HEAD = "| | backend | ms | GB/s | of copy | the others take |\n|---|---|---|---|---|---|"


def as_markdown(rows: list[Row], copied: float) -> str:
    return "\n".join([HEAD, *(as_line(row, copied) for row in rows)])


def as_line(row: Row, copied: float) -> str:
    rate = f"{row.rate / 1e9:.0f} | {row.rate / copied:.0%}" if row.rate else " | "
    cells = row.what, row.backend, f"{row.milliseconds:.3g}", rate, row.beside
    return f"| {' | '.join(cells)} |"


def write_down(title: str, table: str) -> None:
    """Into the README, between its marks, and into what `spd-fast info` says."""
    readme = ROOT / "README.md"
    begin, end = "<!-- measured on a GPU -->\n", "<!-- until here -->"
    text, count = re.subn(
        f"(?s){begin}.*?{end}",
        lambda _: f"{begin}{title} (`python bench/gpu.py`):\n\n{table}\n{end}",
        readme.read_text(),
    )
    assert count == 1, f"{readme} has no place for the table"
    readme.write_text(text)
    MEASURED.write_text(f"{title}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="to see that it works")
    parser.add_argument("--write", action="store_true", help="into README.md and spd-fast info")
    args = parser.parse_args()
    if args.write and (args.device != "cuda" or args.small):
        parser.error("--write is for whole runs on a GPU")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu --small tries the program without one")
    torch.set_float32_matmul_precision("highest")
    copied = copy_rate(args.device, 1 << (20 if args.small else 30))
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "the processor"
    title = (
        f"{gpu}, torch {torch.__version__}, {date.today()}; a copy moves {copied / 1e9:.0f} GB/s"
    )
    print(f"{title}\n\n{HEAD}", flush=True)
    rows = []
    for table in views_rows, padim_rows:
        for row in table(args.device, args.small):
            print(as_line(row, copied), flush=True)
            rows.append(row)
    if args.write:
        write_down(title, as_markdown(rows, copied))


if __name__ == "__main__":
    main()
