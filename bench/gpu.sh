#!/usr/bin/env bash
# One command for a GPU node: build, test, time and check both backends of a GPU; JSON and the log to $OUT.
#
#   bash bench/gpu.sh [--dry-run] [--only STAGE[,STAGE]] [--tune] [arguments for bench.run, as --cases REGEX]
#
# Stages, in order of importance; each starts only while time is left:
#   build      the CUDA library for this GPU alone (build/gpu), and what python -m dicekernels.env says
#   check      tests/backends/test_cuda*.py on the first backend, without what takes long
#   bench      the suite "gpu": both backends beside each other, shares of the copy bandwidth, memory
#   tests      the CUDA kernels plan by plan, the contract (with gradcheck) on cuda, triton and eager, then
#              test_cuda*.py and test_triton_f*.py of tests/backends on both
#   sanitize   compute-sanitizer, where it is installed
#   host       host cost of a step over an empty op
#   peers      the suite "gpu_peers": MONAI and compiled closed forms
#   tune       measures Triton's table of tiles again (only with --tune, or --only tune)
# The library is built for every choice of stages but tune. If that fails, the others run on triton and say so.
#
# OUT                 where results go (default bench/results); the whole output goes to $OUT/gpu.log
# BUDGET              seconds for everything (default 540)
# DICEKERNELS_WHEEL   a built wheel to test instead of the sources here; nothing is built then
# DICEKERNELS_LIBRARY_PATH   a folder with a built library: neither
# PYTHON              the interpreter (default python3), with torch, triton, numpy, tabulate, pytest; to build,
#                     cmake and ninja beside it or on PATH, and nvcc (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)
# A folder .whl/ in the repository holds wheels of what it lacks, where no registry is reached: monai for the
# peers, jsonschema with its needs. They go to a folder of their own.
#
# --dry-run prints each command and runs at toy size on the CPU: the suite "quick", a step and two tiles of the
# Triton backend in the interpreter, the compilation of one problem, the sanitizer's problems. Results go to a
# temporary folder unless OUT is set.
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
stages="build, check, bench, tests, sanitize, host, peers, tune"
for stage in ${only//,/ }; do
    case ", $stages," in
        *" $stage,"*) ;;
        *) echo "gpu.sh: --only: got $stage, expected some of $stages" >&2 && exit 2 ;;
    esac
