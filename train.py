"""A byte-level language model on real text, with every kind of memory: our Table 2 and Figure 3.

    python train.py                         train one model (Infini-attention, Linear + Delta), say how good it is
    python train.py compare                 local, xl, Infini Linear, Infini Linear + Delta, full: three seeds of each
    python train.py lengths                 does it matter in how long sequences a model was trained? (section 4.2)
    python train.py gates                   where the gates go, with a learning rate of their own and without (Figure 3)
    python train.py plug                    give a trained model without memory one (section 4.3)
    python train.py sample --load FILE      continue a text, byte by byte
    python train.py bench                   time and memory, beside attention without memory

The text is the Python standard library's own source on this machine; --data takes other text. The training loop at the
top is also what passkey.py uses: AdamW, gates with a rate of their own, exact resuming.
"""
import argparse
import codecs
import csv
import io
import math
import os
import platform
import random
import re
import signal
import sys
import sysconfig
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

try:
    import resource
except ImportError:    # Windows
    resource = None

from infini import InfiniAttention, InfiniConfig, InfiniTransformer, generate, inject_memory, stream


# --- Training ------------------------------------------------------------------------------------------------------

def make_optimizer(model, lr, gate_lr, weight_decay):
    """AdamW with three groups: matrices, gains (no weight decay), and gates (no weight decay, a rate of their own).

    Departure: the paper does not mention a rate for the gates. Adam moves a number by about its rate a step, and a beta
    has about 4 to go from a half-open gate to an open or a shut one: at a small rate, such as 3e-4, it never gets there.
    """
    named = list(model.named_parameters())
    gates = [p for name, p in named if name.endswith("beta")]
    gains = [p for name, p in named if p.dim() == 1 and not name.endswith("beta")]
    matrices = [p for name, p in named if p.dim() > 1]
    groups = [dict(params=matrices, peak=lr, weight_decay=weight_decay), dict(params=gains, peak=lr, weight_decay=0.0),
              dict(params=gates, peak=gate_lr, weight_decay=0.0)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.98))


def schedule(step, steps, warmup, final=0.1):
    """Share of the peak learning rate at a step (from 0): a linear warm-up, then half a cosine down to `final`."""
    return min(1, (step + 1) / warmup) * (final + (1 - final) * (1 + math.cos(math.pi * step / steps)) / 2)


def take_step(model, optimizer, loss, clip=1.0):
    """One step down the gradient, cut to a length of `clip`. Returns the loss and the length before; no step if either is
    not finite."""
    optimizer.zero_grad()
    loss.backward()
    value, norm = loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item()
    if math.isfinite(value + norm):
        optimizer.step()
    return value, norm


def train(model, loss_of, steps, path, lr, gate_lr, weight_decay=0.0, warmup=50, clip=1.0, save_every=100, resume=False,
          settings=None):
    """Train a model and leave it in a checkpoint.

    loss_of: (model, step) -> loss, number of tokens it took, further numbers to show, {name: value}. What it draws must
        depend on nothing but the step, so that a resumed run sees what an uninterrupted one would have seen.
    path: the checkpoint, written every `save_every` steps, at the end, and on Ctrl-C (which then ends the training with
        KeyboardInterrupt). With `resume`, a training that stopped goes on from there, bit for bit on a CPU.
    settings: what makes this training what it is (a dict of plain values). It is stored, and must agree to resume.
    Returns the loss of every step. Raises ValueError on a checkpoint that does not fit, OSError on one that can't be
    read or written.
    """
    optimizer, losses, gates = make_optimizer(model, lr, gate_lr, weight_decay), [], []
    begin = round(sum(p.detach().cpu().double().sum().item() for p in model.parameters()), 6)    # tells weights apart
    settings = dict(settings or {}, steps=steps, lr=lr, gate_lr=gate_lr, weight_decay=weight_decay, warmup=warmup,
                    clip=clip, begin=begin)
    if resume and Path(path).exists():
        found = read_checkpoint(path)
        made, wanted = ({**c, **s} for c, s in ((found["config"], found["settings"]), (asdict(model.config), settings)))
        differing = [f"{name} = {made.get(name)!r}" if name != "begin" else "other starting weights"
                     for name in wanted if made.get(name) != wanted[name]]
        if differing:
            raise ValueError(f"{path} was of another training ({', '.join(differing)}), must be of this one to resume")
        model.load_state_dict(found["model"])
        losses, gates = found["losses"].tolist(), list(found["gates"])
        if found["optimizer"] is None:    # it was done
            return losses
        optimizer.load_state_dict(found["optimizer"])

    def save(done):
        write_checkpoint(path, dict(
            model=model.state_dict(), config=asdict(model.config), settings=settings, command=" ".join(sys.argv),
            torch=str(torch.__version__), losses=torch.tensor(losses, dtype=torch.float64),
            gates=torch.stack(gates) if gates else torch.empty(0), optimizer=None if done else optimizer.state_dict()))

    model.train()
    progress = Progress(len(losses), steps)
    with interrupts() as interrupted:
        for step in range(len(losses), steps):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, steps, warmup)
            loss, n_tokens, shown = loss_of(model, step)
            value, norm = take_step(model, optimizer, loss, clip)
            if not math.isfinite(value + norm):
                progress.close()
                raise ValueError(f"loss was {value}, its gradient {norm} at step {step + 1}, must both be finite")
            losses.append(value)
            if model.config.attention == "infini" and (step + 1) % math.ceil(steps / 100) == 0:
                gates.append(model.gates().cpu())
            progress.show(step + 1, n_tokens, dict(loss=value, **shown))
            if interrupted.is_set():
                save(done=False)
                progress.close()
                raise KeyboardInterrupt(f"stopped after step {step + 1} of {steps}; --resume goes on from {path}")
            if (step + 1) % save_every == 0 and step + 1 < steps:
                save(done=False)
        save(done=True)
    progress.close()
    if interrupted.is_set():
        raise KeyboardInterrupt(f"stopped; the training was complete, and is in {path}")
    return losses


