#!/usr/bin/env bash
# What is held against transformers on the two real models of examples/fetch_models.sh. Status 77: they are not there.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

models=${CALM_MODELS:-}
for file in SmolLM2-135M-Instruct.Q4_1.gguf gemma-3-270m-q4_k_m.gguf; do
  if [[ -z $models || ! -f $models/$file ]]; then
    echo "The tests of real models are skipped: CALM_MODELS names no folder with $file (examples/fetch_models.sh gets it)"
    exit 77
  fi
done
bash "$here/run.sh" "$here/check_real_models.py"
bash "$here/run.sh" "$here/check_real_tokenizers.py"
