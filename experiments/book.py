"""Does the memory hold out over a book, and is text from afar of use?

    python -m experiments.book --load out/lm-local-seed?.pt out/lm-delta-seed?.pt

The paper summarises books. Our book is pydoc_data/topics.py, Python's language reference in
one file. Its first half million bytes are read as one document. Models that were trained
without --data have not seen it.
"""

import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F

import common
import train
from common import format_length, mean_and_deviation, print_row, side_by_side

BYTES = 2 ** 19
BASE = 4    # costs are averaged over segments 1, 2-4, 5-16 and so on

# --- Which models ---------------------------------------------------------------------


def look_up(path):
    """Look up the kind, the seed and the segment length of a language model.

    Raises ValueError if it is none, or can't read so far.
    """
    model, settings = train.load_model(path)
    if not {"kind", "seed", "text"} <= set(settings):
        raise ValueError(f"{path} is not a language model of train.py")
    if settings["kind"] == "full":
        raise ValueError(f"{path} is of kind full, which can't read a book")
    return settings["kind"], settings["seed"], model.config.segment_len


def look_up_all(paths):
    """Look up all models. Returns {(kind, seed): path} and their segment length.

    Raises ValueError if they can't be compared.
    """
    found = {}
    lengths = set()
    for path in paths:
        kind, seed, N = look_up(path)
        if (kind, seed) in found:
            raise ValueError(f"{found[kind, seed]} and {path} are both {kind}, seed {seed}")
        found[kind, seed] = path
        lengths.add(N)

    if len(lengths) > 1:
        raise ValueError(f"segments must be of one length, not of {sorted(lengths)} bytes")
    return in_order(found), lengths.pop()


def in_order(found):
    """Sort models by kind and seed. Raises ValueError if one is missing.

    Each seed has its own local model to compare with, and each kind has the same seeds.
    """
    wanted = {"local"} | {kind for kind, _ in found}
    seeds = sorted({seed for _, seed in found})
    models = {}
    for kind in train.KINDS:
        if kind not in wanted:
            continue
        for seed in seeds:
            if (kind, seed) not in found:
                raise ValueError(f"--load needs a {kind} model of seed {seed}, too")
            models[kind, seed] = found[kind, seed]
    return models


# --- Reading --------------------------------------------------------------------------


def read_book(N):
    """Read the book's first BYTES bytes, whole segments of them, and one more byte."""
    path = Path(os.__file__).with_name("pydoc_data") / "topics.py"
    text = path.read_bytes()[:BYTES + 1]
    n = (len(text) - 1) // N * N
    return train.as_tensor(text[:n + 1]).long()


@torch.no_grad()
def stream_costs(model, text, forget=False):
    """Read a document, and compute the bits per byte of each segment.

    text: (S N + 1,) bytes. forget: empty the memory before each segment, to see what it is
    worth. Returns (S,).
    """
    N = model.config.segment_len
    length = N if forget else 16 * N    # of a call
    givens = text[:-1].split(length)
    targets = text[1:].split(length)

    state = None
    costs = []
    for given, target in zip(givens, targets, strict=True):
        if forget:
            state = None
        logits, state = model(given[None], state)                 # (1, length, 256)
        cost = F.cross_entropy(logits[0], target, reduction="none")
        costs.append(cost / math.log(2))
    return torch.cat(costs).unflatten(0, (-1, N)).mean(1)


def read_with(path, text):
    """Read with one model. Returns its costs, (S,), and what they are if it forgets.

    The second is None for a model that has no such memory.
    """
    model, _ = train.load_model(path)
    costs = stream_costs(model, text)
    forgetful = None
    if model.config.attention == "infini":
        forgetful = stream_costs(model, text, forget=True)
    return costs, forgetful


def read_with_all(models, text):
    """Read with all models, side by side. Returns {name: (seeds, S)}.

    A name is a kind, or "linear forgets".
    """
    costs = {}
    jobs = [(path, text) for path in models.values()]
    for (kind, _), found in zip(models, side_by_side(read_with, jobs), strict=True):
        kept, forgetful = found
        costs.setdefault(kind, []).append(kept)
        if forgetful is not None:
            costs.setdefault(f"{kind} forgets", []).append(forgetful)
    return {name: torch.stack(each) for name, each in costs.items()}


# --- What was found -------------------------------------------------------------------


def print_table(costs, N):
    """Print the costs by position, and how much less than local they are in all."""
    ends, _ = common.by_position(costs["local"], BASE)
    print_row("", [format_length(N * end) for end in ends], 16, 9)
    for name, values in costs.items():
        _, means = common.by_position(values.mean(0), BASE)
        print_row(name, [f"{mean:.3f}" for mean in means.tolist()], 16, 9)
        if name != "local":
            gain = (costs["local"] - values).mean(1)              # (seeds,)
            print(f"    less than local: {mean_and_deviation(gain)}")


def save_table(costs, seeds, N, path):
    """Write the costs by position into a CSV file."""
    rows = []
    for name, values in costs.items():
        ends, means = common.by_position(values, BASE)
        for seed, row in zip(seeds, means.tolist(), strict=True):
            for end, mean in zip(ends, row, strict=True):
                rows.append([name, seed, N * end, mean])
    common.write_csv(path, ["kind", "seed", "up_to_byte", "bits_per_byte"], rows)


def find_title(gains):
    """Say whether the memory helps at the end of the book, if all seeds agree.

    gains: {name: (seeds, stretches)}.
    """
    rules = [name for name in ("linear", "delta") if name in gains]
    helps = [(gains[rule][:, -1] > 0).all() for rule in rules]
    if rules and all(helps):
        return "The memory still helps after half a million bytes"
    return "Does the memory hold out over a book?"


def draw(costs, N, path):
    """Draw what each kind saves by position, as a mean over seeds.

    A kind also has a point per seed. It is a dashed line if it forgets.
    """
    figure, axis = common.new_figure(6.4, 4)
    gains = {}
    for name, values in costs.items():
        ends, gains[name] = common.by_position(costs["local"] - values, BASE)
        x = [N * end for end in ends]
        y = gains[name].mean(0).tolist()

        if name in train.KINDS:
            common.draw_line(axis, x, y, name, name)
            common.draw_points(axis, x, gains[name].T, name)
        else:
            kind = name.removesuffix(" forgets")
            common.draw_line(axis, x, y, kind, name, linestyle="--")

    common.set_lengths(axis, x)
    axis.set_xlabel("up to byte")
    axis.set_ylabel("bits per byte less than local (points: seeds)")
    axis.set_title(find_title(gains), fontsize=10)
    common.spread_names(axis)
    common.save_figure(figure, path)


# --- The command ----------------------------------------------------------------------


def main():
    parser = common.new_parser("Read half a million bytes as one document.")
    common.add_files_argument(parser, "models of train.py or experiments.compare, "
                                      "with a local one for each seed")
    common.add_shared_arguments(parser, device=False)
    args = parser.parse_args()
    common.set_threads(args.threads)

    models, N = look_up_all(args.load)
    seeds = sorted({seed for _, seed in models})
    text = read_book(N)
    costs = read_with_all(models, text)

    print(f"{len(text):,} bytes, {len(seeds)} seeds; bits per byte up to byte")
    print_table(costs, N)
    save_table(costs, seeds, N, args.out / "book.csv")
    draw(costs, N, args.out / "book.png")


if __name__ == "__main__":
    # Worker processes find functions by the name of their module, which is not __main__.
    from experiments.book import main
    common.run_command(main)
