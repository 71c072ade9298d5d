"""What the CUDA row kernels cost in issue slots, counted in their machine code. No GPU is needed, only nvcc.

    python -m benchmarks.losses.issue_slots [--kinds jsd ...] [--out benchmarks/results/issue_slots.json]

Counted for sm_90, value and gradient of rows that a cluster holds on chip: what one thread issues on the way that
whole, aligned groups of columns take, over the pairs of logits that it works on. A slot of a warp serves 32 threads,
so slots a pair are instructions of a thread over its pairs. Legend: V vocabulary.

    copy      the loops with cp.async                  stats     pass 1, mean of its four stages
    sums      pass 2, where the gradient needs it      gradient  the last pass, with the value where there is no pass 2
    fixed     all the rest of what a thread of a block's first warp issues, however many columns the row has

A processor issues 4 slots of 32 lanes a cycle, and 16 special functions; at `ISSUED` of those rates, and at the copy
rate, whichever takes longest, stand the predicted milliseconds. None of it has been measured. Half precision is
bfloat16, in the kernel for value and gradient at once where a kind has one. `BARS` are the slots a pair that a test
holds these to, in half precision. Kernels with by-products and hard labels are not
counted: what they do stands behind branches that nothing in the code tells from others.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from math import ceil
from pathlib import Path

from building.kernels import NVCC_FLAGS, divergences
from building.toolchain import find_torch, nvcc

from benchmarks.records import RESULTS, ROOT, command, rounded, say

BARS = {"forward_kl": 45, "reverse_kl": 52, "jsd": 68}
KINDS = ("forward_kl", "reverse_kl", "jsd", "mixed_kl")
VOCABULARIES = (32000, 128256, 151936)
THREADS = 256  # kernels/cuda/launch.cuh: kChipThreads
SHARED_PER_PROCESSOR, RESERVED, SCRATCH = 228 << 10, 1 << 10, 528  # bytes; kernels/cuda/plan.cuh
ISSUED = 0.88
DEVICES = {
    "h100": (132, 1.83e9, 3.0e12),
    "h200": (132, 1.98e9, 4.3e12),
}  # processors, clock in Hz, copied bytes a second
SHAPES = {  # the first kernel of these template arguments that a kind has, columns of a group, bytes of a logit
    "half": (("DtypeE1ELS3_1ELi256E", "Li8ELi256ELb1ELb0E"), 8, 2),
    "float32": (("Li4ELi256ELb1ELb0E",), 4, 4),
}
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)(.*?);")
TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
OFF_THE_WAY = ("LDG.E.U16", "STG.E.U16")  # single columns: whole groups that lie aligned never come there
# Of a row in a cluster: copies, special functions, wide stores, and what threads and blocks tell each other.
WORK = ("LDGSTS", "MUFU", "STG.E.EF.128", "STG.E.EF.64", "SHFL", "UCGABAR", "ST.E")


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str | None  # the predicate that it is executed under
    opcode: str
    target: int | None  # of a branch

    @property
    def works(self) -> bool:
        return self.opcode.startswith(WORK)


@dataclass(frozen=True)
class Way:
    """Instructions on a way through a stretch of code, as many of them that do the work as there can be."""

    work: int = 0
    count: int = 0
    special: int = 0  # of the special-function units

    def then(self, block: list[Instruction]) -> Way:
        special = sum(instruction.opcode.startswith("MUFU") for instruction in block)
        return Way(self.work + sum(x.works for x in block), self.count + len(block), self.special + special)

    @property
    def rank(self) -> tuple[int, int]:
        return self.work, -self.count


@dataclass(frozen=True)
class Loop:
    start: int
    end: int  # the address of its branch back
    role: str
    way: Way


def parse(sass: str) -> dict[str, list[Instruction]]:
    """cuobjdump's text -> the instructions of each function by its mangled name, padding left out."""
    functions: dict[str, list[Instruction]] = {}
    for line in sass.splitlines():
        if "Function : " in line:
            functions[line.split("Function : ")[1].strip()] = current = []
            continue
        found = LINE.match(line)
        if not found or found[3] == "NOP":
            continue
        # the slow half of a shuffle, for a warp whose threads have parted, is never taken: BRA.DIV has no target here
        target = TARGET.search(found[4]) if found[3].startswith("BRA") and found[3] != "BRA.DIV" else None
        current.append(Instruction(int(found[1], 16), found[2], found[3], int(target[1], 16) if target else None))
    return functions


