#!/usr/bin/env bash
# Build the wheel into dist/, install it in an empty virtual environment and use it in an empty folder, as a user would.
# Usage: scripts/try_wheel.sh [PYTHON]. The first command that fails ends it.
set -euo pipefail
unset PYTHONPATH
python=${1:-python3}
checkout=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'echo "the wheel does not work: line $LINENO of $0 failed" >&2' ERR

say() { echo "wheel: $*, after $SECONDS s"; }

"$python" -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check)
rm -rf "$checkout/build" "$checkout"/dist/polytope_hsae-*.whl  # setuptools packs what an older build left there
"${pip[@]}" wheel --no-deps --wheel-dir "$checkout/dist" "$checkout"
rm -rf "$checkout/build"
wheel=$(ls "$checkout"/dist/polytope_hsae-*.whl)
say "built $(basename "$wheel")"

"${pip[@]}" install --no-compile torch==2.13.0
"${pip[@]}" install --no-compile --constraint "$checkout/constraints.txt" "$wheel"
"${pip[@]}" check
say "installed"

mkdir "$folder/empty"
cd "$folder/empty"
hsae="$folder/venv/bin/hsae"
"$hsae" doctor
"$hsae" run smoke --json > results.json
for name in report.html phase4/results.json phase3/teacher/model/model.safetensors; do
    test -s "runs/smoke/$name"
done
cmp results.json runs/smoke/phase4/results.json
say "doctor and the smoke run are fine"
