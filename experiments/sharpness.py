"""At which length is a digit lost, what tells it in advance, and what puts it off?

    python -m experiments.sharpness --load out/passkey-plain-*.pt out/passkey-sharp-*.pt

A memory returns a mean of all values, weighted by sigma(q) sigma(k)^T. Each token of hay
has some weight. So a growing text moves what the question reads from the digit towards
the mean of hay. Two numbers are measured in the last layer, after 1K tokens of hay.

    half length   So many tokens of hay weigh as much as the digit's own two tokens in the
                  needle. It is taken in the head that the answer would miss most if it
                  read only hay.
    reach         At this length another digit wins, if each further token of hay adds to
                  M and z what it adds now, and nothing else changes.

Where a digit is really lost is found in leaps. The text grows by half from question to
question. One stretch of hay in the middle of a leap is read, by all layers, and stands for
the whole leap. This is no proof. Where it was compared with reading every token, up to a
million, it was right within 2%. It computes in float64, and it gives the digits before the
one that it asks for. All lengths are in tokens of hay.
"""

import math
import random
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

import common
import infini
import passkey
import train
from common import print_row, side_by_side
from infini import InfiniAttention, Memory, sigma
from passkey import DIGITS, HAY, PARAGRAPH, QUESTION, encode, one_key, write_input

PERIOD = 96         # tokens: four paragraphs of hay, which are three segments
N_PERIODS = 9       # are read before anything is measured
LONGEST = 1e12      # tokens; what is found there is not followed further
FURTHEST = 1e15     # tokens; a reach beyond has no end

FACTORS = [1.25, 1.5, 2, 3, 4]
LAST = "both, last layer"
LINE = {"W_Q": ":", "W_K": "--", "both": "-.", LAST: "-"}    # what is multiplied
SCALED_BY = 3       # this factor is in the checkpoints that are written
MARKER = {"short": "v", "plain": "o", "sharp": "s", "scaled": "D"}

# --- The text -------------------------------------------------------------------------


class Text(NamedTuple):
    """Holds inputs whose hay may go on as long as one likes."""

    start: torch.Tensor     # (B, S N): intro, needle and hay, in whole segments
    period: torch.Tensor    # (B, PERIOD): hay that may be repeated
    end: torch.Tensor       # (B, T): hay, the question and all digits but the last
    digits: torch.Tensor    # (B, DIGITS): the answers
    n_hay: int              # tokens of hay in start and end


def write_text(keys, more, N):
    """Hide keys behind 0 to 3 paragraphs, and ask `more` than 4 paragraphs later.

    So needles and questions stand anywhere in a segment of N tokens.
    """
    hay = encode(HAY).repeat(8 + more)
    inputs = []
    for i, key in enumerate(keys):
        before = i % 4 * PARAGRAPH
        inputs.append(write_input(one_key(key), hay, before))
    tokens = torch.stack(inputs)                         # (B, T)

    n_asked = len(encode(QUESTION)) + DIGITS
    border = (tokens.shape[1] - n_asked - PERIOD) // N * N
    start, period, end = tokens.tensor_split([border, border + PERIOD], dim=1)
    return Text(start, period, end[:, :-1], tokens[:, -DIGITS:], len(hay) - PERIOD)


def ask(model, text, states):
    """Compute the logit of each right digit less the best other one, (B, DIGITS)."""
    logits, _ = model(text.end, states)
    logits = logits[:, -DIGITS:]                         # (B, DIGITS, vocabulary)
    right = text.digits.unsqueeze(-1)
    others = logits.scatter(-1, right, -math.inf)
    return logits.gather(-1, right).squeeze(-1) - others.amax(-1)


def growth(model, text, states):
    """Compute what a token of hay adds now. Returns a Memory for each layer."""
    added = []
    after = model.absorb(text.period, states)
    for (old, _, _), (new, _, _) in zip(states, after, strict=True):
        added.append(Memory((new.M - old.M) / PERIOD, (new.z - old.z) / PERIOD))
    return added


def grow(state, added, n):
    """Add n tokens of hay to the state of a layer."""
    M = state.memory.M + n * added.M
    z = state.memory.z + n * added.z
    return state._replace(memory=Memory(M, z))


# --- Half length, reach, and where a digit is lost ------------------------------------