class Progress:
    """What is done, speed and time left: one refreshed line on a terminal, elsewhere a plain line every few seconds."""

    def __init__(self, done, total, unit="steps"):
        self.first, self.total, self.unit, self.tokens, self.recent = done, total, unit, 0, deque(maxlen=20)
        self.start, self.last, self.terminal = time.perf_counter(), -math.inf, sys.stderr.isatty()

    def show(self, done, n_tokens, numbers={}):
        now, self.tokens = time.perf_counter(), self.tokens + n_tokens
        self.recent.append(numbers)
        if now - self.last < (0.2 if self.terminal else 5) and done < self.total:
            return
        self.last, seconds = now, now - self.start
        means = [f"{name} {sum(n[name] for n in self.recent) / len(self.recent):.4f}" for name in numbers]
        left = round(seconds / (done - self.first) * (self.total - done))
        line = "  ".join([f"{done:,}/{self.total:,} {self.unit}", *means, f"{self.tokens / seconds:,.0f} tokens/s",
                          f"{left // 60}:{left % 60:02d} left"])
        before, after = ("\r", "\033[K") if self.terminal else ("", "\n")
        print(before + line, end=after, file=sys.stderr, flush=True)

    def close(self, keep=True):
        if self.terminal:
            print("" if keep else "\r\033[K", end="\n" if keep else "", file=sys.stderr, flush=True)


def peak_memory():
    """The most memory that this process has used so far, in MB. Not a number on Windows, which does not count it so."""
    try:    # on Linux, where getrusage counts what the parent had used before it started this process, too
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2 ** 10
    except (OSError, TypeError):
        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else math.nan
        return usage / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


@contextmanager
def interrupts():
    """Ctrl-C sets the event instead of stopping anywhere; pressed again, it stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():    # only there can signals be caught
        yield event
        return

    def handler(*_):
        if event.is_set():
            raise KeyboardInterrupt("stopped at once; the last checkpoint is whole")
        event.set()
        os.write(2, b"\nfinishing this step, then saving; Ctrl-C again stops at once\n")    # print may be under way
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


# --- Checkpoints ---------------------------------------------------------------------------------------------------

def write_checkpoint(path, content):
    """Write beside, then rename: whoever is killed in between leaves the old file whole."""
    path, buffer = Path(path), io.BytesIO()
    torch.save(content, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_bytes(buffer.getbuffer())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read_checkpoint(path):
    """The content of a checkpoint that train() wrote. Raises OSError if it can't be read, ValueError if it is none."""
    data = Path(path).read_bytes()
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or {type(content[name]) for name in ("config", "settings")} != {dict}:
            raise TypeError
        return {name: content[name] for name in ("model", "config", "settings", "losses", "gates", "optimizer")}
    except Exception as error:
        raise ValueError(f"{path} was no checkpoint ({type(error).__name__}), must be one of this project") from error


def load_model(path, device="cpu"):
    """The model in a checkpoint, ready to be used. Returns it and the settings of its training."""
    content = read_checkpoint(path)
    try:
        model = InfiniTransformer(InfiniConfig(**content["config"]))
        model.load_state_dict(content["model"])
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{path} was made by another version, must be made by this one") from error
    return model.to(device).eval(), content["settings"]


# --- Pictures ------------------------------------------------------------------------------------------------------

def panels(lines, columns):
    """A figure with lines x columns panels that share their axes. Returns it and the panels."""
    return plt.subplots(lines, columns, figsize=(1 + 4.4 * columns, 0.4 + 3.0 * lines), squeeze=False, sharex=True,
                        sharey=True, layout="constrained")


