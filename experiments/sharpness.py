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
SHADE = {"W_Q": 0.4, "W_K": 0.6, "both": 0.8, LAST: 1.0}    # what is multiplied
SCALED_BY = 3                                               # in the checkpoints written
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
    x, _ = model.read(text.start, None, below)
    _, k, _ = last.attention.project(last.norm1(x))
    x, _ = model.read(text.end, states, below)
    q, _, _ = last.attention.project(last.norm1(x))
    sq = sigma(q[:, :, -DIGITS:])
    weights = sq @ sigma(k).mT                           # (B, H, DIGITS, S N)

    is_digit = torch.isin(text.start, encode("0123456789"))
    places = is_digit.nonzero()[:, 1].view(-1, 2, DIGITS)
    places = places.mT.unsqueeze(1).expand(-1, q.shape[1], -1, -1)
    return weights.gather(-1, places).sum(-1), sq


def head_that_counts(model, text, states, added):
    """Find the head that each answer would miss most if it read only hay, (B, 1, DIGITS)."""
    *below, last = states
    hay = grow(last, added, FURTHEST).memory
    without = []
    for head in range(model.config.n_heads):
        M = last.memory.M.clone()
        z = last.memory.z.clone()
        M[:, head] = hay.M[:, head]
        z[:, head] = hay.z[:, head]
        flooded = last._replace(memory=Memory(M, z))
        without.append(ask(model, text, [*below, flooded]))
    return torch.stack(without, dim=1).argmin(dim=1, keepdim=True)


def half_lengths(model, text, states, added):
    """Compute the half lengths, (B, DIGITS). added: by a token of hay, in the last layer."""
    own, sq = own_weights(model, text, states)
    hay = (sq * added.z.unsqueeze(2)).sum(-1)            # (B, H, DIGITS)
    head = head_that_counts(model, text, states, added)
    return (own / hay).gather(1, head).squeeze(1)


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
    lengths = (n * torch.logspace(0, 12, 145).double()).tolist()
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
    """Return the x whose exact sigma is that of x in bfloat16, where it is 0 below -6.25."""
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
    """Return a copy with larger weights. matrices: a key of SHADE."""
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
        for matrices in SHADE:
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
    """List the numbers of a row: the worst digit and the median one, and how many are wrong."""
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
