#!/usr/bin/env bash
# Sees to what PyPI cannot give: compiler, Python headers, venv, GoogleTest, Google Benchmark, ccache. Installs with apt where that
# is possible and says what to do where it is not. Usage: system.sh PYTHON {compiler|headers|venv|gtest|benchmark|ccache}...
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
  esac
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
  echo "flexcore needs Python 3.10 or newer; '$python' is not. Say which one: make PYTHON=python3.12 ..." >&2
  exit 1
}
for item in "$@"; do
  have "$item" && continue
  apt_install "$(package "$item")" && have "$item" && continue
  echo "missing: $item. Install it (Debian, Ubuntu: apt-get install $(package "$item")) and run again." >&2
  exit 1
done