def draw_lines(curves, path, xlabel, ylabel, xscale="log"):
    """Curves in a PNG file, and their points in a CSV file beside it. curves: {name: (x, y)}."""
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for name, (x, y) in curves.items():
        axis.plot(x, y, "o-", markersize=3, label=name.replace("$", r"\$"))
    axis.set_xscale(xscale, **(dict(base=2) if xscale == "log" else {}))
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["curve", xlabel, ylabel])
        rows.writerows([name, float(x), float(y)] for name, points in curves.items() for x, y in zip(*points))


def heat_map(axis, grid, high, text, x, y):
    """Draw a grid of numbers from 0 to `high` as colours and text; x, y: labels. Returns the image."""
    image = axis.imshow(grid, cmap="cividis", vmin=0, vmax=high, aspect="auto")
    for row, line in enumerate(grid):
        for column, value in enumerate(line):
            colour = "black" if value > 0.6 * high else "white"
            axis.text(column, row, text.format(value), ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(x)), x)
    axis.set_yticks(range(len(y)), y)
    return image


# --- The command line ----------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, but what is wrong with an argument is said in one line, and no argument can be abbreviated."""

    def __init__(self, **kw):
        super().__init__(allow_abbrev=False, **kw)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def number(low, high, kind=float):
    """An argument type: numbers from low to high."""
    def parse(text):
        try:
            value = kind(text.replace(",", ""))
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"was {text!r}, must be a {what} from {low:,} to {high:,}")
        return value
    return parse


def whole(low, high=2 ** 31):
    return number(low, high, int)


def several(parse):
    """An argument type: values separated by commas."""
    return lambda text: list(dict.fromkeys(map(parse, text.replace(",", " ").split()))) or parse(text)


def add_options(parser, options):
    """options: (name, type, default, help) of each. The help is told to end in the default, if there is one."""
    for name, kind, default, text in options:
        text += "" if default is None else " (default: %(default)s)"
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)


def add_common_arguments(parser):
    add_options(parser, [("seed", whole(0), 0, "of weights and training data"),
                         ("device", str, "cpu", "cpu, cuda or mps")])
    parser.add_argument("--threads", type=whole(1, 1024), default=os.cpu_count() or 1,
                        help="CPU cores to use (default: all, here %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="FOLDER",
                        help="for checkpoints, tables and pictures (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with a training that was stopped")


