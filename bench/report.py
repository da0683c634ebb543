"""Tables from a result file. ``python -m bench.report FILE...`` prints them again."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench import schema
from bench.cases import Case

Row = dict[str, Any]


def sound(row: Row) -> bool:
    """It ran and, unless it is the floor, agrees with the float64 truth."""
    checked = row["role"] == "floor" or (row["check"] is not None and row["check"]["passed"])
    return row["milliseconds"] is not None and checked


def ratio(slow: Row, fast: Row, part: str = "both") -> float | None:
    """Median time of one row over that of another; None unless both are sound."""
    if not (sound(slow) and sound(fast)):
        return None
    over: float = slow["milliseconds"][part]["median"]
    under: float = fast["milliseconds"][part]["median"]
    return over / under


def milliseconds(row: Row | None) -> str:
    """Median of forward + backward; "-" unless the row is sound."""
    return f"{row['milliseconds']['both']['median']:.1f}" if row is not None and sound(row) else "-"


def best(rows: Iterable[Row], role: str) -> Row | None:
    """The fastest sound row of a role."""
    able = [row for row in rows if row["role"] == role and sound(row)]
    return min(able, key=lambda row: row["milliseconds"]["both"]["median"], default=None)


def render(document: schema.Document) -> str:
    """All tables of a document: one per case and allocator, the summary, memory."""
    groups = _groups(document["timings"])
    parts = [header(document)]
    if not document.get("finished", True):
        parts += ["NOT ALL CASES were measured: time ran out, or the run was cut off"]
    parts += [_case_table(rows) for rows in groups]
    summary = tabulate(summary_lines(document), SUMMARY_HEADS, disable_numparse=True)
    parts += ["Time, forward + backward, in one line per case", summary]
    if document["memory"]:
        memory = tabulate(memory_lines(document["memory"]), MEMORY_HEADS, disable_numparse=True)
        parts += ["Memory, as multiples of the logits' size", memory]
    beside = beside_lines(document)
    if beside:
        title = (
            f"Two of our backends on the same case: the first should take <= {SLOWER} of the second's time"
        )
        parts += [title, tabulate(beside, BESIDE_HEADS, disable_numparse=True)]
    if "ceiling" in document:
        copy, empty = document["ceiling"]["copy"], document["ceiling"]["empty_launches"]
        title = (
            f"Share of the copy bandwidth: {copy['gb_per_s']:.0f} GB/s read and written (best "
            f"{copy['best_gb_per_s']:.0f}) over {copy['bytes'] / 1e9:.1f} GB; {empty['count']} empty launches"
            f" take {1e3 * empty['milliseconds']:.1f} µs"
        )
        parts += [title, tabulate(share_lines(document), SHARE_HEADS, disable_numparse=True)]
    return "\n\n".join(parts)


# Below it a problem is small: launches are a part of its time that no kernel can take back.
SMALL_MILLISECONDS = 0.2
SHARE_HEADS = [
    "case",
    "check",
    "floor µs",
    "fwd µs",
    "share",
    "bwd µs",
    "share",
    "both µs",
    "share",
    "goal",
    "",
]


def goal(case: Case) -> float | None:
    """Least share of the copy bandwidth that a case which fills the GPU should reach, None if none is set."""
    classes = case.shape[1]
    if case.loss not in ("dice_ce", "gdl", "tversky"):
        return None
    if case.layout != "contiguous" or case.label_dtype != "uint8":
        return None
    if case.dtype == "float32" and classes >= 4:
        return 0.85
    return 0.6 if case.dtype == "bfloat16" and classes >= 14 else None


def share_lines(document: schema.Document) -> list[list[str]]:
    """A line for each case of ours, under SHARE_HEADS: bytes of the floor over time and copy bandwidth.

    The goal of a small problem is a time: its floor and the empty launches, and a fifth more.
    """
    per_ms = document["ceiling"]["copy"]["gb_per_s"] * 1e6
    launches = document["ceiling"]["empty_launches"]["milliseconds"]
    lines = []
    for row in document["timings"]:
        if row["role"] != "ours":
            continue
        case, times = case_of(row), row["milliseconds"]
        floor = case.floor_bytes / per_ms
        forced = f", {row['backend']}" if row.get("backend") else ""
        cells = [case.name + forced, _verdict(row), f"{1e3 * floor:.1f}"]
        if times is None:
            lines.append(cells)
            continue
        parts = {"forward": case.forward_bytes, "backward": case.floor_bytes - case.forward_bytes}
        parts["both"] = case.floor_bytes
        for part, size in parts.items():
            taken = times[part]["median"]
            cells += [f"{1e3 * taken:.1f}", f"{size / per_ms / taken:.0%}"]
        taken, share = times["both"]["median"], goal(case)
        if floor < SMALL_MILLISECONDS:
            limit = 1.2 * (floor + launches)
            cells += [f"<= {1e3 * limit:.1f} µs", "met" if taken <= limit else "MISSED"]
        elif share is not None:
            cells += [f">= {share:.0%}", "met" if floor / taken >= share else "MISSED"]
        if not sound(row):
            cells[9:] = []
        lines.append(cells)
    return lines


# The first of two backends may take so much of the time of the second, on each case.
SLOWER = 1.03
BESIDE_HEADS = ["case", "backends", "fwd µs", "of", "bwd µs", "of", "both µs", "of", ""]


def beside_lines(document: schema.Document) -> list[list[str]]:
    """A line for each case that two of ours have run, under BESIDE_HEADS: the first, over the second."""
    lines = []
    for rows in _groups(document["timings"]):
        first, *others = [row for row in rows if row["role"] == "ours"]
        for other in others:
            cells = [name_of(first), " / ".join(str(row.get("backend")) for row in (first, other))]
            for part in ("forward", "backward", "both"):
                share = ratio(first, other, part)
                if share is not None:
                    cells += [f"{1e3 * first['milliseconds'][part]['median']:.1f}", f"{share:.3f}"]
            whole = ratio(first, other)
            if whole is not None:
                cells.append("met" if whole <= SLOWER else "MISSED")
            else:
                cells += [""] * 6 + ["-"]
            lines.append(cells)
    return lines


def busy(document: schema.Document) -> bool:
    """Whether others used the machine when the run started."""
    host = document["host"]
    return bool((host["load_average"] or 0) > host["cores"] / 2)


def header(document: schema.Document) -> str:
    host, device = document["host"], document["device"]
    dirty = {True: " with local changes", False: "", None: ""}[document["dirty"]]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    part = f" (cases {document['cases']!r})" if document["cases"] else ""
    forced = document["backend"]
    if forced == "auto" and "backends" in document:
        forced = " and ".join(name for name, reason in document["backends"].items() if not reason)
    absent = "".join(
        f"\nNOT MEASURED: backend {name}: {reason}"
        for name, reason in document.get("backends", {}).items()
        if reason
    )
    return (
        f"suite {document['suite']}{part} on {device['name']} ({device['type']}), "
        f"backend {forced}, {document['threads']} threads, {document['date']}\n"
        f"commit {document['commit']}{dirty}\n"
        f"{host['cpu']} ({host['cpu_capability']}, {host['cores']} cores, load "
        f"{host['load_average']}), {host['system']}, {host['c_library']}\n{versions}"
        + absent
        + ("\nTHE MACHINE WAS BUSY at the start: these times prove nothing" if busy(document) else "")
    )


def _groups(rows: list[Row]) -> list[list[Row]]:
    """Rows of one case under one allocator, in their order."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((name_of(row), row["allocator"]), []).append(row)
    return list(groups.values())


