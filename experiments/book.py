"""Does the memory hold out over a book, and is text from afar of use? The paper's books, in small.

    python -m experiments.book --load out/lm-[lx]*-seed?.pt out/lm-delta-seed?.pt

The book is pydoc_data/topics.py, Python's language reference in one file, of which the first half
million bytes are read as one document. Models trained without --data have not seen it."""
if not __package__:
    raise SystemExit("run it from the project's folder: python -m experiments.book --load FILE")

import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from experiments.curves import by_position, draw_lines, mean_and_deviation
from passkey import short
from train import Parser, load_model, run_command, set_up, side_by_side, whole

@torch.no_grad()
def bits_by_segment(model, text, forget=False):
    """Stream a document, (S N + 1,) bytes. Returns the bits per byte of each segment, (S,).
    forget: empty the memory before each segment, to see what it is worth."""
    N, state, costs = model.config.segment_len, None, []
    length = N if forget else 16 * N
    for given, target in zip(text[:-1].split(length), text[1:].split(length)):
        logits, state = model(given[None], None if forget else state)
        costs.append(F.cross_entropy(logits[0], target, reduction="none") / math.log(2))
    return torch.cat(costs).unflatten(0, (-1, N)).mean(1)

def read(path, text):
    """Read the document with a model. Returns its kind and seed, N, and the costs of each segment,
    (S,), with a memory and, for our kinds, without one."""
    model, settings = load_model(path)
    N, attention = model.config.segment_len, model.config.attention
    if attention == "full" or not {"kind", "seed"} <= {*settings} or len(text) <= N:
        raise ValueError(f"{path} was {attention}, must be a model of train.py, but not full")
    text = text[:(len(text) - 1) // N * N + 1]
    costs = [bits_by_segment(model, text, f) for f in (False, True)[:1 + (attention == "infini")]]
    return settings["kind"], settings["seed"], N, costs

def main():
    parser = Parser("Read half a million bytes as one document, with a memory of fixed size.")
    add = parser.add_argument
    add("--load", type=Path, nargs="+", action="extend", required=True, metavar="FILE",
        help="models that train.py or experiments.compare trained, local among them")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for the picture")
    add("--threads", type=whole(1, 1024), help="cores to use; without it PyTorch decides")
    args = parser.parse_args()
    set_up("cpu", args.threads, args.out, ["book.csv", "book.png"], args.load)
    book = Path(os.__file__).with_name("pydoc_data") / "topics.py"
    text = torch.frombuffer(bytearray(book.read_bytes()), dtype=torch.uint8)[:2 ** 19 + 1].long()
    costs = {}    # kind -> seed -> (S,)
    for kind, seed, N, found in side_by_side(read, [(path, text) for path in args.load]):
        for name, cost in zip((kind, f"{kind} forgets"), found):
            costs.setdefault(name, {})[seed] = cost
    if any(set(by_seed) != set(costs.get("local", ())) for by_seed in costs.values()):
        raise ValueError("--load was without local models of the same seeds, must have them")
    ends, _ = by_position(next(iter(costs["local"].values())), 4)
    print(f"{len(text):,} bytes, {len(costs['local'])} seeds; bits per byte up to byte")
    print(" " * 16 + "".join(f"{short(end * N):>9}" for end in ends))
    curves, local = {}, costs["local"]
    for name, by_seed in costs.items():
        mean = torch.stack([*by_seed.values()]).mean(0)
        print(f"{name:16}" + "".join(f"{x:9.3f}" for x in by_position(mean, 4)[1]))
        gains = torch.stack([local[seed] - cost for seed, cost in by_seed.items()])
        curves[name] = [end * N for end in ends], by_position(gains.mean(0), 4)[1]
        if name != "local":
            print(f"    less than local: {mean_and_deviation(gains.mean(1))}", flush=True)
    draw_lines(curves, args.out / "book.png", "up to byte", "bits per byte less than local")

if __name__ == "__main__":
    run_command(main)
