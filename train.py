"""The training loop that passkey.py and the notebook share: AdamW, gates with a rate of their own, exact resuming.

(The language model that `python train.py` will train comes with a later version.)
"""
import argparse
import io
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import torch

try:
    import resource
except ImportError:    # Windows
    resource = None

from infini import InfiniConfig, InfiniTransformer


# --- Training ------------------------------------------------------------------------------------------------------

def make_optimizer(model, lr, gate_lr, weight_decay):
    """AdamW with three groups: matrices, gains (no weight decay), and gates (no weight decay, a rate of their own).

    Departure: the paper does not mention a rate for the gates. Adam moves a number by about its rate a step, and a beta
    has about 4 to go from a half-open gate to an open or a shut one: with the matrices' rate it never gets there.
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
    optimizer, losses = make_optimizer(model, lr, gate_lr, weight_decay), []
    settings = dict(settings or {}, steps=steps, lr=lr, gate_lr=gate_lr, weight_decay=weight_decay, warmup=warmup,
                    clip=clip)
    if resume and Path(path).exists():
        found = read_checkpoint(path)
        made, wanted = ({**c, **s} for c, s in ((found["config"], found["settings"]), (asdict(model.config), settings)))
        differing = [f"{name} = {made.get(name)!r}" for name in wanted if made.get(name) != wanted[name]]
        if differing:
            raise ValueError(f"{path} was of another training ({', '.join(differing)}), must be of this one to resume")
        model.load_state_dict(found["model"])
        losses = found["losses"].tolist()
        if found["optimizer"] is None:    # it was done
            return losses
        optimizer.load_state_dict(found["optimizer"])

    def save(done):
        write_checkpoint(path, dict(
            model=model.state_dict(), config=asdict(model.config), settings=settings, command=" ".join(sys.argv),
            torch=str(torch.__version__), losses=torch.tensor(losses, dtype=torch.float64),
            optimizer=None if done else optimizer.state_dict()))

    model.train()
    progress = Progress(len(losses), steps)
    with interrupts() as interrupted:
        for step in range(len(losses), steps):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, steps, warmup)
            loss, n_tokens, shown = loss_of(model, step)
            value = loss.item()
            if not math.isfinite(value):
                raise ValueError(f"loss was {value} at step {step + 1}, must be finite; {path} is as last saved")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            losses.append(value)
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
        self.start, self.last, self.terminal = time.monotonic(), -math.inf, sys.stderr.isatty()

    def show(self, done, n_tokens, numbers={}):
        now, self.tokens = time.monotonic(), self.tokens + n_tokens
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
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


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
        print("\nfinishing this step, then saving; Ctrl-C again stops at once", file=sys.stderr)
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
        return {name: content[name] for name in ("model", "config", "settings", "losses", "optimizer")}
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


def draw_lines(curves, path, xlabel, ylabel):
    """Curves over a logarithmic axis, in a PNG file. curves: {name: (x, y)}."""
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for name, (x, y) in curves.items():
        axis.plot(x, y, "o-", label=name)
    axis.set_xscale("log", base=2)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)


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


def whole(low, high=2 ** 31):
    """An argument type: whole numbers from low to high."""
    def parse(text):
        try:
            value = int(text.replace(",", "").replace("_", ""))
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"was {text!r}, must be a whole number from {low:,} to {high:,}")
        return value
    return parse


def several(parse):
    """An argument type: values separated by commas."""
    return lambda text: [parse(part) for part in text.replace(",", " ").split()] or parse(text)


def add_common_arguments(parser):
    parser.add_argument("--seed", type=whole(0), default=0, help="of weights and training data (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: %(default)s)")
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
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device was {args.device!r}, must be a device of this machine, such as cpu") from error
    args.out.mkdir(parents=True, exist_ok=True)


def run(main):
    """Run a command: what the user did wrong is one line on standard error and exit code 2, no traceback."""
    try:
        main()
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped'}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    sys.exit("train.py holds the training loop so far; `python passkey.py` uses it")
