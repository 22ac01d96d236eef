"""What else could keep a key in a long text? Other ways of training, at the budget of `plain`.

    python -m experiments.alternatives --load out/passkey-short-*-seed0.pt

Each goes on from a short model as `plain` does, with one change."""
if not __package__:
    raise SystemExit("run it from the project's folder: python -m experiments.alternatives")

from pathlib import Path

import torch

import passkey
from train import Parser, run_command, set_up, side_by_side, whole

CHANGES = ["at-once", "own-rate", "temperature"]

def changed_loss(change, seed, steps):
    """Make the loss_of(model, step) of `plain` with one change. at-once: W_Q and W_K are multiplied
    before the first step. own-rate: their learning rate is five times as high. temperature: the
    logits are divided by 3, so that the loss is never quite 0."""
    plain, before = passkey.way_loss("plain", seed, steps), []
    def loss_of(model, step):
        weights = [w.weight for b in model.blocks for w in (b.attention.w_q, b.attention.w_k)]
        if change == "at-once" and step == 0:
            passkey.sharpen(model, passkey.WAYS["sharp"][-1])
        if change == "own-rate":
            with torch.no_grad():
                for w, old in zip(weights, before):
                    w += 4 * (w - old)    # the last step is done five times
            before[:] = [w.detach().clone() for w in weights]
        hook = model.register_forward_hook(
            lambda model, given, out: (out[0] / (3 if change == "temperature" else 1), out[1]))
        try:
            return plain(model, step)
        finally:
            hook.remove()
    return loss_of

def train_change(change, start, rule, seed, steps, out):
    """Train a model with a change. Returns its checkpoint's path."""
    _, default, _, _, lr, _ = passkey.WAYS["plain"]
    n = steps or default
    return passkey.train_one(change, rule, seed, changed_loss(change, seed, n), n, lr, out, start)

def main():
    parser = Parser("Train for the pass key in ways that are not ours, and look for keys.")
    add = parser.add_argument
    add("--load", type=Path, nargs="+", required=True, metavar="FILE", help="short models")
    add("--steps", type=whole(1), help="steps of training; without it those of plain")
    add("--lengths", type=passkey.listed(passkey.length), default="1K,32K,128K", help="in tokens")
    add("--keys", type=whole(1, 500), default=20, help="keys per cell")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for all files")
    add("--threads", type=whole(1, 1024), help="cores to use; without it PyTorch decides")
    args = parser.parse_args()
    set_up(threads=args.threads, out=args.out)
    jobs = []
    for path in args.load:
        _, (way, rule, seed), _ = passkey.load_for_table(path)
        if way != "short":
            raise ValueError(f"--load was {path}, a {way} model, must be a short one")
        jobs += [(change, path, rule, seed, args.steps, args.out) for change in CHANGES]
    paths = [*side_by_side(train_change, jobs)]
    passkey.table(paths, args.lengths, [0], args.keys, 1234, "cpu", args.out / "alternatives.csv")

if __name__ == "__main__":
    run_command(main)
