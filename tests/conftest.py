import os
from importlib.util import find_spec

# Several threads round sums in no fixed order, and those of two workers wait for each other.
# Inherited by processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
# Idle OpenMP threads spin for a while; on a busy machine that makes the tests ten times as slow.
# Read when torch loads the library.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Which loader a test meets must not depend on what has been built in this user's cache.
os.environ["SPD_FAST_LOADER"] = "torch"

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _keep_global_state():
    """No test may depend on another one's random numbers or choice of backend."""
    state = torch.get_rng_state()
    asked = os.environ.pop("SPD_FAST_BACKEND", None)
    yield
    torch.set_rng_state(state)
    if asked is not None:
        os.environ["SPD_FAST_BACKEND"] = asked


@pytest.fixture(scope="module")
def two_threads():
    """For operations that divide their work among threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A directory of small images to pre-train on; tests that change it copy it."""
    from pretrain_runs import write_images  # imports much that tests of kernels need not wait for

    return write_images(tmp_path_factory.mktemp("data"))


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs an NVIDIA GPU")
    config.addinivalue_line("markers", "triton: runs on a GPU, or with TRITON_INTERPRET=1 without")
    config.addinivalue_line("markers", "interpreted: needs TRITON_INTERPRET=1")


def pytest_collection_modifyitems(items):
    """Skip what cannot run here; without a GPU, `cuda` fails under SPD_FAST_REQUIRE_CUDA=1."""
    gpu = torch.cuda.is_available() or os.environ.get("SPD_FAST_REQUIRE_CUDA") == "1"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    reasons = {}
    if not gpu:
        reasons["cuda"] = "no NVIDIA GPU"
    if not interpreted:  # Triton cannot do both in one process
        reasons["interpreted"] = "a process of its own: see `make test`"
    if not gpu and not interpreted:
        reasons["triton"] = reasons["interpreted"]
    if find_spec("triton") is None and os.environ.get("SPD_FAST_REQUIRE_CUDA") != "1":
        reasons["triton"] = "triton is not installed"
    for item in items:
        if item.get_closest_marker("triton") and not item.path.name.startswith("test_triton_"):
            raise pytest.UsageError(f"{item.nodeid}: `make test` looks in tests/test_triton_*.py")
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
