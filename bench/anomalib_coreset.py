"""The coreset inside anomalib's own fit of PatchCore, and ours from the same points.

    python bench/anomalib_coreset.py    # eight fits, each in a process of its own

ResNet-18, 26 images of 224 x 224 pixels: about 20,000 patches, of which 1 % are kept. Every fit is
anomalib's, by its Engine; only the selection is timed, after the random projection: theirs first,
then ours. anomalib makes an array of 20 MB for every pick. Whether that memory is kept, or given
back and faulted in anew, differs from process to process and makes most of the time: "faults"
counts pages. `patchcore.py` sets either state on purpose.
"""

import argparse
import logging
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

IMAGES = 26


def fit_once(batch: int, threads: int) -> None:
    """Let anomalib fit, and print one line."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from anomalib.data import Folder
    from anomalib.engine import Engine
    from anomalib.models import Patchcore
    from anomalib.models.components import KCenterGreedy

    from spd_fast.ops.kcenter import greedy_kcenter

    torch.set_num_threads(threads)
    theirs = KCenterGreedy.select_coreset_idxs

    def now() -> tuple[float, int]:
        return time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def timed(self, *arguments):
        project, starts = self.model.transform, []

        def projected(points):
            points = project(points)
            starts.append(now())
            return points

        self.model.transform = projected
        picks = theirs(self, *arguments)
        seconds, faults = (end - start for end, start in zip(now(), starts[0]))
        ours = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            own = greedy_kcenter(self.features, len(picks), int(picks[0]))
            ours = min(ours, time.perf_counter() - began)
        same = np.mean([a == b for a, b in zip(own.tolist(), map(int, picks))])
        assert same > 0.9, f"only {same:.0%} of the picks are the same"  # theirs are rounded
        points, d = self.features.shape
        print(
            f"RESULT {batch:>5}{points:>8}{d:>5}{len(picks):>6}{faults:>9}{seconds:>12.3f}"
            f"{ours:>9.4f}{seconds / ours:>7.0f}{same:>7.0%}"
        )
        return picks

    KCenterGreedy.select_coreset_idxs = timed
    with tempfile.TemporaryDirectory() as root:
        rng = np.random.default_rng(0)
        for kind, count in (("good", IMAGES), ("bad", 2)):
            (Path(root) / kind).mkdir()
            for i in range(count):
                pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                picture = Image.fromarray(pixels).resize((256, 256), Image.BICUBIC)
                picture.save(Path(root) / kind / f"{i}.png")
        data = Folder(
            name="noise",
            root=root,
            normal_dir="good",
            abnormal_dir="bad",
            train_batch_size=batch,
            eval_batch_size=2,
            num_workers=0,
            normal_split_ratio=0.01,
        )
        model = Patchcore("resnet18", ["layer2", "layer3"], False, coreset_sampling_ratio=0.01)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        Engine(max_epochs=1, default_root_dir=root, accelerator="cpu", **quiet).fit(model, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16, 32, 32, 32, 32])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return fit_once(options.child, options.threads)
    print("batch  points    d  kept   faults  anomalib s   ours s  ratio   same")
    for batch in options.batches:  # that features are made in: it changes what the heap looks like
        command = [sys.executable, __file__, "--child", str(batch)]
        command += ["--threads", str(options.threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        print(lines[0].removeprefix("RESULT ") if lines else done.stderr[-1000:], flush=True)


if __name__ == "__main__":
    main()
