"""Can a model learn from short inputs to find a key in a million tokens?

    python -m experiments.fast_forward

Departure: the paper trains on whole inputs only. In every other step here the memory goes through
up to 1.2 million tokens of hay, most of which is counted instead of read."""
if not __package__:
    raise SystemExit("run it from the project's folder: python -m experiments.fast_forward")

import random
from functools import partial
from pathlib import Path

import torch

import passkey
from infini import Memory, State
from passkey import PARAGRAPH, encode
from train import Parser, run_command, set_up, side_by_side, whole


def leaps(periods, growth=3):
    """Say how often each period that is read counts: 1, 2, 6, 18, 54, ..., in all `periods`."""
    counts = []
    while sum(counts) < periods:
        counts.append(min(max(1, (growth - 1) * sum(counts)), periods - sum(counts)))
    return counts


def fast_forward(model, state, periods, write):
    """Go through `periods` periods of hay, of 4 paragraphs or 3 segments, and read only a few.
    Hay says the same again and again, so what a period writes changes slowly. It is added to the
    memory n times. Gradients flow through all. write: number of paragraphs -> ids, (T,)."""
    for n in leaps(periods):
        period = write(4).expand(len(state[0].k), -1).to(state[0].k.device)
        _, after = model(period, state)
        state = [State(Memory(*(old + n * (new - old) for old, new in zip(s.memory, a.memory))),
                       a.k, a.v) for s, a in zip(state, after)]
    return state


def fast_forward_loss(model, rng, most=1_200_000, rows=6):
    """Compute the loss on `rows` inputs with hay before the needle, behind it or both, a number of
    periods log-uniform up to `most` tokens. Up to 3 paragraphs more shift all against segments."""
    tasks, device = passkey.draw_tasks(rng, rows), model.embedding.weight.device
    write = partial(passkey.draw_hay, rng)
    before, after = (int(10 * (most / PARAGRAPH / 4 / 10) ** rng.random()) for _ in range(2))
    before, after = rng.choice([(before, 0), (0, after), (before, after)])
    shift = [write(rng.randint(0, 3)) for _ in range(3)]
    needles = torch.stack([torch.cat([encode(t.needle), shift[1]]) for t in tasks])
    ends = torch.stack([torch.cat([shift[2], encode(t.question), encode(t.answer)]) for t in tasks])
    _, state = model(torch.cat([encode(passkey.INTRO), shift[0]])[None].to(device))
    state = passkey.copies(fast_forward(model, state, before, write), rows)
    _, state = model(needles.to(device), state)
    logits, _ = model(ends[:, :-1].to(device), fast_forward(model, state, after, write))
    loss, shown = passkey.answer_loss(logits, tasks)
    read = 4 * PARAGRAPH * (len(leaps(before)) + rows * len(leaps(after)))
    return loss, read + needles.numel() + ends.numel(), shown


def train_rule(start, rule, seed, steps, out, device, resume):
    """Go on from the short model in `start`, or train that first. Returns the new path."""
    start = start or passkey.train_ways(rule, ["short"], seed, steps, out, device, resume)[0]
    def loss_of(model, step):
        rng = random.Random(f"{seed} tuned/{step}")
        if step % 2 == 0:
            return passkey.plain_loss(model, rng, longest=1024, tokens_per_step=2048)
        return fast_forward_loss(model, rng)
    return passkey.train_one("fast-forward", rule, seed, loss_of, steps or 1600, 2e-3, out, start,
                             device, resume)


def main():
    parser = Parser("Train with hay that is counted instead of read, then look for pass keys.")
    add = parser.add_argument
    add("--load", type=Path, nargs="+", metavar="FILE", help="short models; else they are trained")
    add("--steps", type=whole(1), help="of each stage; without it 4800 for short, then 1600")
    add("--resume", action="store_true", help="go on with trainings that were stopped")
    add("--lengths", type=passkey.listed(passkey.length), default="1K,32K,1M", help="in tokens")
    add("--keys", type=whole(1, 500), default=20, help="keys per cell of the table")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for all files")
    add("--device", default="cpu", help="or cuda, or mps")
    add("--threads", type=whole(1, 1024), help="cores to use; without it PyTorch decides")
    args = parser.parse_args()
    set_up(args.device, args.threads, args.out)
    starts = [(None, "linear", 0), (None, "delta", 0)]
    if args.load:
        ways, rules, seeds = zip(*(passkey.load_for_table(path)[1] for path in args.load))
        if {*ways} != {"short"} or len({*zip(rules, seeds)}) < len(rules):
            raise ValueError(f"--load was of {ways}, must be of different short models")
        starts = zip(args.load, rules, seeds)
    rest, depths = (args.steps, args.out, args.device, args.resume), [0, 0.5, 1]
    paths = side_by_side(train_rule, [(*start, *rest) for start in starts])
    results = passkey.table(paths, args.lengths, depths, args.keys, 1234, args.device,
                            args.out / "fast-forward.csv")
    passkey.draw(results, args.lengths, depths, args.out / "fast-forward.png")


if __name__ == "__main__":
    run_command(main)
