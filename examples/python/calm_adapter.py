"""Opens an adapter of calm in PyTorch and composes transformers models with it: `compose(anchor, [augment], folder)`.
As a script: python calm_adapter.py --anchor DIR --augment DIR --adapter DIR --ids 1,2,3 [--out logits.safetensors]

After compose() the anchor's own forward is the composed model's; `composition.remove()` gives the plain anchor back. The
names of composition.state_dict() are those of the adapter's file, so that bridges trained in PyTorch can be written back
with save_file(). Not here: another alignment than identity, caches (generate with use_cache=False).
"""
import argparse
import json
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn


def rotate(x, positions):
    """Rotary positions, half-split, base 10000: x [batch, heads, T, width], positions [batch or 1, T]."""
    half = x.shape[-1] // 2
    frequencies = 10000 ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angles = positions[:, None, :, None].double() * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Bridge(nn.Module):
    """What one link adds to the anchor's stream: projection of the augment's, then cross-attention to it."""

    def __init__(self, anchor_width, augment_width, options):
        super().__init__()
        linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)
        rank = options.get("rank", 0)
        self.heads, self.rotary = options["heads"], options.get("rotary", False)
        if rank == 0:
            self.projection = linear(augment_width, anchor_width)
        else:
            parts = [("down", linear(augment_width, rank)), ("up", linear(rank, anchor_width))]
            self.projection = nn.Sequential(OrderedDict(parts))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, linear(anchor_width, anchor_width))
        norms = options.get("norms", True)
        self.norm_anchor = nn.RMSNorm(anchor_width, eps=1e-6) if norms else nn.Identity()
        self.norm_augment = nn.RMSNorm(augment_width, eps=1e-6) if norms else nn.Identity()
        self.gate = nn.Parameter(torch.zeros(1)) if options.get("gate") == "tanh" else None

    def forward(self, a, x, positions, visible):
        """a [batch, T, D_A], x [batch, T, D_B] -> [batch, T, D_B]"""
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        projected = self.projection(self.norm_augment(a))
        q, k, v = split(self.q_proj(self.norm_anchor(x))), split(self.k_proj(projected)), split(self.v_proj(projected))
        if self.rotary:
            q, k = rotate(q, positions), rotate(k, positions)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)
        delta = self.o_proj(y.transpose(1, 2).flatten(2))
        return delta if self.gate is None else torch.tanh(self.gate) * delta


class Composition(nn.Module):
    """The bridges and the hooks by which they read the augments and write into the anchor."""

    def __init__(self, anchor, augments, config):
        super().__init__()
        options = {**config["options"], "heads": config["options"].get("heads") or anchor.config.num_attention_heads}
        self.where = [(link["augment"], link["tap"], link["write"]) for link in config["links"]]
        width, widths = anchor.config.hidden_size, [augment.config.hidden_size for augment in augments]
        self.links = nn.ModuleList(Bridge(width, widths[a], options) for a, _, _ in self.where)
        self.running = None  # the augment that runs now; None: the anchor
        self.states = {}  # (augment, block) -> its stream, for one forward of the anchor
        self.augments = [augment.base_model for augment in augments]  # in a plain list they are no submodules
        base = anchor.base_model
        self.handles = [base.register_forward_pre_hook(self.before_anchor, with_kwargs=True)]
        for a, block in {(a, tap) for a, tap, _ in self.where}:
            self.listen(self.augments[a].layers[block], self.read, a, block)
        for block in {write for _, _, write in self.where}:
            self.listen(base.layers[block], self.write, block)

    def listen(self, layer, method, *where):
        def hook(_, __, output):  # a layer gives its stream, in older versions of transformers as the first of a tuple
            y = method(*where, output[0] if isinstance(output, tuple) else output)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        self.handles.append(layer.register_forward_hook(hook))

    def before_anchor(self, _, args, kwargs):
        if self.running is not None:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        past = next((v for v in kwargs.values() if hasattr(v, "get_seq_length")), None)  # its name has changed
        if ids is None or (past is not None and past.get_seq_length() > 0):
            raise ValueError("a composed model reads whole sequences of input_ids: call with use_cache=False")
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        self.positions = torch.arange(ids.shape[1], device=ids.device)[None] if positions is None else positions
        self.visible = None  # causal; with padding also without the padded keys
        if mask is not None and not mask.all():
            causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
            self.visible = causal & mask.bool()[:, None, None, :]
        for self.running, augment in enumerate(self.augments):
            with torch.no_grad():
                augment(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        self.running = None

    def read(self, augment, block, stream):
        if self.running == augment:
            self.states[augment, block] = stream
        return stream

    def write(self, block, x):
        """The links that write after one block all read the stream before any of them has written."""
        if self.running is not None:
            return x
        y = x.float()
        for bridge, (a, tap, write) in zip(self.links, self.where):
            if write == block:
                tapped = self.states[a, tap].to(x.device).float()
                y = y + bridge(tapped, x.float(), self.positions, self.visible)
        return y.to(x.dtype)

    def remove(self):
        for handle in self.handles:
            handle.remove()


def check_base(folder, role, base, config):
    """Raises ValueError where a model has not the architecture, vocabulary, width and blocks of the adapter's base."""
    stored = dict(part.split(" ", 1) for part in base["sizes"].split(", "))
    found = {"vocabulary": config.vocab_size, "width": config.hidden_size, "blocks": config.num_hidden_layers}
    found = {name: str(value) for name, value in found.items()}
    expected = {name: stored.get(name) for name in found}
    if (base["architecture"], expected) != (config.model_type, found):
        raise ValueError(
            f"{folder}: {role} of the adapter is a {base['architecture']} of {expected}, the given one a "
            f"{config.model_type} of {found}"
        )


def compose(anchor, augments, adapter_dir):
    """Joins the models by the trained bridges of an adapter; the bridges compute in float32."""
    folder = Path(adapter_dir)
    config = json.loads((folder / "adapter_config.json").read_text())
    if config.get("peft_type") != "CALM" or config.get("format_version") != 1:
        raise ValueError(f"{folder}: expected an adapter of peft_type CALM, format_version 1")
    if config.get("alignment", config["options"].get("alignment", "identity")) != "identity":
        raise ValueError(f"{folder}: only the identity alignment can be opened here")
    if len(config["bases"]) != 1 + len(augments):
        raise ValueError(f"{folder}: the adapter has {len(config['bases']) - 1} augments, {len(augments)} were given")
    for i, (base, model) in enumerate(zip(config["bases"], [anchor, *augments])):
        check_base(folder, f"augment {i - 1}" if i else "the anchor", base, model.config)
    composition = Composition(anchor, augments, config)
    composition.load_state_dict(load_file(folder / "adapter_model.safetensors"))
    return composition.to(anchor.device).float()


def main():
    parser = argparse.ArgumentParser(description="Logits of a composed model, the same as `calm logits` gives.")
    parser.add_argument("--anchor", required=True)
    parser.add_argument("--augment", required=True, action="append")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--ids", required=True, help="1,2,3")
    parser.add_argument("--out", help="write the tensor `logits` [T, V] to this file")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    anchor, *augments = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
                         for path in (args.anchor, *args.augment)]
    compose(anchor, augments, args.adapter)
    with torch.no_grad():
        logits = anchor(torch.tensor([[int(i) for i in args.ids.split(",")]]), use_cache=False).logits[0]
    if args.out:
        save_file({"logits": logits.contiguous()}, args.out)
    else:
        print("argmax", int(logits[-1].argmax()), "logits", *[f"{x:.6g}" for x in logits[-1].tolist()])


if __name__ == "__main__":
    main()
