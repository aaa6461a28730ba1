"""The model of how long the GPU kernels take: what it counts, and what it says of them."""

from shutil import which

import pytest

from spd_fast.ops.backends import interpreted

pytest.importorskip("triton")
if interpreted():
    pytest.skip("Triton cannot compile where it interprets", allow_module_level=True)

import gpu_roofline  # noqa: E402
import sass  # noqa: E402

pytestmark = pytest.mark.skipif(which("nvcc") is None, reason="no nvcc")
ITEMSIZE = gpu_roofline.ITEMSIZE

COUNTED = """
__global__ void kernel(float* x, int n, int m, bool rare) {
    float v = x[threadIdx.x];
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
        v = v * v + 1;
#pragma unroll 1
        for (int j = 0; j < m; ++j) v = x[j] - v;
    }
    if (rare) {
#pragma unroll
        for (int k = 1; k <= 20; ++k) x[threadIdx.x + k * n] = v;
    }
    if (n < 0) return;
    x[threadIdx.x] = v;
}
"""
INNER = "for (int j = 0; j < m; ++j) v = x[j] - v;"


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Executes of the kernel above, with what is known of it."""
    (tmp_path / "counted.cu").write_text(COUNTED)
    monkeypatch.setattr(gpu_roofline, "ROOT", tmp_path)
    monkeypatch.setattr(sass, "ROOT", tmp_path)
    binary = gpu_roofline.compiled(tmp_path / "counted.cu", 90, tmp_path)
    (kernel,) = sass.kernels_of(binary).values()
    return lambda **turns: sass.executed(kernel, turns.get)


def times(outer, inner, rare, leave=0.0) -> dict:
    return {
        "for (int i = 0; i < n; ++i) {": outer,
        INNER: inner,
        "if (rare) {": rare,
        "if (n < 0) return;": leave,
    }


def test_loops_and_branches_are_counted(counted):
    assert counted(**times(1, 0, 0))["memory"] == pytest.approx(2)  # the first, the last
    assert counted(**times(1, 0, 1))["memory"] == pytest.approx(22)
    assert counted(**times(1, 0, 0.25))["memory"] == pytest.approx(7)
    assert counted(**times(1, 0, 0, leave=0.5))["memory"] == pytest.approx(1.5)
    assert counted(**times(3, 5, 0))["memory"] == pytest.approx(2 + 15)
    grown = [sum(counted(**times(n, 5, 0)).values()) for n in (10, 20, 30)]
    assert grown[2] - grown[1] == pytest.approx(grown[1] - grown[0])
    assert grown[1] - grown[0] > 10 * 5 * 3  # at least a load, a subtraction and a jump a turn


def test_a_loop_that_is_not_known_is_an_error(counted):
    turns = times(1, 1, 1)
    del turns[INNER]
    with pytest.raises(LookupError, match="no number of turns"):
        counted(**turns)


def test_turns_are_of_lines_that_there_are():
    """A branch that is not known counts as taken, and would go unseen."""
    folders = sass.ROOT / "csrc", sass.ROOT / "kernels"
    lines = {
        line.strip()
        for folder in folders
        for file in folder.glob("*.*")
        for line in file.read_text().splitlines()
    }
    for views in gpu_roofline.rounds(gpu_roofline.CUDA_TILE):
        known = {**views.in_cuda("finish"), **views.in_triton("finish")}
        assert not set(known) - lines


def test_products_are_counted():
    """On tensor cores as many as follow from the steps of the filters, where compilers make a
    choice by predicates of all that there can be. Of the blur some are attributed to the wrong
    branch, less than a hundredth of what the kernel executes."""
    launches = list(gpu_roofline.views_in_cuda("float16", 90))
    for depth, views in enumerate(gpu_roofline.rounds(gpu_roofline.CUDA_TILE)):
        tiles = views.across * views.inside
        down, across = views._steps("height"), views._steps("width")
        of_columns = 2 if depth else across  # steps of a crop of a view
        resize = tiles * (6 * down * of_columns + 6 * down + across) + down
        across = (8 + 2 * views.radius + 15) // 16
        blur = (views.radius > 0) * tiles * 3 * ((2 * across + 1) * 3 + 2 * across)
        for launch, wanted in zip(launches[2 * depth :], (resize, blur)):
            missed = wanted.mean() - launch.instructions["tensor"]
            assert abs(missed) <= 0.01 * sum(launch.instructions.values())


def jump(name: str, operands: str, guarded: bool = False) -> sass.Instruction:
    return sass.Instruction(name, operands, guarded, (), ())


def test_what_is_a_jump():
    assert jump("BRA", "`(.L_x_1)").target == ".L_x_1" and jump("BRA", "`(.L_x_1)").ends
    assert not jump("BRA", "`(.L_x_1)", guarded=True).ends
    assert not jump("BRA", "!P0, `(.L_x_1)").ends
    # Where a warp's threads have parted; a jump that is called a call; and a function.
    assert jump("BRA.DIV", "~URZ, `(.L_x_1)").target is None
    assert not jump("BRA.DIV", "~URZ, `(.L_x_1)").ends
    assert jump("CALL.REL.NOINC", "`(.L_x_1)").target == ".L_x_1"
    assert jump("CALL.REL.NOINC", "`(.L_x_1)").ends
    assert jump("CALL.REL.NOINC", "`($__internal_0_$__cuda_sm20_div)").target is None


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_views_move_at_most_two_and_a_half_times_the_least_bytes(backend, dtype):
    of = {"cuda": gpu_roofline.views_in_cuda, "triton": gpu_roofline.views_in_triton}[backend]
    launches = list(of(dtype, 89))
    assert len(launches) == 5
    least = gpu_roofline.least_bytes(ITEMSIZE[dtype])
    assert 1 < sum(launch.bytes for launch in launches) / least <= 2.5


def within(launches, device, least) -> float:
    total = sum(max(launch.microseconds(device).values()) for launch in launches)
    return total / (least / device.bandwidth / 1e3)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_the_model_says_of_views(dtype):
    """What docs/gpu.md says of two of the devices; on a B200 more."""
    devices, least = gpu_roofline.DEVICES, gpu_roofline.least_bytes(ITEMSIZE[dtype])
    for arch in (89, 90):
        cuda = within(gpu_roofline.views_in_cuda(dtype, arch), devices[arch], least)
        assert cuda <= 2.6
    assert cuda < within(gpu_roofline.views_in_triton(dtype, 90), devices[90], least)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_binds_the_distances_of_few_images(dtype):
    device = gpu_roofline.DEVICES[90]
    for batch in (1, 2, 4):
        (launch,) = gpu_roofline.padim_in_cuda(dtype, batch, 90)
        times = launch.microseconds(device)
        assert max(times, key=times.get) == "DRAM"
    least = gpu_roofline.padim_bytes(dtype, 8)
    assert within(gpu_roofline.padim_in_triton(dtype, 8, 90), device, least) < 1.5


def test_occupancy():
    launch = gpu_roofline.Launch("kernel", 1, {}, 128, 0, 256, 0)
    assert launch.occupancy(gpu_roofline.DEVICES[90]) == 0.25
    assert launch._replace(shared=100 << 10).occupancy(gpu_roofline.DEVICES[90]) == 0.25
    assert launch._replace(shared=150 << 10).occupancy(gpu_roofline.DEVICES[90]) == 0.125
