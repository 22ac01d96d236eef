"""The paper's main task (section 4.3): find a pass key in a long irrelevant text.

    python passkey.py                              train in each way, then look for keys
    python passkey.py --load assets/passkey-*.pt   only look

The prompt is the paper's (appendix B), word for word. A token is a word, a punctuation
mark or a digit; the prompt needs 53. Evaluation keys never occur in training.

Departure: the paper trains on its own prompt only. Here at least half of the filler is not
the paper's paragraph, and some keys have 3, 5 or 6 digits. A model that sees one paragraph
only learns to ignore that one.
"""

import math
import random
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F

import common
import train
from common import Progress, format_length, print_row, side_by_side
from infini import InfiniConfig, InfiniTransformer, State, generate

# --- The prompt -----------------------------------------------------------------------

INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. "
    "Find it and memorize them. "
    "I will quiz you about the important information there."
)
HAY = (
    "The grass is green. The sky is blue. The sun is yellow. "
    "Here we go. There and back again."
)
NEEDLE = "The pass key is {0}. Remember it. {0} is the pass key."
QUESTION = "What is the pass key? The pass key is"
DIGITS = 4    # of a key


def tokenize(text):
    """Split text into words, punctuation marks and digits."""
    return re.findall(r"\d|\w+|[^\w\s]", text)


PROMPT = " ".join([INTRO, HAY, NEEDLE.format("0123456789"), QUESTION])
VOCABULARY = sorted(set(tokenize(PROMPT)))
TOKEN = {word: i for i, word in enumerate(VOCABULARY)}
WORDS = [word for word in VOCABULARY if not word.isdigit()]
PARAGRAPH = len(tokenize(HAY))    # 24 tokens


@lru_cache(4096)
def token_ids(text):
    """Turn text into a list of token ids. Raises ValueError on a word of no prompt."""
    ids = []
    for word in tokenize(text):
        if word not in TOKEN:
            raise ValueError(f"{word!r} is not one of the prompt's {len(TOKEN)} words")
        ids.append(TOKEN[word])
    return ids


def encode(text):
    """Turn text into (T,) token ids. Raises as `token_ids`."""
    return torch.tensor(token_ids(text), dtype=torch.long)


class Task(NamedTuple):
    """Holds what is hidden in the hay, what is asked at the end, and the right answer."""

    needle: str
    question: str
    answer: str


def one_key(key, needle=NEEDLE):
    """Make the task to find one key. The needle may also hold {1}, the key backwards."""
    return Task(needle.format(key, key[::-1]), QUESTION, key)


def write_hay(kind, n, rng):
    """Write n paragraphs, (24 n,) ids.

    kind: the "paper"'s paragraph, its sentences "shuffled", or random "words" of the
    prompt. Raises ValueError on another kind.
    """
    if kind == "paper":
        return encode(HAY).repeat(n)
    if kind == "words":
        return torch.tensor(rng.choices([TOKEN[w] for w in WORDS], k=PARAGRAPH * n)).long()
    if kind != "shuffled":
        raise ValueError(f"hay must be paper, shuffled or words, not {kind!r}")

    sentences = [encode(sentence) for sentence in re.findall(r"\w[^.]+\.", HAY)]
    text = [encode("")]
    for _ in range(n):
        text += rng.sample(sentences, len(sentences))
    return torch.cat(text)


def write_input(task, hay, before):
    """Write an input and its answer, (T,) ids. The needle stands at `before` in the hay."""
    needle, question, answer = (encode(text) for text in task)
    return torch.cat([encode(INTRO), hay[:before], needle, hay[before:], question, answer])


def tokens_without_hay(task):
    """Count the tokens of an input that has no hay, with its answer."""
    return len(write_input(task, encode(""), 0))


def paragraphs(n_tokens, task):
    """Return how many paragraphs of hay make an input of at least n_tokens."""
    return max(0, math.ceil((n_tokens - tokens_without_hay(task)) / PARAGRAPH))


def is_held_out(key):
    """Tell whether a key is kept for the evaluation. One in ten is, chosen by a hash."""
    return int(key) * 2_654_435_761 % 2 ** 32 % 1000 < 100


