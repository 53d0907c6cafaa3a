#!/usr/bin/env bash
# Installs what is missing, builds everything and runs all tests: preset tests, the unit tests of preset sanitize (with
# clang 14 where it is or may be installed, else with g++), the tests that compute with products by oneDNN (where
# libdnnl-dev is or may be installed) and, with clang 14, a short run of the fuzz targets.
# CALM_JOBS sets how many processes work at a time (one for each core), CALM_PYTHON the interpreter that has PyTorch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

jobs=${CALM_JOBS:-$(nproc)}
step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

step "packages"
bash cmake/install_dependencies.sh \
  cmake g++ ninja-build libeigen3-dev nlohmann-json3-dev libxxhash-dev libpcre2-dev libutf8proc-dev \
  doctest-dev libbenchmark-dev libcli11-dev

presets=(tests sanitize)
bash cmake/install_dependencies.sh clang-14 libclang-rt-14-dev || true
linked=$(mktemp)
if echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' |
  clang++-14 -fsanitize=fuzzer,address -x c++ - -o "$linked" 2>/dev/null; then
  presets=(tests sanitize-clang fuzz)
else
  echo "The fuzz targets are skipped: clang++-14 cannot link them (Debian: clang-14, libclang-rt-14-dev)"
fi
rm -f "$linked"
if bash cmake/install_dependencies.sh libdnnl-dev; then
  presets+=(onednn)
else
  echo "The tests with products by oneDNN are skipped (Debian: libdnnl-dev)"
fi

for preset in "${presets[@]}"; do
  step "configure $preset"
  cmake --preset "$preset"
  step "build $preset"
  cmake --build --preset "$preset" -j "$jobs"
done

step "tests of ${presets[*]}"
bash tests/python/run.sh /dev/null || true # says so where they will be skipped
printf 'subdirs("%s")\n' "${presets[@]}" >build/CTestTestfile.cmake
ctest --test-dir build --output-on-failure --no-tests=error -j "$jobs"
