#!/usr/bin/env bash
# check.sh PROGRAM DATA: runs the program calm on the models in DATA and compares status, message and files.
set -euo pipefail
program=$1 data=$2 fetch=$(dirname "$0")/../../examples/fetch_models.sh
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
if [[ ! -x $program ]]; then
  echo "Skipped: $program was not built"
  exit 77
fi
failed=0

# expect STATUS TEXT argument...: calm ends with STATUS, and what it prints, errors included, holds TEXT.
expect() {
  local status=0 wanted=$1 text=$2
  shift 2
  "$program" "$@" >"$out/printed" 2>&1 || status=$?
  if [[ $status -ne $wanted ]] || ! grep -qF -- "$text" "$out/printed"; then
    echo "calm $*: expected status $wanted and '$text', found status $status and:" >&2
    cat "$out/printed" >&2
    failed=1
  fi
}

base=$data/llama narrow=$data/llama_narrow
both=(--anchor "$base" --augment "$narrow")
expect 0 "27168" inspect "$base"
expect 0 '"architecture":"gemma3_text"' inspect "$data/zoo_gemma3" --json
# What products read is smaller in bf16: half, where rows are whole pairs.
packed() { "$program" inspect "$base" --compute "$1" --json | sed 's/.*"packed_bytes":\([0-9]*\).*/\1/'; }
if [[ $(packed f32) -ne $((2 * $(packed bf16))) ]]; then
  echo "calm inspect: packed_bytes are $(packed f32) in f32 and $(packed bf16) in bf16" >&2
  failed=1
fi
expect 0 "3 tokens" logits --model "$base" --ids 1,2,3 --out "$out/alone.safetensors"
expect 0 "1 links" init "${both[@]}" --links-count 1 --alignment identity --out "$out/adapter"
expect 0 "adapter" inspect "$out/adapter"
expect 0 "3 tokens" logits "${both[@]}" --adapter "$out/adapter" --ids 1,2,3 --out "$out/composed.safetensors"
if ! cmp "$out/alone.safetensors" "$out/composed.safetensors"; then
  echo "Fresh bridges changed the anchor's logits" >&2
  failed=1
fi

# The same models with a tokenizer of single characters, which pads the vocabulary of 61.
entries='"<s>":0' id=0
for character in {a..z} ' ' = + {0..9}; do
  id=$((id + 1))
  entries+=",\"$character\":$id"
done
for name in llama llama_narrow; do
  mkdir "$out/$name"
  cp "$data/$name/config.json" "$data/$name/model.safetensors" "$out/$name"
  echo "{\"version\":\"1.0\",\"added_tokens\":[{\"id\":0,\"content\":\"<s>\",\"single_word\":false,\"lstrip\":false,\
\"rstrip\":false,\"normalized\":false,\"special\":true}],\"normalizer\":null,\"pre_tokenizer\":null,\"post_processor\":null,\
\"decoder\":null,\"model\":{\"type\":\"BPE\",\"vocab\":{$entries},\"merges\":[]}}" >"$out/$name/tokenizer.json"
done
texts=(--anchor "$out/llama" --augment "$out/llama_narrow")
lines() {
  for word in "$@"; do echo "{\"prompt\": \"$word=\", \"completion\": \"${word}1\"}"; done
}
lines ab cd ef >"$out/first.jsonl"
lines gh ij kl >"$out/second.jsonl"
expect 0 "2 links" init "${texts[@]}" --links-count 2 --out "$out/fresh"
learn=(train "${texts[@]}" --adapter "$out/fresh" --batch-tokens 8 --out "$out/learned")
expect 0 "after 4 steps" "${learn[@]}" --data "$out/first.jsonl" --steps 4
expect 0 "were done before" "${learn[@]}" --data "$out/first.jsonl" --steps 4 --resume
expect 0 "no file of the model names an end token" "${learn[@]}" --data "$out/first.jsonl" --steps 4 --resume
learn_valid=(train "${texts[@]}" --adapter "$out/fresh" --data "$out/first.jsonl" --valid "$out/second.jsonl" --steps 4
  --out "$out/learned_valid")
