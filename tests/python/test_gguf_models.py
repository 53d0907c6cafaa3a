"""Writes each architecture's golden checkpoint as a .gguf file, with the converter's habits (rows of Llama's queries and keys
turned, one added to Gemma's norms, joined tensors, divisors of scaled frequencies), and holds the program calm to the golden
logits, read from the folder and from the .gguf file. Needs gguf, numpy and safetensors.

    CALM_SOURCE_DIR=. CALM_BUILD_DIR=build/release python tests/python/test_gguf_models.py
"""
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import gguf
except ImportError:
    print("skipped: this interpreter has no gguf (pip install gguf)")
    sys.exit(77)
import numpy as np
from safetensors.numpy import load_file

PROGRAM = Path(os.environ["CALM_BUILD_DIR"]) / "bin" / "calm"
GOLDEN = Path(os.environ["CALM_SOURCE_DIR"]) / "tests" / "golden" / "data"
TOLERANCE = 2e-4
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3",
                 "gemma3_text": "gemma3", "olmo2": "olmo2", "gpt_neox": "gptneox", "gpt2": "gpt2"}
SIMPLE = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
          "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
          "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
          "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.qkv_proj": "attn_qkv",
          "mlp.gate_up_proj": "ffn_up",
          "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
          "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
          "attention.query_key_value": "attn_qkv", "attention.dense": "attn_output", "mlp.dense_h_to_4h": "ffn_up",
          "mlp.dense_4h_to_h": "ffn_down"}
AROUND = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
          "post_feedforward_layernorm": "post_ffw_norm"}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
           "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
           "gpt_neox.embed_in": "token_embd", "gpt_neox.final_layer_norm": "output_norm", "embed_out": "output"}


def turned(weight, heads):
    """Rows of each head from two halves to neighbouring pairs."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def convert(folder, path):
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    kind = config["model_type"]
    arch = ARCHITECTURES[kind]
    out = gguf.GGUFWriter(path, arch)
    gpt2 = kind == "gpt2"
    width = config["n_embd" if gpt2 else "hidden_size"]
    heads = config["n_head" if gpt2 else "num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    head = config.get("head_dim") or width // heads
    out.add_block_count(config["n_layer" if gpt2 else "num_hidden_layers"])
    out.add_context_length(config["n_positions" if gpt2 else "max_position_embeddings"])
    out.add_embedding_length(width)
    out.add_feed_forward_length(4 * width if gpt2 else config["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_key_length(head)
    out.add_value_length(head)
    rope = config.get("rope_parameters") or {}
    if "rms_norm_eps" in config:
        out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    else:
        out.add_layer_norm_eps(config["layer_norm_epsilon" if gpt2 else "layer_norm_eps"])
    if not gpt2:
        full = rope.get("full_attention", rope)
        out.add_rope_freq_base(full["rope_theta"])
        out.add_rope_dimension_count(int(head * full.get("partial_rotary_factor", 1)))
        if full.get("rope_type") == "linear":
            out.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            out.add_rope_scaling_factor(full["factor"])
        if full.get("rope_type") == "llama3":
            frequencies = full["rope_theta"] ** (-np.arange(0, head, 2) / head)
            divisors = []
            for f in frequencies:
                turns = full["original_max_position_embeddings"] * f / (2 * math.pi)
                low, high, factor = full["low_freq_factor"], full["high_freq_factor"], full["factor"]
                blend = min(max((turns - low) / (high - low), 0), 1)
                divisors.append(1 / ((1 - blend) / factor + blend))
            out.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    if kind in ("gemma3_text", "phi3"):
        out.add_sliding_window(config["sliding_window"])
    if kind == "gemma3_text":
        full_every = config["layer_types"].index("full_attention") + 1
        assert config["layer_types"] == ["sliding_attention" if (i + 1) % full_every else "full_attention"
                                         for i in range(config["num_hidden_layers"])]
        out.add_sliding_window_pattern(full_every)
    for name, w in weights.items():
        if name.startswith(("model.layers.", "transformer.h.", "gpt_neox.layers.")):
            rest = name.split(".", 2)[2] if not name.startswith("transformer") else name.split(".", 2)[2]
            block, rest = rest.split(".", 1)
            module, suffix = rest.rsplit(".", 1)
            around = kind in ("gemma3_text", "olmo2") and module in AROUND
            target = f"blk.{block}.{AROUND[module] if around else SIMPLE[module]}.{suffix}"
            if gpt2 and w.ndim == 2:
                w = w.T
            if arch == "llama" and module == "self_attn.q_proj":
                w = turned(w, heads)
            if arch == "llama" and module == "self_attn.k_proj":
                w = turned(w, kv_heads)
            if kind == "gpt_neox" and module == "attention.query_key_value":
                w = w.reshape(heads, 3, head, *w.shape[1:]).swapaxes(0, 1).reshape(w.shape)
        else:
            module, suffix = name.rsplit(".", 1)
            target = f"{OUTSIDE[module]}.{suffix}"
        if kind == "gemma3_text" and "norm" in target:
            w = w + 1
        if kind == "gemma3_text" and "attn_q_norm" in target:  # no key says query_pre_attn_scalar
            w = w * math.sqrt(head / config["query_pre_attn_scalar"])
        out.add_tensor(target, np.ascontiguousarray(w, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def logits_of(model, golden, folder):
    """What calm computes for the golden sequences."""
    ids, offsets = golden["ids"].astype(int), golden["offsets"].astype(int)
    logits = []
    for begin, end in zip(offsets, offsets[1:]):
        out = folder / "logits.safetensors"
        subprocess.run([PROGRAM, "logits", "--model", model, "--ids", ",".join(map(str, ids[begin:end])), "--out", out],
                       check=True, stdout=subprocess.DEVNULL)
        logits.append(load_file(out)["logits"])
    return np.concatenate(logits)


def without_window(folder, copy):
    """The same model, but that every token sees all before it."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config.pop("layer_types", None)
    (copy / "config.json").write_text(json.dumps({**config, "sliding_window": None, "use_sliding_window": False}))
    return copy


failures = 0
for folder in sorted(GOLDEN.glob("zoo_*")):
    golden = load_file(folder / "golden.safetensors")
    config = json.loads((folder / "config.json").read_text())
    kind = config["model_type"]
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        convert(folder, work / "model.gguf")
        errors = {"folder": np.abs(logits_of(folder, golden, work) - golden["logits"]).max()}
        # Files of Mistral and Qwen3 say nothing of windows: they agree with the folder's model without one.
        expected = golden["logits"]
        if kind in ("mistral", "qwen3"):
            expected = logits_of(without_window(folder, work / "copy"), golden, work)
            assert np.abs(expected - golden["logits"]).max() > 0.1, "no sequence is longer than the window"
        errors["gguf"] = np.abs(logits_of(work / "model.gguf", golden, work) - expected).max()
        print(f"{folder.name:14}", "  ".join(f"{k} {v:.1e}" for k, v in errors.items()))
        failures += any(not e < TOLERANCE for e in errors.values())
sys.exit(1 if failures else 0)
