"""How often a kernel's instructions run: its machine code, times what is known of its source.

A model. Loops are found in the machine code; how often each turns, and how often a branch is
taken, is looked up by the text of the source line that it comes from.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ahead import TOOLS

ROOT = Path(__file__).parents[1]
UNROLLED = 1.6  # a copy of a loop this much longer than another does several turns at once
WHOLE = 0.7  # a copy with less than this of another's kinds of instructions leaves something out
ALIKE = 0.5  # share of the source that copies of a loop have in common
LOCATION = re.compile(r'\t//## File "(.*?)", line (\d+)( inlined)?')
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
# What executes it; all else is arithmetic of integers, comparisons and choices.
PIPES = {
    "memory": r"LD(?!C)|ST|ATOM|RED|SHFL|UBLKCP",
    "float": r"FADD|FMUL|FFMA|HFMA2|HADD2|HMUL2",
    "multiply": r"IMAD",  # of integers
    "special": r"MUFU|F2I|I2F(?!P)|F2F(?!P)|FRND|I2I",
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
        return found[1] if found and self.jumps else None

    @property
    def jumps(self) -> bool:
        """Some calls are jumps: functions have no label. BRA.DIV is never taken: it is for threads
        of a warp that have parted before an exchange."""
        call = self.name.startswith("CALL.REL.NOINC") and "`(.L" in self.operands
        return call or self.name.startswith("BRA") and self.name != "BRA.DIV"

    @property
    def ends(self) -> bool:
        """Whether what follows is not reached from here."""
        if self.jumps:
            return not self.guarded and not re.match(r"!?U?P\d", self.operands)
        return not self.guarded and re.match("EXIT|RET", self.name) is not None


def kernels_of(binary: Path) -> dict[str, list[Instruction]]:
    """By (mangled) name. The binary must have been compiled with line numbers."""
    # Without its analysis of data flow, which is slow and not shown.
    command = [str(TOOLS / "nvdisasm"), "-c", "-gi", "-ndf", str(binary)]
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
            lines.append((location[1], int(location[2])))
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
    for head, (body, _) in loops.items():
        turns = _turns(lines[head], times)

        # Compilers make several loops of one: unrolled, and without what a condition excludes.
        # Loops that have little of the source in common are one for each of its branches.
        def code(blocks_of_loop: set[int]) -> list[Instruction]:
            return [kernel[i] for block in blocks_of_loop for i in blocks[block]]

        own = {i.lines for i in code(body)}
        copies = [code(body)]
        for it, (other, _) in loops.items():
            if it != head and lines[it] == lines[head] and not body & other:
                its = {i.lines for i in code(other)}
                if len(own & its) > ALIKE * min(len(own), len(its)):
                    copies.append(code(other))
        kinds = [{i.name.split(".")[0] for i in copy} for copy in copies]
        most = max(map(len, kinds))
        whole = min(len(copy) for copy, its in zip(copies, kinds) if len(its) > WHOLE * most)
        length = sum(len(blocks[block]) for block in body)
        for block in body:
            weight[block] *= turns if whole / UNROLLED < length < UNROLLED * whole else 0
    total: Counter = Counter()
    for block, of_block in zip(blocks, weight):
        if any(kernel[i].name.startswith("CALL") and not kernel[i].jumps for i in block):
            continue  # divisions that do not fit into 32 bits, and the like
        # One for all of them: compilers attribute a few to lines that they were moved from.
        # The last instruction is attributed to the end of the source, which no condition holds for.
        own = [i for i in block if not kernel[i].name.startswith("EXIT")] or block
        shares = sorted((_share(kernel[i].lines, times) for i in own), key=np.mean)
        for i in block:
            total[kernel[i].pipe] += of_block * shares[len(shares) // 2]
    return total


def _blocks(kernel: list[Instruction]) -> tuple[list[range], list[list[int]]]:
    """Of instructions that run together; which blocks can follow each."""
    at = {label: i for i, instruction in enumerate(kernel) for label in instruction.labels}
    starts = {0}
    for i, instruction in enumerate(kernel):
        if instruction.target or instruction.name.startswith(("EXIT", "RET")):
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


def _turns(places: tuple[tuple[str, int], ...], times: Callable[[str], float | None]) -> float:
    """Of the loop that ends there: that of the line itself, or else the innermost around it."""
    for name, line in places:
        for header in _loops_around(name, line):
            if (known := times(header)) is None:
                raise LookupError(f"no number of turns for {header!r} at {places}")
            return known
    raise LookupError(f"a loop ends at {places}, where the source has none")


def _loops_around(name: str, line: int) -> Iterator[str]:
    """The loops of a line and around it, from the innermost; not those that are unrolled."""
    text = _text(name)
    indent = _indent(text[line - 1]) + 1
    for number in range(line - 1, -1, -1):
        header = text[number].strip()
        if header and not header.startswith("#") and _indent(text[number]) < indent:
            indent = _indent(text[number])
            if header.startswith(("for", "while")) and text[number - 1] != "#pragma unroll":
                yield header


def _share(places: tuple[tuple[str, int], ...], times: Callable[[str], float | None]) -> float:
    share = 1.0
    for place in places:
        for header, otherwise in _branches_around(*place):
            known = times(header)
            if known is not None:
                share = share * (1 - known if otherwise else known)
    return share


@cache
def _branches_around(name: str, line: int) -> list[tuple[str, bool]]:
    """The conditions under which a line is reached, and whether they must not hold."""
    text = _text(name)
    found = []
    here = text[line - 1].strip()
    if here.startswith("if") and here.endswith(";"):
        found.append((here, False))
    indent, chain = _indent(text[line - 1]), False
    for number in range(line - 2, -1, -1):
        header = text[number].strip()
        if not header or header.startswith("#") or _indent(text[number]) > indent:
            continue
        words = header.lstrip("} ")
        condition = words.startswith(("if", "else if", "elif"))
        if _indent(text[number]) < indent:
            indent, chain = _indent(text[number]), words.startswith(("else", "elif"))
            if condition:
                found.append((header, False))
        elif condition and (chain or _leaves(text[number:])):
            found.append((header, True))
            chain = chain and not words.startswith("if")
        if not indent:
            break
    return found


def _leaves(text: list[str]) -> bool:
    """Whether all that the condition at the start guards is to return."""
    statement = ""
    for line in text:
        statement += line
        if ";" in line or "{" in line:
            break
    return "return;" in statement


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


@cache
def _text(file: str) -> list[str]:
    """Nothing of files that are not our own."""
    if ROOT not in Path(file).parents:
        return [""] * 100_000
    return [*Path(file).read_text().splitlines(), ""]  # Triton ends functions one line too late
