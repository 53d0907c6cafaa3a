#!/usr/bin/env bash
# Installs what is missing, builds everything and runs all tests: preset release, and the unit tests of preset sanitize.
# CALM_JOBS sets how many processes work at a time (one for each core), CALM_PYTHON the interpreter that has PyTorch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

jobs=${CALM_JOBS:-$(nproc)}
step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

step "packages"
bash cmake/install_dependencies.sh \
  cmake g++ ninja-build libeigen3-dev nlohmann-json3-dev libxxhash-dev libpcre2-dev libutf8proc-dev \
  doctest-dev libbenchmark-dev libcli11-dev

for preset in release sanitize; do
  step "configure $preset"
  cmake --preset "$preset"
  step "build $preset"
  cmake --build --preset "$preset" -j "$jobs"
done

step "tests of release and sanitize"
bash tests/python/run.sh /dev/null || true # says so where they will be skipped
printf 'subdirs("release" "sanitize")\n' >build/CTestTestfile.cmake
ctest --test-dir build --output-on-failure --no-tests=error -j "$jobs"
