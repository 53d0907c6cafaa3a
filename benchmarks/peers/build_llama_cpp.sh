#!/usr/bin/env bash
# Builds llama.cpp's llama-bench and llama-quantize for this machine, from the sources that the PyPI package
# llama-cpp-python carries, and prints the folder of the two programs.
#
#   benchmarks/peers/build_llama_cpp.sh [FOLDER]      .cache/llama.cpp unless given
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

folder=${1:-.cache/llama.cpp}
version=0.3.36
python=${CALM_PYTHON:-python3}
mkdir -p "$folder"
if [[ ! -x $folder/build/bin/llama-bench || ! -x $folder/build/bin/llama-quantize ]]; then
  if [[ ! -d $folder/source ]]; then
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest "$folder" \
      "llama-cpp-python==$version" >&2
    mkdir "$folder/unpacked"
    tar xzf "$folder/llama_cpp_python-$version.tar.gz" -C "$folder/unpacked" --strip-components 1
    mv "$folder/unpacked" "$folder/source"
  fi
  cmake -S "$folder/source/vendor/llama.cpp" -B "$folder/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
    -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_SERVER=OFF >"$folder/build.log" 2>&1
  cmake --build "$folder/build" --target llama-bench llama-quantize >>"$folder/build.log" 2>&1 ||
    { echo "llama.cpp does not build; see $folder/build.log" >&2 && exit 1; }
fi
echo "$folder/build/bin"
