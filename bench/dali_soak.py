"""Whether the loader keeps its memory, its threads and its samples, hour after hour.

    python bench/dali_soak.py [--minutes 10] [--backend dali]

20,000 small JPEG files in 3 tar shards, read by 3 ranks, each a loader in this process. Every epoch
must have each sample once, but for those that fill no global batch. Prints a line every half a
minute, and ends with status 1 if a sample was lost or repeated, threads have become more, or memory
has grown by more than 5 % after the first fifth of the time.
"""

import argparse
import io
import os
import tarfile
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from spd_fast import recipes  # noqa: E402
from spd_fast.loader import ViewLoader  # noqa: E402

IMAGES, SHARDS, RANKS, BATCH, SIZE = 20_000, 3, 3, 64, 32


def write_shards(folder: Path) -> None:
    rng = np.random.default_rng(0)
    tars = [tarfile.open(folder / f"{k}.tar", "w") for k in range(SHARDS)]
    for i in range(IMAGES):
        height, width = rng.integers(24, 64, 2)
        pixels = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).resize((width, height), Image.BICUBIC).save(data, "JPEG")
        for name, content in (
            (f"{i:06d}.jpg", data.getvalue()),
            (f"{i:06d}.cls", b"%d" % (i % 10)),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tars[i * SHARDS // IMAGES].addfile(member, io.BytesIO(content))
    for tar in tars:
        tar.close()


def resident() -> float:
    """MiB."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x)
    return int(line.split()[1]) / 1024


def threads() -> int:
    """A thread that has ended may be seen for a moment longer."""
    counts = []
    for _ in range(20):
        counts.append(len(os.listdir("/proc/self/task")))
        time.sleep(0.005)
    return min(counts)


def epoch(loaders: list[ViewLoader]) -> str:
    """One epoch of all ranks in step; what is wrong with it, if anything."""
    seen = []
    for batches in zip(*loaders, strict=True):
        for batch in batches:
            seen.append(batch.indices)
            assert batch.labels.equal(batch.indices % 10)
    count = torch.cat(seen).bincount(minlength=IMAGES)
    left_out = IMAGES % (BATCH * RANKS)
    lost, repeated = int((count == 0).sum()) - left_out, int((count > 1).sum())
    return f"{lost} samples lost, {repeated} repeated" if lost or repeated else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--backend", default="dali", choices=("torch", "dali"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        write_shards(Path(directory))
        loaders = [
            ViewLoader(
                directory,
                recipes.simsiam(),
                BATCH,
                options.backend,
                size=SIZE,
                rank=rank,
                world_size=RANKS,
            )
            for rank in range(RANKS)
        ]
        return watch(loaders, 60 * options.minutes)


def watch(loaders: list[ViewLoader], seconds: float) -> int:
    print(f"{loaders[0].backend}: {IMAGES} images in {SHARDS} shards, {RANKS} ranks")
    print(f"{'minutes':>8}{'epochs':>8}{'images':>12}{'resident MiB':>14}{'threads':>9}")
    started, epochs, printed, faults = time.monotonic(), 0, 0.0, []
    settled: tuple[float, int] | None = None  # memory and threads after a fifth of the time
    while (passed := time.monotonic() - started) < seconds:
        fault = epoch(loaders)
        epochs += 1
        if fault:
            faults.append(f"epoch {epochs}: {fault}")
        state = resident(), threads()
        if settled is None and passed > seconds / 5:
            settled = state
        if time.monotonic() - printed > 30:
            printed = time.monotonic()
            images = epochs * len(loaders[0]) * BATCH * RANKS
            print(f"{passed / 60:>8.1f}{epochs:>8}{images:>12}{state[0]:>14.0f}{state[1]:>9}")
    settled = settled or state
    if state[0] > 1.05 * settled[0]:
        faults.append(f"memory has grown from {settled[0]:.0f} to {state[0]:.0f} MiB")
    if state[1] > settled[1]:
        faults.append(f"threads have become {state[1]}, from {settled[1]}")
    print("\n".join(faults) or f"{epochs} epochs: every sample once, memory and threads as before")
    return bool(faults)


if __name__ == "__main__":
    raise SystemExit(main())
