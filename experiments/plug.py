"""What does a memory bring that a trained model gets afterwards? Section 4.3.

    python -m experiments.plug

A model without memory is trained. Then copies with a memory are trained for a tenth of the
steps, beside a copy without.
"""

import math
from dataclasses import dataclass

import torch

import common
import train
from common import mean_and_deviation, print_row, side_by_side
from infini import InfiniTransformer, inject_memory
from train import Recipe

KINDS = ["local", "linear", "delta"]    # a model goes on as
PLUG_GATE = -2.0                        # betas of the new memory, a gate of 0.12


@dataclass(frozen=True)
class Measurement:
    """Holds the bits per byte of one copy."""

    before: float      # at the start, on held-out text
    after: float       # and at the end
    losses: list       # of each step between, on training text


# --- Training -------------------------------------------------------------------------


def first_recipe(seed, steps):
    """Say how the model without memory is trained."""
    return Recipe("local", seed, steps)


def next_recipe(kind, seed, steps):
    """Say how a copy goes on, on other text and at half the rate."""
    return Recipe(kind, seed + 1000, max(1, steps // 10), lr=Recipe.lr / 2,
                  name=f"plug-{kind}")


def plug_in(model, kind):
    """Give a model without memory a memory, unless it goes on as it is."""
    if kind == "local":
        return model
    return inject_memory(model, kind, PLUG_GATE)


def check_copies(recipes, first, documents, out, resume):
    """Raise ValueError if the training of a copy would meet a checkpoint in its way."""
    text = train.fingerprint(documents)
    for recipe in recipes:
        model = plug_in(InfiniTransformer(first.config()), recipe.kind)
        train.find_start(recipe.path(out), model.config, recipe.settings(text), resume)


def go_on(path, recipe, documents, pieces, out, device, resume):
    """Train a copy of the model in a checkpoint further, and score it before and after."""
    model, _ = train.load_model(path, device)
    model = plug_in(model, recipe.kind)
    before = train.bits(model, pieces).mean().item()

    path = train.train_lm(recipe, documents, out, device, resume, model)
    model, _ = train.load_model(path, device)
    after = train.bits(model, pieces).mean().item()
    losses = train.read_checkpoint(path)["losses"]
    return Measurement(before, after, [loss / math.log(2) for loss in losses])


def train_all(documents, pieces, args):
    """Train what the command line asks for, seeds side by side.

    Returns {(kind, seed): Measurement}.
    """
    seeds = range(args.seeds)
    first = {seed: first_recipe(seed, args.steps) for seed in seeds}
    copies = {}
    for kind in KINDS:
        for seed in seeds:
            copies[kind, seed] = next_recipe(kind, seed, args.steps)

    # Each file is looked at before the first step.
    train.check_files(first.values(), documents, args.out, args.resume)
    check_copies(copies.values(), first[0], documents, args.out, args.resume)

    where = (args.out, args.device, args.resume)
    jobs = [(recipe, documents, *where) for recipe in first.values()]
    starts = dict(zip(seeds, side_by_side(train.train_lm, jobs), strict=True))

    jobs = []
    for (_, seed), recipe in copies.items():
        jobs.append((starts[seed], recipe, documents, pieces, *where))
    return dict(zip(copies, side_by_side(go_on, jobs), strict=True))


# --- What was found -------------------------------------------------------------------


def print_table(measured, seeds, steps):
    """Print a row for each kind. measured: {(kind, seed): Measurement}."""
    header = ["at the start", f"{steps} steps on", "less than local"]
    print_row("goes on as", header, 12, 18)
    local = torch.tensor([measured["local", seed].after for seed in seeds])
    for kind in KINDS:
        before = torch.tensor([measured[kind, seed].before for seed in seeds])
        after = torch.tensor([measured[kind, seed].after for seed in seeds])
        cells = [mean_and_deviation(x) for x in (before, after, local - after)]
        print_row(kind, cells, 12, 18)


def save_table(measured, path):
    """Write the training losses of all steps into a CSV file."""
    rows = []
    for (kind, seed), copy in measured.items():
        for step, loss in enumerate(copy.losses, 1):
            rows.append([kind, seed, copy.before, copy.after, step, loss])
    header = ["kind", "seed", "before", "after", "step", "training_bits_per_byte"]
    common.write_csv(path, header, rows)


def gains_by_step(measured, kind, seeds):
    """Compute how much less than local each step's text costs. Returns (seeds, steps)."""
    local = torch.tensor([measured["local", seed].losses for seed in seeds])
    losses = torch.tensor([measured[kind, seed].losses for seed in seeds])
    return local - losses


def stretch_means(values, most=20):
    """Average (seeds, steps) over at most so many stretches of equally many steps.

    Returns the last step of each stretch, and (seeds, stretches).
    """
    ends = []
    means = []
    end = 0
    for stretch in values.split(math.ceil(values.shape[1] / most), dim=1):
        end += stretch.shape[1]
        ends.append(end)
        means.append(stretch.mean(1))
    return ends, torch.stack(means, dim=1)


def find_title(measured, seeds):
    """Say whether both rules cost less than local in the end, if all seeds agree."""
    for rule in ("linear", "delta"):
        for seed in seeds:
            if measured[rule, seed].after >= measured["local", seed].after:
                return "What does a memory bring that is plugged in?"
    steps = len(measured["local", 0].losses)
    return f"A memory that is plugged in helps after {steps} steps"


def draw(measured, seeds, path):
    """Draw what each kind saves on the way, as a mean over seeds and a point per seed."""
    figure, axis = common.new_figure(6.4, 4)
    for kind in KINDS:
        ends, values = stretch_means(gains_by_step(measured, kind, seeds))
        common.draw_line(axis, ends, values.mean(0).tolist(), kind, kind)
        common.draw_points(axis, ends, values.T, kind)

    axis.set_xlabel("step after the memory was plugged in")
    axis.set_ylabel("training bits per byte less than local (points: seeds)")
    axis.set_title(find_title(measured, seeds), fontsize=10)
    common.spread_names(axis)
    common.save_figure(figure, path)


# --- The command ----------------------------------------------------------------------


def main():
    parser = common.new_parser("Give a trained model a memory, and train a little further.")
    add = parser.add_argument
    add("--data", type=common.path, help="text file or folder; unset, Python's source")
    add("--steps", type=common.count, default=5000, help="without memory; then a tenth")
    add("--seeds", type=common.count, default=3, help="models of each kind")
    add("--resume", action="store_true", help="go on with trainings that were stopped")
    common.add_shared_arguments(parser)
    args = parser.parse_args()
    common.set_threads(args.threads)

    length = train.sequence_length()
    documents, held_out = train.read_documents(args.data, shortest=length + 1)
    pieces = train.validation_pieces(held_out, length + 1)

    measured = train_all(documents, pieces, args)
    seeds = range(args.seeds)
    steps = next_recipe("local", 0, args.steps).steps
    print(f"\nbits per byte on {len(pieces)} held-out pieces of {length:,} bytes, "
          f"{args.seeds} seeds, mean +- standard deviation")
    print_table(measured, seeds, steps)
    save_table(measured, args.out / "plug.csv")
    draw(measured, seeds, args.out / "plug.png")


if __name__ == "__main__":
    # Worker processes find functions by the name of their module, which is not __main__.
    from experiments.plug import main
    common.run_command(main)
