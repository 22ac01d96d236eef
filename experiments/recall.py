"""How many pairs of a key and a value does a memory hold, and can it replace a value?

    python -m experiments.recall            a quarter of an hour on two cores; --quick: a minute

This is the associative recall of Arora et al. (arXiv 2312.04927), with key and value in one token.
One layer of one head reads n pairs, then the keys alone in another order, and names the values.
Segments have eight tokens, so by then all pairs are in the memory and nowhere else."""
if not __package__:
    raise SystemExit("run it from the project's folder: python -m experiments.recall")

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import train
from experiments.curves import draw_lines
from infini import InfiniAttention, InfiniConfig
from train import Parser, run_command, set_up, side_by_side, whole

SYMBOLS, PAIRS = 512, [8, 16, 32, 64, 128, 256]

class Recall(nn.Module):
    """Names the value that stood beside each key. Keys and values are fixed random vectors."""
    def __init__(self, rule, d_key):
        super().__init__()
        sizes = dict(d_model=64, n_heads=1, d_key=d_key, d_value=64, segment_len=8)
        self.layer = InfiniAttention(InfiniConfig(**sizes, update=rule, gate_init=2.0))
        self.head = nn.Linear(64, SYMBOLS)
        self.register_buffer("vectors", torch.randn(2, SYMBOLS, 32))
    def forward(self, keys, values, asked):
        pairs = torch.cat([self.vectors[0][keys], self.vectors[1][values]], -1)
        o, _ = self.layer(torch.cat([pairs, F.pad(self.vectors[0][asked], (0, 32))], 1))
        return self.head(o[:, keys.shape[1]:])

def draw(n, batch, generator, twice):
    """Draw n pairs per row, the keys to ask for, their values, and which of these replaced another.
    With `twice` the third quarter has the keys of the first one, and the later value counts."""
    keys = torch.rand(batch, SYMBOLS, generator=generator).argsort(1)[:, :n]
    values = torch.randint(SYMBOLS, (batch, n), generator=generator)
    old, half = n // 4 if twice else 0, n // 2
    keys[:, half:half + old] = keys[:, :old]
    order = old + torch.randperm(n - old, generator=generator)
    return keys, values, keys[:, order], values[:, order], (order >= half) & (order < half + old)

def train_one(rule, d_key, twice, seed, steps):
    """Train on up to 2 d_key pairs. Returns the recall in % for each number of PAIRS, first of the
    values that replaced another, then of all others, (2, lengths)."""
    torch.manual_seed(seed)
    model, generator = Recall(rule, d_key), torch.Generator().manual_seed(seed)
    optimizer = train.make_optimizer(model, 5e-3, 1e-2)
    sizes = [n for n in PAIRS if n <= 2 * d_key]
    for step in range(steps):
        n = sizes[step // 2 % len(sizes)] if step % 2 else sizes[-1]
        *given, values, _ = draw(n, 1024 // n, generator, twice)
        loss = F.cross_entropy(model(*given).flatten(0, 1), values.flatten())
        train.take_step(model, optimizer, loss, share=train.schedule(step, steps, warmup=50))
    @torch.no_grad()
    def recall(n):
        *given, values, new = draw(n, 8192 // n, generator, twice)
        right = 100 * (model(*given).argmax(-1) == values).float().mean(0)    # per question
        return torch.stack([right[new].mean(), right[~new].mean()])
    return torch.stack([recall(n) for n in PAIRS], 1)

def main():
    parser = Parser("Measure how many pairs a memory holds, and if it can replace a value.")
    add = parser.add_argument
    add("--quick", action="store_true", help="two small sizes, one seed, fewer steps")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for the picture")
    add("--threads", type=whole(1, 1024), help="cores to use; without it PyTorch decides")
    args = parser.parse_args()
    set_up(threads=args.threads, out=args.out, files=["recall.csv", "recall.png"])
    d_keys, seeds, steps = ([16, 32], 1, 400) if args.quick else ([16, 32, 64, 128], 3, 1000)
    models = [(rule, d, twice) for twice in (False, True) for rule in ("linear", "delta")
              for d in (d_keys[1:2] if twice else d_keys)]
    jobs = [(*model, seed, steps) for model in models for seed in range(seeds)]
    results, curves = side_by_side(train_one, jobs), {}
    train.say(f"{len(jobs)} models are trained; a row comes when its {seeds} are ready")
    print("Recall in % of n pairs" + "".join(f"{n:>9}" for n in PAIRS))
    for rule, d_key, twice in models:
        recalls = torch.stack([next(results) for _ in range(seeds)], 1)    # (2, seeds, lengths)
        for recall, what in zip(recalls[0 if twice else 1:], (", replaced", ", others")):
            cells = [f"{x.mean():.0f}" + f"+-{x.std():.0f}" * (seeds > 1) for x in recall.T]
            print(f"{rule} {d_key}{what * twice}".ljust(22)
                  + "".join(f"{x:>9}" for x in cells), flush=True)
        if not twice:
            curves[f"{rule}, d_key {d_key}"] = PAIRS, recalls[1].mean(0)
    draw_lines(curves, args.out / "recall.png", "pairs in the memory", "recall (%)")

if __name__ == "__main__":
    run_command(main)
