"""How fast `augment_views` makes the four views of an image, beside other libraries.

    python bench/augment_views.py           # what bench/README.md shows, about 2 minutes
    python bench/augment_views.py --quick   # a small version, to see that it works

Checks first that the compared results agree. Times are CPU time on one thread, medians. The unit is
the decoding of the image's JPEG by libjpeg-turbo, which a loader has to do anyway.
"""

import argparse
import io
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

# malloc takes large blocks from the kernel and gives them back at once, or keeps them, depending on
# what was freed before. Writing to fresh pages makes decode_jpeg, our unit, a third slower, and its
# times fall into two groups. With these (read by glibc when the process starts) memory is kept: the
# smaller and steadier unit.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000"}
if __name__ == "__main__" and not MALLOC.items() <= os.environ.items():
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})

import numpy as np  # noqa: E402
import peers_views  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision.io import decode_jpeg  # noqa: E402

from spd_fast import augment_views, recipes, sample_view_params  # noqa: E402
from spd_fast.loader import CHUNK  # noqa: E402
from spd_fast.ops.augment_views import IMAGENET_MEAN, IMAGENET_STD  # noqa: E402
from spd_fast.ops.backends import native  # noqa: E402
from spd_fast.ops.memory import on_huge_pages  # noqa: E402
from spd_fast.views import COLUMN  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from peers import torchvision_views  # noqa: E402

HEIGHT, WIDTH = 375, 500
VIEWS, SIZE = 4, 224
BATCH_BYTES = 64 << 20  # at least; more than the caches hold, so that the views go to memory
FORMATS = {
    "float32": (torch.float32, False),
    "float32 channels-last": (torch.float32, True),
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
    "uint8": (torch.uint8, False),
}

# ---------------------------------------------------------------------------------------- inputs


def photographs() -> list[Image.Image]:
    from skimage import data
    from sklearn.datasets import load_sample_images

    arrays = [data.astronaut(), data.coffee(), data.rocket(), *load_sample_images().images]
    return [Image.fromarray(array) for array in arrays]


def jpegs(n: int) -> list[torch.Tensor]:
    """n JPEG files of 500 x 375: pieces of photographs, only made smaller, so that they have as
    much detail as a photograph of this size."""
    rng, photos, files = np.random.default_rng(0), photographs(), []
    for i in range(n):
        photo = photos[i % len(photos)]
        width = int(rng.uniform(WIDTH, min(photo.width, photo.height * 4 / 3)))
        height = width * 3 // 4
        left, top = rng.integers(photo.width - width + 1), rng.integers(photo.height - height + 1)
        piece = photo.crop((left, top, left + width, top + height))
        file = io.BytesIO()
        piece.resize((WIDTH, HEIGHT), Image.LANCZOS).save(file, "JPEG", quality=90)
        files.append(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8))
    return files


def decode_with_pil(file: torch.Tensor) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(file.numpy())).convert("RGB"))


def upright(pixels: torch.Tensor) -> torch.Tensor:
    """(H, W, 3) from decode_jpeg's (3, H, W), which has that memory order already."""
    return pixels.permute(1, 2, 0).contiguous()


def params_for(n: int, size: tuple[int, int] = (HEIGHT, WIDTH), views: int = SIZE) -> torch.Tensor:
    return sample_view_params(recipes.simsiam(), [size] * n, range(n), 0, 0, views)


def empty_batch(
    n: int, size: int = SIZE, dtype: torch.dtype = torch.float32, channels_last: bool = False
) -> torch.Tensor:
    """A batch of views as the loader allocates it, touched once as the loader's used ones are."""
    shape = (VIEWS, n, size, size, 3) if channels_last else (VIEWS, n, 3, size, size)
    views = on_huge_pages(torch.empty(shape, dtype=dtype)).zero_()
    return views.permute(0, 1, 4, 2, 3) if channels_last else views


