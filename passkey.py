"""The paper's own task (section 4.3, appendix B): find a pass key hidden in a long irrelevant text. Our Table 3.

    python passkey.py                              train a model in each way, look for keys in up to a million tokens
    python passkey.py --load assets/passkey-*.pt   look only
    python passkey.py --load FILE --text all       is it the key that the model has learned, or the hay?
    python passkey.py dilution --load FILE ...     why keys are lost: how thin they get in the memory
    python passkey.py capacity                     many named keys in one input: how many does a memory hold?

The prompt is the paper's, word for word, but for capacity's. A token is a word, a punctuation mark or a single digit:
the prompt needs 53. No key of the evaluation occurs in any training, but for capacity's, of one digit. The ways:

    local          as zero-shot, but attention="local": the control, a model without memory
    one-rate       as zero-shot, but the gates have the learning rate of everything else
    zero-shot      on inputs of at most 262 tokens, short ones first: from the start, long ones teach nothing
    plain          zero-shot, then inputs of at most 5,014 tokens (the paper: 5K)
    fast-forward   zero-shot, then short inputs, in half of which the memory goes through up to 1.2 million tokens of
                   hay on each side of the key, most of them counted instead of read. A departure: see fast_forward

In all of them half of the hay is not the paper's, but its sentences in random order or random words, and in a quarter
of the steps keys have 3, 5 or 6 digits: a model that has seen one paragraph only learns to ignore that paragraph.
"""
import argparse
import csv
import itertools
import math
import random
import re
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from infini import InfiniConfig, InfiniTransformer, Memory, State, generate, retrieve, sigma, stream
from train import (SMALL, Parser, Progress, add_common_arguments, add_options, draw_lines, heat_map, load_model, panels,
                   peak_memory, prepare, run, several, train, whole)

INTRO = ("There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
         "I will quiz you about the important information there.")
HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
OTHER_HAY = "The sun is green. Here is the grass. Find it again and again. There is a lot of yellow text."
NEEDLE = "The pass key is {0}. Remember it. {0} is the pass key."
QUESTION = "What is the pass key? The pass key is"
NAMED, NAMED_QUESTION = "{0} {1}.", "{0}"    # a name, and its key of one digit
DECOY = "The blue info is {1}. Find it. {1} is the blue info."
TEXTS = {    # what models are evaluated on, the paper's text and departures from it: hay, needle, digits if not as told
    "paper": ("paper", NEEDLE, None), "shuffled": ("shuffled", NEEDLE, None), "other": ("other", NEEDLE, None),
    "words": ("words", NEEDLE, None), "3-digits": ("paper", NEEDLE, 3), "6-digits": ("paper", NEEDLE, 6),
    "twice": ("paper", f"{NEEDLE} {HAY} {NEEDLE}", None), "decoy": ("paper", f"{NEEDLE} {HAY} {DECOY}", None)}
SHORTEST = 64    # tokens of a training input, at least
DIGITS = 4       # of a key
TRAININGS = {    # steps, tokens in the longest input, tokens in a step
    "local": (4800, 256, 1024), "one-rate": (4800, 256, 1024), "zero-shot": (4800, 256, 1024),
    "plain": (1600, 5000, 5000), "fast-forward": (1600, 1024, 2048), "named": (4000, None, 4096)}
TUNED = ("plain", "fast-forward")    # these go on where zero-shot ended
ROWS = [training for training in TRAININGS if training != "named"]    # of the table

PAPER_LENGTHS = [2 ** 15, 2 ** 17, 2 ** 18, 2 ** 19, 2 ** 20]
PAPER = {    # Table 3 at 32K, 128K, 256K, 512K, 1M: start/middle/end, digits right in %
    ("zero-shot", "linear"): "14/13/98 11/14/100 6/3/100 6/7/99 8/6/98",
    ("zero-shot", "delta"): "13/11/99 6/9/99 7/5/99 6/8/97 7/6/97",
    ("plain", "linear"): "100/100/100 100/100/100 100/100/100 97/99/100 96/94/100",
    ("plain", "delta"): "100/100/100 100/100/99 100/100/99 100/100/100 100/100/100"}


# --- Text ----------------------------------------------------------------------------------------------------------

def words(text):
    return re.findall(r"\d|\w+|[^\w\s]", text)


