"""What this installation has: versions, compiled code, backends and why one cannot be used."""

import platform
from importlib import metadata
from pathlib import Path

from spd_fast.choices import DALI_PACKAGES

PACKAGES = ("spd-fast", "torch", "torchvision", "numpy", "pillow", "scipy", "anomalib", "triton")
MEASURED = Path(__file__).with_name("measured.txt")  # written by bench/gpu.py


def versions() -> dict[str, str]:
    """Version of Python and of every package that is installed and matters to the numbers."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *DALI_PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe() -> str:
    """The text that `spd-fast info` prints."""
    import torch

    from spd_fast import dali_build
    from spd_fast.ops import (  # noqa: F401  they fill OPERATIONS
        augment_views,
        kcenter,
        mahalanobis,
        nearest,
    )
    from spd_fast.ops.backends import OPERATIONS, native

    lines = ["versions"]
    lines += [f"  {name:<22}{version}" for name, version in versions().items()]
    lines += [
        "machine",
        f"  {'processor':<22}{platform.machine()}, {torch.get_num_threads()} threads",
    ]
    if torch.cuda.is_available():
        lines += [f"  {'GPU':<22}{torch.cuda.get_device_name()}"]
    else:
        lines += [f"  {'GPU':<22}none that torch can use"]
    lines += ["compiled module spd_fast._C"]
    build = native.build_config() if native else {}
    lines += [f"  {name:<22}{_text(value)}" for name, value in build.items()] or ["  not there"]
    lines += ["operations, backends in order of preference"]
    for operation, backends in OPERATIONS.items():
        for i, backend in enumerate(backends):
            state = "; ".join(backend.missing()) or "available"
            name = operation if i == 0 else ""
            lines.append(f"  {name:<22}{backend.name:<11}{backend.device:<6}{state}")
    lines += ["operators for DALI"]
    lines += [f"  {name:<22}{state}" for name, state in dali_build.describe().items()]
    if MEASURED.exists():
        lines += [f"triton and cuda measured on {MEASURED.read_text().strip()}"]
    else:
        lines += ["triton and cuda: run on an H200 and measured there in parts: docs/gpu.md"]
    return "\n".join(lines)


def _text(value) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
