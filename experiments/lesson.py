"""What the lesson draws and measures, so that the notebook holds only what it teaches.

    python -m experiments.lesson          run walkthrough.ipynb, save its outputs, stamp it
    python -m experiments.lesson --gif    draw assets/million.gif (three minutes)

The stamp says of which code and models the saved outputs are. A test compares it.
"""

import contextlib
import hashlib
import inspect
import io
import json
import math
import random
import re
import textwrap
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import torch
import torch.nn.functional as F
from IPython.display import HTML, Image, display
from matplotlib import rcParams
from matplotlib.animation import PillowWriter
from matplotlib.colors import LogNorm, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter

import common
import passkey
import train
from common import COLOUR, MARKER
from experiments import phantom, sharpness
from infini import (
    ATTENTION,
    UPDATE,
    InfiniAttention,
    InfiniConfig,
    Memory,
    generate,
    local_attention,
    retrieve,
    sigma,
    update_linear,
)

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "walkthrough.ipynb"

WRITE = "C1"              # the colour of what writes
READ = "C0"               # and of what reads
DARK = "0.25"             # of hay

# --- Showing --------------------------------------------------------------------------


def set_up():
    """Make every run of the notebook draw the same numbers, on one core."""
    torch.manual_seed(0)
    torch.set_num_threads(1)    # these models are too small to share
    rcParams.update({"font.size": 9, "axes.titlesize": 9.5})


def quietly():
    """Hide progress lines, which go to the standard error stream."""
    return contextlib.redirect_stderr(io.StringIO())


