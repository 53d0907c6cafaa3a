"""Holds what calm reads in a config.json from which a key is left out, or is null, to what transformers' config classes make of
it, for every key that either may lack. Needs torch and transformers.

    CALM_SOURCE_DIR=. CALM_BUILD_DIR=build/tests python tests/python/test_config_defaults.py
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import CONFIG_MAPPING

PROGRAM = Path(os.environ["CALM_BUILD_DIR"]) / "tests" / "python" / "describe_configs"

# Every key with another value than its default; what is left out shows. The number of heads fits every default.
SIZES = dict(vocab_size=61, hidden_size=128, intermediate_size=48, num_hidden_layers=31, num_attention_heads=32)
COMMON = {**SIZES, "num_key_value_heads": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-3, "tie_word_embeddings": True,
          "hidden_act": "silu", "rope_theta": 500.0}
WINDOWS = dict(head_dim=20, use_sliding_window=True, sliding_window=5, max_window_layers=1)
FULL = {
    "llama": {**COMMON, "head_dim": 20, "attention_bias": False, "mlp_bias": False},
    "mistral": {**COMMON, "head_dim": 20, "sliding_window": 5},
    "qwen2": {**COMMON, **WINDOWS},
    "qwen3": {**COMMON, **WINDOWS, "attention_bias": False},
    "phi3": {**COMMON, "hidden_size": 256, "sliding_window": 5, "partial_rotary_factor": 0.5},
    "gemma3_text": {**{k: v for k, v in COMMON.items() if k != "hidden_act"}, "tie_word_embeddings": False, "head_dim": 20,
                    "num_key_value_heads": 2,
                    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 16, "sliding_window": 5,
                    "sliding_window_pattern": 3, "rope_local_base_freq": 300.0},
    "olmo2": {**COMMON, "attention_bias": False},
    "gpt_neox": {**SIZES, "hidden_size": 256, "max_position_embeddings": 64, "layer_norm_eps": 1e-3, "tie_word_embeddings": True,
                 "hidden_act": "gelu", "rotary_emb_base": 500.0, "rotary_pct": 0.5, "use_parallel_residual": True,
                 "attention_bias": True},
    "gpt2": dict(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64, n_inner=40, layer_norm_epsilon=1e-3,
                 activation_function="gelu_new", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
                 add_cross_attention=False, tie_word_embeddings=False),
}
# Sizes that every file has but Gemma 3's: calm asks for them.
REQUIRED = {*SIZES, "n_embd", "n_layer", "n_head", "n_positions"}
# Keys whose null transformers takes for "none", or for what the other sizes give.
NULL = {"llama": ["num_key_value_heads", "head_dim"], "mistral": ["head_dim", "sliding_window"],
        "qwen2": ["num_key_value_heads", "sliding_window"], "qwen3": ["num_key_value_heads", "sliding_window"],
        "phi3": ["num_key_value_heads", "sliding_window"], "olmo2": ["num_key_value_heads"], "gpt2": ["n_inner"]}


def expected(kind, config):
    """What calm calls the values of a transformers config."""
    if kind == "gpt2":
        width, heads = config.n_embd, config.n_head
        return dict(model_type=kind, vocabulary=config.vocab_size, width=width, hidden=config.n_inner or 4 * width, heads=heads,
                    kv_heads=heads, head_width=width // heads, norm_epsilon=config.layer_norm_epsilon, context=config.n_positions,
                    tied_embeddings=config.tie_word_embeddings, windowed=[False] * config.n_layer)
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention", rope)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    scale = (head_width / config.query_pre_attn_scalar) ** 0.5 if kind == "gemma3_text" else 1
    return dict(model_type=kind, vocabulary=config.vocab_size, width=config.hidden_size, hidden=config.intermediate_size, heads=heads,
                kv_heads=getattr(config, "num_key_value_heads", heads), head_width=head_width,
                norm_epsilon=config.layer_norm_eps if kind == "gpt_neox" else config.rms_norm_eps,
                context=config.max_position_embeddings, tied_embeddings=config.tie_word_embeddings, query_scale=scale,
                rotary_base=full["rope_theta"], window_rotary_base=local["rope_theta"],
                rotary_width=int(head_width * full.get("partial_rotary_factor", 1)), window=window or 0,
                windowed=[bool(window) and k == "sliding_attention" for k in kinds])


def changed(document, key, value="left out"):
    document = {k: v for k, v in document.items() if k != key}
    return document if value == "left out" else {**document, key: value}


cases = []  # what is special, model type, config.json
for kind, full in FULL.items():
    cases.append(("nothing left out", kind, full))
    cases += [(f"without {key}", kind, changed(full, key)) for key in full if kind == "gemma3_text" or key not in REQUIRED]
    cases += [(f"{key} null", kind, changed(full, key, None)) for key in NULL.get(kind, [])]
    bare = {k: v for k, v in full.items() if k in REQUIRED}
    cases.append(("sizes alone", kind, bare))
    if kind.startswith("qwen"):
        cases.append(("a window and nothing else", kind, {**bare, "use_sliding_window": True}))
    if kind not in ("gpt2", "gemma3_text"):
        cases.append(("an empty description of positions", kind, {**bare, "rope_parameters": {"rope_type": "default"}}))
cases.append(("nothing at all", "gemma3_text", {}))

with tempfile.TemporaryDirectory() as work:
    files = []
    for i, (_, kind, document) in enumerate(cases):
        nested = kind == "gemma3_text" and i % 2 == 0
        document = {"model_type": kind, **document}
        files.append(Path(work) / f"{i}.json")
        files[-1].write_text(json.dumps({"model_type": "gemma3", "text_config": document} if nested else document))
    done = subprocess.run([PROGRAM, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
failures = 0
for (what, kind, document), line in zip(cases, done.stdout.splitlines(), strict=True):
    ours, theirs = json.loads(line), expected(kind, CONFIG_MAPPING[kind].from_dict(dict(document)))
    wrong = {k: (ours[k], v) for k, v in theirs.items() if not (ours[k] == v or isinstance(v, float) and abs(ours[k] - v) < 1e-9)}
    if wrong:
        failures += 1
        print(f"{kind}, {what}: calm and transformers differ in {wrong}")
print(f"{len(cases)} files, {failures} read otherwise than by transformers")
sys.exit(1 if failures else 0)