def best_way(code: list[Instruction], around: Iterable[Loop] = ()) -> Way:
    """The way from the first instruction of a stretch to its last that does most work, by the fewest instructions.

    Branches back are not taken, so that each loop in it is gone through once, and those of `around` never.
    """
    starts = {code[0].address} | {x.target for x in code if x.target is not None}
    starts |= {after.address for x, after in pairwise(code) if x.opcode.startswith(("BRA", "EXIT"))}
    reached: dict[int, Way] = {code[0].address: Way()}
    best = Way(-1)
    block: list[Instruction] = []
    for index, instruction in enumerate(code):
        block.append(instruction)
        follower = code[index + 1].address if index + 1 < len(code) else None
        if follower is not None and follower not in starts:
            continue
        here = reached.get(block[0].address)
        off = any(x.opcode.startswith(OFF_THE_WAY) for x in block)
        off = off or any(loop.start <= block[0].address <= loop.end for loop in around)
        leaves = instruction.opcode.startswith("EXIT") and instruction.guard is None
        if here is not None and not off:
            here = here.then(block)
            if follower is None or leaves:
                best = max(best, here, key=lambda way: way.rank)
            away = leaves or (instruction.target is not None and instruction.guard is None)
            for address in (instruction.target, None if away else follower):
                if address is not None and address > block[0].address:
                    reached[address] = max(reached.get(address, here), here, key=lambda way: way.rank)
        block = []
    return best


def find_loops(code: list[Instruction]) -> list[Loop]:
    """The loops over a thread's columns, in the order of the code, by what they do."""
    first_shuffle = min((x.address for x in code if x.opcode.startswith("SHFL")), default=code[-1].address)
    loops = []
    for branch in code:
        if branch.target is None or branch.target > branch.address or branch.guard is None:
            continue
        body = [x for x in code if branch.target <= x.address <= branch.address]
        way = best_way(body)
        if way.work < 0:
            continue  # the groups at the ends of a row
        opcodes = [x.opcode for x in body]
        if any(opcode.startswith("LDGSTS") for opcode in opcodes):
            role = "copy"
        elif not any(opcode.startswith("MUFU") for opcode in opcodes):
            continue  # padding, rows that are not alive
        elif any(opcode.startswith("STG.E.EF") for opcode in opcodes):
            role = "gradient"
        else:
            role = "stats" if branch.address < first_shuffle else "sums"
        loops.append(Loop(branch.target, branch.address, role, way))
    return loops


def ranks_of(vocabulary: int, group: int, logit_bytes: int) -> int:
    """Blocks that share a row, as kernels/cuda/plan.cuh finds them on an H100 or H200."""
    groups = ceil((vocabulary + 2 * (group - 1)) / group)
    for ranks in (1, 2, 4, 8):
        if 3 * (2 * ceil(groups / ranks) * group * logit_bytes + SCRATCH + RESERVED) <= SHARED_PER_PROCESSOR:
            return ranks
    return 16


def call_loops(loops: list[Loop]) -> list[Loop]:
    """Those that a call for value and gradient goes through: where one pass finds both, it alone comes after pass 1."""
    gradients = [loop for loop in loops if loop.role == "gradient"]
    if len(gradients) == 1:
        return loops
    fused = max(gradients, key=lambda loop: loop.way.count)
    return [loop for loop in loops if loop.role in ("copy", "stats") or loop is fused]


def slots(code: list[Instruction], group: int, logit_bytes: int, vocabulary: int) -> dict[str, float]:
    """Issue slots a pair by part, and operations of the special-function units a pair, for a row of that length."""
    code = code[
        : 1 + max(i for i, x in enumerate(code) if x.opcode == "EXIT")
    ]  # functions that are called come after it
    loops = find_loops(code)
    used = call_loops(loops)
    pairs = vocabulary / (THREADS * ranks_of(vocabulary, group, logit_bytes))  # of a thread
    parts: dict[str, float] = {}
    special = 0.0
    for role in ("copy", "stats", "sums", "gradient"):
        ways = [loop.way for loop in used if loop.role == role]
        if ways:
            parts[role] = sum(way.count for way in ways) / len(ways) / group
            special += sum(way.special for way in ways) / len(ways) / group
    way = best_way(code, around=[loop for loop in loops if loop not in used])
    fixed = way.count - sum(loop.way.count for loop in used)
    parts["fixed"] = fixed / pairs
    return {**parts, "slots": sum(parts.values()), "special": special}


