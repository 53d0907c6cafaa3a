"""Holds the program calm to transformers on the two real models of examples/fetch_models.sh, in f32: logits and every token of
greedy continuations of eight prompts. transformers reads the same .gguf files.

    CALM_MODELS=models CALM_PROGRAM=build/release/bin/calm python tests/python/check_real_models.py
"""
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# transformers asks for the last two only when it opens a .gguf file.
missing = [name for name in ["torch", "safetensors", "transformers", "accelerate", "gguf"]
           if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"check_real_models.py needs {', '.join(missing)}, which {sys.executable} does not have; install with\n"
             f"    {sys.executable} -m pip install {' '.join(missing)}\n"
             "or let CALM_PYTHON name an interpreter that has them")

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

MODELS = Path(os.environ.get("CALM_MODELS", "models"))
PROGRAM = os.environ.get("CALM_PROGRAM", "build/release/bin/calm")
PROMPTS = ["The capital of France is", "Once upon a time there was a", "def fibonacci(n):\n", "2 + 2 =", "Der schnelle braune Fuchs",
           "The three primary colours are", "Dear Sir or Madam,\n", "El agua hierve a"]
NEW_TOKENS = 24
torch.set_num_threads(2)


def calm(*arguments):
    done = subprocess.run([PROGRAM, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"calm {' '.join(arguments)}: {done.stderr}")
    return done.stdout


failures = 0
for name in ["SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf"]:
    path = MODELS / name
    model = AutoModelForCausalLM.from_pretrained(MODELS, gguf_file=name, dtype=torch.float32).eval()
    worst = 0.0
    for prompt in PROMPTS:
        ids = [int(i) for i in calm("tokenize", "--model", str(path), "--text", prompt).split()]
        with tempfile.TemporaryDirectory() as folder:
            out = f"{folder}/logits.safetensors"
            calm("logits", "--model", str(path), "--ids", ",".join(map(str, ids)), "--out", out)
            ours = load_file(out)["logits"]
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0].float()
            expected = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False,
                                      repetition_penalty=1.0)[0, len(ids):].tolist()
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        worst = max(worst, error)
        found = json.loads(calm("generate", "--model", str(path), "--prompt", prompt, "--max-new-tokens", str(NEW_TOKENS),
                                "--json"))["ids"]
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        while expected and expected[-1] in ends:
            expected.pop()
        if found != expected or error > 1e-4:
            failures += 1
            print(f"{name}: {prompt!r}: logits differ by {error:.1e}\n  calm         {found}\n  transformers {expected}")
    print(f"{name}: {len(PROMPTS)} prompts of {NEW_TOKENS} new tokens, logits within {worst:.1e} of the largest")
sys.exit(1 if failures else 0)
