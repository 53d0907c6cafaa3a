"""Makes the folder data/ beside it: tiny random models as transformers saves them, adapters over them, and what calm must
compute with them. Needs torch, transformers and safetensors:  python tests/golden/make_goldens.py [FOLDER]

  llama, llama_tied, llama_narrow     model folders; the first two have golden.safetensors with ids [T] and offsets
                                      [sequences + 1] of a ragged batch, logits [T, V], hidden.{i} [T, D]
  composed_*                          adapters: anchor llama, augments llama_tied and llama_narrow; golden.safetensors with
                                      also loss [1] and grad.<tensor> of each trained tensor. The loss is the mean cross
                                      entropy over all predictions of a next token within a sequence.

hidden.{i}: 0 = the embeddings, i = the stream after block i - 1 and its links, before the final norm.

The expected values come from the plain float64 formulas below. They are checked here against transformers (the models) and
against examples/python/calm_adapter.py (the compositions), which share no code with them.
"""
import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "data"
VOCABULARY = 61
SEQUENCES = [11, 1, 7]

torch.set_num_threads(1)
disable_progress_bar()
generator = torch.Generator()


def normal(*shape, deviation=1.0):
    return torch.randn(*shape, generator=generator) * deviation


def rms_norm(x, weight, epsilon):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight


