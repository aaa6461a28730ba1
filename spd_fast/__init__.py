"""Fast SPot-the-Difference (SPD) pre-training and PaDiM anomaly detection.

Everything public is loaded on first use, so that ``import spd_fast`` costs nothing (not even
``import torch``) and works without a GPU, without DALI and without the compiled module.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {  # name -> module that defines it
    "augment_views": "spd_fast.ops.augment_views",
    "mahalanobis_map": "spd_fast.ops.mahalanobis",
    "greedy_kcenter": "spd_fast.ops.kcenter",
    "use_backend": "spd_fast.ops.backends",
    "sample_view_params": "spd_fast.views",
    "ViewLoader": "spd_fast.loader",
    "PaDiM": "spd_fast.padim",
    "PatchCore": "spd_fast.patchcore",
    "InputError": "spd_fast.errors",
}
_MODULES = (
    "recipes",
    "metrics",
    "losses",
    "models",
    "datasets",
    "reference",
    "reference_patchcore",
)

__all__ = [*_PUBLIC, *_MODULES]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return import_module(f"spd_fast.{name}")
    raise AttributeError(f"module 'spd_fast' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
