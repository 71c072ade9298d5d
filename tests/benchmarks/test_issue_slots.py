"""The counting of instructions, on a few lines of machine code, and what pages say of the counts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from building.toolchain import nvcc

from benchmarks.losses import issue_slots
from benchmarks.records import RESULTS, ROOT

# A copy loop whose group may be gathered by columns, statistics, a shuffle, and a gradient by groups or columns.
CODE = """
		Function : a_kernel
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
                                                                         /* 0x000e620000000800 */
        /*0010*/              @!P0 BRA 0x40 ;                            /* 0x00000a00ff017b82 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R7], desc[UR8][R4.64] ;
        /*0030*/                   BRA 0x50 ;
        /*0040*/                   LDG.E.U16 R2, desc[UR8][R4.64] ;
        /*0050*/                   IADD3 R3, R3, 0x1, RZ ;
        /*0060*/               @P1 BRA 0x10 ;
        /*0070*/                   FADD R0, R1, -R2 ;
        /*0080*/                   MUFU.EX2 R0, R0 ;
        /*0090*/               @P1 BRA 0x70 ;
        /*00a0*/                   SHFL.BFLY PT, R2, R0, 0x1, 0x1f ;
        /*00b0*/                   MUFU.EX2 R0, R0 ;
        /*00c0*/               @P2 BRA 0xf0 ;
        /*00d0*/                   STG.E.U16 desc[UR8][R2.64], R0 ;
        /*00e0*/                   BRA 0x100 ;
        /*00f0*/                   IMAD.U32 R0, R0, 0x10000, RZ ;
        /*0100*/                   STG.E.EF.128 desc[UR8][R2.64], R4 ;
        /*0110*/               @P1 BRA 0xb0 ;
        /*0120*/                   EXIT ;
        /*0130*/                   BRA 0x130;
        /*0140*/                   NOP;
"""


def test_instructions_are_read_and_padding_is_not() -> None:
    (code,) = issue_slots.parse(CODE).values()
    assert [hex(x.address) for x in code[:2]] == ["0x0", "0x10"]
    assert (code[1].opcode, code[1].guard, code[1].target) == ("BRA", "@!P0", 0x40)
    assert code[-1].address == 0x130


def test_loops_are_told_apart_and_counted_on_the_way_of_whole_groups() -> None:
    (code,) = issue_slots.parse(CODE).values()
    loops = issue_slots.find_loops(code)
    assert [(loop.role, loop.way.count, loop.way.special) for loop in loops] == [
        ("copy", 5, 0),  # not the gathered column
        ("stats", 3, 1),
        ("gradient", 5, 1),  # not the single columns
    ]
    assert issue_slots.best_way(code).count == 5 + 3 + 5 + 3  # and what is in no loop: LDC, SHFL, EXIT


def test_a_pass_that_finds_value_and_gradient_stands_for_both() -> None:
    copy, stats, sums, fused, gradient = (
        issue_slots.Loop(start, start + 16, role, issue_slots.Way(count=count))
        for start, (role, count) in enumerate(
            [("copy", 9), ("stats", 9), ("sums", 30), ("gradient", 40), ("gradient", 20)]
        )
    )
    assert issue_slots.call_loops([copy, stats, sums, fused, gradient]) == [copy, stats, fused]
    assert issue_slots.call_loops([copy, stats, sums, gradient]) == [copy, stats, sums, gradient]


def test_a_way_around_a_loop() -> None:
    """Past its guard; where there is none there is no way."""
    (code,) = issue_slots.parse(CODE.replace("FADD R0, R1, -R2 ;", "@P3 BRA 0xa0 ;")).values()
    (stats,) = (loop for loop in issue_slots.find_loops(code) if loop.role == "stats")
    inner = issue_slots.Loop(0x80, 0x90, "stats", stats.way)
    assert issue_slots.best_way(code, around=[inner]).count == 5 + 1 + 5 + 3
    assert issue_slots.best_way(code, around=[stats]).work == -1


def test_slots_a_pair() -> None:
    (code,) = issue_slots.parse(CODE).values()
    parts = issue_slots.slots(code, group=8, logit_bytes=2, vocabulary=256 * 8)  # 8 pairs of a thread
    assert parts == pytest.approx(
        {"copy": 5 / 8, "stats": 3 / 8, "gradient": 5 / 8, "fixed": 3 / 8, "slots": 2.0, "special": 2 / 8}
    )


@pytest.mark.parametrize(
    ("vocabulary", "group", "logit_bytes", "ranks"),
    [(1000, 8, 2, 1), (32000, 8, 2, 2), (128256, 8, 2, 8), (151936, 8, 2, 8), (128256, 4, 4, 16)],
)
def test_blocks_of_a_row_are_those_of_the_plan(vocabulary: int, group: int, logit_bytes: int, ranks: int) -> None:
    """tests/kernels/test_cuda_source.py holds the plan itself to the same."""
    assert issue_slots.ranks_of(vocabulary, group, logit_bytes) == ranks


def test_no_kernel_costs_more_than_its_bar() -> None:
    rows = json.loads((RESULTS / "issue_slots.json").read_text())["kernels"]
    slots = {row["kind"]: row["slots"] for row in rows if row["logits"] == "half" and row["vocabulary"] == 128256}
    assert {kind: slots[kind] for kind, bar in issue_slots.BARS.items() if slots[kind] > bar} == {}


@pytest.mark.long
@pytest.mark.parametrize("kind", issue_slots.BARS)
def test_the_counts_are_those_of_the_source(kind: str, tmp_path: Path) -> None:
    """As far as another compiler's may differ."""
    if nvcc() is None:
        pytest.skip("no nvcc here")
    known = json.loads((RESULTS / "issue_slots.json").read_text())["kernels"]
    for row in issue_slots.rows_of(kind, *issue_slots.compile_kind(kind, tmp_path)):
        (want,) = (x for x in known if all(x[name] == row[name] for name in ("kind", "logits", "vocabulary")))
        assert row["slots"] == pytest.approx(want["slots"], rel=0.03)
        assert row["spilled_bytes"] == 0


def test_the_page_has_the_counts_of_the_results() -> None:
    """And nothing spills."""
    rows = json.loads((RESULTS / "issue_slots.json").read_text())["kernels"]
    assert not any(row["spilled_bytes"] for row in rows)
    page = (ROOT / "kernels" / "README.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", page, re.MULTILINE))
    for row in rows:
        if row["logits"] == "half" and row["vocabulary"] == 128256:
            parts = [row["copy"], row["stats"], row.get("sums"), row["gradient"], row["fixed"], row["slots"]]
            cells = ["" if part is None else f"{part:.1f}" for part in parts]
            shares = [f"{row[f'{device}_share_of_copy']:.2f}" for device in issue_slots.DEVICES]
            want = " | ".join([*cells, f"{row['special']:.1f}", *shares])
            assert re.sub(r"\s+", " ", table[row["kind"]]) == re.sub(r"\s+", " ", want)
