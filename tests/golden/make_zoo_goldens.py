"""Makes the folders data/zoo_* beside it: a tiny random checkpoint of each architecture as transformers saves it, and what
transformers computes with it. Needs torch, transformers and safetensors:  python tests/golden/make_zoo_goldens.py [FOLDER]

golden.safetensors: ids [T] and offsets [sequences + 1] of a ragged batch (as floats), logits [T, V], hidden.{i} [T, D] (0 = what enters
block 0, i = the stream after block i - 1, before the final norm), computed in float64.
"""
import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "data"
SEQUENCES = [11, 1, 7]
VOCABULARY = 61
torch.set_num_threads(1)
disable_progress_bar()

COMMON = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=None)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
MODELS = {
    "llama3": ("LlamaConfig", {**COMMON, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**COMMON, "head_dim": 12, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", {**COMMON}),
    "qwen3": ("Qwen3Config", {**COMMON, "head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "gemma3": ("Gemma3TextConfig", {**COMMON, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24,
                                    "query_pre_attn_scalar": 16, "sliding_window": 4,
                                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                                    "rope_parameters": {
                                        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                                        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}}}),
    "olmo2": ("Olmo2Config", {**COMMON}),
    "phi3": ("Phi3Config", {**COMMON, "sliding_window": 6, "tie_word_embeddings": False,
                            "original_max_position_embeddings": 64}),
    "gpt_neox": ("GPTNeoXConfig", {**{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}, "hidden_act": "gelu",
                                   "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                       "partial_rotary_factor": 0.5}}),
    "gpt2": ("GPT2Config", dict(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0,
                                eos_token_id=1)),
}


def randomise(model, generator):
    """Every weight away from the value it starts with, so that no norm or bias can be left out unnoticed."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 1:
                starts_as_one = "norm" in name or "ln_" in name
                base = 0.0 if name.endswith("bias") or isinstance(model, transformers.Gemma3ForCausalLM) else 1.0
                p.copy_((base if starts_as_one else 0.0) + 0.2 * noise)
            else:
                p.copy_(noise * (0.7 if "emb" in name or "wte" in name or "wpe" in name else 1.2 / p.shape[-1] ** 0.5))


def streams_of(model, ids):
    """Logits and the residual stream before each block and after the last."""
    base = model.base_model
    blocks = base.layers if hasattr(base, "layers") else base.h
    seen, hooks = [], []
    first = lambda value: value[0] if isinstance(value, tuple) else value
    hooks.append(blocks[0].register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True))
    for block in blocks:
        hooks.append(block.register_forward_hook(lambda m, args, out: seen.append(first(out))))
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, [s[0] for s in seen]


for number, (name, (config_class, options)) in enumerate(MODELS.items()):
    generator = torch.Generator().manual_seed(100 + number)
    config = getattr(transformers, config_class)(**options)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, generator)
    folder = OUT / f"zoo_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model = model.double()
    if name == "gemma3":  # kept as float32 buffers
        model.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5, dtype=torch.float64)
    sequences = [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in SEQUENCES]
    results = [streams_of(model, ids) for ids in sequences]
    tensors = {"ids": torch.cat(sequences).float(),
               "offsets": torch.tensor([0, *torch.tensor(SEQUENCES).cumsum(0)]).float(),
               "logits": torch.cat([r[0] for r in results])}
    for i in range(len(results[0][1])):
        tensors[f"hidden.{i}"] = torch.cat([r[1][i] for r in results])
    save_file({k: v.float().contiguous() if v.is_floating_point() else v for k, v in tensors.items()},
              folder / "golden.safetensors")
    print(f"{name:10} logits to {tensors['logits'].abs().max():.1f}")
