"""A training loop, and a small language model to use it on.

    python train.py                       train a model of bytes, say how good it is
    python train.py sample --load FILE    continue a text, byte by byte

The text is the Python standard library's own source. The lesson comes first, the comforts last."""
import argparse
import codecs
import hashlib
import io
import math
import os
import random
import re
import signal
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch
import torch.nn.functional as F

from infini import InfiniConfig, InfiniTransformer, generate

KINDS = dict(local=dict(attention="local"), xl=dict(attention="xl"), linear=dict(update="linear"),
             delta=dict(update="delta"), full=dict(attention="full"))

# --- Text: from files to batches -----------------------------------------------------------------
def read_documents(path=None, out=None, shortest=1):
    """Read a folder of files, or one file, as byte tensors. Default: the standard library. Left out
    are hidden and binary files, those in the folder `out`, and texts of less than `shortest` bytes.
    Returns documents to train on and others to validate on, a random tenth of the files, or the
    last tenth of a single one. Raises ValueError without text, OSError on what can't be read."""
    root = Path(path or sysconfig.get_paths()["stdlib"])
    ours = {Path(out or root).resolve()} - {root.resolve(), *root.resolve().parents}
    left_out = set() if path else {"test", "tests", "idle_test", "site-packages", "encodings",
                                   "dist-packages", "topics.py"}
    def refuse(error):
        raise error
    texts, binary, files = [], 0, [root] if root.is_file() else sorted(
        Path(folder, name) for folder, _, names in os.walk(root, onerror=refuse) for name in names)
    for file in files:
        parts = file.relative_to(root).parts
        if (not left_out & {*parts} and not any(part[0] == "." for part in parts)
                and file.match("*" if path else "*.py") and file.is_file()
                and not ours & {*file.resolve().parents}):
            text = file.read_bytes()
            binary += 0 in text
            texts += [text] * (len(text) > 0 and 0 not in text)
    short = sum(len(text) < shortest for text in texts)
    if short == len(texts):
        raise ValueError(f"--data was {root}, {binary} binary, must have {shortest:,} text bytes")
    if (binary or short) and parent_process() is None:
        say(f"{root}: {binary} binary files and {short} of {len(texts)} texts, shorter than "
            f"{shortest:,} bytes, are not used")
    random.Random(0).shuffle(texts)
    n, cut = max(1, len(texts) // 10), len(texts[0]) - len(texts[0]) // 10
    known = {*texts[n:]}    # no copy of what is trained on is held out
    parts = texts[n:], [text for text in texts[:n] if text not in known]
    if len(texts) == 1:
        parts = [texts[0][:cut]], [texts[0][cut:]]
    return [[torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in part
             if len(text) >= shortest] for part in parts]

def draw_sequences(documents, batch, length, rng):
    """Draw (batch, length) bytes, each place equally likely. Raises ValueError if none is there."""
    places = [max(0, len(document) - length + 1) for document in documents]
    if not any(places):
        raise ValueError(f"--data was without a document of {length:,} bytes, must have one")
    drawn = [(document, rng.randrange(len(document) - length + 1))
             for document in rng.choices(documents, places, k=batch)]
    return torch.stack([document[first:first + length] for document, first in drawn]).long()

def validation_pieces(documents, length, most=100):
    """Cut documents into pieces that do not overlap, and keep at most `most`, spread evenly.
    Returns (n, length) bytes. Raises ValueError if no document is long enough."""
    pieces = [piece for d in documents for piece in d.split(length) if len(piece) == length]
    if not pieces:
        raise ValueError(f"--data was too short, must have {length:,} bytes in a held-out document")
    return torch.stack(pieces[::math.ceil(len(pieces) / most)]).long()

# --- Loss, optimizer, loop -----------------------------------------------------------------------
def lm_loss(documents, seed, batch, length):
    """Make the loss of a language model, (model, step) -> loss, tokens read, numbers to show. Seed
    and step alone decide what is drawn, so that all kinds of model see the same sequences."""
    def loss_of(model, step):
        tokens = draw_sequences(documents, batch, length + 1, random.Random(f"{seed}/{step}"))
        tokens = tokens.to(model.head.weight.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
            logits, _ = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        return loss, batch * length, {"bits per byte": loss.item() / math.log(2)}
    return loss_of

def make_optimizer(model, lr, gate_lr, weight_decay=0.0):
    """Make AdamW with three groups: matrices, gates (parameters named beta), and the rest.
    Only matrices have weight decay. A group's highest learning rate is its "peak".
    Departure: the paper uses Adafactor with one rate. Adam moves a number by about its rate per
    step. A beta must move by about 4 to open or shut a gate, so gates have a rate of their own."""
    gates, matrices, rest = [], [], []
    for name, p in model.named_parameters():
        (gates if "beta" in name.split(".") else matrices if p.dim() > 1 else rest).append(p)
    groups = [dict(params=params, peak=peak, weight_decay=decay) for params, peak, decay in (
        (matrices, lr, weight_decay), (rest, lr, 0.0), (gates, gate_lr, 0.0)) if params]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))

