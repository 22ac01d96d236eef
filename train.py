"""A training loop, and a small language model to use it on.

    python train.py                       train a model of bytes, say how good it is
    python train.py sample --load FILE    continue a text, byte by byte"""
import argparse
import codecs
import hashlib
import io
import math
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

import torch
import torch.nn.functional as F

from infini import InfiniConfig, InfiniTransformer, generate, require, require_number

torch.empty(8_000_000)    # glibc now keeps freed blocks up to this size, which saves page faults
KINDS = dict(local=dict(attention="local"), xl=dict(attention="xl"), linear=dict(update="linear"),
             delta=dict(update="delta"), full=dict(attention="full"))

# --- Text: from files to batches -----------------------------------------------------------------
def read_documents(path=None, out=None, shortest=1):
    """Read a folder of files, or one file, as byte tensors. Default: the standard library. Left out
    are hidden and binary files, links to folders, the folder `out`, copies, and texts of less than
    `shortest` bytes. Returns documents to train on and a random tenth to validate on, or the last
    tenth of a single one. Raises ValueError without text, OSError on what can't be read."""
    root = Path(path or Path(os.__file__).parent)
    ours = {Path(out or root).resolve()} - {root.resolve(), *root.resolve().parents}
    left_out = set() if path else {"test", "tests", "idle_test", "site-packages", "encodings",
                                   "dist-packages", "topics.py"}
    def refuse(error):
        raise error
    texts, odd, files = [], 0, [root] if root.is_file() else sorted(
        Path(folder, name) for folder, folders, names in os.walk(root, onerror=refuse)
        for name in names + [name for name in folders if Path(folder, name).is_symlink()])
    for file in files:
        if (all(part not in left_out and part[0] != "." for part in file.relative_to(root).parts)
                and file.match("*" if path else "*.py") and not ours & {*file.resolve().parents}):
            text = file.read_bytes() if file.is_file() else b"\0"
            odd += 0 in text
            texts += [text] * (len(text) > 0 and 0 not in text)
    random.Random(0).shuffle(texts)
    copies, texts = len(texts) - len({*texts}), [*dict.fromkeys(texts)]
    long = [text for text in texts if len(text) >= shortest]
    if not long:
        raise ValueError(f"--data was {root}, {odd} binary, must have {shortest:,} text bytes")
    if odd or copies or len(long) < len(texts):
        say(f"{root}: {odd} binary files or links, {copies} copies and {len(texts) - len(long)} of "
            f"{len(texts)} texts, shorter than {shortest:,} bytes, are not used")
    n = max(1, sum(len(text) >= shortest for text in texts[:len(texts) // 10]))
    cut = len(long[0]) - len(long[0]) // 10
    parts = (long[n:], long[:n]) if len(long) > 1 else ([long[0][:cut]], [long[0][cut:]])
    return [[torch.frombuffer(bytearray(t), dtype=torch.uint8) for t in part] for part in parts]

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
    require(pieces, "--data", "too short", f"one with a held-out document of {length:,} bytes")
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
    return min(1, (step + 1) / max(1, warmup)) * (final + (1 - final) * cosine)

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
    Raises ValueError on a bad argument, loss or checkpoint, OSError if a file can't be used."""
    inner = getattr(model, "_orig_mod", model)    # of torch.compile
    numbers = dict(lr=lr, gate_lr=gate_lr, weight_decay=weight_decay, warmup=warmup, clip=clip)
    numbers = {name: require_number(name, value, 0) for name, value in numbers.items()}
    numbers["steps"] = steps = require_number("steps", steps, 1, whole=True)
    optimizer, losses, gates = make_optimizer(inner, lr, gate_lr, weight_decay), [], []
    start = sum(p.detach().cpu().double().sum().item() for p in model.parameters())
    settings = dict(settings or {}, **numbers, starting_weights=round(start, 6))
    def content():
        return dict(model=inner.state_dict(), config=asdict(model.config), settings=settings,
                    losses=torch.tensor(losses, dtype=torch.float64),
                    gates=torch.stack(gates) if gates else torch.empty(0),
                    optimizer=optimizer.state_dict()["state"] if len(losses) < steps else None)
    torch.save(content(), trial := io.BytesIO())    # what can't be read again is refused now
    read_checkpoint(path, trial.getvalue())
    found = Path(path).exists() and same_training(path, {**asdict(model.config), **settings})
    if resume and found:
        inner.load_state_dict(found["model"])
        optimizer.load_state_dict({**optimizer.state_dict(), "state": found["optimizer"] or {}})
        losses, gates = found["losses"].tolist(), list(found["gates"])
    elif resume:
        say(f"{path} is not there to resume, so the training begins anew")
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
                write_checkpoint(path, content())
            if interrupted.is_set():
                raise KeyboardInterrupt(f"stopped after step {step + 1} of {steps}, see {path}")
    return losses

# --- The language model --------------------------------------------------------------------------
LM = dict(batch=1, segments=16, segment_len=128, n_layers=2, d_model=128, n_heads=4, d_key=32,
          rope_base=1e4, gate_init=-1.5, gate_spread=5.1, lr=3e-3, gate_lr=1e-2)  # betas -4 ... 1

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
    train(model.to(device), lm_loss(documents, **draws), steps, path, lr, gate_lr, resume=resume,
          settings=dict(draws, kind=kind, text=text))
    return model.eval(), path

@torch.no_grad()
def bits(model, tokens, forget=False, at_once=2 ** 14):
    """Compute the bits that each byte but the first costs, (n, T), for pieces (n, T + 1).
    forget: empty the memory before each segment, to see what it is worth. N must divide T."""
    device, N, costs = model.embedding.weight.device, model.config.segment_len, []
    for piece in tokens.split(max(1, at_once // tokens.shape[1])):
        given, target = piece[:, :-1].to(device), piece[:, 1:].to(device)
        logits, _ = model(given.unflatten(1, (-1, N)).flatten(0, 1) if forget else given)
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
    require(model.config.vocab_size == 256, "--load", load, "a model of bytes")
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    with suppress(AttributeError):    # for terminals that can't show every character
        sys.stdout.reconfigure(errors="replace")
    print(prompt, end="", flush=True)
    given = torch.tensor([list(prompt.encode(errors="surrogateescape"))], device=device)
    generate(model, given, bytes, temperature, top_p, torch.Generator(device).manual_seed(seed),
             on_token=lambda t: print(decoder.decode(bytearray(t.tolist())), end="", flush=True))
    print(decoder.decode(b"", final=True))

# --- Comforts: nothing below is about attention --------------------------------------------------
def say(text):
    """Write to standard error. One that is closed, full or not there stops no training."""
    with suppress(AttributeError, OSError, RuntimeError, ValueError):    # RuntimeError: is writing
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

class Progress:
    """Shows what is done, the speed and the time left, in a line every few seconds."""
    def __init__(self, name, done, total, unit="steps"):
        self.name, self.first, self.total, self.unit = name, done, total, unit
        self.tokens, self.recent, self.start, self.last = 0, [], time.perf_counter(), -math.inf
    def show(self, done, n_tokens, numbers={}):
        now, self.tokens = time.perf_counter(), self.tokens + n_tokens
        self.recent = [*self.recent[-19:], numbers]
        if now - self.last < 5 and done < self.total:
            return
        self.last, seconds = now, now - self.start
        left = round(seconds / (done - self.first) * (self.total - done))
        means = [f"{k} {sum(n[k] for n in self.recent) / len(self.recent):.4f}" for k in numbers]
        speed = f"{self.tokens / seconds:,.0f} tokens/s  {left // 60}:{left % 60:02d} left"
        say("  ".join([f"{self.name}: {done:,}/{self.total:,} {self.unit}", *means, speed]))

@contextmanager
def interrupts():
    """Turn the first Ctrl-C into an event, so that a step can end. A second one stops at once."""
    event, number = threading.Event(), signal.SIGTERM if parent_process() else signal.SIGINT
    def handler(*_):
        if event.is_set():
            raise KeyboardInterrupt("stopped at once; the last checkpoint is intact")
        event.set()
        for child in active_children():    # they work side by side, and get SIGTERM
            child.terminate()
        if number == signal.SIGINT:
            say("\nfinishing this step, then saving; Ctrl-C again stops at once")
    here = threading.current_thread() is threading.main_thread()    # only there can it be caught
    before = here and signal.signal(number, handler)
    try:
        yield event
    except BrokenExecutor as error:    # one of them ended early, perhaps because of Ctrl-C
        raise (KeyboardInterrupt() if event.is_set() else error) from None
    finally:
        here and signal.signal(number, before)

def begin_worker():    # it ends with its parent
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()

def side_by_side(function, jobs):
    """Call function(*job) for each job, each in a process with one thread. Yields results."""
    def alone(job):
        stopped.is_set() and signal.default_int_handler(signal.SIGINT, None)
        with ProcessPoolExecutor(1, get_context("spawn"), initializer=begin_worker) as pool:
            if hasattr(signal, "pthread_sigmask"):    # not on Windows; the process inherits it
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            return pool.submit(function, *job).result()
    if min(len(jobs), torch.get_num_threads()) < 2:
        yield from (function(*job) for job in jobs)
    else:
        with interrupts() as stopped, ThreadPoolExecutor(torch.get_num_threads()) as threads:
            yield from threads.map(alone, jobs)

def write_checkpoint(path, content):
    """Write a temporary file, then rename it. A kill in between leaves the old file intact."""
    path, buffer = Path(path).resolve(), io.BytesIO()    # a link stays one
    torch.save(content, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_bytes(buffer.getbuffer())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)

def read_checkpoint(path, data=None):
    """Read a checkpoint that train() wrote, and check all of it. No code in it is ever run.
    Raises OSError if it can't be read, ValueError if anything in it is wrong."""
    data = Path(path).read_bytes() if data is None else data
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        weights, config, settings, losses, gates, state = (content[name] for name in (
            "model", "config", "settings", "losses", "gates", "optimizer"))
        model = InfiniTransformer(InfiniConfig(**config))
        model.load_state_dict(dict(weights), assign=True)    # in their own precision
        optimizer, c, n = make_optimizer(model, 0.0, 0.0), model.config, len(losses)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state or {}})
        each = [(p, s["step"], s["exp_avg"], s["exp_avg_sq"]) for p, s in optimizer.state.items()]
        if not (asdict(c) == config and losses.shape == (n,) and n <= settings["steps"]
                and all(x.is_floating_point() and x.isfinite().all() for x in
                        [*weights.values(), losses, gates, *sum(each, ())])
                and all(step == n and a.shape == b.shape == p.shape for p, step, a, b in each)
                and (state is None) == (n == settings["steps"]) and (state != {} or n == 0)
                and gates.shape in ((0,), (len(gates), c.n_layers, c.n_heads))):
            raise ValueError("numbers that can't be")
        return content
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} was no checkpoint of this version ({what})") from error

def same_training(path, now):
    """Read the checkpoint of a training. Raises ValueError if it is not of the settings `now`."""
    found = read_checkpoint(path)
    old = {**found["config"], **found["settings"]}
    other = [f"{n} = {old.get(n)!r}" for n in {**old, **now} if old.get(n) != now.get(n)]
    if other:
        raise ValueError(f"{path} was of another training ({other[0]}), must be of this one")
    return found

def load_model(path, device="cpu"):
    """Load the model in a checkpoint, ready for use. Returns it and its training's settings."""
    content = read_checkpoint(path)
    model = InfiniTransformer(InfiniConfig(**content["config"]))
    model.load_state_dict(dict(content["model"]), assign=True)
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

def number(low, high=2 ** 31, kind=float):    # makes an argument type
    def parse(text):
        with suppress(ValueError):
            if "_" not in text and low <= (value := kind(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"was {text!r}, must be a{' whole' * (kind is int)} "
                                         f"number from {low:,} to {high:,}")
    return parse

whole = partial(number, kind=int)

def set_up(device="cpu", threads=None, out=None, files=(), inputs=()):
    """Try the device, set the threads, and try the files to write, which may not be inputs."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(f"--device was {device!r}, must be one of this machine, as cpu") from error
    torch.set_num_threads(threads or torch.get_num_threads())
    try:
        Path(out or ".").mkdir(parents=True, exist_ok=True)
        for file in (Path(out or ".", name) for name in (".tried", *files)):
            if file.exists() and any(Path(x).exists() and file.samefile(x) for x in inputs if x):
                raise OSError(f"{file} is an input, too")
            file.open("ab").close()    # tried before the first step
            file.stat().st_size or file.unlink()
    except OSError as error:
        raise ValueError(f"--out was {out}, must be a folder to write in ({error})") from error

def run_command(main):
    """Run a command. A user's mistake is one line on standard error and exit code 2."""
    try:
        if "" in sys.argv:    # as of a shell's variable that is not set
            raise ValueError(f"argument {sys.argv.index('')} was '', must be some text")
        main()
    except KeyboardInterrupt as stop:
        say(f"\n{str(stop) or 'stopped'}")
        sys.exit(130)
    except BrokenPipeError:    # as in `python train.py | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except (ValueError, OSError, MemoryError, RuntimeError, ModuleNotFoundError) as error:
        text = str(error).strip() or type(error).__name__
        not_ours = "out of memory", "allocate memory", "terminated abruptly"
        if isinstance(error, RuntimeError) and not any(words in text for words in not_ours):
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
        add("--steps", type=whole(1), default=5000, help="steps of training")
        add("--segment-len", type=whole(1), default=LM["segment_len"], help="bytes per segment")
        add("--n-layers", type=whole(1), default=LM["n_layers"], help="layers of the model")
        add("--d-model", type=whole(1), default=LM["d_model"], help="width of the model")
        add("--lr", type=number(0, 1), default=LM["lr"], help="learning rate")
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
