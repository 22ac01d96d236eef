"""The paper's own task (section 4.3, appendix B): find a pass key hidden in a long irrelevant text. Our Table 3.

    python passkey.py                                 train both rules in three ways, look for keys in up to 1M tokens
    python passkey.py --rule delta --training plain   one rule, one way
    python passkey.py --load out/*.pt --lengths 1024  evaluate trained models

The prompt is the paper's, word for word. A token is a word, a punctuation mark or a single digit: the prompt needs 53.
No key of the evaluation occurs in any training. The three ways of training:

    zero-shot      on inputs of at most 256 tokens, short ones first: from the start, long ones teach nothing
    plain          then 400 steps on inputs of at most 5,000 tokens (the paper: 5K)
    fast-forward   then, instead, 400 steps on short inputs, in half of which the memory goes through up to 1.2 million
                   tokens of hay, most of them counted instead of read. A departure: see fast_forward
"""
import csv
import math
import random
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from infini import InfiniConfig, InfiniTransformer, Memory, State, generate, stream
from train import Parser, add_common_arguments, heat_map, load_model, panels, prepare, run, several, train, whole

INTRO = ("There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
         "I will quiz you about the important information there.")
HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "The pass key is {0}. Remember it. {0} is the pass key."
QUESTION = "What is the pass key? The pass key is"
SHORTEST, LONGEST = 64, {"zero-shot": 256, "plain": 5000, "fast-forward": 1024}    # tokens of a training input
STEPS = {"zero-shot": 2400, "plain": 400, "fast-forward": 400}

PAPER = {    # Table 3: start/middle/end, digits right in %
    "zero-shot": {"linear": "14/13/98 11/14/100 6/3/100 6/7/99 8/6/98",
                  "delta": "13/11/99 6/9/99 7/5/99 6/8/97 7/6/97"},
    "plain": {"linear": "100/100/100 100/100/100 100/100/100 97/99/100 96/94/100",
              "delta": "100/100/100 100/100/99 100/100/99 100/100/100 100/100/100"}}


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
    """Whole inputs with their answers: (B, T). before: how many of `total` repeats of the hay precede each needle."""
    return torch.stack([torch.cat([encode(INTRO), encode(HAY).repeat(x), encode(NEEDLE.format(key)),
                                   encode(HAY).repeat(total - x), encode(QUESTION), encode(key)])
                        for key, x in zip(keys, before)])


# --- Training ------------------------------------------------------------------------------------------------------

def model_config(rule):
    """2 layers of 4 heads, 138,000 parameters. N = 32: what a segment can't see begins 32 tokens back."""
    return InfiniConfig(vocab_size=len(VOCABULARY), d_model=64, n_layers=2, n_heads=4, d_key=32, d_value=32, d_ff=256,
                        segment_len=32, update=rule, rope_base=50.0, gate_init=-2.0)


def answer_loss(logits, keys):
    """Cross entropy of the digits of the answer, the last tokens of the input, and the share that is right."""
    digits = torch.stack([encode(key) for key in keys]).to(logits.device)     # (B, digits)
    logits = logits[:, -digits.shape[1]:]
    right = (logits.argmax(-1) == digits).float().mean().item()
    return F.cross_entropy(logits.flatten(0, 1), digits.flatten()), {"digits right": right}


