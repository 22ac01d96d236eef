"""What is the memory worth to a language model? Our Table 2 compares five kinds of attention, all
else equal. One picture goes on to four times the length of the training sequences, and the other
shows each model's cost and the size of what it keeps.

    python -m experiments.compare"""
if not __package__:
    raise SystemExit("run it from the project's folder: python -m experiments.compare")

from pathlib import Path

import torch

import train
from experiments.curves import by_position, draw_lines, mean_and_deviation
from infini import stream
from train import KINDS, Parser, bits, run_command, set_up, side_by_side, whole

def context_memory(config, length):
    """Compute how many numbers a model keeps of `length` tokens, whole segments (Table 1)."""
    key, value = config.d_key, config.d_value
    per_head = {"infini": key * (value + 1), "xl": (key + value) * min(length, config.segment_len),
                "full": (key + value) * length, "local": 0}[config.attention]
    return per_head * config.n_heads * config.n_layers

def numbers_in(state):
    """Count the numbers that a state, a list with a State per layer, really holds."""
    return sum(part.numel() for s in state for part in (*(s.memory or ()), s.k, s.v))

def bits_by_segment(model, tokens):
    """Compute the bits per byte of each segment, (S,), as means over pieces (n, S N + 1)."""
    return bits(model, tokens).unflatten(1, (-1, model.config.segment_len)).mean((0, 2))

def train_kind(documents, kind, seed, steps, out, device, resume):
    """Train one model, maybe in a process of its own. Returns its checkpoint's path."""
    return train.train_lm(kind, seed, documents, out, steps, device=device, resume=resume,
                          **train.LM)[1]

def evaluate(path, tokens, length, device):
    """Score a checkpoint on pieces (n, 4 length + 1). Returns the bits per byte of each segment,
    (S,), their mean if it forgets, or None, and its memory's size, counted and by formula."""
    model, _ = train.load_model(path, device)
    config, trained = model.config, tokens[:, :length + 1]
    # Full attention knows no positions beyond those that it was trained on.
    cost = bits_by_segment(model, trained if config.attention == "full" else tokens)
    forgot = bits(model, trained, forget=True).mean() if config.attention == "infini" else None
    counted = numbers_in(stream(model, tokens[:1, :length].to(device))[1])
    return cost, forgot, (counted, context_memory(config, length))

def main():
    parser = Parser("Compare five kinds of attention on the same text: our Table 2.")
    add = parser.add_argument
    add("--data", type=Path, help="text file or folder; without it Python's own source")
    add("--steps", type=whole(1), default=5000, help="steps of each training")
    add("--seeds", type=whole(1, 1000), default=3, help="models of each kind")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for all files")
    add("--resume", action="store_true", help="go on with trainings that were stopped")
    add("--device", default="cpu", help="or cuda, or mps")
    add("--threads", type=whole(1, 1024), help="cores to use; without it PyTorch decides")
    args = parser.parse_args()
    set_up(args.device, args.threads, args.out, ["compare.csv", *(
        f"{name}.{end}" for name in ("context", "memory") for end in ("csv", "png"))], [args.data])
    N, n = train.LM["segment_len"], args.seeds
    length = train.LM["segments"] * N
    documents, held_out = train.read_documents(args.data, args.out, length + 1)
    tokens = train.validation_pieces(held_out, 4 * length + 1)
    rest = args.steps, args.out, args.device, args.resume
    jobs = [(documents, kind, seed, *rest) for kind in KINDS for seed in range(n)]
    paths = [*side_by_side(train_kind, jobs)]
    print(f"\n{len(tokens)} held-out pieces of {length:,} bytes, {n} seeds, mean +- standard "
          f"deviation\n{'kind':8}{'bits per byte':>18}{'less than local':>18}{'perplexity':>12}"
          f"{'forgetful':>18}{'numbers kept':>14}{'Table 1':>10}", flush=True)
    tables, curves, kept = {}, {}, {}
    with open(args.out / "compare.csv", "w", encoding="utf-8") as file:
        print("kind,seed,segment,bits_per_byte", file=file)
        for i, kind in enumerate(KINDS):
            costs, forgot, ((counted, formula), *_) = zip(*(
                evaluate(path, tokens, length, args.device) for path in paths[n * i:n * (i + 1)]))
            for seed, cost in enumerate(costs):
                for segment, value in enumerate(cost.tolist(), 1):
                    print(kind, seed, segment, value, sep=",", file=file)
            cost = tables[kind] = torch.stack(costs)[:, :length // N].mean(1)    # (seeds,)
            gain = mean_and_deviation(tables["local"] - cost)
            without = mean_and_deviation(torch.stack(forgot)) if kind in ("linear", "delta") else ""
            print(f"{kind:8}{mean_and_deviation(cost):>18}{gain:>18}{2 ** cost.mean():12.3f}"
                  f"{without:>18}{counted:14,}{formula:10,}", flush=True)
            curves[kind] = by_position(torch.stack(costs).mean(0))
            kept[kind] = [max(1, counted)] * n, cost    # a logarithm has no 0
    draw_lines(curves, args.out / "context.png", f"segment of {N} bytes", "bits per byte")
    draw_lines(kept, args.out / "memory.png", "numbers kept (local: none)", "bits per byte")

if __name__ == "__main__":
    run_command(main)
