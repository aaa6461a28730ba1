"""How fast the loader gives batches of four views from JPEG files, by threads and by DALI.

    python bench/dali.py           # what bench/README.md shows, about 6 minutes
    python bench/dali.py --quick   # a small version, to see that it works

Checks first that both give the same batches, and that the peers do the same kind of work. All
cores. Contenders take turns; an epoch is long enough that the batches made ahead, at its start and
its end, lie outside what is timed. "decode" alone is the same files through the same decoder with
the same threads. Where views cost as much as one decode, half of its rate is the bound.
"""

import argparse
import os
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import peers_views  # noqa: E402
import torch  # noqa: E402
from augment_views import HEIGHT, WIDTH, installed, jpegs, photographs, processor  # noqa: E402
from PIL import Image  # noqa: E402

from spd_fast import recipes, sample_view_params  # noqa: E402
from spd_fast.datasets.folder import ImageFolder  # noqa: E402
from spd_fast.datasets.images import read_bytes, read_image  # noqa: E402
from spd_fast.loader import CHUNK, ViewLoader  # noqa: E402
from spd_fast.ops.augment_views import augment_views  # noqa: E402
from spd_fast.ops.backends import native  # noqa: E402

CORES = os.cpu_count()
RECIPE, VIEWS, SIZE, SEED = recipes.simsiam(), 4, 224, 0
EDGE = 3  # batches at either end of an epoch that are not timed
OURS = {"spd-fast, threads": "torch", "spd-fast, DALI": "dali"}
DECODES = {"torch": "decode alone, threads (PIL)", "dali": "decode alone, DALI"}

# -------------------------------------------------------------------------------- contenders


def ours(backend: str, data: ImageFolder, batch: int, workers: int = CORES) -> Callable:
    loader = ViewLoader(data, RECIPE, batch, backend, seed=SEED, workers=workers)

    def epoch() -> Iterator[int]:
        for made in loader:
            yield made.views.shape[1]

    return epoch


