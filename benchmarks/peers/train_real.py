"""The peer of `train_composed --anchor-file --augment-file`: SmolLM2-135M and Gemma 3 270M of transformers, composed with the
bridges of train_composed.py and trained on the same batches with PyTorch on the CPU. The weights are random, since speed
does not depend on them; the sizes are those of the two models. One line of JSON, as train_composed.py prints it.

Both base models are frozen: the augment runs under no_grad and ends at its highest tap, the anchor below the lowest link
records nothing, and the output head sees scored tokens only.

python train_real.py --batches FILE [--threads N] [--dtype bf16] [--reverse] [--compile]
"""
import argparse

import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from train_composed import (Bridge, add_training_options, context_of, measure, parse_links, print_result, read_batches,
                            rotary_table)


def smollm2():
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000, tie_word_embeddings=True))


def gemma3():
    return Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256, sliding_window=512,
        max_position_embeddings=32768))


class Composed(nn.Module):
    def __init__(self, anchor, augment, links, heads, context):
        super().__init__()
        self.anchor, self.augment, self.tapped = anchor, augment, {}
        for model in (anchor, augment):
            model.requires_grad_(False)
            model.config._attn_implementation = "sdpa"
        taps = {tap for tap, _ in links}
        augment.model.layers = augment.model.layers[: max(taps) + 1]
        for tap in taps:
            augment.model.layers[tap].register_forward_hook(self.keep(tap))
        width = anchor.config.hidden_size
        heads = heads or anchor.config.num_attention_heads
        self.links = nn.ModuleList(Bridge(width, augment.config.hidden_size, heads) for _ in links)
        self.table = rotary_table(context, width // heads)
        for write in sorted({write for _, write in links}):
            here = [(bridge, tap) for bridge, link in zip(self.links, links) for tap in [link[0]] if link[1] == write]
            anchor.model.layers[write].register_forward_hook(self.write(here))

    def keep(self, tap):
        def hook(module, inputs, output):
            self.tapped[tap] = output[0] if isinstance(output, tuple) else output
        return hook

    def write(self, bridges):
        def hook(module, inputs, output):
            x = output[0] if isinstance(output, tuple) else output
            y = x + sum(bridge(self.tapped[tap], x, self.table) for bridge, tap in bridges)
            return (y, *output[1:]) if isinstance(output, tuple) else y
        return hook

    def forward(self, ids, rows):
        """ids [B, T] -> the logits of the given rows of [B * T]."""
        with torch.no_grad():
            self.augment.model(input_ids=ids, use_cache=False)
        x = self.anchor.model(input_ids=ids, use_cache=False).last_hidden_state
        return self.anchor.lm_head(x.flatten(0, 1)[rows]).float()

    def to_dtype(self, dtype):
        self.table = tuple(part.to(dtype) for part in self.table)
        return self.to(dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", required=True, help="see train_composed.py")
    parser.add_argument("--links", default="0:3>6,0:8>14,0:12>21,0:17>29", help="augment:tap block>write block")
    parser.add_argument("--reverse", action="store_true", help="Gemma 3 is the anchor, SmolLM2 its augment")
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32", help="of weights and arithmetic")
    add_training_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    batches = read_batches(args.batches)
    anchor, augment = (gemma3(), smollm2()) if args.reverse else (smollm2(), gemma3())
    model = Composed(anchor, augment, parse_links(args.links), args.heads, context_of(batches))
    if args.dtype == "bf16":
        model = model.to_dtype(torch.bfloat16)
    print_result(measure(model, batches, 1, args), model, batches, args, dtype=args.dtype)


if __name__ == "__main__":
    main()