def prepare(args):
    """Threads, device and seed from the common arguments. Raises ValueError if there is no such device."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(f"--device was {args.device!r}, must be a device of this machine, such as cpu") from error
    args.out.mkdir(parents=True, exist_ok=True)


def run(main):
    """Run a command: what the user did wrong is one line on standard error and exit code 2, no traceback."""
    try:
        main()
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped'}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        text = str(error).strip() or ("out of memory" if isinstance(error, MemoryError) else repr(error))
        print("error:", text.splitlines()[0], file=sys.stderr)
        sys.exit(2)


# --- Text ----------------------------------------------------------------------------------------------------------

def read_documents(path=None):
    """The files of a folder, or one file, as byte tensors; without a path the standard library's own modules.

    Returns documents to train on and documents to validate on: every tenth file, or the last tenth of a single one.
    Raises ValueError on a file that is no text or a folder without files, OSError on what can't be read.
    """
    root = Path(path or sysconfig.get_paths()["stdlib"])
    left_out = set() if path else {"test", "tests", "idle_test", "site-packages", "dist-packages", "topics.py",
                                 "encodings"}    # its tables are nearly the same in every file
    files = [root] if root.is_file() else sorted(root.rglob("*" if path else "*.py"))
    documents = []
    for file in files:
        if file.is_file() and not left_out & set(file.relative_to(root).parts):
            data = file.read_bytes()
            if b"\0" in data:
                raise ValueError(f"--data was binary at {file}, must be text")
            if data:
                documents.append(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if not documents:
        raise ValueError(f"--data was without any text at {root}, must be a text file or a folder of them")
    if len(documents) == 1:
        tenth = len(documents[0]) // 10
        return [documents[0][:-tenth]], [documents[0][-tenth:]]
    random.Random(0).shuffle(documents)
    held_out = max(1, len(documents) // 10)
    return documents[held_out:], documents[:held_out]


def draw_sequences(documents, batch, length, rng):
    """(batch, length) bytes, each row out of one document, each place in the documents equally likely."""
    places = [max(0, len(document) - length + 1) for document in documents]
    if not any(places):
        longest = max(map(len, documents))
        raise ValueError(f"--data was without a document of {length:,} bytes (the longest: {longest:,}), must have one")
    rows = []
    for document in rng.choices(documents, places, k=batch):
        first = rng.randrange(len(document) - length + 1)
        rows.append(document[first:first + length])
    return torch.stack(rows).long()


def windows(documents, length, most):
    """At most `most` pieces of `length` bytes that do not overlap, evenly drawn from all the documents: (n, length)."""
    pieces = [piece for document in documents for piece in document.split(length) if len(piece) == length]
    if not pieces:
        raise ValueError(f"--data was too short to validate on, must have {length:,} bytes in one of every ten files")
    return torch.stack(pieces[::math.ceil(len(pieces) / most)]).long()


# --- The language model --------------------------------------------------------------------------------------------

KINDS = {"local": dict(attention="local"), "xl": dict(attention="xl"), "linear": dict(update="linear"),
         "delta": dict(update="delta"), "full": dict(attention="full")}


def lm_loss(documents, seed, batch, length, cut, device):
    """Loss on sequences drawn by seed and step, the same for every kind of model, cut in shorter ones of `cut` bytes."""
    def loss_of(model, step):
        tokens = draw_sequences(documents, batch, length + 1, random.Random(f"{seed}/{step}")).to(device)
        given, target = tokens[:, :-1].reshape(-1, cut), tokens[:, 1:].reshape(-1, cut)
        with torch.autocast("cuda", torch.bfloat16, enabled=given.is_cuda):
            logits, _ = model(given)
        loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten())
        return loss, given.numel(), {"bits per byte": loss.item() / math.log(2)}
    return loss_of


@torch.no_grad()
def bits(model, tokens, forget=False, at_once=2 ** 14):
    """Bits that each byte but the first costs, (n, T), for pieces of text (n, T + 1).

    forget: empty the memory before each segment, to see what it was worth.
    """
    device, N = model.embedding.weight.device, model.config.segment_len
    costs = []
    for piece in tokens.split(max(1, at_once // tokens.shape[1])):
        given, target = piece[:, :-1].to(device), piece[:, 1:].to(device)
        logits, _ = model(given.reshape(-1, N) if forget else given)
        loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
        costs.append(loss.view(target.shape).cpu() / math.log(2))
    return torch.cat(costs)


def context_memory(config, length):
    """Numbers that a model keeps of `length` tokens of context, whole segments: Table 1."""
    c = config
    return {"infini": c.d_key * (c.d_value + 1), "local": 0, "xl": (c.d_key + c.d_value) * min(length, c.segment_len),
            "full": (c.d_key + c.d_value) * length}[c.attention] * c.n_heads * c.n_layers


def numbers_in(state):
    """Numbers in a state, as counted."""
    return sum(part.numel() for s in state for part in (*(s.memory or ()), s.k, s.v))


def train_lm(args, kind, model=None, cut=None, name=None, **changes):
    """Train a model of a kind, from the start or onwards, and leave it in OUT/lm-[--name-]NAME-seedSEED.pt.

    cut: segments per sequence, if the sequences that are drawn are cut in shorter ones. name: default, the kind.
    changes: to args. Returns the model, its losses in bits per byte: (steps, means up to there), and its path.
    """
    args = argparse.Namespace(**{**vars(args), **changes})
    torch.manual_seed(args.seed)
    sizes = {field.name: getattr(args, field.name) for field in fields(InfiniConfig) if hasattr(args, field.name)}
    model = (model or InfiniTransformer(InfiniConfig(**{**sizes, **KINDS[kind]}))).to(args.device)
    length, cut = args.segments * args.segment_len, (cut or args.segments) * args.segment_len
    path = args.out / "-".join(["lm", *filter(None, [args.name]), name or kind, f"seed{args.seed}.pt"])
    print(f"{path.stem}: {args.steps} steps of {args.batch * length // cut} x {cut:,} bytes, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    if args.compile:
        model.compile()
    draws = dict(seed=args.seed, batch=args.batch, length=length, cut=cut)
    settings = dict(draws, kind=kind, data=str(args.data), n_bytes=sum(map(len, args.documents[0])))
    losses = train(model, lm_loss(args.documents[0], device=args.device, **draws), args.steps, path, args.lr,
                   args.gate_lr, args.weight_decay, resume=args.resume, settings=settings)
    n = math.ceil(len(losses) / 100)
    ends = [*range(n, len(losses), n), len(losses)]
    curve = ends, [sum(losses[end - n:end]) / n / math.log(2) for end in ends]
    draw_lines({path.stem: curve}, path.with_suffix(".png"), "step", "training loss (bits per byte)", xscale="linear")
    return model.eval(), curve, path


def held_out(args, segments):
    """Pieces of `segments` segments (and one byte) that no model was trained on: (n, T + 1)."""
    return windows(args.documents[1], segments * args.segment_len + 1, args.windows)


def bits_by_segment(model, tokens):
    return bits(model, tokens).unflatten(1, (-1, model.config.segment_len)).mean((0, 2))


def by_position(cost):
    """What the segments cost, as a curve: the first, the second, then means of the next 2, 4, 8, ...; (last one, mean)."""
    ends = sorted({2 ** i for i in range(32) if 2 ** i < len(cost)} | {len(cost)})
    return ends, [cost[start:end].mean().item() for start, end in zip([0, *ends], ends)]


def mean_and_deviation(values):
    return f"{values.mean():.4f}" + (f" +- {values.std():.4f}" if len(values) > 1 else "")


def train_command(args):
    """Train one model, and say what it is worth on documents that it has not seen."""
    tokens = held_out(args, args.segments)
    model, _, _ = train_lm(args, args.kind)
    print(f"{bits(model, tokens).mean():.4f} bits per byte on {len(tokens)} held-out pieces "
          f"of {tokens.shape[1] - 1:,} bytes")
    if model.config.attention == "infini":
        print(f"{bits(model, tokens, forget=True).mean():.4f} if its memory is emptied before each segment")
        print_gates(model)


def print_gates(model):
    print("sigmoid(beta), a line per layer:")
    for layer in model.gates().tolist():
        print("    " + "  ".join(f"{gate:.3f}" for gate in layer))


def compare(args):
    """Our Table 2: every kind of model on the same bytes, three seeds; what it costs to forget; loss by position."""
    length = args.segments * args.segment_len
    tokens = held_out(args, 4 * args.segments)
    costs, forgot, stored = {}, {}, {}
    with open(args.out / "compare.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["kind", "seed", "segment", "bits_per_byte"])
        for seed in range(args.seed, args.seed + args.seeds):
            for kind in KINDS:
                model, _, _ = train_lm(args, kind, seed=seed)
                seen = tokens[:, :length + 1] if kind == "full" else tokens    # it knows no positions beyond training
                cost = bits_by_segment(model, seen)
                rows.writerows([kind, seed, i + 1, cost_i] for i, cost_i in enumerate(cost.tolist()))
                file.flush()
                costs.setdefault(kind, []).append(cost)
                if model.config.attention == "infini":
                    cost = bits(model, tokens[:, :length + 1], forget=True).mean().item()
                    forgot.setdefault(kind, []).append(cost)
                state = stream(model, tokens[:1, :length].to(args.device))[1]
                stored[kind] = numbers_in(state), context_memory(model.config, length)
    print(f"\n{len(tokens)} held-out pieces of {length:,} bytes, {args.seeds} seeds, mean +- standard deviation")
    print(f"{'kind':8}{'bits per byte':>18}{'less than local':>18}{'perplexity':>12}{'forgetful':>18}{'memory: counted':>18}"
          f"{'Table 1':>12}")
    tables = {kind: torch.stack(costs[kind])[:, :args.segments].mean(1) for kind in KINDS}    # a number for each seed
    for kind, table in tables.items():
        without = mean_and_deviation(torch.tensor(forgot[kind])) if kind in forgot else ""
        gain = mean_and_deviation(tables["local"] - table)
        print(f"{kind:8}{mean_and_deviation(table):>18}{gain:>18}{2 ** table.mean():12.3f}{without:>18}"
              f"{stored[kind][0]:18,}{stored[kind][1]:12,}")
    curves = {kind: by_position(torch.stack(cost).mean(0)) for kind, cost in costs.items()}
    draw_lines(curves, args.out / "context.png", f"segment of {args.segment_len} bytes", "bits per byte")


def lengths(args):
    """Does it matter in how long sequences a model was trained? The same bytes, cut in shorter ones or not."""
    most = max(args.lengths)
    if any(most % segments for segments in args.lengths):
        raise ValueError(f"--lengths was {args.lengths}, must divide the largest")
    tokens, curves = held_out(args, most), {}
    for segments in args.lengths:
        costs = []
        for seed in range(args.seed, args.seed + args.seeds):
            model, _, _ = train_lm(args, args.kind, cut=segments, name=f"{args.kind}-{segments}-segments", seed=seed,
                                   segments=most, batch=max(1, args.batch * args.segments // most))
            costs.append(bits_by_segment(model, tokens))
        costs = torch.stack(costs)
        print(f"trained in {segments} segments: bits per byte in {most} {mean_and_deviation(costs.mean(1))}, in the first "
              f"{mean_and_deviation(costs[:, 0])}, in the second half {mean_and_deviation(costs[:, most // 2:].mean(1))}",
              flush=True)
        curves[f"trained in {segments} segments"] = by_position(costs.mean(0))
    draw_lines(curves, args.out / "lengths.png", f"segment of {args.segment_len} bytes", "bits per byte")


def gates(args):
    """Figure 3: where the gates end and how they get there, with a learning rate of their own and with everyone's."""
    if "update" not in KINDS[args.kind]:
        raise ValueError(f"--kind was {args.kind!r}, must be linear or delta to have gates")
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for column, gate_lr in zip(axes.T, (args.gate_lr, args.lr)):
        model, _, path = train_lm(args, args.kind, name=f"{args.kind}-gates-{gate_lr:g}", gate_lr=gate_lr)
        print_gates(model)
        for layer, heads in enumerate(read_checkpoint(path)["gates"].permute(1, 2, 0)):
            for i, head in enumerate(heads):
                steps = math.ceil(args.steps / 100) * torch.arange(1, len(head) + 1)
                column[1].plot(steps, head, color=f"C{layer}", label=f"layer {layer + 1}" if i == 0 else None)
        n_layers, n_heads = model.gates().shape
        image = heat_map(column[0], model.gates().tolist(), 1, "{:.2f}", range(1, n_heads + 1), range(1, n_layers + 1))
        column[0].set(title=f"learning rate of the gates {gate_lr:g}", xlabel="head", ylabel="layer")
        column[1].set(xlabel="step", ylabel="sigmoid(beta)", ylim=(0, 1))
        column[1].legend(fontsize=8)
    figure.colorbar(image, ax=axes[0], label="sigmoid(beta)")
    figure.savefig(args.out / "gates.png", dpi=150)


