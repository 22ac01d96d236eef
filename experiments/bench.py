"""What does the memory cost in time and space? Each row is a ratio of two measurements.

    python -m experiments.bench

Small is the model of passkey.py, the paper layer one layer of the paper's size. Four minutes."""
if not __package__:
    raise SystemExit("run it from the project's folder: python -m experiments.bench")

import csv
import math
import os
import platform
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

try:
    import resource
except ImportError:    # Windows
    resource = None

from infini import InfiniAttention, InfiniConfig, InfiniTransformer, generate, stream
from passkey import model_config
from train import KINDS, Parser, make_optimizer, run_command, set_up, take_step, whole

PAPER_LAYER = dict(d_model=1024, n_heads=8, d_key=128, d_value=128, segment_len=2048)
SIZES = dict(rows=((16, 64), (9, 112), (4, 256)),    # (batch, tokens) of small steps, timed as one
             paper_tokens=16384, parallel_tokens=8192, full_tokens=2 ** 15, matrix=4096, repeats=5,
             near=2 ** 15, far=2 ** 20, early=100, late=10 ** 5, new_tokens=320, segments=64)

# --- Time ----------------------------------------------------------------------------------------
def medians(repeats, *actions):
    """Time each action several times, in turns, so that whatever else the machine does slows all
    of them alike. Returns the median seconds of each."""
    seconds = [[] for _ in actions]
    for _ in range(repeats):
        for action, times in zip(actions, seconds):
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
    return [sorted(times)[len(times) // 2] for times in seconds]

def random_tokens(batch, length):
    """Draw (batch, length) tokens of the small model, the same ones in every call."""
    same = torch.Generator().manual_seed(0)
    return torch.randint(model_config().vocab_size, (batch, length), generator=same)

def model_step(rows, **config):
    """Make a function that trains a small model on each (batch, tokens) in rows as train() does."""
    model = InfiniTransformer(model_config(**config))
    optimizer = make_optimizer(model, 1e-3, 1e-2)
    def step():
        for batch, length in rows:
            tokens = random_tokens(batch, length + 1)
            logits = model(tokens[:, :-1])[0].flatten(0, 1)
            take_step(model, optimizer, F.cross_entropy(logits, tokens[:, 1:].flatten()))
    return step

def layer_step(length, **config):
    """Make a function that runs a paper layer forward and backward. Returns it and the number of
    operations in its matrix products. These are Eqs. 5, 7, 8, 11 and both of Eq. 6 with all N x N
    scores, since masked ones are computed too. The backward pass does each of them twice."""
    layer = InfiniAttention(InfiniConfig(**PAPER_LAYER, **config))
    x, c = torch.randn(1, length, layer.config.d_model, requires_grad=True), layer.config
    per_token = c.n_heads * (2 * c.d_model + c.segment_len + c.d_key) * (c.d_key + c.d_value)
    def step():
        layer.zero_grad()
        layer(x)[0].sum().backward()
    return step, 3 * 2 * length * per_token

# --- Space ---------------------------------------------------------------------------------------
def peak_memory():
    """Return the most memory that this process has used so far, in MB, or nan on Windows."""
    try:    # on Linux, where getrusage counts what the parent used before, too
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2 ** 10
    except (OSError, TypeError):
        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else math.nan
        return usage / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)

def streaming_peak(length):
    """Return the MB that a process needs to read `length` tokens."""
    stream(InfiniTransformer(model_config()), random_tokens(1, length))
    return peak_memory()

def training_peak(checkpoint, segments):
    """Return the MB that a training step on 16 x `segments` segments adds to what is needed."""
    model_step([(1, 1)], checkpoint=checkpoint)()
    before = peak_memory()
    model_step([(16, segments * model_config().segment_len)], checkpoint=checkpoint)()
    return peak_memory() - before

def in_new_process(function, *args):
    """Call a function in a process of its own, whose peak nothing else has raised."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()

# --- The rows ------------------------------------------------------------------------------------
def measurements(b):
    """Measure. Yields what it is, two values and their unit. b: SIZES, as attributes."""
    far, near = (in_new_process(streaming_peak, n) for n in (b.far, b.near))
    yield "peak memory, streaming 1M / 32K tokens", far, near, "MB"
    on, off = (in_new_process(training_peak, on, b.segments) for on in (True, False))
    yield f"peak memory, training, {b.segments} segments, checkpoint=True / without", on, off, "MB"

    kinds = [KINDS[kind] for kind in ("local", "linear", "delta")]
    local, linear, delta = medians(4 * b.repeats, *(model_step(b.rows, **kind) for kind in kinds))
    yield "training step, small, Linear / local", 1e3 * linear, 1e3 * local, "ms"
    yield "training step, small, Delta / local", 1e3 * delta, 1e3 * local, "ms"
    steps, (_, flops, _) = zip(*(layer_step(b.paper_tokens, **kind) for kind in kinds))
    matrix = torch.randn(b.matrix, b.matrix)
    local, linear, delta, product = medians(b.repeats, *steps, lambda: matrix @ matrix)
    yield "training step, paper layer, Linear / local", linear, local, "s"
    yield "training step, paper layer, Delta / local", delta, local, "s"
    yield ("rate of the paper layer's step (Linear) / of a matrix product",
           flops / linear / 1e9, 2 * b.matrix ** 3 / product / 1e9, "GFLOP/s")
    n = b.parallel_tokens
    at_once, in_turn = medians(b.repeats, *(model_step([(1, n)], update="linear", form=form)
                                            for form in ("parallel", "recurrent")))
    yield (f"training speed, small, Linear, {n:,} tokens, parallel / recurrent",
           n / at_once, n / in_turn, "tokens/s")

    model, full = (InfiniTransformer(model_config(**kind)).eval() for kind in ({}, KINDS["full"]))
    text, n = random_tokens(1, b.far), b.near
    states = [stream(model, text[:, :n])[1] for n in (b.far, b.near, b.late, b.early)]
    far, near = medians(b.repeats, *(partial(stream, model, text[:, :n], s) for s in states[:2]))
    yield "streaming, time per token at 1M / at 32K", 1e6 * far / n, 1e6 * near / n, "us"
    write, n = partial(generate, model, text[:, :1], b.new_tokens, 0), b.new_tokens
    late, early = medians(b.repeats, *(partial(write, state=s) for s in states[2:]))
    yield (f"generate, time per token, {b.late:,} / {b.early:,} tokens into the text",
           1e6 * late / n, 1e6 * early / n, "us")
    text, n = text[:, :b.full_tokens], b.full_tokens    # one call, which is fastest for "full"
    full, infini = medians(3, partial(stream, full, text, None, n), partial(stream, model, text))
    yield f"forward, small, {n:,} tokens, full / infini", full, infini, "s"

def processor():
    """Return the processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()

def main():
    parser = Parser("Measure time and memory beside attention without memory, on the CPU.")
    add = parser.add_argument
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for bench.csv")
    add("--threads", type=whole(1, 1024), help="cores to use; without it PyTorch decides")
    args = parser.parse_args()
    set_up(threads=args.threads, out=args.out)
    print(f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores, "
          f"PyTorch {torch.__version__}\n{'what':78}{'measured':>22}{'ratio':>17}", flush=True)
    with open(args.out / "bench.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["what", "first", "second", "unit", "ratio"])
        for what, first, second, unit in measurements(SimpleNamespace(**SIZES)):
            ratio = first / second if second else math.nan
            print(f"{what:78}{first:10.4g} / {second:<9.4g} {unit:9}{ratio:7.3g}", flush=True)
            rows.writerow([what, first, second, unit, ratio])
            file.flush()

if __name__ == "__main__":
    run_command(main)