def _case_table(rows: list[Row]) -> str:
    ours, floor = _ours(rows), _the(rows, "floor")
    lines = []
    for row in rows:
        times = row["milliseconds"]
        cells = [row["contender"], _verdict(row)]
        if times is None:
            lines.append(cells)
            continue
        both = times["both"]
        cells += [f"{times[part]['median']:.2f}" for part in ("forward", "backward")]
        cells += [f"{both['median']:.2f}", f"{both['min']:.2f}", f"{both['iqr']:.2f}"]
        cells += [f"{row['traffic_bytes'] / both['median'] / 1e6:.1f}"]
        cells += [_times(ratio(row, floor))]
        cells += ["" if row is ours or row is floor else _faster(ratio(row, ours))]
        cells += ["" if row["minor_faults"] is None else f"{row['minor_faults']:.0f}"]
        lines.append(cells)
    heads = ["contender", "check", "fwd ms", "bwd ms", "both ms", "min", "iqr", "GB/s", "x floor"]
    heads += ["ours is", "faults"]
    title = f"{name_of(rows[0])}, allocator {rows[0]['allocator']}"
    notes = [f"  {row['contender']}: {_reason(row)}" for row in rows if _reason(row)]
    aligned = ["left", "left", *["right"] * 9]
    table = tabulate(lines, heads, disable_numparse=True, colalign=aligned)
    return "\n".join([title, table, *notes])


