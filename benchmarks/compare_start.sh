#!/usr/bin/env bash
# The seconds from a checkpoint on disk (bf16, 0.5 GB, in the page cache) to the logits of its first token: of calm the
# whole run of `calm logits`, of transformers loading and the forward pass without its imports, and its whole run. Prints
# each round, the ratios and their spread. CALM_PYTHON names an interpreter with PyTorch and transformers, CALM_PROGRAM the program calm
# (build/release/bin/calm unless given).
#
#   benchmarks/compare_start.sh [--rounds N] [--threads N]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

rounds=5
threads=$(nproc)
while (($# > 0)); do
  case $1 in
    --rounds) rounds=$2 && shift 2 ;;
    --threads) threads=$2 && shift 2 ;;
    *) echo "usage: $0 [--rounds N] [--threads N]" >&2 && exit 2 ;;
  esac
done
python=${CALM_PYTHON:-python3}
if ! "$python" -c 'import torch, transformers' 2>/dev/null; then
  echo "$python lacks PyTorch or transformers: install both with pip, then name it by CALM_PYTHON" >&2
  exit 1
fi
calm=${CALM_PROGRAM:-build/release/bin/calm}
if [[ ! -x $calm ]]; then
  echo "$calm is not built. Run: cmake --preset release && cmake --build --preset release --target calm_cli" >&2
  exit 1
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
echo "writing the checkpoint" >&2
"$python" benchmarks/peers/start.py --write "$folder/model" >&2
cat "$folder"/model/*.safetensors >/dev/null # into the page cache

# The seconds of a whole run behind what it prints.
timed() {
  local start=$EPOCHREALTIME printed
  printed=$("$@" 2>/dev/null)
  echo "$start $EPOCHREALTIME" | awk -v printed="$printed" '{ print printed, $2 - $1 }'
}
run_calm() { timed "$calm" logits --model "$folder/model" --ids 5 --threads "$threads" --out "$folder/logits.safetensors"; }
run_peer() { timed "$python" benchmarks/peers/start.py --load "$folder/model" --threads "$threads"; }

echo "machine: $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(nproc) cores, load $(cut -d ' ' -f 1 /proc/loadavg)"
echo "checkpoint: $(du --apparent-size -hc "$folder"/model/*.safetensors | tail -n 1 | cut -f 1)"
printf '%6s %14s %28s %8s %22s %8s\n' round "calm, whole run" "transformers without imports" ratio "its whole run" ratio
for ((round = 1; round <= rounds; ++round)); do
  if ((round % 2 == 1)); then ours=$(run_calm) theirs=$(run_peer); else theirs=$(run_peer) ours=$(run_calm); fi
  echo "$round ${ours##* } $theirs" | awk '{ printf "%6d %14.3f %28.3f %8.1f %22.3f %8.1f\n", $1, $2, $3, $3 / $2, $4, $4 / $2 }' |
    tee -a "$folder/rounds"
done
for column in 4 6; do
  awk -v column=$column '{ print $column }' "$folder/rounds" | sort -n |
    awk '{ ratio[NR] = $1 } END { print "ratio: median " ratio[int((NR + 1) / 2)] ", smallest " ratio[1] ", largest " ratio[NR] }'
done
