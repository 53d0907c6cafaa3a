"""The peer of compare_start.sh: --write makes a checkpoint of Gemma 3 270M's sizes with random weights (bf16, 0.5 GB);
--load opens it with transformers and prints the seconds until the logits of one token are there, imports not counted."""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig


def write(folder):
    torch.manual_seed(0)
    config = Gemma3TextConfig(vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
                              num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512)
    Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def load(folder):
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model(torch.tensor([[5]])).logits
    assert logits.shape == (1, 1, 262144)
    print(time.perf_counter() - start)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--write", metavar="FOLDER")
parser.add_argument("--load", metavar="FOLDER")
parser.add_argument("--threads", type=int, default=0)
arguments = parser.parse_args()
if arguments.threads:
    torch.set_num_threads(arguments.threads)
if arguments.write:
    write(arguments.write)
if arguments.load:
    load(arguments.load)
