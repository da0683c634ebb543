"""Every block of code in the pages runs alone and prints what it shows; commands exist, figures are read."""

from __future__ import annotations

import doctest
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from processes import captured

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [ROOT / "bench" / "README.md", ROOT / "csrc" / "README.md"]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# The first line of a block that needs what the tests have not; the reader sees it, too.
NOT_RUN = "# not run by the tests: "
BLOCKS = {
    name: [
        (text[: found.start()].count("\n") + 2, found[2])
        for found in FENCE.finditer(text)
        if found[1] == "python"
    ]
    for name, text in TEXTS.items()
}
# In a fresh process: each block in a namespace of its own, its output or its error behind the line.
RUN = """
import contextlib, io, json, sys, traceback
results = []
for line, code in json.load(sys.stdin):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(code, f"line {line}", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc(file=sys.stdout)
    results.append(printed.getvalue())
print(json.dumps(results))
"""


def shown(code: str) -> str:
    """What a block says that it prints: its lines behind "# ->", with "..." for anything."""
    return "".join(f"{line[5:]}\n" for line in code.splitlines() if line.startswith("# -> "))


@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if blocks])
def test_every_block_runs_alone_and_prints_what_it_shows(page: str) -> None:
    pytest.importorskip("monai")
    blocks = [block for block in BLOCKS[page] if not block[1].startswith(NOT_RUN)]
    command = [sys.executable, "-c", RUN]
    done = captured(command, input=json.dumps(blocks), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    wrong = [
        f"{page}:{line} printed\n{got}in place of\n{shown(code)}"
        for (line, code), got in zip(blocks, printed, strict=True)
        if not doctest.OutputChecker().check_output(shown(code), got, options)
    ]
    assert not wrong, "\n".join(wrong)


def test_blocks_that_are_not_run_are_these() -> None:
    skipped = {name: sum(code.startswith(NOT_RUN) for _, code in blocks) for name, blocks in BLOCKS.items()}
    assert {name: count for name, count in skipped.items() if count} == {}
    assert sum(map(len, BLOCKS.values())) >= 22


def test_the_figures_are_those_of_the_committed_results() -> None:
    pytest.importorskip("tabulate")
    pytest.importorskip("monai")
    from bench import readme

    for page, text in readme.pages().items():
        assert page.read_text() == text, f"{page.name}: run python -m bench.readme"
    assert len(readme.README.read_text().splitlines()) <= 120


def test_the_table_of_the_readme_against_the_result_file() -> None:
    """The third row by hand: bytes and milliseconds of the file, a wrong result without its time."""
    pytest.importorskip("tabulate")
    pytest.importorskip("monai")
    from bench import readme

    _, document = readme.results()[0]
    timings, memory = (
        {
            row["contender"]: row
            for row in document[key]
            if row["case"]["loss"] == "dice_ce" and row["case"]["shape"][1] == 117
            if row.get("allocator", "default") == "default"
        }
        for key in ("timings", "memory")
    )
    times = [timings[name]["milliseconds"]["both"]["median"] for name in ("dicekernels", "MONAI")]
    used = [memory[name]["profiled"] for name in ("dicekernels", "MONAI")]
    sizes = [use["kept"] for use in used] + [use["kept"] + use["backward_peak"] for use in used]
    cells = [f"{time:.1f} ms" for time in times] + [f"{size / 1e6:.1f} MB" for size in sizes]
    (row,) = re.findall(r"^\| 1 x 117 x 64³.*", readme.table(document), re.MULTILINE)
    assert [cell.strip() for cell in row.split("|")[3:-1]] == cells
    timings["MONAI"]["check"]["passed"] = False
    (row,) = re.findall(r"^\| 1 x 117 x 64³.*", readme.table(document), re.MULTILINE)
    assert [cell.strip() for cell in row.split("|")[3:5]] == [cells[0], "- ms"]


def test_a_part_of_a_suite_is_shown_until_the_whole_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tabulate")
    pytest.importorskip("monai")
    from bench import readme, schema

    _, document = next(entry for entry in readme.results() if not entry[1]["cases"])
    later, before = "2027-01-01T00:00:00+00:00", "2020-01-01T00:00:00+00:00"
    for cases, date in (("", document["date"]), ("dice", later), ("gdl", before)):
        schema.save(document | {"cases": cases, "date": date}, tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert [shown["cases"] for _, shown in readme.results()] == ["", "dice"]


def commands(text: str) -> list[list[str]]:
    """Words of each line of a block that is not Python, and of each `span`; a quotation is one word."""
    fences = [found[2] for found in FENCE.finditer(text) if found[1] in ("", "bash", "sh")]
    rest = FENCE.sub("", text)
    lines = [line for block in fences for line in block.splitlines()]
    lines += re.findall(r"^ {4}(.*)", rest, re.MULTILINE)
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    unquoted = [re.sub(r"""(['"]).*?\1""", "QUOTED", line) for line in lines]
    return [line.split(" #")[0].replace("[", "").replace("]", "").split() for line in unquoted]


def called(program: str) -> list[tuple[str, list[str]]]:
    """(page, words behind ``program``) of every command that runs it, whatever is set before it."""
    words = program.split()
    found = []
    for page, text in TEXTS.items():
        for line in commands(text):
            while line and re.match(r"[A-Z_]+=", line[0]):
                line = line[1:]
            if line[: len(words)] == words and len(line) > len(words):
                found.append((page, line[len(words) :]))
    return found


def options(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def test_every_verb_and_variable_of_make_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    verbs = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    found = called("make")
    assert len(found) >= 10
    for page, words in found:
        for word in words:
            name, is_variable, _ = word.partition("=")
            assert f"$({name})" in makefile if is_variable else name in verbs, f"{page}: make {word}"


def test_every_module_that_is_run_exists_and_takes_the_options() -> None:
    found = called("python -m")
    assert len(found) >= 10
    for page, (module, *words) in found:
        where = f"{page}: python -m {module} {' '.join(words)}"
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None, where
        if not module.startswith(("bench.", "dicekernels")):
            continue
        path = Path(spec.origin)
        source = (path.with_name("__main__.py") if path.name == "__init__.py" else path).read_text()
        assert "__main__" in source or path.name == "__init__.py", where
        for option in options(words):
            assert f'"{option}"' in source or f'"{option.replace("--no-", "--")}"' in source, where


def test_every_file_of_a_command_exists_and_takes_the_options() -> None:
    for page, text in TEXTS.items():
        for file in re.findall(r"\b(?:bench|tests)/[\w/*-]+\.(?:json|py|sh)\b", text):
            assert list(ROOT.glob(file)), f"{page}: {file}"
    scripts = called("bash")
    assert scripts
    for page, (script, *words) in scripts:
        for option in options(words):
            assert option in (ROOT / script).read_text(), f"{page}: {script} {option}"


def test_every_file_that_a_page_names_exists() -> None:
    sources = {".cmake", ".cpp", ".cu", ".cuh", ".h", ".json", ".md", ".py", ".sh", ".toml"}
    folders = [ROOT / name for name in ("bench", "csrc", "dicekernels", "docs", "tests")]
    known = [*ROOT.iterdir(), *(file for folder in folders for file in folder.rglob("*"))]
    files = [f"/{file.relative_to(ROOT)}" for file in known if file.suffix in sources]
    for page, text in TEXTS.items():
        prose = FENCE.sub("", text)
        for link in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"
        for span in re.findall(r"`([\w./-]+)`", prose):
            if Path(span).suffix in sources and span not in ("Python.h", "_build_info.json"):
                assert any(file.endswith(f"/{span}") for file in files), f"{page}: {span}"


def test_the_layout_of_the_package_names_every_module() -> None:
    page = (ROOT / "docs" / "contributing.md").read_text()
    table = page[page.index("## Layout") : page.index("## Rules")]
    modules = {path.name for path in (ROOT / "dicekernels").glob("[a-z]*.py")}
    named = set(re.findall(r"`(?:dicekernels/)?(\w+\.py)`", table))
    assert modules <= named, modules - named
