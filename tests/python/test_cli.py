"""Holds the program calm to the golden compositions: logits, hidden states, loss and gradients of every bridge, for adapters that
`calm init` made and whose weights are then the golden ones. Also its exit statuses and what it says to wrong use. Needs
safetensors and numpy.

    CALM_SOURCE_DIR=. CALM_BUILD_DIR=build/release python tests/python/test_cli.py
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

PROGRAM = Path(os.environ["CALM_BUILD_DIR"]) / "bin" / "calm"
GOLDEN = Path(os.environ["CALM_SOURCE_DIR"]) / "tests" / "golden" / "data"
BASES = ["--anchor", GOLDEN / "llama", "--augment", GOLDEN / "llama_tied", "--augment", GOLDEN / "llama_narrow"]


def run(*arguments, status=0):
    done = subprocess.run([str(a) for a in (PROGRAM, *arguments)], capture_output=True, text=True)
    assert done.returncode == status, f"{arguments}: status {done.returncode}, expected {status}\n{done.stderr}"
    return done.stdout if status == 0 else done.stderr


def close(ours, theirs, what, tolerance=2e-4):
    error = np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())
    print(f"{what:40} {error:.1e}")
    assert ours.shape == theirs.shape and error < tolerance, what


with tempfile.TemporaryDirectory() as work:
    work = Path(work)
    for name, options in {"composed_paper": ["--preset", "paper", "--heads", "2"]}.items():
        config = json.loads((GOLDEN / name / "adapter_config.json").read_text())
        links = ",".join(f"{link['augment']}:{link['tap']}>{link['write']}" for link in config["links"])
        run("init", *BASES, "--links", links, *options, "--out", work / name)
        made = json.loads((work / name / "adapter_config.json").read_text())
        assert made["peft_type"] == "CALM" and made["links"] == config["links"] and len(made["bases"]) == 3
        assert made["options"] == config["options"], (made["options"], config["options"])
        weights, golden = load_file(GOLDEN / name / "adapter_model.safetensors"), load_file(GOLDEN / name / "golden.safetensors")
        fresh = load_file(work / name / "adapter_model.safetensors")
        assert {k: v.shape for k, v in fresh.items()} == {k: v.shape for k, v in weights.items()}
        save_file(weights, work / name / "adapter_model.safetensors")
        ids, offsets = golden["ids"].astype(int), golden["offsets"].astype(int)
        tokens, loss, gradients = 0, 0.0, {}
        for begin, end in zip(offsets, offsets[1:]):
            text = ",".join(map(str, ids[begin:end]))
            here = [*BASES, "--adapter", work / name, "--ids", text, "--alignment", "identity"]
            run("logits", *here, "--hidden", "--out", work / "out.safetensors")
            out = load_file(work / "out.safetensors")
            for tensor, value in out.items():
                close(value, golden[tensor][begin:end], f"{name} {tensor} [{begin}:{end}]")
            if end - begin < 2:
                assert "two tokens" in run("gradients", *here, "--out", work / "g.safetensors", status=1)
                continue
            run("gradients", *here, "--out", work / "g.safetensors")
            out = load_file(work / "g.safetensors")
            tokens += end - begin - 1
            loss += out.pop("loss")[0] * (end - begin - 1)
            for tensor, value in out.items():
                gradients[tensor] = gradients.get(tensor, 0) + value * (end - begin - 1)
        close(np.array([loss / tokens]), golden["loss"], f"{name} loss")
        assert set(gradients) == {k for k in golden if k.startswith("grad.")}
        for tensor, value in gradients.items():
            close(value / tokens, golden[tensor], f"{name} {tensor}")
        other = ["--anchor", GOLDEN / "llama_tied", "--augment", GOLDEN / "llama_tied", "--augment", GOLDEN / "llama_narrow"]
        assert "the anchor of the adapter" in run("logits", *other, "--adapter", work / name, "--ids", "1", "--out", work / "x",
                                                  status=1)
        assert json.loads(run("inspect", work / name, "--json"))["kind"] == "adapter"
    description = json.loads(run("inspect", GOLDEN / "zoo_gemma3", "--json"))
    assert description["architecture"] == "gemma3_text" and description["blocks"] == 3
    assert "Example" in run("init", "--help")
    run("nonsense", status=2)
    run("logits", "--ids", "1", "--out", work / "x", status=2)
    run("logits", "--model", GOLDEN / "llama", "--ids", "1,x", "--out", work / "x", status=2)
    assert "no such folder" in run("inspect", work / "nowhere", status=1)
    (work / "bad").mkdir()
    (work / "bad" / "config.json").write_text('{"model_type": "mamba"}')
    save_file({"x": np.zeros(1, np.float32)}, work / "bad" / "model.safetensors")
    assert "these are: llama" in run("inspect", work / "bad", status=1)