def predicted_ms(parts: dict[str, float], bytes_a_pair: int, pairs: int, device: str) -> tuple[float, float]:
    """Milliseconds, and the share of the copy rate that this is."""
    processors, clock, copied = DEVICES[device]
    at_copy_rate = pairs * bytes_a_pair / copied
    cycles = max(parts["slots"] / (4 * 32), parts["special"] / 16)  # of a processor, a pair
    seconds = max(at_copy_rate, pairs * cycles / (processors * clock * ISSUED))
    return 1e3 * seconds, at_copy_rate / seconds


def compile_kind(kind: str, folder: Path) -> tuple[str, str]:
    """The machine code of a divergence's kernels as text, and what ptxas said of registers and spills."""
    compiler, torch, struct = nvcc(), find_torch(), dict(divergences())[kind]
    if compiler is None or torch is None:
        raise SystemExit("issue_slots needs nvcc (set NVCC or CUDA_HOME) and torch")
    out = folder / f"{kind}.cubin"
    options = [*NVCC_FLAGS, "-gencode=arch=compute_90,code=sm_90", "-isystem", str(torch.include), "-Xptxas", "-v"]
    options += [f"-DGKD_NAME={kind}", f"-DGKD_STRUCT={struct}", "-cubin", "-o", str(out)]
    source = str(ROOT / "kernels" / "cuda" / "rows_kind.cu")
    said = subprocess.run([compiler, *options, source], capture_output=True, text=True, check=True).stderr
    dumped = subprocess.run([disassembler(), "--dump-sass", str(out)], capture_output=True, text=True, check=True)
    return dumped.stdout, said


def disassembler() -> str:
    """cuobjdump: of the toolkit, or of the triton wheel."""
    spec = find_spec("triton")
    beside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec and spec.origin else None
    found = os.environ.get("CUOBJDUMP") or shutil.which("cuobjdump") or (beside and shutil.which(str(beside)))
    if not found:
        raise SystemExit("issue_slots needs cuobjdump: of a CUDA toolkit, of the triton wheel, or set CUOBJDUMP")
    return str(found)


def registers_of(said: str, shape: str) -> dict[str, int]:
    """Registers and bytes of spills of the kernel with those template arguments, from ptxas -v."""
    part = next(part for part in said.split("Compiling entry function") if shape in part.split("\n")[0])
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
    used = re.search(r"Used (\d+) registers", part)
    assert spills and used, part
    return {"registers": int(used[1]), "spilled_bytes": int(spills[1]) + int(spills[2])}


def rows_of(kind: str, sass: str, said: str) -> Iterable[dict[str, object]]:
    functions = parse(sass)
    for name, (shapes, group, logit_bytes) in SHAPES.items():
        shape = next(shape for shape in shapes if any(shape in function for function in functions))
        code = next(code for function, code in functions.items() if shape in function)
        for vocabulary in VOCABULARIES:
            parts = slots(code, group, logit_bytes, vocabulary)
            row: dict[str, object] = {"kind": kind, "logits": name, "vocabulary": vocabulary}
            row |= {part: rounded(value, 3) for part, value in parts.items()} | registers_of(said, shape)
            for device in DEVICES:
                ms, share = predicted_ms(parts, 3 * logit_bytes, 8192 * vocabulary, device)
                row |= {f"{device}_ms": rounded(ms, 3), f"{device}_share_of_copy": rounded(share, 2)}
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=[kind for kind, _ in divergences()], default=list(KINDS))
    parser.add_argument("--out", type=Path, default=RESULTS / "issue_slots.json")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments.kinds:
            rows += rows_of(kind, *compile_kind(kind, Path(folder)))
            say("\n".join(json.dumps(row) for row in rows[-len(SHAPES) * len(VOCABULARIES) :]))
    head = {"command": command(), "architecture": "sm_90", "rows_of_a_prediction": 8192, "issued": ISSUED}
    arguments.out.write_text(json.dumps({**head, "kernels": rows}, indent=1) + "\n")
    at = [row for row in rows if row["logits"] == "half" and row["vocabulary"] == 128256]
    say("slots a pair: " + " ".join(f"{row['kind']} {row['slots']}" for row in at))


if __name__ == "__main__":
    main()
