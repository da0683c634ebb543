"""``python -m bench.readme``: docs/performance.md and the README's table, from ``bench/results`` alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tabulate import tabulate

from bench import report, schema
from bench.cases import Case

README = schema.ROOT / "README.md"
PERFORMANCE = schema.ROOT / "docs" / "performance.md"
RESULTS = schema.ROOT / "bench" / "results"
BLOCK = re.compile(r"(?<=<!-- measured: begin -->\n).*?(?=<!-- measured: end -->)", re.DOTALL)

# The rows of the README.
SHOWN = [Case("dice_ce", shape) for shape in ((2, 4, 96, 96, 96), (2, 14, 96, 96, 96), (1, 117, 64, 64, 64))]
# A volume of a whole-body model, too large to measure beside MONAI on a small machine.
LARGE = Case("dice_ce", (2, 117, 128, 128, 128))
# What a process has that changes nothing.
ALLOCATOR = "default"
CONTENDERS = ("dicekernels", "MONAI")


def results() -> list[tuple[Path, schema.Document]]:
    """Files of ``bench.run``, whole suites first; a part of a suite only where it is the newer one."""
    files = [path for path in sorted(RESULTS.glob("*.json")) if "timings" in json.loads(path.read_text())]
    found = [(path, schema.load(path)) for path in files]
    whole = {(x["suite"], x["device"]["name"]): x["date"] for _, x in found if not x["cases"]}
    current = [
        (path, x)
        for path, x in found
        if not x["cases"] or x["date"] > whole.get((x["suite"], x["device"]["name"]), "")
    ]
    return sorted(current, key=lambda entry: bool(entry[1]["cases"]))


def markdown(lines: list[list[str]], heads: list[str]) -> str:
    return tabulate(lines, heads, tablefmt="github", disable_numparse=True)


def performance(found: list[tuple[Path, schema.Document]]) -> str:
    """The page with every row of every result file."""
    on_gpu = any(document["device"]["type"] == "cuda" for _, document in found)
    parts = [
        "# Performance",
        "Written by `python -m bench.readme` from the files in [bench/results](../bench/results), never by "
        "hand. The method, with what the peers and the floor are: [bench/README.md](../bench/README.md)."
        + ("" if on_gpu else " There is no time of a GPU yet."),
    ]
    for path, document in found:
        memory = [line for line in report.memory_lines(document["memory"]) if line[1] in CONTENDERS]
        part = f", cases `{document['cases']}` alone" if document["cases"] else ""
        parts += [
            f"## Suite {document['suite']}{part}, {document['device']['name']}",
            "\n".join(f"    {line}" for line in report.header(document).splitlines()),
            f"File: [{path.name}](../bench/results/{path.name}).",
            "### Time",
            "Forward + backward: ours over a plain pass with the floor's traffic, and against the peers; all "
            "interleaved in one process, checked against float64 first. Allocator: raised keeps freed memory "
            "in the process, default is glibc's own.",
            markdown(report.summary_lines(document), report.SUMMARY_HEADS),
            "### Memory",
            "In multiples of the logits' size: what torch's allocator handed out, and the resident size of a "
            "process of its own.",
            markdown(memory, report.MEMORY_HEADS),
        ]
    return "\n\n".join(parts) + "\n"


def extra(document: schema.Document, case: Case, contender: str) -> tuple[int, int, int]:
    """Bytes kept for backward, peak, and of the logits, as torch's allocator counted them."""
    row = next(
        row for row in document["memory"] if report.case_of(row) == case and row["contender"] == contender
    )
    profiled: dict[str, int] = row["profiled"]
    return profiled["kept"], report.peak(profiled), row["logits_bytes"]


def table(document: schema.Document) -> str:
    """The README's rows: ours and MONAI, in milliseconds and megabytes."""
    lines = []
    for case in SHOWN:
        rows = {
            row["contender"]: row
            for row in document["timings"]
            if report.case_of(row) == case and row["allocator"] == ALLOCATOR
        }
        times = [f"{report.milliseconds(rows[name])} ms" for name in CONTENDERS]
        kept, peak, logits = zip(*(extra(document, case, name) for name in CONTENDERS), strict=True)
        sizes = [f"{size / 1e6:.1f} MB" for size in (logits[0], *kept, *peak)]
        shape = case.shape
        lines.append([f"{shape[0]} x {shape[1]} x {shape[2]}³", sizes[0], *times, *sizes[1:]])
    heads = ["logits", "size", "time: ours", "MONAI", "kept: ours", "MONAI", "peak: ours", "MONAI"]
    host, versions = document["host"], document["versions"]
    kept, peak, logits = zip(*(extra(document, SHOWN[-1], name) for name in CONTENDERS), strict=True)
    large = LARGE.logits_bytes / logits[0] / 1e9
    return "\n\n".join(
        [
            "`DiceCELoss(to_onehot_y=True, softmax=True)`, float32 logits and uint8 labels: forward + "
            "backward, and the memory beside the inputs, kept between the two and at the peak (which for "
            "ours is the gradient).",
            markdown(lines, heads),
            f"Measured {document['date'][:10]} at commit {document['commit'][:12]} on {host['cpu']} "
            f"({host['cpu_capability']}), {document['threads']} threads, torch {versions['torch']}, MONAI "
            f"{versions['monai']}; medians, glibc's default allocator. Every case: "
            "[docs/performance.md](docs/performance.md)."
            + (" THE MACHINE WAS BUSY." if report.busy(document) else ""),
            f"Computed, not measured, from the multiples of the last row: on 2 x 117 x 128³ logits "
            f"({LARGE.logits_bytes / 1e9:.2f} GB) MONAI keeps {kept[1] * large:.1f} GB and peaks at "
            f"{peak[1] * large:.1f} GB, ours keeps {kept[0] * large:.1f} GB and peaks at "
            f"{peak[0] * large:.1f} GB.",
        ]
    )


def pages() -> dict[Path, str]:
    """What each page with figures should hold."""
    found = results()
    suites = [document for _, document in found if document["suite"] == "cpu" and not document["cases"]]
    newest = max(suites, key=lambda document: document["date"])
    return {
        PERFORMANCE: performance(found),
        README: BLOCK.sub(lambda _: f"{table(newest)}\n", README.read_text()),
    }


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