# --------------------------------------------------------------------------------------- timing


def cpu_ms(job: Callable) -> float:
    start = time.process_time()
    result = job()
    spent = 1e3 * (time.process_time() - start)
    del result  # after the clock: in a loader, somebody else frees it
    return spent


def wall_ms(job: Callable) -> float:
    start = time.perf_counter()
    job()
    return 1e3 * (time.perf_counter() - start)


def in_turn(jobs: dict, rounds: int, clock: Callable = cpu_ms) -> dict[str, list[float]]:
    """Times of jobs that run in turn, so that what slows the machine down meets all alike."""
    for job in jobs.values():
        job()
    spent = defaultdict(list)
    for _ in range(rounds):
        for name, job in jobs.items():
            spent[name].append(clock(job))
    return spent


def ours(name: str) -> tuple[Callable, Callable]:
    """Our views as the loader calls for them: some images at a time into a part of a batch."""
    dtype, channels_last = FORMATS[name]
    chunk_bytes = CHUNK * VIEWS * 3 * SIZE * SIZE * dtype.itemsize
    chunks = math.ceil(BATCH_BYTES / chunk_bytes)
    batch = empty_batch(chunks * CHUNK, SIZE, dtype, channels_last)
    turn = 0

    def views(images, rows):
        nonlocal turn
        part = slice(turn * CHUNK, turn * CHUNK + len(images))
        turn = (turn + 1) % chunks
        augment_views(images, rows, out=batch[:, part], threads=1)

    return lambda pixels: [upright(x) for x in pixels], views


def beside_decode(jobs: dict, files: list, params: torch.Tensor, rounds: int) -> dict:
    """CPU-ms per image of each job and of decoding, medians over chunks of images.

    As in the loader a chunk is decoded and then augmented. It is decoded again before each job, and
    the order of the jobs is drawn for each chunk, so that all find the pixels equally warm.
    """
    order, spent = random.Random(0), defaultdict(list)
    chunks = [slice(i, i + CHUNK) for i in range(0, len(files), CHUNK)]
    for k, part in enumerate([chunks[0], *chunks * rounds]):
        times, rows = {}, params[part]
        times["PIL"] = cpu_ms(lambda p=part: [decode_with_pil(file) for file in files[p]])
        for name in order.sample(list(jobs), len(jobs)):
            prepare, views = jobs[name]
            pixels = []
            times["decode"] = cpu_ms(lambda p=part, x=pixels: x.extend(map(decode_jpeg, files[p])))
            images = prepare(pixels)
            times[name] = cpu_ms(lambda v=views, x=images, r=rows: v(x, r))
            if k > 0:  # the first chunk only warms up
                spent["decode"].append(times["decode"] / len(rows))
        for name in {*jobs, "PIL"} if k > 0 else ():
            spent[name].append(times[name] / len(rows))
    return {name: median(values) for name, values in spent.items()}


# ---------------------------------------------------------------------------------------- tables


def check_ours(files: list, params: torch.Tensor) -> None:
    worst = 0.0
    for file, rows in zip(files, params):
        image = upright(decode_jpeg(file))
        views = augment_views([image], rows[None], mean=(0,) * 3, std=(1,) * 3, backend="native")
        theirs = torch.stack(torchvision_views(image, rows, (SIZE, SIZE), separable_alpha=True))
        worst = max(worst, (views[:, 0] - theirs).abs().max().item())
    assert worst < 1e-4, f"the views differ by {worst}"
    print(f"ours and torchvision in float64: largest difference {worst:.1e} on [0, 1]")


