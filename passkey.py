"""The paper's own task (section 4.3, appendix B): find a pass key hidden in a long irrelevant text.

    python passkey.py                   train both rules, then look for keys at several depths of several lengths
    python passkey.py --rule linear     one rule only

The prompt is the paper's, word for word. A token is a word, a punctuation mark or a single digit: the prompt needs 53.
Training sees inputs of at most --train-length tokens; no key of the evaluation occurs in it.
"""
import csv
import math
import random
import re
import time
from pathlib import Path

import matplotlib
import torch

from infini import InfiniConfig, InfiniTransformer, State, generate, stream
from train import Parser, add_common_arguments, load_model, prepare, run, several, train, whole

INTRO = ("There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
         "I will quiz you about the important information there.")
HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "The pass key is {0}. Remember it. {0} is the pass key."
QUESTION = "What is the pass key? The pass key is"
PLACES = {0.0: "start", 0.5: "middle", 1.0: "end"}


# --- Text ----------------------------------------------------------------------------------------------------------

def words(text):
    return re.findall(r"\d|\w+|[^\w\s]", text)


VOCABULARY = sorted(set(words("0123456789" + INTRO + HAY + NEEDLE + QUESTION)) - {"{", "}"})
TOKEN = {word: i for i, word in enumerate(VOCABULARY)}


def encode(text):
    """Text -> (T,) token ids. Raises ValueError on a word that the prompt does not have."""
    unknown = [word for word in words(text) if word not in TOKEN]
    if unknown:
        raise ValueError(f"word was {unknown[0]!r}, must be one of the {len(TOKEN)} of the prompt")
    return torch.tensor([TOKEN[word] for word in words(text)])


def decode(tokens):
    """(T,) token ids -> text."""
    return re.sub(r" ([.?])", r"\1", " ".join(VOCABULARY[t] for t in tokens))


def is_held_out(key):
    """Every tenth key is kept for the evaluation: which, is decided by its digits, whatever the seed."""
    return int(key) * 2_654_435_761 % 2 ** 32 % 1000 < 100


def draw_keys(rng, n, digits, held_out):
    keys = []
    while len(keys) < n:
        key = "".join(rng.choice("0123456789") for _ in range(digits))
        if is_held_out(key) == held_out:
            keys.append(key)
    return keys


def repeats(n_tokens, digits=4):
    """How many times the hay is in an input of at least n_tokens tokens (the answer included)."""
    rest = n_tokens - sum(len(words(part)) for part in (INTRO, NEEDLE.format("0" * digits), QUESTION)) - digits
    return max(0, math.ceil(rest / len(words(HAY))))


def write_inputs(keys, before, total):
    """Whole inputs, answers included: (B, T). before: how many of the `total` repeats of the hay precede each needle."""
    return torch.stack([torch.cat([encode(INTRO), encode(HAY).repeat(x), encode(NEEDLE.format(key)),
                                   encode(HAY).repeat(total - x), encode(QUESTION), encode(key)])
                        for key, x in zip(keys, before)])


# --- Training ------------------------------------------------------------------------------------------------------

def model_config(rule):
    """2 layers of 4 heads, 139,000 parameters. N = 32: what a segment can't see begins 32 tokens back."""
    return InfiniConfig(vocab_size=len(VOCABULARY), d_model=64, n_layers=2, n_heads=4, d_key=32, d_value=32, d_ff=256,
                        segment_len=32, update=rule, rope_base=50.0)


