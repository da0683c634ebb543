"""``python -m bench.readme RESULT``: the README's section "Measured", from a result file alone."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tabulate import tabulate

from bench import report, schema

README = schema.ROOT / "README.md"
BLOCK = re.compile(r"(<!-- measured: begin (?P<file>\S*) ?-->\n).*?(<!-- measured: end -->)", re.DOTALL)


def section(document: schema.Document) -> str:
    """Time and memory as Markdown, with where and when they were taken."""
    memory = [line for line in report.memory_lines(document["memory"]) if line[1] in ("dicekernels", "MONAI")]
    tables = [
        tabulate(lines, heads, tablefmt="github", disable_numparse=True)
        for lines, heads in (
            (report.summary_lines(document), report.SUMMARY_HEADS),
            (memory, report.MEMORY_HEADS),
        )
    ]
    return "\n\n".join(
        [
            "Time of forward + backward: ours over a plain pass with the floor's traffic, and against the "
            "peers; all interleaved in one process, checked against float64 first "
            "([method](bench/README.md)). Allocator: raised keeps freed memory in the process, default is "
            "glibc's own.",
            tables[0],
            "Memory in multiples of the logits' size: what torch's allocator handed out, and the resident "
            "size of a process of its own.",
            tables[1],
            "\n".join(f"    {line}" for line in report.header(document).splitlines()),
        ]
    )


def write(path: Path) -> None:
    """Put the section of the result file at ``path`` between the README's markers."""
    shown = path.resolve().relative_to(schema.ROOT)
    block = f"<!-- measured: begin {shown} -->\n{section(schema.load(path))}\n<!-- measured: end -->"
    README.write_text(BLOCK.sub(lambda _: block, README.read_text()))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