expect 0 "train  4/4  100 %" "${learn_valid[@]}"
valid_loss=$("$program" "${learn_valid[@]}" --json 2>/dev/null | grep -o '"valid_loss":[0-9.e-]*')
expect 0 "were done before, valid_loss" "${learn_valid[@]}" --resume
expect 0 "$valid_loss" "${learn_valid[@]}" --resume --json
expect 1 "belongs to a run with other options" "${learn[@]}" --data "$out/second.jsonl" --steps 4 --resume
expect 1 "belongs to a run with other options" "${learn[@]}" --data "$out/first.jsonl" --steps 5 --resume

# An end token that only the model's own files name ends what is learned and what is generated.
mkdir "$out/ended"
cp "$out/llama"/* "$out/ended"
echo '{"model_max_length": 1024}' >"$out/ended/tokenizer_config.json"
ids=$("$program" generate --model "$out/llama" --prompt "ab=" --max-new-tokens 8 --json 2>/dev/null |
  sed 's/.*"ids":\[\([0-9,]*\)\].*/\1/')
IFS=, read -r -a ids <<<"$ids"
for ends in "${ids[2]}" "[60, ${ids[2]}]"; do
  echo "{\"eos_token_id\": $ends}" >"$out/ended/generation_config.json"
  expect 0 '"finish_reason":"end_token"' generate --model "$out/ended" --prompt "ab=" --max-new-tokens 8 --json
done
learn_ended=(train --anchor "$out/ended" --augment "$out/llama_narrow" --adapter "$out/fresh" --steps 1)
expect 0 "after 1 steps" "${learn_ended[@]}" --data "$out/first.jsonl" --out "$out/learned_ended"
if grep -qF "names an end token" "$out/printed"; then
  echo "calm train: an end token of generation_config.json was not found" >&2
  failed=1
fi
echo '{"eos_token_id": "<s>"}' >"$out/ended/generation_config.json"
expect 1 'generation_config.json: "eos_token_id": expected an integer' generate --model "$out/ended" --prompt "ab="

# An adapter keeps the alignment that it was made for.
expect 0 "1 links" init "${texts[@]}" --links-count 1 --alignment bytes --out "$out/by_bytes"
expect 0 "ids" generate "${texts[@]}" --adapter "$out/by_bytes" --prompt "ab=" --max-new-tokens 2 --json
expect 1 "the adapter was made for the alignment bytes" \
  generate "${texts[@]}" --adapter "$out/by_bytes" --alignment identity --prompt "ab="
expect 1 "augment 0 of the adapter has the tokenizer" \
  generate --anchor "$out/llama" --augment "$narrow" --adapter "$out/by_bytes" --prompt "ab="

# With --ids and --alignment identity no tokenizer is needed, so one that cannot be read is in nobody's way.
for name in llama llama_narrow; do
  mkdir "$out/unigram_$name"
  cp "$out/$name/config.json" "$out/$name/model.safetensors" "$out/unigram_$name"
  echo '{"model": {"type": "Unigram", "vocab": []}}' >"$out/unigram_$name/tokenizer.json"
done
mkdir "$out/other_ids"
cp "$out/llama_narrow"/* "$out/other_ids"
sed -i 's/"a":1,"b":2/"b":1,"a":2/' "$out/other_ids/tokenizer.json"
unigram=(--anchor "$out/unigram_llama" --augment "$out/unigram_llama_narrow")
expect 0 "cannot be read: $out/unigram_llama/tokenizer.json" inspect "$out/unigram_llama"
expect 0 "decode" inspect "$out/unigram_llama" --cost --tokens 8
expect 0 "3 tokens" logits --model "$out/unigram_llama" --ids 1,2,3 --out "$out/unigram.safetensors"
expect 1 "is not supported" logits --model "$out/unigram_llama" --text "ab" --out "$out/none"
expect 0 "1 links" init "${unigram[@]}" --links-count 1 --alignment identity --out "$out/unigram"
expect 1 "with --alignment identity no tokenizer is needed" init "${unigram[@]}" --links-count 1 --out "$out/none"
expect 1 "is not supported" init "${unigram[@]}" --links-count 1 --alignment bytes --out "$out/none"
expect 0 "loss" gradients "${unigram[@]}" --adapter "$out/unigram" --ids 1,2,3 --out "$out/unigram.safetensors"
expect 0 "loss" gradients "${unigram[@]}" --adapter "$out/fresh" --ids 1,2,3 --out "$out/unigram.safetensors"
expect 1 "is not supported" generate "${unigram[@]}" --adapter "$out/unigram" --prompt "ab="
expect 1 "augment 0 of the adapter has the tokenizer" gradients --anchor "$out/unigram_llama" --augment "$out/other_ids" \
  --adapter "$out/fresh" --ids 1,2,3 --out "$out/none"

# Generation ends where the context of an augment is full; a prompt that does not fit into it is refused.
mkdir "$out/short"
cp "$out/llama_narrow"/*.json "$out/llama_narrow/model.safetensors" "$out/short"
sed -i 's/"max_position_embeddings": [0-9]*/"max_position_embeddings": 8/' "$out/short/config.json"
short=(--anchor "$out/llama" --augment "$out/short")
expect 0 "1 links" init "${short[@]}" --links-count 1 --out "$out/to_short"
expect 0 '"finish_reason":"context"' generate "${short[@]}" --adapter "$out/to_short" --prompt "ab=" --json
expect 0 "context of the model or of an augment is full" \
  generate "${short[@]}" --adapter "$out/to_short" --prompt "ab="
