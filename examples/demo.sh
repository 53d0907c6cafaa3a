#!/usr/bin/env bash
# Installs what is missing, builds the key-value arithmetic example and runs it. The arguments go to the program:
# --full, --from-scratch, --direct, --out DIR and others (--help lists them).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash cmake/install_dependencies.sh cmake g++ ninja-build libeigen3-dev nlohmann-json3-dev libxxhash-dev libcli11-dev

echo "Building (build/demo)"
cmake --preset demo >/dev/null
cmake --build --preset demo --target key_value_arithmetic -j "${CALM_JOBS:-$(nproc)}"

out=(--out results/key_value)
for argument in "$@"; do
  case $argument in
    --out | --out=*) out=() ;;
  esac
done
exec build/demo/bin/key_value_arithmetic --models examples/key_value_arithmetic/models "${out[@]}" "$@"
