"""Why are keys lost in a long text, and what keeps them? The half length tells.

    python -m experiments.sharpness --load out/passkey-*.pt

The memory answers with a mean of all values, weighted by sigma(q) sigma(k)^T. Every token of hay
has some weight, however small. At the half length, all hay weighs as much as the needle."""
if not __package__:
    raise SystemExit("run it from the project's folder: python -m experiments.sharpness")

import random
from copy import deepcopy
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

import infini
import passkey
from experiments.curves import draw_lines
from passkey import DIGITS, HAY, encode, one_key
from train import Parser, run_command, set_up, side_by_side, whole

FACTORS = [1, 1.25, 1.5, 2, 2.5, 3, 4]


@torch.no_grad()
def needle_share(model, n, task=one_key("9054")):
    """Compute the needle's share of sigma(q) z, the weights of all that the question's last token
    reads. The needle stands at the start of n tokens. Returns one share per head of each layer."""
    def projected(text, state):    # each layer's q and k of a short text
        x = model.embedding(text[None])
        for block, s in zip(model.blocks, state):
            yield block.attention.project(block.norm1(x))[:2]
            x, _ = block(x, s)
    hay = encode(HAY).repeat(passkey.paragraphs(n, task))
    text = torch.cat([encode(task.needle), hay, encode(task.question)])
    _, state = infini.stream(model, encode(passkey.INTRO)[None])
    needle = [infini.sigma(k).sum(2) for _, k in projected(encode(task.needle), state)]
    _, state = infini.stream(model, text[None, :-1], state)
    asked = [infini.sigma(q)[:, :, 0] for q, _ in projected(text[-1:], state)]
    return torch.cat([(q * k).sum(-1) / (q * s.memory.z).sum(-1)
                      for q, k, s in zip(asked, needle, state)])


@torch.no_grad()
def heads_that_find(model):
    """Return (layer, head) of each gate that, with all others shut, keeps nearly as many digits
    right as the best of them."""
    keys = passkey.draw_keys(random.Random("heads"), 20, DIGITS, held_out=False)
    inputs = torch.stack([passkey.write_input(one_key(k), encode(HAY).repeat(40), 0) for k in keys])
    right, heads = {}, torch.arange(model.config.n_heads)
    for layer, head in product(range(model.config.n_layers), heads.tolist()):
        alone = deepcopy(model)
        for i, block in enumerate(alone.blocks):
            block.attention.beta -= 20.0 * (heads != (head if i == layer else -1))
        written = infini.generate(alone, inputs[:, :-DIGITS], DIGITS, temperature=0)
        right[layer, head] = (written == inputs)[:, -DIGITS:].float().mean().item()
    return [at for at in right if right[at] > max(right.values()) - 0.1]


@torch.no_grad()
def measure(path, lengths):
    """Measure a model's half lengths. For a plain model, also those at the first length with sigma
    in other precisions, and with weights times each factor. Returns the rule and {name: row}."""
    model, (way, rule, seed), _ = passkey.load_for_table(path)
    if rule == "-":
        raise ValueError(f"{path} was of a model without a memory, must be of one with a memory")
    heads = heads_that_find(model)
    def half(n=lengths[0], q=1, k=1):
        scaled = deepcopy(model).double()
        for block in scaled.blocks:
            block.attention.w_q.weight *= q
            block.attention.w_k.weight *= k
        share = needle_share(scaled, n)[tuple(zip(*heads))].max().item()
        return n * share / max(1 - share, 1e-16)
    rows = {f"{way} {rule} {seed}": [half(n) for n in lengths]}
    if way == "plain":
        for dtype in (torch.float32, torch.bfloat16):
            with patch("infini.sigma", lambda x, to=dtype: (F.elu(x.to(to)) + 1).double()):
                rows[f"  ELU + 1 in {str(dtype)[6:]}"] = [half()]
        rows |= {"  W_Q times": [half(q=x) for x in FACTORS],
                 "  W_K times": [half(k=x) for x in FACTORS],
                 "  both times": [half(q=x, k=x) for x in FACTORS]}
    return rule, rows


def main():
    parser = Parser("Measure how long a text may be before the hay outweighs the key.")
    add = parser.add_argument
    add("--load", type=Path, nargs="+", required=True, metavar="FILE", help="pass-key models")
    add("--lengths", type=passkey.listed(passkey.length), default="32K,128K,1M", help="in tokens")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for the picture")
    add("--threads", type=whole(1, 1024), help="cores to use; without it PyTorch decides")
    args = parser.parse_args()
    set_up(threads=args.threads, out=args.out)
    passkey.print_row("Half length / 1000, at", [passkey.short(n) for n in args.lengths])
    passkey.print_row("    and at factor", FACTORS)
    curves = {}
    for rule, rows in side_by_side(measure, [(path, args.lengths) for path in args.load]):
        for name, row in rows.items():
            passkey.print_row(name, [f"{half / 1000:,.4g}" for half in row])
            if "times" in name:
                curves.setdefault(f"{rule}{name[1:]}", []).append(row)
    lines = {name: (FACTORS, torch.tensor(rows).log().mean(0).exp())    # a mean over seeds
             for name, rows in curves.items()}
    draw_lines(lines, args.out / "sharpness.png", "factor", "half length (tokens)", "linear", "log")


if __name__ == "__main__":
    run_command(main)