def training_batches(seed, steps, longest, digits, tokens_per_step=4096):
    """step -> (tokens, targets): inputs of random keys, depths and lengths. Only the digits of the answer are targets.

    Short inputs first, then longer ones mixed in: from the start, 1,024 tokens teach nothing.
    """
    shortest = 96

    def batch(step):
        rng = random.Random(f"{seed}/{step}")
        grown = min(1, max(0, step / steps - 0.3) / 0.5)
        longest_now = shortest * (longest / shortest) ** grown
        total = repeats(int(shortest * (longest_now / shortest) ** rng.random()), digits)
        n = max(1, tokens_per_step // (shortest + len(words(HAY)) * total))
        keys = draw_keys(rng, n, digits, held_out=False)
        inputs = write_inputs(keys, [rng.randint(0, total) for _ in keys], total)
        tokens, targets = inputs[:, :-1], inputs[:, 1:].clone()
        targets[:, :-digits] = -100
        return tokens, targets
    return batch


# --- Evaluation ----------------------------------------------------------------------------------------------------

def read_hay(model, state, n, batch=1, at_once=80):
    """Stream n repeats of the hay through the state: no more than `at_once` of them are ever in memory."""
    hay = encode(HAY).to(next(model.parameters()).device)
    for first in range(0, n, at_once):
        _, state = stream(model, hay.repeat(min(at_once, n - first)).expand(batch, -1), state)
    return state


def copies(state, batch):
    """The state of one document as that of `batch` documents that all began alike: a state is a value."""
    if torch.is_tensor(state):
        return state.expand(batch, *state.shape[1:])
    parts = [None if part is None else copies(part, batch) for part in state]
    return type(state)(*parts) if isinstance(state, tuple) else parts


def answer(model, keys, before, after):
    """Ask for keys hidden behind `before` and in front of `after` repeats of the hay. Returns the digits: (B, digits).

    Nothing is told: the model writes all digits itself. What precedes the needle is the same for all, and read once.
    """
    device = next(model.parameters()).device
    _, state = stream(model, encode(INTRO)[None].to(device))
    state = copies(read_hay(model, state, before), len(keys))
    _, state = stream(model, torch.stack([encode(NEEDLE.format(key)) for key in keys]).to(device), state)
    state = read_hay(model, state, after, len(keys))
    question = encode(QUESTION).expand(len(keys), -1).to(device)
    digits = len(keys[0])
    return generate(model, question, digits, temperature=0, state=state)[:, -digits:]


def evaluate(model, n_tokens, depth, keys):
    """Share of right digits and share of right keys, for inputs of at least n_tokens tokens."""
    total = repeats(n_tokens, len(keys[0]))
    before = round(depth * total)
    right = answer(model, keys, before, total - before).cpu() == torch.stack([encode(key) for key in keys])
    return right.float().mean().item(), right.all(1).float().mean().item()


def evaluate_all(model, lengths, depths, keys):
    """Rows (length, depth, token accuracy, key accuracy), with a line of the table printed as soon as it is known."""
    rows = []
    print(f"{'tokens':>9}  " + "  ".join(f"{PLACES.get(d, f'{d:.0%}'):>12}" for d in depths) + "   seconds")
    for n_tokens in lengths:
        start, cells = time.monotonic(), []
        for depth in depths:
            rows.append((n_tokens, depth, *evaluate(model, n_tokens, depth, keys)))
            cells.append(f"{rows[-1][2]:7.1%} {f'({rows[-1][3]:.0%})':>6}"[-14:])
        print(f"{n_tokens:9,}  " + "  ".join(f"{c:>12}" for c in cells) + f"  {time.monotonic() - start:8.1f}", flush=True)
    return rows


def draw_heat_map(results, path):
    """Depth by length, one panel per rule. results: {rule: rows of evaluate_all}."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(results), figsize=(1 + 4.2 * len(results), 3.4), squeeze=False, sharey=True,
                                layout="constrained")
    for axis, (rule, rows) in zip(axes[0], results.items()):
        lengths, depths = (sorted({row[i] for row in rows}) for i in (0, 1))
        grid = [[next(row[2] for row in rows if row[:2] == (n, d)) for n in lengths] for d in depths]
        image = axis.imshow([[100 * value for value in line] for line in grid], cmap="cividis", vmin=0, vmax=100,
                            aspect="auto")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                axis.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color="white" if value < 0.6 else "black")
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
        axis.set(xlabel="length of the input (tokens)", title=f"update rule: {rule}")
    axes[0][0].set_ylabel("depth of the key")
    figure.colorbar(image, ax=axes, label="digits right (%)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --- The command ---------------------------------------------------------------------------------------------------

def depth(text):
    return whole(0, 100)(text) / 100


def parse_arguments():
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_common_arguments(parser)
    parser.add_argument("--rule", choices=["linear", "delta", "both"], default="both", help="Eq. 8, Eq. 9, or both")
    parser.add_argument("--steps", type=whole(1), default=1000, help="training steps")
    parser.add_argument("--train-length", type=whole(96, 5000), default=1024, help="longest training input, tokens")
    parser.add_argument("--digits", type=whole(1, 9), default=4, help="digits of a key")
    parser.add_argument("--lengths", type=several(whole(64, 2 ** 26)), default="256,512,1024,2048", help="of the evaluation, tokens")
    parser.add_argument("--depths", type=several(depth), default="0,50,100", help="of the key, %% of the hay")
    parser.add_argument("--keys", type=whole(1, 500), default=20, help="held-out keys per cell")
    parser.add_argument("--eval-seed", type=whole(0), default=1234, help="draws the held-out keys")
    parser.add_argument("--load", type=Path, nargs="+", help="evaluate these checkpoints instead of training")
    return parser.parse_args()


def main():
    args = parse_arguments()
    prepare(args)
    paths = args.load or [args.out / f"passkey-{rule}.pt" for rule in
                          (["linear", "delta"] if args.rule == "both" else [args.rule])]
    keys = draw_keys(random.Random(f"evaluation {args.eval_seed}"), args.keys, args.digits, held_out=True)
    results = {}
    for path in paths:
        if not args.load:
            rule = path.stem.split("-")[1]
            torch.manual_seed(args.seed)
            model = InfiniTransformer(model_config(rule)).to(args.device)
            print(f"Training, update rule {rule}, {sum(p.numel() for p in model.parameters()):,} parameters, "
                  f"{args.steps} steps, inputs of at most {args.train_length:,} tokens", flush=True)
            settings = dict(seed=args.seed, steps=args.steps, longest=args.train_length, digits=args.digits)
            train(model, training_batches(**settings), args.steps, path, lr=6e-3, gate_lr=3e-2, resume=args.resume,
                  settings=settings)
        model, settings = load_model(path, args.device)
        rule = model.config.update
        print(f"\nUpdate rule {rule}: digits right (whole keys right), {args.keys} held-out keys a cell")
        results[rule] = evaluate_all(model, args.lengths, args.depths, keys)
    with open(args.out / "passkey.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["rule", "tokens", "depth", "digits_right", "keys_right"])
        table.writerows([rule, *row] for rule, rows in results.items() for row in rows)
    draw_heat_map(results, args.out / "passkey.png")
    print(f"\nWritten: {args.out / 'passkey.csv'}, {args.out / 'passkey.png'}")


if __name__ == "__main__":
    run(main)