VOCABULARY = sorted(set(words("0123456789" + INTRO + HAY + NEEDLE + QUESTION)) - {"{", "}"})
TOKEN = {word: i for i, word in enumerate(VOCABULARY)}
WORDS = [word for word in VOCABULARY if not word.isdigit()]
NAMES = [word for word in WORDS if word.isalpha() and word not in words(QUESTION)][:32]
PARAGRAPH = len(words(HAY))    # 24 tokens


@lru_cache(4096)
def encode(text):
    """Text -> (T,) token ids, the same tensor each time. Raises ValueError on a word that the prompt does not have."""
    unknown = [word for word in words(text) if word not in TOKEN]
    if unknown:
        raise ValueError(f"word was {unknown[0]!r}, must be one of the {len(TOKEN)} of the prompt")
    return torch.tensor([TOKEN[word] for word in words(text)], dtype=torch.long)


def decode(tokens):
    """(T,) token ids -> text."""
    return re.sub(r" ([.?])", r"\1", " ".join(VOCABULARY[t] for t in tokens))


def write_hay(kind, n, rng):
    """n paragraphs: the "paper"'s, its sentences "shuffled", "other" ones, or random "words". (24 n,) token ids."""
    if kind == "paper":
        return encode(HAY).repeat(n)
    if kind == "words":
        return torch.tensor(rng.choices([TOKEN[w] for w in WORDS], k=PARAGRAPH * n), dtype=torch.long)
    sentences = [encode(s) for s in re.findall(r"\w[^.]+\.", HAY if kind == "shuffled" else OTHER_HAY)]
    return torch.cat([s for _ in range(n) for s in rng.sample(sentences, len(sentences))] or [encode("")])


class Task(NamedTuple):
    """What is hidden in the hay, asked at the end, and to be answered: texts."""
    needle: str
    question: str
    answer: str


def one_key(key, needle=NEEDLE):
    return Task(needle.format(key, key[::-1]), QUESTION, key)


def write_input(task, hay, before):
    """A whole input with its answer, (T,) token ids. before: how many paragraphs of the hay precede the needle."""
    before *= PARAGRAPH
    parts = encode(INTRO), hay[:before], encode(task.needle), hay[before:], encode(task.question), encode(task.answer)
    return torch.cat(parts)


def paragraphs(n_tokens, task):
    """How many paragraphs of hay make an input of at least n_tokens tokens, the answer included."""
    return max(0, math.ceil((n_tokens - len(write_input(task, encode(""), 0))) / PARAGRAPH))


def is_held_out(key):
    """Every tenth key is kept for the evaluation: which, is decided by its digits, whatever the seed."""
    return int(key) * 2_654_435_761 % 2 ** 32 % 1000 < 100


def draw_keys(rng, n, digits, held_out):
    """n keys for the evaluation (held out), or for training: there, as keys with a digit twice are the hard ones, each
    is of five digits only, drawn anew for every key."""
    keys = []
    while len(keys) < n:
        key = "".join(rng.choices("0123456789" if held_out else rng.sample("0123456789", 5), k=digits))
        if is_held_out(key) == held_out:
            keys.append(key)
    return keys


# --- Training ------------------------------------------------------------------------------------------------------

def model_config(**other):
    """2 layers of 4 heads, 138,000 parameters. N = 32: what a segment can't see begins 32 tokens back."""
    return InfiniConfig(**{**SMALL, "vocab_size": len(VOCABULARY), **other})


def training_tasks(rng, n, digits):
    digits = rng.choice([digits, digits, rng.randint(3, 6)])
    return [one_key(key) for key in draw_keys(rng, n, digits, held_out=False)]


def training_hay(rng, n):
    return write_hay(rng.choice(["paper", "paper", "shuffled", "words"]), n, rng)


def answer_loss(logits, tasks):
    """Cross entropy of the digits of the answers, the last tokens of the inputs, and the share that is right."""
    digits = torch.stack([encode(task.answer) for task in tasks]).to(logits.device)    # (B, digits)
    logits = logits[:, -digits.shape[1]:]
    right = (logits.argmax(-1) == digits).float().mean().item()
    return F.cross_entropy(logits.flatten(0, 1), digits.flatten()), {"digits right": right}


