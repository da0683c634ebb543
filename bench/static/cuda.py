"""``python -m bench.static.cuda``: read the machine code of the compiled CUDA library, without a GPU.

Everything is written to bench/results/static-cuda.json. Any option that restricts it prints the tables
alone, unless ``--json`` says where to write. See README.md for what the columns mean.

    python -m bench.static.cuda --capability 90 --classes 4 14 --dtype float32 --op forward
    python -m bench.static.cuda --capability 90 --kernel finish
    python -m bench.static.cuda ... --names           # instructions of the hot loops, by name
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import schema
from bench.static import cuda_facts, library, sass, tables
from dicekernels.backends import native

RESULTS = schema.ROOT / "bench" / "results" / "static-cuda.json"


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    path: Path = options.library
    if not path.is_file():
        raise SystemExit(f"bench.static.cuda: {path} not found; run `make build-tests` where nvcc is on PATH")
    used = library.usage(path)
    missing = sorted(set(options.capability or ()) - set(used))
    if missing:
        raise SystemExit(f"--capability: got {missing}, expected some of {sorted(used)}, which are built")
    problems = cuda_facts.problems(options.classes, options.dtype, options.op)
    code = library.kernels(path, options.capability or sorted(used))
    kernels, elements = cuda_facts.rows(code, used, [] if options.kernel else problems)
    asked = {problem.instance for problem in problems}
    if options.kernel:
        kernels = [row for row in kernels if options.kernel in row["kernel"]]
    elif options.classes or options.dtype or options.op:
        kernels = [row for row in kernels if library.instance(row["kernel"]) in asked]
    if not kernels:
        raise SystemExit("bench.static.cuda: no kernel of the library has these properties")
    print(tables.compiled(kernels, elements))
    if options.names:
        for row in kernels:
            kernel = code[row["capability"]][row["kernel"]]
            hot = cuda_facts.hottest(kernel)
            named = sass.names(kernel.code if hot is None else kernel.inside(hot)).most_common(24)
            text = " ".join(f"{name}x{count}" for name, count in named)
            print(f"\n{row['kernel']} sm_{row['capability']}: {text}")
    if options.json:
        save(path, kernels, elements, options.json)


# What stays of a row: what a kernel takes; the warps and instructions of a problem.
KERNELS = ("kernel", "capability", "registers", "stack_bytes", "spill_loads", "spill_stores", "narrow")
PROBLEMS = ("op", "capability", "classes", "dtype", "registers", "resident_warps", "per_element")


def save(path: Path, kernels: list[tables.Row], problems: list[tables.Row], out: Path) -> None:
    tools = {"cuobjdump": tables.tool_versions()["cuobjdump"]}
    cuda = (native.build_config() or {}).get("cuda")
    if cuda:
        tools["nvcc"] = cuda["nvcc"]
    machine, ptx = (
        sorted(found, key=lambda sm: int(sm.rstrip("af"))) for found in library.architectures(path)
    )
    tables.save(
        "static-cuda",
        out,
        tools,
        architectures=[f"sm_{sm}" for sm in machine],
        ptx=[f"compute_{sm}" for sm in ptx],
        kernels=schema.pack(kernels, KERNELS),
        problems=schema.pack(problems, PROBLEMS),
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.static.cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--library", type=Path, default=native.library_path("cuda"))
    parser.add_argument("--capability", type=int, nargs="+", metavar="SM")
    parser.add_argument("--kernel", metavar="TEXT", help="kernels whose name holds it, without problems")
    parser.add_argument("--classes", type=int, nargs="+", metavar="C", help="problems, with their kernels")
    parser.add_argument("--dtype", nargs="+", choices=tuple(cuda_facts.ELEMENT_BYTES))
    parser.add_argument("--op", nargs="+", choices=cuda_facts.OPS)
    parser.add_argument("--names", action="store_true", help="instructions of the hot loops by name")
    parser.add_argument("--json", type=Path, help="default for everything: bench/results/static-cuda.json")
    options = parser.parse_args(arguments)
    restricted = (options.capability, options.kernel, options.classes, options.dtype, options.op)
    if not any(restricted) and options.json is None:
        options.json = RESULTS
    return options


if __name__ == "__main__":
    main()
