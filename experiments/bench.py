"""What does the memory cost in time and space? Each row is a ratio of two measurements.

    python -m experiments.bench           two minutes
    python -m experiments.bench --peer    also beside infini-transformer-pytorch, if it is installed

Small is the model of passkey.py, the paper layer one layer of the paper's size."""
if not __package__:
    raise SystemExit("run it from the project's folder: python -m experiments.bench")

import csv
import math
import os
import platform
import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from timeit import timeit
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from infini import InfiniAttention, InfiniConfig, InfiniTransformer, Memory, generate, stream
from passkey import answer_loss, model_config
from train import KINDS, Parser, make_optimizer, run_command, set_up, take_step, whole

paper = partial(InfiniConfig, d_model=1024, n_heads=8, d_key=128, d_value=128, segment_len=2048)
SIZES = dict(rows=((16, 64), (9, 112), (4, 256)),    # (batch, tokens) of small steps, timed as one
             trained=((16, 2048, "infini"), (1, 2 ** 13, "full"), (1, 2 ** 15, "full")), repeats=5,
             paper_tokens=16384, parallel_tokens=8192, near=2 ** 15, far=2 ** 20, new_tokens=320,
             peer=(("small", model_config, (16, 512, 64)), ("paper", paper, (1, 16384, 1024))))

def medians(repeats, *actions):
    """Time each action several times, in turns, so that whatever else the machine does slows all
    of them alike. Returns the median seconds of each."""
    seconds = [[timeit(action, number=1) for action in actions] for _ in range(repeats)]
    return [median(times) for times in zip(*seconds)]

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

def layer_step(layer, x):
    """Make a function that runs a layer forward and backward on x: (B, T, d_model)."""
    return lambda: layer(x)[0].sum().backward()

def peer_of(ours):
    """Make a layer of infini-transformer-pytorch 0.2.1 (P. Wang) with our weights. There RoPE turns
    neighbours, the gate is inverted, x is normalised, and the first memory has to be given."""
    from infini_transformer_pytorch.infini_transformer import CausalAttention, Memories
    c, half, delta = ours.config, ours.config.d_key // 2, ours.config.update == "delta"
    layer = CausalAttention(c.d_model, dim_head=c.d_key, heads=c.n_heads, use_mem_delta_rule=delta)
    q, k = (w.weight.unflatten(0, (-1, 2, half)).transpose(1, 2).flatten(0, 2)
            for w in (ours.w_q, ours.w_k))
    layer.load_state_dict({
        "norm.gamma": torch.ones(c.d_model), "to_qkv.weight": torch.cat([q, k, ours.w_v.weight]),
        "to_out.weight": ours.w_o.weight, "fastweight_mem.head_gates": -ours.beta,
        "rotary_emb.freqs": c.rope_base ** (-torch.arange(half) / half)})
    def read(x):
        memory, outputs = Memory.empty(len(x), c.n_heads, c.d_key, c.d_value), []
        for piece in x.split(c.segment_len, 1):
            o, _, memory = layer(piece, None, Memories(*memory), return_new_memories=True)
            outputs.append(o)
        return torch.cat(outputs, 1), memory
    return read

def told_by_linux(name, pattern):
    """Return what a file of /proc says where the pattern matches, or None on other systems."""
    file = Path("/proc", name)
    found = re.search(pattern, file.read_text()) if file.exists() else None
    return found and found[1]

def peak_memory():
    """Return the most memory that this process has used so far, in MB. Linux only, else nan."""
    return float(told_by_linux("self/status", r"VmHWM:\s+(\d+)") or math.nan) / 2 ** 10

def streaming_peak(length):
    """Return the MB that a process needs to read `length` tokens."""
    stream(InfiniTransformer(model_config()), random_tokens(1, length))
    return peak_memory()

def training_peak(config, batch, length):
    """Return the MB that a training step on (batch, length) tokens adds to what is needed."""
    model_step([(1, 1)], **config)()
    before = peak_memory()
    model_step([(batch, length)], **config)()
    return peak_memory() - before