def schedule(step, steps, warmup, final=0.1):
    """Return the share of the peak rate: a linear warm-up, then half a cosine down to `final`."""
    cosine = (1 + math.cos(math.pi * step / steps)) / 2
    return min(1, (step + 1) / warmup) * (final + (1 - final) * cosine)

def take_step(model, optimizer, loss, clip=1.0, share=1.0):
    """Clip the gradient, step with a share of the peak rates if finite. Returns loss and norm."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    optimizer.zero_grad()
    loss.backward()
    value, norm = loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item()
    if math.isfinite(value + norm):
        optimizer.step()
    return value, norm

def train(model, loss_of, steps, path, lr, gate_lr, weight_decay=0.0, warmup=50, clip=1.0,
          save_every=100, resume=False, settings=None):
    """Train a model and leave it in the checkpoint `path`. Returns the loss of every step.
    loss_of: (model, step) -> loss, tokens read, {name: number to show}. It must draw by `step`
        alone, so that a resumed training sees what an uninterrupted one sees, bit for bit.
    path: written every `save_every` steps, at the end, and on Ctrl-C (KeyboardInterrupt).
    settings: a dict of plain values that is stored, and must be the same to resume.
    Raises ValueError if the checkpoint or the loss is bad, OSError if a file can't be used."""
    inner = getattr(model, "_orig_mod", model)    # of torch.compile
    optimizer, losses, gates = make_optimizer(inner, lr, gate_lr, weight_decay), [], []
    start = sum(p.detach().cpu().double().sum().item() for p in model.parameters())
    settings = dict(settings or {}, steps=steps, lr=lr, gate_lr=gate_lr, weight_decay=weight_decay,
                    warmup=warmup, clip=clip, starting_weights=round(start, 6))
    if resume:
        losses, gates = resume_from(path, inner, settings, optimizer)
    model.train()
    progress = Progress(Path(path).stem, len(losses), steps)
    with interrupts() as interrupted:
        for step in range(len(losses), steps):
            loss, n_tokens, shown = loss_of(model, step)
            value, norm = take_step(model, optimizer, loss, clip, schedule(step, steps, warmup))
            if not math.isfinite(value + norm):
                raise ValueError(f"loss was {value}, its gradient {norm} at step {step + 1}")
            losses.append(value)
            if model.config.attention == "infini" and (step + 1) % math.ceil(steps / 100) == 0:
                gates.append(model.gates().cpu())
            progress.show(step + 1, n_tokens, dict(loss=value, **shown))
            if (step + 1) % save_every == 0 or step + 1 == steps or interrupted.is_set():
                write_checkpoint(path, dict(
                    model=inner.state_dict(), config=asdict(model.config), settings=settings,
                    losses=torch.tensor(losses, dtype=torch.float64),
                    gates=torch.stack(gates) if gates else torch.empty(0),
                    optimizer=optimizer.state_dict() if len(losses) < steps else None))
            if interrupted.is_set():
                raise KeyboardInterrupt(f"stopped after step {step + 1} of {steps}, see {path}")
    return losses