SUMMARY_HEADS = ["case", "allocator", "check", "ours ms", "MONAI ms"]
SUMMARY_HEADS += ["ours / floor", "than MONAI", "than best compiled", "which is"]


def summary_lines(document: schema.Document) -> list[list[str]]:
    """A line for each case and allocator, under SUMMARY_HEADS."""
    lines = []
    for rows in _groups(document["timings"]):
        ours = _ours(rows)
        compiled, eager = best(rows, "compiled"), best(rows, "eager")
        lines.append(
            [
                name_of(ours),
                ours["allocator"],
                _verdict(ours),
                milliseconds(ours),
                milliseconds(eager),
                _times(ratio(ours, _the(rows, "floor"))),
                _faster(ratio(eager, ours)) if eager else "-",
                _faster(ratio(compiled, ours)) if compiled else "",
                compiled["contender"] if compiled else "",
            ]
        )
    return lines


MEMORY_HEADS = ["case", "contender", "forward", "kept", "backward", "peak"]
MEMORY_HEADS += ["resident forward", "kept", "peak"]


def peak(profiled: dict[str, int]) -> int:
    """Most bytes at any time of a step; those of backward come on top of what was kept for it."""
    return max(profiled["forward_peak"], profiled["kept"] + profiled["backward_peak"])


def memory_lines(rows: list[Row]) -> list[list[str]]:
    """A line for each case and contender, in multiples of the logits' size, under MEMORY_HEADS."""
    lines = []
    for row in rows:
        profiled, resident, unit = row["profiled"], row["resident"] or {}, row["logits_bytes"]
        parts = [profiled[key] for key in ("forward_peak", "kept", "backward_peak")]
        parts += [peak(profiled)]
        parts += [resident.get(key) for key in ("forward_peak", "kept", "peak")]
        cells = ["" if part is None else f"{part / unit:.4f}" for part in parts]
        lines.append([name_of(row), row["contender"], *cells])
    return lines


def case_of(row: Row) -> Case:
    return Case(**row["case"] | {"shape": tuple(row["case"]["shape"])})


def name_of(row: Row) -> str:
    return case_of(row).name


def _ours(rows: list[Row]) -> Row:
    """The first of ours that ran: what others are compared with."""
    found = [row for row in rows if row["role"] == "ours"]
    return next((row for row in found if row["milliseconds"] is not None), found[0])


def _the(rows: list[Row], role: str) -> Row:
    return next(row for row in rows if row["role"] == role)


def _verdict(row: Row) -> str:
    if row["error"]:
        return "did not run"
    if row["check"] is None:
        return ""
    return "ok" if row["check"]["passed"] else "WRONG"


def _reason(row: Row) -> str:
    text = str(row["error"] or (row["check"] or {}).get("reason", ""))
    return text.strip().split("\n")[0][:200]


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _faster(value: float | None) -> str:
    """How we compare with a peer that takes ``value`` times our time."""
    if value is None:
        return "-"
    return f"{value:.2f}x faster" if value >= 1 else f"{1 / value:.2f}x slower"


if __name__ == "__main__":
    for file in sys.argv[1:]:
        print(render(schema.load(Path(file))))
