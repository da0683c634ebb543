#!/usr/bin/env bash
# One command for a GPU node: build, test, and measure every backend that exists; JSON to $OUT.
#
#   bash bench/gpu.sh [--dry-run] [arguments for bench.run, as --no-compiled or --cases REGEX]
#
# OUT                 where results go (default bench/results)
# DICEKERNELS_WHEEL   a built wheel to install instead of building here
# PYTHON              the interpreter (default python3)
# A folder .whl/ in the repository holds wheels of peers to install where no registry is reached.
#
# --dry-run prints each command and runs only a toy suite, on the CPU: it needs no GPU. Its results
# go to a temporary folder unless OUT is set.
set -euo pipefail

dry=
if [ "${1:-}" = --dry-run ]; then
    dry=yes
    shift
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Absolute, since the folder changes below.
python=$(command -v "${PYTHON:-python3}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
wheel=${DICEKERNELS_WHEEL:+$(realpath "$DICEKERNELS_WHEEL")}
[ -z "$dry" ] || : "${OUT:=$(mktemp -d)}"
mkdir -p "${OUT:=$root/bench/results}"
OUT=$(cd "$OUT" && pwd)

step() {
    printf '+ %s\n' "$*"
    [ -n "$dry" ] || "$@"
}

cd "$root"
if [ -z "$dry" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: torch sees no CUDA device here; run it on a GPU node, or with --dry-run" >&2
    exit 2
fi

if [ -d .whl ]; then
    step "$python" -m pip install --quiet --no-index --no-deps --find-links .whl .whl/*.whl
fi
if [ -n "$wheel" ]; then
    step "$python" -m pip install --quiet --no-index --no-deps --force-reinstall "$wheel"
    # The sources would hide the installed package: work in a folder with everything but them.
    stage=$(mktemp -d)
    trap 'rm -rf "$stage"' EXIT
    for entry in "$root"/* "$root"/.git; do
        [ "$(basename "$entry")" = dicekernels ] || ln -s "$entry" "$stage/"
    done
    [ -n "$dry" ] || cd "$stage"
else
    step "$python" -m pip install --quiet --no-build-isolation --no-deps --editable .
fi

failed=
run_all() {
    # A red test or suite is reported at the end; the others still run.
    step "$@" || failed="$failed"$'\n'"  $*"
}

run_all "$python" -m pytest -q
usable='
import dicekernels, sys
for name, reason in dicekernels.available_backends().items():
    if reason:
        print(f"gpu.sh: no backend {name}: {reason}", file=sys.stderr)
    else:
        print(name)
'
backends=$("$python" -c "$usable")
for backend in $backends; do
    suite=gpu
    [ "$backend" != cpu ] || suite=cpu
    run_all "$python" -m bench.run --suite "$suite" --backend "$backend" --out "$OUT" "$@"
done

if [ -n "$dry" ]; then
    echo "dry run: the toy suite, on the CPU"
    "$python" -m bench.run --suite quick --device cpu --out "$OUT" --rounds 1
fi
if [ -n "$failed" ]; then
    echo "gpu.sh: failed:$failed" >&2
    exit 1
fi
