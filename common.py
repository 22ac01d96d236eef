"""What every command needs, and no reader of the paper.

Arguments, one-line errors, progress, processes side by side, tables and pictures.
"""

import argparse
import csv
import math
import multiprocessing
import os
import pickle
import signal
import sys
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import torch

# --- Arguments ------------------------------------------------------------------------


def new_parser(description):
    """Make a parser that shows defaults and does not guess abbreviations."""
    return argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def add_files_argument(parser, help, required=True):
    """Add --load FILE ..., which may be given several times."""
    parser.add_argument("--load", type=path, nargs="+", action="extend", metavar="FILE",
                        required=required, help=help)


def add_shared_arguments(parser, device=True):
    """Add where files go and what computes."""
    parser.add_argument("--out", type=folder, default="out", help="folder for all files")
    if device:
        parser.add_argument("--device", type=usable_device, default="cpu",
                            help="or cuda, or mps")
    parser.add_argument("--threads", type=count, help="cores; unset, PyTorch decides")


def count(text):
    """Read a whole number of at least 1, as an argument's type."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def seed(text):
    """Read a whole number of at least 0, as an argument's type."""
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def share(text):
    """Read a number from 0 to 1, as an argument's type."""
    number = float(text)
    if not 0 <= number <= 1:    # this also refuses nan
        raise ValueError
    return number


def percent(text):
    """Read a number from 0 to 100 as a share, as an argument's type."""
    return share(float(text) / 100)


def path(text):
    """Read a path, as an argument's type.

    An empty one is refused. It comes from a shell's variable that is not set.
    """
    if not text:
        raise ValueError
    return Path(text)


def folder(text):
    """Read the path of a folder and make it, as an argument's type."""
    made = path(text)
    try:
        made.mkdir(parents=True, exist_ok=True)
    except OSError:
        raise ValueError from None
    return made


def usable_device(text):
    """Read the name of a device that this machine has, as an argument's type."""
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError from None
    return text


def length(text):
    """Read 32K as 32,768, as an argument's type."""
    unit = {"K": 2 ** 10, "M": 2 ** 20}.get(text[-1:].upper(), 1)
    digits = text if unit == 1 else text[:-1]
    return unit * count(digits)


def listed(parse):
    """Make an argument's type for values with commas between them."""
    def parse_all(text):
        return sorted({parse(part) for part in text.split(",")})

    parse_all.__name__ = f"list of {parse.__name__}"    # argparse names it in its message
    return parse_all


# --- Running a command ----------------------------------------------------------------


