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
from passkey import DIGITS, HAY, NEEDLE, encode, one_key
from train import Parser, run_command, set_up, side_by_side

FACTORS = [1, 1.25, 1.5, 2, 2.5, 3, 4]

@torch.no_grad()
def half_lengths(model, n, q=1, k=1):
    """Compute how many tokens of hay weigh as much as the needle in sigma(q) z, for the question's
    last token, with W_Q times q and W_K times k, in float64. The weight of hay is a mean over some
    n tokens of it, without the first four paragraphs. Returns one number per layer and head."""
    model, seen = deepcopy(model).double(), {}    # seen: layer -> q, k, v of what was read last
    for block in model.blocks:
        block.attention.w_q.weight *= q
        block.attention.w_k.weight *= k
        block.attention.register_forward_pre_hook(lambda m, x: seen.update({m: m.project(x[0])}))
    def read(text, state=None):
        return infini.stream(model, text[None], state)[1]
    hay, question = encode(HAY).repeat(4), encode(passkey.QUESTION)    # 3 segments of 32 tokens
    state = read(encode(NEEDLE.format("9054")), read(encode(passkey.INTRO)))
    needle = [infini.sigma(keys).sum(2) for _, keys, _ in seen.values()]
    before = read(hay, state)
    hay = hay.repeat(n // len(hay) - 1)
    after = read(hay, before)
    read(question[-1:], read(question[:-1], after))
    asked = [infini.sigma(queries)[:, :, 0] for queries, _, _ in seen.values()]
    return torch.cat([len(hay) * (sq * sk).sum(-1) / (sq * (a.memory.z - b.memory.z)).sum(-1)
                      for sq, sk, a, b in zip(asked, needle, after, before)])

@torch.no_grad()
def heads_that_find(model):
    """Return (layers, heads) of the gates that keep the digits right with all others shut."""
    keys, right = passkey.draw_keys(random.Random("heads"), 20, DIGITS, held_out=False), {}
    inputs = torch.stack([passkey.write_input(one_key(k), encode(HAY).repeat(40), 0) for k in keys])
    for layer, head in model.gates().isfinite().nonzero().tolist():
        alone = deepcopy(model)
        for block in alone.blocks:
            block.attention.beta -= 20
        alone.blocks[layer].attention.beta[head] += 20
        written = infini.generate(alone, inputs[:, :-DIGITS], DIGITS, temperature=0)
        right[layer, head] = (written == inputs)[:, -DIGITS:].float().mean().item()
    return tuple(zip(*(at for at in right if right[at] > max(right.values()) - 0.1)))

def measure(path, lengths):
    """Measure half lengths. For a plain model, also those with sigma in other precisions, and with
    weights times each factor, at the first length. Returns {name: half lengths}."""
    model, (way, rule, seed), _ = passkey.load_for_table(path)
    def half(n=lengths[0], heads=heads_that_find(model), **factors):
        return half_lengths(model, n, **factors)[heads].max().item()
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
    add("--lengths", type=passkey.listed(passkey.length), default="32K,128K,1M", help="in tokens")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for the picture")
    args = parser.parse_args()
    set_up(out=args.out)
    passkey.print_row("Half length / 1000, at", [passkey.short(n) for n in args.lengths])
    passkey.print_row("    and at factor", FACTORS)
    curves, paths = {}, [p for p in args.load if passkey.load_for_table(p)[1][1] != "-"]
    for rows in side_by_side(measure, [(path, args.lengths) for path in paths]):
        for name, row in rows.items():
            passkey.print_row(name, [f"{half / 1000:,.4g}" for half in row])
            curves.setdefault(name, []).append(row)
    draw_lines({name: (FACTORS, torch.tensor(rows).log().mean(0).exp())    # a mean over seeds
                for name, rows in curves.items() if "times" in name},
               args.out / "sharpness.png", "factor", "half length (tokens)", "linear", "log")

if __name__ == "__main__":
    run_command(main)
