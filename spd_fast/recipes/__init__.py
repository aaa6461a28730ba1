"""Which views are made of an image: the augmentation ranges of each pre-training recipe.

A recipe is a tuple of `ViewSpec`, one per view. The ranges are those of the recipes' own papers and
of SPD (section 3.2 and appendix C); `docs/method.md` lists every choice that the paper leaves open.
"""

from dataclasses import dataclass, replace

from spd_fast.choices import LOCAL_AUGS, SPD_SOURCES
from spd_fast.errors import InputError

FROM_IMAGE = -1  # ViewSpec.source: the view is cut from the decoded image


@dataclass(frozen=True)
class Jitter:
    """Colour jitter: factors are drawn from [1 - x, 1 + x], the shift from [-hue, hue] turns."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    probability: float = 0.8


@dataclass(frozen=True)
class ViewSpec:
    """The ranges from which one view's parameters are drawn."""

    source: int = FROM_IMAGE  # or the index of the view that this one is made from
    area: tuple[float, float] = (0.2, 1.0)  # of the crop, as a share of its source
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, log-uniform
    jitter: Jitter | None = None
    grayscale: float = 0.0  # probability
    blur: tuple[float, float] | None = None  # sigma, pixels
    blur_probability: float = 0.5
    flip: float = 0.5  # probability
    patch: str | None = None  # "smoothblend" or "cutpaste"


Recipe = tuple[ViewSpec, ...]

PATCH_AREA = (0.005, 0.01)  # share of the view (appendix C)
PATCH_ASPECT = (0.3, 3.0)
PATCH_JITTER = Jitter(0.1, 0.1, 0.1, 0.05, probability=1.0)
PATCH_ALPHA_SIGMA = 8.0  # pixels at a view of 224 (appendix C); scales with the view


_STRONG = ViewSpec(jitter=Jitter(0.4, 0.4, 0.4, 0.1), grayscale=0.2, blur=(0.1, 2.0))
_STRONG_SIMCLR = replace(_STRONG, area=(0.08, 1.0), jitter=Jitter(0.8, 0.8, 0.8, 0.2))
_SUPERVISED = ViewSpec(area=(0.08, 1.0))
_WEAK = ViewSpec(area=(0.9, 1.0), jitter=Jitter(0.1, 0.1, 0.1, 0.05), blur=(0.1, 0.3))


def simsiam(spd: bool = True, local_aug: str = "smoothblend", spd_source: str = "anchor") -> Recipe:
    """Two strong views (x, x_hat); with `spd` also x_pos and x_neg.

    Args:
        spd: add the SPD positive (a weak view) and negative (a weak view with a local patch).
        local_aug: the negative's patch, "smoothblend" (paper) or "cutpaste" (ablation, table 5).
        spd_source: the weak views come from the "anchor" view x, or from the decoded "image".

    Raises:
        InputError: an unknown `local_aug` or `spd_source`.
    """
    return (_STRONG, _STRONG, *_spd_views(spd, local_aug, spd_source))


def moco(spd: bool = True, local_aug: str = "smoothblend", spd_source: str = "anchor") -> Recipe:
    """As `simsiam`: MoCo v2 uses the same augmentations."""
    return simsiam(spd, local_aug, spd_source)


def simclr(spd: bool = True, local_aug: str = "smoothblend", spd_source: str = "anchor") -> Recipe:
    """As `simsiam` with SimCLR's larger crop range and stronger jitter."""
    return (_STRONG_SIMCLR, _STRONG_SIMCLR, *_spd_views(spd, local_aug, spd_source))


def supervised(
    spd: bool = True, local_aug: str = "smoothblend", spd_source: str = "anchor"
) -> Recipe:
    """One view x (random resized crop and flip); with `spd` also x_pos and x_neg."""
    return (_SUPERVISED, *_spd_views(spd, local_aug, spd_source))


def _spd_views(spd: bool, local_aug: str, spd_source: str) -> Recipe:
    if local_aug not in LOCAL_AUGS:
        raise InputError(f"local_aug is one of {LOCAL_AUGS}, got {local_aug!r}")
    if spd_source not in SPD_SOURCES:
        raise InputError(f"spd_source is one of {SPD_SOURCES}, got {spd_source!r}")
    weak = replace(_WEAK, source=0 if spd_source == "anchor" else FROM_IMAGE)
    return (weak, replace(weak, patch=local_aug)) if spd else ()
