"""What bench/static/aot.py and cuda.py print and write."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench import schema
from bench.static.aot_facts import shape_of

Row = dict[str, Any]

HEADS = ["case", "op", "sm", "C", "dtype", "layout", "tile", "regs", "spill", "smem", "warps"]
HEADS += ["i/e", "chunk", "tiles", "loop loads", "loop stores", "bar", "shfl", "mufu", "all"]


def save(suite: str, out: Path, tools: dict[str, str], **parts: Any) -> None:
    """Rows with date, commit and versions, the tools among them."""
    where = schema.describe(suite, "", "cpu", "auto", threads=1, rounds=1)
    kept = {key: where[key] for key in ("suite", "date", "commit", "dirty")}
    schema.write(kept | {"versions": where["versions"] | tools} | parts, out)
    print(f"written: {out}")


def tool_versions() -> dict[str, str]:
    """Releases of the tools that Triton calls: {"ptxas": "12.8", ...}."""
    from triton import knobs

    found = {}
    for name in ("ptxas", "ptxas_blackwell", "cuobjdump"):
        tool = getattr(knobs.nvidia, name, None)
        if tool is not None:
            said = subprocess.run([tool.path, "--version"], capture_output=True, text=True, check=True).stdout
            version = re.search(r"\bV(\d+(?:\.\d+)+)", said)
            found[name] = version[1] if version else "unknown"
    return found


def name(row: Row) -> str:
    return (
        f"{row['case']} {row['op']} sm_{row['capability']} C={row['classes']} {row['dtype']} {row['layout']}"
    )


def launches(rows: list[Row]) -> str:
    """A line for each kernel, under HEADS."""
    return tabulate([_line(row) for row in rows], HEADS, disable_numparse=True)


def lines(found: list[tuple[str, int, str, str]]) -> str:
    """Source lines with the instructions that the hot loop spends on them."""
    return tabulate(found, ["line", "instructions", "which", "source"], disable_numparse=True)


def _line(row: Row) -> list[str]:
    layout = {"contiguous": "first", "channels_last": "last"}[row["layout"]]
    cells = [row["case"], row["op"], str(row["capability"]), str(row["classes"]), row["dtype"], layout]
    facts = row["facts"]
    if facts is None:
        tried = ",".join(f"{key}={value}" for key, value in row["overrides"].items())
        return [*cells, f"{tried} FAILED: {row['error'].splitlines()[0][:60]}"]
    spill = f"{facts['stack_bytes']}" if facts["stack_bytes"] else "0"
    if facts["spill_loads"] + facts["spill_stores"]:
        spill += f" ({facts['spill_loads']}/{facts['spill_stores']})"
    cells += [_tile(facts["meta"], row["overrides"]), str(facts["registers"]), spill]
    cells += [str(facts["shared_bytes"]), str(facts["resident_warps"])]
    cells += [_number(facts["per_element"]), _number(facts["per_element_chunk"])]
    cells += [str(facts["loop_tiles"] or "-")]
    inner = facts["loop_instructions"] is not None
    cells += [_widths(facts["loop_loads" if inner else "loads"])]
    cells += [_widths(facts["loop_stores" if inner else "stores"])]
    cells += [str(facts[key]) for key in ("barriers", "shuffles", "mufu", "instructions")]
    return cells


def _tile(meta: dict[str, Any], overrides: dict[str, Any]) -> str:
    names = meta | shape_of(meta)
    shape = f"{names.get('BLOCK_C', '-')}x{names.get('BLOCK_N', '-')} w{meta.get('num_warps', 4)}"
    shape += f" L{names['LANES']}" if names.get("LANES") else ""
    shown = ("BLOCK_C", "BLOCK_N", "LANES", "num_warps")
    return " ".join([shape, *(f"{key}={value}" for key, value in overrides.items() if key not in shown)])


def _widths(counts: dict[str, int]) -> str:
    return " ".join(f"{width}x{count}" for width, count in sorted(counts.items(), key=lambda item: -item[1]))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def compiled(kernels: list[Row], problems: list[Row]) -> str:
    """Of the kernels, then of the problems."""
    of_kernels = [
        [
            *(row[key] for key in ("kernel", "capability", "registers")),
            _stack(row),
            row["static_shared_bytes"],
            row["instructions"],
            row["loop_instructions"] or "-",
            _widths(row["loop_loads" if row["loop_instructions"] else "loads"]),
            _widths(row["loop_stores" if row["loop_instructions"] else "stores"]),
            {None: "-", "": "yes"}.get(row["narrow"], "NO"),
        ]
        for row in kernels
    ]
    heads = ["kernel", "sm", "regs", "spill", "smem", "all", "loop", "loads", "stores", "wide"]
    text = str(tabulate(of_kernels, heads, disable_numparse=True))
    if not problems:
        return text
    keys: tuple[str, ...] = ("op", "capability", "classes", "dtype", "instance", "sharing_warps", "registers")
    keys += ("dynamic_shared_bytes", "resident_warps", "tile_instructions")
    of_problems = [
        [*(row[key] for key in keys), *(f"{row[key]:.1f}" for key in ("per_element", "per_element_chunk"))]
        for row in problems
    ]
    heads = ["op", "sm", "C", "dtype", "kernel", "share", "regs", "smem", "warps", "tile", "i/e", "chunk"]
    return f"{text}\n\n{tabulate(of_problems, heads, disable_numparse=True)}"


def _stack(row: Row) -> str:
    if not row["stack_bytes"]:
        return "0"
    return (
        f"{row['stack_bytes']} ({row['spill_loads']}/{row['spill_stores']}, {row['loop_spills']} in the loop)"
    )