def plug(args):
    """Plug and play (section 4.3): a trained model without memory gets one, and goes on for a tenth of the steps."""
    tokens, steps = held_out(args, args.segments), max(1, args.steps // 10)
    before, after, curves = {}, {}, {}
    for seed in range(args.seed, args.seed + args.seeds):
        local, _, _ = train_lm(args, "local", seed=seed)
        starts = {rule: inject_memory(local, rule, args.plug_gate) for rule in ("linear", "delta")}
        for kind, model in {"local": local, **starts}.items():
            before.setdefault(kind, []).append(bits(model, tokens).mean())
            model, curve, _ = train_lm(args, kind, model, name=f"plug-{kind}", steps=steps, lr=args.lr / 2, seed=seed + 1000)
            after.setdefault(kind, []).append(bits(model, tokens).mean())
            curves.setdefault(kind, []).append(curve[1])
    print(f"\nbits per byte on {len(tokens)} held-out pieces, {args.seeds} seeds, mean +- standard deviation")
    print(f"{'goes on as':12}{'at the start':>18}{f'{steps} steps on':>18}{'better than local':>20}")
    for kind in before:
        then, gain = torch.stack(after[kind]), torch.stack(after["local"]) - torch.stack(after[kind])
        print(f"{kind:12}{mean_and_deviation(torch.stack(before[kind])):>18}{mean_and_deviation(then):>18}"
              f"{mean_and_deviation(gain):>20}")
    drawn = {kind: (curve[0], torch.tensor(values).mean(0)) for kind, values in curves.items()}
    draw_lines(drawn, args.out / "plug.png", "step after the memory was plugged in", "training loss (bits per byte)",
               xscale="linear")


def sample(args):
    """Continue a text, byte by byte, each as soon as it is there, at a cost that does not grow."""
    if args.load is None:
        raise ValueError("--load was missing, must be a checkpoint to sample from")
    sys.stdout.reconfigure(errors="replace")    # for terminals that can't show every character
    model, _ = load_model(args.load, args.device)
    if model.config.vocab_size != 256:
        raise ValueError(f"--load was {args.load}, must be a language model of bytes")
    text, decoder = args.prompt.encode(), codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(args.prompt, end="", flush=True)
    generate(model, torch.tensor([list(text)], device=args.device), args.bytes, args.temperature, args.top_p,
             torch.Generator(args.device).manual_seed(args.seed),
             on_token=lambda token: print(decoder.decode(bytes(token.tolist())), end="", flush=True))
    print(decoder.decode(b"", final=True))


# --- Benchmarks ----------------------------------------------------------------------------------------------------

SMALL = dict(vocab_size=53, d_model=64, n_layers=2, n_heads=4, d_key=32, d_value=32, d_ff=256, segment_len=32,
             rope_base=50.0, gate_init=-2.0)    # as in passkey.py, which has these sizes from here
PAPER_LAYER = dict(d_model=1024, n_heads=8, d_key=128, d_value=128, segment_len=2048)
BENCH = dict(rows=((16, 64), (9, 112), (4, 256)),    # (batch, length) of three small steps, timed together, as in passkey.py
             repeats=5, paper_tokens=16384, parallel_tokens=8192, full_tokens=2 ** 15, near=2 ** 15, far=2 ** 20,
             early=100, late=100_000, new_tokens=320, segments=64, matrix=4096, drift=(2 ** 10, 2 ** 15, 2 ** 20))


def medians(repeats, **actions):
    """Median seconds of each action. They take turns, so that whatever else the machine does meets them all alike."""
    seconds = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - start)
    return {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}