def rotate(x, base):  # [T, heads, width]; row t stands at position t
    width = x.shape[-1]
    result = torch.empty_like(x)
    for i in range(width // 2):
        angle = torch.arange(x.shape[0], dtype=x.dtype)[:, None] * base ** (-2 * i / width)
        result[..., i] = x[..., i] * angle.cos() - x[..., i + width // 2] * angle.sin()
        result[..., i + width // 2] = x[..., i + width // 2] * angle.cos() + x[..., i] * angle.sin()
    return result


def attend(q, k, v):  # [T, heads, width]; position t sees the keys 0 to t
    rows = []
    for t in range(q.shape[0]):
        scores = torch.einsum("hd,shd->hs", q[t], k[: t + 1]) / math.sqrt(q.shape[-1])
        rows.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v[: t + 1]).reshape(-1))
    return torch.stack(rows)


class Llama:
    """A saved model in float64, for one sequence at a time."""

    def __init__(self, name):
        self.config = json.loads((OUT / name / "config.json").read_text())
        self.weights = {key: w.double() for key, w in load_file(OUT / name / "model.safetensors").items()}

    def heads(self, x, count):
        return x.reshape(x.shape[0], count, -1)

    def block(self, i, x):
        w = lambda name: self.weights[f"model.layers.{i}.{name}.weight"]
        c, epsilon = self.config, self.config["rms_norm_eps"]
        heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        y = rms_norm(x, w("input_layernorm"), epsilon)
        base = c["rope_parameters"]["rope_theta"]
        q = rotate(self.heads(y @ w("self_attn.q_proj").T, heads), base)
        k = rotate(self.heads(y @ w("self_attn.k_proj").T, kv_heads), base)
        v = self.heads(y @ w("self_attn.v_proj").T, kv_heads)
        group = [h // (heads // kv_heads) for h in range(heads)]  # query head h reads this key-value head
        x = x + attend(q, k[:, group], v[:, group]) @ w("self_attn.o_proj").T
        y = rms_norm(x, w("post_attention_layernorm"), epsilon)
        gate = y @ w("mlp.gate_proj").T
        return x + (gate / (1 + torch.exp(-gate)) * (y @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T

    def streams(self, ids, links=lambda i, x: 0):
        """The embeddings, then the stream after each block and what its links add."""
        result = [self.weights["model.embed_tokens.weight"][ids]]
        for i in range(self.config["num_hidden_layers"]):
            x = self.block(i, result[-1])
            result.append(x + links(i, x))
        return result

    def logits(self, stream):
        head = "model.embed_tokens.weight" if self.config["tie_word_embeddings"] else "lm_head.weight"
        return rms_norm(stream, self.weights["model.norm.weight"], self.config["rms_norm_eps"]) @ self.weights[head].T


def bridge(w, options, a, x):
    """What one link adds to the anchor's stream x, from the augment's stream a; w: the link's tensors."""
    if options["norms"]:
        a, x = rms_norm(a, w["norm_augment.weight"], 1e-6), rms_norm(x, w["norm_anchor.weight"], 1e-6)
    if options["rank"]:
        p = a @ w["projection.down.weight"].T @ w["projection.up.weight"].T
    else:
        p = a @ w["projection.weight"].T
    q, k, v = (y.reshape(y.shape[0], options["heads"], -1)
               for y in (x @ w["q_proj.weight"].T, p @ w["k_proj.weight"].T, p @ w["v_proj.weight"].T))
    if options["rotary"]:
        q, k = rotate(q, 10000), rotate(k, 10000)
    delta = attend(q, k, v) @ w["o_proj.weight"].T
    return torch.tanh(w["gate"]) * delta if options["gate"] == "tanh" else delta


def composed_streams(anchor, augments, options, links, tensors, ids):
    tapped = [augment.streams(ids) for augment in augments]

    def added(block, x):
        total = torch.zeros_like(x)
        for k, link in enumerate(links):
            if link["write"] == block:
                prefix = f"links.{k}."
                w = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
                total = total + bridge(w, options, tapped[link["augment"]][link["tap"] + 1], x)
        return total

    return anchor.streams(ids, added)


def save_llama(name, seed, dtype, **sizes):
    """A model folder as save_pretrained writes it, with weights that make every part of the model matter."""
    generator.manual_seed(seed)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, **sizes)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for key, w in model.named_parameters():
            if "norm" in key:
                w.copy_(1 + normal(*w.shape, deviation=0.2))
            else:
                w.copy_(normal(*w.shape, deviation=0.7 if "embed" in key else 1.3 / math.sqrt(w.shape[1])))
    model.to(dtype).save_pretrained(OUT / name)
    (OUT / name / "generation_config.json").unlink(missing_ok=True)


def random_sequences(seed):
    generator.manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in SEQUENCES]


def write_golden(name, sequences, tensors):
    offsets = torch.tensor([sum(SEQUENCES[:s]) for s in range(len(SEQUENCES) + 1)])
    tensors = {"ids": torch.cat(sequences), "offsets": offsets, **tensors}
    save_file({key: t.detach().float().contiguous() for key, t in tensors.items()}, OUT / name / "golden.safetensors")


def check(what, found, expected, tolerance):
    error = float((found.double() - expected).abs().max() / expected.abs().max())
    print(f"{what}: differs by {error:.1e} of the largest value")
    if not error < tolerance:
        sys.exit(f"{what}: more than {tolerance}")


def golden_of_model(name, seed):
    sequences, model = random_sequences(seed), Llama(name)
    streams = [model.streams(ids) for ids in sequences]
    logits = torch.cat([model.logits(s[-1]) for s in streams])
    hidden = {f"hidden.{i}": torch.cat([s[i] for s in streams]) for i in range(len(streams[0]))}
    theirs = LlamaForCausalLM.from_pretrained(OUT / name, dtype=torch.float32).eval()
    with torch.no_grad():
        check(f"{name}, transformers", torch.cat([theirs(ids[None]).logits[0] for ids in sequences]), logits, 1e-5)
    write_golden(name, sequences, {"logits": logits, **hidden})


ANCHOR, AUGMENTS = "llama", ["llama_tied", "llama_narrow"]
LINKS = [{"augment": a, "tap": tap, "write": write} for a, tap, write in ((1, 0, 2), (0, 1, 0), (0, 1, 2), (1, 1, 1))]


def save_adapter(name, seed, options):
    """An adapter with random weights; without `bases`, which only calm's own hash can name."""
    generator.manual_seed(seed)
    width = Llama(ANCHOR).config["hidden_size"]
    tensors = {}
    for k, link in enumerate(LINKS):
        augment_width = Llama(AUGMENTS[link["augment"]]).config["hidden_size"]
        shapes = {f"{p}_proj.weight": (width, width) for p in "qkvo"}
        if options["rank"]:
            shapes["projection.down.weight"] = (options["rank"], augment_width)
            shapes["projection.up.weight"] = (width, options["rank"])
        else:
            shapes["projection.weight"] = (width, augment_width)
        for key, (rows, cols) in shapes.items():
            tensors[f"links.{k}.{key}"] = normal(rows, cols, deviation=1 / math.sqrt(cols))
        if options["norms"]:
            tensors[f"links.{k}.norm_anchor.weight"] = 1 + normal(width, deviation=0.2)
            tensors[f"links.{k}.norm_augment.weight"] = 1 + normal(augment_width, deviation=0.2)
        if options["gate"] == "tanh":
            tensors[f"links.{k}.gate"] = normal(1, deviation=0.7)
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "CALM", "format_version": 1, "options": options, "links": LINKS, "bases": []}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def golden_of_composition(name, seed, options):
    save_adapter(name, seed, options)
    tensors = {key: t.double().requires_grad_() for key, t in load_file(OUT / name / "adapter_model.safetensors").items()}
    anchor, augments, sequences = Llama(ANCHOR), [Llama(a) for a in AUGMENTS], random_sequences(seed + 1)
    streams = [composed_streams(anchor, augments, options, LINKS, tensors, ids) for ids in sequences]
    logits = [anchor.logits(s[-1]) for s in streams]
    losses = [l[:-1].logsumexp(-1) - l[:-1].gather(1, ids[1:, None])[:, 0] for l, ids in zip(logits, sequences)]
    loss = torch.cat(losses).mean()
    loss.backward()
    logits = torch.cat(logits).detach()

    sys.path.insert(0, str(HERE.parent.parent / "examples" / "python"))
    from calm_adapter import compose
    opened = [LlamaForCausalLM.from_pretrained(OUT / n, dtype=torch.float32).eval() for n in (ANCHOR, *AUGMENTS)]
    compose(opened[0], opened[1:], OUT / name)
    with torch.no_grad():
        theirs = torch.cat([opened[0](ids[None], use_cache=False).logits[0] for ids in sequences])
    check(f"{name}, calm_adapter.py", theirs, logits, 1e-5)

    hidden = {f"hidden.{i}": torch.cat([s[i] for s in streams]) for i in range(len(streams[0]))}
    grads = {f"grad.{key}": t.grad for key, t in tensors.items()}
    write_golden(name, sequences, {"logits": logits, "loss": loss[None], **hidden, **grads})


save_llama("llama", 1, torch.float32, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
           num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False)
save_llama("llama_tied", 2, torch.bfloat16, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
           num_key_value_heads=3, rms_norm_eps=1e-6, rope_theta=500.0, tie_word_embeddings=True)
save_llama("llama_narrow", 3, torch.float32, hidden_size=20, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2,
           num_key_value_heads=1, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False)
golden_of_model("llama", 11)
golden_of_model("llama_tied", 12)
golden_of_composition("composed_norms_rotary", 21, {"heads": 4, "norms": True, "gate": "one", "rotary": True, "rank": 0})
golden_of_composition("composed_paper", 31, {"heads": 2, "norms": False, "gate": "one", "rotary": False, "rank": 0})
golden_of_composition("composed_tanh_low_rank", 41, {"heads": 8, "norms": True, "gate": "tanh", "rotary": False, "rank": 6})
