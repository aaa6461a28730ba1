"""Compiles the Triton kernels for GPUs that are not here, and reads what they need.

Needs no GPU: Triton brings the assembler. `compiled_for` lets the launching code itself run on
`meta` tensors, so what is compiled is what a real launch would use.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


class Compiled:
    """One kernel for one architecture, and the launch that it was compiled for."""

    def __init__(self, kernel, grid: tuple[int, ...]):
        self.name = kernel.metadata.name
        self.arch = kernel.metadata.target.arch
        self.grid = grid
        self.threads = 32 * kernel.metadata.num_warps
        self.shared = kernel.metadata.shared  # bytes a block
        self.binary = kernel.asm["cubin"]

    @cached_property
    def resources(self) -> dict[str, int]:
        """`registers` a thread and bytes of its `stack`."""
        text = _run("cuobjdump", "--dump-resource-usage", binary=self.binary)
        (registers,), (stack,) = re.findall(r"REG:(\d+)", text), re.findall(r"STACK:(\d+)", text)
        return {"registers": int(registers), "stack": int(stack)}

    @cached_property
    def instructions(self) -> list[str]:
        """Of the machine code, with their addresses."""
        # Without its analysis of data flow, which is slow and not shown.
        text = _run("nvdisasm", "-c", "-ndf", binary=self.binary)
        return [
            line.strip() for line in text.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)
        ]

    def count(self, *names: str) -> int:
        """Instructions of these names, such as "HMMA"."""
        pattern = re.compile(rf"\b({'|'.join(names)})\b")
        return sum(bool(pattern.search(line)) for line in self.instructions)


@contextmanager
def compiled_for(arch: int, fresh: bool = False) -> Iterator[list[Compiled]]:
    """In this block launches of Triton kernels compile for sm_`arch` instead of running.

    Yields the list that they are put into, each kernel once. fresh: for the numbers of lines, as
    what is in Triton's cache may be of the same kernel at another place.
    """
    found: list[Compiled] = []
    seen = set()
    launch = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            found.append(Compiled(kernel, tuple(grid)))
        return kernel

    before, cached = driver._active, triton.knobs.compilation.always_compile
    triton.knobs.compilation.always_compile = fresh or cached
    driver.set_active(_NoGpu(arch, fresh))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = launch
        driver._active = before
        triton.knobs.compilation.always_compile = cached


class _NoGpu:
    """What compiling asks of a driver."""

    def __init__(self, arch: int, fresh: bool):
        self.target = GPUTarget("cuda", arch, 32)
        self.number = arch + 1000 * fresh  # under which compiled kernels are kept in this process

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def _run(tool: str, *options: str, binary: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(TOOLS / tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