def run_command(main):
    """Run a command. A user's mistake is one line on standard error and exit code 2."""
    keep_freed_memory()
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; checkpoints are as last saved", file=sys.stderr)
        sys.exit(130)
    except BrokenExecutor:
        print("error: a process died, perhaps for want of memory", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def keep_freed_memory():
    """Make the C library keep freed blocks instead of giving them back to the system.

    glibc raises its threshold to the largest block that was ever freed. Streaming is a
    fifth faster then, since pages need not be made anew for each call.
    """
    torch.empty(8_000_000)    # 32 MB, just below the largest threshold that glibc allows


def set_threads(n):
    """Use n cores. None leaves it to PyTorch."""
    if n is not None:
        torch.set_num_threads(n)


# --- Progress -------------------------------------------------------------------------


class Progress:
    """Prints what is done, the speed and the time left, every few seconds."""

    def __init__(self, name, total, done=0, every=5.0):
        self.name = name
        self.total = total
        self.first = done
        self.every = every
        self.n_tokens = 0
        self.start = time.perf_counter()
        self.last = -every

    def show(self, done, n_tokens, **numbers):
        """Note that so much is done and that n_tokens more were read. Maybe print it."""
        self.n_tokens += n_tokens
        seconds = time.perf_counter() - self.start
        if seconds - self.last < self.every and done < self.total:
            return
        self.last = seconds

        left = seconds / (done - self.first) * (self.total - done)
        values = [f"{name} {value:.4f}" for name, value in numbers.items()]
        speed = f"{self.n_tokens / seconds:,.0f} tokens/s"
        steps = f"{self.name}: {done:,}/{self.total:,}"
        line = "  ".join([steps, *values, speed, f"{left:.0f} s left"])
        print(line, file=sys.stderr, flush=True)


# --- Processes ------------------------------------------------------------------------


def begin_worker():
    """Let a worker use one core, and end on Ctrl-C without a traceback."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    keep_freed_memory()


class Copy:
    """Carries a job into another process.

    On its own PyTorch would send each tensor as an open file, and a system allows too few
    of them for all texts of a language model.
    """

    def __init__(self, job):
        self.job = job

    def __reduce__(self):
        return pickle.loads, (pickle.dumps(self.job),)    # which makes the job itself


def call(function, job):
    return function(*job)


def side_by_side(function, jobs):
    """Call function(*job) for each job, in as many processes as PyTorch has threads.

    Independent models are trained fastest with one core each. Yields the results in the
    order of the jobs. Function and results must be importable: a script of your own calls
    this below `if __name__ == "__main__":`.
    """
    n_workers = min(len(jobs), torch.get_num_threads())
    if n_workers < 2:
        for job in jobs:
            yield function(*job)
        return

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_workers, context, begin_worker) as pool:
        results = pool.map(call, repeat(function), [Copy(job) for job in jobs])
        pool.submit(os.getpid)    # without one job more, the last worker may die unseen
        yield from results


# --- Tables ---------------------------------------------------------------------------


def print_row(name, cells, name_width=24, width=12):
    """Print a row of a table: a name on the left, and cells on the right."""
    row = name.ljust(name_width) + "".join(str(cell).rjust(width) for cell in cells)
    print(row, flush=True)


def write_csv(path, header, rows):
    """Write a table into a file. An old file stays whole until the new one is."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    os.replace(beside, path)


def format_length(n):
    """Write 32768 as 32K."""
    if n % 2 ** 20 == 0:
        return f"{n >> 20}M"
    if n % 2 ** 10 == 0:
        return f"{n >> 10}K"
    return f"{n:,}"


def mean_and_deviation(values):
    """Write the mean over seeds and the standard deviation, if there are several."""
    values = torch.as_tensor(values)
    if len(values) == 1:
        return f"{values.mean():.4f}"
    return f"{values.mean():.4f} +- {values.std():.4f}"


def by_position(costs, base=2):
    """Average the costs of segments 1, 2, 3-4, 5-8 and so on, here with base 2.

    costs: (..., S). Returns the last segment of each stretch, and (..., stretches).
    """
    S = costs.shape[-1]
    ends = []
    end = 1
    while end < S:
        ends.append(end)
        end *= base
    ends.append(S)

    means = []
    start = 0
    for end in ends:
        means.append(costs[..., start:end].mean(-1))
        start = end
    return ends, torch.stack(means, dim=-1)


# --- Pictures: one house style --------------------------------------------------------

# A colour and a marker mean the same thing in every picture.
COLOUR = {"linear": "C2", "delta": "C3", "local": "0.5", "xl": "C5", "full": "C4"}
MARKER = {"linear": "o", "delta": "^", "local": "P", "xl": "s", "full": "v"}


def new_figure(width, height, rows=1, columns=1, **options):
    """Make a figure that needs no display, in inches. Returns it and its axes."""
    from matplotlib.figure import Figure  # training does without

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, **options)
    return figure, axes


def save_figure(figure, path):
    """Save a figure as a PNG file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_line(axis, x, y, kind, label, shade=1.0, **style):
    """Draw a line in its kind's colour and marker, and name it where it ends.

    shade: from 0 (white) to 1 (the full colour), for a size of the same kind.
    """
    options = dict(color=COLOUR[kind], alpha=shade, marker=MARKER[kind], markersize=4)
    axis.plot(x, y, **{**options, **style})
    axis.spines[["top", "right"]].set_visible(False)    # names may stand there
    axis.annotate(label, (x[-1], y[-1]), xytext=(5, 0), textcoords="offset points",
                  color=COLOUR[kind], alpha=shade, va="center", fontsize=8)


def draw_points(axis, x, y, kind, size=3):
    """Draw points in the colour and marker of a kind, as one per seed.

    x: (n,), y: (n,) or (n, seeds).
    """
    axis.plot(x, y, MARKER[kind], color=COLOUR[kind], alpha=0.5, markersize=size)


def spread_names(axis, least=9.0):
    """Move the names of lines that end at one x apart, by at least so many points.

    Call it last, when nothing changes the axis's limits any more.
    """
    axis.figure.draw_without_rendering()    # only now is it known where a name stands
    points = 72 / axis.figure.dpi           # per pixel
    highest = {}                            # x -> of the names so far
    for name in sorted(axis.texts, key=lambda text: text.xy[1]):
        x, y = name.xy
        height = axis.transData.transform((x, y))[1] * points
        place = max(height, highest.get(x, -math.inf) + least)
        name.xyann = (5, place - height)
        highest[x] = place


def set_lengths(axis, lengths):
    """Give a logarithmic x-axis a tick at each length."""
    axis.set_xscale("log")
    axis.set_xticks(lengths, [format_length(n) for n in lengths])
    axis.set_xticks([], minor=True)


def heat_map(axis, grid, high, form, x, y):
    """Draw a grid of numbers from 0 to `high` as colours and text. Returns the image.

    form: of a number, as "{:.0f}". x, y: the names of columns and rows.
    """
    image = axis.imshow(grid, cmap="cividis", vmin=0, vmax=high, aspect="auto")
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            dark = value <= 0.6 * high
            axis.text(column, row, form.format(value), ha="center", va="center", fontsize=7,
                      color="white" if dark else "black")

    axis.set_xticks(range(len(x)), x)
    axis.set_yticks(range(len(y)), y)
    return image
