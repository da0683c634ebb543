"""The form of result files, a line for each row; of a suite: one document per suite and device."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

try:
    import jsonschema
except ImportError:  # a GPU node without it: what is written there is checked where it is read
    jsonschema = None

ROOT = Path(__file__).resolve().parent.parent
VERSION = 2
# What the caller of bench.run chose; ``cases`` is "" for the whole suite.
ASKED = ("suite", "cases", "device", "backend", "threads", "rounds")

Document = dict[str, Any]
Row = dict[str, Any]


def _object(**properties: Any) -> dict[str, Any]:
    """An object with exactly these properties; what COLUMNS leaves out need not be there."""
    required = [name for name in properties if name not in ("iqr", "min", "value_error", "gradient_error")]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


_TEXT = {"type": "string", "minLength": 1}
_BYTES = {"type": "integer", "minimum": 0}
_STATS = _object(
    median={"type": "number", "exclusiveMinimum": 0},
    min={"type": "number", "exclusiveMinimum": 0},
    iqr={"type": "number", "minimum": 0},
)
_CASE = _object(
    loss=_TEXT,
    shape={"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 3},
    dtype=_TEXT,
    label_dtype=_TEXT,
    layout=_TEXT,
)
_ROLE = {"enum": ["ours", "eager", "compiled", "floor"]}
_ERROR = _nullable({"type": "number"})
# An error is the text of what went wrong, empty if nothing did; times are null then.
_TIMING = _object(
    case=_CASE,
    allocator={"enum": ["raised", "default"]},
    contender=_TEXT,
    role=_ROLE,
    traffic_bytes=_BYTES,
    check=_nullable(
        _object(
            passed={"type": "boolean"},
            reason={"type": "string"},
            value_error=_ERROR,
            gradient_error=_ERROR,
        )
    ),
    error={"type": "string"},
    milliseconds=_nullable(_object(forward=_STATS, backward=_STATS, both=_STATS)),
    minor_faults=_nullable({"type": "number", "minimum": 0}),
)
# Of ours, where a backend is forced.
_TIMING["properties"]["backend"] = _nullable(_TEXT)
_MEMORY = _object(
    case=_CASE,
    contender=_TEXT,
    logits_bytes=_BYTES,
    profiled=_object(
        forward_peak={"type": "integer"},
        kept={"type": "integer"},
        backward_peak={"type": "integer"},
    ),
    resident=_nullable(
        _object(forward_peak={"type": "integer"}, kept={"type": "integer"}, peak={"type": "integer"})
    ),
)

SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    **_object(
        schema={"const": VERSION},
        suite=_TEXT,
        cases={"type": "string"},
        date={"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$"},
        commit={"type": "string", "pattern": "^([0-9a-f]{40}|unknown)$"},
        dirty=_nullable({"type": "boolean"}),
        device=_object(type={"enum": ["cpu", "cuda"]}, name=_TEXT),
        backend=_TEXT,
        host=_object(
            cpu=_TEXT,
            cpu_capability=_TEXT,
            cores={"type": "integer", "minimum": 1},
            system=_TEXT,
            c_library={"type": "string"},
            load_average=_nullable({"type": "number", "minimum": 0}),
        ),
        threads={"type": "integer", "minimum": 1},
        rounds={"type": "integer", "minimum": 1},
        versions={"type": "object", "additionalProperties": _TEXT, "required": ["python", "torch"]},
        allocators={
            "type": "object",
            "additionalProperties": {"type": "object", "additionalProperties": _TEXT},
            "minProperties": 1,
        },
        timings={"type": "array", "items": _TIMING, "minItems": 1},
        memory={"type": "array", "items": _MEMORY},
    ),
}

# Only documents of a GPU have the first. ``finished``: false while cases are still to come, or were cut off.
# ``backends``: those of ours that the suite asks for; "" or why one could not run.
SCHEMA["properties"] |= {
    "backends": {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 1},
    "ceiling": _object(
        copy=_object(
            bytes={"type": "integer", "minimum": 10**9},
            gb_per_s={"type": "number", "exclusiveMinimum": 0},
            best_gb_per_s={"type": "number", "exclusiveMinimum": 0},
        ),
        empty_launches=_object(
            count={"type": "integer", "minimum": 1},
            milliseconds={"type": "number", "exclusiveMinimum": 0},
        ),
    ),
    "finished": {"type": "boolean"},
}

# What the tables read, which is what a file keeps; a case is its place in the list of cases.
COLUMNS = {
    "timings": [
        *(
            "case",
            "allocator",
            "contender",
            "role",
            "backend",
            "traffic_bytes",
            "check.passed",
            "check.reason",
        ),
        *("error", "milliseconds.forward.median", "milliseconds.backward.median"),
        *(f"milliseconds.both.{name}" for name in ("median", "min", "iqr")),
        "minor_faults",
    ],
    "memory": [
        *("case", "contender", "logits_bytes"),
        *(f"profiled.{name}" for name in ("forward_peak", "kept", "backward_peak")),
        *(f"resident.{name}" for name in ("forward_peak", "kept", "peak")),
    ],
}


def validate(document: Document) -> None:
    """``jsonschema.ValidationError`` for a document of another form, ValueError for one that
    contradicts itself: times beside an error, or an allocator that no mode describes."""
    if jsonschema is not None:
        jsonschema.validate(document, SCHEMA)
    for row in document["timings"]:
        where = f"{row['contender']} on {row['case']}"
        if (row["milliseconds"] is None) != bool(row["error"]):
            raise ValueError(f"{where}: expected either times or an error, got both or neither")
        if row["check"] is None and row["role"] != "floor" and not row["error"]:
            raise ValueError(f"{where}: got times without a check against the truth")
        if row["allocator"] not in document["allocators"]:
            raise ValueError(f"{where}: allocator {row['allocator']!r} is not in `allocators`")


def pack(rows: list[Row], columns: Sequence[str]) -> list[list[Any]]:
    """The columns, then a list of values for each row: with six digits, null for what a row lacks.

    A column of a nested object is a path: "check.passed".
    """

    def value(row: Any, column: str) -> Any:
        for key in column.split("."):
            row = None if row is None else row.get(key)
        return float(f"{row:.8g}") if isinstance(row, float) else row

    return [list(columns), *([value(row, column) for column in columns] for row in rows)]


def _unpack(columns: list[str], *rows: list[Any]) -> list[Row]:
    unpacked = []
    for values in rows:
        row: Row = {column.split(".")[0]: None for column in columns}
        for column, value in zip(columns, values, strict=True):
            *path, last = column.split(".")
            place = row
            if value is not None:
                for key in path:
                    place[key] = place.get(key) or {}
                    place = place[key]
                place[last] = value
        unpacked.append(row)
    return unpacked


def write(document: Document, path: Path) -> None:
    """JSON with a line for each key, and for each row of a list of rows."""
    lines = []
    for key, value in document.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], (list, dict)):
            rows = (json.dumps(row, separators=(",", ":")) for row in value)
            text = "[\n  " + ",\n  ".join(rows) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read(path: Path) -> Document:
    """What ``write`` wrote, with packed rows as objects."""
    document: Document = json.loads(path.read_text())
    for key, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], list):
            document[key] = _unpack(*value)
    return document


def save(document: Document, folder: Path) -> Path:
    """Validate and write ``<suite>--<device>.json``.

    ``--<backend>`` follows if one was forced, ``--<cases>`` for a part of the suite, so that it
    does not overwrite the whole.
    """
    validate(document)
    parts = [document["suite"], slug(f"{document['device']['type']} {document['device']['name']}")]
    if document["backend"] != "auto":
        parts.append(slug(document["backend"]))
    if document["cases"]:
        parts.append(slug(document["cases"]) or "part")
    path = folder / ("--".join(parts) + ".json")
    problems = list({str(row["case"]): row["case"] for row in document["timings"]}.values())
    packed = {"problems": pack(problems, list(_CASE["properties"]))}
    for key, columns in COLUMNS.items():
        packed[key] = pack([row | {"case": problems.index(row["case"])} for row in document[key]], columns)
    write(document | packed, path)
    return path


def load(path: Path) -> Document:
    document = read(path)
    problems = document.pop("problems")
    for row in (*document["timings"], *document["memory"]):
        row["case"] = problems[row["case"]]
    validate(document)
    return document


def describe(suite: str, cases: str, device: str, backend: str, threads: int, rounds: int) -> Document:
    """The document without its rows: where, when and on what the suite runs."""
    commit = git("rev-parse", "HEAD")
    # Results are written by the runs themselves and do not make the code another one.
    status = git("status", "--porcelain", "--", ".", ":!bench/results")
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return {
        "schema": VERSION,
        "suite": suite,
        "cases": cases,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "dirty": None if status is None else bool(status),
        "device": {"type": device, "name": name},
        "backend": backend,
        "host": {
            "cpu": _cpu_name(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count() or 1,
            "system": f"{platform.system()} {platform.release()}",
            "c_library": " ".join(platform.libc_ver()).strip(),
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
        "threads": threads,
        "rounds": rounds,
        "versions": _versions(),
    }


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "monai", "dicekernels"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or "unknown"


def git(*arguments: str, folder: Path = ROOT) -> str | None:
    """Output of git in a repository, None where there is no repository or no git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
