"""``python -m bench.static_cuda``: read the machine code of the compiled CUDA library, without a GPU.

Everything is written to bench/results/static-cuda.json. Any option that restricts it prints the tables
alone, unless ``--json`` says where to write. See README.md for what the columns mean.

    python -m bench.static_cuda --capability 90 --classes 4 14 --dtype float32 --op forward
    python -m bench.static_cuda --capability 90 --kernel finish
    python -m bench.static_cuda ... --names           # instructions of the hot loops, by name
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import sass, static_facts, static_library, static_report
from bench.static_library import instance
from bench.static_plan import ELEMENT_BYTES
from dicekernels.backends import native


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    library: Path = options.library
    if not library.is_file():
        raise SystemExit(f"bench.static_cuda: {library} not found; run `make build-tests`, with nvcc on PATH")
    used = static_library.usage(library)
    missing = sorted(set(options.capability or ()) - set(used))
    if missing:
        raise SystemExit(f"--capability: got {missing}, expected some of {sorted(used)}, which are built")
    problems = static_facts.problems(options.classes, options.dtype, options.op)
    code = static_library.kernels(library, options.capability or sorted(used))
    kernels, elements = static_facts.rows(code, used, [] if options.kernel else problems)
    asked = {problem.instance for problem in problems}
    if options.kernel:
        kernels = [row for row in kernels if options.kernel in row["kernel"]]
    elif options.classes or options.dtype or options.op:
        kernels = [row for row in kernels if instance(row["kernel"]) in asked]
    if not kernels:
        raise SystemExit("bench.static_cuda: no kernel of the library has these properties")
    print(static_report.tables(kernels, elements))
    if options.names:
        for row in kernels:
            kernel = code[row["capability"]][row["kernel"]]
            hot = static_facts.hottest(kernel)
            named = sass.names(kernel.code if hot is None else kernel.inside(hot)).most_common(24)
            text = " ".join(f"{name}x{count}" for name, count in named)
            print(f"\n{row['kernel']} sm_{row['capability']}: {text}")
    if options.json:
        found = static_report.document(static_library.architectures(library), kernels, elements)
        static_report.save(found, options.json)
        print(f"written: {options.json}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.static_cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--library", type=Path, default=native.library_path("cuda"))
    parser.add_argument("--capability", type=int, nargs="+", metavar="SM")
    parser.add_argument("--kernel", metavar="TEXT", help="kernels whose name holds it, without problems")
    parser.add_argument("--classes", type=int, nargs="+", metavar="C", help="problems, with their kernels")
    parser.add_argument("--dtype", nargs="+", choices=tuple(ELEMENT_BYTES))
    parser.add_argument("--op", nargs="+", choices=static_facts.OPS)
    parser.add_argument("--names", action="store_true", help="instructions of the hot loops by name")
    parser.add_argument("--json", type=Path, help="default for everything: bench/results/static-cuda.json")
    options = parser.parse_args(arguments)
    restricted = (options.capability, options.kernel, options.classes, options.dtype, options.op)
    if not any(restricted) and options.json is None:
        options.json = static_report.RESULTS
    return options


if __name__ == "__main__":
    main()
