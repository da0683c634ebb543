"""The compiled libraries beside other releases of torch than the one that they were built with.

    python tests/build/other_torch.py 2.14.1 2.15.0

Each release is installed into an environment of its own, which is removed afterwards; there the package is
loaded, and a loss and its gradient on the CPU are compared with the numbers of wheel_gate.py. A release that
pip cannot have is skipped with pip's reason. `make test-torch` runs it; exit status 1 if a release failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from wheel_gate import ROOT, SMOKE, output

HIDDEN = ("PYTHONPATH", "DICEKERNELS_BACKEND", "DICEKERNELS_LIBRARY_PATH", "TRITON_INTERPRET")


def installed(version: str, folder: Path) -> str:
    """Makes the environment ``folder`` with this release; "" or why there is none."""
    output(sys.executable, "-m", "venv", folder)
    command = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", f"torch=={version}", "numpy"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return errors[0] if errors else done.stderr.strip() or "pip failed without a word"


def runs(folder: Path) -> str:
    """What happens to this tree's package in the environment ``folder``, which has a torch.

    Raises:
        AssertionError: it does not load, or its numbers are wrong.
    """
    inside = folder / "bin" / "python"
    ours = Path(output(inside, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A copy, as from a wheel: the libraries of the tree are not to be found by another way.
    without = shutil.ignore_patterns("__pycache__", "_native.*")
    shutil.copytree(ROOT / "dicekernels", ours / "dicekernels", ignore=without)
    environment = {key: value for key, value in os.environ.items() if key not in HIDDEN}
    (folder / "smoke.py").write_text(SMOKE)
    facts = json.loads(output(inside, "smoke.py", cwd=folder, env=environment).splitlines()[-1])
    return (
        f"torch {facts['torch']}: loaded, the loss and the gradient of the CPU library are right; "
        f"CUDA library: {facts['cuda'] or 'loaded'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("versions", nargs="+", help="releases of torch, as 2.14.1")
    good = True
    for version in parser.parse_args().versions:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "environment")
            reason = installed(version, folder)
            if reason:
                print(f"torch {version}: skipped: {reason}", flush=True)
                continue
            try:
                print(runs(folder), flush=True)
            except AssertionError as error:
                good = False
                print(f"torch {version}: FAILED: {error}", flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
