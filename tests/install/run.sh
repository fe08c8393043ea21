#!/usr/bin/env bash
# Builds and runs consumer/ against (a) an install tree and (b) the wheel, in a folder of its own. PYTHON is an interpreter
# with pip and venv (default: make's .venv); BUILD is a finished build to install from, instead of one of its own.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
cd "$root"
python=${PYTHON:-$root/.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
PATH=$(dirname "$python"):$PATH

quietly() {  # runs a command; shows what it printed only when it fails
  "$@" >"$work/log" 2>&1 || { tail -n 60 "$work/log"; echo "failed: $*"; exit 1; }
}

consume() {  # label, folder of flexcoreConfig.cmake
  local commands=$work/consumer-$1/compile_commands.json
  quietly cmake -S "$here/consumer" -B "$work/consumer-$1" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -Dflexcore_DIR="$2" -DCMAKE_EXPORT_COMPILE_COMMANDS=ON
  quietly cmake --build "$work/consumer-$1"
  # Only the installed headers may be seen: one -I or -isystem, and no flag or macro of flexcore's own build.
  if [ "$(grep -oE -- '(-I|-isystem) ?[^ ]+' "$commands" | sort -u | wc -l)" != 1 ] ||
     sed 's/-DNDEBUG//' "$commands" | grep -qE -- ' -(D|m)'; then
    grep '"command"' "$commands"
    echo "$1: flexcore::flexcore passes more to its users than its include folder"
    exit 1
  fi
  "$work/consumer-$1/consumer" "$work/model" >"$work/out" || { cat "$work/out"; echo "$1: the consumer failed"; exit 1; }
  echo "$1: $(tail -n 1 "$work/out")"
}

# Built in isolation, as pip does for a user; then a fresh environment, so that what the wheel says it needs is all it
# needs: no torch, no transformers.
quietly "$python" -m pip wheel --disable-pip-version-check --no-deps --wheel-dir "$work/wheel" "$root"
quietly "$python" -m venv "$work/venv"
quietly "$work/venv/bin/python" -m pip install --disable-pip-version-check "$work"/wheel/flexcore-*.whl

build=${BUILD:-$work/build}
if [ -z "${BUILD:-}" ]; then
  quietly cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release
  quietly cmake --build "$build"
fi
quietly cmake --install "$build" --prefix "$work/prefix" --component development

cd "$work"
./venv/bin/python - "$work/model" wheel/flexcore-*.whl <<'PYTHON'
import importlib.util
import shutil
import sys
from pathlib import Path

import flexcore
from flexcore.tiny import write_tiny_model

for name in ("torch", "transformers"):
    if importlib.util.find_spec(name):
        sys.exit(f"the wheel brought {name}")
write_tiny_model(sys.argv[1])
try:
    flexcore.Engine(sys.argv[1], flexcore.EngineConfig(device="cuda", max_model_len=64))
    cuda = "device cuda works"
except flexcore.DeviceError as error:
    cuda = str(error)
if shutil.which("nvcc") and "no CUDA backend" in cuda:
    sys.exit(f"nvcc is on PATH, but the wheel was built without CUDA: {cuda}")
print(f"wheel: flexcore {flexcore.__version__}, {Path(sys.argv[2]).stat().st_size / 1e6:.1f} MB ({cuda})")
PYTHON
consume install-tree "$work/prefix/lib/cmake/flexcore"
consume wheel "$(./venv/bin/python -m flexcore --cmake-dir)"