def whole_input_loss(model, rng, tasks, total):
    """Loss on inputs with `total` paragraphs of hay: the needle is anywhere, but in a quarter of them at the very end,
    where it is found by other means, as a part of it is in the question's own segment."""
    before = [rng.choice([total, *(rng.randint(0, total) for _ in range(3))]) for _ in tasks]
    inputs = torch.stack([write_input(task, training_hay(rng, total), n) for task, n in zip(tasks, before)])
    inputs = inputs.to(model.embedding.weight.device)
    loss, shown = answer_loss(model(inputs[:, :-1])[0], tasks)
    return loss, inputs.numel(), shown


def plain_loss(model, rng, digits, longest, tokens_per_step, grown):
    """Loss on whole inputs, as in the paper: random keys, depths, and lengths, these from a range that may grow."""
    n_tokens = SHORTEST * (longest / SHORTEST) ** (grown * rng.random())         # log-uniform
    total = paragraphs(n_tokens, one_key("0" * digits))                          # so that 1 is the most frequent
    tasks = training_tasks(rng, max(1, tokens_per_step // (SHORTEST + PARAGRAPH * total)), digits)
    return whole_input_loss(model, rng, tasks, total)


def leaps(periods, growth=3):
    """How often to count each period that is read, so that few readings make many periods: 1, 2, 6, 18, 54, ..."""
    counts = []
    while sum(counts) < periods:
        counts.append(min(max(1, (growth - 1) * sum(counts)), periods - sum(counts)))
    return counts


def fast_forward(model, state, periods, write):
    """The state after `periods` more periods of hay (4 paragraphs = 3 segments each), without reading all of them.

    The hay says the same again and again, so what it writes changes slowly: read one period, and add what it wrote to
    the memory n times instead of once, n in proportion to what came before. Gradients flow through all of it.
    write: number of paragraphs -> their token ids.
    """
    for n in leaps(periods):
        period = write(4).expand(state[0].k.shape[0], -1).to(state[0].k.device)
        _, after = model(period, state)
        state = [State(Memory(*(old + n * (new - old) for old, new in zip(s.memory, a.memory))), a.k, a.v)
                 for s, a in zip(state, after)]
    return state


def fast_forward_loss(model, rng, digits, most=1_200_000, rows=6, **_):
    """Loss on inputs with up to `most` tokens of fast-forwarded hay before the needle, behind it, or both.

    Up to 3 paragraphs more shift everything against the segments' borders.
    """
    tasks, device = training_tasks(rng, rows, digits), model.embedding.weight.device
    write = partial(training_hay, rng)
    before, after = (int(10 * (most / PARAGRAPH / 4 / 10) ** rng.random()) for _ in range(2))    # log-uniform
    before, after = rng.choice([(before, 0), (0, after), (before, after)])
    shift = [write(rng.randint(0, 3)) for _ in range(3)]
    needles = torch.stack([torch.cat([encode(task.needle), shift[1]]) for task in tasks])
    ends = torch.stack([torch.cat([shift[2], encode(task.question), encode(task.answer)]) for task in tasks])
    _, state = model(torch.cat([encode(INTRO), shift[0]])[None].to(device))
    _, state = model(needles.to(device), copies(fast_forward(model, state, before, write), rows))
    logits, _ = model(ends[:, :-1].to(device), fast_forward(model, state, after, write))
    loss, shown = answer_loss(logits, tasks)
    read = 4 * PARAGRAPH * (len(leaps(before)) + rows * len(leaps(after))) + needles.numel() + ends.numel()
    return loss, read, shown


def named_keys(rng, n_keys):
    """Keys of one digit, each with a name, all in one needle: a Task for each."""
    names, keys = rng.sample(NAMES, n_keys), rng.choices("0123456789", k=n_keys)
    needle = " ".join(map(NAMED.format, names, keys))
    return [Task(needle, NAMED_QUESTION.format(name), key) for name, key in zip(names, keys)]


def named_loss(model, rng, digits, tokens_per_step, grown, **_):
    """Loss on all the keys, of one digit, in inputs with up to 32 of them, each asked for in a copy of the same state.

    At first there are eight and nothing else: they and the question fit in one segment, where softmax attention learns
    in some hundred steps to bind keys to names. The memory takes over its queries and keys; in our trials it did not learn
    that alone. From a fifth of the growth on there are 1 to 32 keys, from two fifths on more and more hay.
    """
    n_keys, total = 8, 0
    if grown >= 0.2:
        n_keys, total = max(1, int((len(NAMES) + 1) * rng.random() ** 2)), rng.randint(0, int(5 * grown - 1))
    rows = max(1, tokens_per_step // (10 * n_keys + PARAGRAPH * total))    # a key is 4 tokens, and a copy of the state
    asked, before = [named_keys(rng, n_keys) for _ in range(rows)], rng.randint(0, total)
    texts = torch.stack([write_input(Task(tasks[0].needle, "", ""), training_hay(rng, total), before) for tasks in asked])
    if not total:
        texts = texts[:, len(encode(INTRO)):]
    tasks, device = list(itertools.chain(*asked)), model.embedding.weight.device
    questions = torch.stack([encode(task.question) for task in tasks]).to(device)
    loss, shown = answer_loss(model(questions, copies(model(texts.to(device))[1], n_keys))[0], tasks)
    return loss, texts.numel() + questions.numel(), shown


LOSSES = {"fast-forward": (plain_loss, fast_forward_loss), "named": (named_loss,)}    # in turn; else plain_loss


def loss_function(training, seed, digits, steps):
    """The loss_of(model, step) of a way of training. Inputs grow in its first 30% (80% with named keys), unless it is
    fine-tuning."""
    _, longest, tokens_per_step = TRAININGS[training]
    growing = 0.8 if training == "named" else 0.3
    losses, tuned = LOSSES.get(training, (plain_loss,)), training in TUNED

    def loss_of(model, step):
        rng = random.Random(f"{seed} tuned/{step}" if tuned else f"{seed}/{step}")
        return losses[step % len(losses)](model, rng, digits, longest=longest, tokens_per_step=tokens_per_step,
                                          grown=1.0 if tuned else min(1, step / steps / growing))
    return loss_of


def train_one(args, training, start=None, **config):
    """Train one model, from the checkpoint `start` if it is fine-tuned. Returns its checkpoint's path."""
    steps = args.steps or TRAININGS[training][0]
    rates = dict(lr=2e-3 if start else 4e-3, gate_lr=1e-2)
    if training == "local":
        config["attention"] = "local"
    if training == "one-rate":
        rates["gate_lr"] = rates["lr"]
    torch.manual_seed(args.seed)
    model = load_model(start)[0] if start else InfiniTransformer(model_config(**config))
    kind = [str(config[key]) for key in ("update", "d_key") if key in config]
    name = "-".join(["passkey", training, *kind, f"seed{args.seed}"])
    print(f"{name}: {steps} steps, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    settings = dict(training=training, seed=args.seed, digits=args.digits or DIGITS)
    train(model.to(args.device), loss_function(training, args.seed, settings["digits"], steps), steps,
          args.out / f"{name}.pt", **rates, resume=args.resume, settings=settings)
    return args.out / f"{name}.pt"


# --- Evaluation ----------------------------------------------------------------------------------------------------

def copies(state, n):
    """The state of each document as that of n documents that all began alike: a state is a value."""
    def times(part):
        return part.repeat_interleave(n, 0)
    return [State(s.memory and Memory(*map(times, s.memory)), times(s.k), times(s.v)) for s in state]


class Found(NamedTuple):
    """What a model found in inputs of one length, with the keys at one depth."""
    tokens: int
    depth: float
    digits_right: float     # shares
    keys_right: float
    us_per_token: float     # of the hay read since the find before
    peak_mb: float          # of the process


def find(model, tasks, lengths, depths, hay="paper"):
    """Hide each needle in inputs of at least n tokens, n in `lengths`, at each depth, and ask for it. Yields Founds.

    Nothing is told: the model writes all digits itself. Inputs are streamed, and what they have in common is read once:
    what precedes the needles, for all of them; what follows them, up to the length at which one of the inputs ends.
    """
    if not lengths:
        return
    device, B = model.embedding.weight.device, len(tasks)
    needles, questions, answers = (torch.stack([*map(encode, texts)]).to(device) for texts in zip(*tasks))
    cells = {}    # (paragraphs before the needle, behind it) -> [(n, depth)]
    for n, depth in itertools.product(lengths, depths):
        total = paragraphs(n, tasks[0])
        before = round(depth * total)
        cells.setdefault((before, total - before), []).append((n, depth))
    most = dict(sorted(cells))    # paragraphs before the needle -> the most that are behind it
    progress = Progress(0, PARAGRAPH * (max(most) + B * sum(most.values())) + 1, "tokens read")

    def read(state, n, rng):
        batch = state[0].k.shape[0]
        at_once = max(4, 80 // batch)                                         # never more than some 2,000 tokens
        for i in range(0, n, at_once):
            text = write_hay(hay, min(at_once, n - i), rng).expand(batch, -1).to(device)
            _, state = stream(model, text, state)
            progress.show(progress.tokens + text.numel(), text.numel())
        return state

    _, prefix = stream(model, encode(INTRO)[None].to(device))
    reached, rng_before = -1, random.Random("before")
    for before, behind in sorted(cells):
        if before > reached:
            prefix = read(prefix, before - max(0, reached), rng_before)
            _, state = stream(model, needles, copies(prefix, B))
            reached, passed, rng_behind = before, 0, random.Random("behind")
        start, tokens = time.perf_counter(), progress.tokens
        state, passed = read(state, behind - passed, rng_behind), behind
        seconds, tokens = time.perf_counter() - start, progress.tokens - tokens
        written = generate(model, questions, answers.shape[1], temperature=0, state=state)
        right = written[:, questions.shape[1]:] == answers
        for n, depth in cells[before, behind]:
            yield Found(n, depth, right.float().mean().item(), right.all(1).float().mean().item(),
                        1e6 * seconds / tokens if tokens else math.nan, peak_memory())
    progress.close(keep=False)


# --- Tables and pictures -------------------------------------------------------------------------------------------

def short(n):
    """32768 -> 32K"""
    for unit, name in ((2 ** 20, "M"), (2 ** 10, "K")):
        if n % unit == 0:
            return f"{n // unit}{name}"
    return f"{n:,}"


def print_row(name, cells):
    print(f"{name:28}" + "".join(f"{cell:>13}" for cell in cells), flush=True)


def percents(shares):
    """start/middle/end, or the lowest of many."""
    shares = list(shares)
    return "/".join(f"{100 * share:.0f}" for share in (shares if len(shares) < 4 else [min(shares)]))


def print_found(name, found, lengths, paper):
    """A model's rows: digits, the paper's, whole keys, and what a token cost on the way from length to length."""
    cells = [sorted((f for f in found if f.tokens == n), key=lambda f: f.depth) for n in lengths]
    print_row(name, [percents(f.digits_right for f in cell) for cell in cells])
    if set(lengths) & set(paper):
        print_row("    in the paper", [paper.get(n, "") for n in lengths])
    print_row("    whole keys", [percents(f.keys_right for f in cell) for cell in cells])
    print_row("    us/token, peak MB so far", [f"{row[0].us_per_token:.1f}, {row[0].peak_mb:.0f}" for row in cells])


def draw(results, path):
    """A heat map for each model, depth by length; if there is one depth, lines. results: pairs (name, Founds)."""
    if len({f.depth for _, found in results for f in found}) == 1:
        curves = {name: ([f.tokens / model_config().segment_len for f in found], [100 * f.digits_right for f in found])
                  for name, found in results}
        return draw_lines(curves, path, xlabel="segments in the input", ylabel="digits right (%)")
    columns = min(2, len(results))
    figure, axes = panels(math.ceil(len(results) / columns), columns)
    for axis in axes.flat[len(results):]:
        axis.set_visible(False)
    for axis, (name, found) in zip(axes.flat, results):
        lengths, depths = (sorted({f[i] for f in found}) for i in (0, 1))
        share = {f[:2]: 100 * f.digits_right for f in found}
        image = heat_map(axis, [[share[n, d] for n in lengths] for d in depths], 100, "{:.0f}",
                         x=[short(n) for n in lengths], y=[f"{d:.0%}" for d in depths])
        axis.set_title(name, fontsize=9)
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


def names_of(names):
    """An argument type: some of the names, or all."""
    def parse(text):
        if text not in names:
            raise argparse.ArgumentTypeError(f"was {text!r}, must be of {', '.join(names)}; or all")
        return text
    return lambda text: list(names) if text == "all" else several(parse)(text)


def parse_arguments():
    parser = Parser(description="Find a pass key in up to a million tokens: the paper's section 4.3 and Table 3.")
    parser.add_argument("what", nargs="?", choices=["table", "dilution", "capacity"], default="table",
                        help="Table 3, how thin a key gets, or how many keys fit in (default: %(default)s)")
    add_common_arguments(parser)
    parser.add_argument("--rule", choices=["linear", "delta", "both"], default="both",
                        help="update rule of the memory: Eq. 8, Eq. 9, or one model for each (default: %(default)s)")
    add_options(parser, [
        ("training", names_of(ROWS), "local,zero-shot,plain,fast-forward",
         f"of {', '.join(ROWS)}; what they are: top of passkey.py"),
        ("steps", whole(1), None, "steps of every stage of training (default: 4800, of fine-tuning 1600, for capacity 4000)"),
        ("digits", whole(3, 9), None, f"digits of a key (default: {DIGITS}, or what a loaded model was trained on)"),
        ("text", names_of(TEXTS), "paper", f"texts to look in, of {', '.join(TEXTS)}, or all"),
        ("lengths", several(tokens), "1K,32K,128K,256K,512K,1M",
         "lengths of the texts, in tokens; 1K is 1024, 1M is 1024K"),
        ("depths", several(percent), "0,50,100", "where the key is, in %% of the hay"),
        ("keys", whole(1, 500), 20, "keys per cell"), ("eval-seed", whole(0), 1234, "draws those keys")])
    parser.add_argument("--load", type=Path, nargs="+", metavar="FILE", help="don't train: evaluate these checkpoints")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the table for a program (default: OUT/passkey.csv)")
    return parser.parse_args()


def train_all(args, rules):
    """Train what the table needs. Returns the paths of the checkpoints."""
    made = {}

    def make(training, rule):
        if (training, rule) not in made:
            start = make("zero-shot", rule) if training in TUNED else None
            made[training, rule] = train_one(args, training, start, **(dict(update=rule) if rule else {}))
        return made[training, rule]
    return list(dict.fromkeys(make(training, None if training == "local" else rule)
                              for rule in rules for training in args.training))


def load_for_table(path, device):
    """A model of the table, its way of training, update rule and seed, and the digits of a key that it was told of."""
    model, settings = load_model(path, device)
    if settings.get("training") not in ROWS or not {"seed", "digits"} <= set(settings):
        raise ValueError(f"{path} was of another task, must be a checkpoint of passkey.py's table")
    rule = model.config.update if model.config.attention == "infini" else "-"
    return model, (settings["training"], rule, settings["seed"]), settings["digits"]


def table(args, rules):
    """Table 3: train or load models, look for keys, print the rows, and leave them in a CSV file and a picture."""
    path = args.csv or args.out / "passkey.csv"
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--csv was {path}, must be a file in a folder that exists")
    models = [load_for_table(path, args.device) for path in args.load or train_all(args, rules)]
    results, few = [], len(args.depths) < 4
    depths = "/".join(f"{depth:.0%}" for depth in args.depths) + " of the hay" if few else f"the worst of {len(args.depths)} depths"
    print(f"\nDigits right in %, key at {depths}, {args.keys} held-out keys a cell, half as many beyond 32K")
    print_row("training, rule, seed", [short(n) for n in args.lengths])
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["training", "rule", "seed", "text", *Found._fields])
        for (model, who, trained), text in itertools.product(models, args.text):
            hay, needle, digits = TEXTS[text]
            digits = digits or args.digits or trained
            keys = draw_keys(random.Random(f"evaluation {args.eval_seed}"), args.keys, digits, True)
            tasks, found = [one_key(key, needle) for key in keys], []
            for asked, lengths in ((tasks, [n for n in args.lengths if n <= 2 ** 15]),
                                   (tasks[::2], [n for n in args.lengths if n > 2 ** 15])):
                for cell in find(model, asked, lengths, args.depths, hay):
                    found.append(cell)
                    rows.writerow([*who, text, *cell])
                    file.flush()
            name = " ".join(map(str, who)) + (f" {text}" if text != "paper" else "")
            paper = PAPER.get(who[:2], "") if text == "paper" and args.depths == [0, 0.5, 1] else ""
            print_found(name, found, args.lengths, dict(zip(PAPER_LENGTHS, paper.split())))
            results.append((name, found))
    draw(results, args.out / "passkey.png")


@torch.no_grad()
def needle_shares(model, task, lengths):
    """How much of what the memory answers to the question comes from the needle, at the start of longer and longer hay.

    That is the share of its tokens' sigma(k) in sigma(q) z, at the question's last token. (Under the delta rule M is
    no plain sum: there it is the share of the normaliser only.) Yields n and the shares, (n_layers, n_heads).
    """
    heard = {}    # layer -> what it was given in the last call
    hooks = [block.attention.register_forward_pre_hook(lambda layer, inputs: heard.update({layer: inputs[0]}))
             for block in model.blocks]

    def hear(text, state):
        return stream(model, text[None].to(model.embedding.weight.device), state)[1]
    try:
        state, question = hear(encode(task.needle), hear(encode(INTRO), None)), encode(task.question)
        needle = [sigma(layer.project(x)[1]).sum(2) for layer, x in heard.items()]    # (1, H, d_key) for each layer
        passed = 0
        for n in sorted(lengths):
            total = paragraphs(n, task)
            if total > passed:
                state, passed = hear(encode(HAY).repeat(total - passed), state), total
            before = hear(question[:-1], state)
            hear(question[-1:], before)
            yield n, torch.stack([retrieve(layer.project(x)[0], Memory(k.unsqueeze(-1), s.memory.z))[0, :, 0, 0]
                                  for (layer, x), k, s in zip(heard.items(), needle, before)])
    finally:
        for hook in hooks:
            hook.remove()


def dilution(args, rules):
    """Why keys are lost: the needle's share of what the memory answers, in the head where it is largest at first."""
    if min(args.lengths) < 128:
        raise ValueError(f"--lengths was {min(args.lengths)}, must be 128 or more: the needle must have entered the memory")
    args.training = [training for training in args.training if training != "local"]    # that has no memory
    models, curves = [load_for_table(path, args.device) for path in args.load or train_all(args, rules)], {}
    models = [(model, who) for model, who, _ in models if model.config.attention == "infini"]
    if not models:
        raise ValueError("--training or --load was only of local models, must have one with a memory")
    print_row("Needle's share in %", [short(n) for n in sorted(args.lengths)])
    for model, who in models:
        shares = torch.stack([share.flatten() for _, share in needle_shares(model, one_key("9054"), args.lengths)])
        shares, name = (100 * shares[:, shares[0].argmax()]).tolist(), " ".join(map(str, who))
        print_row(name, [f"{share:.3g}" for share in shares])
        curves[name] = sorted(args.lengths), shares
    draw_lines(curves, args.out / "dilution.png", xlabel="tokens in the input, the needle first",
               ylabel="needle's share (%)")


def capacity(args, rules):
    """Named keys in one input, each of them asked for: how many does a memory of which size hold?"""
    if args.load or args.digits:
        name = "load" if args.load else "digits"
        raise ValueError(f"--{name} was given, must be absent for capacity: it trains models of its own, on keys of 1 digit")
    numbers, curves = [2 ** i for i in range(6)], {}
    print_row("Digits right in %, keys:", numbers)
    for d_key in (16, 32, 64):
        for rule in rules:
            model, _ = load_model(train_one(args, "named", None, update=rule, d_key=d_key), args.device)
            right = []
            for n_keys in numbers:
                rng = random.Random(f"evaluation {args.eval_seed}")
                tasks = [task for _ in range(args.keys) for task in named_keys(rng, n_keys)]
                length = len(write_input(tasks[0], encode(HAY).repeat(4), 0))
                right += [found.digits_right for found in find(model, tasks, [length], [0.5])]
            curves[f"{rule}, d_key = {d_key}"] = numbers, [100 * share for share in right]
            print_row(f"{rule}, d_key = {d_key}", [percents([share]) for share in right])
    draw_lines(curves, args.out / "capacity.png", xlabel="named keys in the input", ylabel="digits right (%)")


def main():
    args = parse_arguments()
    prepare(args)
    rules = ["linear", "delta"] if args.rule == "both" else [args.rule]
    {"table": table, "dilution": dilution, "capacity": capacity}[args.what](args, rules)


if __name__ == "__main__":
    run(main)
