"""How often a kernel's instructions run: its machine code, times what is known of its source.

A model. Loops are found in the machine code; how often each turns, and how often a branch is
taken, is looked up by the text of the source line that it comes from.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ahead import TOOLS

ROOT = Path(__file__).parents[1]
UNROLLED = 1.6  # a copy of a loop this much longer than another does several turns at once
LOCATION = re.compile(r'\t//## File "(.*?)", line (\d+)( inlined)?')
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
# What executes it; all else is arithmetic of integers, comparisons and choices.
PIPES = {
    "memory": r"LD|ST|ATOM|RED|SHFL|UBLKCP",
    "float": r"FADD|FMUL|FFMA|IMAD|HFMA2|HADD2|HMUL2",
    "special": r"MUFU|F2I|I2F|F2F|FRND|I2I",
    "tensor": r"HMMA|IMMA|HGMMA|UTC\w*MMA|WARPGROUP",
    "control": r"BRA|EXIT|RET|NOP|BSSY|BSYNC|BAR|CALL|BREAK|WARPSYNC|DEPBAR|YIELD",
}


class Instruction(NamedTuple):
    name: str
    operands: str
    guarded: bool  # runs where a predicate holds
    labels: tuple[str, ...]
    lines: tuple[tuple[str, int], ...]  # file and line, then those that it was inlined at

    @property
    def pipe(self) -> str:
        return next((pipe for pipe, names in PIPES.items() if re.match(names, self.name)), "other")

    @property
    def target(self) -> str | None:
        found = re.search(r"`\((\.L\w+)\)", self.operands)
        return found[1] if found and self.name.startswith("BRA") else None

    @property
    def ends(self) -> bool:
        """Whether what follows is not reached from here."""
        if self.name.startswith("BRA"):
            return not self.guarded and not re.match(r"!?U?P\d", self.operands)
        return not self.guarded and re.match("EXIT|RET", self.name) is not None


def kernels_of(binary: Path) -> dict[str, list[Instruction]]:
    """By (mangled) name. The binary must have been compiled with line numbers."""
    command = [str(TOOLS / "nvdisasm"), "-c", "-gi", str(binary)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[Instruction]] = {}
    labels: list[str] = []
    lines: list[tuple[str, int]] = []
    inlined = False  # whether the next location is that of a call of the last
    for line in text.splitlines():
        if line.startswith(".text."):
            kernel = found.setdefault(line[len(".text.") : -1], [])
            labels, lines, inlined = [], [], False
        elif line.startswith(".L"):
            labels.append(line.rstrip(":"))
        elif location := LOCATION.match(line):
            lines = lines if inlined else []
            lines.append((Path(location[1]).name, int(location[2])))
            inlined = location[3] is not None
        elif instruction := INSTRUCTION.match(line):
            guard, name, operands = instruction.groups()
            kernel.append(Instruction(name, operands, guard is not None, (*labels,), (*lines,)))
            labels = []
    return found


def executed(kernel: list[Instruction], times: Callable[[str], float | None]) -> Counter:
    """Instructions that a warp executes, by pipe.

    times: how often a loop turns, or the share of warps that enters a branch, by its source line,
    without what surrounds it; None: not known, which is an error of loops, and 1 for branches.
    """
    blocks, after = _blocks(kernel)
    loops, reached = _loops(after)
    weight = [float(block in reached) for block in range(len(blocks))]
    lines = {head: kernel[blocks[max(ends)].stop - 1].lines for head, (_, ends) in loops.items()}
    length = {
        head: sum(len(blocks[block]) for block in body) for head, (body, _) in loops.items()
    }
    for head, (body, _) in loops.items():
        turns = times(source(lines[head][0]))
        if turns is None:
            raise LookupError(f"no number of turns for {lines[head][0]}: {source(lines[head][0])}")
        copies = [length[other] for other in loops if lines[other] == lines[head]]
        for block in body:
            weight[block] *= turns if length[head] < UNROLLED * min(copies) else 0
    total: Counter = Counter()
    for block, of_block in zip(blocks, weight):
        if any(kernel[i].name.startswith("CALL") for i in block):
            continue  # divisions that do not fit into 32 bits, and the like
        for i in block:
            share = of_block
            for place in kernel[i].lines:
                share *= _share(place, times)
            total[kernel[i].pipe] += share
    return total


def _blocks(kernel: list[Instruction]) -> tuple[list[range], list[list[int]]]:
    """Of instructions that run together; which blocks can follow each."""
    at = {label: i for i, instruction in enumerate(kernel) for label in instruction.labels}
    starts = {0}
    for i, instruction in enumerate(kernel):
        if instruction.target or instruction.ends:
            starts |= {i + 1} | ({at[instruction.target]} if instruction.target else set())
    edges = sorted(start for start in starts if start < len(kernel)) + [len(kernel)]
    blocks = [range(*pair) for pair in zip(edges, edges[1:])]
    number = {block.start: i for i, block in enumerate(blocks)}
    after = []
    for i, block in enumerate(blocks):
        last = kernel[block.stop - 1]
        follows = [number[at[last.target]]] if last.target else []
        after.append(follows if last.ends or i + 1 == len(blocks) else [*follows, i + 1])
    return blocks, after


def _loops(after: list[list[int]]) -> tuple[dict[int, tuple[set[int], list[int]]], set[int]]:
    """By their first block: the blocks of a loop, and those of them that jump back; and all blocks
    that can be reached without a call."""
    reached, stack = {0}, [0]
    before: list[list[int]] = [[] for _ in after]
    while stack:
        block = stack.pop()
        for follower in after[block]:
            before[follower].append(block)
            if follower not in reached:
                reached.add(follower)
                stack.append(follower)
    # Which blocks are on all ways to a block.
    always = {block: set(reached) for block in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            now = {block} | set.intersection(*(always[other] for other in before[block]))
            changed |= now != always[block]
            always[block] = now
    loops: dict[int, tuple[set[int], list[int]]] = {}
    for block in sorted(reached):
        for head in set(after[block]) & always[block]:
            body, ends = loops.setdefault(head, ({head}, []))
            ends.append(block)
            stack = [block]
            while stack:
                inside = stack.pop()
                if inside not in body:
                    body.add(inside)
                    stack += before[inside]
    return loops, reached


def source(place: tuple[str, int]) -> str:
    name, line = place
    return _text(name)[line - 1].strip()


def _share(place: tuple[str, int], times: Callable[[str], float | None]) -> float:
    share = 1.0
    for header, otherwise in _branches_around(*place):
        known = times(header)
        if known is not None:
            share *= 1 - known if otherwise else known
    return share


@cache
def _branches_around(name: str, line: int) -> list[tuple[str, bool]]:
    """The conditions under which a line is reached, and whether they must not hold."""
    text = _text(name)
    found = []
    header = text[line - 1].strip()
    if header.startswith("if") and header.endswith(";"):
        found.append((header, False))
    indent = _indent(text[line - 1])
    for above in range(line - 2, -1, -1):
        header = text[above].strip()
        if not header or header.startswith("#") or _indent(text[above]) > indent:
            continue
        words = header.lstrip("} ")
        if _indent(text[above]) == indent:  # a neighbour: it may have left
            if words.startswith("if") and "return;" in header + text[above + 1]:
                found.append((header, True))
            continue
        indent = _indent(text[above])
        if words.startswith(("if", "elif", "else if")):
            found.append((header, False))
        elif words.startswith("else"):
            alike = (other for other in reversed(text[:above]) if _alike(other, text[above]))
            found.append((next(other.strip() for other in alike if other.strip()[:2] == "if"), True))
        if not indent:
            break
    return found


def _alike(line: str, other: str) -> bool:
    return bool(line.strip()) and _indent(line) == _indent(other)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


@cache
def _text(name: str) -> list[str]:
    for folder in ("csrc", "kernels"):
        if (ROOT / folder / name).exists():
            return (ROOT / folder / name).read_text().splitlines()
    return [""] * 100_000  # of the compiler's own files