expect 0 '"finish_reason":"length"' \
  generate "${short[@]}" --adapter "$out/to_short" --prompt "ab=" --max-new-tokens 2 --json
expect 1 "$out/llama: the prompt has 9 tokens, which the context of an augment does not hold" \
  generate "${short[@]}" --adapter "$out/to_short" --prompt "abcdefgh="

# An example that does not fit is found when its file is read, before the first step.
{
  cat "$out/first.jsonl"
  lines abcdefg
} >"$out/long.jsonl"
long="$out/long.jsonl: line 4: the example"
expect 1 "$long" train "${short[@]}" --adapter "$out/to_short" --data "$out/long.jsonl" --steps 1 --out "$out/none"
expect 1 "$long" train "${short[@]}" --adapter "$out/to_short" --data "$out/first.jsonl" --valid "$out/long.jsonl" \
  --steps 1 --out "$out/none"
expect 1 "$long" eval "${short[@]}" --adapter "$out/to_short" --data "$out/long.jsonl" --metric nll
expect 1 "$long" eval --model "$out/short" --data "$out/long.jsonl" --metric nll
lines ab abcdefgh >"$out/long.jsonl"
expect 1 "$out/long.jsonl: line 2: the prompt has 9 tokens, but the model's context is 8" \
  eval --model "$out/short" --data "$out/long.jsonl" --metric exact
expect 1 "$out/short: the text has 9 tokens, but the model's context is 8" \
  logits --model "$out/short" --ids 1,2,3,4,5,6,7,8,9 --out "$out/none"

# What stands before a stop string is what eval compares.
text=$("$program" generate --model "$out/llama" --prompt "ab=" --max-new-tokens 24 --json 2>/dev/null |
  sed 's/.*"text":"\([^"]*\)".*/\1/')
stop=${text:5:1} before=${text%%"${text:5:1}"*}
echo "{\"prompt\": \"ab=\", \"completion\": \"$before\"}" >"$out/stop.jsonl"
compare=(eval --model "$out/llama" --data "$out/stop.jsonl" --max-new-tokens 24)
expect 0 "exact: 100" "${compare[@]}" --stop "$stop"
expect 0 "exact: 0" "${compare[@]}"

# FLOPs of a token by the sizes: 23,040 weights in 3 blocks, a head of 61 x 32, 4 heads of 8; a prompt of 8 tokens, of
# which 7 give the last block keys and values alone.
expect 0 '"what":"prefill","flops_a_token":36200.0,"weight_bytes_a_token":12496.0' \
  inspect "$base" --cost --tokens 8 --json
expect 0 '"what":"decode","flops_a_token":56128.0,"weight_bytes_a_token":99968.0' \
  inspect "$base" --cost --tokens 8 --json
expect 0 "decode" inspect "$base" --cost --tokens 8 --compute bf16
expect 0 "training step" inspect --cost --tokens 8 "${texts[@]}" --adapter "$out/fresh"
expect 0 '"augment_tokens_a_token":[1.0]' inspect --cost --tokens 8 "${texts[@]}" --adapter "$out/fresh" --json
expect 0 '"augment_tokens_a_token":[1.' inspect --cost --tokens 8 "${texts[@]}" --adapter "$out/by_bytes" --json
expect 2 "PATH of a model" inspect
expect 2 "needs --cost" inspect "${texts[@]}" --adapter "$out/fresh"