def draw_keys(rng, n, digits, held_out):
    """Draw n keys for the evaluation (held out), all different, or for training.

    A training key has at most five different digits, drawn anew per key, since keys that
    repeat a digit are the hard ones. Raises ValueError if so many are not held out.
    """
    most = 10 ** digits // 11    # about one in ten is held out
    if held_out and n > most:
        raise ValueError(f"of keys with {digits} digits, at most {most} are held out")

    keys = []
    while len(keys) < n:
        choice = "0123456789" if held_out else rng.sample("0123456789", 5)
        key = "".join(rng.choices(choice, k=digits))
        if is_held_out(key) != held_out:
            continue
        if held_out and key in keys:
            continue
        keys.append(key)
    return keys


# --- Ways of training -----------------------------------------------------------------
#
# A model first learns the task on short inputs. Then it goes on with inputs of up to 5,000
# tokens, as in the paper. Then, and only here, W_Q and W_K grow during as many steps again.
# Each step draws inputs of one length, and asks for the digits at their end.


@dataclass(frozen=True)
class Way:
    """Says how a model is trained."""

    start: Optional[str]    # the way whose model goes on, or None
    steps: int
    longest: int            # tokens of the longest input
    tokens_per_step: int
    lr: float
    memory: bool = True
    grows: bool = False     # whether W_Q and W_K grow


SHORTEST = 64    # tokens of the shortest training input

WAYS = {
    "local": Way(None, 4000, 256, 1024, 4e-3, memory=False),      # the control
    "short": Way(None, 4000, 256, 1024, 4e-3),                    # a new model needs it
    "plain": Way("short", 1600, 5000, 2048, 2e-3),                # as in the paper
    "sharp": Way("plain", 1600, 5000, 2048, 2e-3, grows=True),    # not in the paper
}

# By this factor W_Q and W_K grow in "sharp", in this share of the steps.
GROWTH = {"linear": (6, 0.7), "delta": (4, 0.9)}


def model_config(**other):
    """Return the model's sizes: 138,000 parameters, and segments of 32 tokens."""
    sizes = dict(
        vocab_size=len(VOCABULARY),
        d_model=64,
        n_layers=2,
        n_heads=4,
        d_key=32,
        d_value=32,
        d_ff=256,
        segment_len=32,
        rope_base=50.0,
        gate_init=-2.0,
    )
    return InfiniConfig(**{**sizes, **other})


def draw_hay(rng, n, kinds):
    """Draw n tokens of hay that begin anywhere, so that needles stand anywhere, too."""
    start = rng.randrange(PARAGRAPH)
    kind = rng.choice(kinds)
    return write_hay(kind, math.ceil(n / PARAGRAPH) + 1, rng)[start:start + n]


