import os
import subprocess
import sys
from pathlib import Path

import pytest

from spd_fast.ops.backends import native

BUILT = native.build_config() if native else {"instruction_sets": [], "instruction_set": None}
OPERATIONS = ("augment_views", "mahalanobis", "kcenter")
OTHERS = [isa for isa in BUILT["instruction_sets"] if isa != BUILT["instruction_set"]]


@pytest.mark.parametrize("isa", OTHERS)
def test_operations_are_right_on_every_instruction_set(isa):
    """All other tests run on the best that the processor has; here are the rest."""
    here = Path(__file__).parent
    files = [str(here / f"test_{operation}.py") for operation in OPERATIONS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", "not torchvision", *files],
        env=os.environ | {"SPD_FAST_ISA": isa},
        cwd=here.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