def random_tokens(vocab_size, batch, length):
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def model_step(rows, **config):
    """A function that does a training step on each of the (batch, length) in rows, all that train() does in one."""
    model = InfiniTransformer(InfiniConfig(**config))
    optimizer = make_optimizer(model, 1e-3, 1e-2, 0.0)

    def step():
        for batch, length in rows:
            tokens = random_tokens(model.config.vocab_size, batch, length + 1)
            loss = F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
            take_step(model, optimizer, loss)
    return step


def layer_step(length, **config):
    """A function that runs one layer of the paper's size forward and backward, and the floating-point operations of it.

    Counted are the matrix products that the code does: Eqs. 5 and 11, both of Eq. 6 with all N x N scores (masked ones
    are computed too), and Eqs. 7 and 8. The backward pass does each of them twice.
    """
    layer = InfiniAttention(InfiniConfig(**PAPER_LAYER, **config))
    x, c = torch.randn(1, length, layer.config.d_model, requires_grad=True), layer.config
    per_token = c.n_heads * (2 * c.d_model + c.segment_len + c.d_key) * (c.d_key + c.d_value)

    def step():
        layer.zero_grad()
        layer(x)[0].sum().backward()
    return step, 3 * 2 * length * per_token


def streaming_peak(length):
    """MB that a process needs that reads `length` tokens."""
    stream(InfiniTransformer(InfiniConfig(**SMALL)), random_tokens(SMALL["vocab_size"], 1, length))
    return peak_memory()