# --- The language model --------------------------------------------------------------------------
# A layer's betas start at -4 ... 1, so that some heads are open to the memory and others are not.
LM = dict(batch=1, segments=32, lr=4e-3, gate_lr=1e-2, n_layers=2, d_model=128, n_heads=4,
          d_key=32, segment_len=32, rope_base=100.0, gate_init=-1.5, gate_spread=5.1)

def train_lm(kind, seed, documents, out, steps, batch, segments, lr, gate_lr, model=None,
             name=None, device="cpu", resume=False, **sizes):
    """Train a language model and leave it in OUT/lm-NAME-seedSEED.pt. Returns it and that path.
    kind: a key of KINDS. model: the model to go on from; default, a new one. name: default, the
    kind. sizes: fields of InfiniConfig; d_value is d_key, and d_ff is 4 d_model."""
    torch.manual_seed(seed)
    if model is None:
        sizes.update(d_value=sizes["d_key"], d_ff=4 * sizes["d_model"], **KINDS[kind])
        model = InfiniTransformer(InfiniConfig(**sizes))
    path = Path(out, f"lm-{name or kind}-seed{seed}.pt")
    draws = dict(seed=seed, batch=batch, length=segments * model.config.segment_len)
    text = hashlib.sha256(b"".join(document.numpy() for document in documents)).hexdigest()
    print(f"{path.stem}: {steps} steps of {batch} x {draws['length']:,} bytes, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(model.to(device), lm_loss(documents, **draws), steps, path, lr, gate_lr, resume=resume,
          settings=dict(draws, kind=kind, text=text))
    return model.eval(), path

