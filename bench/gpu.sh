#!/usr/bin/env bash
# One command for a GPU node: time, test and check the Triton backend; JSON and the log to $OUT.
#
#   bash bench/gpu.sh [--dry-run] [--only STAGE[,STAGE]] [--tune] [arguments for bench.run, as --cases REGEX]
#
# Stages, in order of importance; each starts only while time is left:
#   bench      the suite "gpu": shares of the copy bandwidth, small problems, memory
#   host       host cost of a step over an empty op
#   tests      tests/test_cuda*.py and test_triton_f*.py, then the contract of the backends on the GPU
#   sanitize   compute-sanitizer, where it is installed
#   peers      the suite "gpu_peers": MONAI and compiled closed forms
#   tune       measures the table of tiles again (only with --tune, or --only tune)
#
# OUT                 where results go (default bench/results); the whole output goes to $OUT/gpu.log
# BUDGET              seconds for everything (default 540)
# DICEKERNELS_WHEEL   a built wheel to test instead of the sources here
# PYTHON              the interpreter (default python3), with torch, triton, numpy, tabulate, pytest
# A folder .whl/ in the repository holds wheels of what it lacks, where no registry is reached: monai for the
# peers, jsonschema with its needs. They go to a folder of their own.
#
# --dry-run prints each command and runs at toy size on the CPU: the suite "quick", a step and two tiles of the
# Triton backend in the interpreter, the compilation of one problem. Results go to a temporary folder unless
# OUT is set.
set -euo pipefail

dry= tune= only=
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry=yes ;;
        --tune) tune=yes ;;
        --only) only=,$2, && shift ;;
        *) break ;;
    esac
    shift
done
for stage in ${only//,/ }; do
    case $stage in
        bench | tests | host | sanitize | peers | tune) ;;
        *) echo "gpu.sh: --only: got $stage, expected some of bench, host, tests, sanitize, peers, tune" >&2 && exit 2 ;;
    esac
done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Absolute, since the folder changes below.
python=$(command -v "${PYTHON:-python3}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
wheel=${DICEKERNELS_WHEEL:+$(realpath "$DICEKERNELS_WHEEL")}
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
[ -z "$dry" ] || : "${OUT:=$stage/results}"
mkdir -p "${OUT:=$root/bench/results}"
OUT=$(cd "$OUT" && pwd)

cd "$root"
if [ -z "$dry" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: torch sees no CUDA device here; run it on a GPU node, or with --dry-run" >&2
    exit 2
fi

exec > >(tee "$OUT/gpu.log") 2>&1
log=$!
# The log ends when nothing writes to it any more.
trap 'exec >&- 2>&-; wait $log || :; rm -rf "$stage"' EXIT

step() {
    printf '+ %s\n' "$*"
    [ -n "$dry" ] || "$@"
}

# Packages of ours and of .whl/ are found here first; nothing is installed into the interpreter.
site=$stage/site
mkdir "$site"
install=("$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site")
[ ! -d .whl ] || step "${install[@]}" .whl/*.whl
if [ -n "$wheel" ]; then
    step "${install[@]}" "$wheel"
    # The sources would hide the installed package: work in a folder with everything but them.
    mkdir "$stage/tree"
    for entry in "$root"/* "$root"/.git; do
        [ "$(basename "$entry")" = dicekernels ] || ln -s "$entry" "$stage/tree/"
    done
    [ -n "$dry" ] || cd "$stage/tree"
fi
export PYTHONPATH=$site:$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

budget=${BUDGET:-540}
failed=

wanted() {
    if [ -n "$only" ]; then
        [ "${only/,$1,/}" != "$only" ]
    else
        [ "$1" != tune ] || [ -n "$tune" ]
    fi
}

# limited CAP COMMAND...: at most CAP seconds and what is left of the budget. What fails is told at the end;
# the others still run.
limited() {
    local cap=$1 left=$((budget - SECONDS)) began=$SECONDS
    shift
    if [ -z "$dry" ] && [ "$left" -lt 20 ]; then
        echo "gpu.sh: no time left for: $*"
        failed="$failed"$'\n'"  (no time left) $*"
        return
    fi
    [ "$left" -gt "$cap" ] || cap=$left
    step timeout --signal=INT --kill-after=10 "$cap" "$@" || failed="$failed"$'\n'"  $*"
    [ -n "$dry" ] || echo "gpu.sh: $((SECONDS - began)) s"
}

workers=$(($(nproc) > 14 ? 12 : $(nproc)))
if "$python" -c 'import xdist' 2> /dev/null; then
    pytest=("$python" -m pytest -q -p no:cacheprovider -n "$workers")
else
    pytest=("$python" -m pytest -q -p no:cacheprovider)
fi
contract=$(cd tests && "$python" -m on_device)

if wanted bench; then
    limited 100 "$python" -m bench.prebuild --suite gpu
    limited 200 "$python" -m bench.run --suite gpu --backend triton --out "$OUT" --budget 150 "$@"
fi
if wanted host; then
    limited 60 "$python" -m bench.host_cost --out "$OUT"
fi
if wanted tests; then
    limited 150 "${pytest[@]}" tests/test_cuda.py tests/test_cuda_graphs.py tests/test_triton_f*.py
    # shellcheck disable=SC2086  # a list of files
    limited 200 env DICEKERNELS_TEST_DEVICE=cuda "${pytest[@]}" -p on_device -m "not slow" $contract
fi
if wanted sanitize; then
    limited 240 "$python" -m bench.sanitize
fi
if wanted peers; then
    limited 300 "$python" -m bench.run --suite gpu_peers --backend triton --out "$OUT" --budget 150 "$@"
fi
if wanted tune; then
    limited 540 "$python" -m bench.tune --out "$OUT" --budget 400
fi

if [ -n "$dry" ]; then
    echo "dry run: at toy size, on the CPU"
    "$python" -m bench.run --suite quick --device cpu --out "$OUT" --rounds 1
    TRITON_INTERPRET=1 "$python" -W ignore - << 'PYTHON'
import torch

import dicekernels

logits, labels = torch.randn(1, 3, 5, 6, 7), torch.randint(3, (1, 1, 5, 6, 7)).to(torch.uint8)
results = []
for backend in ("triton", "eager"):
    with dicekernels.use_backend(backend):
        leaf = logits.clone().requires_grad_()
        loss = dicekernels.DiceCELoss(to_onehot_y=True, softmax=True)(leaf, labels)
        results.append((loss.item(), torch.autograd.grad(loss, leaf)[0]))
(loss, gradient), (truth, slope) = results
error = ((gradient - slope).norm() / slope.norm()).item()
assert abs(loss - truth) < 1e-5 * abs(truth) and error < 1e-5, (loss, truth, error)
print(f"triton in the interpreter: loss {loss:.6f}, eager {truth:.6f}; gradients differ by {error:.1e}")
PYTHON
    "$python" -m bench.tune --dry-run --layouts contiguous --out "$OUT"
    "$python" -m bench.prebuild --capability 90 --limit 1 --workers 1
fi
if [ -n "$failed" ]; then
    echo "gpu.sh: failed:$failed"
    exit 1
fi
