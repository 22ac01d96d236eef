"""Why are keys lost in a long text, and what keeps them? The half length tells.

    python -m experiments.sharpness --load out/passkey-*.pt

The memory returns a mean of all values, weighted by sigma(q) sigma(k)^T. Each token of hay has some
weight, however small. The half length is how much hay weighs as much as the needle."""
if not __package__:
    raise SystemExit("run it from the project's folder: python -m experiments.sharpness")

import random
from copy import deepcopy
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

import infini
import passkey
from experiments.curves import draw_lines
from passkey import HAY, NEEDLE, encode, load_for_table
from train import Parser, run_command, set_up, side_by_side, whole

FACTORS = [1, 1.25, 1.5, 2, 3, 4]

@torch.no_grad()
def half_lengths(model, n, keys, q=1, k=1):
    """Compute how many tokens of hay weigh as much as the needle in sigma(q) z, when each digit of
    some keys is asked for after n tokens of hay, with W_Q times q and W_K times k, in float64. A
    token of hay has the mean weight (without the first). Returns (digits, layers, keys, heads)."""
    model, seen = deepcopy(model).double(), {}    # seen: layer -> q, k, v of what was read last
    for block in model.blocks:
        block.attention.w_q.weight *= q
        block.attention.w_k.weight *= k
        block.attention.register_forward_pre_hook(lambda m, x: seen.update({m: m.project(x[0])}))
    def read(texts, state=None):
        return infini.stream(model, texts.expand(len(keys), -1), state)[1]
    question, digits = encode(passkey.QUESTION), torch.stack([encode(key) for key in keys])
    state = read(encode(passkey.INTRO))
    state = read(torch.stack([encode(NEEDLE.format(key)) for key in keys]), state)
    needle = [infini.sigma(keys).sum(2) for _, keys, _ in seen.values()]
    hay, halves = encode(HAY).repeat(4), []    # 3 segments of 32 tokens
    before = read(hay, state)
    hay = hay.repeat(n // len(hay) - 1)
    after = read(hay, before)
    state = read(question[:-1], after)
    for asks in [question[-1:], *digits[:, :-1].split(1, 1)]:
        state = read(asks, state)
        asked = [infini.sigma(queries)[:, :, 0] for queries, _, _ in seen.values()]
        halves.append(torch.stack([
            len(hay) * (sq * sk).sum(-1) / (sq * (a.memory.z - b.memory.z)).sum(-1)
            for sq, sk, a, b in zip(asked, needle, after, before)]))
    return torch.stack(halves)

def measure(path, lengths, n_keys):
    """Measure a model's half length, that of the worst digit of some keys in the best head for it.
    For a plain model, also those at the first length with sigma in other precisions, and with
    weights times each factor. Returns {name: half lengths}."""
    model, (way, rule, seed), _ = load_for_table(path)
    keys = passkey.draw_keys(random.Random("half"), n_keys, passkey.DIGITS, held_out=False)
    def half(n=lengths[0], **factors):
        return half_lengths(model, n, keys, **factors).amax((1, 3)).min().item()
    rows = {f"{way} {rule} {seed}": [half(n) for n in lengths]}
    for dtype in (torch.float32, torch.bfloat16) if way == "plain" else ():
        with patch("infini.sigma", lambda x, to=dtype: (F.elu(x.to(to)) + 1).double()):
            rows[f"{rule} in {str(dtype)[6:]}"] = [half()]
    for name, which in (("W_Q", "q"), ("W_K", "k"), ("both", "qk")) if way == "plain" else ():
        rows[f"{rule} {name} times"] = [half(**dict.fromkeys(which, x)) for x in FACTORS]
    return rows

def main():
    parser = Parser("Measure how long a text may be before the hay outweighs the key.")
    add = parser.add_argument
    add("--load", type=Path, nargs="+", required=True, metavar="FILE", help="models with a memory")
    add("--lengths", type=passkey.listed(passkey.length), default="4K,32K", help="in tokens")
    add("--keys", type=whole(1, 500), default=8, help="training keys to ask for")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for the picture")
    add("--threads", type=whole(1, 1024), help="cores to use; without it PyTorch decides")
    args = parser.parse_args()
    set_up(threads=args.threads, out=args.out, files=["sharpness.csv", "sharpness.png"],
           inputs=args.load)
    infini.require(min(args.lengths) >= 1024, "--lengths", min(args.lengths), "at least 1K")
    for path in args.load:
        infini.require(load_for_table(path)[1][1] != "-", "--load", path, "a model with a memory")
    passkey.print_row("Half length / 1000, at", [passkey.short(n) for n in args.lengths])
    passkey.print_row("    and at factor", FACTORS)
    curves = {}
    for rows in side_by_side(measure, [(path, args.lengths, args.keys) for path in args.load]):
        for name, row in rows.items():
            passkey.print_row(name, [f"{half / 1000:,.4g}" for half in row])
            curves.setdefault(name, []).append(row)
    lines = {name: (FACTORS, torch.tensor(rows).log().mean(0).exp())    # a mean over seeds
             for name, rows in curves.items() if "times" in name}
    if lines:    # of plain models
        draw_lines(lines, args.out / "sharpness.png", "factor", "half length (tokens)", "linear",
                   "log")

if __name__ == "__main__":
    run_command(main)