def plain_loss(seed, longest, digits, grow=lambda step: 1.0, tokens_per_step=1024):
    """Loss on whole inputs, as in the paper: random keys, depths, and lengths, these from a range that may grow."""
    def loss_of(model, step):
        rng = random.Random(f"{seed}/{step}")
        now = SHORTEST * (longest / SHORTEST) ** grow(step)
        total = repeats(int(SHORTEST * (now / SHORTEST) ** rng.random()), digits)
        keys = draw_keys(rng, max(1, tokens_per_step // (SHORTEST + len(words(HAY)) * total)), digits, held_out=False)
        inputs = write_inputs(keys, [rng.randint(0, total) for _ in keys], total).to(model.embedding.weight.device)
        loss, shown = answer_loss(model(inputs[:, :-1])[0], keys)
        return loss, inputs.numel(), shown
    return loss_of


def leaps(periods, growth=3):
    """How often to count each period that is read, so that few readings make many periods: 1, 2, 6, 18, 54, ..."""
    counts = []
    while sum(counts) < periods:
        counts.append(min(max(1, (growth - 1) * sum(counts)), periods - sum(counts)))
    return counts


def fast_forward(model, state, periods):
    """The state after `periods` more periods of hay (4 repeats = 3 segments each), without reading all of them.

    The hay says the same again and again, so what it writes changes slowly: read one period, and add what it wrote to
    the memory n times instead of once, n in proportion to what came before. Gradients flow through all of it.
    """
    period = encode(HAY).repeat(4).expand(state[0].k.shape[0], -1).to(state[0].k.device)
    for n in leaps(periods):
        _, after = model(period, state)
        state = [State(Memory(*(old + n * (new - old) for old, new in zip(s.memory, a.memory))), a.k, a.v)
                 for s, a in zip(state, after)]
    return state


def fast_forward_loss(seed, digits, longest=1_200_000, rows=6):
    """plain_loss in every other step; in between, loss on inputs with up to `longest` tokens of fast-forwarded hay.

    It lies before the needle, behind it, or both; up to 3 repeats more shift everything against the segments' borders.
    """
    plain, hay = plain_loss(seed, LONGEST["fast-forward"], digits, tokens_per_step=2048), encode(HAY)
    most = longest / (4 * len(hay))                                           # periods

    def loss_of(model, step):
        if step % 2 == 0:
            return plain(model, step)
        rng, device = random.Random(f"{seed}/{step}"), model.embedding.weight.device
        keys = draw_keys(rng, rows, digits, held_out=False)
        before, after = (int(10 * (most / 10) ** rng.random()) for _ in range(2))    # log-uniform
        before, after = rng.choice([(before, 0), (0, after), (before, after)])
        shift = [hay.repeat(rng.randint(0, 3)) for _ in range(3)]
        needles = torch.stack([torch.cat([encode(NEEDLE.format(key)), shift[1]]) for key in keys])
        ends = torch.stack([torch.cat([shift[2], encode(QUESTION + " " + key)]) for key in keys])
        _, state = model(torch.cat([encode(INTRO), shift[0]])[None].to(device))
        _, state = model(needles.to(device), copies(fast_forward(model, state, before), rows))
        logits, _ = model(ends[:, :-1].to(device), fast_forward(model, state, after))
        loss, shown = answer_loss(logits, keys)
        read = 4 * len(hay) * (len(leaps(before)) + rows * len(leaps(after))) + needles.numel() + ends.numel()
        return loss, read, shown
    return loss_of


def train_one(training, rule, args, start=None):
    """Train one model of the table, from the checkpoint `start` if it is fine-tuned. Returns its checkpoint's path."""
    path, steps = args.out / f"passkey-{training}-{rule}.pt", args.steps or STEPS[training]
    torch.manual_seed(args.seed)
    model = load_model(start)[0] if start else InfiniTransformer(model_config(rule))
    loss_of = {"zero-shot": lambda: plain_loss(args.seed, LONGEST[training], args.digits,
                                               grow=lambda step: min(1, step / steps / 0.3)),
               "plain": lambda: plain_loss(args.seed + 1, LONGEST[training], args.digits, tokens_per_step=5000),
               "fast-forward": lambda: fast_forward_loss(args.seed + 1, args.digits)}[training]()
    rates = dict(lr=2e-3, gate_lr=1e-2) if start else dict(lr=4e-3, gate_lr=3e-2)
    print(f"{training}, {rule}: {steps} steps, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    begin = sum(p.double().sum().item() for p in model.parameters())          # changes with the weights it starts from
    settings = dict(training=training, seed=args.seed, digits=args.digits, begin=begin)
    train(model.to(args.device), loss_of, steps, path, **rates, resume=args.resume, settings=settings)
    return path


# --- Evaluation ----------------------------------------------------------------------------------------------------

def read_hay(model, state, n, batch=1, at_once=80):
    """Stream n repeats of the hay through the state: no more than `at_once` of them are ever in memory."""
    hay = encode(HAY).to(model.embedding.weight.device)
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
    device, B = model.embedding.weight.device, len(keys)
    _, state = stream(model, encode(INTRO)[None].to(device))
    state = copies(read_hay(model, state, before), B)
    _, state = stream(model, torch.stack([encode(NEEDLE.format(key)) for key in keys]).to(device), state)
    state = read_hay(model, state, after, B)
    n = len(keys[0])
    return generate(model, encode(QUESTION).expand(B, -1).to(device), n, temperature=0, state=state)[:, -n:]


def evaluate(model, n_tokens, depth, keys):
    """Share of right digits and share of right keys, for inputs of at least n_tokens tokens."""
    total = repeats(n_tokens, len(keys[0]))
    before = round(depth * total)
    right = answer(model, keys, before, total - before).cpu() == torch.stack([encode(key) for key in keys])
    return right.float().mean().item(), right.all(1).float().mean().item()


def evaluate_all(model, lengths, depths, keys):
    """A row of the table, printed cell by cell. Returns (tokens, depth, digits right, keys right, seconds) for each."""
    rows = []
    for n_tokens in lengths:
        for depth in depths:
            start = time.monotonic()
            rows.append((n_tokens, depth, *evaluate(model, n_tokens, depth, keys), time.monotonic() - start))
        print_row(None, [percents(row[2] for row in rows[-len(depths):])], depths, end="")
    print()
    print_row("    whole keys", [percents(row[3] for row in rows if row[0] == n) for n in lengths], depths)
    return rows


def percents(shares):
    return "/".join(f"{100 * share:.0f}" for share in shares)


def print_row(name, cells, depths, end="\n"):
    """A row of the table, or the next cells of one that was begun: name=None."""
    start = "" if name is None else f"{name:22}"
    print(start + "".join(cell.rjust(4 * len(depths) + 2) for cell in cells), end=end, flush=True)


def short(n):
    """32768 -> 32K"""
    for unit, name in ((2 ** 20, "M"), (2 ** 10, "K")):
        if n % unit == 0:
            return f"{n // unit}{name}"
    return f"{n:,}"


def draw(results, path):
    """Heat maps, depth by length, a panel per model. results: {(training, rule, seed): rows of evaluate_all}."""
    columns = min(2, len(results))
    figure, axes = panels(math.ceil(len(results) / columns), columns)
    for axis in axes.flat[len(results):]:
        axis.set_visible(False)
    for axis, ((training, rule, seed), rows) in zip(axes.flat, results.items()):
        lengths, depths = (sorted({row[i] for row in rows}) for i in (0, 1))
        share = {row[:2]: 100 * row[2] for row in rows}
        image = heat_map(axis, [[share[n, d] for n in lengths] for d in depths], 100, "{:.0f}",
                         x=[short(n) for n in lengths], y=[f"{d:.0%}" for d in depths])
        axis.set_title(f"{training}, update rule {rule}, seed {seed}", fontsize=9)
    figure.supxlabel("length of the input (tokens)")
    figure.supylabel("depth of the key")
    figure.colorbar(image, ax=axes, label="digits right (%)")
    figure.savefig(path, dpi=150)


# --- The command ---------------------------------------------------------------------------------------------------

def tokens(text):
    """"32K" -> 32768"""
    unit = {"K": 2 ** 10, "M": 2 ** 20}.get(text[-1:].upper(), 1)
    return unit * whole(64 // unit or 1, 2 ** 26 // unit)(text if unit == 1 else text[:-1])


def percent(text):
    return whole(0, 100)(text) / 100


def parse_arguments():
    parser = Parser(description="Find a pass key in up to a million tokens: the paper's section 4.3 and Table 3.")
    add_common_arguments(parser)
    parser.add_argument("--rule", choices=["linear", "delta", "both"], default="both",
                        help="update rule of the memory: Eq. 8, Eq. 9, or one model for each (default: %(default)s)")
    parser.add_argument("--training", choices=[*LONGEST, "all"], default="all",
                        help="way of training, as told at the top of passkey.py (default: %(default)s)")
    parser.add_argument("--steps", type=whole(1), help=f"training steps (default: {STEPS})")
    parser.add_argument("--digits", type=whole(1, 9), default=4, help="digits of a key (default: %(default)s)")
    parser.add_argument("--lengths", type=several(tokens), default="1K,8K,32K",
                        help="lengths of the texts, in tokens; 1K is 1024, 1M is 1024K (default: %(default)s)")
    parser.add_argument("--depths", type=several(percent), default="0,50,100",
                        help="where the key is, in %% of the hay (default: %(default)s)")
    parser.add_argument("--keys", type=whole(1, 500), default=20, help="keys per cell (default: %(default)s)")
    parser.add_argument("--eval-seed", type=whole(0), default=1234, help="draws those keys (default: %(default)s)")
    parser.add_argument("--load", type=Path, nargs="+", metavar="FILE", help="don't train: evaluate these checkpoints")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the table for a program (default: OUT/passkey.csv)")
    return parser.parse_args()


def main():
    args = parse_arguments()
    prepare(args)
    rules = ["linear", "delta"] if args.rule == "both" else [args.rule]
    trainings = list(LONGEST) if args.training == "all" else [args.training]
    paths = args.load
    if not paths:
        made = {}
        for rule in rules:
            for training in dict.fromkeys(["zero-shot", *trainings]):
                made[training, rule] = train_one(training, rule, args, made.get(("zero-shot", rule)))
        paths = [made[training, rule] for rule in rules for training in trainings]
    keys = draw_keys(random.Random(f"evaluation {args.eval_seed}"), args.keys, args.digits, held_out=True)
    results = {}
    for path in paths:
        model, settings = load_model(path, args.device)
        if "training" not in settings or model.config.vocab_size != len(VOCABULARY):
            raise ValueError(f"{path} was of another task, must be a checkpoint of passkey.py")
        training, rule = settings["training"], model.config.update
        if not results:
            depths = "/".join(f"{d:.0%}" for d in args.depths)
            print(f"\nDigits right in %, key at {depths} of the hay, {args.keys} held-out keys a cell")
            print_row("", [short(n) for n in args.lengths], args.depths)
        print_row(f"{training}, {rule}", [], args.depths, end="")
        results[training, rule, settings["seed"]] = evaluate_all(model, args.lengths, args.depths, keys)
        if args.lengths == [2 ** i for i in (15, 17, 18, 19, 20)] and args.depths == [0, 0.5, 1] and training in PAPER:
            print_row("    in the paper", PAPER[training][rule].split(), args.depths)
    with open(args.csv or args.out / "passkey.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["training", "rule", "seed", "tokens", "depth", "digits_right", "keys_right", "seconds"])
        table.writerows([*model, *row] for model, rows in results.items() for row in rows)
    draw(results, args.out / "passkey.png")


if __name__ == "__main__":
    run(main)
