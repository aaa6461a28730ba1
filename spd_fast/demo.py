"""The main job on small real data: pre-train with and without SPD, fit PaDiM, compare."""

import shutil
import time
from pathlib import Path

from spd_fast.datasets import read_dataset
from spd_fast.datasets.photos import write_photographs
from spd_fast.datasets.synthetic import write_synthetic_visa
from spd_fast.evaluate import EvaluateConfig, evaluate
from spd_fast.files import make_output_dir
from spd_fast.pretrain import pretrain
from spd_fast.pretrain_config import PretrainConfig
from spd_fast.report import format_table, write_report

BACKBONE = "resnet18"


def demo(out: str | Path = "demo") -> Path:
    """Make data, pre-train ResNet-18 with SimSiam and SimSiam + SPD, evaluate both and no training.

    Takes some minutes on two CPU cores; an interrupted demo goes on where it was. A few dozen steps
    on a few hundred images show that the path works; they do not make a backbone one would use.

    Returns:
        The path of the report that compares the three.
    """
    out = make_output_dir(out)
    clock = _Clock()
    visa, images = make_data(out)
    clock.lap("data")
    weights = {"random weights": "random"}
    for name, spd in (("SimSiam", False), ("SimSiam + SPD", True)):
        run = out / "pretrain" / ("simsiam_spd" if spd else "simsiam")
        print(f"\n== pre-training {name}", flush=True)
        status = pretrain(pretrain_config(images, run, spd))
        if status:
            raise SystemExit(status)
        weights[name] = str(run / "last.pt")
        clock.lap(f"pre-training {name}")
    runs = []
    for name, checkpoint in weights.items():
        print(f"\n== evaluating {name}", flush=True)
        directory = out / "evaluate" / name.lower().replace(" + ", "_").replace(" ", "_")
        runs.append(
            evaluate(
                EvaluateConfig(
                    data=str(visa),
                    out=str(directory),
                    backbone=BACKBONE,
                    weights=checkpoint,
                    name=name,
                    workers=2,
                )
            )
        )
        clock.lap(f"evaluating {name}")
    report = out / "report.html"
    write_report(runs, report, "spd-fast demo: PaDiM on a synthetic VisA")
    print(f"\n{format_table(runs)}\n\n{clock}\nreport: {report}")
    return report


def pretrain_config(images: Path, run: Path, spd: bool) -> PretrainConfig:
    return PretrainConfig(
        data=[str(images)],
        out=str(run),
        spd=spd,
        backbone=BACKBONE,
        size=64,
        batch_size=32,
        epochs=3,
        lr=0.4,
        workers=2,
        resume="auto",
    )


def make_data(out: Path, n_photographs: int = 240, n_normal: int = 100) -> tuple[Path, Path]:
    """A synthetic VisA, and a folder of photographs and its normal training images."""
    visa, images = out / "data" / "visa", out / "data" / "images"
    unfinished = make_output_dir(out / "data") / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    if not visa.exists():
        print("== drawing a synthetic VisA", flush=True)
        write_synthetic_visa(unfinished, n_normal=n_normal)
        unfinished.rename(visa)
    if not images.exists():
        print("== cutting photographs", flush=True)
        write_photographs(unfinished, count=n_photographs)
        for category in read_dataset(visa, "1cls"):
            folder = unfinished / f"normal_{category.name}"  # photographs may share a name
            folder.mkdir()
            for sample in category.train:
                shutil.copy(sample.image, folder)
        unfinished.rename(images)
    return visa, images


class _Clock:
    """How long each part took."""

    def __init__(self):
        self.laps: list[tuple[str, float]] = []
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps.append((name, now - self.last))
        self.last = now

    def __str__(self) -> str:
        total = ("total", sum(seconds for _, seconds in self.laps))
        return "\n".join(f"{name:<28}{seconds:6.0f} s" for name, seconds in [*self.laps, total])
