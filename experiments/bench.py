"""What does the memory cost in time and space? Each row divides two measurements.

    python -m experiments.bench           two minutes
    python -m experiments.bench --peer    also beside infini-transformer-pytorch 0.2.1

"Small" is the model of passkey.py. "Paper layer" is one layer of the paper's size.
"""

import math
import os
import platform
import re
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

import common
import train
from common import format_length
from infini import (
    ATTENTION,
    InfiniAttention,
    InfiniConfig,
    InfiniTransformer,
    Memory,
    XLAttention,
    generate,
    stream,
)
from passkey import answer_loss, model_config

# Shapes are (documents, tokens).
SIZES = dict(
    repeats=5,                                        # of long actions; of short ones 20
    small_step=[(16, 64), (9, 112), (4, 256)],        # three steps, timed as one
    paper_step=(1, 16384),
    text=2 ** 15,                                     # tokens to stream
    long_text=2 ** 20,
    new_tokens=320,                                   # to generate
    asked=(2, 1024),
    many_segments=(1, 8192),
    checkpointed=[(16, 2048, "infini"), (1, 2 ** 13, "full"), (1, 2 ** 15, "full")],
    peer={"small": (16, 512, 20), "paper": (1, 16384, 1)},    # with the repeats
)

KINDS = ["local", "linear", "delta"]
SCALE = {"s": 1, "ms": 1e3, "us": 1e6}    # units in a second


@dataclass(frozen=True)
class Row:
    """Holds two measurements. Their ratio is the result."""

    what: str
    first: float
    second: float
    unit: str

    def ratio(self):
        return self.first / self.second


def time_row(what, first, second, unit, n=1):
    """Make a row of two times, in seconds, for n tokens."""
    scale = SCALE[unit] / n
    return Row(what, scale * first, scale * second, unit)


# --- How time and memory are measured -------------------------------------------------


def medians(actions, repeats):
    """Time each action several times, in turns, so that all meet the same disturbances.

    actions: {name: function}. Returns {name: median seconds}.
    """
    seconds = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


def search_proc(name, pattern):
    """Return what a file in /proc says where the pattern matches. Only Linux has one."""
    file = Path("/proc", name)
    found = re.search(pattern, file.read_text()) if file.exists() else None
    return found[1] if found else None


def peak_memory():
    """Return the most memory that this process has used so far, in MB, or nan."""
    kilobytes = search_proc("self/status", r"VmHWM:\s+(\d+)")
    return int(kilobytes) / 2 ** 10 if kilobytes else math.nan


def in_new_process(function, *arguments):
    """Call a function in a process of its own, whose peak nothing else has raised."""
    context = get_context("spawn")
    with ProcessPoolExecutor(1, context, common.keep_freed_memory) as pool:
        return pool.submit(function, *arguments).result()


# --- What is measured -----------------------------------------------------------------


def small_config(kind):
    return model_config(**train.KINDS[kind])


def paper_config(kind):
    return InfiniConfig(d_model=1024, n_heads=8, d_key=128, d_value=128, segment_len=2048,
                        **train.KINDS[kind])


def random_tokens(batch, length):
    """Draw (batch, length) tokens of the small model, the same ones in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model_config().vocab_size, (batch, length), generator=generator)


def training_step(model, shapes):
    """Make a function that takes a training step on random tokens of each shape."""
    optimizer = train.make_optimizer(model, lr=1e-3, gate_lr=1e-2)

    def step():
        for batch, length in shapes:
            tokens = random_tokens(batch, length + 1)
            logits, _ = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            train.take_step(model, optimizer, loss)

    return step


def layer_step(layer, x):
    """Make a function that runs a layer forward and backward on x: (B, T, d_model)."""
    def step():
        o, _ = layer(x)
        o.sum().backward()

    return step


def layer_read(layer, x):
    """Make a function that only runs it forward."""
    @torch.no_grad()
    def read():
        layer(x)

    return read


class OneByOne(InfiniAttention):
    """Reads one segment after the other, as Eq. 4 says, and not all at once."""

    segments = XLAttention.segments


def one_by_one_model(config):
    """Make a model of such layers."""
    model = InfiniTransformer(config)
    for block in model.blocks:
        block.attention = OneByOne(config)
    return model


# --- Memory ---------------------------------------------------------------------------


def streaming_peak(n_tokens):
    """Return the MB that a process needs to read so many tokens."""
    model = InfiniTransformer(model_config())
    stream(model, random_tokens(1, n_tokens))
    return peak_memory()


def training_peak(config, batch, length):
    """Return the MB that a training step adds to what even the smallest one needs."""
    model = InfiniTransformer(config)
    training_step(model, [(1, 1)])()
    before = peak_memory()
    training_step(model, [(batch, length)])()
    return peak_memory() - before


def streaming_memory():
    """Compare what a process needs for a long text and for a shorter one."""
    long = SIZES["long_text"]
    short = SIZES["text"]
    yield Row(
        f"peak memory, streaming {format_length(long)} / {format_length(short)} tokens",
        in_new_process(streaming_peak, long),
        in_new_process(streaming_peak, short),
        "MB",
    )


def training_memory():
    """Compare a step that computes segments again with steps that store all of them."""
    for batch, length, attention in SIZES["checkpointed"]:
        again = model_config(checkpoint=True)
        stored = model_config(attention=attention)
        n = batch * length
        yield Row(
            f"peak memory, training, {n:,} tokens, checkpoint=True / {attention}",
            in_new_process(training_peak, again, batch, length),
            in_new_process(training_peak, stored, batch, length),
            "MB",
        )


# --- Time beside a model without memory -----------------------------------------------


def beside_local(what, seconds, unit, n=1):
    """Divide both rules' time for n tokens by local's. seconds: {kind: median}."""
    for rule in ("linear", "delta"):
        name = f"{what}, {rule.capitalize()} / local"
        yield time_row(name, seconds[rule], seconds["local"], unit, n)


def small_models():
    """Make a small model of each kind. Returns {kind: model}."""
    return {kind: InfiniTransformer(small_config(kind)) for kind in KINDS}


def training_small():
    """Time a training step of the small model."""
    actions = {}
    for kind, model in small_models().items():
        actions[kind] = training_step(model, SIZES["small_step"])
    seconds = medians(actions, 4 * SIZES["repeats"])
    yield from beside_local("training step, small", seconds, "ms")


def training_paper():
    """Time the paper's layer, forward and backward."""
    x = torch.randn(*SIZES["paper_step"], 1024, requires_grad=True)
    actions = {}
    for kind in KINDS:
        config = paper_config(kind)
        layer = ATTENTION[config.attention](config)
        actions[kind] = layer_step(layer, x)
    seconds = medians(actions, SIZES["repeats"])
    yield from beside_local("training step, paper layer", seconds, "s")


