"""Holds the tokenizers of the two real models of examples/fetch_models.sh, as the program calm reads them from their .gguf files,
to the library `tokenizers` on more than 2,000 lines of mixed scripts, code, control characters, emoji and random Unicode.

The reference is what transformers' AutoTokenizer builds from the same .gguf file. For SmolLM2 that leaves out what the file's
tokenizer.ggml.pre, "smollm", stands for, each digit by itself; the pre-tokenizer of SmolLM2's own tokenizer.json (Digits, then
ByteLevel) is put in its place. For Gemma 3 it leaves out that SentencePiece finds the file's user defined tokens (runs of spaces and
line ends, HTML tags) before it merges anything; they are added. Lines are given to both without special tokens
at the beginning and end, so that only the segmentation is compared.

    CALM_MODELS=models CALM_PROGRAM=build/release/bin/calm python tests/python/check_real_tokenizers.py
"""
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from gguf import GGUFReader
from tokenizers import AddedToken, pre_tokenizers
from transformers import AutoTokenizer

from test_tokenizer import make_lines

MODELS = Path(os.environ.get("CALM_MODELS", "models"))
USER_DEFINED = 4  # of tokenizer.ggml.token_type
PROGRAM = os.environ.get("CALM_PROGRAM", "build/release/bin/calm")


def user_defined_tokens(path):
    """Those of a SentencePiece vocabulary, with the marks that its normalizer writes for spaces."""
    fields = GGUFReader(path).fields
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    return [bytes(tokens.parts[token]).decode().replace(" ", "\u2581") for token, kind in zip(tokens.data, types.data)
            if types.parts[kind][0] == USER_DEFINED]


def check(name, lines):
    reference = AutoTokenizer.from_pretrained(str(MODELS), gguf_file=name).backend_tokenizer
    if name.startswith("SmolLM2"):
        reference.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    else:
        reference.add_tokens([AddedToken(token, normalized=True) for token in user_defined_tokens(MODELS / name)])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lines.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        done = subprocess.run([PROGRAM, "tokenize", "--model", str(MODELS / name), "--file", str(file), "--no-special"],
                              capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    found = done.stdout.split("\n")[:-1]
    assert len(found) == len(lines), f"{name}: {len(found)} lines of ids for {len(lines)} lines of text"
    wrong = tokens = 0
    for line, ids in zip(lines, found):
        expected = reference.encode(line, add_special_tokens=False).ids
        tokens += len(expected)
        given = [int(i) for i in ids.split()]
        if given != expected:
            wrong += 1
            if wrong <= 5:
                at = next((i for i, (a, b) in enumerate(zip(given, expected)) if a != b), min(len(given), len(expected)))
                parts = [[reference.id_to_token(i) for i in part[at:at + 6]] for part in (given, expected)]
                print(f"{name}: {line!r}: token {at}: calm {parts[0]}, tokenizers {parts[1]}")
    print(f"{name}: {len(lines)} lines, {tokens} tokens, {wrong} lines differ", flush=True)
    return wrong


def main():
    lines = make_lines(random.Random(11), 2500)
    assert len(lines) >= 2000
    wrong = sum(check(name, lines) for name in ["SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf"])
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
