"""The paper's main task (section 4.3): find a pass key in a long irrelevant text. Our Table 3.

    python passkey.py                              train in each way, look for keys up to 1M tokens
    python passkey.py --load assets/passkey-*.pt   only look

The prompt is the paper's (appendix B), word for word. A token is a word, a punctuation mark or a
digit; the prompt needs 53. Evaluation keys never occur in training.
Departure: the paper trains on its own prompt only. Here half of the hay or more is other text, and
some keys have 3, 5 or 6 digits. A model that sees one paragraph only learns to ignore that one.
No digit is asked of a segment's first token, which sees only itself."""
import argparse
import csv
import math
import os
import random
import re
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from infini import InfiniConfig, InfiniTransformer, State, generate, require, stream
from train import Parser, Progress, load_model, run_command, set_up, side_by_side, train, whole

INTRO = ("There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
         "them. I will quiz you about the important information there.")
HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "The pass key is {0}. Remember it. {0} is the pass key."
QUESTION = "What is the pass key? The pass key is"
DIGITS, SHORTEST = 4, 64    # of a key; tokens of a training input
WAYS = {    # goes on from, steps, tokens of the longest input, tokens per step, rate
    "local": (None, 4000, 256, 1024, 4e-3),        # the control, a model without memory
    "short": (None, 4000, 256, 1024, 4e-3),        # long inputs alone would teach nothing
    "plain": ("short", 1600, 5000, 2048, 2e-3),    # inputs of up to 5K tokens, as in the paper
    "sharp": ("plain", 1600, 5000, 2048, 2e-3)}    # the same, while W_Q and W_K grow
GROWTH = {"linear": (6, 0.7), "delta": (4, 0.9)}    # by this factor, in this share of the steps
PAPER_LENGTHS = [2 ** 15, 2 ** 17, 2 ** 18, 2 ** 19, 2 ** 20]
PAPER = {    # Table 3 at these lengths: digits right in %, key at the start/middle/end
    "zero-shot linear": "14/13/98 11/14/100 6/3/100 6/7/99 8/6/98",
    "zero-shot delta": "13/11/99 6/9/99 7/5/99 6/8/97 7/6/97",
    "400 steps linear": "100/100/100 100/100/100 100/100/100 97/99/100 96/94/100",
    "400 steps delta": "100/100/100 100/100/99 100/100/99 100/100/100 100/100/100"}

def model_config(**other):
    """Return the model's sizes: 138,000 parameters, and segments of 32 tokens."""
    return InfiniConfig(**{**dict(
        vocab_size=len(VOCABULARY), d_model=64, n_layers=2, n_heads=4, d_key=32, d_value=32,
        d_ff=256, segment_len=32, rope_base=50.0, gate_init=-2.0), **other})

# --- The prompt ----------------------------------------------------------------------------------
def words(text):
    return re.findall(r"\d|\w+|[^\w\s]", text)

VOCABULARY = sorted(set(words("0123456789" + INTRO + HAY + NEEDLE + QUESTION)) - {"{", "}"})
TOKEN = {word: i for i, word in enumerate(VOCABULARY)}
WORDS = [word for word in VOCABULARY if not word.isdigit()]
PARAGRAPH = len(words(HAY))    # 24 tokens

@lru_cache(4096)
def token_ids(text):
    unknown = [word for word in words(text) if word not in TOKEN]
    if unknown:
        raise ValueError(f"word was {unknown[0]!r}, must be one of the prompt's {len(TOKEN)}")
    return [TOKEN[word] for word in words(text)]

def encode(text):
    """Turn text into (T,) token ids. Raises ValueError on a word that the prompt does not have."""
    return torch.tensor(token_ids(text), dtype=torch.long)

def write_hay(kind, n, rng):
    """Write n paragraphs, (24 n,) ids: the "paper"'s, its sentences "shuffled", or its "words"."""
    require(kind in ("paper", "shuffled", "words"), "hay", repr(kind), "paper, shuffled or words")
    if kind == "paper":
        return encode(HAY).repeat(n)
    if kind == "words":
        return torch.tensor(rng.choices([TOKEN[w] for w in WORDS], k=PARAGRAPH * n)).long()
    sentences = [encode(s) for s in re.findall(r"\w[^.]+\.", HAY)]
    return torch.cat([s for _ in range(n) for s in rng.sample(sentences, 5)] or [encode("")])

