"""What the experiments share: curves with the table of their points, and a mean over seeds.
This file is not a command."""
if not __package__:
    raise SystemExit("it is not a command; see the other files of this folder")

import csv
from pathlib import Path

from passkey import new_figure, short

def plain(x):
    """Write a number as 0.5, 32 or 32K, and never as a power."""
    return short(int(x)) if x == int(x) else f"{x:g}"

def draw_lines(curves, path, xlabel, ylabel, xscale="log", yscale="linear"):
    """Draw curves into a PNG file, and write their points into a CSV file beside it.
    curves: {name: (x, y)}, two sequences of equally many numbers. A logarithmic x-axis has a tick
    at each point. Raises OSError if a file can't be written."""
    figure = new_figure(figsize=(6.4, 4))
    axis = figure.subplots()
    for i, (name, (x, y)) in enumerate(curves.items()):
        axis.plot(x, y, marker="os^Dv*PX"[i % 8], markersize=4, label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel, xscale=xscale, yscale=yscale)
    if yscale == "linear":
        axis.ticklabel_format(axis="y", useOffset=False)
    if xscale == "log":
        points = sorted({float(x) for xs, _ in curves.values() for x in xs})
        axis.set_xticks(points, [plain(x) for x in points])
        axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure.savefig(path, dpi=150)
    with open(Path(path).with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["curve", xlabel, ylabel])
        for name, points in curves.items():
            rows.writerows([name, float(x), float(y)] for x, y in zip(*points))

def by_position(cost, base=2):
    """Average the costs of segments 1, 2, 3-4, 5-8, ... of (S,), here with base 2. Returns the ends
    and the means."""
    ends = sorted({base ** i for i in range(32) if base ** i < len(cost)} | {len(cost)})
    return ends, [cost[first:end].mean().item() for first, end in zip([0, *ends], ends)]

def mean_and_deviation(values):
    """Write the mean of a tensor (seeds,) and its standard deviation, if there are several."""
    return f"{values.mean():.4f}" + (f" +- {values.std():.4f}" if len(values) > 1 else "")