def draw_inputs(rng, way, longest, N):
    """Draw inputs of one random length, log-uniform up to `longest` tokens.

    N: tokens of a segment. Half of the needles stand at the very end. Returns (B, T) ids
    that end with the answers, and the number of their digits.
    """
    n_tokens = int(SHORTEST * (longest / SHORTEST) ** rng.random())
    digits = rng.choice([DIGITS, DIGITS, rng.randint(3, 6)])
    n_keys = max(1, way.tokens_per_step // n_tokens)
    tasks = [one_key(key) for key in draw_keys(rng, n_keys, digits, held_out=False)]

    # The token before a digit writes it. All of these stand in one segment, and none is
    # its first token, which sees only itself.
    n_other = tokens_without_hay(tasks[0])
    n_hay = max(0, n_tokens - n_other)
    begin = (n_other + n_hay - digits) % N    # the answer's place in its segment
    if begin < 2 or begin + digits > N + 1:
        n_hay += (2 - begin) % N

    kinds = ["paper", "shuffled", "words", "words" if way.start else "paper"]
    places = [rng.choice([n_hay, rng.randint(0, n_hay)]) for _ in tasks]
    inputs = []
    for task, before in zip(tasks, places, strict=True):
        hay = draw_hay(rng, n_hay, kinds)
        inputs.append(write_input(task, hay, before))
    return torch.stack(inputs), digits


def answer_loss(model, inputs, digits):
    """Compute the cross entropy of the last tokens, the digits of the answers.

    The segments before theirs are only read. Returns loss, tokens read, numbers to show.
    """
    N = model.config.segment_len
    cut = (inputs.shape[1] - digits - 1) // N * N
    state = None
    if cut > 0:
        state = model.absorb(inputs[:, :cut])

    logits, _ = model(inputs[:, cut:-1], state)
    logits = logits[:, -digits:]              # (B, digits, vocabulary)
    answers = inputs[:, -digits:]             # (B, digits)
    loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
    right = (logits.argmax(-1) == answers).float().mean().item()
    return loss, inputs.numel(), {"digits right": right}


@torch.no_grad()
def sharpen(model, factor):
    """Multiply W_Q and W_K.

    Below zero sigma is e^x, so twice the weights square the little that hay writes where
    the question reads. Departure: the paper has no such step.
    """
    for block in model.blocks:
        block.attention.w_q.weight *= factor
        block.attention.w_k.weight *= factor


def way_loss(name, seed, steps):
    """Make the loss of a way, as `train` wants it.

    Without a start, inputs grow for 30% of the steps. Where W_Q and W_K grow, they grow a
    little before each of the first steps. The other steps repair what that has broken.
    """
    way = WAYS[name]

    def loss_of(model, step):
        if way.grows:
            factor, share = GROWTH[model.config.update]
            n_growing = max(1, round(share * steps))
            if step < n_growing:
                sharpen(model, factor ** (1 / n_growing))

        grown = 1.0
        if not way.start:
            grown = min(1.0, step / steps / 0.3)
        longest = SHORTEST * (way.longest / SHORTEST) ** grown

        # "local" and "short" see the same inputs, and so do "linear" and "delta".
        rng = random.Random(f"{seed} after {way.start}/{step}")
        inputs, digits = draw_inputs(rng, way, longest, model.config.segment_len)
        return answer_loss(model, inputs.to(model.head.weight.device), digits)

    return loss_of


@dataclass(frozen=True)
class Run:
    """Says which training it is. Together with WAYS it decides every number."""

    way: str
    rule: Optional[str]    # of the memory, or None for a model without one
    seed: int
    steps: int

    def path(self, out):
        name = f"{self.way}-{self.rule}" if self.rule else self.way
        return Path(out) / f"passkey-{name}-seed{self.seed}.pt"

    def config(self):
        if self.rule:
            return model_config(update=self.rule)
        return model_config(attention="local")

    def settings(self):
        """List all that decides the result and is not in the config."""
        lr = WAYS[self.way].lr
        return dict(steps=self.steps, lr=lr, gate_lr=2.5 * lr, training=self.way,
                    rule=self.rule, seed=self.seed, digits=DIGITS)


def plan_runs(ways, rule, seed, steps=None):
    """List the trainings for some ways of a rule, and before each the one it goes on from.

    rule: "linear", "delta", or None for the way without a memory. steps: None is the way's.
    """
    needed = set()
    for name in ways:
        while name:
            needed.add(name)
            name = WAYS[name].start

    runs = []
    for name, way in WAYS.items():
        if name in needed and way.memory == bool(rule):
            runs.append(Run(name, rule, seed, steps or way.steps))
    return runs


def train_runs(runs, out, device="cpu", resume=False):
    """Train one run after the other, in this process. Returns {way: path}."""
    paths = {}
    for run in runs:
        torch.manual_seed(run.seed)
        start = WAYS[run.way].start
        if start:
            model, _ = train.load_model(paths[start])
        else:
            model = InfiniTransformer(run.config())

        path = run.path(out)
        loss_of = way_loss(run.way, run.seed, run.steps)
        train.train(model.to(device), loss_of, path=path, resume=resume, **run.settings())
        paths[run.way] = path
    return paths


# --- Looking for keys -----------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """Says which keys are hidden, where and in what."""

    lengths: list                   # of the inputs, at least, in tokens
    depths: list                    # shares of the hay that stand before the key
    n_keys: int = 20
    seed: int = 1234                # draws the keys
    digits: int = DIGITS
    needle: str = NEEDLE
    hay: str = "paper"

    def tasks(self):
        rng = random.Random(f"evaluation {self.seed}")
        keys = draw_keys(rng, self.n_keys, self.digits, held_out=True)
        return [one_key(key, self.needle) for key in keys]

    def is_the_papers(self):
        same_text = self.needle == NEEDLE and self.hay == "paper" and self.digits == DIGITS
        return same_text and list(self.depths) == [0, 0.5, 1]


class Found(NamedTuple):
    """Holds the accuracy at one length and depth, as shares."""

    tokens: int
    depth: float
    digits_right: float
    keys_right: float


def plan_cells(lengths, depths, task):
    """Plan what to read. Returns {paragraphs before: {paragraphs after: [(n, depth)]}}.

    Both numbers rise, so each cell goes on from the state of one before it.
    """
    cells = {}
    for n in lengths:
        for depth in depths:
            total = paragraphs(n, task)
            before = round(depth * total)
            afters = cells.setdefault(before, {})
            afters.setdefault(total - before, []).append((n, depth))
    return {before: dict(sorted(cells[before].items())) for before in sorted(cells)}


class Hay:
    """Reads hay into a state, and knows how much of it was read."""

    def __init__(self, kind, seed, progress):
        self.kind = kind
        self.rng = random.Random(seed)
        self.progress = progress
        self.n_read = 0    # paragraphs

    def read(self, model, state, n):
        """Read on, up to paragraph n. Returns the next state."""
        batch = len(state[0].k)
        at_once = max(4, 80 // batch)    # at most some 2,000 tokens in a call
        while self.n_read < n:
            now = min(at_once, n - self.n_read)
            text = write_hay(self.kind, now, self.rng).expand(batch, -1)
            state = model.absorb(text.to(model.head.weight.device), state)
            self.n_read += now
            self.progress.show(self.progress.n_tokens + text.numel(), text.numel())
        return state


def copies(state, n):
    """Repeat the state of one document n times."""
    copied = []
    for memory, k, v in state:
        if memory:    # a baseline's may be empty
            parts = [part.repeat_interleave(n, dim=0) for part in memory]
            memory = type(memory)(*parts)
        k = k.repeat_interleave(n, dim=0)
        v = v.repeat_interleave(n, dim=0)
        copied.append(State(memory, k, v))
    return copied


def encode_all(texts):
    """Turn texts into (B, T) ids. Raises ValueError if they are not of one length."""
    ids = [encode(text) for text in texts]
    if len({len(i) for i in ids}) != 1:
        raise ValueError("tasks must be of one length, and at least one")
    return torch.stack(ids)


def ask(model, state, questions, answers):
    """Let the model write its answers. Returns whether each digit is right, (B, digits)."""
    n_digits = answers.shape[1]
    written = generate(model, questions, n_digits, temperature=0, state=state)
    return written[:, -n_digits:] == answers


@torch.no_grad()
def evaluate(model, tasks, lengths, depths, hay="paper"):
    """Hide each needle in long inputs, at each length and depth, and ask for the key.

    The model writes all digits itself. Inputs have at least n tokens, n in `lengths`, and
    are streamed. All keys share the hay before the needle, and all lengths share the hay
    after it, so that is read once. Yields a Found per cell. Raises ValueError if a depth is
    not from 0 to 1 or the tasks are not of one length.
    """
    if not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths must be from 0 to 1, not {depths}")
    device = model.head.weight.device
    needles = encode_all([task.needle for task in tasks]).to(device)
    questions = encode_all([task.question for task in tasks]).to(device)
    answers = encode_all([task.answer for task in tasks]).to(device)

    cells = plan_cells(lengths, depths, tasks[0])
    n_paragraphs = max(cells, default=0)
    for afters in cells.values():
        n_paragraphs += len(tasks) * max(afters)
    progress = Progress("looking", PARAGRAPH * n_paragraphs)

    start = model.absorb(encode(INTRO)[None].to(device))
    hay_before = Hay(hay, "before", progress)
    for before, afters in cells.items():
        start = hay_before.read(model, start, before)
        state = model.absorb(needles, copies(start, len(tasks)))

        hay_after = Hay(hay, "behind", progress)
        for after, names in afters.items():
            state = hay_after.read(model, state, after)
            right = ask(model, state, questions, answers)    # (keys, digits)
            digits_right = right.float().mean().item()
            keys_right = right.all(dim=1).float().mean().item()
            for n, depth in names:
                yield Found(n, depth, digits_right, keys_right)


# --- The table ------------------------------------------------------------------------

PAPER_LENGTHS = [2 ** 15, 2 ** 17, 2 ** 18, 2 ** 19, 2 ** 20]

# Table 3 at these lengths: digits right in %, key at the start/middle/end.
PAPER = {
    "zero-shot linear": "14/13/98 11/14/100 6/3/100 6/7/99 8/6/98",
    "zero-shot delta": "13/11/99 6/9/99 7/5/99 6/8/97 7/6/97",
    "400 steps linear": "100/100/100 100/100/100 100/100/100 97/99/100 96/94/100",
    "400 steps delta": "100/100/100 100/100/99 100/100/99 100/100/100 100/100/100",
}


class Looked(NamedTuple):
    """Holds what was found with one model."""

    way: str
    rule: Optional[str]
    seed: int
    found: list        # a Found per cell

    def name(self):
        return f"{self.way} {self.rule or '-'} {self.seed}"


def load_passkey_model(path, device="cpu"):
    """Load a model that this file trained. Returns it and its settings.

    Raises ValueError if it was trained for something else.
    """
    model, settings = train.load_model(path, device)
    if not {"training", "rule", "seed", "digits"} <= set(settings):
        raise ValueError(f"{path} is not a model of passkey.py")
    return model, settings


def look(path, search, device="cpu"):
    """Look for keys with one model, for half of them beyond 32K tokens."""
    model, settings = load_passkey_model(path, device)
    tasks = search.tasks()
    near = [n for n in search.lengths if n <= 2 ** 15]
    far = [n for n in search.lengths if n > 2 ** 15]
    found = [
        *evaluate(model, tasks, near, search.depths, search.hay),
        *evaluate(model, tasks[::2], far, search.depths, search.hay),
    ]
    return Looked(settings["training"], settings["rule"], settings["seed"], found)


def format_cell(found, n):
    """Write the percents at one length as 100/98/100, or the worst of more than three."""
    percents = [round(100 * cell.digits_right) for cell in found if cell.tokens == n]
    if len(percents) > 3:
        return str(min(percents))
    return "/".join(str(percent) for percent in percents)


def print_header(search):
    depths = "/".join(f"{depth:.0%}" for depth in search.depths)
    if len(search.depths) > 3:
        depths = f"the worst of {len(search.depths)} depths"
    n_far = math.ceil(search.n_keys / 2)
    print(f"\nDigits right in %, key at {depths} of hay, "
          f"{search.n_keys} keys ({n_far} above 32K)")
    print_row("training, rule, seed", [format_length(n) for n in search.lengths])


def print_result(looked, search):
    """Print a row, and the paper's below it if it is of the same text."""
    print_row(looked.name(), [format_cell(looked.found, n) for n in search.lengths])

    theirs = "zero-shot" if looked.way == "short" else "400 steps"
    cells = PAPER.get(f"{theirs} {looked.rule}", "").split()
    paper = dict(zip(PAPER_LENGTHS, cells, strict=False))
    if search.is_the_papers() and set(paper) & set(search.lengths):
        print_row(f"    the paper, {theirs}", [paper.get(n, "") for n in search.lengths])


def table(paths, search, csv_path, device="cpu"):
    """Look for keys with all models, side by side, and print a row for each.

    All cells go into a CSV file. Returns a Looked per model.
    """
    for path in paths:
        load_passkey_model(path)    # a bad one is refused before all work

    print_header(search)
    results = []
    jobs = [(path, search, device) for path in paths]
    for looked in side_by_side(look, jobs):
        print_result(looked, search)
        results.append(looked)

    rows = []
    for path, looked in zip(paths, results, strict=True):
        for cell in looked.found:
            rows.append([looked.way, looked.rule, looked.seed, *cell, path])
    header = ["training", "rule", "seed", *Found._fields, "model"]
    common.write_csv(csv_path, header, rows)
    return results


def draw(results, search, path):
    """Draw a heat map for each model, two beside each other if their number is even."""
    columns = 1 if len(results) % 2 == 1 else 2
    rows = len(results) // columns
    height = max(2.4, 0.2 * len(search.depths))
    figure, axes = common.new_figure(6 * columns, 0.8 + height * rows, rows, columns,
                                     squeeze=False, sharex=True)

    x = [format_length(n) for n in search.lengths]
    y = [f"{depth:.0%}" for depth in search.depths]
    for axis, looked in zip(axes.flat, results, strict=True):
        share = {(cell.tokens, cell.depth): cell.digits_right for cell in looked.found}
        grid = []
        for depth in search.depths:
            grid.append([100 * share[n, depth] for n in search.lengths])
        image = common.heat_map(axis, grid, 100, "{:.0f}", x, y)
        axis.set_title(looked.name())
        axis.set_ylabel("depth of the key")

    for axis in axes[-1]:
        axis.set_xlabel("length of the input (tokens)")
    figure.colorbar(image, ax=axes, label="digits right (%), chance is 10")
    common.save_figure(figure, path)


# --- The command ----------------------------------------------------------------------


def add_search_arguments(parser, lengths):
    """Add what is looked for."""
    add = parser.add_argument
    add("--lengths", type=common.listed(common.length), default=lengths, help="in tokens")
    add("--depths", type=common.listed(common.percent), default="0,50,100",
        help="of the key, in %%")
    add("--keys", type=common.count, default=20, help="keys per cell")
    add("--eval-seed", type=common.seed, default=1234, help="draws these keys")


def training(text):
    """Read the name of a way of training, as an argument's type."""
    if text not in WAYS:
        raise ValueError
    return text


def train_all(args):
    """Train what the command line asks for, rules side by side. Returns all paths."""
    rules = ["linear", "delta"] if args.rule == "both" else [args.rule]
    if "local" in args.training:
        rules = [None, *rules]

    plans = []
    for rule in rules:
        runs = plan_runs(args.training, rule, args.seed, args.steps)
        if runs:
            plans.append(runs)
        for run in runs:    # each file is looked at before the first step
            train.find_start(run.path(args.out), run.config(), run.settings(), args.resume)

    jobs = [(runs, args.out, args.device, args.resume) for runs in plans]
    wanted = []
    for paths in side_by_side(train_runs, jobs):
        wanted += [path for way, path in paths.items() if way in args.training]
    return wanted


def main():
    parser = common.new_parser("Find a pass key in up to a million tokens.")
    what = parser.add_mutually_exclusive_group()
    common.add_files_argument(what, "only look, with these models", required=False)
    what.add_argument("--training", type=common.listed(training),
                      default="local,short,plain,sharp", help="see WAYS in passkey.py")

    add = parser.add_argument_group("for training").add_argument
    add("--rule", choices=["linear", "delta", "both"], default="both", help="of the memory")
    add("--steps", type=common.count, help="of each training; unset, see WAYS")
    add("--seed", type=common.seed, default=0, help="of weights and training inputs")
    add("--resume", action="store_true", help="go on with trainings that were stopped")
    add_search_arguments(parser, lengths="1K,32K,128K,256K,512K,1M")
    common.add_shared_arguments(parser)
    args = parser.parse_args()
    common.set_threads(args.threads)

    search = Search(args.lengths, args.depths, args.keys, args.eval_seed)
    search.tasks()    # too many keys are refused before all work
    paths = args.load or train_all(args)
    results = table(paths, search, args.out / "passkey.csv", args.device)
    draw(results, search, args.out / "passkey.png")


if __name__ == "__main__":
    # Worker processes find functions by the name of their module, which is not __main__.
    from passkey import main
    common.run_command(main)
