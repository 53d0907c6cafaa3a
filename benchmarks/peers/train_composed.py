"""The PyTorch peer of calm's training benchmark: the same composed model, trained on the same batches, on the CPU, in f32.

Both base models are frozen: the augment and the anchor below the lowest link run under no_grad, an augment stops at its
highest tap, the output head sees scored tokens only. A step is forward, backward, clipping and AdamW. Batches are padded;
each is cut into 2, 4 or 8 pieces of sorted lengths (--buckets) and the fastest of these is reported. Prints one JSON line;
tokens_per_second counts real tokens (each sequence without its last token, as calm counts), the median over the steps.

python train_composed.py [--batches FILE] [--threads N] [--compile]
FILE: JSON lines, one optimizer step a line: [{"ids": [5, 9, 2], "completion": 1}, ...], where ids are prompt and completion
and `completion` is the index of the first token that is scored. Without it random sequences of the same kind are made.
"""
import argparse
import json
import resource
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, T, D] -> [B, heads, T, width]


def rotary_table(length, width, base=10000.0):
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return torch.cat([angles, angles], -1).cos().float(), torch.cat([-angles.sin(), angles.sin()], -1).float()


def rotate(x, table):
    cos, sin = (part[: x.shape[-2]] for part in table)
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin  # rolled by half a head: each value beside its partner


class Block(nn.Module):
    def __init__(self, width, heads, kv_heads, hidden):
        super().__init__()
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, width // heads
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.qkv = linear(width, (heads + 2 * kv_heads) * self.head_width)  # frozen, so that one product serves all three
        self.o = linear(width, width)
        self.gate_up, self.down = linear(width, 2 * hidden), linear(hidden, width)

    def forward(self, x, table):
        q, k, v = split_heads(self.qkv(self.norm_attention(x)), self.heads + 2 * self.kv_heads).split(
            [self.heads, self.kv_heads, self.kv_heads], 1)
        y = F.scaled_dot_product_attention(rotate(q, table), rotate(k, table), v, is_causal=True,
                                           enable_gqa=self.heads != self.kv_heads)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, vocabulary, width, blocks, heads, kv_heads, hidden, context):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, hidden) for _ in range(blocks))
        self.norm, self.head = nn.RMSNorm(width, eps=1e-5), linear(width, vocabulary)
        self.table = rotary_table(context, width // heads)
        self.requires_grad_(False)


class Bridge(nn.Module):
    def __init__(self, anchor_width, augment_width, heads):
        super().__init__()
        self.heads = heads
        self.norm_anchor, self.norm_augment = nn.RMSNorm(anchor_width, eps=1e-6), nn.RMSNorm(augment_width, eps=1e-6)
        self.projection = linear(augment_width, anchor_width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(anchor_width, anchor_width) for _ in range(4))
        nn.init.zeros_(self.o_proj.weight)

    def forward(self, a, x, table):
        p = self.projection(self.norm_augment(a))
        q, k, v = (split_heads(y, self.heads) for y in (self.q_proj(self.norm_anchor(x)), self.k_proj(p), self.v_proj(p)))
        y = F.scaled_dot_product_attention(rotate(q, table), rotate(k, table), v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Composed(nn.Module):
    """Padding stands on the right, where no earlier position sees it, so that causal attention needs no mask."""

    def __init__(self, anchor, augment, links, heads):
        super().__init__()
        self.anchor, self.augment, self.where, self.heads = anchor, augment, links, heads
        self.taps, self.lowest = {tap for tap, _ in links}, min(write for _, write in links)
        width = anchor.embedding.embedding_dim
        self.links = nn.ModuleList(Bridge(width, augment.embedding.embedding_dim, heads) for _ in links)
        self.table = rotary_table(len(anchor.table[0]), width // heads)

    def write(self, block, x, tapped):
        added = [bridge(tapped[tap], x, self.table) for bridge, (tap, write) in zip(self.links, self.where) if write == block]
        return x + sum(added) if added else x

    def forward(self, ids, rows):
        """ids [B, T] -> the logits of the given rows of [B * T]."""
        tapped = {}
        with torch.no_grad():
            a = self.augment.embedding(ids)
            for i, block in enumerate(self.augment.blocks[: max(self.taps) + 1]):
                a = block(a, self.augment.table)
                if i in self.taps:
                    tapped[i] = a
            x = self.anchor.embedding(ids)
            for block in self.anchor.blocks[: self.lowest + 1]:
                x = block(x, self.anchor.table)
        x = self.write(self.lowest, x, tapped)
        for i, block in enumerate(self.anchor.blocks[self.lowest + 1 :], self.lowest + 1):
            x = self.write(i, block(x, self.anchor.table), tapped)
        return self.anchor.head(self.anchor.norm(x.flatten(0, 1)[rows]))


class Piece:
    """Some sequences of a batch, padded to the longest of them."""

    def __init__(self, examples):
        length = max(len(e["ids"]) for e in examples) - 1
        self.ids = torch.zeros(len(examples), length, dtype=torch.long)
        rows, targets = [], []
        for i, e in enumerate(examples):
            ids, first = e["ids"], e["completion"]
            self.ids[i, : len(ids) - 1] = torch.tensor(ids[:-1])
            rows += range(i * length + first - 1, i * length + len(ids) - 1)
            targets += ids[first:]
        self.rows, self.targets = torch.tensor(rows), torch.tensor(targets)


def cut(batch, buckets):
    batch = sorted(batch, key=lambda e: len(e["ids"]))
    edges = [len(batch) * i // buckets for i in range(buckets + 1)]
    return [Piece(batch[a:b]) for a, b in zip(edges, edges[1:]) if a < b]


def random_batches(count, tokens, vocabulary, generator):
    """Steps of about `tokens` tokens: prompts of 4 to 24 and completions of 4 to 32."""
    draw = lambda low, high, n=1: torch.randint(low, high, (n,), generator=generator).tolist()
    result = []
    for _ in range(count):
        batch, total = [], 0
        while total < tokens:
            prompt, completion = draw(4, 25)[0], draw(4, 33)[0]
            batch.append({"ids": draw(0, vocabulary, prompt + completion), "completion": prompt})
            total += prompt + completion - 1
        result.append(batch)
    return result


def measure(model, batches, buckets, args):
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if (p.dim() > 1) == decays], "weight_decay": 0.01 * decays}
              for decays in (True, False)]  # matrices decay, norms do not
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), fused=True)
    run = torch.compile(model, dynamic=True) if args.compile else model
    cuts = [cut(batch, buckets) for batch in batches]
    rates, seconds, loss = [], [], 0.0
    for step in range(args.warm_up + args.steps):
        batch, pieces = batches[step % len(batches)], cuts[step % len(batches)]
        scored = sum(len(piece.targets) for piece in pieces)
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for piece in pieces:
            piece_loss = F.cross_entropy(run(piece.ids, piece.rows), piece.targets, reduction="sum") / scored
            piece_loss.backward()
            loss += piece_loss.item()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step >= args.warm_up:
            seconds.append(time.perf_counter() - start)
            rates.append(sum(len(e["ids"]) - 1 for e in batch) / seconds[-1])
    computed = sum(piece.ids.numel() for pieces in cuts for piece in pieces)
    real = sum(len(e["ids"]) - 1 for batch in batches for e in batch)
    return {"buckets": buckets, "tokens_per_second": round(statistics.median(rates)), "loss": loss,
            "median_step_seconds": statistics.median(seconds), "padding": round(1 - real / computed, 3)}


