"""How many pairs of a key and a value does a memory hold, and can it replace a value?

    python -m experiments.recall            a quarter of an hour on two cores
    python -m experiments.recall --quick    a minute

This is associative recall (Arora et al., arXiv 2312.04927) in its smallest form. One
layer with one head reads n pairs, each pair in one token. Then it reads the keys alone,
in another order, and names their values. A segment has eight tokens, so every answer
has to come from the memory.
"""

import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import common
import train
from common import print_row, side_by_side
from infini import InfiniAttention, InfiniConfig

N_SYMBOLS = 512
N_PAIRS = [8, 16, 32, 64, 128, 256]
TRAINING_PAIRS = 1024     # in a batch
EVALUATED_PAIRS = 8192    # for each number of pairs


@dataclass(frozen=True)
class Plan:
    """Says how much is trained."""

    d_keys: list
    seeds: int
    steps: int


FULL = Plan([16, 32, 64, 128], seeds=3, steps=1000)
QUICK = Plan([16, 32], seeds=1, steps=400)

D_KEY = 32    # of the models whose values are replaced, and of those in the title
SHADE = {16: 0.5, 32: 0.65, 64: 0.8, 128: 1.0}


@dataclass(frozen=True)
class Case:
    """Says which memory holds which kind of pairs."""

    rule: str
    d_key: int
    twice: bool    # a quarter of the keys come twice, and the later value counts


# --- The task -------------------------------------------------------------------------


class Pairs(NamedTuple):
    """Holds what a model is told and asked, in symbols."""

    keys: torch.Tensor         # (B, n)
    values: torch.Tensor       # (B, n)
    questions: torch.Tensor    # (B, m), the keys, each once, in another order
    answers: torch.Tensor      # (B, m)
    replaced: torch.Tensor     # (m,), whether the answer has replaced another value


def draw_pairs(n, batch, generator, twice):
    """Draw n pairs per row.

    twice: the third quarter has the keys of the first one, which is not asked for.
    """
    keys = torch.rand(batch, N_SYMBOLS, generator=generator).argsort(dim=1)[:, :n]
    values = torch.randint(N_SYMBOLS, (batch, n), generator=generator)

    n_old = n // 4 if twice else 0
    half = n // 2
    keys[:, half:half + n_old] = keys[:, :n_old]

    order = n_old + torch.randperm(n - n_old, generator=generator)
    replaced = (order >= half) & (order < half + n_old)
    return Pairs(keys, values, keys[:, order], values[:, order], replaced)


class RecallModel(nn.Module):
    """Names the value that stood beside each key."""

    def __init__(self, rule, d_key):
        super().__init__()
        config = InfiniConfig(
            d_model=64,
            n_heads=1,
            d_key=d_key,
            d_value=64,
            segment_len=8,
            update=rule,
            gate_init=2.0,    # mostly memory, since the segment holds no answer
        )
        self.layer = InfiniAttention(config)
        self.head = nn.Linear(64, N_SYMBOLS)

        # Symbols are fixed random vectors, so the layer has to do all the learning.
        self.register_buffer("key_vectors", torch.randn(N_SYMBOLS, 32))
        self.register_buffer("value_vectors", torch.randn(N_SYMBOLS, 32))

    def forward(self, keys, values, questions):
        """Read pairs, then answer. Returns logits, (B, m, N_SYMBOLS)."""
        pairs = torch.cat([self.key_vectors[keys], self.value_vectors[values]], dim=-1)
        alone = F.pad(self.key_vectors[questions], (0, 32))    # keys without values
        x = torch.cat([pairs, alone], dim=1)                   # (B, n + m, 64)

        o, _ = self.layer(x)
        n = keys.shape[1]
        return self.head(o[:, n:])


# --- Training and scoring -------------------------------------------------------------


