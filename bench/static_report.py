"""The tables and the JSON of bench/static_cuda.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
from tabulate import tabulate

from bench import schema
from bench.aot_report import tool_versions
from dicekernels.backends import native

Row = dict[str, Any]
RESULTS = schema.ROOT / "bench" / "results" / "static-cuda.json"
VERSION = 1

_COUNT = {"type": "integer", "minimum": 0}
_ABOVE = {"type": "number", "exclusiveMinimum": 0}
_TEXT = {"type": "string", "minLength": 1}
_WIDTHS = {"type": "object", "additionalProperties": _COUNT}
_LIST = {"type": "array", "items": _TEXT, "minItems": 1, "uniqueItems": True}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    """An object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_KERNEL: dict[str, Any] = {"kernel": _TEXT, "capability": _COUNT}
_KERNEL |= dict.fromkeys(("registers", "stack_bytes", "spill_loads", "spill_stores"), _COUNT)
_KERNEL |= dict.fromkeys(("static_shared_bytes", "threads", "instructions", "loop_spills"), _COUNT)
_KERNEL |= dict.fromkeys(("loads", "stores", "loop_loads", "loop_stores"), _WIDTHS)
_KERNEL |= {
    "loop_instructions": {"anyOf": [_COUNT, {"type": "null"}]},
    "narrow": {"anyOf": [{"type": "string"}, {"type": "null"}]},
}
_PROBLEM: dict[str, Any] = {
    "case": {"const": "dice_ce"},
    "op": {"enum": ["forward", "backward"]},
    "capability": _COUNT,
    "dtype": _TEXT,
    "instance": _TEXT,
}
_PROBLEM |= dict.fromkeys(("classes", "sharing_warps", "classes_of_a_warp", "threads"), _COUNT)
_PROBLEM |= dict.fromkeys(("registers", "dynamic_shared_bytes", "resident_warps"), _COUNT)
_PROBLEM |= {"tile_instructions": _COUNT, "per_element": _ABOVE, "per_element_chunk": _ABOVE}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    **_object(
        {
            "schema": {"const": VERSION},
            "suite": {"const": "static-cuda"},
            "date": schema.SCHEMA["properties"]["date"],
            "commit": schema.SCHEMA["properties"]["commit"],
            "dirty": schema.SCHEMA["properties"]["dirty"],
            "versions": schema.SCHEMA["properties"]["versions"],
            "architectures": _LIST,
            "ptx": _LIST,
            "kernels": {"type": "array", "items": _object(_KERNEL), "minItems": 1},
            "problems": {"type": "array", "items": _object(_PROBLEM)},
        }
    ),
}


def document(built: tuple[set[str], set[str]], kernels: list[Row], problems: list[Row]) -> dict[str, Any]:
    """The rows with date, commit and versions; built: architectures and PTX of the library."""
    where = schema.describe("static-cuda", "", "cpu", "cuda", threads=1, rounds=1)
    kept = {key: where[key] for key in ("date", "commit", "dirty")}
    tools = {"cuobjdump": tool_versions()["cuobjdump"]}
    cuda = (native.build_config() or {}).get("cuda")
    if cuda:
        tools["nvcc"] = cuda["nvcc"]
    architectures, ptx = (sorted(found, key=lambda sm: int(sm.rstrip("af"))) for found in built)
    return {
        "schema": VERSION,
        "suite": "static-cuda",
        **kept,
        "versions": where["versions"] | tools,
        "architectures": [f"sm_{sm}" for sm in architectures],
        "ptx": [f"compute_{sm}" for sm in ptx],
        "kernels": kernels,
        "problems": problems,
    }


def save(written: dict[str, Any], out: Path) -> None:
    """Validate and write, a line for each row.

    Raises:
        jsonschema.ValidationError: a row of another form.
    """
    jsonschema.validate(written, SCHEMA)
    out.parent.mkdir(parents=True, exist_ok=True)
    lists = ("kernels", "problems")
    head = json.dumps({key: value for key, value in written.items() if key not in lists}, indent=1)[:-2]
    rows = [
        f' "{key}": [\n  ' + ",\n  ".join(json.dumps(row) for row in written[key]) + "\n ]" for key in lists
    ]
    out.write_text(f"{head},\n" + ",\n".join(rows) + "\n}\n")
    assert json.loads(out.read_text()) == written


def load(path: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(path.read_text())
    jsonschema.validate(written, SCHEMA)
    return written


def tables(kernels: list[Row], problems: list[Row]) -> str:
    """Of the kernels, then of the problems."""
    of_kernels = [
        [
            *(row[key] for key in ("kernel", "capability", "registers")),
            _spill(row),
            *(row[key] for key in ("static_shared_bytes", "threads", "instructions")),
            row["loop_instructions"] or "-",
            _widths(row["loop_loads" if row["loop_instructions"] else "loads"]),
            _widths(row["loop_stores" if row["loop_instructions"] else "stores"]),
            {None: "-", "": "yes"}.get(row["narrow"], "NO"),
        ]
        for row in kernels
    ]
    heads = ["kernel", "sm", "regs", "spill", "smem", "threads", "all", "loop", "loads", "stores", "wide"]
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


def _spill(row: Row) -> str:
    if not row["stack_bytes"]:
        return "0"
    return (
        f"{row['stack_bytes']} ({row['spill_loads']}/{row['spill_stores']}, {row['loop_spills']} in the loop)"
    )


def _widths(counts: dict[str, int]) -> str:
    return " ".join(f"{width}x{count}" for width, count in sorted(counts.items(), key=lambda item: -item[1]))
