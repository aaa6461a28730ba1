"""Pre-training that goes on, on the normal images of the product that is to be inspected.

What the SPD paper leaves for later (end of section 5.3): SPD trained on the downstream data of one
class.
"""

import math
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from spd_fast.checkpoints import find_checkpoint
from spd_fast.choices import ADAPT
from spd_fast.datasets import read_dataset
from spd_fast.distributed import process_group, rank
from spd_fast.errors import InputError
from spd_fast.files import refuse_inside
from spd_fast.models import pick_device
from spd_fast.pretrain import pretrain
from spd_fast.pretrain_config import PretrainConfig, read_recipe, resolved


def adapt(
    data: str | Path,
    out: str | Path,
    init: str | Path,
    category: Iterable[str] | None = None,
    resume: bool = False,
    **settings,
) -> int:
    """Pre-train a backbone further for each category, on its normal training images only.

    The images are those of the 1-class split, as `read_dataset` gives them and `evaluate` fits its
    detectors on; no test image is opened. Each category is a run of `pretrain` in out/<category>,
    which starts from `init` and not from the category before, and which
    `spd-fast pretrain --config out/<category>/config.yaml` repeats.

    Args:
        data: root of a data set that `read_dataset` reads.
        init: weights to start from, as `load_backbone` takes them. Of a checkpoint of `pretrain`
            only the backbone is taken: heads, optimizer and MoCo's queue start anew.
        category: names; default all, one after the other.
        resume: leave finished categories as they are, and go on with an interrupted one.
        settings: further ones of `PretrainConfig`. What is not given is as `choices.ADAPT` has it,
            else as the recipe.

    Returns:
        0, or what `pretrain` returned for a category that a signal has interrupted.

    Raises:
        InputError: as `read_dataset` and `pretrain`; `out` lies in the data set; before anything is
            trained: a category has fewer images than a batch, or is there already without `resume`.
    """
    refuse_inside(out, data)
    settings = with_defaults(settings)
    configs = []
    for found in read_dataset(data, "1cls", category):
        its = {"out": Path(out) / found.name, "category": found.name}
        config = resolved(PretrainConfig([data], init=init, resume=resume, **its, **settings))
        if len(found.train) < config.batch_size:
            raise InputError(
                f"category {found.name} has {len(found.train)} normal training images, fewer than "
                f"a batch of {config.batch_size}: give a smaller batch size"
            )
        if not resume:
            find_checkpoint(config)  # refuses a run that is there
        configs.append(config)
    with process_group(pick_device(settings.get("device", "auto"))):
        for number, config in enumerate(configs, 1):
            if not rank():
                tqdm.write(f"\n== {config.category} ({number} of {len(configs)})")
            status = pretrain(config)
            if status:
                return status
    return 0


def with_defaults(settings: dict) -> dict:
    """`settings` of a `PretrainConfig`, and `choices.ADAPT` where they say nothing."""
    recipe = read_recipe(settings.get("recipe", "simsiam"))
    ours = {name: value for name, value in ADAPT.items() if name in recipe} | settings
    share = max(ours["batch_size"], 1) / recipe["batch_size"]  # what is below 1 is refused later
    return {"lr": recipe["lr"] / math.sqrt(share)} | ours
