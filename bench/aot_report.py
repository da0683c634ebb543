"""The table and the JSON of bench/aot.py."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
from tabulate import tabulate

from bench import schema
from bench.aot_facts import shape_of

Row = dict[str, Any]
RESULTS = schema.ROOT / "bench" / "results"
NAME = "aot-triton.json"
VERSION = 1

HEADS = ["case", "op", "sm", "C", "dtype", "layout", "tile", "regs", "spill", "smem", "warps"]
HEADS += ["i/e", "chunk", "tiles", "loop loads", "loop stores", "bar", "shfl", "mufu", "all"]

_COUNT = {"type": "integer", "minimum": 0}
_WIDTHS = {"type": "object", "additionalProperties": _COUNT}
_MAYBE = {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]}
_COUNTS: tuple[str, ...] = (
    "registers",
    "stack_bytes",
    "spill_loads",
    "spill_stores",
    "shared_bytes",
    "resident_warps",
)
_COUNTS += ("instructions", "barriers", "shuffles", "mufu", "atomics", "calls")
_SHARE = {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "null"}]}
_FACTS: dict[str, Any] = dict.fromkeys(_COUNTS, _COUNT)
_FACTS |= dict.fromkeys(("loads", "stores", "loop_loads", "loop_stores"), _WIDTHS)
_FACTS |= dict.fromkeys(("loop_instructions", "loop_tiles", "per_element", "per_element_chunk"), _MAYBE)
_FACTS |= {
    "meta": {"type": "object"},
    "wide_loads": _SHARE,
    "wide_stores": _SHARE,
}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    """An object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_TEXT = {"type": "string", "minLength": 1}
_ROW = {
    "case": _TEXT,
    "op": {"enum": ["forward", "backward", "finish"]},
    "capability": _COUNT,
    "classes": {"type": "integer", "minimum": 1},
    "dtype": _TEXT,
    "layout": _TEXT,
    "shape": {"type": "array", "items": _COUNT, "minItems": 3},
    "overrides": {"type": "object"},
    "error": {"type": "string"},
    "facts": {"anyOf": [_object(_FACTS), {"type": "null"}]},
}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    **_object(
        {
            "schema": {"const": VERSION},
            "suite": {"const": "aot-triton"},
            "date": schema.SCHEMA["properties"]["date"],
            "commit": schema.SCHEMA["properties"]["commit"],
            "dirty": schema.SCHEMA["properties"]["dirty"],
            "versions": schema.SCHEMA["properties"]["versions"],
            "kernels": {"type": "array", "items": _object(_ROW), "minItems": 1},
        }
    ),
}


def document(rows: list[Row]) -> dict[str, Any]:
    """The rows with date, commit and versions, ptxas and the disassembler among them."""
    where = schema.describe("aot-triton", "", "cpu", "triton", threads=1, rounds=1)
    kept = {key: where[key] for key in ("date", "commit", "dirty")}
    versions = where["versions"] | tool_versions()
    return {"schema": VERSION, "suite": "aot-triton", **kept, "versions": versions, "kernels": rows}


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


def save(rows: list[Row], out: Path) -> Path:
    """Validate and write; ``out`` is a folder or a file that ends in .json.

    Raises:
        jsonschema.ValidationError: a row of another form.
    """
    path = out if out.suffix == ".json" else out / NAME
    written = document(rows)
    jsonschema.validate(written, SCHEMA)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {key: value for key, value in written.items() if key != "kernels"}
    # A line for each kernel: hundreds of them, and a change is then one line of a diff.
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "kernels": [\n  {lines}\n ]\n}}\n')
    assert json.loads(path.read_text()) == written
    return path


def load(path: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(path.read_text())
    jsonschema.validate(written, SCHEMA)
    return written


def name(row: Row) -> str:
    return (
        f"{row['case']} {row['op']} sm_{row['capability']} C={row['classes']} {row['dtype']} {row['layout']}"
    )


def table(rows: list[Row]) -> str:
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