def decode_by_threads(data: ImageFolder, batch: int, workers: int = CORES) -> Callable:
    def chunk(paths: list[Path]) -> int:
        for path in paths:
            read_image(path)
        return len(paths)

    def epoch() -> Iterator[int]:
        parts = [data.paths[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
        with ThreadPoolExecutor(workers) as pool:
            done = 0
            for count in pool.map(chunk, parts):
                done += count
                if done >= batch:
                    yield done
                    done = 0

    return epoch


def decode_by_dali(data: ImageFolder, batch: int, workers: int = CORES) -> Callable:
    """Files through DALI's own reader; the images are not looked at."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=batch, num_threads=workers, device_id=None)
    def pipeline():
        encoded, _ = fn.readers.file(files=[str(path) for path in data.paths], read_ahead=True)
        return fn.decoders.image(encoded)

    built = pipeline()
    built.build()

    def epoch() -> Iterator[int]:
        for _ in range(len(data) // batch):
            yield len(built.run()[0])

    return epoch


DECODERS = {"torch": decode_by_threads, "dali": decode_by_dali}


class PilViews(torch.utils.data.Dataset):
    """Four views of an image by torchvision v2 on PIL images, the faster of its two kinds."""

    def __init__(self, data: ImageFolder):
        self.paths = data.paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple:
        image = Image.open(self.paths[i]).convert("RGB")
        (rows,) = sample_view_params(RECIPE, [(image.height, image.width)], [i], 0, SEED, SIZE)
        return (*peers_views.chain(peers_views.PIL, image, rows), i)


def torchvision_loader(data: ImageFolder, batch: int) -> Callable:
    def epoch() -> Iterator[int]:
        loader = torch.utils.data.DataLoader(PilViews(data), batch, num_workers=CORES)
        for *views, _ in loader:
            yield len(views[0])

    return epoch


def native_dali(data: ImageFolder, batch: int) -> Callable:
    job: dict = {}
    built = peers_views.dali_pipeline(job, batch, encoded=True, num_threads=CORES)

    def epoch() -> Iterator[int]:
        for i in range(0, len(data) - batch + 1, batch):
            places = range(i, i + batch)
            job["images"] = [np.fromfile(data.paths[k], np.uint8) for k in places]
            job["rows"] = sample_view_params(RECIPE, [(HEIGHT, WIDTH)] * batch, places, 0, SEED)
            yield len(built.run()[0])

    return epoch


# ---------------------------------------------------------------------------------------- timing


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def settle() -> None:
    """Wait for what DALI's own pipelines make ahead for their next epoch."""
    before = -1.0
    while (now := cpu_seconds()) - before > 0.01:
        before = now
        time.sleep(0.1)


def measure(epoch: Callable) -> tuple[float, float]:
    """Images / s in the middle of an epoch, and CPU-ms per image of all of it."""
    before, counts, times = cpu_seconds(), [], []
    for count in epoch():
        counts.append(count)
        times.append(time.perf_counter())
    settle()
    spent = 1e3 * (cpu_seconds() - before) / sum(counts)
    middle = slice(EDGE, len(counts) - EDGE)
    rate = sum(counts[middle][1:]) / (times[middle][-1] - times[middle][0])
    return rate, spent


def in_turn(contenders: dict[str, Callable], rounds: int) -> dict[str, list]:
    """(rate, CPU-ms) of each, round after round; the first two rounds only warm up."""
    found = defaultdict(list)
    for k in range(-2, rounds):
        for name, epoch in contenders.items():
            result = measure(epoch)
            if k >= 0:
                found[name].append(result)
    return found


def middle(results: list, column: int = 0) -> float:
    return median(result[column] for result in results)


def ratio(results: list, others: list, factor: float = 1) -> float:
    """Of rates within a round."""
    return median(a[0] / (factor * b[0]) for a, b in zip(results, others))


# ---------------------------------------------------------------------------------------- checks


def check(data: ImageFolder, batch: int) -> None:
    pairs = zip(*(islice(ViewLoader(data, RECIPE, batch, b, seed=SEED), 2) for b in OURS.values()))
    for one, other in pairs:
        assert all(map(torch.equal, one, other)), "the backends differ"
    print("spd-fast, threads and DALI: the same bits in every batch")
    encoded = [np.fromfile(path, np.uint8) for path in data.paths[:CHUNK]]
    images = [read_image(path) for path in data.paths[:CHUNK]]
    worst = max(np.abs(a - b.astype(int)).max() for a, b in zip(decoded_by_dali(encoded), images))
    print(f"DALI's decoder and PIL's: largest difference {worst} of 255")
    params = sample_view_params(RECIPE, [i.shape[:2] for i in images], range(CHUNK), 0, SEED, SIZE)
    views = augment_views(images, params, SIZE).permute(1, 0, 2, 3, 4)
    theirs = torch.stack([torch.stack(PilViews(data)[i][:4]) for i in range(CHUNK)])
    job = {"images": encoded, "rows": params}
    built = peers_views.dali_pipeline(job, CHUNK, encoded=True, num_threads=1)
    native_views = [torch.from_numpy(np.array(out.as_tensor())) for out in built.run()]
    for name, made, limits in (
        ("torchvision v2, PIL images", theirs, (0.2, 0.02)),
        (
            "DALI's operators, contrast and hue as it has them",
            torch.stack(native_views, 1),
            (1, 0.1),
        ),
    ):
        difference = (made - views).abs() * peers_views.UNIT_STD
        worst, mean = difference.max().item(), difference.mean().item()
        assert worst <= limits[0] and mean < limits[1], (name, worst, mean)
        print(f"ours and {name}: largest difference {worst:.1e}, mean {mean:.1e} on [0, 1]")


def decoded_by_dali(encoded: list[np.ndarray]) -> list[np.ndarray]:
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=len(encoded), num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline():
        return fn.decoders.image(fn.external_source(lambda: encoded))

    images = pipeline().run()[0]
    return [np.array(images.at(i)) for i in range(len(encoded))]


# ---------------------------------------------------------------------------------------- tables


def table_of_peers(data: ImageFolder, batch: int, rounds: int) -> None:
    contenders = {name: ours(backend, data, batch) for name, backend in OURS.items()}
    contenders |= {DECODES[b]: DECODERS[b](data, batch) for b in OURS.values()}
    peers = "torchvision's DataLoader (PIL)", "DALI's own operators"
    few = ImageFolder(data.paths[: (2 * EDGE + 4) * batch])
    contenders[peers[0]] = torchvision_loader(few, batch)
    contenders[peers[1]] = native_dali(few, batch)
    found = in_turn(contenders, rounds)
    print(f"\n{'':<34}{'images / s':>11}{'CPU-ms':>8}{'of bound':>10}", end="")
    print(f"{'x DataLoader':>14}{'x DALI ops':>12}")
    for name, results in found.items():
        line = f"{name:<34}{middle(results):>11.0f}{middle(results, 1):>8.2f}"
        bound = found[DECODES[OURS[name]]] if name in OURS else None
        line += f"{ratio(results, bound, 0.5):>10.0%}" if bound else f"{'':>10}"
        for peer, width in zip(peers, (14, 12)):
            line += f"{ratio(results, found[peer]):>{width}.1f}" if bound else ""
        print(line.rstrip())


def table_of_growth(data: ImageFolder, batch: int, rounds: int, folder: Path) -> None:
    cases = {f"{n} threads": (data, batch, n) for n in range(1, CORES + 1)}
    cases |= {f"batch {n}": (data, n, CORES) for n in (batch // 4, batch, 2 * batch)}
    for side in (WIDTH // 2, WIDTH, 2 * WIDTH):
        cases[f"files of {side} x {side * 3 // 4}"] = (
            files_of(folder, side, len(data)),
            batch,
            CORES,
        )
    print(f"\n{'images / s and share of bound':<30}", end="")
    print("".join(f"{name:>26}" for name in OURS))
    for name, arguments in cases.items():
        contenders = {}
        for backend in OURS.values():
            contenders[backend] = ours(backend, *arguments)
            contenders[DECODES[backend]] = DECODERS[backend](*arguments)
        found = in_turn(contenders, rounds)
        line = f"{name:<30}"
        for backend in OURS.values():
            share = ratio(found[backend], found[DECODES[backend]], 0.5)
            line += f"{middle(found[backend]):>18.0f}{share:>8.0%}"
        print(line)


def files_of(folder: Path, width: int, count: int) -> ImageFolder:
    """So many JPEG files of this width; a few different ones, under many names."""
    place = folder / f"width{width}"
    if not place.exists():
        place.mkdir()
        photos = photographs()
        for i in range(count):
            path = place / f"{i:05d}.jpg"
            if i < len(photos):
                photo = photos[i].resize((width, width * 3 // 4), Image.LANCZOS)
                photo.save(path, quality=90)
            else:
                os.link(place / f"{i % len(photos):05d}.jpg", path)
    return ImageFolder(place)


def table_of_parts(data: ImageFolder, batch: int, rounds: int) -> None:
    """CPU-ms per image of each step by itself, on one thread, and of the whole."""
    paths = data.paths[: 8 * CHUNK]
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    images = [read_image(path) for path in paths[:CHUNK]]
    sizes = [image.shape[:2] for image in images]
    draw = partial(sample_view_params, RECIPE, sizes, range(CHUNK), 0, SEED, SIZE)
    params = draw()
    out = torch.zeros(VIEWS, 8 * CHUNK, SIZE, SIZE, 3).permute(0, 1, 4, 2, 3)
    turn = 0

    def views() -> None:
        nonlocal turn
        part = out[:, turn * CHUNK : (turn + 1) * CHUNK]
        turn = (turn + 1) % 8
        augment_views(images, params, out=part, threads=1)

    encoded = decode_by_dali(data, batch, workers=1)
    jobs = {
        "read": lambda: [read_bytes(path) for path in next_of(chunks)],
        "PIL": lambda: [read_image(path) for path in next_of(chunks)],
        "draw": draw,
        "views": views,
    }
    spent = defaultdict(list)
    wholes = {backend: ours(backend, data, batch) for backend in OURS.values()}
    for _ in range(4 * rounds):
        for name, job in jobs.items():
            start = time.process_time()
            for _ in range(4):
                job()
            spent[name].append(1e3 * (time.process_time() - start) / (4 * CHUNK))
    found = in_turn({"DALI": encoded, **wholes}, rounds)
    spent |= {name: [ms for _, ms in results] for name, results in found.items()}
    ms = {name: median(values) for name, values in spent.items()}
    parts = {
        "torch": {"read and decode": ms["PIL"]},
        "dali": {"read": ms["read"], "decode": ms["DALI"] - ms["read"]},
    }
    print(f"\n{'where the time goes, CPU-ms':<34}" + "".join(f"{name:>20}" for name in OURS))
    lines = defaultdict(dict)
    for backend, own in parts.items():
        own |= {"parameters of views": ms["draw"], "views, into the batch": ms["views"]}
        rest = ms[backend] - sum(own.values())
        for name, value in {**own, "threads, queues, the rest": rest, "all": ms[backend]}.items():
            lines[name][backend] = value
    for name in ("read", "decode", "read and decode", *list(lines)[1:]):
        if name in lines:
            values = lines.pop(name)
            texts = [f"{values[b]:.3f}" if b in values else "" for b in OURS.values()]
            print(f"{name:<34}" + "".join(f"{text:>20}" for text in texts))
    estimate(ms["dali"], ms["views"])


def next_of(chunks: list) -> list:
    chunks.append(chunks.pop(0))
    return chunks[-1]


A100_NODE = (
    16_621  # images / s that ResNet-50 trains on 8 A100, mixed precision (NVIDIA's examples)
)
H100_GAIN = 2  # assumed: an H100 is twice as fast
NVJPEG_RATE = 1.66e9  # pixels / s of one of an A100's five decoders: 3840 x 2160 takes it 5 ms


def estimate(cpu_ms: float, views_ms: float) -> None:
    """On paper: what feeds SimSiam + SPD on ResNet-50 on a node of 8 H100."""
    passes = H100_GAIN * A100_NODE
    images = passes / VIEWS
    print(f"\non paper, 8 H100: {passes} passes / s are {images:.0f} images / s of 4 views:")
    print(f"  all on the CPU: {images * cpu_ms / 1e3:.1f} cores like these")
    decode = (cpu_ms - views_ms) * images / 1e3
    print(f"  views on the GPUs, decoding and the rest here: {decode:.1f} cores")
    share = images / 8 * WIDTH * HEIGHT / NVJPEG_RATE
    print(
        f"  decoded on the GPUs as well: {images / 8:.0f} images / s on each, {share:.0%} of what "
        "one hardware decoder makes of large images"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images and rounds")
    parser.add_argument("--batch", type=int, help="default 64, quick 16")
    parser.add_argument("--rounds", type=int, help="default 5, quick 1")
    options = parser.parse_args()
    batch = options.batch or (16 if options.quick else 64)
    rounds = options.rounds or (1 if options.quick else 5)
    torch.set_num_threads(1)
    print(f"{processor()}, {CORES} cores, {native.build_config()['instruction_set']}")
    packages = ("torch", "torchvision", "pillow", "nvidia-dali-cuda130")
    print(", ".join(map(installed, packages)))
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        (folder / "photos").mkdir()
        count = (2 * EDGE + 10) * batch
        for i, file in enumerate(jpegs(count)):
            (folder / "photos" / f"{i:05d}.jpg").write_bytes(file.numpy().tobytes())
        data = ImageFolder(folder / "photos")
        size = sum(path.stat().st_size for path in data.paths) / count / 1e3
        print(f"{count} JPEG files of {WIDTH} x {HEIGHT}, {size:.0f} kB on average, batch {batch}")
        check(data, batch)
        table_of_peers(data, batch, rounds)
        table_of_parts(data, batch, rounds)
        table_of_growth(data, batch, max(1, rounds // 2), folder)


if __name__ == "__main__":
    main()
