"""What SPD changes: SimSiam against SimSiam + SPD, in a small study that two cores can run.

    python bench/study_spd.py [--seeds 3] [--steps 72] [--out study]

ResNet-18 is pre-trained at 64 x 64 pixels on the demo's images with the demo's settings, which are
72 steps. For a seed all arms start from the same weights and see the same x and x_hat in the same
order; only the SPD loss differs, and the study stops if the first step's SimSiam loss does. An SPD
loss of 0, with Xent of log 2 = 0.693, is that of a network to which x_pos and x_neg are alike.

Local sensitivity is measured on crops of photographs that no arm has seen, with the views of the
SimSiam recipe and the same views for all. d is the mean cosine distance from the anchor x. "ratio"
is d(x_neg) / d(x_pos). "farther" is the share of images whose x_neg is farther from x than x_pos,
0.5 if the patch plays no part. The weak augmentation of x_pos is another than that of x_neg;
"patch" leaves it the same: the distance from x_pos to x_pos with the patch of x_neg, over d(x_pos).

PaDiM is fitted to and scored on the demo's synthetic VisA, means over its categories; the seed also
draws PaDiM's channels, the same for all arms.

Tables give mean +- standard deviation over seeds; below them the differences from SimSiam of the
same seed +- their standard error, with * where Student's t is beyond its 95 % bounds. Results are
kept in `--out`: a study that is started again goes on where it was.
"""

import argparse
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor, nn

from spd_fast import augment_views, recipes, sample_view_params
from spd_fast.choices import LOCAL_AUGS
from spd_fast.datasets.photos import load_photograph, random_crop
from spd_fast.demo import BACKBONE, make_data, pretrain_config
from spd_fast.evaluate import EvaluateConfig, evaluate
from spd_fast.files import make_output_dir, read_json, write_json
from spd_fast.info import versions
from spd_fast.losses import cosine
from spd_fast.methods import SimSiam
from spd_fast.models import load_backbone, read_checkpoint
from spd_fast.pretrain import pretrain
from spd_fast.views import COLUMNS

RANDOM, BASE = "random weights", "SimSiam"
ARMS = {
    BASE: {"spd": False},
    "+ SPD": {"spd": True},
    "+ SPD, CutPaste": {"spd": True, "local_aug": "cutpaste"},
    "+ SPD, Xent": {"spd": True, "spd_loss": "xent"},
}
HELD_OUT = ("camera.png", "cell.png", "clock_motion.png", "moon.png", "motorcycle_left.png")
HEADINGS = {"au_roc": "AU-ROC", "au_pr": "AU-PR"}
METRICS = [(level, metric) for level in ("image", "pixel") for metric in HEADINGS]
X, X_POS, X_NEG, X_PATCH = 0, 2, 3, 4  # places of the views
OF_PATCH = ("patch", "target", "alpha")  # how the parameters of a patch begin
IMAGE_SIZE, DIM = 64, 2048  # pixels of a view; width of the projections
LAST = 10  # steps at the end of training that its numbers are means of


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    steps: int = 72
    seeds: int = 3
    photographs: int = 240
    normal: int = 100  # images per category of the synthetic VisA
    held_out: int = 120  # crops of each held-out photograph
    categories: tuple[str, ...] = ()  # all


QUICK = Size(2, 2, 60, 20, 10, ("biscuit", "coins"))
Row = dict[str, float]
Results = dict[str, list[Row]]  # arm -> a row for each seed


# ---------------------------------------------------------------------------------- training


def train(arm: str, seed: int, images: Path, out: Path, steps: int) -> Path:
    """The checkpoint of a run, which is trained unless it is there."""
    config = replace(
        pretrain_config(images, out, spd=False),
        seed=seed,
        size=IMAGE_SIZE,
        epochs=steps,  # more than enough; `max_steps` ends the run
        max_steps=steps,
        dim=DIM,
        **ARMS[arm],
    )
    status = pretrain(config)
    if status:
        raise SystemExit(status)
    return out / "last.pt"


