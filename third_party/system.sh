#!/usr/bin/env bash
# Sees to what no requirement of pip's gives: compiler, Python headers, venv, GoogleTest, Google Benchmark, ccache, Chromium with apt where
# that is possible, nvcc (where PATH has none) from NVIDIA's packages for pip, into PYTHON's environment. Says what to do where it cannot.
# Usage: system.sh PYTHON {compiler|headers|venv|gtest|benchmark|ccache|chromium|nvcc}...
set -euo pipefail
python=$1
shift
compiler=${CXX:-g++}

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

apt_updated=no
apt_install() {  # quiet, but for its last words when it fails
  local log
  command -v apt-get >/dev/null || return 1
  [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null || return 1
  echo "apt: installing $*"
  log=$(mktemp)
  if { [ $apt_updated = yes ] || as_root apt-get update -qq; } >"$log" 2>&1 &&
     as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >"$log" 2>&1; then
    apt_updated=yes
    rm -f "$log"
  else
    tail -n 5 "$log" >&2
    rm -f "$log"
    return 1
  fi
}

has_header() { echo "#include <$1>" | "$compiler" -x c++ -std=c++20 -E - >/dev/null 2>&1; }

have() {
  case $1 in
    compiler) has_header version ;;
    headers) "$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ;;
    venv) "$python" -c 'import venv, ensurepip' 2>/dev/null ;;
    gtest) has_header gtest/gtest.h ;;
    benchmark) has_header benchmark/benchmark.h ;;
    ccache) command -v ccache >/dev/null ;;
    chromium) command -v chromium >/dev/null || command -v google-chrome >/dev/null ;;
    nvcc) command -v nvcc >/dev/null || [ -x "$(dirname "$python")/nvcc" ] ;;
    *) echo "system.sh: unknown item $1" >&2; exit 2 ;;
  esac
}

package() {
  local version
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  case $1 in
    compiler) echo g++ ;;
    headers) echo "libpython$version-dev" ;;
    venv) echo "python$version-venv" ;;
    gtest) echo libgtest-dev ;;
    benchmark) echo libbenchmark-dev ;;
    ccache) echo ccache ;;
    chromium) echo chromium fonts-dejavu-core ;;
  esac
}

# The compiler finds its parts from where it lies, so a script beside PYTHON calls it; CMake looks for lib64 and libcudart.so.
install_nvcc() {
  local root
  echo "pip: installing nvcc"
  "$python" -m pip --disable-pip-version-check -qq install nvidia-{cuda-nvcc,cuda-crt,nvvm,cuda-runtime}==13.0.* || return 1
  root=$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/nvidia/cu13
  ln -sfn lib "$root/lib64"
  ln -sf libcudart.so.13 "$root/lib/libcudart.so"
  printf '#!/bin/sh\nexec "%s/bin/nvcc" "$@"\n' "$root" >"$(dirname "$python")/nvcc"
  chmod +x "$(dirname "$python")/nvcc"
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
  echo "flexcore needs Python 3.10 or newer; '$python' is not. Say which one: make PYTHON=python3.12 ..." >&2
  exit 1
}
for item in "$@"; do
  have "$item" && continue
  if [ "$item" = nvcc ]; then
    install_nvcc && continue
    echo "missing: nvcc. Install CUDA 12 or later (or pip's nvidia-cuda-nvcc) and put nvcc on PATH" >&2
    exit 1
  fi
  # shellcheck disable=SC2046  (an item may be several packages)
  apt_install $(package "$item") && have "$item" && continue
  echo "missing: $item. Install it (Debian, Ubuntu: apt-get install $(package "$item")) and run again." >&2
  exit 1
done
