"""Programs that a test runs and whose output it reads, and what is compiled once for all tests."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

captured = functools.partial(subprocess.run, capture_output=True, text=True)


def compiled_once(
    tmp_path_factory: pytest.TempPathFactory, name: str, compile_into: Callable[[Path], None]
) -> Path:
    """The folder that ``compile_into`` has filled. All workers share one compilation."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    base = tmp_path_factory.getbasetemp()
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    folder = base.parent / f"built-{run}-{name}" if run else base / f"built-{name}"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            compile_into(folder)
            (folder / "done").touch()
    return folder
