"""Registers, stack and shared memory of the GPU kernels, compiled for GPUs that are not here."""

import multiprocessing
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from shutil import which

import pytest
import yaml

from spd_fast.ops.backends import interpreted, native

pytest.importorskip("triton")
if interpreted():
    pytest.skip("Triton cannot compile where it interprets", allow_module_level=True)

import ahead  # noqa: E402
import gpu_kernels  # noqa: E402
from gpu_kernels import Usage  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

ROOT = Path(__file__).parents[1]
BUDGET = yaml.safe_load((ROOT / "bench/gpu_budget.yaml").read_text())
KERNELS = {"center", "distances", "resize", "resize_view", "finish", "paste"}
HAS_CUDA = hasattr(native, "cuda_mahalanobis_map")


def over_budget(usage: Usage) -> list[str]:
    """What is too much."""
    for entry in BUDGET:
        fits = re.fullmatch(entry["kernel"], usage.kernel)
        if fits and usage.arch in entry.get("only", ahead.ARCHITECTURES):
            break
    else:
        return [f"{usage.kernel} is in no entry of the budget"]
    limits = {name: entry.get(name, 0) for name in ("registers", "stack", "shared")}
    return [
        f"{usage.kernel} on sm_{usage.arch}: {name} {getattr(usage, name)}, at most {most}"
        for name, most in limits.items()
        if getattr(usage, name) > most
    ]


@pytest.fixture(scope="module")
def used_by_triton():
    """Of every architecture; compiling takes one processor a while."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found = pool.map(gpu_kernels.triton_usage, ahead.ARCHITECTURES)
        return dict(zip(ahead.ARCHITECTURES, found))


@pytest.mark.parametrize("arch", ahead.ARCHITECTURES)
def test_triton_kernels(arch, used_by_triton):
    used = used_by_triton[arch]
    assert {u.kernel.split(",")[0] for u in used} == KERNELS
    assert [text for u in used for text in over_budget(u)] == []


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_distances_in_float16_alone_are_multiplied_on_tensor_cores(arch):
    """They would round float32 to TF32."""
    with ahead.compiled_for(arch) as found:
        for variant, launch in gpu_kernels.triton_launches().items():
            if "views" in variant:
                continue
            before = len(found)
            launch()
            for kernel in found[before:]:
                on_tensor_cores = kernel.count("HMMA", "HGMMA", r"UTC\w*MMA") > 0
                wanted = kernel.name == "distances" and variant.startswith("float16")
                assert on_tensor_cores == wanted, (kernel.name, variant)


@pytest.mark.skipif(not HAS_CUDA, reason="built without CUDA")
def test_cuda_kernels():
    used = list(gpu_kernels.cuda_usage())
    assert {u.arch for u in used} == set(ahead.ARCHITECTURES)
    # Distances by three factors and 1, 2 and 4 images; views by precision, or by source and how it
    # is read, or by output, its order and what is kept before (float32 is never packed).
    assert len({u.kernel for u in used}) == 9 + 2 + 6 + 14 + 4
    assert [text for u in used for text in over_budget(u)] == []


def test_every_number_has_a_reason():
    for entry in BUDGET:
        assert len(entry["why"].split()) > 10, entry["kernel"]
        assert set(entry) <= {"kernel", "only", "registers", "stack", "shared", "why"}


def test_too_much_is_found():
    entry = "mahalanobis_kernel<float, 1>"
    assert over_budget(Usage(entry, 90, 96, 0, 1120)) == []
    assert "registers 97, at most 96" in over_budget(Usage(entry, 90, 97, 0, 0))[0]
    assert "stack 8, at most 0" in over_budget(Usage(entry, 90, 96, 8, 0))[0]
    assert "shared 9999" in over_budget(Usage(entry, 90, 96, 0, 9999))[0]
    assert "no entry" in over_budget(Usage("another", 90, 1, 0, 0))[0]


def test_spilled_registers_of_triton_are_found(monkeypatch):
    launch = JITFunction.run

    def with_few_registers(self, *arguments, **options):
        return launch(self, *arguments, maxnreg=24, **options)

    monkeypatch.setattr(JITFunction, "run", with_few_registers)
    with ahead.compiled_for(90) as found:
        gpu_kernels.launch_distances("float32", 32, False)
    assert [kernel.resources["stack"] > 0 for kernel in found] == [True, True]
    assert [kernel.count("STL") > 0 for kernel in found] == [True, True]


@pytest.mark.skipif(which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(
    "old, new, found",
    [
        ("__launch_bounds__(threads, 5)", "__launch_bounds__(threads, 16)", "stack"),  # spills
        ("return reduce_scatter<unit, half / 2>(values, lane);",
         "int n = half / 2; while (n) n /= 2 + (values[n] > 1e30f); return values[lane % N];",
         "stack"),  # an array with an index that is not known: it is in memory
        ("int64_t place[most_layers]", "int64_t place[130]", "shared"),
    ],
)  # fmt: skip
def test_a_fault_of_the_source_is_found(old, new, found, tmp_path):
    source = (ROOT / "csrc/mahalanobis.cu").read_text()
    assert old in source
    (tmp_path / "mahalanobis.cu").write_text(source.replace(old, new))
    command = ["nvcc", "-std=c++17", "-O3", "-cubin", "-arch=sm_90", f"-I{ROOT / 'csrc'}"]
    command += ["-o", str(tmp_path / "kernels.cubin"), str(tmp_path / "mahalanobis.cu")]
    subprocess.run(command, check=True, capture_output=True)
    used = list(gpu_kernels.cuda_usage(tmp_path / "kernels.cubin", arch=90))
    assert len(used) == 9
    assert any(f": {found} " in text for u in used for text in over_budget(u))
