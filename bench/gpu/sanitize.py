"""``python -m bench.gpu.sanitize``: compute-sanitizer over small problems, on each backend of a GPU.

memcheck: accesses out of bounds. racecheck: hazards in shared memory. initcheck: reads of memory that nothing
wrote. synccheck: barriers that not all threads reach. The problems run once without a tool, which compiles
Triton's kernels; torch's allocator does not cache: each tensor is an allocation with bounds of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from typing import NamedTuple

BACKENDS = ("cuda", "triton")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


class Problem(NamedTuple):
    """loss: of bench/cases.py over labels; "values" (sigmoid, with a mask) and "soft values" (softmax) have a
    dense target. ignored: voxels of class 1 are."""

    loss: str
    classes: int
    space: tuple[int, ...]
    dtype: str = "float32"
    channels_last: bool = False
    ignored: bool = False


# Tiles that are full and that are not, more than one chunk (4096 voxels), rows that 16-byte accesses divide
# and that they do not; classes that a warp has alone and that warps share; of csrc/cuda the fast kernels with
# and without the focal term, labels that they read where they lie and others, and the general kernels.
PROBLEMS = (
    Problem("dice_ce", 3, (17, 241), ignored=True),
    Problem("values", 4, (16, 16, 16), "bfloat16"),
    Problem("dice_ce", 14, (5, 29, 31), channels_last=True),
    Problem("dice_ce", 14, (16, 16, 17), "bfloat16"),
    Problem("gdl", 32, (4, 33, 32), "bfloat16", channels_last=True, ignored=True),
    Problem("dice_ce", 117, (5, 29, 31)),
    Problem("tversky", 117, (3, 5, 7), "bfloat16", channels_last=True),
    Problem("dice_focal", 4, (16, 16, 17)),
    Problem("dice_focal", 32, (8, 9, 8), "bfloat16", channels_last=True),
    Problem("dice_focal", 117, (5, 8, 16), "bfloat16", ignored=True),
    Problem("values", 2, (5, 29, 31), channels_last=True),
    # 4 and 140 classes: a lane and several lanes a voxel, of which the last tile has fewer than a warp takes.
    Problem("soft values", 4, (5, 29, 31)),
    Problem("soft values", 140, (5, 7, 9), "bfloat16"),
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.sanitize", description=__doc__)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--device", default="cuda", help="cpu: a dry run, of triton with TRITON_INTERPRET=1")
    parser.add_argument("--seconds", type=float, default=60, help="for each tool and backend")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for everything")
    parser.add_argument("--problems", action="store_true", help="only run the problems, in this process")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.budget
    if options.problems:
        print(f"{sum(run_problems(options.device, name) for name in options.backends)} problems ran")
        return
    backends = [name for name in options.backends if _usable(name)]
    if not backends:
        raise SystemExit("bench.gpu.sanitize: no backend to check")
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None:
        raise SystemExit(
            "bench.gpu.sanitize: no compute-sanitizer on PATH or in /usr/local/cuda/bin: nothing was checked"
        )
    own = [sys.executable, "-m", "bench.gpu.sanitize", "--problems", "--device", options.device, "--backends"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    subprocess.run([*own, *backends], env=environment, check=True)
    found: dict[str, list[str]] = {"clean": [], "did not end": [], "FAILED": []}
    for tool, backend in in_order(options.tools, backends):
        left = min(options.seconds, end - time.monotonic())
        job = f"{tool} of {backend}"
        if left < 5:
            found["did not end"].append(f"{job} (no time left)")
            continue
        command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "5", *own, backend]
        print("+", *command, flush=True)
        try:
            code = subprocess.run(command, env=environment, timeout=left).returncode
        except subprocess.TimeoutExpired:
            found["did not end"].append(f"{job} ({left:.0f} s)")
            continue
        found["FAILED" if code else "clean"].append(f"{job} (exit code {code})" if code else job)
    for verdict, jobs in found.items():
        print(f"bench.gpu.sanitize: {verdict}: {', '.join(jobs) or 'none'}")
    if found["FAILED"]:
        raise SystemExit(1)


def in_order(tools: list[str], backends: list[str]) -> list[tuple[str, str]]:
    """(tool, backend): one backend after the other, and last what finds the least."""
    jobs = [(tool, backend) for backend in backends for tool in tools]
    return sorted(jobs, key=lambda job: job[0] == "synccheck")


def _usable(backend: str) -> bool:
    from dicekernels import unavailable_backends

    reason = unavailable_backends().get(backend)
    if reason:
        print(f"bench.gpu.sanitize: not checked: backend {backend!r}: {reason}")
    return not reason


def run_problems(device: str, backend: str) -> int:
    """Forward and backward of each problem once; how many there are."""
    import torch

    import dicekernels
    from bench.cases import torch_dtype
    from dicekernels import functional

    losses = {
        "dice_ce": functional.dice_ce_loss,
        "gdl": functional.generalized_dice_loss,
        "tversky": functional.tversky_loss,
        "dice_focal": functional.dice_focal_loss,
    }
    for problem in PROBLEMS:
        shape = (2, problem.classes, *problem.space)
        kind = {2: torch.channels_last, 3: torch.channels_last_3d}[len(problem.space)]
        logits = torch.randn(shape, device=device).to(torch_dtype(problem.dtype))
        logits = logits.contiguous(memory_format=kind if problem.channels_last else torch.contiguous_format)
        logits.requires_grad_()
        with dicekernels.use_backend(backend):
            if problem.loss == "values":
                mask = torch.rand((2, 1, *problem.space), device=device)
                values = torch.rand(shape, device=device)
                loss = functional.tversky_loss(logits, values, sigmoid=True, mask=mask)
            elif problem.loss == "soft values":
                values = torch.rand(shape, device=device).softmax(1)
                loss = functional.dice_ce_loss(logits, values, softmax=True)
            else:
                labels = torch.randint(problem.classes, (2, 1, *problem.space), device=device).to(torch.uint8)
                options = {
                    "to_onehot_y": True,
                    "softmax": True,
                    "ignore_index": 1 if problem.ignored else None,
                }
                loss = losses[problem.loss](logits, labels, **options)
        torch.autograd.grad(loss, logits)
    if device == "cuda":
        torch.cuda.synchronize()
    return len(PROBLEMS)


if __name__ == "__main__":
    main()
