"""What is the memory worth to a language model? Our Table 2.

    python -m experiments.compare

Five kinds of attention learn the same text, all else equal. The table scores them on text
that they have not seen, in pieces as long as a training sequence. The picture goes on to
four times this length.
"""

from dataclasses import dataclass

import torch

import common
import train
from common import mean_and_deviation, side_by_side
from infini import stream
from train import KINDS, Recipe

TIMES = 4    # a piece is so many times as long as a training sequence


@dataclass(frozen=True)
class Measurement:
    """Holds what one model costs, and how much it keeps of a training sequence."""

    costs: torch.Tensor        # (S,) bits per byte of each segment
    forgetful: torch.Tensor    # the same if it forgets, or None if it has no such memory
    kept: int                  # numbers in its state
    formula: int               # and by Table 1

    def cost(self):
        """Return the bits per byte of a training sequence."""
        return self.costs[:train.SEGMENTS].mean().item()


# --- Measuring ------------------------------------------------------------------------


def context_memory(config, length):
    """Compute how many numbers a model keeps of `length` tokens, by the paper's Table 1.

    The tokens are whole segments.
    """
    key, value = config.d_key, config.d_value
    per_head = {
        "infini": key * (value + 1),
        "xl": (key + value) * min(length, config.segment_len),
        "full": (key + value) * length,
        "local": 0,
    }
    return config.n_layers * config.n_heads * per_head[config.attention]


def numbers_in(state):
    """Count the numbers that a state really holds."""
    n = 0
    for memory, k, v in state:
        for part in [*(memory or ()), k, v]:    # a baseline's memory may be empty
            n += part.numel()
    return n


def bits_by_segment(model, pieces, forget=False):
    """Compute the bits per byte of each segment, as means over pieces: (n, S N + 1) bytes.

    Returns (S,).
    """
    costs = train.bits(model, pieces, forget)                     # (n, S N)
    return costs.unflatten(1, (-1, model.config.segment_len)).mean((0, 2))


def measure(path, pieces, device):
    """Score the model in a checkpoint on pieces: (n, TIMES * length + 1) bytes."""
    model, _ = train.load_model(path, device)
    config = model.config
    length = train.sequence_length()
    trained = pieces[:, :length + 1]    # as long as in training

    # Full attention knows no positions beyond those that it was trained on.
    costs = bits_by_segment(model, trained if config.attention == "full" else pieces)
    forgetful = None
    if config.attention == "infini":
        forgetful = bits_by_segment(model, trained, forget=True)

    _, state = stream(model, trained[:1, :-1].to(device))
    return Measurement(costs, forgetful, numbers_in(state), context_memory(config, length))


# --- The table ------------------------------------------------------------------------

ROW = "{:8}{:>18}{:>18}{:>12}{:>18}{:>14}{:>10}"


def print_table(measured, seeds):
    """Print a row for each kind. measured: {(kind, seed): Measurement}."""
    print(ROW.format("kind", "bits per byte", "less than local", "perplexity", "forgetful",
                     "numbers kept", "Table 1"))
    local = torch.tensor([measured["local", seed].cost() for seed in seeds])
    for kind in KINDS:
        models = [measured[kind, seed] for seed in seeds]
        cost = torch.tensor([model.cost() for model in models])
        forgetful = ""
        if models[0].forgetful is not None:
            forgetful = mean_and_deviation([m.forgetful.mean().item() for m in models])

        print(ROW.format(
            kind,
            mean_and_deviation(cost),
            mean_and_deviation(local - cost),
            f"{2 ** cost.mean():.3f}",
            forgetful,
            f"{models[0].kept:,}",
            f"{models[0].formula:,}",
        ))


def save_table(measured, path):
    """Write the costs of all segments into a CSV file."""
    rows = []
    for (kind, seed), model in measured.items():
        for segment, cost in enumerate(model.costs.tolist(), 1):
            rows.append([kind, seed, model.kept, "no", segment, cost])
        if model.forgetful is not None:
            for segment, cost in enumerate(model.forgetful.tolist(), 1):
                rows.append([kind, seed, model.kept, "yes", segment, cost])

    header = ["kind", "seed", "numbers_kept", "forgets", "segment", "bits_per_byte"]
    common.write_csv(path, header, rows)


# --- Pictures -------------------------------------------------------------------------


def gains_by_segment(measured, kind, seeds):
    """Compute how many bits per byte less than local a kind costs. Returns (seeds, S)."""
    differences = []
    for seed in seeds:
        costs = measured[kind, seed].costs
        local = measured["local", seed].costs[:len(costs)]
        differences.append(local - costs)
    return torch.stack(differences)


