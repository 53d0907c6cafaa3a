#!/usr/bin/env bash
# Installs what is missing, builds the key-value arithmetic example and runs it. The arguments go to the program:
# --full, --from-scratch, --direct, --out DIR and others (--help lists them).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

bash "$root/cmake/install_dependencies.sh" cmake g++ ninja-build libeigen3-dev nlohmann-json3-dev libxxhash-dev \
  libcli11-dev

echo "Building (build/demo)"
cmake -S "$root" --preset demo >/dev/null
cmake --build "$root/build/demo" --target key_value_arithmetic -j "${CALM_JOBS:-$(nproc)}"

exec "$root/build/demo/bin/key_value_arithmetic" --models "$root/examples/key_value_arithmetic/models" \
  --out "$root/results/key_value" "$@"
