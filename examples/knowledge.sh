#!/usr/bin/env bash
# Installs what is missing, fetches SmolLM2-135M-Instruct unless --anchor names a model, builds the knowledge example and
# runs it. The arguments go to the program: --quick, --full, --tokenizer bytes, --facts FILE, --out DIR and others
# (--help lists them).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

bash "$root/cmake/install_dependencies.sh" cmake g++ ninja-build libeigen3-dev nlohmann-json3-dev libxxhash-dev \
  libpcre2-dev libutf8proc-dev libcli11-dev iso-codes python3-pip

model=$root/models/SmolLM2-135M-Instruct.Q4_1.gguf
fetch=1
for argument in "$@"; do
  case $argument in
    --anchor | --anchor=* | --help | -h) fetch=0 ;;
  esac
done
if [[ $fetch -eq 1 ]]; then bash "$root/examples/fetch_models.sh" "$root/models" SmolLM2; fi

echo "Building (build/demo)"
cmake -S "$root" --preset demo >/dev/null
cmake --build "$root/build/demo" --target knowledge calm_cli -j "${CALM_JOBS:-$(nproc)}"

if [[ $fetch -eq 1 ]]; then set -- --anchor "$model" "$@"; fi
exec "$root/build/demo/bin/knowledge" --out "$root/results/knowledge" "$@"
