"""Why does Delta hold more than Linear once it is trained, although untrained it errs more?

    python -m experiments.phantom            five minutes on two cores
    python -m experiments.phantom --quick    one minute

Keys overlap, so each key also reads a little of every other key's value. The part that all
keys read we call the phantom, and we compute it by reading with z. Delta (Eq. 9) writes a
value less what its key reads already, so a new key stores its value less the phantom. In
an untrained memory this is an error. We ask whether it is Delta's gain in a trained one.
"""

import sys
from itertools import product
from statistics import mean

import torch
import torch.nn.functional as F

import common
import train
from common import print_row, side_by_side
from experiments import recall
from experiments.recall import RecallModel, draw_pairs
from infini import UPDATE, Memory, normaliser, retrieve, sigma, update_linear

SMALL_KEY = 16                      # numbers per key in untrained memories
UNTRAINED_PAIRS = [2, 8, 16, 32, 64]
TRIALS = 100
CANDIDATES = 512                    # values to choose from
NEUTRAL = -2.0                      # in every feature of the neutral key
DIAL = [-8, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 2, 3, 5]

D_KEY = 32                          # numbers per key in trained models
N_PAIRS = [8, 16, 32, 64]
N_ASKED = 32                        # pairs, where something else is subtracted

# --- What is subtracted from a value before it is written -----------------------------


def nothing(memory, k):
    return 0.0


def all_it_reads(memory, k):
    return retrieve(k, memory)


def phantom(memory, k):
    """Read with z, the sum of all keys, whatever k is. Returns (..., 1, d_value)."""
    z = memory.z.unsqueeze(-2)                           # (..., 1, d_key)
    return z @ memory.M / normaliser(z, memory.z)


def all_but_phantom(memory, k):
    return retrieve(k, memory) - phantom(memory, k)


def noise(memory, k):
    """Draw random directions, as long as what the keys read."""
    read = retrieve(k, memory)                           # (..., T, d_value)
    return F.normalize(torch.randn_like(read), dim=-1) * read.norm(dim=-1, keepdim=True)


def others_phantom(memory, k):
    """Take the phantom of another document in the batch."""
    return phantom(memory, k).roll(1, dims=0)


SUBTRACT = {
    "nothing (Linear, Eq. 8)": nothing,
    "another memory's phantom": others_phantom,
    "noise of that norm": noise,
    "all but the phantom": all_but_phantom,
    "the phantom alone": phantom,
    "all it reads (Delta, Eq. 9)": all_it_reads,
}
FROM_READ = "the phantom, from the read"
EQUATION = {"linear": nothing, "delta": all_it_reads}


def without_phantom(memory):
    """Change M so that each read is less by the phantom: sigma(q) z p / sigma(q) z = p."""
    p = phantom(memory, None)                            # (..., 1, d_value)
    return Memory(memory.M - memory.z.unsqueeze(-1) @ p, memory.z)


# --- Untrained memories ---------------------------------------------------------------


def overlap(k):
    """Compute the mean cosine between sigma of two keys. k: (..., n, d_key)."""
    unit = F.normalize(sigma(k), dim=-1)
    cosines = unit @ unit.mT                             # (..., n, n)
    n = k.shape[-2]
    of_others = cosines.sum((-2, -1)) - n                # each has 1 with itself
    return (of_others / (n * n - n)).mean().item()


def sparse_keys(n, elsewhere=-8.0):
    """Give each key a feature of its own, at 8. When all are taken, they are shared."""
    own = F.one_hot(torch.arange(n) % SMALL_KEY, SMALL_KEY) > 0
    return torch.where(own, 8.0, elsewhere).expand(TRIALS, 1, -1, -1)