# An adapter's configuration with many bases is read and printed in time in proportion to them.
mkdir "$out/many"
awk -v n=100000 'BEGIN {
  print "{\"peft_type\":\"CALM\",\"format_version\":1,\"links\":[],\"bases\":["
  for (i = 0; i < n; ++i)
    printf "%s{\"architecture\":\"a\",\"sizes\":\"s\",\"content_hash\":\"h\"}", (i ? "," : "")
  print "],\"options\":{\"heads\":1,\"norms\":true,\"gate\":\"one\",\"rotary\":false,\"rank\":0}}"
}' >"$out/many/adapter_config.json"
few=$(date +%s%N)
expect 0 "adapter" inspect "$out/adapter"
many=$(date +%s%N)
expect 0 "augments" inspect "$out/many"
end=$(date +%s%N)
if ((end - many > 20 * (many - few) + 2000000000)); then
  echo "calm inspect of 100,000 bases took $(((end - many) / 1000000)) ms" >&2
  failed=1
fi

expect 2 "there is no command 'unknown'; these are: inspect, tokenize" unknown
expect 2 "--out: a run begins" train "${texts[@]}" --adapter "$out/fresh" --data "$out/first.jsonl" --out "$out/./fresh"
expect 2 "at least 1, found '0'" train "${texts[@]}" --adapter "$out/fresh" --data "$out/first.jsonl" --out "$out/none" --steps 0
expect 2 "at least 0, found '-1'" logits --model "$base" --ids 1 --out "$out/none" --threads -1
expect 2 "'a' is no token" logits --model "$base" --ids 1,a --out "$out/none"
expect 2 "at least one token" logits --model "$base" --ids "" --out "$out/none"
expect 2 "'x' does not read as" init "${both[@]}" --links x --out "$out/none"
expect 2 "above 0 and to 1, found '2'" generate --model "$out/llama" --prompt "ab=" --top-p 2
expect 1 "gives no token" logits --model "$out/llama" --text "" --out "$out/none"
expect 0 "" tokenize --model "$out/llama" --text ""
sed 's/"content_hash": "./"content_hash": "_/' "$out/fresh/adapter_config.json" >"$out/config.json"
cp -r "$out/fresh" "$out/other_hash"
cp "$out/config.json" "$out/other_hash/adapter_config.json"
expect 1 "with --allow-requantised" generate "${texts[@]}" --adapter "$out/other_hash" --prompt "ab="
expect_fetch() { # expect_fetch STATUS TEXT argument...: what fetch_models.sh says before it fetches anything
  local status=0 wanted=$1 text=$2
  shift 2
  bash "$fetch" "$@" >"$out/printed" 2>&1 || status=$?
  if [[ $status -ne $wanted ]] || ! grep -qF -- "$text" "$out/printed"; then
    echo "fetch_models.sh $*: expected status $wanted and '$text', found status $status and:" >&2
    cat "$out/printed" >&2
    failed=1
  fi
}
expect_fetch 0 "examples/fetch_models.sh [FOLDER" --help
expect_fetch 2 "there is no model 'bogus'" "$out/models" bogus
expect 1 "cannot be spread" init "${both[@]}" --links-count 1000000000000 --out "$out/none"
expect 2 "--ids or --text" logits --model "$base" --out "$out/none"
expect 2 "--model or --anchor" logits --ids 1 --out "$out/none"
expect 2 "--links or --links-count" init "${both[@]}" --out "$out/none"
expect 1 "there is no such folder or file" inspect "$out/missing"
expect 1 "outside the vocabulary of 61" logits --model "$base" --ids 1,2,99 --out "$out/none"

if [[ -e /dev/full ]]; then
  status=0
  "$program" inspect "$base" >/dev/full 2>"$out/printed" || status=$?
  if [[ $status -ne 1 ]] || ! grep -qF "could not be written" "$out/printed"; then
    echo "calm inspect on a full device: expected status 1, found $status" >&2
    failed=1
  fi
fi
if [[ -e $out/none ]]; then
  echo "A refused call wrote a file" >&2
  failed=1
fi
exit "$failed"