def streaming():
    """Time how a text is read, in chunks and without gradients."""
    n = SIZES["text"]
    text = random_tokens(1, n)
    actions = {}
    for kind, model in small_models().items():
        actions[kind] = partial(stream, model.eval(), text)
    seconds = medians(actions, SIZES["repeats"])
    yield from beside_local("streaming, time per token", seconds, "us", n)


def generating():
    """Time how a text is written, token by token."""
    n = SIZES["new_tokens"]
    prompt = random_tokens(1, 1)
    actions = {}
    for kind, model in small_models().items():
        actions[kind] = partial(generate, model.eval(), prompt, n, temperature=0)
    seconds = medians(actions, SIZES["repeats"])
    yield from beside_local("generate, time per token", seconds, "us", n)


# --- What else saves time -------------------------------------------------------------


def asking_all():
    """Time a step that predicts every token, and one that predicts the last four.

    In the second one, the last layer only writes the segments before theirs.
    """
    batch, length = SIZES["asked"]
    model = InfiniTransformer(small_config("linear"))
    inputs = random_tokens(batch, length + 1)

    def ask(n):
        loss, _, _ = answer_loss(model, inputs, n)
        loss.backward()

    actions = {"all": partial(ask, length), "four": partial(ask, 4)}
    seconds = medians(actions, 4 * SIZES["repeats"])
    what = "training step, small, Linear, every token asked / the last four"
    yield time_row(what, seconds["all"], seconds["four"], "ms")


def segments_at_once():
    """Measure the speed of training with all segments at once, and with one by one."""
    batch, length = SIZES["many_segments"]
    config = small_config("linear")
    actions = {
        "at once": training_step(InfiniTransformer(config), [(batch, length)]),
        "one by one": training_step(one_by_one_model(config), [(batch, length)]),
    }
    seconds = medians(actions, SIZES["repeats"])

    n = batch * length
    what = "training speed, small, Linear, segments at once / one by one"
    yield Row(what, n / seconds["at once"], n / seconds["one by one"], "tokens/s")


def streaming_full():
    """Time how a text is read with full attention, and with a memory."""
    n = SIZES["text"]
    text = random_tokens(1, n)
    full = InfiniTransformer(small_config("full")).eval()
    ours = InfiniTransformer(small_config("delta")).eval()
    actions = {
        "full": partial(stream, full, text, chunk_len=n),    # its fastest way
        "infini": partial(stream, ours, text),
    }
    seconds = medians(actions, 3)
    what = f"streaming, small, {n:,} tokens, full / infini"
    yield time_row(what, seconds["full"], seconds["infini"], "s")


# --- Beside infini-transformer-pytorch ------------------------------------------------