def store_and_name(rule, keys, generator, neutral=False):
    """Write pairs one by one, then read them all. keys: (TRIALS, 1, n, d_key).

    neutral: write a key first that is the same in all features, with the value 0.
    Returns the relative error, and the percentage of values that are named right. Named is
    the candidate with the largest inner product.
    """
    n, d_key = keys.shape[-2:]
    candidates = torch.randn(TRIALS, 1, CANDIDATES, 32, generator=generator)
    values = candidates[:, :, :n]

    memory = Memory.empty(TRIALS, 1, d_key, 32)
    if neutral:
        key = torch.full((TRIALS, 1, 1, d_key), NEUTRAL)
        memory = update_linear(memory, key, torch.zeros(TRIALS, 1, 1, 32))
    for k, v in zip(keys.split(1, dim=2), values.split(1, dim=2), strict=True):
        memory = UPDATE[rule](memory, k, v)

    read = retrieve(keys, memory)                        # (TRIALS, 1, n, 32)
    error = (read - values).square().sum() / values.square().sum()
    right = (read @ candidates.mT).argmax(-1) == torch.arange(n)
    return error.item(), 100 * right.float().mean().item()


def measure_untrained(kind, rule, neutral):
    """Fill untrained memories. Returns {number of pairs: (error, % named right)}."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for n in UNTRAINED_PAIRS:
        keys = sparse_keys(n)
        if kind == "random":
            keys = torch.randn(TRIALS, 1, n, SMALL_KEY, generator=generator)
        found[n] = store_and_name(rule, keys, generator, neutral)
    return found


def turn_dial(rule):
    """Let 16 sparse keys overlap more and more. Returns {overlap: % named right}."""
    found = {}
    for elsewhere in DIAL:
        keys = sparse_keys(SMALL_KEY, float(elsewhere))
        _, right = store_and_name(rule, keys, torch.Generator().manual_seed(3))
        found[overlap(keys)] = right
    return found


def print_untrained():
    """Print relative errors and what is named right."""
    print_row("Untrained: error, % right", UNTRAINED_PAIRS, 36, 11)
    for kind in ("sparse", "random"):
        for neutral in (False, True):
            for rule in UPDATE:
                name = f"{kind} keys, {rule}"
                if neutral:
                    name += ", neutral first"
                found = measure_untrained(kind, rule, neutral)
                cells = [f"{error:.2f}, {right:.0f}" for error, right in found.values()]
                print_row(name, cells, 36, 11)


def print_dial(dial):
    """Print what is named right by overlap. dial: {rule: {overlap: %}}."""
    print_row("\nOverlap of 16 keys", [f"{x:.2f}" for x in dial["linear"]], 20, 6)
    for rule, found in dial.items():
        print_row(f"{rule}, % right", [f"{right:.0f}" for right in found.values()], 19, 6)


# --- Trained models -------------------------------------------------------------------


def written_tokens(model, pairs):
    """Write each pair as one token. Returns (B, n, 64)."""
    return torch.cat([model.key_vectors[pairs.keys], model.value_vectors[pairs.values]], -1)


def segments(*tensors):
    """Cut (B, 1, n, d) into segments. Yields a tuple for each of them."""
    return zip(*(x.split(8, dim=2) for x in tensors), strict=True)


def answer(model, pairs, subtract, from_read=False):
    """Write pairs, less what `subtract` says, then ask. Questions are not written.

    from_read: take the phantom out of the memory before it is read. Returns logits.
    """
    layer = model.layer
    _, k, v = layer.project(written_tokens(model, pairs))
    memory = layer.empty_memory(k, v)
    for k_s, v_s in segments(k, v):
        memory = update_linear(memory, k_s, v_s - subtract(memory, k_s))
    if from_read:
        memory = without_phantom(memory)

    asked = F.pad(model.key_vectors[pairs.questions], (0, 32))
    q, k, v = layer.project(asked)                       # (B, 1, n, d)
    a = [layer.read(q_s, k_s, v_s, memory) for q_s, k_s, v_s in segments(q, k, v)]
    o = layer.w_o(torch.cat(a, dim=2).flatten(0, 1))     # there is one head
    return model.head(o)


def train_model(model, rule, questions_written, seed, steps):
    """Train as experiments/recall.py does, on up to 64 pairs."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = train.make_optimizer(model, lr=5e-3, gate_lr=1e-2)
    for step in range(steps):
        n = N_PAIRS[-1] if step % 2 == 0 else N_PAIRS[step // 2 % len(N_PAIRS)]
        pairs = draw_pairs(n, recall.TRAINING_PAIRS // n, generator, twice=False)

        if questions_written:
            logits = model(pairs.keys, pairs.values, pairs.questions)
        else:
            logits = answer(model, pairs, EQUATION[rule])
        loss = F.cross_entropy(logits.flatten(0, 1), pairs.answers.flatten())

        share = train.schedule(step, steps, warmup=50)
        train.take_step(model, optimizer, loss, share)


def score(logits, pairs):
    """Compute how many answers in 100 are right."""
    return 100 * (logits.argmax(-1) == pairs.answers).float().mean().item()


def key_overlap(model):
    """Compute the overlap of the keys that a model writes."""
    _, k, _ = model.layer.project(written_tokens(model, evaluation_pairs(N_ASKED)))
    return overlap(k)


def evaluation_pairs(n):
    """Draw the same pairs for every model."""
    generator = torch.Generator().manual_seed(99)
    return draw_pairs(n, recall.EVALUATED_PAIRS // n, generator, twice=False)


@torch.no_grad()
def evaluate(model, rule):
    """Ask a model in all ways. Returns {(what, number of pairs): % named right}."""
    found = {}
    for n in N_PAIRS:
        pairs = evaluation_pairs(n)
        logits = model(pairs.keys, pairs.values, pairs.questions)
        found["questions written", n] = score(logits, pairs)
        logits = answer(model, pairs, EQUATION[rule])
        found["questions unwritten", n] = score(logits, pairs)

    pairs = evaluation_pairs(N_ASKED)
    for name, subtract in SUBTRACT.items():
        found[name, N_ASKED] = score(answer(model, pairs, subtract), pairs)
    logits = answer(model, pairs, nothing, from_read=True)
    found[FROM_READ, N_ASKED] = score(logits, pairs)
    return found


def measure(rule, questions_written, seed, steps):
    """Train a model, and measure it. Returns {(what, number of pairs): number}."""
    torch.manual_seed(seed)
    model = RecallModel(rule, D_KEY)
    before = key_overlap(model)
    train_model(model, rule, questions_written, seed, steps)

    found = evaluate(model, rule)
    found["overlap, untrained", N_ASKED] = before
    found["overlap, trained", N_ASKED] = key_overlap(model)
    return found


# --- What was found. measured: {(rule, questions written, what, pairs): one per seed} --


def cell(numbers):
    return recall.format_cell(torch.tensor(numbers))


def print_recall(measured):
    """Print what is named right if questions are written, and if not."""
    print_row("\nTrained: % of n pairs right", N_PAIRS, 37, 11)
    for name, in_training, what in (
        ("questions written", True, "questions written"),
        ("unwritten after training", True, "questions unwritten"),
        ("never written", False, "questions unwritten"),
    ):
        for rule in UPDATE:
            cells = [cell(measured[rule, in_training, what, n]) for n in N_PAIRS]
            print_row(f"{rule}, {name}", cells, 36, 11)


def print_subtracted(measured):
    """Print what is named right if something else is subtracted, and the keys' overlap."""
    print_row(f"\n% of {N_ASKED} pairs right; subtracted is", UPDATE, 37, 11)
    for name in [*SUBTRACT, FROM_READ]:
        cells = [cell(measured[rule, True, name, N_ASKED]) for rule in UPDATE]
        print_row(name, cells, 36, 11)

    print_row("\nOverlap of two keys", UPDATE, 37, 11)
    for name in ("untrained", "trained"):
        what = f"overlap, {name}"
        overlaps = [mean(measured[rule, True, what, N_ASKED]) for rule in UPDATE]
        print_row(name, [f"{x:.2f}" for x in overlaps], 36, 11)


def save_table(measured, path):
    """Write all numbers of the trained models into a CSV file."""
    rows = []
    for (rule, questions_written, what, n), numbers in measured.items():
        for seed, number in enumerate(numbers):
            rows.append([rule, questions_written, seed, what, n, number])
    header = ["rule", "questions_written", "seed", "measured", "pairs", "number"]
    common.write_csv(path, header, rows)


def find_title(measured):
    """Say that the phantom is the gain, if in each model it gains and the rest does not."""
    for rule in UPDATE:
        linear = measured[rule, True, "nothing (Linear, Eq. 8)", N_ASKED]
        alone = measured[rule, True, "the phantom alone", N_ASKED]
        rest = measured[rule, True, "all but the phantom", N_ASKED]
        for seed in range(len(linear)):
            if not rest[seed] <= linear[seed] < alone[seed]:
                return "What is it that Delta gains by?"
    return "Delta wins because it subtracts what every key reads, the phantom"


def draw_dial(axis, dial, measured):
    """Draw what untrained memories name, and where the keys of models stand."""
    for rule, found in dial.items():
        common.draw_line(axis, list(found), list(found.values()), rule, rule)
    axis.set_ylim(0, 105)
    axis.set_title("Untrained, 16 pairs: Delta helps where keys overlap", fontsize=9)
    axis.set_xlabel("overlap of two keys (cosine of sigma), set by hand")
    axis.set_ylabel("values named right (%)")
    common.spread_names(axis)

    for name in ("trained", "untrained"):
        x = mean(measured["delta", True, f"overlap, {name}", N_ASKED])
        axis.axvline(x, color="0.6", linestyle=":")
        axis.text(x + 0.01, 94, f"{name}\nkeys", color="0.4", fontsize=8)


def draw_subtracted(axis, measured):
    """Draw a mark per seed for each thing that is subtracted."""
    names = [*SUBTRACT, FROM_READ]
    for rule, shift in (("linear", -0.15), ("delta", 0.15)):
        for row, name in enumerate(names):
            x = measured[rule, True, name, N_ASKED]
            common.draw_points(axis, x, [row + shift] * len(x), rule, size=6)
        axis.text(99, 1.4 * shift, f"trained with {rule}", color=common.COLOUR[rule],
                  ha="right", va="center", fontsize=8)

    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.axhline(len(SUBTRACT) - 0.5, color="0.8")    # below it, something else is changed
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlim(0, 100)
    axis.set_title(f"Trained, {N_ASKED} pairs: what is subtracted?", fontsize=9)
    axis.set_xlabel("values named right (%), a mark per seed")


def draw(dial, measured, path):
    """Draw the dial on the left, and the trained models on the right."""
    figure, (left, right) = common.new_figure(10.4, 3.8, columns=2)
    draw_dial(left, dial, measured)
    draw_subtracted(right, measured)
    figure.suptitle(find_title(measured), fontsize=11)
    common.save_figure(figure, path)


# --- The command ----------------------------------------------------------------------


def main():
    parser = common.new_parser("Find out why Delta holds more than Linear.")
    parser.add_argument("--quick", action="store_true", help="one seed, 400 steps")
    common.add_shared_arguments(parser, device=False)
    args = parser.parse_args()
    common.set_threads(args.threads)

    print_untrained()
    dial = {rule: turn_dial(rule) for rule in UPDATE}
    print_dial(dial)

    seeds, steps = (1, 400) if args.quick else (3, 1000)
    jobs = []
    for rule, questions_written, seed in product(UPDATE, (True, False), range(seeds)):
        jobs.append((rule, questions_written, seed, steps))
    print(f"\n{len(jobs)} models are trained", file=sys.stderr, flush=True)

    measured = {}
    for job, found in zip(jobs, side_by_side(measure, jobs), strict=True):
        rule, questions_written, _, _ = job
        for (what, n), number in found.items():
            measured.setdefault((rule, questions_written, what, n), []).append(number)

    print_recall(measured)
    print_subtracted(measured)
    save_table(measured, args.out / "phantom.csv")
    draw(dial, measured, args.out / "phantom.png")


if __name__ == "__main__":
    # Worker processes find functions by the name of their module, which is not __main__.
    from experiments.phantom import main
    common.run_command(main)