def check_peers(peers: list, files: list, params: torch.Tensor) -> dict[str, float]:
    """Mean difference of each peer's views to ours on [0, 1], and asserts about them."""
    pixels = [decode_jpeg(file) for file in files[:CHUNK]]
    images = [upright(x) for x in pixels]

    def difference(made: list, rows: torch.Tensor) -> torch.Tensor:
        expected = augment_views(images, rows, backend="native")
        got = torch.stack([torch.stack(list(views)) for views in made], 1)
        assert got.shape == expected.shape and got.dtype == torch.float32
        return (got - expected).abs() * peers_views.UNIT_STD

    means = {}
    for peer in peers:
        inputs, rows = peer.prepare(pixels), params[: len(pixels)]
        means[peer.name] = difference(peer.views(inputs, rows), rows).mean().item()
        for column in peer.neutral:
            rows = rows.clone()
            rows[..., COLUMN[column]] = peers_views.NEUTRAL[column.removeprefix("patch_")]
        rest = difference(peer.compared(inputs, rows), rows)
        worst, mean = rest.max().item(), rest.mean().item()
        assert worst < peer.limits[0] and mean < peer.limits[1], (peer.name, worst, mean)
        without = peer.result.partition(": ")[2]
        what = f"{peer.name}, but for {without}" if without else peer.name
        print(
            f"ours and {what}: largest difference {worst:.1e} (< {peer.limits[0]}), "
            f"mean {mean:.1e} (< {peer.limits[1]})"
        )
    return means


def table_of_peers(files: list, params: torch.Tensor, rounds: int) -> dict[str, float]:
    peers = list(peers_views.installed_peers(CHUNK))
    means = check_peers(peers, files, params)
    jobs = {name: ours(name) for name in FORMATS}
    jobs |= {peer.name: (peer.prepare, peer.views) for peer in peers}
    times = beside_decode(jobs, files, params, rounds)
    unit, own = times["decode"], times["float32"]
    print(f"\n{'':<34}{'CPU-ms':>8}{'x decode':>10}{'x ours':>8}  {'same result?':<24}mean diff.")

    def line(name: str, ms: float, result: str = "") -> None:
        print(f"{name:<34}{ms:>8.2f}{ms / unit:>10.2f}{ms / own:>8.2f}  {result}".rstrip())

    line("decode_jpeg (libjpeg-turbo)", unit)
    line("PIL: open, decode, to an array", times["PIL"])
    for name in FORMATS:
        line(f"spd-fast, {name}", times[name])
    for peer in peers:
        line(peer.name, times[peer.name], f"{peer.result:<24}{means[peer.name]:.4f}")
    return times


def ours_as_json(files: list, params: torch.Tensor, rounds: int) -> None:
    """What the tables by instruction set show of the one in use."""
    times = beside_decode({"ours": ours("float32")}, files, params, rounds)
    repeats = 3 * rounds if rounds > 3 else rounds
    stages, rates = stage_times(files, params, repeats), thread_rates(files, params, repeats)
    isa = native.build_config()["instruction_set"]
    print(json.dumps({**times, "isa": isa, "stages": stages, "rates": rates}))


def stage_times(files: list, params: torch.Tensor, rounds: int) -> dict[str, float]:
    """CPU-ms per image with columns of the table switched off, and kind after kind on again."""
    images = [upright(decode_jpeg(file)) for file in files]
    batch = empty_batch(len(images))
    stages = {"resize, normalise, store": {}, "+ brightness": {"brightness": 1}}
    stages |= {"+ contrast": {"contrast": 1}, "+ saturation": {"saturation": 1}}
    stages |= {"+ hue": {"hue": 0}, "+ grayscale": {"grayscale": 0}}
    stages |= {"+ blur": {"blur_sigma": 0}, "+ patch": {"patch_kind": 0}}
    jobs, table = {}, params.clone()
    for name, off in reversed(stages.items()):
        rows = table.clone()
        jobs[name] = lambda rows=rows: augment_views(images, rows, out=batch, threads=1)
        for column, value in off.items():
            table[..., COLUMN[column]] = value
    times = in_turn(jobs, rounds)
    return {name: median(times[name]) / len(images) for name in stages}