def own_weights(model, text, states):
    """Weigh, in the last layer, the two tokens in the needle that are each digit asked for.

    Returns the weights, (B, H, DIGITS), and sigma(q): (B, H, DIGITS, d_key).
    """
    *below, last = model.blocks
    x, _ = model.run(below, text.start, None)
    _, k, _ = last.attention.project(last.norm1(x))
    x, _ = model.run(below, text.end, states)
    q, _, _ = last.attention.project(last.norm1(x))
    if isinstance(last.attention, Bfloat16Attention):
        q = rounded(q)
        k = rounded(k)
    sq = sigma(q[:, :, -DIGITS:])
    weights = sq @ sigma(k).mT                           # (B, H, DIGITS, S N)

    is_digit = torch.isin(text.start, encode("0123456789"))
    places = is_digit.nonzero()[:, 1].view(-1, 2, DIGITS)
    places = places.mT.unsqueeze(1).expand(-1, q.shape[1], -1, -1)
    return weights.gather(-1, places).sum(-1), sq


def head_that_counts(model, text, states, added):
    """Find the head that each answer would miss most if it read only hay.

    Returns (B, 1, DIGITS).
    """
    *below, last = states
    without = []
    for head in range(model.config.n_heads):
        M = last.memory.M.clone()
        z = last.memory.z.clone()
        M[:, head] = FURTHEST * added.M[:, head]         # so that the question's own
        z[:, head] = FURTHEST * added.z[:, head]         # segment does not count
        flooded = last._replace(memory=Memory(M, z))
        without.append(ask(model, text, [*below, flooded]))
    return torch.stack(without, dim=1).argmin(dim=1, keepdim=True)


def half_lengths(model, text, states, added):
    """Compute the half lengths, (B, DIGITS).

    added: what a token of hay adds to the last layer's memory.
    """
    own, sq = own_weights(model, text, states)
    hay = (sq * added.z.unsqueeze(2)).sum(-1)            # (B, H, DIGITS)
    head = head_that_counts(model, text, states, added)
    half = (own / hay).gather(1, head).squeeze(1)
    return half.nan_to_num(nan=0.0, posinf=math.inf)     # in bfloat16 there is 0/0


def first_below_zero(lengths, margins):
    """Find the length at which each of (n, ...) margins falls below 0, or infinity.

    Between lengths we draw a line over their logarithm. A margin that begins below 0 does
    so at the first length.
    """
    negative = margins < 0
    i = negative.int().argmax(dim=0, keepdim=True)       # the first one, or 0
    j = (i - 1).clamp(min=0)
    before = margins.gather(0, j)
    after = margins.gather(0, i)
    part = torch.where(i > j, before / (before - after), 0.0)

    log = torch.tensor(lengths).double().log()
    crossing = (log[j] + part * (log[i] - log[j])).exp().squeeze(0)
    return torch.where(negative.any(dim=0), crossing, math.inf)


def reaches(model, text, states, added, n):
    """Compute the reaches, (B, DIGITS), after n tokens. added: as in half_lengths."""
    *below, last = states
    lengths = (n * torch.logspace(0, 12, 73).double()).tolist()
    margins = []
    for length in lengths:
        grown = grow(last, added, length - n)
        margins.append(ask(model, text, [*below, grown]))
    return first_below_zero(lengths, torch.stack(margins))


def lost_lengths(model, text, states, n):
    """Find in leaps where the digits are lost, (B, DIGITS), from n tokens on."""
    lengths = []
    margins = []
    while n < LONGEST:
        lengths.append(n)
        margins.append(ask(model, text, states))

        leap = n / 2
        added = growth(model, text, states)
        middle = [grow(*layer, leap / 2) for layer in zip(states, added, strict=True)]
        added = growth(model, text, middle)
        states = [grow(*layer, leap) for layer in zip(states, added, strict=True)]
        n += leap
    return first_below_zero(lengths, torch.stack(margins))


class Digits(NamedTuple):
    """Holds what is known of all digits of some keys, (digits,) each."""

    wrong: torch.Tensor          # whether another one wins at 1K
    half_length: torch.Tensor
    reach: torch.Tensor
    lost: torch.Tensor           # nan if nobody looked