done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Absolute, since the folder changes below.
python=$(command -v "${PYTHON:-python3}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
wheel=${DICEKERNELS_WHEEL:+$(realpath "$DICEKERNELS_WHEEL")}
[ -z "${DICEKERNELS_LIBRARY_PATH:-}" ] || DICEKERNELS_LIBRARY_PATH=$(realpath "$DICEKERNELS_LIBRARY_PATH")
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
export PYTHONPATH=$site:$PWD:$PWD/tests/support:$PWD/tests/ops${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

budget=${BUDGET:-540}
failed=

wanted() {
    if [ -n "$only" ]; then
        [ "${only/,$1,/}" != "$only" ]
    else
        [ "$1" != tune ] || [ -n "$tune" ]
    fi
}

# within CAP: at most CAP seconds, and what is left of the budget.
within() {
    local left=$((budget - SECONDS))
    echo $((left < $1 ? left : $1))
}

# limited CAP COMMAND...: within CAP seconds. What fails is told at the end, and leaves $ok empty; the others
# still run.
limited() {
    local cap began=$SECONDS
    cap=$(within "$1")
    shift
    ok=
    if [ -z "$dry" ] && [ "$cap" -lt 20 ]; then
        echo "gpu.sh: no time left for: $*"
        failed="$failed"$'\n'"  (no time left) $*"
        return
    fi
    if step timeout --signal=INT --kill-after=10 "$cap" "$@"; then
        ok=yes
    else
        failed="$failed"$'\n'"  $*"
    fi
    [ -n "$dry" ] || echo "gpu.sh: $((SECONDS - began)) s"
}

# The program of that name beside the interpreter, else the one on PATH.
tool() {
    local beside
    beside=$(dirname "$python")/$1
    if [ -x "$beside" ]; then echo "$beside"; else command -v "$1" || echo "$1"; fi
}

# The CUDA library alone, for the GPU that is here; a second run compiles what has changed.
build_library() {
    local torch_folder library=$root/build/gpu
    export TORCH_CUDA_ARCH_LIST=9.0
    [ -n "$dry" ] || TORCH_CUDA_ARCH_LIST=$("$python" -c \
        'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    torch_folder=$("$python" -c 'import torch; print(torch.__path__[0])')
    if [ -z "${CUDACXX:-}${CUDA_HOME:-}" ] && ! command -v nvcc > /dev/null && [ -x /usr/local/cuda/bin/nvcc ]; then
        export CUDACXX=/usr/local/cuda/bin/nvcc
    fi
    # What an earlier run has built must not pass for what fails to build now.
    [ -n "$dry" ] || rm -f "$library/libdicekernels_cuda.so"
    limited 60 "$(tool cmake)" -S "$root" -B "$library" -G Ninja "-DCMAKE_MAKE_PROGRAM=$(tool ninja)" \
        -DDICEKERNELS_BUILD=cuda "-DDICEKERNELS_ARCH_LIST=$TORCH_CUDA_ARCH_LIST" \
        "-DDICEKERNELS_TORCH_DIR=$torch_folder"
    if [ -n "$ok" ]; then
        limited 240 "$(tool cmake)" --build "$library" --target dicekernels_cuda --parallel "$(nproc)"
    fi
    if [ -n "$ok" ] && [ -z "$dry" ]; then
        export DICEKERNELS_LIBRARY_PATH=$library
    fi
}

usable_backends() {
    "$python" -c 'from dicekernels import available_backends
print(*(name for name in ("cuda", "triton") if name in available_backends()))'
}

workers=$(($(nproc) > 14 ? 12 : $(nproc)))
if "$python" -c 'import xdist' 2> /dev/null; then
    pytest=("$python" -m pytest -q -p no:cacheprovider -n "$workers")
else
    pytest=("$python" -m pytest -q -p no:cacheprovider)
fi
on_gpu=(DICEKERNELS_TEST_DEVICE=cuda "${pytest[@]}" -p on_device -m "not slow")

if [ -z "$wheel" ] && [ -z "${DICEKERNELS_LIBRARY_PATH:-}" ] && [ "$only" != ,tune, ]; then
    build_library
fi
limited 60 "$python" -m dicekernels.env
backends="cuda triton"
if [ -z "$dry" ]; then
    backends=$(usable_backends) || { unset DICEKERNELS_LIBRARY_PATH && backends=$(usable_backends); }
    if [ "${backends#cuda}" = "$backends" ]; then
        echo "gpu.sh: backend cuda is not here, see above: what follows runs on: ${backends:-eager}"
        failed="$failed"$'\n'"  backend cuda is not here: nothing of it was run"
    fi
fi

if wanted check; then
    limited 120 env DICEKERNELS_BACKEND="${backends%% *}" "${pytest[@]}" \
        tests/backends/test_cuda.py tests/backends/test_cuda_graphs.py \
        -k "not (inductor or reduce_overhead or two_to_the_31 or far_apart)"
fi
if wanted bench; then
    limited 100 "$python" -m bench.gpu.prebuild --suite gpu
    limited 200 "$python" -m bench.run --suite gpu --out "$OUT" --budget "$(within 170)" "$@"
fi
# shellcheck disable=SC2046  # lists of files
if wanted tests; then
    if [ "${backends#cuda}" != "$backends" ]; then
        limited 200 env DICEKERNELS_BACKEND=cuda "${on_gpu[@]}" $("$python" -m on_device cuda_kernels)
    fi
    for backend in $backends eager; do
        limited 200 env DICEKERNELS_BACKEND="$backend" "${on_gpu[@]}" $("$python" -m on_device)
    done
    limited 200 "${pytest[@]}" tests/backends/test_{cuda,cuda_graphs,triton_finish,triton_formulas}.py
fi
if wanted sanitize; then
    # shellcheck disable=SC2086  # a list of names
    limited 320 "$python" -m bench.gpu.sanitize --backends $backends --budget "$(within 300)"
fi
if wanted host; then
    for backend in $backends; do
        limited 60 "$python" -m bench.host_cost --backend "$backend" --out "$OUT"
    done
fi
if wanted peers; then
    limited 300 "$python" -m bench.run --suite gpu_peers --out "$OUT" --budget "$(within 150)" "$@"
fi
if wanted tune; then
    limited 540 "$python" -m bench.gpu.tune --out "$OUT" --budget "$(within 400)"
fi

if [ -n "$dry" ]; then
    echo "dry run: at toy size, on the CPU"
    "$python" -m bench.run --suite quick --device cpu --out "$OUT" --rounds 1
    TRITON_INTERPRET=1 "$python" -W ignore - << 'PYTHON'
import torch

import dicekernels

torch.manual_seed(0)
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
print(f"triton in the interpreter: loss {loss:.5f}, eager {truth:.5f}; gradients differ by {error:.1e}")
PYTHON
    "$python" -m bench.gpu.tune --dry-run --layouts contiguous --out "$OUT"
    "$python" -m bench.gpu.prebuild --capability 90 --limit 1 --workers 1
    "$python" -m bench.gpu.sanitize --problems --device cpu --backends eager
fi
if [ -n "$failed" ]; then
    echo "gpu.sh: failed:$failed"
    exit 1
fi
