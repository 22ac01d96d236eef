"""Where do the gates of a language model end? Our Figure 3.

    python -m experiments.gates

One model trains its gates at a learning rate of their own, another at that of all other
weights. Both begin with the same gates, spread from nearly shut to mostly open.
"""

import common
import train
from common import print_row, side_by_side
from infini import InfiniTransformer
from train import Recipe


def plan_recipes(rule, seed, steps):
    """Plan a training for both rates. Returns {rate: Recipe}."""
    recipes = {}
    for rate in (Recipe.gate_lr, Recipe.lr):
        name = f"{rule}-gates-{rate:g}"
        recipes[rate] = Recipe(rule, seed, steps, gate_lr=rate, name=name)
    return recipes


def print_table(gates):
    """Print a row of gates for each layer. gates: {rate: (n_layers, n_heads)}."""
    for rate, ends in gates.items():
        print(f"\nlearning rate of the gates {rate:g}: sigmoid(beta) at the end")
        for layer, heads in enumerate(ends.tolist(), 1):
            print_row(f"layer {layer}", [f"{gate:.3f}" for gate in heads], 9, 8)


def save_table(gates, path):
    """Write all gates into a CSV file."""
    rows = []
    for rate, ends in gates.items():
        for layer, heads in enumerate(ends.tolist(), 1):
            for head, gate in enumerate(heads, 1):
                rows.append([rate, layer, head, gate])
    common.write_csv(path, ["gate_lr", "layer", "head", "gate"], rows)


def find_title(start, gates):
    """Say whether a rate of their own lets the gates move further."""
    moved = {rate: (ends - start).abs().mean() for rate, ends in gates.items()}
    if moved[Recipe.gate_lr] > moved[Recipe.lr]:
        return "With a rate of their own, gates end further from where they began"
    return "Where do the gates end?"


def draw(start, gates, path):
    """Draw a heat map of the gates at the start, and one at the end for each rate."""
    maps = {"at the start": start}
    for rate, ends in gates.items():
        maps[f"at the end, rate {rate:g}"] = ends

    figure, axes = common.new_figure(9, 2.6, columns=len(maps), sharey=True)
    n_layers, n_heads = start.shape
    heads = range(1, n_heads + 1)
    layers = range(1, n_layers + 1)
    for axis, (name, values) in zip(axes, maps.items(), strict=True):
        image = common.heat_map(axis, values.tolist(), 1, "{:.2f}", heads, layers)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("head")

    axes[0].set_ylabel("layer")
    figure.suptitle(find_title(start, gates), fontsize=10)
    figure.colorbar(image, ax=axes, label="sigmoid(beta), the memory's weight")
    common.save_figure(figure, path)


def main():
    parser = common.new_parser("Show where the gates end: our Figure 3.")
    add = parser.add_argument
    add("--data", type=common.path, help="text file or folder; unset, Python's source")
    add("--rule", choices=["linear", "delta"], default="delta", help="of the memory")
    add("--steps", type=common.count, default=5000, help="of each training")
    add("--seed", type=common.seed, default=0, help="of weights and training text")
    add("--resume", action="store_true", help="go on with trainings that were stopped")
    common.add_shared_arguments(parser)
    args = parser.parse_args()
    common.set_threads(args.threads)

    documents, _ = train.read_documents(args.data, shortest=train.sequence_length() + 1)
    recipes = plan_recipes(args.rule, args.seed, args.steps)
    train.check_files(recipes.values(), documents, args.out, args.resume)
    jobs = []
    for recipe in recipes.values():
        jobs.append((recipe, documents, args.out, args.device, args.resume))

    gates = {}
    for rate, path in zip(recipes, side_by_side(train.train_lm, jobs), strict=True):
        model, _ = train.load_model(path)
        gates[rate] = model.gates()
    start = InfiniTransformer(recipes[Recipe.lr].config()).gates()

    print_table(gates)
    save_table(gates, args.out / "gates.csv")
    draw(start, gates, args.out / "gates.png")


if __name__ == "__main__":
    # Worker processes find functions by the name of their module, which is not __main__.
    from experiments.gates import main
    common.run_command(main)