@torch.no_grad()
def measure(model, keys, look=False):
    """Measure the digits of some keys, a fourth of them at each place of the question.

    look: also find where they are lost. Returns Digits.
    """
    model = deepcopy(model).double()
    parts = []
    for more in range(min(4, len(keys))):
        text = write_text(keys[more::4], more, model.config.segment_len)
        states = model.absorb(text.start)
        for _ in range(N_PERIODS):
            states = model.absorb(text.period, states)
        n = text.n_hay + N_PERIODS * PERIOD
        added = growth(model, text, states)[-1]

        wrong = ask(model, text, states) < 0
        half = half_lengths(model, text, states, added)
        reach = reaches(model, text, states, added, n)
        lost = torch.full_like(reach, math.nan)
        if look:
            lost = lost_lengths(model, text, states, n)
        parts.append(torch.stack([wrong, half, reach, lost]).flatten(1))

    wrong, half, reach, lost = torch.cat(parts, dim=1)
    return Digits(wrong == 1, half, reach, lost)


# --- Models that differ ---------------------------------------------------------------


def rounded(x):
    """Return an input whose exact sigma is what x has in bfloat16, 0 below -6.25."""
    y = (F.elu(x.bfloat16()) + 1).to(x.dtype)
    return torch.where(y > 1, y - 1, y.log())


class Bfloat16Attention(InfiniAttention):
    """Reads and writes as if sigma were computed in bfloat16."""

    def read(self, q, k, v, memory):
        a_dot = self.attend(q, k, v)
        a_mem = infini.retrieve(rounded(q), memory)
        return infini.inject(self.beta, a_mem, a_dot)

    def write(self, memory, k, v):
        return super().write(memory, rounded(k), v)

    def write_all(self, memory, k, v):
        return super().write_all(memory, rounded(k), v)


def in_bfloat16(model):
    """Return a copy whose sigma is computed in bfloat16."""
    model = deepcopy(model)
    for block in model.blocks:
        layer = Bfloat16Attention(model.config)
        layer.load_state_dict(block.attention.state_dict())
        block.attention = layer
    return model


@torch.no_grad()
def multiply(model, matrices, factor):
    """Return a copy with larger weights. matrices: a key of LINE."""
    model = deepcopy(model)
    blocks = model.blocks[-1:] if matrices == LAST else model.blocks
    for block in blocks:
        if matrices != "W_K":
            block.attention.w_q.weight *= factor
        if matrices != "W_Q":
            block.attention.w_k.weight *= factor
    return model


def save_scaled(path, out):
    """Write a checkpoint of a plain model with W_Q and W_K of the last layer multiplied.

    Nothing is trained. passkey.py looks for keys with it as with any other.
    """
    model, _ = train.load_model(path)
    content = train.read_checkpoint(path)
    settings = dict(content["settings"], training="scaled")
    weights = multiply(model, LAST, SCALED_BY).state_dict()
    run = passkey.Run("scaled", settings["rule"], settings["seed"], settings["steps"])
    scaled = dict(content, settings=settings, model=weights)
    train.write_checkpoint(run.path(out), scaled)


@dataclass(frozen=True)
class Measured:
    """Holds what was measured with one model."""

    way: str
    rule: str
    seed: int
    digits: Digits
    changed: dict    # of a plain model, {(what, factor): Digits}

    def name(self):
        return f"{self.way} {self.rule} {self.seed}"


def measure_file(path, n_keys):
    """Measure a model, with keys of the training split."""
    rng = random.Random("half")
    keys = passkey.draw_keys(rng, n_keys, DIGITS, held_out=False)
    model, settings = passkey.load_passkey_model(path)
    digits = measure(model, keys, look=True)

    changed = {}
    if settings["training"] == "plain":
        for matrices in LINE:
            for factor in FACTORS:
                larger = multiply(model, matrices, factor)
                changed[matrices, factor] = measure(larger, keys)
        changed["sigma in bfloat16", 1] = measure(in_bfloat16(model), keys)
    return Measured(settings["training"], settings["rule"], settings["seed"],
                    digits, changed)


# --- Tables ---------------------------------------------------------------------------

HEADER = ["half, worst", "median", "reach, worst", "median", "lost, worst", "median",
          "wrong"]


def summary(digits):
    """List what stands in a row, of the worst digit and of the median one."""
    numbers = []
    for lengths in digits.half_length, digits.reach, digits.lost:
        numbers += [lengths.min().item(), lengths.median().item()]
    return [*numbers, digits.wrong.sum().item()]