def add_training_options(parser):
    """What every peer takes beside its models, links and batches."""
    parser.add_argument("--heads", type=int, default=0, help="of the bridges; the anchor's unless given")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a C++ compiler)")


def read_batches(path):
    with open(path) as file:
        return [json.loads(line) for line in file if line.strip()]


def context_of(batches):
    return max(len(e["ids"]) for batch in batches for e in batch)


def parse_links(text):
    """"0:1>2,0:2>3" -> [(1, 2), (2, 3)]: tap and write block."""
    return [tuple(int(i) for i in link.removeprefix("0:").split(">")) for link in text.split(",")]


def print_result(result, model, batches, args, **more):
    """The line of JSON: what measure() gave, and what both sides of a comparison must agree on."""
    tokens = statistics.mean(sum(len(e["ids"]) - 1 for e in batch) for batch in batches)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps({**result, "peak_resident_mb": memory, "tokens_per_step": round(tokens), "trained_parameters": trained,
                      "threads": args.threads, "compile": args.compile, "torch": torch.__version__, **more}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, sizes in (("augment", dict(width=128, blocks=3, heads=4, hidden=344)),
                        ("anchor", dict(width=128, blocks=4, heads=8, hidden=344))):
        for key, value in sizes.items():
            parser.add_argument(f"--{name}-{key}", type=int, default=value)
        parser.add_argument(f"--{name}-kv-heads", type=int, default=0, help="as many as heads unless given")
    parser.add_argument("--vocabulary", type=int, default=41)
    parser.add_argument("--links", default="0:1>2,0:2>3", help="augment:tap block>write block; the only augment is 0")
    parser.add_argument("--batches", help="see above")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="of random batches")
    parser.add_argument("--buckets", default="2,4,8")
    add_training_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    if args.batches:
        batches = read_batches(args.batches)
    else:
        batches = random_batches(8, args.batch_tokens, args.vocabulary, torch.Generator().manual_seed(args.seed))
    context = context_of(batches)

    def llama(name):
        width, blocks, heads, hidden, kv_heads = (
            getattr(args, f"{name}_{key}") for key in ("width", "blocks", "heads", "hidden", "kv_heads"))
        return Llama(args.vocabulary, width, blocks, heads, kv_heads or heads, hidden, context)

    links = parse_links(args.links)
    results = []
    for buckets in args.buckets.split(","):
        torch.manual_seed(args.seed)
        model = Composed(llama("anchor"), llama("augment"), links, args.heads or args.anchor_heads)
        results.append(measure(model, batches, int(buckets), args))
    best = max(results, key=lambda r: r["tokens_per_second"])
    print_result(best, model, batches, args, all={str(r["buckets"]): r["tokens_per_second"] for r in results})


if __name__ == "__main__":
    main()