def thread_rates(files: list, params: torch.Tensor, rounds: int) -> list[float]:
    """Images per second of wall time, best of the rounds over all images: with one thread, with two
    in one call, and with two threads that call for some images each, as the loader's do."""
    images = [upright(decode_jpeg(file)) for file in files]
    batch = empty_batch(len(images))
    parts = [slice(i, i + CHUNK) for i in range(0, len(images), CHUNK)]

    def views(part: slice, threads: int = 1):
        augment_views(images[part], params[part], out=batch[:, part], threads=threads)

    with ThreadPoolExecutor(2) as pool:
        jobs = {  # after "two", an idle OpenMP thread keeps the second core for a while
            "two": lambda: views(slice(None), 2),
            "one": lambda: views(slice(None)),
            "loader": lambda: list(pool.map(views, parts)),
        }
        times = in_turn(jobs, rounds, wall_ms)
    return [1e3 * len(images) / min(times[name]) for name in ("one", "two", "loader")]


def tables_of_instruction_sets(options: argparse.Namespace) -> None:
    """Each in a process of its own: it is chosen at import."""
    found = {}
    command = [sys.executable, __file__, "--json", "--images", str(options.images)]
    command += ["--rounds", str(options.rounds)]
    for isa in sorted(native.build_config()["instruction_sets"]):
        env = {**os.environ, "SPD_FAST_ISA": isa}
        run = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        found[isa] = json.loads(run.stdout)
        assert found[isa]["isa"] == isa

    print(f"\n{'':<44}{'images / s, and x of one thread':>44}")
    print(f"{'instruction set':<26}{'CPU-ms':>8}{'x decode':>10}{'one thread':>14}", end="")
    print(f"{'two in a call':>15}{'loader, two':>15}")
    for isa, times in found.items():
        one, *two = times["rates"]
        print(f"{isa:<26}{times['ours']:>8.2f}{times['ours'] / times['decode']:>10.2f}", end="")
        print(f"{one:>14.0f}" + "".join(f"{rate:>9.0f}{rate / one:>6.2f}" for rate in two))

    print(f"\n{'stage, CPU-ms and share':<26}" + "".join(f"{isa:>18}" for isa in found))
    before = dict.fromkeys(found, 0.0)
    for name in next(iter(found.values()))["stages"]:
        line = f"{name:<26}"
        for isa, times in found.items():
            now, whole = times["stages"][name], times["stages"]["+ patch"]
            line += f"{now - before[isa]:>11.3f}{(now - before[isa]) / whole:>7.0%}"
            before[isa] = now
        print(line)
    print(f"{'all':<26}" + "".join(f"{whole:>11.3f}{'':>7}" for whole in before.values()))


def table_of_growth(rounds: int) -> None:
    n, photos, jobs = CHUNK, photographs(), {}

    def add(name: str, size: tuple[int, int], side: int = SIZE, views: int = VIEWS) -> None:
        pieces = [photos[i % len(photos)].resize(size[::-1], Image.LANCZOS) for i in range(n)]
        images = [np.array(piece) for piece in pieces]
        rows = params_for(n, size, side)[:, :views]
        batch = empty_batch(n, side)[:views]
        jobs[name] = lambda: augment_views(images, rows, out=batch, threads=1)

    for height, width in ((188, 250), (375, 500), (750, 1000), (1500, 2000)):
        add(f"input {width} x {height}", (height, width))
    for side in (112, 224, 448):
        add(f"views of {side} x {side}", (HEIGHT, WIDTH), side)
    for views, what in enumerate(("x", "x, x_hat", "x, x_hat, x_pos", "all"), 1):
        add(f"{views} of the recipe's views: {what}", (HEIGHT, WIDTH), views=views)
    times = {name: median(values) / n for name, values in in_turn(jobs, rounds).items()}
    base = times[f"input {WIDTH} x {HEIGHT}"]
    print(f"\n{'growth':<42}{'CPU-ms':>8}{'x of 500 x 375, 224, 4 views':>30}")
    for name, ms in times.items():
        print(f"{name:<42}{ms:>8.2f}{ms / base:>30.2f}")