def format_number(n):
    """Write a length in a few characters."""
    if math.isnan(n):
        return ""
    if n >= 1e6:
        return "never" if n == math.inf else f"{n:.1e}"
    return f"{n:,.0f}"


def print_table(models):
    """Print a row for each model, and below a plain one a row for each change."""
    print_row("tokens of hay", HEADER, 26, 13)
    for model in models:
        print_digits(model.name(), model.digits)
        for (what, factor), digits in model.changed.items():
            print_digits(f"    {what} x {factor:g}", digits)


def print_digits(name, digits):
    print_row(name, [format_number(n) for n in summary(digits)], 26, 13)


def save_table(models, path):
    """Write all rows into a CSV file."""
    rows = []
    for model in models:
        name = [model.way, model.rule, model.seed]
        rows.append([*name, "", 1, *summary(model.digits)])
        for change, digits in model.changed.items():
            rows.append([*name, *change, *summary(digits)])
    header = ["training", "rule", "seed", "changed", "factor", *HEADER]
    common.write_csv(path, header, rows)


def errors(models, number):
    """Compute log10(lost / number) for each digit that was there at 1K and then lost."""
    off = []
    for model in models:
        digits = model.digits
        seen = ~digits.wrong & (digits.lost < LONGEST)
        predicted = getattr(digits, number)[seen].clamp(max=FURTHEST)
        off.append((digits.lost[seen] / predicted).log10())
    return torch.cat(off)


def print_errors(models):
    """Say how well both numbers tell where a digit is lost."""
    print_row("\nlost length over", ["digits", "median", "|log10|", "within x2"], 26, 13)
    for number in ("half_length", "reach"):
        off = errors(models, number)
        if len(off) > 0:
            near = (off.abs() < math.log10(2)).double().mean()
            print_row(number, [len(off), f"{10 ** off.median():.2f}",
                               f"{off.abs().median():.3f}", f"{near:.0%}"], 26, 13)


# --- Pictures -------------------------------------------------------------------------


def prediction_title(models):
    """Say which number tells where a digit is lost, if the data do."""
    half = errors(models, "half_length").abs()
    reach = errors(models, "reach").abs()
    if len(half) and reach.median() < math.log10(1.1) and half.median() > math.log10(2):
        return "The reach at 1K tells where a digit is lost, its half length only roughly"
    return "Does a number measured at 1K tell where a digit is lost?"


def draw_dots(axis, models, number):
    """Draw a dot for each digit. An open one is not lost by LONGEST."""
    top = 5 * LONGEST
    for model in models:
        digits = model.digits
        x = getattr(digits, number).clamp(100, top)
        found = digits.lost >= LONGEST
        lost = ~digits.wrong & ~found
        style = dict(marker=MARKER[model.way], edgecolors=common.COLOUR[model.rule],
                     alpha=0.5, s=16, linewidths=0.7)
        axis.scatter(x[lost], digits.lost[lost], color=common.COLOUR[model.rule], **style)
        axis.scatter(x[found], torch.full_like(x[found], top), facecolors="none", **style)

    axis.plot([1e3, LONGEST], [1e3, LONGEST], color="black", linewidth=0.8)
    axis.axhline(2 ** 20, color="0.5", linewidth=0.6, linestyle=":")
    axis.set(xscale="log", yscale="log", xlim=(80, 2 * top), ylim=(700, 3 * top))
    axis.annotate("the line where they agree", (1e8, 1e8), xytext=(8, -8), fontsize=8,
                  textcoords="offset points", va="top")


def draw_predictions(models, path):
    """Draw what both numbers tell, against where the digits are lost."""
    figure, axes = common.new_figure(9.6, 5.2, columns=2, sharey=True)
    left, right = axes
    draw_dots(left, models, "half_length")
    draw_dots(right, models, "reach")
    left.set_xlabel("half length of a digit, at 1K (tokens of hay)")
    right.set_xlabel("reach of a digit, at 1K (tokens of hay)")
    left.set_ylabel("where it is lost (tokens of hay; open: not yet)")
    right.text(100, 1.2 * 2 ** 20, "a million tokens", fontsize=8, color="0.5", va="bottom")

    kinds = {}
    for model in models:
        kinds.setdefault((model.way, model.rule), []).append(model.seed)
    for (way, rule), seeds in kinds.items():
        right.scatter([], [], color=common.COLOUR[rule], marker=MARKER[way], s=20,
                      label=f"{way} {rule}, seeds: {len(seeds)}")
    right.legend(fontsize=8, loc="lower right")
    figure.suptitle(prediction_title(models), fontsize=10)
    common.save_figure(figure, path)


