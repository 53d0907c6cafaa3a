#!/usr/bin/env bash
# Runs a Python file with the interpreter named by CALM_PYTHON, else python3. Status 77: a module is missing.
set -euo pipefail

python=${CALM_PYTHON:-python3}
if ! reason=$("$python" -c 'import torch, transformers, safetensors' 2>&1); then
  echo "Tests in Python are skipped: $python has no torch, transformers and safetensors" \
    "(CALM_PYTHON may name an interpreter that has them): $(tail -n 1 <<<"$reason")"
  exit 77
fi
exec "$python" "$@"
