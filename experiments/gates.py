"""Where do the gates end, and how do they get there? Our Figure 3.

    python -m experiments.gates

One model trains its gates at a learning rate of their own, another at that of everything else."""
if not __package__:
    raise SystemExit("run it from the project's folder: python -m experiments.gates")

import csv
import math
from pathlib import Path

import train
from passkey import heat_map, new_figure
from train import Parser, run_command, set_up, side_by_side, whole

STYLES = [("C1", "--"), ("C0", "-"), ("C2", ":"), ("C3", "-.")]    # of layers 1, 2, 3, 4

def train_gates(documents, rule, gate_lr, seed, steps, out, device, resume):
    """Train one model, maybe in a process of its own. Returns its checkpoint's path."""
    settings = {**train.LM, "gate_lr": gate_lr, "name": f"{rule}-gates-{gate_lr:g}"}
    return train.train_lm(rule, seed, documents, out, steps, device=device, resume=resume,
                          **settings)[1]

def draw(results, path):
    """Draw where the gates end, and below it how they got there, a column per learning rate.
    results: {rate: ({step: (n_layers, n_heads) gates}, the last gates)}."""
    figure = new_figure(figsize=(9, 6))
    axes = figure.subplots(2, len(results), squeeze=False)
    for (ends, ways), (rate, (history, last)) in zip(axes.T, results.items()):
        n_layers, n_heads = last.shape
        image = heat_map(ends, last.tolist(), 1, "{:.2f}", range(1, n_heads + 1),
                         range(1, n_layers + 1))
        ends.set(title=f"learning rate of the gates {rate:g}", xlabel="head", ylabel="layer")
        for layer in range(n_layers):
            colour, line = STYLES[layer % len(STYLES)]
            for head in range(n_heads):
                values = [gates[layer, head].item() for gates in history.values()]
                ways.plot(list(history), values, color=colour, linestyle=line,
                          label=f"layer {layer + 1}" if head == 0 else None)
                ways.annotate(f" {head + 1}", (max(history), values[-1]), color=colour, va="center")
        ways.set(xlabel="step (the number at the end of a line is its head)",
                 ylabel="sigmoid(beta)", ylim=(0, 1))
        ways.legend()
    figure.colorbar(image, ax=axes[0], label="sigmoid(beta)")
    figure.savefig(path, dpi=150)

def main():
    parser = Parser("Show where the gates end and how they get there: our Figure 3.")
    add = parser.add_argument
    add("--data", type=Path, help="text file or folder; without it Python's own source")
    add("--rule", choices=["linear", "delta"], default="delta", help="rule of the memory")
    add("--steps", type=whole(1), default=5000, help="steps of each training")
    add("--seed", type=whole(0), default=0, help="of weights and training text")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for all files")
    add("--resume", action="store_true", help="go on with trainings that were stopped")
    add("--device", default="cpu", help="or cuda, or mps")
    add("--threads", type=whole(1, 1024), help="cores to use; without it PyTorch decides")
    args = parser.parse_args()
    set_up(args.device, args.threads, args.out, ["gates.csv", "gates.png"], [args.data])
    rates = train.LM["gate_lr"], train.LM["lr"]
    length = train.LM["segments"] * train.LM["segment_len"]
    documents, _ = train.read_documents(args.data, args.out, length + 1)
    paths = [*side_by_side(train_gates, [
        (documents, args.rule, rate, args.seed, args.steps, args.out, args.device, args.resume)
        for rate in rates])]
    results, every = {}, math.ceil(args.steps / 100)    # train() notes the gates so often
    with open(args.out / "gates.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["gate_lr", "step", "layer", "head", "gate"])
        for rate, path in zip(rates, paths):
            history = {every * (i + 1): gates
                       for i, gates in enumerate(train.read_checkpoint(path)["gates"])}
            results[rate] = history, train.load_model(path)[0].gates()
            print(f"\nlearning rate of the gates {rate:g}: sigmoid(beta) at the end")
            for layer, heads in enumerate(results[rate][1].tolist(), 1):
                print(f"layer {layer}  " + "".join(f"{gate:8.3f}" for gate in heads), flush=True)
            rows.writerows([rate, step, layer + 1, head + 1, gate]
                           for step, gates in history.items()
                           for layer, heads in enumerate(gates.tolist())
                           for head, gate in enumerate(heads))
    draw(results, args.out / "gates.png")

if __name__ == "__main__":
    run_command(main)