def worst_reaches(models, matrices):
    """Collect the reach of the worst digit, and whether one is wrong at 1K, by factor.

    Returns two tensors, (factors, seeds).
    """
    reach = []
    wrong = []
    for factor in [1, *FACTORS]:
        found = [model.changed.get((matrices, factor), model.digits) for model in models]
        reach.append([digits.reach.min().clamp(max=FURTHEST).item() for digits in found])
        wrong.append([digits.wrong.any().item() for digits in found])
    return torch.tensor(reach), torch.tensor(wrong)


def factor_title(models):
    """Say which weights to multiply, if all seeds agree."""
    ends = {}
    for matrices in LINE:
        reach, wrong = worst_reaches(models, matrices)
        ends[matrices] = reach[FACTORS.index(SCALED_BY) + 1]
    others = torch.stack([ends[matrices] for matrices in LINE if matrices != LAST])
    if (ends[LAST] > others.amax(0)).all():
        return (f"{SCALED_BY} times W_Q and W_K in the last layer alone: "
                f"no digit is lost before {ends[LAST].min():.0e} tokens")
    return "How far is a key found when weights are larger?"


def draw_factors(models, path):
    """Draw the reach of the worst digit, a mean over seeds and a point for each."""
    factors = [1, *FACTORS]
    figure, axes = common.new_figure(9.6, 4.4, columns=2, sharex=True, sharey=True)
    for axis, rule in zip(axes, ("linear", "delta"), strict=True):
        same = [model for model in models if model.rule == rule]
        for matrices, line in LINE.items():
            if not same:
                continue
            reach, wrong = worst_reaches(same, matrices)
            mean = reach.log().mean(1).exp()
            common.draw_line(axis, factors, mean, rule, matrices,
                             linestyle=line, marker="")
            common.draw_points(axis, factors, reach, rule)
            for seed in range(len(same)):
                at = wrong[:, seed].nonzero().flatten().tolist()
                axis.plot([factors[i] for i in at], reach[at, seed], "kx", markersize=5)

        axis.axhline(2 ** 20, color="0.5", linewidth=0.6, linestyle=":")
        axis.set(yscale="log", xlim=(0.9, 5))
        axis.set_title(f"{rule}, seeds: {len(same)}", fontsize=9)
        axis.set_xlabel("factor (x: a digit is wrong at 1K already)")
    axes[0].set_ylabel("reach of the worst digit (tokens of hay)")
    for axis in axes:
        common.spread_names(axis)
    axes[0].text(0.92, 1.2 * 2 ** 20, "a million", fontsize=8, color="0.5", va="bottom")
    figure.suptitle(factor_title(models), fontsize=10)
    common.save_figure(figure, path)


# --- The command ----------------------------------------------------------------------


def main():
    parser = common.new_parser("Measure at which length digits are lost, and why.")
    common.add_files_argument(parser, "models with a memory, of passkey.py")
    parser.add_argument("--keys", type=common.count, default=16, help="to ask for")
    common.add_shared_arguments(parser, device=False)
    args = parser.parse_args()
    common.set_threads(args.threads)
    for path in args.load:
        _, settings = passkey.load_passkey_model(path)
        if settings["training"] not in MARKER:
            raise ValueError(f"{path} has no memory")

    jobs = [(path, args.keys) for path in args.load]
    models = list(side_by_side(measure_file, jobs))
    print_table(models)
    print_errors(models)
    save_table(models, args.out / "sharpness.csv")
    draw_predictions(models, args.out / "predict.png")

    plain = [model for model in models if model.way == "plain"]
    if plain:
        draw_factors(plain, args.out / "sharpness.png")
    for path, model in zip(args.load, models, strict=True):
        if model.way == "plain":
            save_scaled(path, args.out)


if __name__ == "__main__":
    # Worker processes find functions by the name of their module, which is not __main__.
    from experiments.sharpness import main
    common.run_command(main)