def as_png(figure):
    """Draw a figure. Returns the bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png")
    return small_png(file)


def small_png(file, width=None):
    """Read a picture, make it as wide as asked, and keep 256 colours. Returns PNG bytes."""
    picture = PIL.Image.open(file).convert("RGB")
    if width is not None:
        height = round(picture.height * width / picture.width)
        picture = picture.resize((width, height), PIL.Image.Resampling.LANCZOS)
    small = io.BytesIO()
    picture.quantize(256, dither=PIL.Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()


def show(figure):
    """Show a figure below the cell."""
    display(Image(as_png(figure)))


def show_picture(name, width=900):
    """Show a picture that an experiment made."""
    display(Image(small_png(ROOT / f"assets/{name}.png", width)))


def show_code(*functions):
    """Print the source of functions."""
    for function in functions:
        print(inspect.getsource(function))


def print_segments(tokens, N=32):
    """Print a text as words, a segment per line."""
    for s, segment in enumerate(tokens.split(N), start=1):
        words = [passkey.VOCABULARY[token] for token in segment]
        print(f"segment {s}: {' '.join(words)}")


def print_result(experiment, block=0):
    """Print a block of numbers that RESULTS.md holds for an experiment."""
    print(result_block(experiment, block))


def result_block(experiment, block=0):
    """Find the lines of RESULTS.md that an experiment printed."""
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    sections = text.split("\n## ")
    section = next(s for s in sections if f"{experiment}.py:" in s[:200])

    fenced = re.findall(r"```\w*\n(.+?)```", section, re.DOTALL)
    indented = re.findall(r"(?:^ {4}.*\n)+", section, re.MULTILINE)
    blocks = []
    for found in fenced + indented:
        if "python " not in found:
            blocks.append(textwrap.dedent(found).rstrip())
    return blocks[block]


def percents(shares):
    """Write shares as 100/98/100."""
    return "/".join(f"{100 * share:.0f}" for share in shares)


def staircase(axis, weights, columns, rows):
    """Draw weights, a row per question, as colours and percents from 5% on."""
    image = common.heat_map(axis, (100 * weights).tolist(), 100, "{:.0f}", columns, rows)
    for text in axis.texts:
        text.set_visible(float(text.get_text()) >= 5)
    return image


def name_line(axis, x, y, text, colour, up=0):
    """Write the name of a line beside its end."""
    axis.annotate(text, (x, y), xytext=(5, up), textcoords="offset points", color=colour,
                  va="center", fontsize=8)


# --- The idea, and the layer ----------------------------------------------------------


class Sketch:
    """Draws boxes, arrows and words on an empty sheet, in its own units."""

    def __init__(self, width, height, units):
        self.figure, self.axis = common.new_figure(width, height)
        self.axis.set(xlim=(0, units), ylim=(0, units * height / width))
        self.axis.axis("off")

    def text(self, x, y, text, size=10, **style):
        style = dict(ha="center", va="center") | style
        self.axis.text(x, y, text, fontsize=size, **style)

    def box(self, x, y, width, height, fill="0.94", edge=1.0):
        self.axis.add_patch(Rectangle((x, y), width, height, fc=fill, ec="black", lw=edge))

    def arrow(self, *points, colour="black", line="-", width=1.6):
        """Draw a path through points, with a head at its end."""
        *path, before, end = points
        if path:
            x, y = zip(*path, before, strict=True)
            self.axis.plot(x, y, color=colour, linewidth=width, linestyle=line,
                           solid_capstyle="round")
        look = dict(arrowstyle="-|>", color=colour, linestyle=line, linewidth=width,
                    shrinkA=0, shrinkB=0, mutation_scale=13)
        self.axis.annotate("", end, before, arrowprops=look)


def idea_figure():
    """Draw segments, which write into a memory and read from it."""
    sketch = Sketch(9, 3.5, 90)
    sketch.text(45, 33.2, "The memory has the same size after 32 tokens and a million", 12,
                weight="bold")
    sketch.text(45, 29.8, "a matrix M and a vector z per head, 8,448 numbers in all "
                "eight heads")

    segments = [
        (1, 16, "segment 1", "The grass is\ngreen. ... (hay)"),
        (24, 18, "segment 2", "... The pass key\nis 9054. ..."),
        (49, 15, "3 ... 32,767", "hay, hay,\nhay, hay, ..."),
        (71, 18, "segment 32,768", "... The pass\nkey is ?"),
    ]
    for x, width, title, text in segments:
        matters = "key" in text
        sketch.box(x, 7, width, 8, "#ffe680" if matters else "0.94", 2.4 if matters else 1)
        sketch.text(x + width / 2, 13.3, title, weight="bold")
        sketch.text(x + width / 2, 9.8, text)

    # The memories stand above the gaps between the segments.
    for x, write, read in [(20.5, "write (Eq. 8 or 9)", "read"), (45.5, "write", "read"),
                           (67.5, "write", "read (Eq. 7)")]:
        sketch.box(x - 4.5, 21, 9, 5, "white")
        sketch.text(x, 23.5, "M, z", weight="bold")
        sketch.arrow((x - 5, 15), (x - 2.5, 21), colour=WRITE)
        sketch.arrow((x + 2.5, 21), (x + 5, 15), colour=READ, line="--")
        sketch.text(x - 5.2, 18, write, ha="right", color=WRITE)
        sketch.text(x + 5.2, 18, read, ha="left", color=READ)

    sketch.arrow((25, 23.5), (41, 23.5))
    sketch.arrow((50, 23.5), (63, 23.5))
    sketch.text(56, 25, "...", 14)
    sketch.arrow((80, 7), (80, 4))
    sketch.text(80, 2, "9054", 14, weight="bold")
    sketch.text(75.5, 2, "mix what is read with softmax attention in the segment (Eq. 10):",
                ha="right")
    return sketch.figure


def draw_idea():
    """Show the idea of the paper in one picture."""
    show(idea_figure())


def draw_layer():
    """Show how data flows through one head while it reads segment s (our Figure 1)."""
    sketch = Sketch(9, 4.6, 90)
    sketch.text(45, 44.6, "One head, one segment: it reads the memory, then it writes", 11,
                weight="bold")

    # The segment, its queries, keys and values.
    sketch.box(30, 1, 18, 4.5, "#ffe680")
    sketch.text(39, 3.2, "$X_s$, segment s")
    for x, name in (28, "Q"), (39, "K"), (50, "V"):
        sketch.box(x - 3, 9.5, 6, 4, "white")
        sketch.text(x, 11.5, name, 11, weight="bold")
        sketch.arrow((39, 5.5), (x, 9.5))
    sketch.text(55, 7.3, "Eq. 5: three matrices", 9, ha="left")

    # Softmax attention inside the segment.
    sketch.box(33, 17.5, 22, 8.5)
    sketch.text(44, 24.1, "attend (Eq. 6)", 9.5)
    sketch.text(44, 21.6, "softmax, in the segment only", 8.5)
    sketch.text(44, 19.3, "Q and K with positions", 8.5)
    for x, to in (28, 36), (39, 41), (50, 50):
        sketch.arrow((x, 13.5), (to, 17.5))

    # The memory before and after.
    sketch.box(1, 27, 13, 8, "white", 2)
    sketch.text(7.5, 32.4, "$M_{s-1}$, $z_{s-1}$", 11)
    sketch.text(7.5, 29.2, "all segments before", 7.5)
    sketch.box(76, 27, 13, 8, "white", 2)
    sketch.text(82.5, 32.4, "$M_s$, $z_s$", 11)
    sketch.text(82.5, 29.2, "goes to segment s + 1", 7.5)

    # Reading.
    sketch.box(17, 27.5, 14, 7, "#d6e6f5")
    sketch.text(24, 32.4, "read (Eq. 7)", 9.5, color=READ)
    sketch.text(24, 29.4, r"$\sigma(Q)M\,/\,\sigma(Q)z$", 9.5)
    sketch.arrow((14, 31), (17, 31), colour=READ)
    sketch.arrow((25, 12), (21, 12), (21, 27.5), colour=READ)
    sketch.text(20.2, 20, r"$\sigma(Q)$, no" "\npositions", 8.5, ha="right", color=READ)

    # Mixing.
    sketch.box(36, 30, 16, 7, "white")
    sketch.text(44, 35, "gate (Eq. 10)", 9.5)
    sketch.text(44, 32.1, r"$g\,A_{mem}+(1-g)A_{dot}$", 8.5)
    sketch.arrow((31, 32.5), (36, 32.5))
    sketch.text(33.5, 34, "$A_{mem}$", 9)
    sketch.arrow((44, 26), (44, 30))
    sketch.text(46.8, 27.9, "$A_{dot}$", 9)
    sketch.text(53, 36.1, r"$g=\mathrm{sigmoid}(\beta)$", 8, ha="left")
    sketch.text(53, 34.1, "one number per head", 8, ha="left")
    sketch.arrow((44, 37), (44, 41))
    sketch.text(43, 38.1, "to $W_O$, with the other heads (Eq. 11)", 8.5, ha="right")

    # Writing, which does not read what is new.
    sketch.box(61, 20, 15, 7, "#fbe3cf")
    sketch.text(68.5, 24.9, "write (Eq. 8 or 9)", 9.5, color=WRITE)
    sketch.text(68.5, 21.9, r"$+\,\sigma(K)^\top V,\ +\sum\sigma(K)$", 8.5)
    sketch.arrow((53, 11.5), (66, 11.5), (66, 20), colour=WRITE)
    sketch.axis.plot([42, 47], [11.5, 11.5], color=WRITE, linewidth=1.6)    # K goes along
    sketch.text(67, 15, r"$\sigma(K)$ and $V$,", 8.5, ha="left", color=WRITE)
    sketch.text(67, 12.8, "no positions", 8.5, ha="left", color=WRITE)
    sketch.arrow((76, 23.5), (82.5, 23.5), (82.5, 27), colour=WRITE)
    sketch.arrow((7.5, 35), (7.5, 39.5), (70, 39.5), (70, 27), colour="0.5", width=1.2)
    sketch.text(60, 40.7, "the old memory, to which it adds", 8, color="0.35")
    show(sketch.figure)


# --- What a layer costs ---------------------------------------------------------------

KINDS = ["full", "local", "xl", "delta"]    # "delta" is Infini-attention by that rule
LENGTHS = [128, 256, 512, 1024, 2048, 4096]


def numbers_kept(state):
    """Count the numbers that a layer keeps from one call to the next."""
    memory, k, v = state
    kept = k.numel() + v.numel()
    for part in memory or ():
        kept += part.numel()
    return kept


def measure_costs(rounds=10):
    """Measure four layers. Returns us per token and numbers kept, {kind: [per length]}."""
    layers = {}
    for kind in KINDS:
        attention = "infini" if kind == "delta" else kind
        config = InfiniConfig(d_model=64, n_heads=2, segment_len=64, attention=attention)
        layers[kind] = ATTENTION[attention](config)

    cost = {kind: [math.inf] * len(LENGTHS) for kind in KINDS}
    kept = {kind: [0] * len(LENGTHS) for kind in KINDS}
    for _ in range(rounds):    # the best one counts, as other programs disturb it least
        for i, T in enumerate(LENGTHS):
            for kind, layer in layers.items():
                x = torch.randn(1, T, 64)
                start = time.process_time()
                _, state = layer(x)
                seconds = time.process_time() - start
                cost[kind][i] = min(cost[kind][i], 1e6 * seconds / T)
                kept[kind][i] = numbers_kept(state)
    return cost, kept


def draw_costs(cost, kept):
    """Draw what four layers cost, and what they keep, by the length of the text."""
    figure, (left, right) = common.new_figure(8.6, 3.1, 1, 2)
    names = dict(full="full", local="local", xl="xl", delta="infini (Delta)")
    for kind in KINDS:
        common.draw_line(left, LENGTHS, cost[kind], kind, names[kind])
        if kept[kind][-1] > 0:                            # a log scale has no 0
            common.draw_line(right, LENGTHS, kept[kind], kind, names[kind])

    left.set(title="Time per token grows without end only for full", yscale="log",
             ylabel="processor time (us per token)")
    right.set(title="So does what is kept (local keeps nothing)", yscale="log",
              ylabel="numbers kept", ylim=(1e3, 2e6))
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(NullFormatter())
    for axis in left, right:
        common.set_lengths(axis, LENGTHS)
        axis.set(xlabel="tokens of text", xlim=(110, 12_000))
        axis.grid(alpha=0.3)
    show(figure)


# --- A memory of sums -----------------------------------------------------------------

VALUES = [*range(10), "hay"]
PLACES = ["1st", "2nd", "3rd", "4th"]


def draw_memory(memory, answers):
    """Draw M, z and what the four questions of the toy read."""
    figure, axes = common.new_figure(9, 2.5, 1, 3, width_ratios=[11, 1.7, 12])
    left, middle, right = axes
    features = [f"{place} digit" for place in PLACES] + ["hay"]
    left.imshow(memory.M, cmap="Oranges", vmin=0, vmax=9, aspect="auto")
    left.set(title="M: each digit has a row to itself", xlabel="value")
    left.set_xticks(range(11), VALUES)
    left.set_yticks(range(5), features)
    left.set_ylabel("feature")

    image = middle.imshow(memory.z[:, None], cmap="Oranges", vmin=0, vmax=9, aspect="auto")
    middle.set(title="z", xticks=[], yticks=[])
    figure.colorbar(image, ax=middle, label="sum")
    image = staircase(right, answers, VALUES, PLACES)
    right.set(title="what is read: a staircase", xlabel="value", ylabel="digit asked for")
    figure.colorbar(image, ax=right, label="weight (%)")
    show(figure)


def draw_dilution(toy):
    """Draw what the toy's questions read after hay. toy: {name: (4, 11)}."""
    figure, axes = common.new_figure(9, 2.7, 1, len(toy), sharey=True)
    for axis, (name, read) in zip(axes, toy.items(), strict=True):
        image = axis.imshow(100 * read, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        axis.set_title(f"{name}\nright digit: {read[0, 9]:.1%}", fontsize=9)
        axis.set_xticks([0, 4, 5, 9, 10], [0, 4, 5, 9, "hay"], rotation=90)
        axis.set_xlabel("value")
    axes[0].set_yticks(range(4), PLACES)
    axes[0].set_ylabel("digit asked for")
    figure.colorbar(image, ax=axes, label="weight (%)")
    figure.suptitle("Only both together bring the digits back", fontsize=10)
    show(figure)


def random_keys(n, d_key):
    """Draw keys that are random numbers, (100 trials, n, d_key)."""
    return torch.randn(100, n, d_key)


def sparse_keys(n, d_key, elsewhere=-8.0):
    """Give each key a feature of its own, at 8. When all are taken, they are shared."""
    own = F.one_hot(torch.arange(n) % d_key, d_key) > 0
    return torch.where(own, 8.0, elsewhere).expand(100, n, d_key)


def measure_capacity(make_keys, d_key, numbers):
    """Return the relative error |read - v|^2 / |v|^2 after each number of pairs is stored.

    The rule is Linear, so all pairs may be written at once.
    """
    errors = []
    for n in numbers:
        torch.manual_seed(2)
        keys = make_keys(n, d_key)                        # (100, n, d_key)
        values = torch.randn(100, n, 32)
        nothing = Memory(torch.zeros(100, d_key, 32), torch.zeros(100, d_key))
        read = retrieve(keys, update_linear(nothing, keys, values))
        error = (read - values).square().sum() / values.square().sum()
        errors.append(error.item())
    return errors


def draw_capacity():
    """Draw how much of what is stored is read back, by the number of pairs."""
    numbers = [1, 2, 4, 8, 16, 32, 64, 128]
    figure, axes = common.new_figure(8.6, 3, 1, 2, sharey=True)
    titles = {random_keys: "Random keys are lost at once",
              sparse_keys: "Sparse keys hold d_key pairs"}
    for axis, (make_keys, title) in zip(axes, titles.items(), strict=True):
        for d_key, shade in (16, 0.35), (32, 0.6), (64, 1.0):
            errors = measure_capacity(make_keys, d_key, numbers)
            axis.plot(numbers, errors, marker=MARKER["linear"], color=COLOUR["linear"],
                      markersize=4, alpha=shade, label=f"d_key {d_key}")

        axis.axhline(1, color="0.5", linestyle=":")
        common.set_lengths(axis, numbers)
        axis.set(title=title, xlabel="pairs stored", ylim=(-0.05, 1.12))
        axis.grid(alpha=0.3)

    axes[0].text(1, 1.03, "as bad as reading nothing", fontsize=8, color="0.4")
    axes[0].set_ylabel("relative error")
    axes[1].legend(fontsize=8, loc="upper left")
    show(figure)


def print_untrained():
    """Print what untrained memories return for their pairs, and name of their values."""
    common.print_row("d_key 16; pairs stored", phantom.UNTRAINED_PAIRS, 24, 12)
    for kind in ("sparse", "random"):
        for rule in UPDATE:
            found = phantom.measure_untrained(kind, rule, neutral=False)
            cells = [f"{error:.2f}, {right:.0f}%" for error, right in found.values()]
            common.print_row(f"{kind} keys, {rule}", cells, 24, 12)


# --- The layer ------------------------------------------------------------------------


def changed(function, old, new):
    """Return a function with one piece of its text replaced. Raises ValueError if it is not
    there."""
    text = inspect.getsource(function)
    if old not in text:
        raise ValueError(f"{function.__name__} has no {old!r}")
    names = dict(function.__globals__)
    exec(text.replace(old, new), names)
    return names[function.__name__]


def compare_with_layer(heads):
    """Print how far heads that are written for one text are from the layer of infini.py.

    heads: {rule: function}. The text has 22 tokens, and segments have 4.
    """
    for rule, head in heads.items():
        sizes = dict(d_model=16, n_heads=2, segment_len=4, rope_base=50.0)
        layer = InfiniAttention(InfiniConfig(**sizes, update=rule))
        x = torch.randn(1, 22, 16)
        q, k, v = layer.project(x)                        # Eq. 5
        outputs = []
        for h in range(2):
            outputs.append(head(q[0, h], k[0, h], v[0, h], layer.beta[h], 4))

        o = layer.w_o(torch.cat(outputs, -1))             # Eq. 11
        right, _ = layer(x)
        print(f"{rule:7} differs from infini.py by {(o - right[0]).abs().max():.1e}")


def draw_seen(heads, N=32):
    """Draw how much each token takes from each. heads: {name: (head, beta)}.

    The output is linear in the values. With one unit vector per token as values, it is the
    table of weights itself.
    """
    torch.manual_seed(3)
    q = torch.randn(128, 32)
    k = torch.randn(128, 32)

    figure, axes = common.new_figure(8.6, 3.2, 1, len(heads), sharey=True)
    for axis, (name, (head, beta)) in zip(axes, heads.items(), strict=True):
        with torch.no_grad():
            weights = head(q, k, torch.eye(128), torch.tensor(beta), N)

        axis.set_facecolor("0.75")    # shows what is not seen at all
        seen = weights.where(weights != 0, math.nan)
        image = axis.imshow(seen, cmap="RdBu_r", norm=SymLogNorm(1e-4, vmin=-1, vmax=1),
                            interpolation="nearest")
        axis.set(title=name, xticks=range(0, 128, N), yticks=range(0, 128, N),
                 xlabel="seen token")
        print(f"{name:24} a row of segment 1 sums to {weights[5].sum():.2f}, the last row "
              f"to {weights[-1].sum():.2f}, the smallest weight is {weights.min():+.4f}")
    axes[0].set_ylabel("seeing token")
    figure.colorbar(image, ax=axes, label="weight", ticks=[-0.1, -1e-3, 0, 1e-3, 0.1, 1])
    show(figure)


# --- A model learns it ----------------------------------------------------------------


def draw_tasks(n, held_out=True):
    """Draw tasks with a key each, either held out or of the training split."""
    rng = random.Random("lesson" if held_out else "half")
    keys = passkey.draw_keys(rng, n, passkey.DIGITS, held_out)
    return [passkey.one_key(key) for key in keys]


def write_texts(tasks, n_paragraphs):
    """Write texts with the needle before all hay, and the answers, (B, T) ids."""
    hay = passkey.write_hay("paper", n_paragraphs, None)
    return torch.stack([passkey.write_input(task, hay, before=0) for task in tasks])


def losses_with_and_without(model, texts):
    """Return the loss of a digit, as it is and with an emptied memory."""
    N = model.config.segment_len
    as_it_is, _, _ = passkey.answer_loss(model, texts, passkey.DIGITS)

    border = (texts.shape[1] - passkey.DIGITS - 1) // N * N
    emptied, _, _ = passkey.answer_loss(model, texts[:, border:], passkey.DIGITS)
    return as_it_is.item(), emptied.item()


def train_watched(model, loss_of, steps):
    """Train a model as passkey.py does, and look at it every 100 steps.

    Returns {step: (loss of a digit, loss with an emptied memory)}, of 64 keys that no
    training sees, in texts of 8 segments.
    """
    way = passkey.WAYS["short"]
    optimizer = train.make_optimizer(model, way.lr, 2.5 * way.lr)
    texts = write_texts(draw_tasks(64), 7)

    watched = {}
    for step in range(steps + 1):
        if step % 100 == 0:
            with torch.no_grad():
                watched[step] = losses_with_and_without(model, texts)
        if step % 300 == 0:
            as_it_is, emptied = watched[step]
            print(f"step {step:5}: loss of a digit {as_it_is:.2f}, "
                  f"with an emptied memory {emptied:.2f}")

        if step < steps:
            loss, _, _ = loss_of(model, step)
            train.take_step(model, optimizer, loss, train.schedule(step, steps))
    return watched


def draw_learning(watched):
    """Draw what train_watched saw."""
    steps = list(watched)
    with_memory, without = zip(*watched.values(), strict=True)
    figure, axis = common.new_figure(7, 2.9)
    axis.plot(steps, without, color=COLOUR["local"], linestyle="--")
    axis.plot(steps, with_memory, color=COLOUR["delta"])
    axis.axhline(math.log(10), color="0.6", linestyle=":")

    name_line(axis, steps[-1], without[-1], "memory emptied", "0.4")
    name_line(axis, steps[-1], with_memory[-1], "as it is", COLOUR["delta"])
    name_line(axis, steps[-1], math.log(10), "guessing: ln 10", "0.5", up=-6)
    axis.set(title="What it learns stands in the memory", xlabel="step",
             ylabel="loss of a digit", ylim=(0, 4.5), xlim=(0, 1.22 * steps[-1]))
    axis.grid(alpha=0.3)
    show(figure)


def digits_right(model, n_tokens, depth, n_keys=20):
    """Return the share of digits that a model finds at one length and depth."""
    with quietly():
        found = passkey.evaluate(model, draw_tasks(n_keys), [n_tokens], [depth])
        return next(found).digits_right


def print_digits(model, lengths, n_keys=20):
    """Print the digits found in %, for a key at the start, in the middle and at the end."""
    depths = [0.0, 0.5, 1.0]
    with quietly():
        found = list(passkey.evaluate(model, draw_tasks(n_keys), lengths, depths))
    print(f"Digits right in %, key at the start/middle/end of the hay, {n_keys} keys, "
          f"chance is 10%")
    for n in lengths:
        shares = [cell.digits_right for cell in found if cell.tokens == n]
        print(f"{n:8,} tokens, {n // 32:4} segments: {percents(shares)}")


# --- A million tokens -----------------------------------------------------------------


def measure_digits(model, n_keys=4):
    """Return the half length and the reach of each digit of some training keys."""
    keys = [task.answer for task in draw_tasks(n_keys, held_out=False)]
    digits = sharpness.measure(model, keys)
    return digits.half_length, digits.reach


def median(lengths):
    """Return the length that half of the digits have at least."""
    return lengths.sort(descending=True).values[len(lengths) // 2 - 1].item()


def measure_models(models):
    """Measure the digits of some models. Returns {name: (half lengths, reaches)}."""
    return {name: measure_digits(model) for name, model in models.items()}


def print_half_lengths(digits):
    """Print half lengths, and the share of a digit that follows from them."""
    print(f"{'the middle one of 16 digits':28}{'half length':>13}{'share after 5,000':>19}"
          f"{'after a million':>17}{'reach':>11}")
    for name, (half, reach) in digits.items():
        middle = median(half)
        near = middle / (middle + 5000)
        far = middle / (middle + 2 ** 20)
        print(f"{name:28}{middle:13,.3g}{near:19.1%}{far:17.1%}{median(reach):11,.3g}")


LINES = {"quick": ":", "plain": "--", "sharp": "-"}


def draw_shares(digits):
    """Draw the share of each digit in what its head reads, by the hay behind it."""
    figure, axis = common.new_figure(8.4, 3.5)
    n = torch.logspace(2, 9, 100)
    for name, (half, _) in digits.items():
        way, rule = name.split()
        style = dict(color=COLOUR[rule], linestyle=LINES[way])
        for one in half.tolist():
            axis.plot(n, 100 * one / (one + n), alpha=0.25, linewidth=0.7, **style)
        middle = median(half)
        axis.plot(n, 100 * middle / (middle + n), linewidth=2.4, **style)

        # The name stands where the share is a half, or at the end.
        x = min(middle, 2.5e6)
        below = -10 if name == "sharp delta" else 8
        name_line(axis, x, 100 * middle / (middle + x), name, COLOUR[rule], below)

    for length, text in (5000, "longest training input"), (2 ** 20, "a million"):
        axis.axvline(length, color="0.6", linewidth=0.8)
        axis.text(1.07 * length, -7, text, fontsize=8, color="0.4")
    axis.set(title="Dilution: hay takes the weight of a digit, sooner or later",
             xscale="log", xlabel="tokens of hay behind the needle",
             ylabel="share of a digit's two tokens (%)", ylim=(-12, 115))
    axis.grid(alpha=0.3)
    show(figure)


def print_loss_and_gradient(models):
    """Print what asks for more: loss and gradient on training texts of 5,000 tokens."""
    texts = write_texts(draw_tasks(4, held_out=False), 206)
    print(f"{texts.shape[1]:,} tokens, 4 training keys   loss of a digit   "
          "gradient of all W_Q and W_K (norm)")
    for name, model in models.items():
        weights = []
        for block in model.blocks:
            weights += [block.attention.w_q.weight, block.attention.w_k.weight]
        loss, _, _ = passkey.answer_loss(model, texts, passkey.DIGITS)
        gradients = torch.autograd.grad(loss, weights)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        print(f"{name:30}{loss.item():16.5f}{norm.item():20.5f}")


def print_factors(model):
    """Print what larger W_Q and W_K do to a model that is not trained any further."""
    names = {"W_Q": "W_Q, both layers", "W_K": "W_K, both layers",
             "both": "W_Q and W_K, both layers", sharpness.LAST: "W_Q and W_K, last layer"}
    rows = {"as trained": model}
    for matrices, factor in [("W_Q", 1.5), ("W_K", 1.5), ("both", 1.5), ("both", 3),
                             (sharpness.LAST, 3)]:
        larger = sharpness.multiply(model, matrices, factor)
        rows[f"{names[matrices]}, times {factor}"] = larger

    common.print_row("", ["half length", "reach", "% at 1K", "% at 128K"], 36, 12)
    for name, changed_model in rows.items():
        half, reach = measure_digits(changed_model)
        near = digits_right(changed_model, 1000, 0.0)
        far = digits_right(changed_model, 2 ** 17, 0.0, n_keys=5)
        cells = [f"{median(half):.2g}", f"{median(reach):.2g}", f"{100 * near:.0f}",
                 f"{100 * far:.0f}"]
        common.print_row(name, cells, 36, 12)


# --- Inside the trained head ----------------------------------------------------------

START = len(passkey.encode(passkey.INTRO))     # where the needle of write_texts begins
COPIES = [START + 4, START + 12]               # where its digits begin, twice
NEEDLE_END = START + 21


def without_positions(model, layer):
    """Return a copy whose layer (1 or 2) sees no positions inside the segment."""
    model = deepcopy(model)
    model.blocks[layer - 1].attention.attend = local_attention
    return model


@torch.no_grad()
def with_gates_shut(model, shut):
    """Return a copy with some gates shut, each (layer, head), counted from 1."""
    model = deepcopy(model)
    for layer, head in shut:
        model.blocks[layer - 1].attention.beta[head - 1] = -20.0
    return model


@torch.no_grad()
def look_inside(model, tasks):
    """Look at layer 2 while the digits are asked for, behind 6 paragraphs of hay.

    Returns queries (B, H, 4, d_key), keys in the memory (B, H, T, d_key), and the loss of
    each digit (B, 4).
    """
    seen = []

    def note(layer, arguments):
        seen.extend(layer.project(arguments[0]))

    texts = write_texts(tasks, 6)
    hook = model.blocks[1].attention.register_forward_pre_hook(note)
    logits, _ = model(texts[:, :-1])
    hook.remove()

    q, k, _ = seen
    past = q.shape[2] // 32 * 32                          # the complete segments
    losses = F.cross_entropy(logits[:, -4:].flatten(0, 1), texts[:, -4:].flatten(),
                             reduction="none")
    return q[:, :, -4:], k[:, :, :past], losses.view(-1, 4)


def heads_that_matter(model):
    """Find the head of layer 2 that each digit needs most: without it, its loss is highest.

    The 20 keys are of the training split. Returns four numbers, counted from 0.
    """
    losses = []
    for head in range(4):
        without = with_gates_shut(model, [(2, head + 1)])
        _, _, loss = look_inside(without, draw_tasks(20, held_out=False))
        losses.append(loss.mean(0))
    return torch.stack(losses).argmax(0).tolist()


def share_of_places(model, tasks, heads):
    """Return the share of each place of the key in what is read for each digit, (4, 4 + 1).

    The last column is everything else in the memory. A mean over the tasks.
    """
    q, k, _ = look_inside(model, tasks)
    weights = sigma(q) @ sigma(k).mT                      # (B, H, 4, T)
    shares = (weights / weights.sum(-1, keepdim=True)).mean(0)[heads, range(4)]
    first, second = (shares[:, copy:copy + 4] for copy in COPIES)
    places = first + second
    return torch.cat([places, 1 - places.sum(-1, keepdim=True)], -1)


def name_rows(heads):
    """Name the rows of a staircase by digit and head."""
    return [f"{place}, head {h + 1}" for place, h in zip(PLACES, heads, strict=True)]


def draw_staircases(models):
    """Draw which place of the key each digit reads, also without layer 1's positions."""
    figure, axes = common.new_figure(9, 4.9, 2, len(models), sharex=True)
    tasks = draw_tasks(20)
    for column, (name, model) in zip(axes.T, models.items(), strict=True):
        heads = heads_that_matter(model)
        for axis, layer in zip(column, (None, 1), strict=True):
            shown = model if layer is None else without_positions(model, layer)
            image = staircase(axis, share_of_places(shown, tasks, heads),
                              [*PLACES, "else"], name_rows(heads))

            found = digits_right(shown, 512, 0.5)
            change = "as trained" if layer is None else "no positions in layer 1"
            axis.set_title(f"{name}, {change}\n{found:.0%} of the digits found", fontsize=9)
        column[-1].set_xlabel("place in the key that is read")

    for row in axes:
        row[0].set_ylabel("digit that is asked for")
    figure.colorbar(image, ax=axes, label="share of the weight (%), 20 keys")
    show(figure)


def print_without_positions(models):
    """Print the digits that are found when one layer sees no positions."""
    for name, model in models.items():
        first = digits_right(without_positions(model, 1), 512, 0.5)
        second = digits_right(without_positions(model, 2), 512, 0.5)
        print(f"{name:13} without positions in layer 1 {first:4.0%} of the digits are "
              f"found, in layer 2 {second:4.0%}")


def draw_needle(model, name, key):
    """Draw which token of the needle each digit reads, for one key."""
    heads = heads_that_matter(model)
    tasks = [passkey.one_key(key)]
    q, k, _ = look_inside(model, tasks)
    weights = (sigma(q) @ sigma(k).mT)[0]
    shares = (weights / weights.sum(-1, keepdim=True))[heads, range(4), START:NEEDLE_END]
    words = passkey.tokenize(tasks[0].needle)

    figure, axis = common.new_figure(8.6, 2.3)
    image = staircase(axis, shares, words, name_rows(heads))
    axis.set(title=f"{name}, the key {key}: it asks for the place, not for the digit",
             ylabel="digit that is asked for")
    axis.tick_params(axis="x", rotation=45)
    figure.colorbar(image, ax=axis, label="share (%)")
    show(figure)


def weights_by_feature(model, key, digit):
    """Split the weight of a digit's two tokens, and of a token of hay, over the features.

    digit: its place, from 0. Returns its head, from 0, and two times (d_key,).
    """
    head = heads_that_matter(model)[digit]
    q, k, _ = look_inside(model, [passkey.one_key(key)])
    asked = sigma(q[0, head, digit])
    stored = sigma(k[0, head])
    own = asked * (stored[COPIES[0] + digit] + stored[COPIES[1] + digit])
    hay = asked * stored[96:192].mean(0)                  # three segments of nothing else
    return head, own, hay


def draw_products(models, key="9054", digit=1, n=2 ** 20):
    """Draw feature by feature what a question reads of a digit, and of a million of hay."""
    figure, axes = common.new_figure(9, 3.3, 1, len(models), sharey=True)
    for axis, (name, model) in zip(axes, models.items(), strict=True):
        head, own, hay = weights_by_feature(model, key, digit)
        order = own.argsort(descending=True)
        x = range(1, len(own) + 1)

        axis.semilogy(x, n * hay[order], "x", color=DARK, markersize=4)
        axis.semilogy(x, own[order], "o", color=WRITE, markersize=4)
        share = own.sum() / (own.sum() + n * hay.sum())
        axis.set_title(f"{name}, head {head + 1}\nthe digit's share is {share:.1%}")
        axis.set(xlabel="feature, sorted by the digit", ylim=(1e-13, 1e8))
        axis.grid(alpha=0.3)
        axis.text(31, 2e6, "x a million tokens of hay", fontsize=8, ha="right", color=DARK)
        axis.text(31, 1e5, "o the digit's two tokens", fontsize=8, ha="right", color=WRITE)
    axes[0].set_ylabel("sigma(question) times sigma(key)")
    show(figure)


# --- A slider -------------------------------------------------------------------------

# Its data are queries and keys in thousandths, rows of one number per feature.
SLIDER = """<div data-head='DATA' style="font-family:sans-serif;font-size:13px">
W_Q and W_K of layer 2, times <input type="range" min="0.5" max="3" step="0.05" value="1"
style="width:260px" oninput="
var c = +this.value, box = this.parentNode, D = JSON.parse(box.getAttribute('data-head')),
sigma = function(x) {x = c*x/1000; return x > 0 ? 1 + x : Math.exp(x)},
weight = function(k) {return D.q.reduce(function(t, q, i) {
    return t + sigma(q)*sigma(k[i])}, 0)},
sum = function(rows) {return rows.reduce(function(t, k) {return t + weight(k)}, 0)},
own = sum(D.own), rest = sum(D.rest), hay = sum(D.hay)/D.hay.length,
cells = box.querySelectorAll('b');
this.nextElementSibling.textContent = c.toFixed(2);
D.n.forEach(function(n, i) {
    cells[i].textContent = (100*own/(own + rest + n*hay)).toFixed(1) + '%'})">
<span>1.00</span><table><tr><td>tokens of hay</td>LENGTHS</tr>
<tr><td>share of the digit</td>SHARES</tr></table></div>"""


def show_slider(model, key="9054", digit=1):
    """Show a digit's share in one head, and let the reader multiply W_Q and W_K.

    The formula is exact: it sums sigma(c q) sigma(c k) over all features, for the digit's
    two tokens, for all else that is stored, and for three segments of hay.
    """
    head = heads_that_matter(model)[digit]
    q, k, _ = look_inside(model, [passkey.one_key(key)])
    own = [copy + digit for copy in COPIES]
    rest = [t for t in range(NEEDLE_END) if t not in own]
    stored = k[0, head]
    data = dict(q=q[0, head, digit], own=stored[own], rest=stored[rest], hay=stored[96:192])

    # The table shows the model as it is, before any script runs.
    lengths = [2 ** 10, 2 ** 12, 2 ** 14, 2 ** 16, 2 ** 18, 2 ** 20]
    weights = {name: sigma(part) @ sigma(data["q"]) for name, part in data.items()}
    shares = []
    for n in lengths:
        total = weights["own"].sum() + weights["rest"].sum() + n * weights["hay"].mean()
        shares.append((weights["own"].sum() / total).item())

    for name, part in data.items():
        data[name] = (1000 * part).round().int().tolist()
    html = SLIDER.replace("DATA", json.dumps(data | dict(n=lengths)))
    html = html.replace("LENGTHS", "".join(f"<td>{n:,}</td>" for n in lengths))
    html = html.replace("SHARES", "".join(f"<td><b>{x:.1%}</b></td>" for x in shares))
    display(HTML(html))


# --- Gates ----------------------------------------------------------------------------

GATES = [(layer, head) for layer in (1, 2) for head in (1, 2, 3, 4)]


def found_without(model, shut):
    """Return the share of digits found at 512 tokens, 20 keys at each of three depths."""
    model = with_gates_shut(model, shut)
    shares = [digits_right(model, 512, depth) for depth in (0.0, 0.5, 1.0)]
    return sum(shares) / 3


def print_gates_shut(models):
    """Print the digits that are found when whole layers are shut, or all gates but one."""
    for name, model in models.items():
        as_trained = found_without(model, [])
        layers = [found_without(model, part) for part in (GATES[:4], GATES[4:])]
        print(f"{name}: as trained {as_trained:.0%}, layer 1 shut {layers[0]:.0%}, "
              f"layer 2 shut {layers[1]:.0%}")
        alone = []
        for gate in GATES:
            others = [other for other in GATES if other != gate]
            alone.append(found_without(model, others))
        print(f"    only one gate open: layer 1 {percents(alone[:4])}%, "
              f"layer 2 {percents(alone[4:])}%")


def draw_gates(models):
    """Draw each gate, and beside it the digits that are found when it alone is shut."""
    figure, axes = common.new_figure(8.6, 3.6, 2, len(models))
    for row, (name, model) in zip(axes, models.items(), strict=True):
        left, right = row
        common.heat_map(left, model.gates().tolist(), 1, "{:.2f}", range(1, 5), range(1, 3))
        found = [100 * found_without(model, [gate]) for gate in GATES]
        image = common.heat_map(right, [found[:4], found[4:]], 100, "{:.0f}", range(1, 5),
                                range(1, 3))

        left.set_title(f"{name}: gates, sigmoid(beta)", fontsize=9)
        right.set_title(f"{name}: digits found (%) without this gate", fontsize=9)
        for axis in row:
            axis.set(xlabel="head", ylabel="layer")
    figure.colorbar(image, ax=axes, label="gates in %; digits in %, chance is 10")
    show(figure)


# --- What goes wrong ------------------------------------------------------------------


def symptoms(head):
    """Measure five signs of a mistake in a function like one_head."""
    torch.manual_seed(4)
    q = torch.randn(96, 32)
    k = torch.randn(96, 32)
    v = torch.rand(96, 8, requires_grad=True)
    only_memory = torch.tensor(200.0)                     # beta, an open gate

    # An output of segment 1 must not depend on later values, one of segment 3 on all.
    out = head(q, k, v, torch.tensor(0.0), 32)
    later, = torch.autograd.grad(out[10].sum(), v, retain_graph=True)
    back, = torch.autograd.grad(out[-1].sum(), v, allow_unused=True, materialize_grads=True)
    read = head(q, k, v, only_memory, 32)

    # The first of 32 sparse keys is asked for from each place of the next segment.
    keys = sparse_keys(32, 32)[0]
    asked = torch.cat([q[:32], keys[:1].expand(32, -1)])
    stored = torch.cat([keys, k[:32]])
    found = head(asked, stored, torch.eye(64), only_memory, 32)[32:, 0]
    return later[11:].abs().max(), back[:32].max(), read.min(), read.max(), found.min()


def print_symptoms(heads):
    """Print the five signs for each head, below what they should be."""
    columns = ["later", "gradient", "smallest", "largest", "found"]
    should_be = ["0", "above 0", "0 or more", "up to 1", "1"]
    print(f"{'':28}" + "".join(f"{column:>10}" for column in columns))
    print(f"{'should be':28}" + "".join(f"{text:>10}" for text in should_be))
    for name, head in heads.items():
        numbers = [f"{number.item():10.3g}" for number in symptoms(head)]
        print(f"{name:28}" + "".join(numbers))


# --- Exercises ------------------------------------------------------------------------


def judge(mine, true):
    """Call both functions with the same arguments, and print how far they are apart."""
    torch.manual_seed(5)
    empty = Memory(torch.zeros(8, 4), torch.zeros(8))
    memory = update_linear(empty, torch.randn(6, 8), torch.randn(6, 4))
    k = torch.randn(3, 8)
    v = torch.randn(3, 4)
    heads = torch.randn(2, 3, 4)
    arguments = {
        "retrieve": (k, memory),
        "inject": (torch.tensor([1.0, -2.0]), heads, heads.flip(0)),
    }
    given = arguments.get(true.__name__, (memory, k, v))

    results = zip(as_tuple(mine(*given)), as_tuple(true(*given)), strict=True)
    off = max((a - b).abs().max().item() for a, b in results)
    verdict = "right" if off < 1e-5 else "not yet"
    print(f"{mine.__name__} against {true.__name__}: {verdict}, it differs by {off:.1e}")


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


# --- A moving picture -----------------------------------------------------------------

STOPS = [round(41_667 ** (i / 44)) for i in range(45)]     # paragraphs, a million tokens
STILL = 28                                                 # frames at the end, four seconds
FOLLOWED = {"plain": "passkey-plain.pt", "sharp": "passkey-linear.pt"}
FULL = LogNorm(1e-3, 1e6)                                 # colours of M and z


@dataclass
class Moment:
    """Holds what is known about a model after so many tokens of hay."""

    n_tokens: int
    memory: Memory    # of the head that reads
    shares: list      # of each digit in what is read for it
    rows: list        # the feature in which each digit is read most
    answer: list      # the four tokens that the model would write now


@torch.no_grad()
def follow(model, key):
    """Read a key and a million tokens of hay, and ask again and again. Yields Moments."""
    task = passkey.one_key(key)
    heads = heads_that_matter(model)
    _, k, _ = look_inside(model, [task])
    stored = sigma(k[0])                                  # (H, T, d_key)
    start = passkey.encode(passkey.INTRO + task.needle)
    hay = passkey.encode(passkey.HAY)[None]
    question = passkey.encode(task.question)[None]

    state = model.absorb(start[None])
    n_read = 0
    for n in sorted(set(STOPS)):
        while n_read < n:
            now = min(80, n - n_read)
            state = model.absorb(hay.repeat(1, now), state)
            n_read += now

        shares, rows = read_digits(model, task, state, stored, heads)
        memory = state[1].memory
        shown = Memory(memory.M[0, heads[1]], memory.z[0, heads[1]])
        written = generate(model, question, 4, temperature=0, state=state)
        answer = [passkey.VOCABULARY[token] for token in written[0, -4:]]
        yield Moment(passkey.PARAGRAPH * n, shown, shares, rows, answer)


def read_digits(model, task, state, stored, heads):
    """Measure how layer 2 reads each digit. Returns shares, and features, as in Moment."""
    seen = []

    def note(layer, arguments):
        seen.append(layer.project(arguments[0]))

    hook = model.blocks[1].attention.register_forward_pre_hook(note)
    model(passkey.encode(task.question + " " + task.answer[:-1])[None], state)
    hook.remove()

    q, _, _ = seen[0]
    shares = []
    rows = []
    for digit, head in enumerate(heads):
        asked = sigma(q[0, head, digit - 4])
        own = asked * sum(stored[head, copy + digit] for copy in COPIES)
        total = asked @ state[1].memory.z[0, head]
        shares.append((own.sum() / total).item())
        rows.append(own.argmax().item())
    return shares, rows


def draw_bars(axis, moment, key):
    """Draw the digits that would be answered, each above its share. Lost ones are grey."""
    axis.clear()
    axis.axis("off")
    axis.set(xlim=(-0.6, 3.6), ylim=(0, 1.75))
    for place, share in enumerate(moment.shares):
        digit = moment.answer[place]
        kept = digit == key[place]
        axis.text(place, 1.4, digit, fontsize=42, ha="center", va="center", weight="bold",
                  color="black" if kept else "0.78")
        axis.add_patch(Rectangle((place - 0.3, 0.05), 0.6, 1.02, fc="0.92"))
        axis.add_patch(Rectangle((place - 0.3, 0.05), 0.6, 1.02 * share,
                                 fc=WRITE if kept else "0.6"))


def draw_memory_of(left, middle, moment, order):
    """Draw M and z, their features in an order, and which feature each digit is read in."""
    M = moment.memory.M[order]
    z = moment.memory.z[order, None]
    for axis, part in (left, M), (middle, z):
        axis.clear()
        axis.imshow(part.abs().numpy(), cmap="cividis", norm=FULL, aspect="auto")
        axis.set(xticks=[], yticks=[])
    left.set_title("M")
    middle.set_title("z")

    # An arrow for each digit, at the feature in which it is read most.
    for row in set(moment.rows):
        y = (order == row).nonzero().item()
        pointer = middle.annotate("", (0.6, y), (2.6, y), annotation_clip=False,
                                  arrowprops=dict(arrowstyle="-|>", color=WRITE))
        pointer.set_in_layout(False)


def draw_million(path, key="9054"):
    """Draw the moving picture of the README: what a million tokens do to two models."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplot_mosaic(
        [["time"] * 3, ["plain M", "plain z", "plain"], ["sharp M", "sharp z", "sharp"]],
        height_ratios=[0.35, 5, 5], width_ratios=[5, 0.6, 9])

    moments = {}
    orders = {}
    for name, file in FOLLOWED.items():
        model, _ = train.load_model(ROOT / "assets" / file)
        moments[name] = list(follow(model, key))
        orders[name] = moments[name][-1].memory.z.argsort(descending=True)

    n_tokens = [moment.n_tokens for moment in moments["plain"]]
    writer = PillowWriter(fps=7)
    with writer.saving(figure, path, dpi=100):
        for i, n in enumerate(n_tokens):
            figure.suptitle(f"{n:,} tokens", fontsize=17)
            draw_time(axes["time"], n, n_tokens)
            for name in FOLLOWED:
                moment = moments[name][i]
                left = axes[f"{name} M"]
                draw_memory_of(left, axes[f"{name} z"], moment, orders[name])
                left.set_ylabel(name, fontsize=15, weight="bold")
                draw_bars(axes[name], moment, key)
            writer.grab_frame()
        for _ in range(STILL):
            writer.grab_frame()


def draw_time(axis, n, n_tokens):
    """Draw how much was read, by a log scale."""
    axis.clear()
    axis.axis("off")
    axis.set(xlim=(n_tokens[0], n_tokens[-1]), ylim=(0, 1), xscale="log")
    axis.axhspan(0, 1, color="0.92")
    axis.axvspan(n_tokens[0], n, color="0.45")


# --- The command ----------------------------------------------------------------------

MODULES = ["infini.py", "common.py", "train.py", "passkey.py", "experiments/sharpness.py",
           "experiments/phantom.py", "experiments/lesson.py"]
ASSETS = ["passkey-linear.pt", "passkey-delta.pt", "passkey-plain.pt", "passkey.png",
          "recall.png", "phantom.png", "predict.png"]


def fingerprint(cells):
    """Hash all that the saved outputs depend on: cells, code, models and pictures."""
    hashed = hashlib.sha256()
    for cell in cells:
        if cell.cell_type == "code":
            hashed.update(cell.source.encode() + b"\0")
    for name in MODULES + [f"assets/{name}" for name in ASSETS]:
        hashed.update((ROOT / name).read_bytes())
    for experiment in re.findall(r"print_result\(\"(\w+)\"", "".join(
            cell.source for cell in cells)):
        hashed.update(result_block(experiment).encode())
    return hashed.hexdigest()[:16]


def run_notebook():
    """Run the notebook, save its outputs, and stamp it."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    start = time.perf_counter()
    NotebookClient(notebook, timeout=1800, record_timing=False, coalesce_streams=True,
                   resources={"metadata": {"path": str(ROOT)}}).execute()
    notebook.metadata["stamp"] = fingerprint(notebook.cells)
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.name}: {time.perf_counter() - start:.0f} s, stamped "
          f"{notebook.metadata['stamp']}")


def main():
    parser = common.new_parser("Run the lesson and save its outputs.")
    parser.add_argument("--gif", action="store_true",
                        help="draw assets/million.gif instead, in a few minutes")
    args = parser.parse_args()
    if args.gif:
        common.set_threads(1)
        draw_million(ROOT / "assets/million.gif")
    else:
        (ROOT / "assets/idea.png").write_bytes(as_png(idea_figure()))
        run_notebook()


if __name__ == "__main__":
    # Worker processes find functions by the name of their module, which is not __main__.
    from experiments.lesson import main
    common.run_command(main)