def context_title(measured, seeds):
    """Say whether both rules help beyond the length of training, if all seeds agree."""
    for rule in ("linear", "delta"):
        beyond = gains_by_segment(measured, rule, seeds)[:, train.SEGMENTS:].mean(1)
        if not (beyond > 0).all():
            return "What does it save to know what came before?"
    return "The memory still helps beyond the length of training"


def draw_context(measured, seeds, path):
    """Draw what each kind saves by position, as a mean over seeds and a point per seed."""
    figure, axis = common.new_figure(6.4, 4)
    N = train.SIZES["segment_len"]
    lengths = set()
    for kind in KINDS:
        ends, values = common.by_position(gains_by_segment(measured, kind, seeds))
        x = [N * end for end in ends]
        lengths.update(x)
        common.draw_line(axis, x, values.mean(0).tolist(), kind, kind)
        common.draw_points(axis, x, values.T, kind)

    common.set_lengths(axis, sorted(lengths))
    axis.axvline(train.sequence_length(), color="0.8", linestyle=":", zorder=0)
    axis.set_xlabel("up to byte (dotted: the length of training)")
    axis.set_ylabel("bits per byte less than local (points: seeds)")
    axis.set_title(context_title(measured, seeds), fontsize=10)
    common.spread_names(axis)
    common.save_figure(figure, path)


def memory_title(measured, seeds):
    """Say whether both rules cost less than Transformer-XL, if all seeds agree."""
    for rule in ("linear", "delta"):
        for seed in seeds:
            if measured[rule, seed].cost() >= measured["xl", seed].cost():
                return "Does it help to keep more numbers?"
    times = measured["xl", 0].kept / measured["delta", 0].kept
    return f"The memory beats Transformer-XL, which keeps {times:.1f} times as much"


def draw_memory(measured, seeds, path):
    """Draw costs against the numbers kept, as a dash for the mean and a point per seed."""
    figure, axis = common.new_figure(6.4, 4)
    numbers = set()
    for kind in KINDS:
        models = [measured[kind, seed] for seed in seeds]
        costs = [model.cost() for model in models]
        kept = models[0].kept
        numbers.add(kept)

        mean = sum(costs) / len(costs)
        common.draw_line(axis, [kept], [mean], kind, kind, marker="_", markersize=9)
        common.draw_points(axis, [kept] * len(costs), costs, kind, size=6)

    axis.set_xscale("symlog", linthresh=1000)    # local keeps 0
    axis.set_xticks(sorted(numbers), [f"{n:,}" for n in sorted(numbers)])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("numbers kept of a training sequence")
    axis.set_ylabel("bits per byte (points: seeds)")
    axis.set_title(memory_title(measured, seeds), fontsize=10)
    common.spread_names(axis)
    common.save_figure(figure, path)


# --- The command ----------------------------------------------------------------------


def main():
    parser = common.new_parser("Compare five kinds of attention on the same text.")
    add = parser.add_argument
    add("--data", type=common.path, help="text file or folder; unset, Python's source")
    add("--steps", type=common.count, default=5000, help="of each training")
    add("--seeds", type=common.count, default=3, help="models of each kind")
    add("--resume", action="store_true", help="go on with trainings that were stopped")
    common.add_shared_arguments(parser)
    args = parser.parse_args()
    common.set_threads(args.threads)

    length = train.sequence_length()
    documents, held_out = train.read_documents(args.data, shortest=length + 1)
    pieces = train.validation_pieces(held_out, TIMES * length + 1)

    seeds = range(args.seeds)
    recipes = [Recipe(kind, seed, args.steps) for kind in KINDS for seed in seeds]
    train.check_files(recipes, documents, args.out, args.resume)
    jobs = [(recipe, documents, args.out, args.device, args.resume) for recipe in recipes]
    paths = list(side_by_side(train.train_lm, jobs))

    jobs = [(path, pieces, args.device) for path in paths]
    measured = {}
    for recipe, found in zip(recipes, side_by_side(measure, jobs), strict=True):
        measured[recipe.kind, recipe.seed] = found

    print(f"\n{len(pieces)} held-out pieces of {length:,} bytes, {args.seeds} seeds, "
          f"mean +- standard deviation")
    print_table(measured, seeds)
    save_table(measured, args.out / "compare.csv")
    draw_context(measured, seeds, args.out / "context.png")
    draw_memory(measured, seeds, args.out / "memory.png")


if __name__ == "__main__":
    # Worker processes find functions by the name of their module, which is not __main__.
    from experiments.compare import main
    common.run_command(main)
