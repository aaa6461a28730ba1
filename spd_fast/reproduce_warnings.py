"""Why numbers of ours are not comparable with the paper's."""

from spd_fast.choices import METHODS, ONE_CLASS
from spd_fast.datasets.mvtec import NAMES as MVTEC_NAMES
from spd_fast.datasets.visa import PAPER_NAMES
from spd_fast.evaluate import EvaluateConfig, settings_of
from spd_fast.padim import N_FEATURES
from spd_fast.paper import BACKBONES, PRINTED
from spd_fast.patchcore import PRESETS
from spd_fast.report import shown_setting

CATEGORIES = {"visa": set(PAPER_NAMES), "mvtec": set(MVTEC_NAMES)}  # that the means are over
# Settings that only some methods have; the others have all of `settings_of`.
OWN = {
    "n_features": ("padim",),
    "factor_dtype": ("padim",),
    "coreset_ratio": ("patchcore",),
    "n_neighbors": ("patchcore",),
    "bank_dtype": ("patchcore",),
    "compat": ("padim", "patchcore", "unet"),
}
# What has to be given, or is told of otherwise.
GIVEN = ("data", "weights", "backbone", "category", "seed", "skip_bad_images")


def unlike_the_paper(runs: dict) -> list[str]:
    """What in the runs is not as in the paper, or as docs/method.md has it where the paper is
    silent; each once.

    Args:
        runs: by `Job`, what `evaluate` returned.
    """
    found = []
    for job, run in runs.items():
        made = run["config"]
        place = f"{PRINTED[job.dataset]}, {PRINTED[job.protocol]}"
        if made["backbone"] != BACKBONES[job.weights]:
            found.append(
                f"{job.weights}: the backbone is {made['backbone']}, not {BACKBONES[job.weights]}."
            )
        if made["weights"] == "random":
            found.append(f"{job.weights}: the weights are random.")
        found += [f"{PRINTED[job.method]}, {text}." for text in _changed(job, made)]
        names = {category["name"] for category in run["categories"]}
        if names != CATEGORIES[job.dataset]:
            found.append(
                f"{place}: means are over {', '.join(sorted(names))}, not over the paper's "
                f"{len(CATEGORIES[job.dataset])} categories."
            )
        if made["split_drawn"]:
            found.append(f"{place}: the split was drawn, for want of the data set's split files.")
        skipped = set().union(*(category["skipped"] for category in run["categories"]))
        if skipped:
            found.append(f"{place}: {len(skipped)} unreadable images were left out.")
    return list(dict.fromkeys(found))


def _changed(job, made: dict) -> list[str]:
    kind = dict(protocol=job.protocol, method=job.method)
    usual = settings_of(EvaluateConfig(data="", out="", backbone=made["backbone"], **kind))
    usual["n_features"] = N_FEATURES.get(made["backbone"])
    usual["n_neighbors"] = PRESETS[usual["preset"]].n_neighbors
    several = METHODS[job.method] != ONE_CLASS  # protocols, each with a schedule of its own
    texts = []
    for name, value in usual.items():
        if name in GIVEN or job.method not in OWN.get(name, METHODS):
            continue
        if made[name] != value:
            what = name.replace("_", " ")
            where = f"{PRINTED[job.protocol]}, " if several else ""
            texts.append(f"{where}{what}: {shown_setting(made[name])}, not {shown_setting(value)}")
    return texts
