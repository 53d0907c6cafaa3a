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

# Every row of the knowledge example, with either tokenizer, and facts of one's own, for some steps.
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
knowledge() {
  "$CALM_BUILD_DIR/bin/knowledge" --anchor "$CALM_MODELS/SmolLM2-135M-Instruct.Q4_1.gguf" --out "$results/$1" \
    --entities 60 --lessons 1 --epochs 1 --own-words 4 --items 4 --changes 5 "${@:2}"
}
knowledge rows --full
knowledge bytes --tokenizer bytes
knowledge facts --facts "$CALM_SOURCE_DIR/examples/knowledge/facts.jsonl"
test -s "$results/rows/table.csv" && test -s "$results/bytes/table.csv" && test -d "$results/facts/adapter"

bash "$here/run.sh" "$here/check_real_models.py"
bash "$here/run.sh" "$here/check_real_tokenizers.py"
