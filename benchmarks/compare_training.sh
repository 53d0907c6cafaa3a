#!/usr/bin/env bash
# Trains the same composed model over the same batches with calm and with PyTorch, side by side, and prints both figures of
# each round, their ratio and its spread. CALM_PYTHON names an interpreter that has PyTorch (python3 unless given), CALM_BUILD
# the folder of the build (build/benchmark or build/release, the newest). With --keep-states calm, and it alone, computes the
# states of the frozen models once for each batch. With --real it is SmolLM2-135M and Gemma 3 270M, from files
# (examples/fetch_models.sh) in calm and of random weights in transformers, 4 links, 4 sequences of 128 tokens, all scored.
#
#   benchmarks/compare_training.sh [--rounds N] [--threads N] [--json FILE] [--keep-states] [--products packed|stored|interleaved|bf16]
#                                  [--real SMOLLM2.gguf GEMMA3.gguf [--torch-dtype f32|bf16]] [-- options that both programs take]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

rounds=5
threads=$(nproc)
json=
only_calm=()
only_torch=()
shape=()
peer=benchmarks/peers/train_composed.py
package=torch
usage="usage: $0 [--rounds N] [--threads N] [--json FILE] [--keep-states] [--products packed|stored|interleaved|bf16] [--real SMOLLM2 GEMMA3 [--torch-dtype f32|bf16]] [-- options of both]"
while (($# > 0)); do
  case $1 in
    --rounds) rounds=$2 && shift 2 ;;
    --threads) threads=$2 && shift 2 ;;
    --json) json=$2 && shift 2 ;;
    --keep-states) only_calm+=(--keep-states) && shift ;;
    --products) only_calm+=(--products "$2") && shift 2 ;;
    --torch-dtype) only_torch+=(--dtype "$2") && shift 2 ;;
    --real)
      [[ $# -ge 3 ]] || { echo "$usage" >&2 && exit 2; }
      only_calm+=(--anchor-file "$2" --augment-file "$3")
      shape=(--vocabulary 49152 --batch-count 2 --sequences 4 --shortest 129 --longest 129 --prompt 1 --longest-prompt 1)
      peer=benchmarks/peers/train_real.py
      package=transformers
      shift 3
      ;;
    --) shift && break ;;
    *) echo "$usage" >&2 && exit 2 ;;
  esac
done

if [[ $package == transformers ]]; then # the caller gives its own behind them, which win
  set -- --links "0:3>6,0:8>14,0:12>21,0:17>29" --warm-up 1 --steps 5 "$@"
fi

python=${CALM_PYTHON:-python3}
if ! version=$("$python" -c "import torch, $package; print(torch.__version__)" 2>/dev/null); then
  echo "$python has no $package. Install it with: python3 -m venv venv && venv/bin/pip install $package torch" \
    "--extra-index-url https://download.pytorch.org/whl/cpu; then set CALM_PYTHON=venv/bin/python" >&2
  exit 1
fi
calm=${CALM_BUILD:+$CALM_BUILD/bin/train_composed}
calm=${calm:-$(ls -t build/{benchmark,release}/bin/train_composed 2>/dev/null | head -n 1 || true)}
if [[ ! -x $calm ]]; then
  echo "train_composed is not built. Run: cmake --preset benchmark && cmake --build --preset benchmark" \
    "(needs Debian's g++ cmake ninja-build libeigen3-dev nlohmann-json3-dev libxxhash-dev libcli11-dev libbenchmark-dev)" >&2
  exit 1
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$calm" --write-batches "$folder/batches.jsonl" "${shape[@]}" "$@"
run_calm() { "$calm" --batches "$folder/batches.jsonl" --threads "$threads" "${only_calm[@]}" "$@" >>"$folder/calm.jsonl"; }
run_torch() {
  "$python" "$peer" --batches "$folder/batches.jsonl" --threads "$threads" "${only_torch[@]}" "$@" >>"$folder/torch.jsonl"
}

load=$(cut -d ' ' -f 1 /proc/loadavg)
for ((round = 1; round <= rounds; ++round)); do
  echo "round $round of $rounds" >&2
  if ((round % 2 == 1)); then
    run_calm "$@"
    run_torch "$@"
  else
    run_torch "$@"
    run_calm "$@"
  fi
done

echo "calm:    $calm --batches FILE --threads $threads ${only_calm[*]} $*"
echo "PyTorch: $python $peer --batches FILE --threads $threads ${only_torch[*]} $*"
echo "machine: $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(nproc) cores, load before the first round $load"
echo "torch $version, $("${CXX:-c++}" --version | head -n 1)"
"$python" - "$folder" "$json" <<'PYTHON'
import json
import statistics
import sys

folder, output = sys.argv[1:]
calm, torch = ([json.loads(line) for line in open(f"{folder}/{name}.jsonl")] for name in ("calm", "torch"))
for key in ("tokens_per_step", "trained_parameters", "threads"):
    found = {run[key] for run in calm + torch}
    if len(found) != 1:
        sys.exit(f"the two sides differ in {key}: {sorted(found)}")
    print(f"{key.replace('_', ' ')}: {found.pop()}")
ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(calm, torch)]
row = "{:>8} {:>16} {:>16} {:>22} {:>8}".format
print(row("round", "calm, tokens/s", "PyTorch", "(pieces, padding)", "ratio"))
for i, (a, b, ratio) in enumerate(zip(calm, torch, ratios), 1):
    print(row(i, a["tokens_per_second"], b["tokens_per_second"], f"({b['buckets']}, {b['padding']:.0%})", f"{ratio:.2f}"))
for name, pick in (("min", min), ("median", statistics.median), ("max", max)):
    print(row(name, *(round(pick([run["tokens_per_second"] for run in side])) for side in (calm, torch)), "", f"{pick(ratios):.2f}"))
memory = [max(run["peak_resident_mb"] for run in side) for side in (calm, torch)]
print(row("peak MB", *map(round, memory), "", f"{memory[0] / memory[1]:.2f}"))
if output:
    json.dump({"calm": calm, "torch": torch, "ratios": ratios}, open(output, "w"), indent=1)
PYTHON