def training_row(run: Path) -> Row:
    """What the run's log says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = [name for name in ("loss_ssl", "loss_spd", "z_std") if name in lines[0]]
    row = {name: float(np.mean([line[name] for line in lines[-LAST:]])) for name in names}
    row["spread"] = row["z_std"] * DIM**0.5  # 1 over the whole sphere, 0 if z has collapsed
    return row | {"first_loss_ssl": lines[0]["loss_ssl"]}


# ------------------------------------------------------------------------- local sensitivity


def held_out_views(count: int) -> dict[str, Tensor]:
    """For each local augmentation (5, N, 3, S, S): the recipe's four views, and x_pos with the
    patch of x_neg."""
    photos = [load_photograph(name) for name in HELD_OUT]
    crops = [
        np.asarray(random_crop(photo, np.random.default_rng([k, number]), 224))
        for k, photo in enumerate(photos)
        for number in range(count)
    ]
    sizes = [crop.shape[:2] for crop in crops]
    of_patch = [i for i, name in enumerate(COLUMNS) if name.startswith(OF_PATCH)]
    views = {}
    for local_aug in LOCAL_AUGS:
        recipe = recipes.simsiam(spd=True, local_aug=local_aug)
        params = sample_view_params(recipe, sizes, range(len(crops)), 0, seed=0, size=IMAGE_SIZE)
        patched = params[:, X_POS].clone()
        patched[:, of_patch] = params[:, X_NEG][:, of_patch]
        params = torch.cat([params, patched[:, None]], 1)
        views[local_aug] = augment_views(crops, params, IMAGE_SIZE, channels_last=True)
    return views


def load_network(checkpoint: Path | None, seed: int) -> tuple[nn.Module, nn.Module | None]:
    """Backbone, whose features are pooled, and projector; of random weights the first alone."""
    if checkpoint is None:
        backbone = load_backbone(BACKBONE, "random", seed)
        backbone.fc = nn.Identity()
        return backbone.eval(), None
    method = SimSiam(BACKBONE, DIM)
    state = read_checkpoint(checkpoint)["model"]
    method.load_state_dict({k: v for k, v in state.items() if "spd_classifier" not in k})
    method.eval()
    return method.backbone, method.projector


@torch.inference_mode()
def sensitivity_row(checkpoint: Path | None, seed: int, views: dict[str, Tensor]) -> Row:
    backbone, projector = load_network(checkpoint, seed)
    row = {}
    for local_aug, made in views.items():
        features = [torch.cat([backbone(b) for b in made[i].split(64)]) for i in range(len(made))]
        row |= distances(features, f"features {local_aug}")
        if projector:
            row |= distances([projector(f) for f in features], f"projections {local_aug}")
    return row


def distances(vectors: list[Tensor], prefix: str) -> Row:
    def d(a: int, b: int) -> Tensor:
        return 1 - cosine(vectors[a].double(), vectors[b].double())

    d_pos, d_neg, patch = d(X, X_POS), d(X, X_NEG), d(X_POS, X_PATCH)
    found = {
        "d_pos": d_pos.mean(),
        "d_neg": d_neg.mean(),
        "difference": (d_neg - d_pos).mean(),
        "ratio": d_neg.mean() / d_pos.mean(),
        "farther": (d_neg > d_pos).double().mean(),
        "patch": patch.mean() / d_pos.mean(),
    }
    return {f"{prefix} {name}": float(value) for name, value in found.items()}


# ------------------------------------------------------------------------------------- PaDiM


def padim_row(weights: str, seed: int, visa: Path, out: Path, categories: tuple) -> Row:
    run = evaluate(
        EvaluateConfig(
            data=str(visa),
            out=str(out),
            backbone=BACKBONE,
            weights=weights,
            category=categories,
            workers=2,
            seed=seed,
        )
    )
    return {
        f"{level} {metric}": 100 * float(np.mean([c[level][metric] for c in run["categories"]]))
        for level, metric in METRICS
    }


# ------------------------------------------------------------------------------------ tables


def print_table(title: str, results: Results, columns: list[tuple[str, str, int]]) -> None:
    """Columns are a heading, the name in the rows, and decimals."""
    arms = [arm for arm in results if columns[0][1] in results[arm][0]]  # random has less
    print(f"\n{title}")
    print_row("", [heading + " " for heading, _, _ in columns])
    for arm in arms:
        print_row(arm, [spread(results[arm], *column[1:]) for column in columns])
    print("minus SimSiam")
    for arm in arms:
        if arm != BASE:
            cells = [difference(results[arm], results[BASE], *column[1:]) for column in columns]
            print_row(arm, cells)


def print_row(arm: str, cells: list[str]) -> None:
    cells = ["- " if "nan" in cell else cell for cell in cells]
    print((f"{arm:<16}" + "".join(f"{cell:>19}" for cell in cells)).rstrip())


def spread(rows: list[Row], name: str, decimals: int) -> str:
    values = [row.get(name, np.nan) for row in rows]
    return f"{np.mean(values):.{decimals}f} +- {np.std(values, ddof=1):.{decimals}f} "


def difference(rows: list[Row], base: list[Row], name: str, decimals: int) -> str:
    values = [row.get(name, np.nan) - other.get(name, np.nan) for row, other in zip(rows, base)]
    mean, error = np.mean(values), np.std(values, ddof=1) / np.sqrt(len(values))
    star = "*" if abs(mean) > student.ppf(0.975, len(values) - 1) * error else " "
    return f"{mean:+.{decimals}f} +- {error:.{decimals}f}{star}"


def print_tables(results: Results) -> None:
    columns = [("SimSiam loss", "loss_ssl", 4), ("SPD loss", "loss_spd", 4)]
    columns += [("spread of z", "spread", 3)]
    print_table(f"training, mean of the last {LAST} steps", results, columns)
    for space in ("features", "projections"):
        for local_aug in LOCAL_AUGS:
            key = f"{space} {local_aug} "
            columns = [("d(x_pos)", key + "d_pos", 4), ("d(x_neg)", key + "d_neg", 4)]
            columns += [(name, key + name, 3) for name in ("ratio", "farther", "patch")]
            print_table(f"local sensitivity of {space} to {local_aug}", results, columns)
    columns = [(f"{level} {HEADINGS[metric]}", f"{level} {metric}", 1) for level, metric in METRICS]
    print_table("PaDiM on the synthetic VisA, per cent", results, columns)


# -------------------------------------------------------------------------------------- study


def study(out: Path, size: Size) -> Results:
    visa, images = make_data(out, size.photographs, size.normal)
    views = held_out_views(size.held_out)
    results: Results = {arm: [] for arm in (RANDOM, *ARMS)}
    for seed in range(size.seeds):
        for arm, rows in results.items():
            print(f"\n== {arm}, seed {seed}", flush=True)
            name = "".join(c if c.isalnum() else "_" for c in arm.lower())
            run = make_output_dir(out / f"{size.steps}_steps" / f"{name}_{seed}")
            if not (run / "row.json").exists():
                write_json(run / "row.json", measured(arm, seed, run, visa, images, views, size))
            rows.append(read_json(run / "row.json"))
        if len({results[arm][seed]["first_loss_ssl"] for arm in ARMS}) > 1:
            raise SystemExit(f"the arms of seed {seed} do not start alike")
    return results


def measured(
    arm: str, seed: int, run: Path, visa: Path, images: Path, views: dict[str, Tensor], size: Size
) -> Row:
    checkpoint, row = None, {}
    if arm != RANDOM:
        checkpoint = train(arm, seed, images, run / "pretrain", size.steps)
        row = training_row(run / "pretrain")
    row |= sensitivity_row(checkpoint, seed, views)
    weights = str(checkpoint or "random")
    return row | padim_row(weights, seed, visa, run / "padim", size.categories)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="study", help="output directory")
    parser.add_argument("--steps", type=int, default=Size.steps)
    parser.add_argument("--seeds", type=int, default=Size.seeds, help="at least 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it runs")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: the spread is over them")
    torch.set_num_threads(options.threads)
    size = QUICK if options.quick else Size(options.steps, options.seeds)
    out = make_output_dir(Path(options.out) / "quick" if options.quick else options.out)
    with redirect_stdout(sys.stderr):
        results = study(out, size)
    write_json(out / "study.json", {"size": asdict(size), "versions": versions(), "rows": results})
    print(f"{size.seeds} seeds, {size.steps} steps, {size.held_out * len(HELD_OUT)} held-out crops")
    print_tables(results)


if __name__ == "__main__":
    main()