def one_key(key, needle=NEEDLE):
    """Make the task to find one key, three texts: what is hidden in the hay, what is asked at the
    end, and the answer. The needle may also hold {1}, the key backwards."""
    return needle.format(key, key[::-1]), QUESTION, key

def write_input(task, hay, before):
    """Write an input and its answer, (T,) ids, with the needle after `before` tokens of hay."""
    needle, question, answer = map(encode, task)
    return torch.cat([encode(INTRO), hay[:before], needle, hay[before:], question, answer])

def paragraphs(n_tokens, task):
    """Return how many paragraphs of hay make an input of at least n_tokens, with its answer."""
    return max(0, math.ceil((n_tokens - len(write_input(task, encode(""), 0))) / PARAGRAPH))

def is_held_out(key):
    """Tell whether a key is kept for the evaluation. One in ten is, chosen by a hash of it."""
    return int(key) * 2_654_435_761 % 2 ** 32 % 1000 < 100

def draw_keys(rng, n, digits, held_out):
    """Draw n keys for evaluation (held out) or training. A training key has at most five different
    digits, drawn anew per key, since keys that repeat a digit are the hard ones."""
    keys, ten, most = [], "0123456789", 10 ** digits // 11    # about one in ten is held out
    require(n <= most or not held_out, "number of held-out keys", n, f"at most {most}")
    while len(keys) < n:
        key = "".join(rng.choices(ten if held_out else rng.sample(ten, 5), k=digits))
        if is_held_out(key) == held_out and not (held_out and key in keys):
            keys.append(key)
    return keys

# --- Training ------------------------------------------------------------------------------------
def draw_hay(rng, n, kinds):
    """Draw n tokens of hay from anywhere in it, so that needles stand anywhere in a segment."""
    start = rng.randrange(PARAGRAPH)
    return write_hay(rng.choice(kinds), math.ceil(n / PARAGRAPH) + 1, rng)[start:start + n]

def answer_loss(model, inputs, digits):
    """Compute the cross entropy of the last tokens, the digits of the answers. The segments before
    theirs are only read. Returns loss, tokens read, numbers to show."""
    N, answers = model.config.segment_len, inputs[:, -digits:]
    cut = (inputs.shape[1] - digits - 1) // N * N
    state = model(inputs[:, :cut], predict=False)[1] if cut else None
    logits = model(inputs[:, cut:-1], state)[0][:, -digits:]         # (B, digits, vocabulary)
    right = (logits.argmax(-1) == answers).float().mean().item()
    loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
    return loss, inputs.numel(), {"digits right": right}