def training_peak(checkpoint, segments):
    """MB by which a training step on `segments` segments raises what a process needs."""
    config = dict(SMALL, checkpoint=checkpoint)
    model_step([(1, 1)], **config)()
    before = peak_memory()
    model_step([(16, segments * SMALL["segment_len"])], **config)()
    return peak_memory() - before


def in_new_process(function, *args):
    """Call a function in a process of its own, whose peak memory nothing else has raised."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def measurements(b):
    """Yields what was measured, two values, their unit, and the bound of their ratio: at most "<", at least ">"."""
    yield ("peak memory, streaming 1M / 32K tokens", *(in_new_process(streaming_peak, n) for n in (b.far, b.near)),
           "MB", "<", 1.05)
    yield (f"peak memory, training, {b.segments} segments, checkpoint=True / without",
           *(in_new_process(training_peak, on, b.segments) for on in (True, False)), "MB", "<", 0.5)
    steps = {kind: model_step(b.rows, **SMALL, **KINDS[kind]) for kind in ("local", "linear", "delta")}
    small = medians(4 * b.repeats, **steps)
    yield "training step, small, Linear / local", 1e3 * small["linear"], 1e3 * small["local"], "ms", "<", 1.25
    yield "training step, small, Delta / local", 1e3 * small["delta"], 1e3 * small["local"], "ms", "<", 1.5
    steps = {kind: layer_step(b.paper_tokens, **KINDS[kind]) for kind in ("local", "linear", "delta")}
    flops, matrix = steps["linear"][1], torch.randn(b.matrix, b.matrix)
    big = medians(b.repeats, matrix=lambda: matrix @ matrix, **{kind: step for kind, (step, _) in steps.items()})
    yield "training step, paper layer, Linear / local", big["linear"], big["local"], "s", "<", 1.15
    yield "training step, paper layer, Delta / local", big["delta"], big["local"], "s", "<", 1.2
    yield ("rate of the paper layer's step (Linear) / of a matrix product", flops / big["linear"] / 1e9,
           2 * b.matrix ** 3 / big["matrix"] / 1e9, "GFLOP/s", ">", 0.6)
    forms = medians(b.repeats, **{form: model_step([(1, b.parallel_tokens)], **SMALL, update="linear", form=form)
                                  for form in ("parallel", "recurrent")})
    yield (f"training speed, small, Linear, {b.parallel_tokens:,} tokens, parallel / recurrent",
           *(b.parallel_tokens / seconds for seconds in forms.values()), "tokens/s", ">", 3)

    model = InfiniTransformer(InfiniConfig(**SMALL)).eval()
    full = InfiniTransformer(InfiniConfig(**{**SMALL, **KINDS["full"]})).eval()
    text = random_tokens(SMALL["vocab_size"], 1, b.far)
    near, far, early, late = (stream(model, text[:, :n])[1] for n in (b.near, b.far, b.early, b.late))
    us = 1e6 / b.near
    read = medians(b.repeats, far=lambda: stream(model, text[:, :b.near], far),
                   near=lambda: stream(model, text[:, :b.near], near))
    yield "streaming, time per token at 1M / at 32K", us * read["far"], us * read["near"], "us", "<", 1.05
    us = 1e6 / b.new_tokens
    written = medians(b.repeats, **{name: partial(generate, model, text[:, :1], b.new_tokens, 0, state=state)
                                    for name, state in (("late", late), ("early", early))})
    yield (f"generate, time per token, {b.late:,} / {b.early:,} tokens into the text", us * written["late"],
           us * written["early"], "us", "<", 1.05)
    text = text[:, :b.full_tokens]    # in one call, which is fastest for "full"
    forward = medians(3, full=lambda: stream(full, text, chunk_len=b.full_tokens), infini=lambda: stream(model, text))
    yield (f"forward, small, {b.full_tokens:,} tokens, full / infini", forward["full"], forward["infini"], "s", ">", 20)


def drift(lengths, **config):
    """How far float32 is from float64 after so many tokens: the largest difference of logits, over the largest logit."""
    torch.manual_seed(0)
    model = InfiniTransformer(InfiniConfig(**SMALL, **config))
    exact = InfiniTransformer(model.config).double()
    exact.load_state_dict(model.state_dict())
    text, state, right_state = random_tokens(SMALL["vocab_size"], 1, max(lengths)), None, None
    for start, end in zip([0, *lengths], lengths):
        logits, state = stream(model, text[:, start:end], state)
        right, right_state = stream(exact, text[:, start:end], right_state)
        yield ((logits - right).abs().max() / right.abs().max()).item()


def processor():
    """The name of the processor, as far as the system tells it."""
    try:
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def bench(args):
    """Time and memory against attention without memory, and what is to be reached."""
    if args.device != "cpu":
        raise ValueError(f"--device was {args.device!r}, must be cpu for bench")
    print(f"{processor()}, {args.threads} of {os.cpu_count()} cores, PyTorch {torch.__version__}")
    print(f"{'what':77}{'measured':>22}{'':10}{'ratio':>7}{'goal':>9}", flush=True)
    with open(args.csv or args.out / "bench.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["what", "first", "second", "unit", "ratio", "goal", "reached"])
        for what, first, second, unit, sign, goal in measurements(argparse.Namespace(**BENCH)):
            ratio = first / second if second else math.nan
            reached = ratio <= goal if sign == "<" else ratio >= goal
            print(f"{what:77}{first:10.4g} / {second:<9.4g} {unit:9}{ratio:7.3g}{sign + '= ' + format(goal, 'g'):>9}"
                  f"{'' if reached else '  missed'}", flush=True)
            rows.writerow([what, first, second, unit, ratio, f"{sign}= {goal}", reached])
            file.flush()
        lengths = BENCH["drift"]
        print(f"\nfloat32 against float64, logits wrong by (after {', '.join(f'{n:,}' for n in lengths)} random tokens)")
        for rule in ("linear", "delta"):
            errors = list(drift(lengths, update=rule))
            print(f"    {rule:8}" + "".join(f"{error:12.1e}" for error in errors), flush=True)
            rows.writerows([f"float32 against float64, {rule}, {n:,} tokens", error] for n, error in zip(lengths, errors))


COMMANDS = dict(train=train_command, compare=compare, lengths=lengths, gates=gates, plug=plug, sample=sample,
                bench=bench)


def parse_arguments():
    parser = Parser(description="Train byte-level language models with and without memory on real text.",
                    epilog="The sizes in InfiniConfig (infini.py) are options too: --d-model 256 --checkpoint ...")
    parser.add_argument("what", nargs="?", choices=COMMANDS, default="train", metavar="COMMAND",
                        help=" ".join(f"{name}: {what.__doc__.splitlines()[0]}" for name, what in COMMANDS.items()))
    add_common_arguments(parser)
    add_options(parser, [
            ("data", Path, None, "a text file, or a folder with a document per file (default: the standard library)"),
            ("steps", whole(1), 6000, "training steps"), ("batch", whole(1, 2 ** 16), 1, "sequences per step"),
            ("segments", whole(1), 32, "segments per sequence"), ("lr", number(0, 1), 4e-3, "learning rate"),
            ("gate-lr", number(0, 1), 1e-2, "learning rate of the gates"),
            ("weight-decay", number(0, 1), 0.0, "of the matrices"),
            ("windows", whole(1), 100, "held-out pieces to evaluate on"), ("seeds", whole(1), 3, "seeds, for compare, lengths and plug"),
            ("lengths", several(whole(1)), "2,4,16,64", "segments per sequence, for lengths"),
            ("plug-gate", number(-100, 100), -2.0, "beta of a memory that is plugged in"),
            ("load", Path, None, "checkpoint to sample from"), ("prompt", str, "def main():\n", "text to continue"),
            ("bytes", whole(1), 500, "to write"),
            ("temperature", number(0, 100), 0.8, "of samples; 0: the likeliest byte"),
            ("top-p", number(0, 1), 0.95, "sample from the likeliest bytes that together have this probability"),
            ("name", str, None, "goes before the kind in the names of checkpoints")])
    parser.add_argument("--kind", choices=KINDS, default="delta", help="of attention or memory (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="train with torch.compile")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="bench's table for a program (default: OUT/bench.csv)")
    for field in fields(InfiniConfig):
        if field.name not in ("vocab_size", "update", "attention", "causal"):    # these follow from --kind
            value = field.default
            kind = dict(action="store_true") if isinstance(value, bool) else dict(default=value, type={
                int: whole(1, 2 ** 16), float: number(-1e9, 1e9), str: str}[type(value)])
            parser.add_argument("--" + field.name.replace("_", "-"), **kind, help=argparse.SUPPRESS)
    parser.set_defaults(n_layers=2, segment_len=32, gate_init=-1.5, gate_spread=5.1)    # betas from -4 to 1
    return parser.parse_args()


def main():
    args = parse_arguments()
    prepare(args)
    if args.what not in ("sample", "bench"):
        args.documents = read_documents(args.data)
    COMMANDS[args.what](args)


if __name__ == "__main__":
    run(main)