@torch.no_grad()
def bits(model, tokens, forget=False, at_once=2 ** 14):
    """Compute the bits that each byte but the first costs, (n, T), for pieces (n, T + 1).
    forget: empty the memory before each segment, to see what it is worth."""
    device, costs = model.embedding.weight.device, []
    for piece in tokens.split(max(1, at_once // tokens.shape[1])):
        given, target = piece[:, :-1].to(device), piece[:, 1:].to(device)
        logits, _ = model(given.reshape(-1, model.config.segment_len) if forget else given)
        loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
        costs.append(loss.view(target.shape).cpu() / math.log(2))
    return torch.cat(costs)

def train_command(data, kind, **options):
    """Train a language model, and say how many bits a byte costs in documents it has not seen."""
    length = options["segments"] * options["segment_len"] + 1
    documents, held_out = read_documents(data, options["out"], length)
    tokens = validation_pieces(held_out, length)
    model, _ = train_lm(kind, documents=documents, **options)
    print(f"{bits(model, tokens).mean():.4f} bits per byte on {len(tokens)} held-out pieces "
          f"of {tokens.shape[1] - 1:,} bytes")
    if model.config.attention == "infini":
        print(f"{bits(model, tokens, forget=True).mean():.4f} if it forgets after each segment")
        print("sigmoid(beta), a row per layer and a column per head:", model.gates(), sep="\n")

def sample_command(load, prompt, bytes, temperature, top_p, seed, device):
    """Continue a text with a trained language model. Each byte is shown at once."""
    model, _ = load_model(load, device)
    if model.config.vocab_size != 256 or not prompt:
        raise ValueError(f"--load was {load}, --prompt {prompt!r}, must be a byte model, some text")
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    with suppress(AttributeError):    # for terminals that can't show every character
        sys.stdout.reconfigure(errors="replace")
    print(prompt, end="", flush=True)
    given = torch.tensor([list(prompt.encode(errors="surrogateescape"))], device=device)
    generate(model, given, bytes, temperature, top_p, torch.Generator(device).manual_seed(seed),
             on_token=lambda t: print(decoder.decode(t.numpy(force=True).astype("u1").tobytes()),
                                      end="", flush=True))
    print(decoder.decode(b"", final=True))

# --- Comforts: nothing below is about attention --------------------------------------------------
def say(text, end="\n"):
    """Write to standard error. One that is closed, full or not there stops no training."""
    with suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(text + end)
        sys.stderr.flush()

class Progress:
    """Shows what is done, the speed and the time left. On a terminal it refreshes one line. In a
    file, or where processes share the terminal, it writes a line every few seconds."""
    def __init__(self, name, done, total, unit="steps"):
        self.name, self.first, self.total, self.unit = name, done, total, unit
        self.tokens, self.recent, self.terminal = 0, deque(maxlen=20), False
        self.start, self.last = time.perf_counter(), -math.inf
        with suppress(AttributeError, ValueError):    # there may be no standard error
            self.terminal = sys.stderr.isatty() and parent_process() is None

    def show(self, done, n_tokens, numbers={}):
        now, self.tokens = time.perf_counter(), self.tokens + n_tokens
        self.recent.append(numbers)
        if now - self.last < (0.2 if self.terminal else 5) and done < self.total:
            return
        self.last, seconds = now, now - self.start
        left = round(seconds / (done - self.first) * (self.total - done))
        parts = [f"{self.name}: {done:,}/{self.total:,} {self.unit}"]
        parts += [f"{k} {sum(n[k] for n in self.recent) / len(self.recent):.4f}" for k in numbers]
        parts += [f"{self.tokens / seconds:,.0f} tokens/s", f"{left // 60}:{left % 60:02d} left"]
        before, after = ("\r", "\033[K") if self.terminal else ("", "")
        say(before + "  ".join(parts) + after, "" if self.terminal and done < self.total else "\n")

@contextmanager
def interrupts():
    """Turn the first Ctrl-C into an event, so that a step can end. A second one stops at once."""
    event = threading.Event()
    def handler(*_):
        if event.is_set():
            raise KeyboardInterrupt("stopped at once; the last checkpoint is intact")
        event.set()
        if parent_process() is None:    # os.write, since a print may be under way
            os.write(2, b"\nfinishing this step, then saving; Ctrl-C again stops at once\n")
    here = threading.current_thread() is threading.main_thread()    # only there can it be caught
    before = here and signal.signal(signal.SIGINT, handler)
    try:
        yield event
    finally:
        if here:
            signal.signal(signal.SIGINT, before)

def side_by_side(function, jobs):
    """Call function(*job) for each job, in one process per thread of PyTorch. Yields results."""
    workers, one_thread = min(len(jobs), torch.get_num_threads()), (torch.set_num_threads, (1,))
    if workers == 1:
        yield from map(function, *zip(*jobs))
    else:
        with interrupts(), ProcessPoolExecutor(workers, get_context("spawn"), *one_thread) as pool:
            yield from pool.map(function, *zip(*jobs))

def write_checkpoint(path, content):
    """Write a temporary file, then rename it. A kill in between leaves the old file intact."""
    path, buffer = Path(path), io.BytesIO()
    torch.save(content, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_bytes(buffer.getbuffer())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)

def read_checkpoint(path):
    """Read a checkpoint that train() wrote, and check all of it. No code in it is ever run.
    Raises OSError if it can't be read, ValueError if anything in it is wrong."""
    data, names = Path(path).read_bytes(), "model config settings losses gates optimizer".split()
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        weights, config, settings, losses, gates, state = (content[name] for name in names)
        model = InfiniTransformer(InfiniConfig(**config))
        model.load_state_dict(weights)
        optimizer, c = make_optimizer(model, 0.0, 0.0), model.config
        optimizer.load_state_dict(optimizer.state_dict() if state is None else state)
        moments = [(s[m], p) for p, s in optimizer.state.items() for m in ("exp_avg", "exp_avg_sq")]
        if not (all(x.is_floating_point() and x.isfinite().all()
                    for x in [*weights.values(), losses, gates, *(m for m, _ in moments)])
                and all(m.shape == p.shape for m, p in moments)
                and losses.dim() == 1 and (state is None) == (len(losses) == settings["steps"])
                and gates.shape in ((0,), (len(gates), c.n_layers, c.n_heads))):
            raise ValueError("numbers that can't be")
        return {name: content[name] for name in names}
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} was no checkpoint of this version ({what})") from error

def resume_from(path, model, settings, optimizer):
    """Go on from a checkpoint if there is one. Returns its losses and gates."""
    if not Path(path).exists():
        say(f"{path} is not there to resume, so the training begins anew")
        return [], []
    found = read_checkpoint(path)
    now, before = {**asdict(model.config), **settings}, {**found["config"], **found["settings"]}
    other = [f"{name} = {before.get(name)!r}" for name in now if before.get(name) != now[name]]
    if other:
        raise ValueError(f"{path} was of another training ({other[0]}), must be of this one")
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"] or optimizer.state_dict())    # none: complete
    return found["losses"].tolist(), list(found["gates"])

def load_model(path, device="cpu"):
    """Load the model in a checkpoint, ready for use. Returns it and its training's settings."""
    content = read_checkpoint(path)
    model = InfiniTransformer(InfiniConfig(**content["config"]))
    model.load_state_dict(content["model"])
    return model.to(device).eval(), content["settings"]

class Parser(argparse.ArgumentParser):
    """Shows defaults in the help, refuses abbreviations, and reports an error in one line."""
    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def add_argument(self, *names, help, default=None, **kw):
        help += " (default: %(default)s)" if default not in (None, argparse.SUPPRESS) else ""
        return super().add_argument(*names, help=help, default=default, **kw)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")

def number(low, high=2 ** 31, kind=float):
    """Make an argument type for numbers from low to high."""
    def parse(text):
        value = math.nan
        with suppress(ValueError):
            value = kind(text)
        if not low <= value <= high:
            what = f"a{' whole' * (kind is int)} number from {low:,} to {high:,}"
            raise argparse.ArgumentTypeError(f"was {text!r}, must be {what}")
        return value
    return parse

whole = partial(number, kind=int)

def set_up(device="cpu", threads=None, out=None):
    """Try the device, set the number of threads if it is given, make the output folder."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(f"--device was {device!r}, must be one of this machine, as cpu") from error
    torch.set_num_threads(threads or torch.get_num_threads())
    try:
        Path(out or ".").mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()    # tried before the first step
    except OSError as error:
        raise ValueError(f"--out was {out}, must be a folder to write in ({error})") from error

def run_command(main):
    """Run a command. A user's mistake is one line on standard error and exit code 2."""
    try:
        main()
    except KeyboardInterrupt as stop:
        say(f"\n{str(stop) or 'stopped'}")
        sys.exit(130)
    except BrokenPipeError:    # as in `python train.py | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        text = str(error).strip() or type(error).__name__
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", text):
            raise
        say(f"error: {text.splitlines()[0]}")
        sys.exit(2)

def main():
    command = {"sample": sample_command}.get(*sys.argv[1:2] or [""], train_command)
    parser = Parser(command.__doc__)
    add = parser.add_argument
    if command is sample_command:
        add("sample", choices=["sample"], help="this command")
        add("--load", type=Path, required=True, metavar="FILE", help="checkpoint of a model")
        add("--prompt", default="def main():\n", help="text to continue")
        add("--bytes", type=whole(1), default=500, help="bytes to write")
        add("--temperature", type=number(0, 100), default=0.8, help="0: the likeliest byte")
        add("--top-p", type=number(0, 1), default=0.95, help="share of likely bytes to draw from")
    else:
        add("--kind", choices=KINDS, default="delta", help="kind of attention, or rule of memory")
        add("--data", type=Path, help="text file or folder; without it Python's own source")
        add("--steps", type=whole(1), default=6000, help="steps of training")
        add("--segment-len", type=whole(1), default=LM["segment_len"], help="bytes per segment")
        add("--n-layers", type=whole(1), default=LM["n_layers"], help="layers of the model")
        add("--d-model", type=whole(1), default=LM["d_model"], help="width of the model")
        add("--lr", type=number(0, 1), default=LM["lr"], help="learning rate")
        add("--gate-lr", type=number(0, 1), default=LM["gate_lr"], help="the same for the gates")
        add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for the checkpoint")
        add("--resume", action="store_true", help="go on with a training that was stopped")
    add("--seed", type=whole(0), default=0, help="of all that is random")
    add("--device", default="cpu", help="or cuda, or mps")
    add("--threads", type=whole(1, 1024), help="cores to use; without it PyTorch decides")
    args = vars(parser.parse_args())
    set_up(args["device"], args.pop("threads"), args.get("out"))
    command(**(args if args.pop("sample", None) else {**LM, **args}))

if __name__ == "__main__":
    run_command(main)
