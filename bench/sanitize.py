"""``python -m bench.sanitize``: compute-sanitizer over small problems of the Triton backend.

memcheck: accesses out of bounds. racecheck: hazards in shared memory. initcheck: reads of memory that nothing
wrote. synccheck: barriers that not all threads reach. The problems run once without a tool, which compiles
their kernels; torch's allocator does not cache, so that each tensor is an allocation with bounds of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# (classes, space, dtype, channels last, values under a mask): tiles that are full and that are not, more than
# one chunk (4096 voxels), rows that 16-byte accesses divide and that they do not.
PROBLEMS = (
    (3, (17, 241), "float32", False, False),
    (4, (16, 16, 16), "bfloat16", False, True),
    (14, (5, 29, 31), "float32", True, False),
    (14, (16, 16, 17), "bfloat16", False, False),
    (32, (4, 33, 32), "bfloat16", True, False),
    (117, (5, 29, 31), "float32", False, False),
    (117, (3, 5, 7), "bfloat16", True, False),
    (2, (5, 29, 31), "float32", True, True),
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument(
        "--device", default="cuda", help="cpu: with TRITON_INTERPRET=1, a dry run of the problems"
    )
    parser.add_argument("--seconds", type=float, default=60, help="for each tool")
    parser.add_argument("--problems", action="store_true", help="only run the problems, in this process")
    options = parser.parse_args(arguments)
    if options.problems:
        print(f"{run_problems(options.device)} problems ran")
        return
    own = [sys.executable, "-m", "bench.sanitize", "--problems", "--device", options.device]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    subprocess.run(own, env=environment, check=True)
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None:
        raise SystemExit(
            "bench.sanitize: no compute-sanitizer on the PATH or in /usr/local/cuda/bin: nothing was checked"
        )
    failed = []
    for tool in options.tools:
        command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "5", *own]
        print("+", *command, flush=True)
        try:
            code = subprocess.run(command, env=environment, timeout=options.seconds).returncode
        except subprocess.TimeoutExpired:
            print(f"bench.sanitize: {tool} did not end in {options.seconds:.0f} s")
            continue
        if code:
            failed.append(f"{tool} (exit code {code})")
    if failed:
        raise SystemExit(f"bench.sanitize: {', '.join(failed)}")
    print(f"bench.sanitize: clean: {', '.join(options.tools)}, but for tools that did not end")


def run_problems(device: str) -> int:
    """Forward and backward of each problem once; how many there are."""
    import torch

    import dicekernels
    from bench.cases import torch_dtype
    from dicekernels import functional

    for classes, space, dtype, last, dense in PROBLEMS:
        kind = {2: torch.channels_last, 3: torch.channels_last_3d}[len(space)]
        logits = torch.randn((2, classes, *space), device=device).to(torch_dtype(dtype))
        logits = logits.contiguous(memory_format=kind if last else torch.contiguous_format).requires_grad_()
        with dicekernels.use_backend("triton"):
            if dense:
                mask = torch.rand((2, 1, *space), device=device)
                values = torch.rand((2, classes, *space), device=device)
                loss = functional.tversky_loss(logits, values, sigmoid=True, mask=mask)
            else:
                labels = torch.randint(classes, (2, 1, *space), device=device).to(torch.uint8)
                loss = functional.dice_ce_loss(logits, labels, to_onehot_y=True, softmax=True, ignore_index=1)
        torch.autograd.grad(loss, logits)
    if device == "cuda":
        torch.cuda.synchronize()
    return len(PROBLEMS)


if __name__ == "__main__":
    main()
