"""What does a memory bring that a trained model gets afterwards? Plug and play, section 4.3.

    python -m experiments.plug

A model without memory is trained. Then copies with a memory go on for a tenth of the steps, beside
one without."""
if not __package__:
    raise SystemExit("run it from the project's folder: python -m experiments.plug")

import math
from pathlib import Path

import torch

import train
from experiments.curves import draw_lines, mean_and_deviation
from infini import inject_memory
from train import Parser, bits, number, run_command, set_up, side_by_side, whole

GOES_ON_AS = ["local", "linear", "delta"]

def train_local(documents, seed, steps, out, device, resume):
    """Train a model without memory, maybe in a process of its own. Returns its path."""
    return train.train_lm("local", seed, documents, out, steps, device=device, resume=resume,
                          **train.LM)[1]

def plug_in(path, kind, gate, device):
    """Load the model in `path`, and give it a memory with betas of `gate`, unless kind is local."""
    model, _ = train.load_model(path, device)
    return model if kind == "local" else inject_memory(model, kind, gate)

def go_on(documents, path, kind, gate, seed, steps, out, device, resume):
    """Train the model in `path` further, with a memory or without. Returns the new path.
    The learning rate starts at half of the first one, and the text is drawn anew."""
    settings = {**train.LM, "lr": train.LM["lr"] / 2, "name": f"plug-{kind}"}
    return train.train_lm(kind, seed + 1000, documents, out, steps, device=device, resume=resume,
                          model=plug_in(path, kind, gate, device), **settings)[1]

def means(losses, n=100):
    """Average the losses of all steps, in nats, over some n stretches of equally many steps.
    Returns the last step of each stretch and its mean in bits."""
    stretches = losses.split(math.ceil(len(losses) / n))
    ends = torch.tensor([len(stretch) for stretch in stretches]).cumsum(0)
    return ends, torch.stack([stretch.mean() for stretch in stretches]) / math.log(2)

def main():
    parser = Parser("Give a trained model a memory (section 4.3), and train a little further.")
    add = parser.add_argument
    add("--data", type=Path, help="text file or folder; without it Python's own source")
    add("--steps", type=whole(1), default=5000, help="without memory; with it a tenth of them")
    add("--seeds", type=whole(1, 1000), default=3, help="models of each kind")
    add("--plug-gate", type=number(-100, 100), default=-2.0, help="betas of the new memory")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for all files")
    add("--resume", action="store_true", help="go on with trainings that were stopped")
    add("--device", default="cpu", help="or cuda, or mps")
    add("--threads", type=whole(1, 1024), help="cores to use; without it PyTorch decides")
    args = parser.parse_args()
    set_up(args.device, args.threads, args.out, ["plug.csv", "plug.png"], [args.data])
    seeds, rest = range(args.seeds), (args.out, args.device, args.resume)
    length, steps = train.LM["segments"] * train.LM["segment_len"], max(1, args.steps // 10)
    documents, held_out = train.read_documents(args.data, args.out, length + 1)
    tokens = train.validation_pieces(held_out, length + 1)
    starts = [*side_by_side(train_local, [(documents, seed, args.steps, *rest) for seed in seeds])]
    jobs = [(documents, starts[seed], kind, args.plug_gate, seed, steps, *rest)
            for kind in GOES_ON_AS for seed in seeds]
    ends = [*side_by_side(go_on, jobs)]
    print(f"\nbits per byte on {len(tokens)} held-out pieces of {length:,} bytes, {args.seeds} "
          f"seeds, mean +- standard deviation\n{'goes on as':12}{'at the start':>18}"
          f"{f'{steps} steps on':>18}{'less than local':>18}", flush=True)
    after, curves = {}, {}
    for i, kind in enumerate(GOES_ON_AS):
        paths = ends[args.seeds * i:args.seeds * (i + 1)]
        before = torch.stack([bits(plug_in(path, kind, args.plug_gate, args.device), tokens).mean()
                              for path in starts])
        after[kind] = torch.stack([bits(train.load_model(path, args.device)[0], tokens).mean()
                                   for path in paths])
        gain = mean_and_deviation(after["local"] - after[kind])    # of the same seed
        print(f"{kind:12}{mean_and_deviation(before):>18}{mean_and_deviation(after[kind]):>18}"
              f"{gain:>18}", flush=True)
        losses = [train.read_checkpoint(path)["losses"] for path in paths]
        curves[kind] = means(torch.stack(losses).mean(0))
    draw_lines(curves, args.out / "plug.png", "step after the memory was plugged in",
               "training loss (bits per byte)", xscale="linear")

if __name__ == "__main__":
    run_command(main)