def in_new_process(function, *args):
    """Call a function in a process of its own, whose peak nothing else has raised."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()

def measurements(b, peer):
    """Measure. Yields what it is, two values and their unit. b: SIZES, as attributes."""
    peaks = (in_new_process(streaming_peak, n) for n in (b.far, b.near))
    yield "peak memory, streaming 1M / 32K tokens", *peaks, "MB"
    for batch, n, kind in b.trained:
        peaks = (in_new_process(training_peak, config, batch, n)
                 for config in (dict(checkpoint=True), dict(attention=kind)))
        yield f"peak memory, training, {n:,} tokens, checkpoint=True / {kind}", *peaks, "MB"
    kinds = [KINDS[kind] for kind in ("local", "linear", "delta")]
    models = [InfiniTransformer(model_config(**kind)).eval() for kind in kinds]
    layers = [InfiniAttention(paper(**kind)) for kind in kinds]
    text, x = random_tokens(1, b.near), torch.randn(1, b.paper_tokens, 1024, requires_grad=True)
    for what, unit, scale, repeats, actions in (
            ("training step, small", "ms", 1e3, 4, [model_step(b.rows, **kind) for kind in kinds]),
            ("training step, paper layer", "s", 1, 1, [layer_step(layer, x) for layer in layers]),
            ("streaming, time per token", "us", 1e6 / b.near, 1,
             [partial(stream, model, text) for model in models]),
            ("generate, time per token", "us", 1e6 / b.new_tokens, 1,
             [partial(generate, model, text[:, :1], b.new_tokens, 0) for model in models])):
        local, linear, delta = (scale * t for t in medians(b.repeats * repeats, *actions))
        yield f"{what}, Linear / local", linear, local, unit
        yield f"{what}, Delta / local", delta, local, unit
    for rule, (size, make, shape) in product(("linear", "delta"), b.peer if peer else ()):
        ours, repeats = InfiniAttention(make(update=rule)), 4 * b.repeats if shape[0] > 1 else 1
        theirs, what = peer_of(ours), f"{size} layer, {rule}, peer / ours"
        x = F.rms_norm(torch.randn(*shape), shape[2:])
        print(f"with the same weights they differ by {(theirs(x)[0] - ours(x)[0]).abs().max():.1g}")
        times = medians(repeats, layer_step(theirs, x), layer_step(ours, x))
        yield f"training step, {what}", *(1e3 * t for t in times), "ms"
        theirs, ours = (torch.no_grad()(partial(layer, x[:1])) for layer in (theirs, ours))
        times = (1e6 / shape[1] * t for t in medians(repeats, theirs, ours))
        yield f"reading, time per token, {what}", *times, "us"
    model, x = InfiniTransformer(model_config(update="linear")), random_tokens(2, 1025)
    steps = (lambda n=n: answer_loss(model, x, n)[0].backward() for n in (1024, 4))
    times = (1e3 * t for t in medians(4 * b.repeats, *steps))
    yield "training step, small, Linear, every token asked / the last four", *times, "ms"
    steps = (model_step([(1, b.parallel_tokens)], update="linear", form=form)
             for form in ("parallel", "recurrent"))
    speeds = (b.parallel_tokens / t for t in medians(b.repeats, *steps))
    yield "training speed, small, Linear, parallel / recurrent", *speeds, "tokens/s"
    model, full = (InfiniTransformer(model_config(**kind)).eval() for kind in ({}, KINDS["full"]))
    full_at_once = partial(stream, full, text, chunk_len=b.near)    # which is its fastest
    times = medians(3, full_at_once, partial(stream, model, text))
    yield f"streaming, small, {b.near:,} tokens, full / infini", *times, "s"

def main():
    parser = Parser("Measure time and memory beside attention without memory, on the CPU.")
    add = parser.add_argument
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for bench.csv")
    add("--peer", action="store_true", help="also measure infini-transformer-pytorch 0.2.1")
    add("--threads", type=whole(1, 1024), help="cores to use; without it PyTorch decides")
    args = parser.parse_args()
    set_up(threads=args.threads, out=args.out)
    if args.peer and not find_spec("infini_transformer_pytorch"):
        parser.error("argument --peer: pip install infini-transformer-pytorch==0.2.1 comes first")
    cpu = told_by_linux("cpuinfo", r"model name\s*: (.+)") or platform.processor()
    print(f"{cpu or platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores, "
          f"PyTorch {torch.__version__}\n{'what':78}{'measured':>22}{'ratio':>17}", flush=True)
    with open(args.out / "bench.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["what", "first", "second", "unit", "ratio"])
        for what, first, second, unit in measurements(SimpleNamespace(**SIZES), args.peer):
            ratio = first / second if second else math.nan
            print(f"{what:78}{first:10.4g} / {second:<9.4g} {unit:9}{ratio:7.3g}", flush=True)
            rows.writerow([what, first, second, unit, ratio])
            file.flush()

if __name__ == "__main__":
    run_command(main)