def neighbours(weight, d_key):
    """Bring two features that RoPE turns together beside each other.

    weight: (H d_key, d_model).
    """
    halves = weight.unflatten(0, (-1, 2, d_key // 2))    # (H, 2, d_key / 2, d_model)
    return halves.transpose(1, 2).flatten(0, 2)


def peer_weights(ours):
    """Name the weights of our layer as the peer does.

    There RoPE turns neighbouring features, the gate is inverted, and x is normalised.
    """
    c = ours.config
    half = c.d_key // 2
    w_q = neighbours(ours.w_q.weight, c.d_key)
    w_k = neighbours(ours.w_k.weight, c.d_key)
    return {
        "norm.gamma": torch.ones(c.d_model),
        "to_qkv.weight": torch.cat([w_q, w_k, ours.w_v.weight]),
        "to_out.weight": ours.w_o.weight,
        "fastweight_mem.head_gates": -ours.beta,
        "rotary_emb.freqs": c.rope_base ** (-torch.arange(half) / half),
    }


def peer_of(ours):
    """Make a layer of infini-transformer-pytorch (P. Wang) with our weights.

    Returns a function (x) -> (o, memory), which runs it segment by segment.
    """
    # Nothing else needs this package.
    from infini_transformer_pytorch.infini_transformer import CausalAttention, Memories

    c = ours.config
    layer = CausalAttention(c.d_model, dim_head=c.d_key, heads=c.n_heads,
                            use_mem_delta_rule=c.update == "delta")
    layer.load_state_dict(peer_weights(ours))

    def read(x):
        memory = Memory.empty(len(x), c.n_heads, c.d_key, c.d_value)
        outputs = []
        for segment in x.split(c.segment_len, dim=1):
            memory = Memories(*memory)
            o, _, memory = layer(segment, None, memory, return_new_memories=True)
            outputs.append(o)
        return torch.cat(outputs, dim=1), memory

    return read


def compare_layers(what, theirs, ours, x, repeats):
    """Compare two layers: their outputs, a training step, and how they read a document."""
    with torch.no_grad():
        o_theirs, _ = theirs(x)
        o_ours, _ = ours(x)
    difference = (o_theirs - o_ours).abs().max().item()
    largest = o_ours.abs().max().item()
    name = f"output, {what}, largest difference / largest value"
    yield Row(name, difference, largest, "")

    actions = {"theirs": layer_step(theirs, x), "ours": layer_step(ours, x)}
    seconds = medians(actions, repeats)
    name = f"training step, {what}, peer / ours"
    yield time_row(name, seconds["theirs"], seconds["ours"], "ms")

    actions = {"theirs": layer_read(theirs, x[:1]), "ours": layer_read(ours, x[:1])}
    seconds = medians(actions, repeats)
    name = f"reading, time per token, {what}, peer / ours"
    yield time_row(name, seconds["theirs"], seconds["ours"], "us", x.shape[1])


def beside_peer():
    """Compare our layer with the peer's, for both rules and both sizes."""
    configs = {"small": small_config, "paper": paper_config}
    for rule in ("linear", "delta"):
        for size, (batch, length, repeats) in SIZES["peer"].items():
            ours = InfiniAttention(configs[size](rule))
            x = torch.randn(batch, length, ours.config.d_model)
            x = F.rms_norm(x, x.shape[2:])    # as the peer does by itself
            theirs = peer_of(ours)
            yield from compare_layers(f"{size} layer, {rule}", theirs, ours, x, repeats)


# --- The command ----------------------------------------------------------------------

MEASUREMENTS = [
    streaming_memory,
    training_memory,
    training_small,
    training_paper,
    streaming,
    generating,
    asking_all,
    segments_at_once,
    streaming_full,
]

LINE = "{:64}{:>9} / {:<9}{:9}{:>9}"


def print_header():
    """Say on what machine it is measured, and what the columns are."""
    cpu = search_proc("cpuinfo", r"model name\s*: (.+)") or platform.machine()
    print(f"{cpu}, {torch.get_num_threads()} of {os.cpu_count()} cores, "
          f"PyTorch {torch.__version__}")
    print(LINE.format("what", "first", "second", "unit", "ratio"), flush=True)


def print_measurement(row):
    first = f"{row.first:.4g}"
    second = f"{row.second:.4g}"
    ratio = f"{row.ratio():.3g}"
    print(LINE.format(row.what, first, second, row.unit, ratio), flush=True)


def main():
    parser = common.new_parser("Measure what the memory costs, on the CPU.")
    parser.add_argument("--peer", action="store_true",
                        help="also measure infini-transformer-pytorch 0.2.1")
    common.add_shared_arguments(parser, device=False)
    args = parser.parse_args()
    common.set_threads(args.threads)

    measurements = list(MEASUREMENTS)
    if args.peer:
        if find_spec("infini_transformer_pytorch") is None:
            parser.error("--peer needs pip install infini-transformer-pytorch==0.2.1")
        measurements.append(beside_peer)

    print_header()
    rows = []
    for measure in measurements:
        for row in measure():
            print_measurement(row)
            rows.append([row.what, row.first, row.second, row.unit, row.ratio()])
    header = ["what", "first", "second", "unit", "ratio"]
    common.write_csv(args.out / "bench.csv", header, rows)


if __name__ == "__main__":
    # Worker processes find functions by the name of their module, which is not __main__.
    from experiments.bench import main
    common.run_command(main)