def train_model(case, seed, steps, generator):
    """Train on up to 2 d_key pairs, in every other step on the most."""
    torch.manual_seed(seed)
    model = RecallModel(case.rule, case.d_key)
    optimizer = train.make_optimizer(model, lr=5e-3, gate_lr=1e-2)
    sizes = [n for n in N_PAIRS if n <= 2 * case.d_key]

    for step in range(steps):
        n = sizes[-1] if step % 2 == 0 else sizes[step // 2 % len(sizes)]
        pairs = draw_pairs(n, TRAINING_PAIRS // n, generator, case.twice)

        logits = model(pairs.keys, pairs.values, pairs.questions)
        loss = F.cross_entropy(logits.flatten(0, 1), pairs.answers.flatten())

        share = train.schedule(step, steps, warmup=50)
        train.take_step(model, optimizer, loss, share)
    return model


@torch.no_grad()
def score(model, pairs):
    """Compute how many answers in 100 are right.

    Returns {"all": %}, or {"replaced": %, "others": %} if values were replaced.
    """
    named = model(pairs.keys, pairs.values, pairs.questions).argmax(dim=-1)
    right = 100 * (named == pairs.answers).float().mean(0)    # (m,)
    new = pairs.replaced
    if not new.any():
        return {"all": right.mean().item()}
    return {"replaced": right[new].mean().item(), "others": right[~new].mean().item()}


def measure(case, seed, steps):
    """Train a model, and score it. Returns {which answers: {number of pairs: %}}."""
    generator = torch.Generator().manual_seed(seed)
    model = train_model(case, seed, steps, generator)

    recall = {}
    for n in N_PAIRS:
        pairs = draw_pairs(n, EVALUATED_PAIRS // n, generator, case.twice)
        for which, percent in score(model, pairs).items():
            recall.setdefault(which, {})[n] = percent
    return recall


# --- What was found -------------------------------------------------------------------


def list_cases(d_keys):
    """List what is compared, in the order of the table."""
    cases = []
    for rule in ("linear", "delta"):
        cases += [Case(rule, d_key, twice=False) for d_key in d_keys]
    for rule in ("linear", "delta"):
        cases.append(Case(rule, D_KEY, twice=True))
    return cases


def percents(recalls, which):
    """Collect the recall of one case, (seeds, numbers of pairs)."""
    rows = []
    for recall in recalls:
        rows.append([recall[which][n] for n in N_PAIRS])
    return torch.tensor(rows)


def format_cell(values):
    """Write the mean over seeds, and the standard deviation if there are several."""
    if len(values) == 1:
        return f"{values.mean():.0f}"
    return f"{values.mean():.0f}+-{values.std():.0f}"


def print_case(case, recalls):
    """Print a row, or two if values were replaced. recalls: one for each seed."""
    for which in recalls[0]:
        name = f"{case.rule} {case.d_key}"
        if which != "all":
            name += f", {which}"
        cells = [format_cell(values) for values in percents(recalls, which).T]
        print_row(name, cells, 22, 9)


def save_table(measured, path):
    """Write all numbers into a CSV file. measured: {case: recalls}."""
    rows = []
    for case, recalls in measured.items():
        for seed, recall in enumerate(recalls):
            for which, percent in recall.items():
                for n in N_PAIRS:
                    rows.append([case.rule, case.d_key, seed, which, n, percent[n]])
    header = ["rule", "d_key", "seed", "answers", "pairs", "recall_percent"]
    common.write_csv(path, header, rows)


def find_title(measured):
    """Say how much more Delta holds, if all seeds agree."""
    n = D_KEY    # as many pairs as a key has numbers
    found = {}
    for rule in ("linear", "delta"):
        recalls = measured[Case(rule, D_KEY, twice=False)]
        found[rule] = torch.tensor([recall["all"][n] for recall in recalls])

    if found["delta"].min() <= found["linear"].max():
        return "How many pairs does a memory hold?"
    delta = found["delta"].mean()
    linear = found["linear"].mean()
    return f"Of {n} pairs, Delta names {delta:.0f}% and Linear {linear:.0f}%"


def draw(measured, path):
    """Draw recall against pairs: a mean over seeds, and a point per seed."""
    figure, axis = common.new_figure(6.4, 4)
    for case, recalls in measured.items():
        if case.twice:
            continue
        values = percents(recalls, "all")
        common.draw_line(axis, N_PAIRS, values.mean(0).tolist(), case.rule,
                         f"{case.rule}, d_key {case.d_key}", SHADE[case.d_key], marker="")
        common.draw_points(axis, N_PAIRS, values.T, case.rule)

    common.set_lengths(axis, N_PAIRS)
    axis.set_xlabel("pairs in the memory")
    axis.set_ylabel("recall (%, points: seeds)")
    axis.set_title(find_title(measured), fontsize=10)
    common.spread_names(axis)
    common.save_figure(figure, path)


# --- The command ----------------------------------------------------------------------


def main():
    parser = common.new_parser("Measure how many pairs a memory holds.")
    parser.add_argument("--quick", action="store_true", help="two sizes, one seed")
    common.add_shared_arguments(parser, device=False)
    args = parser.parse_args()
    common.set_threads(args.threads)

    plan = QUICK if args.quick else FULL
    jobs = []
    for case in list_cases(plan.d_keys):
        jobs += [(case, seed, plan.steps) for seed in range(plan.seeds)]
    print(f"{len(jobs)} models are trained; a row comes when its seeds are ready",
          file=sys.stderr, flush=True)

    print_row("Recall in % of n pairs", N_PAIRS, 22, 9)
    measured = {}
    for (case, _, _), recall in zip(jobs, side_by_side(measure, jobs), strict=True):
        recalls = measured.setdefault(case, [])
        recalls.append(recall)
        if len(recalls) == plan.seeds:
            print_case(case, recalls)

    save_table(measured, args.out / "recall.csv")
    draw(measured, args.out / "recall.png")


if __name__ == "__main__":
    # Worker processes find functions by the name of their module, which is not __main__.
    from experiments.recall import main
    common.run_command(main)
