#!/usr/bin/env bash
# Decodes and reads prompts with calm and with llama.cpp, side by side, and prints the tokens a second of both, their
# ratio and its spread: each model alone in several storage types, and the two composed (against 1 / (t_anchor +
# t_augment) of llama.cpp, which has no composition). Needs the models of examples/fetch_models.sh.
#
#   benchmarks/compare_decode.sh [--rounds N] [--threads N] [--models FOLDER] [--llama FOLDER] [--json FILE]
#
# --llama: the folder of llama-bench and llama-quantize; built by peers/build_llama_cpp.sh unless given. CALM_BUILD names
# the folder of calm's build (build/benchmark unless given).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

rounds=5
threads=$(nproc)
models=models
llama=
json=
while (($# > 0)); do
  case $1 in
    --rounds) rounds=$2 && shift 2 ;;
    --threads) threads=$2 && shift 2 ;;
    --models) models=$2 && shift 2 ;;
    --llama) llama=$2 && shift 2 ;;
    --json) json=$2 && shift 2 ;;
    *) echo "usage: $0 [--rounds N] [--threads N] [--models FOLDER] [--llama FOLDER] [--json FILE]" >&2 && exit 2 ;;
  esac
done
small=$models/SmolLM2-135M-Instruct.Q4_1.gguf
large=$models/gemma-3-270m-q4_k_m.gguf
for file in "$small" "$large"; do
  [[ -f $file ]] || { echo "$file is missing; examples/fetch_models.sh gets it" >&2 && exit 1; }
done
decode=${CALM_BUILD:-build/benchmark}/bin/decode
if [[ ! -x $decode ]]; then
  echo "$decode is not built. Run: cmake --preset benchmark && cmake --build --preset benchmark" >&2
  exit 1
fi
llama=${llama:-$(benchmarks/peers/build_llama_cpp.sh)}

variants=$(mktemp -d "$models/.compare.XXXXXX")
trap 'rm -rf "$variants"' EXIT
in_type() { # in_type FILE TYPE: the model stored in another type by llama-quantize
  local target
  target=$variants/$(basename "$1" .gguf).$2.gguf
  "$llama/llama-quantize" --allow-requantize "$1" "$target" "$2" >"$variants/log" 2>&1 ||
    { cat "$variants/log" >&2 && exit 1; }
  echo "$target"
}

# measure NAME WORK PRODUCTS FILE [AUGMENT]: one line of JSON for each round. WORK: decode or prefill.
measure() {
  local name=$1 work=$2 products=$3 file=$4 augment=${5:-} ours=(--tokens 128 --warm-up 2) test=(-p 0 -n 128)
  if [[ $work == prefill ]]; then
    ours=(--at-once 128 --tokens 1 --warm-up 2 --repetitions 5) test=(-p 128 -n 0)
  fi
  calm() {
    "$decode" --model "$file" ${augment:+--augment "$augment"} --products "$products" --threads "$threads" "${ours[@]}"
  }
  peer() { "$llama/llama-bench" -m "$1" -t "$threads" "${test[@]}" -r 1 -o jsonl 2>/dev/null; }
  local round found theirs second
  for ((round = 1; round <= rounds; ++round)); do
    echo "$name, $work, $products: round $round of $rounds" >&2
    if ((round % 2 == 1)); then found=$(calm) theirs=$(peer "$file"); else theirs=$(peer "$file") found=$(calm); fi
    second=null
    if [[ -n $augment ]]; then second=$(peer "$augment"); fi
    echo "{\"name\": \"$name\", \"work\": \"$work\", \"products\": \"$products\", \"calm\": $found, \"llama\": $theirs," \
      "\"llama_augment\": $second}" >>"$variants/results.jsonl"
  done
}

load=$(cut -d ' ' -f 1 /proc/loadavg)
# F32 as most files of it are: stored from a checkpoint in bf16. From quantised values its numbers need all 32 bits.
small_bf16=$(in_type "$small" BF16)
large_bf16=$(in_type "$large" BF16)
file=$(in_type "$small" F32)
measure "SmolLM2-135M F32 of 32 bits" decode interleaved "$file"
rm "$file"
for type in F32 BF16 Q8_0; do
  file=$(in_type "$(if [[ $type == F32 ]]; then echo "$small_bf16"; else echo "$small"; fi)" "$type")
  measure "SmolLM2-135M $type" decode interleaved "$file"
  if [[ $type == BF16 ]]; then measure "SmolLM2-135M $type" decode bf16 "$file"; fi
  measure "SmolLM2-135M $type" prefill packed "$file"
  if [[ $type != F32 ]]; then measure "SmolLM2-135M $type" prefill bf16 "$file"; fi
  rm "$file"
done
measure "SmolLM2-135M Q4_1" decode interleaved "$small"
for type in F32 BF16 Q8_0; do
  file=$(in_type "$(if [[ $type == F32 ]]; then echo "$large_bf16"; else echo "$large"; fi)" "$type")
  measure "Gemma-3-270M $type" decode interleaved "$file"
  rm "$file"
done
measure "Gemma-3-270M Q4_K_M" decode interleaved "$large"
measure "composed, Q4_1 and Q4_K_M" decode interleaved "$small" "$large"

echo "calm:      $decode --products PRODUCTS --threads $threads"
echo "llama.cpp: $llama/llama-bench -t $threads; decode: -p 0 -n 128, prefill: -p 128 -n 0"
echo "machine:   $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(nproc) cores, load before $load"
python3 - "$variants/results.jsonl" "$json" <<'PYTHON'
import json
import statistics
import sys

results, output = sys.argv[1:]
runs = [json.loads(line) for line in open(results)]
groups = {}
for run in runs:
    theirs = run["llama"]["avg_ts"]
    if run["llama_augment"]:
        theirs = 1 / (1 / theirs + 1 / run["llama_augment"]["avg_ts"])
    groups.setdefault((run["name"], run["work"], run["products"]), []).append((run["calm"]["tokens_per_second"], theirs))
print(f"llama.cpp build: {runs[0]['llama']['build_commit']}")
print("| model | work | calm's products | calm, tokens/s | llama.cpp | ratio, median | smallest | largest |")
print("|---|---|---|---|---|---|---|---|")
for (name, work, products), pairs in groups.items():
    ratios = [a / b for a, b in pairs]
    ours, theirs = (statistics.median(side) for side in zip(*pairs))
    print(f"| {name} | {work} | {products} | {ours:.0f} | {theirs:.0f} | {statistics.median(ratios):.2f} |"
          f" {min(ratios):.2f} | {max(ratios):.2f} |")
if output:
    json.dump(runs, open(output, "w"), indent=1)
PYTHON