def line_of_bandwidth(times: dict[str, float]) -> None:
    large = torch.ones(1 << 26)  # 256 MiB
    jobs = {"fill": lambda: large.fill_(2.0)}
    peak = large.numel() * 4 / min(in_turn(jobs, 10, wall_ms)["fill"]) / 1e6
    print(f"\nmemory: torch's fill_ writes {peak:.1f} GB/s; ours, as a share of it:")
    for name in ("float32", "float16", "uint8"):
        written = VIEWS * 3 * SIZE * SIZE * FORMATS[name][0].itemsize / times[name] / 1e6
        print(f"{name:<34}{written:>8.2f} GB/s{written / peak:>8.0%}")


def lines_of_overhead(rounds: int) -> None:
    """What does not depend on the pixels, so it is measured on images with hardly any."""
    tiny, times = [torch.zeros(8, 8, 3, dtype=torch.uint8) for _ in range(CHUNK)], 100
    rows = params_for(CHUNK, (8, 8), 8)
    out = empty_batch(CHUNK, 8)
    buffers = [image.view(-1).numpy() for image in tiny]
    layout = np.array([[i, 0, 8, 8] for i in range(CHUNK)])
    table, target, mean, std = rows.numpy(), out.numpy(), list(IMAGENET_MEAN), list(IMAGENET_STD)

    def op():
        augment_views(tiny, rows, out=out, threads=1)

    def kernel():
        native.augment_views(buffers, layout, table, target, "float32", mean, std, 1)

    jobs = {"sample": lambda: params_for(CHUNK), "op": op, "kernel": kernel}
    repeated = {name: lambda job=job: [job() for _ in range(times)] for name, job in jobs.items()}
    us = {
        name: 1e3 * median(values) / times / CHUNK
        for name, values in in_turn(repeated, rounds).items()
    }
    print(f"\nper image, in calls for {CHUNK} images: sample_view_params {us['sample']:.1f} us,")
    print(f"the operation above its C++ function {us['op'] - us['kernel']:.1f} us")


def installed(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(": ")[1] for x in lines if x.startswith("model name")), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images and rounds")
    parser.add_argument("--images", type=int, help="default 96, quick 16")
    parser.add_argument("--rounds", type=int, help="over all images, default 10, quick 1")
    parser.add_argument("--json", action="store_true", help="decode and ours only, as JSON")
    options = parser.parse_args()
    # Without --quick an even number of chunks, so that two threads can share them.
    options.images = options.images or (CHUNK if options.quick else 6 * CHUNK)
    options.rounds = options.rounds or (1 if options.quick else 10)
    repeats = 3 if options.quick else 15
    torch.set_num_threads(1)
    files, params = jpegs(options.images), params_for(options.images)
    if options.json:
        ours_as_json(files, params, options.rounds)
        return

    packages = ("torch", "torchvision", "pillow", "kornia", "albumentations")
    print(f"{processor()}, {os.cpu_count()} cores, {native.build_config()['instruction_set']}")
    print(", ".join(map(installed, (*packages, "nvidia-dali-cuda130"))))
    size = sum(file.numel() for file in files) / len(files) / 1e3
    print(
        f"{len(files)} photographs of {WIDTH} x {HEIGHT}, JPEG quality 90, {size:.0f} kB on average"
    )
    print(f"one thread, {', '.join(f'{k}={v}' for k, v in MALLOC.items())}")
    check_ours(files, params)
    times = table_of_peers(files, params, options.rounds)
    tables_of_instruction_sets(options)
    table_of_growth(repeats)
    line_of_bandwidth(times)
    lines_of_overhead(repeats)


if __name__ == "__main__":
    main()