def plain_loss(model, rng, longest, tokens_per_step, kinds):
    """Compute the loss on inputs of one random length, log-uniform up to `longest` tokens. Half of
    the needles stand at the very end. Returns what answer_loss does."""
    n_tokens = int(SHORTEST * (longest / SHORTEST) ** rng.random())
    digits, N = rng.choice([DIGITS, DIGITS, rng.randint(3, 6)]), model.config.segment_len
    n_keys = max(1, tokens_per_step // n_tokens)
    tasks = [*map(one_key, draw_keys(rng, n_keys, digits, held_out=False))]
    n_other = len(write_input(tasks[0], encode(""), 0))
    n_hay = max(0, n_tokens - n_other)
    begin = (n_other + n_hay - digits) % N    # the answer's place in its segment
    if not 2 <= begin <= N + 1 - digits:      # a first token would be asked
        n_hay += (2 - begin) % N
    before = [rng.choice([n_hay, rng.randint(0, n_hay)]) for _ in tasks]
    inputs = torch.stack([write_input(task, draw_hay(rng, n_hay, kinds), n)
                          for task, n in zip(tasks, before)]).to(model.embedding.weight.device)
    return answer_loss(model, inputs, digits)

@torch.no_grad()
def sharpen(model, factor):
    """Multiply W_Q and W_K. Below zero sigma is e^x, so twice the weights square the little that
    hay writes where the question reads. Departure: the paper has no such step."""
    for block in model.blocks:
        block.attention.w_q.weight *= factor
        block.attention.w_k.weight *= factor

def way_loss(way, seed, steps):
    """Make a way's loss_of(model, step). Without a start, inputs grow for 30% of the steps. In
    "sharp" W_Q and W_K grow a little before each of the first steps (GROWTH). The remaining steps
    repair what that has broken."""
    start, _, longest, tokens_per_step, _ = WAYS[way]
    kinds = ["paper", "shuffled", "words", "words" if start else "paper"]
    def loss_of(model, step):
        factor, share = GROWTH[model.config.update]
        if way == "sharp" and step < share * steps:
            sharpen(model, factor ** (1 / (share * steps)))
        grown = 1 if start else min(1, step / steps / 0.3)
        return plain_loss(model, random.Random(f"{seed} after {start}/{step}"),
                          SHORTEST * (longest / SHORTEST) ** grown, tokens_per_step, kinds)
    return loss_of

def train_one(way, rule, seed, loss_of, steps, lr, out, start=None, device="cpu", resume=False):
    """Train a model, from the checkpoint `start` or from nothing. Returns its checkpoint's path."""
    torch.manual_seed(seed)
    kind = dict(attention="local") if rule == "-" else dict(update=rule)
    model = load_model(start)[0] if start else InfiniTransformer(model_config(**kind))
    path = Path(out, "-".join(["passkey", way, *[rule] * (rule != "-"), f"seed{seed}.pt"]))
    train(model.to(device), loss_of, steps, path, lr, 2.5 * lr, resume=resume,
          settings=dict(training=way, seed=seed, digits=DIGITS))
    return path

def train_ways(rule, ways, seed, steps, out, device, resume):
    """Train those of the ways that fit the rule; "-" is local's. Returns the checkpoints' paths."""
    paths, wanted = {}, {*ways}
    for way in reversed(WAYS):    # what a way goes on from is trained, too
        if way in wanted:
            wanted.add(WAYS[way][0])
    for way, (start, default, _, _, lr) in WAYS.items():
        if way in wanted and (way == "local") == (rule == "-"):
            n, start = steps or default, paths.get(start)
            paths[way] = train_one(way, rule, seed, way_loss(way, seed, n), n, lr, out, start,
                                   device, resume)
    return [path for way, path in paths.items() if way in ways]

# --- Evaluation ----------------------------------------------------------------------------------
def copies(state, n):    # n of each document's
    def repeat(parts):
        return [part.repeat_interleave(n, 0) for part in parts]
    return [State(s.memory and type(s.memory)(*repeat(s.memory)), *repeat(s[1:])) for s in state]

class Found(NamedTuple):
    """Holds the accuracy at one length and depth, as shares."""
    tokens: int
    depth: float
    digits_right: float
    keys_right: float

def evaluate(model, tasks, lengths, depths, hay="paper"):
    """Hide each needle in inputs of at least n tokens, n in `lengths`, at each depth, and ask.
    The model writes all digits itself. Inputs are streamed. All keys share the hay before the
    needle, and all lengths share the hay after it, so that is read once. Yields a Found."""
    device, B, depths = model.embedding.weight.device, len(tasks), [*depths]
    require(all(0 <= depth <= 1 for depth in depths), "depths", depths, "from 0 to 1")
    needles, questions, answers = (torch.stack([*map(encode, texts)]).to(device)
                                   for texts in zip(*tasks))
    cells = {}    # (paragraphs before the needle, after it) -> [(n, depth)]
    for n, depth in ((n, depth) for n in lengths for depth in depths):
        total = paragraphs(n, tasks[0])
        before = round(depth * total)
        cells.setdefault((before, total - before), []).append((n, depth))
    n_all = max(cells, default=[0])[0] + B * sum(dict(sorted(cells)).values())
    progress = Progress("looking", 0, PARAGRAPH * n_all + 1, "tokens")
    @torch.no_grad()
    def read(state, n, rng):
        at_once = max(4, 80 // len(state[0].k))                      # at most some 2,000 tokens
        for i in range(0, n, at_once):
            text = write_hay(hay, min(at_once, n - i), rng).expand(len(state[0].k), -1).to(device)
            _, state = model(text, state, predict=False)
            progress.show(progress.tokens + text.numel(), text.numel())
        return state
    _, prefix = stream(model, encode(INTRO)[None].to(device))
    read_before, rng_before = -1, random.Random("before")
    for before, after in sorted(cells):
        if before > read_before:
            prefix = read(prefix, before - max(0, read_before), rng_before)
            _, state = stream(model, needles, copies(prefix, B))
            read_before, read_after, rng_after = before, 0, random.Random("behind")
        state, read_after = read(state, after - read_after, rng_after), after
        written = generate(model, questions, answers.shape[1], temperature=0, state=state)
        right = (written[:, questions.shape[1]:] == answers).float()
        for n, depth in cells[before, after]:
            yield Found(n, depth, right.mean().item(), right.amin(1).mean().item())
    if cells:
        progress.show(progress.total, 0)

# --- Table and picture ---------------------------------------------------------------------------
def short(n):
    """Write 32768 as 32K."""
    return f"{n >> 20}M" if n % 2 ** 20 == 0 else f"{n >> 10}K" if n % 2 ** 10 == 0 else f"{n:,}"

def print_row(name, cells):
    print(f"{name:24}" + "".join(f"{cell:>12}" for cell in cells), flush=True)

def new_figure(**options):
    """Make a figure that needs no display, whatever $MPLBACKEND says."""
    backend = os.environ.pop("MPLBACKEND", "")
    from matplotlib import figure, rcParams
    with suppress(ValueError):
        rcParams.update({"backend": backend} if backend else {})    # for pictures of others
    return figure.Figure(layout="constrained", **options)

def heat_map(axis, grid, high, text, x, y):
    """Draw a grid of numbers from 0 to `high` as colours and text. Returns the image."""
    image = axis.imshow(grid, cmap="cividis", vmin=0, vmax=high, aspect="auto")
    for row, line in enumerate(grid):
        for column, value in enumerate(line):
            axis.text(column, row, text.format(value), ha="center", va="center", fontsize=7,
                      color="black" if value > 0.6 * high else "white")
    axis.set(xticks=range(len(x)), xticklabels=x, yticks=range(len(y)), yticklabels=y)
    return image

def draw(results, lengths, depths, path):
    """Draw a heat map for each of the results, (name, Founds). An even number has two columns."""
    columns = 2 - len(results) % 2
    rows, high = len(results) // columns, max(2.4, 0.2 * len(depths))
    figure = new_figure(figsize=(6 * columns, 0.8 + high * rows))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axis, (name, found) in zip(axes.flat, results):
        share = {(f.tokens, f.depth): 100 * f.digits_right for f in found}
        image = heat_map(axis, [[share[n, d] for n in lengths] for d in depths], 100, "{:.0f}",
                         [short(n) for n in lengths], [f"{d:.0%}" for d in depths])
        axis.set(title=name, ylabel="depth of the key", xlabel="length of the input (tokens)")
    figure.colorbar(image, ax=axes, label="digits right (%)")
    figure.savefig(path, dpi=150)

def load_for_table(path, device="cpu"):
    """Load a pass-key model. Returns it, its way of training, rule and seed, and its digits."""
    model, settings = load_model(path, device)
    kinds = [type(settings.get(name)) for name in ("training", "seed", "digits")]
    if kinds != [str, int, int] or settings["digits"] not in (4, 5, 6):
        raise ValueError(f"{path} was of another task, must be a checkpoint of passkey.py")
    rule = model.config.update if model.config.attention == "infini" else "-"
    return model, (settings["training"], rule, settings["seed"]), settings["digits"]

def look(path, lengths, depths, n_keys, eval_seed, device, needle, hay, digits):
    """Look for keys with one model, for half of them beyond 32K tokens. Returns who, Founds."""
    model, who, trained_on = load_for_table(path, device)
    rng, limit = random.Random(f"evaluation {eval_seed}"), 2 ** 15
    keys = draw_keys(rng, n_keys, digits or trained_on, held_out=True)
    tasks = [one_key(key, needle) for key in keys]
    return who, [*evaluate(model, tasks, [n for n in lengths if n <= limit], depths, hay),
                 *evaluate(model, tasks[::2], [n for n in lengths if n > limit], depths, hay)]

def table(paths, lengths, depths, n_keys, eval_seed, device, csv_path, needle=NEEDLE, hay="paper",
          digits=None):
    """Look for keys with all models, side by side. Print a row for each, with the paper's below,
    and write each cell into a CSV file. Returns each model's name and Founds."""
    jobs = [(path, lengths, depths, n_keys, eval_seed, device, needle, hay, digits)
            for path in paths if load_for_table(path)]    # a bad one is refused before all work
    same_text, results = (depths, needle, hay, digits) == ([0, 0.5, 1], NEEDLE, "paper", None), []
    at = "/".join(f"{d:.0%}" for d in depths) if len(depths) < 4 else f"the worst of {len(depths)}"
    print(f"\nDigits right in %, key at {at} of hay, {n_keys} keys ({-(-n_keys // 2)} above 32K)")
    print_row("training, rule, seed", [short(n) for n in lengths])
    with open(csv_path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.writer(file)
        rows.writerow(["training", "rule", "seed", *Found._fields, "model"])
        for path, (who, found) in zip(paths, side_by_side(look, jobs)):
            rows.writerows([*who, *cell, path] for cell in found)
            file.flush()
            name = " ".join(map(str, who))
            name += f" ({len(results) + 1})" * any(name == other for other, _ in results)
            results.append((name, found))
            right = [[f"{100 * f.digits_right:.0f}" for f in found if f.tokens == n]
                     for n in lengths]
            print_row(name, ["/".join(r) if len(r) < 4 else min(r, key=int) for r in right])
            theirs = "zero-shot" if who[0] == "short" else "400 steps"
            paper = dict(zip(PAPER_LENGTHS, PAPER.get(f"{theirs} {who[1]}", "").split()))
            if same_text and set(lengths) & set(paper):
                print_row(f"    the paper, {theirs}", [paper.get(n, "") for n in lengths])
    return results

# --- The command ---------------------------------------------------------------------------------
def length(text):
    """Read 32K as 32768."""
    unit = {"K": 2 ** 10, "M": 2 ** 20}.get(text[-1:].upper(), 1)
    return unit * whole(math.ceil(64 / unit), 2 ** 26 // unit)(text if unit == 1 else text[:-1])

def listed(parse):
    """Make an argument type for values with commas between them."""
    def parse_all(text):
        values = [parse(part) for part in text.split(",")]
        if re.fullmatch(r"\d{1,3}(,\d{3})+", text) and values != sorted(values):
            raise argparse.ArgumentTypeError(f"was {text!r}, must be as 512K or have rising values")
        return sorted({*values})
    return parse_all

def main():
    parser = Parser("Find a pass key in up to a million tokens: the paper's section 4.3, Table 3.")
    add = parser.add_argument
    add("--load", type=Path, nargs="+", action="extend", metavar="FILE", help="only look")
    add("--training", default="local,short,plain,sharp", help="see WAYS")
    add("--rule", choices=["linear", "delta", "both"], default="both", help="rule of the memory")
    add("--steps", type=whole(1), help="steps of each stage; without it 4000, then 1600")
    add("--seed", type=whole(0), default=0, help="of weights and training inputs")
    add("--resume", action="store_true", help="go on with trainings that were stopped")
    add("--lengths", type=listed(length), default="1K,32K,128K,256K,512K,1M", help="in tokens")
    add("--depths", type=listed(whole(0, 100)), default="0,50,100", help="of the key, in %%")
    add("--keys", type=whole(1, 500), default=20, help="keys per cell")
    add("--eval-seed", type=whole(0), default=1234, help="draws these keys")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for all files")
    add("--csv", type=Path, metavar="FILE", help="for the table; without it OUT/passkey.csv")
    add("--device", default="cpu", help="or cuda, or mps")
    add("--threads", type=whole(1, 1024), help="cores to use; without it PyTorch decides")
    args = parser.parse_args()
    ways, rules = args.training.split(","), ["linear", "delta"]
    require(set(ways) <= set(WAYS), "--training", repr(args.training), f"of {','.join(WAYS)}")
    path = args.csv or args.out / "passkey.csv"
    require(path.suffix == ".csv", "--csv", path, "a name that ends in .csv")
    set_up(args.device, args.threads, args.out, [path.absolute(), "passkey.png"], args.load or [])
    useless = {"--training", "--rule", "--steps", "--seed", "--resume"} if args.load else {"--rule"}
    ignored = useless & {word.split("=")[0] for word in sys.argv}
    if ignored and (args.load or {*ways} == {"local"}):
        parser.error(f"argument {min(ignored)}: of no use to {'--load' if args.load else 'local'}")
    jobs = [(rule, ways, args.seed, args.steps, args.out, args.device, args.resume)
            for rule in ["-"] * ("local" in ways) + (rules if args.rule == "both" else [args.rule])]
    paths = args.load or [path for paths in side_by_side(train_ways, jobs) for path in paths]
    depths = [depth / 100 for depth in args.depths]
    results = table(paths, args.lengths, depths, args.keys, args.eval_seed, args.device, path)
    draw(results, args.lengths, depths, args.out / "passkey.png")

if __name__ == "__main__":
    run_command(main)
