"""The experiments on language, run in small. What they show is computed another way."""

import csv
import hashlib
import math
import random
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import train
from experiments import book, compare, gates, plug, sample
from infini import InfiniConfig, InfiniTransformer
from train import KINDS, Recipe

N = 8              # bytes of a segment
SEGMENTS = 4       # of a training sequence
LENGTH = 32        # its bytes
SIZES = dict(
    d_model=16,
    n_heads=2,
    d_key=4,
    d_value=4,
    d_ff=64,
    segment_len=N,
    rope_base=10.0,
    gate_init=-1.5,
    gate_spread=5.1,
)
RULES = ["linear", "delta"]


@pytest.fixture
def library(tmp_path):
    """Write 20 texts of 200 to 580 bytes in which no place is like another."""
    root = tmp_path / "library"
    root.mkdir()
    rng = random.Random(0)
    for i in range(20):
        text = rng.choices(range(97, 123), k=200 + 20 * i)
        (root / f"{i:02}.txt").write_bytes(bytes(text))
    return root


@pytest.fixture
def small(monkeypatch, library, tmp_path):
    """Make models small. Returns the arguments for text, files and threads."""
    monkeypatch.setattr(train, "SIZES", SIZES)
    monkeypatch.setattr(train, "SEGMENTS", SEGMENTS)
    return ["--data", library, "--out", tmp_path, "--threads", 1]


# --- Another way ----------------------------------------------------------------------


def training_texts(library):
    texts, _ = train.read_documents(library, shortest=LENGTH + 1)
    return texts


def held_out(library, length):
    """Cut the held-out texts into (n, length) bytes."""
    _, texts = train.read_documents(library, shortest=LENGTH + 1)
    return train.validation_pieces(texts, length)


def text_hash(library):
    hashed = hashlib.sha256()
    for text in training_texts(library):
        hashed.update(bytes(text.tolist()))
    return hashed.hexdigest()


@torch.no_grad()
def bits_of(model, pieces):
    """Compute the bits of each byte but the first, (n, T), from float64 probabilities."""
    logits, _ = model.double()(pieces[:, :-1])
    p = logits.softmax(-1).gather(-1, pieces[:, 1:, None])
    return -p[:, :, 0].log2().numpy()


def bits_alone(model, pieces):
    """Compute the same if each segment is read on its own."""
    costs = []
    for start in range(0, pieces.shape[1] - 1, N):
        costs.append(bits_of(model, pieces[:, start:start + N + 1]))
    return np.concatenate(costs, axis=1)


def segment_means(costs):
    """Average (n, S N) over pieces and over the bytes of each segment. Returns (S,)."""
    return costs.reshape(len(costs), -1, N).mean(axis=(0, 2))


def load(folder, name, seed):
    model, _ = train.load_model(folder / f"lm-{name}-seed{seed}.pt")
    return model


# --- What was shown -------------------------------------------------------------------


def rows_of(path):
    """Read a CSV file. Returns its header and its rows."""
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    return header, rows


def cells_of(line):
    """Read a table's row. Returns its name, and a list of numbers for each cell."""
    name, rest = line.replace(",", "").split(maxsplit=1)
    cells = []
    for cell in re.findall(r"-?[\d.]+(?: \+- [\d.]+)?", rest):
        cells.append([float(x) for x in cell.split(" +- ")])
    return name, cells


def mean_and_deviation(values):
    """What a cell should hold, to the last digit that it shows."""
    return pytest.approx([np.mean(values), np.std(values, ddof=1)], abs=1.1e-4)


def named_lines(axis):
    """Find the lines with a name at their end. Returns {name: (x, y)}."""
    lines = [line for line in axis.lines if line.get_linestyle() != "None"]
    found = {}
    for name, line in zip(axis.texts, lines, strict=False):
        x, y = line.get_data()
        assert name.xy == (x[-1], y[-1])
        found[name.get_text()] = (list(x), list(y))
    return found


def points_of(axis, colour):
    """Find the points of one colour. Returns a list of (x, y) for each seed."""
    found = []
    for line in axis.lines:
        if line.get_linestyle() == "None" and line.get_color() == colour:
            x, y = line.get_data()
            found.append((list(x), list(y)))
    return found


def colours_of(axis):
    """Find the numbers of a heat map, row by row."""
    return list(axis.images[0].get_array().flatten())


def no_training(*_, **__):
    raise AssertionError("this must be refused before any training")


# --- compare --------------------------------------------------------------------------


@pytest.fixture
def compared(small, command, tmp_path):
    """Compare two seeds of each kind after three steps. Returns what is printed."""
    code, out, err = command(compare.main, "--steps", 3, "--seeds", 2, *small)
    assert code == 0
    assert err.count("3/3") == 10
    return out


def costs_by_hand(library, tmp_path):
    """Score the models of `compared`. Returns {(kind, seed): (S,)}."""
    pieces = held_out(library, 4 * LENGTH + 1)
    costs = {}
    for kind in KINDS:
        read = pieces[:, :LENGTH + 1] if kind == "full" else pieces
        for seed in (0, 1):
            costs[kind, seed] = segment_means(bits_of(load(tmp_path, kind, seed), read))
    return costs


def forgetful_by_hand(library, tmp_path):
    """Score the models with a memory that they may not use. Returns as `costs_by_hand`."""
    pieces = held_out(library, 4 * LENGTH + 1)[:, :LENGTH + 1]
    costs = {}
    for rule in RULES:
        for seed in (0, 1):
            alone = bits_alone(load(tmp_path, rule, seed), pieces)
            costs[rule, seed] = segment_means(alone)
    return costs


def test_compare_trains_kinds_that_differ_in_their_attention_only(
        compared, library, tmp_path):
    same = dict(steps=3, lr=3e-3, gate_lr=1e-2, length=LENGTH, text=text_hash(library))

    for kind in KINDS:
        for seed in (0, 1):
            content = train.read_checkpoint(tmp_path / f"lm-{kind}-seed{seed}.pt")

            config = InfiniConfig(n_layers=2, **SIZES, **KINDS[kind])
            assert content["config"] == asdict(config)
            assert content["settings"] == dict(same, kind=kind, seed=seed)


def test_compare_prints_costs_gains_perplexity_and_what_forgetting_costs(
        compared, library, tmp_path):
    costs = costs_by_hand(library, tmp_path)
    forgetful = forgetful_by_hand(library, tmp_path)
    n = len(held_out(library, 4 * LENGTH + 1))

    title, header, *lines = compared.splitlines()[-7:]

    assert title == (f"{n} held-out pieces of 32 bytes, 2 seeds, "
                     "mean +- standard deviation")
    assert re.split("  +", header) == ["kind", "bits per byte", "less than local",
                                       "perplexity", "forgetful", "numbers kept", "Table 1"]
    for kind, line in zip(KINDS, lines, strict=True):
        name, cells = cells_of(line)
        local = np.array([costs["local", seed][:SEGMENTS].mean() for seed in (0, 1)])
        cost = np.array([costs[kind, seed][:SEGMENTS].mean() for seed in (0, 1)])
        assert name == kind
        assert cells[0] == mean_and_deviation(cost)
        assert cells[1] == mean_and_deviation(local - cost)
        assert cells[2] == pytest.approx([2 ** cost.mean()], rel=1e-5)
        if kind in RULES:
            means = [forgetful[kind, seed].mean() for seed in (0, 1)]
            assert cells[3] == mean_and_deviation(means)
        assert len(cells) == (6 if kind in RULES else 5)


def test_compare_counts_the_numbers_kept_and_does_not_take_them_from_the_formula(
        small, command, monkeypatch):
    monkeypatch.setattr(compare, "context_memory", lambda config, length: 70 * length)

    _, out, _ = command(compare.main, "--steps", 1, "--seeds", 1, *small)

    # Two layers of two heads. xl keeps a segment, full the 32 bytes of a training sequence.
    kept = dict(local=0, xl=2 * 2 * 8 * (4 + 4), linear=2 * 2 * 4 * (4 + 1),
                delta=2 * 2 * 4 * (4 + 1), full=2 * 2 * 32 * (4 + 4))
    for line in out.splitlines()[-5:]:
        name, cells = cells_of(line)
        assert cells[-2:] == [[kept[name]], [70 * 32]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_segments", [1, 2, 5])
def test_a_state_holds_as_many_numbers_as_table_1_says(kind, n_segments):
    config = InfiniConfig(d_model=8, n_layers=3, n_heads=2, d_key=4, d_value=6, d_ff=8,
                          segment_len=7, **KINDS[kind])
    tokens = torch.zeros(1, 7 * n_segments, dtype=torch.long)

    _, state = InfiniTransformer(config)(tokens)

    assert compare.numbers_in(state) == compare.context_memory(config, 7 * n_segments)


@pytest.mark.parametrize("kind, millions", [
    ("local", 0), ("xl", 50.331648), ("linear", 1.585152), ("delta", 1.585152),
    ("full", 16 * 50.331648),
])
def test_table_1_gives_the_papers_numbers_for_its_model(kind, millions):
    config = InfiniConfig(n_layers=12, n_heads=8, d_key=128, d_value=128, segment_len=2048,
                          **KINDS[kind])
    assert compare.context_memory(config, 2 ** 15) == pytest.approx(1e6 * millions, abs=0.1)


def test_compare_saves_the_cost_of_every_segment(compared, library, tmp_path):
    costs = costs_by_hand(library, tmp_path)
    forgetful = forgetful_by_hand(library, tmp_path)
    kept = dict(local=0, xl=256, linear=80, delta=80, full=1024)

    expected = []
    for (kind, seed), values in costs.items():
        who = [kind, str(seed), str(kept[kind])]
        for segment, cost in enumerate(values, 1):
            expected.append([*who, "no", str(segment), pytest.approx(cost, rel=1e-5)])
        for segment, cost in enumerate(forgetful.get((kind, seed), []), 1):
            expected.append([*who, "yes", str(segment), pytest.approx(cost, rel=1e-5)])

    header, rows = rows_of(tmp_path / "compare.csv")
    assert header == ["kind", "seed", "numbers_kept", "forgets", "segment", "bits_per_byte"]
    assert [[*row[:5], float(row[5])] for row in rows] == expected


def test_compare_draws_what_each_kind_saves_by_position(
        figures, compared, library, tmp_path):
    costs = costs_by_hand(library, tmp_path)
    stretches = {8: slice(0, 1), 16: slice(1, 2), 32: slice(2, 4), 64: slice(4, 8),
                 128: slice(8, 16)}

    [axis] = figures[0].axes

    lines = named_lines(axis)
    assert list(lines) == list(KINDS)
    for kind, (x, y) in lines.items():
        assert x == ([8, 16, 32] if kind == "full" else [8, 16, 32, 64, 128])
        each = []
        for seed in (0, 1):
            gain = costs["local", seed][:len(costs[kind, seed])] - costs[kind, seed]
            each.append([gain[stretches[end]].mean() for end in x])
        assert y == pytest.approx(np.mean(each, axis=0), abs=1e-5)
        points = points_of(axis, compare.common.COLOUR[kind])
        assert points == [(x, pytest.approx(values, abs=1e-5)) for values in each]
    assert "less than local" in axis.get_ylabel()
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["8", "16", "32", "64",
                                                                    "128"]


def test_compare_draws_costs_against_the_numbers_kept(figures, compared, library, tmp_path):
    costs = costs_by_hand(library, tmp_path)
    kept = dict(local=0, xl=256, linear=80, delta=80, full=1024)

    [axis] = figures[1].axes

    lines = named_lines(axis)
    assert list(lines) == list(KINDS)
    for kind, (x, y) in lines.items():
        each = [costs[kind, seed][:SEGMENTS].mean() for seed in (0, 1)]
        assert x == [kept[kind]]
        assert y == pytest.approx([np.mean(each)], rel=1e-5)
        points = points_of(axis, compare.common.COLOUR[kind])
        assert points == [([kept[kind]] * 2, pytest.approx(each, rel=1e-5))]


def measurements(**gains):
    """Make two seeds of each kind, which save so many bits in the last segments."""
    measured = {}
    for kind in KINDS:
        for seed in (0, 1):
            costs = torch.full((4 * SEGMENTS,), 2.0 + seed)
            costs[2:] -= gains.get(kind, [0.0, 0.0])[seed]
            kept = {"linear": 10, "delta": 10, "xl": 78}.get(kind, 0)
            measured[kind, seed] = compare.Measurement(costs, None, kept, kept)
    return measured


@pytest.mark.parametrize("title, question", [
    (compare.context_title, "What does it save to know what came before?"),
    (compare.memory_title, "Does it help to keep more numbers?"),
])
@pytest.mark.parametrize("rule", RULES)
def test_a_title_of_compare_is_a_finding_only_if_both_rules_win_with_each_seed(
        title, question, rule, small):
    helps = dict(linear=[0.1, 0.2], delta=[0.2, 0.1])
    fails_once = {**helps, rule: [0.3, -0.1]}

    assert "The memory" in title(measurements(**helps), range(2))
    assert title(measurements(**fails_once), range(2)) == question


def test_titles_of_compare_say_how_far_it_helps_and_how_much_more_is_kept(small):
    measured = measurements(linear=[0.1, 0.2], delta=[0.2, 0.1])
    assert "beyond the length of training" in compare.context_title(measured, range(2))
    assert "keeps 7.8 times as much" in compare.memory_title(measured, range(2))


def test_compare_goes_on_with_finished_trainings_and_shows_the_same(
        compared, small, command):
    code, again, err = command(compare.main, "--steps", 3, "--seeds", 2, *small, "--resume")

    assert code == 0
    assert again == compared
    assert "3/3" not in err


@pytest.mark.parametrize("last", ["full-seed1", "local-seed0"])
def test_compare_looks_at_all_checkpoints_before_its_first_step(
        last, small, command, library, tmp_path, monkeypatch):
    path = train.train_lm(Recipe("xl", 7, steps=1), training_texts(library), tmp_path)
    path.rename(tmp_path / f"lm-{last}.pt")
    monkeypatch.setattr(train, "train_lm", no_training)

    code, out, err = command(compare.main, "--steps", 3, "--seeds", 2, *small)

    assert (code, out) == (2, "")
    assert f"lm-{last}.pt is of another training" in err


# --- gates ----------------------------------------------------------------------------


@pytest.fixture
def gates_shown(small, command, figures):
    """Train gates of the Linear rule at both rates. Returns what is printed."""
    options = ["--steps", 12, "--rule", "linear", "--seed", 4]
    code, out, _ = command(gates.main, *options, *small)
    assert code == 0
    return out


def gates_by_hand(path):
    """Compute the gates in a checkpoint in float64, (n_layers, n_heads)."""
    weights = train.read_checkpoint(path)["model"]
    betas = [weights[f"blocks.{layer}.attention.beta"].double() for layer in (0, 1)]
    return 1 / (1 + np.exp(-torch.stack(betas).numpy()))


@pytest.mark.parametrize("rate", [0.01, 0.003])
def test_gates_are_trained_at_a_rate_of_their_own_and_at_everyones(
        rate, gates_shown, tmp_path):
    path = tmp_path / f"lm-linear-gates-{rate}-seed4.pt"
    settings = train.read_checkpoint(path)["settings"]

    assert settings["gate_lr"] == rate
    assert settings["lr"] == 0.003
    assert (settings["kind"], settings["seed"], settings["steps"]) == ("linear", 4, 12)


def test_gates_prints_and_saves_where_they_end(gates_shown, tmp_path):
    table = r"learning rate of the gates (.+): sigmoid.+\nlayer 1(.+)\nlayer 2(.+)"
    printed = re.findall(table, gates_shown)
    header, rows = rows_of(tmp_path / "gates.csv")

    assert [float(rate) for rate, *_ in printed] == [0.01, 0.003]
    assert header == ["gate_lr", "layer", "head", "gate"]
    places = [f"{layer} {head}" for _, layer, head, _ in rows]
    assert places == 2 * ["1 1", "1 2", "2 1", "2 2"]
    for rate, *lines in printed:
        ends = gates_by_hand(tmp_path / f"lm-linear-gates-{rate}-seed4.pt").flatten()
        shown = [float(gate) for gate in " ".join(lines).split()]
        saved = [float(row[3]) for row in rows if row[0] == rate]
        assert shown == pytest.approx(ends, abs=6e-4)
        assert saved == pytest.approx(ends, abs=1e-6)


def test_gates_are_drawn_at_the_start_and_at_the_end(figures, gates_shown, tmp_path):
    start, own, shared, _ = figures[0].axes    # the last one is the bar of colours

    begin = 1 / (1 + np.exp(-np.array([-1.5 - 5.1 / 2, -1.5 + 5.1 / 2])))
    assert colours_of(start) == pytest.approx([*begin, *begin], abs=1e-6)
    for axis, rate in [(own, 0.01), (shared, 0.003)]:
        ends = gates_by_hand(tmp_path / f"lm-linear-gates-{rate}-seed4.pt")
        assert axis.get_title() == f"at the end, rate {rate}"
        assert colours_of(axis) == pytest.approx(ends.flatten(), abs=1e-6)
        assert axis.get_xlabel() == "head"
    assert start.get_ylabel() == "layer"


@pytest.mark.parametrize("own, finding", [(0.2, False), (0.29, False), (0.31, True)])
def test_the_title_of_gates_says_which_rate_moves_them_further(own, finding):
    start = torch.tensor([[0.5, 0.5]])
    moved = {0.01: start + torch.tensor([[own, -own]]), 0.003: start - 0.3}

    title = gates.find_title(start, moved)

    assert ("further from where they began" in title) == finding


@pytest.mark.parametrize("rate", [0.01, 0.003])
def test_gates_looks_at_both_checkpoints_before_its_first_step(
        rate, small, command, tmp_path, monkeypatch):
    command(gates.main, "--steps", 2, *small)
    (tmp_path / f"lm-delta-gates-{0.013 - rate:g}-seed0.pt").unlink()
    monkeypatch.setattr(train, "train_lm", no_training)

    code, out, err = command(gates.main, "--steps", 3, *small)

    assert (code, out) == (2, "")
    assert f"lm-delta-gates-{rate}-seed0.pt is of another training" in err


# --- plug -----------------------------------------------------------------------------


def run_plug(command, small, *options):
    code, out, err = command(plug.main, "--steps", 25, "--seeds", 2, *small, *options)
    assert code == 0
    return out, err


def plug_in_by_hand(folder, kind, seed, beta):
    """Make the copy from which a model goes on."""
    local = load(folder, "local", seed)
    if kind == "local":
        return local
    config = replace(local.config, attention="infini", update=kind)
    model = InfiniTransformer(config)
    model.load_state_dict(local.state_dict(), strict=False)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.beta.fill_(beta)
    return model


@pytest.mark.parametrize("beta", [-30.0, -2.0, 2.0])
def test_plug_compares_copies_of_one_model_before_and_after(
        beta, small, command, library, tmp_path, monkeypatch):
    monkeypatch.setattr(plug, "PLUG_GATE", beta)
    out, _ = run_plug(command, small)
    pieces = held_out(library, LENGTH + 1)

    title, header, *lines = out.splitlines()[-5:]
    assert title == (f"bits per byte on {len(pieces)} held-out pieces of 32 bytes, "
                     "2 seeds, mean +- standard deviation")
    assert re.split("  +", header) == ["goes on as", "at the start", "2 steps on",
                                       "less than local"]

    local = [bits_of(load(tmp_path, "plug-local", 1000 + seed), pieces).mean()
             for seed in (0, 1)]
    table = dict(cells_of(line) for line in lines)
    assert list(table) == ["local", "linear", "delta"]
    for kind, cells in table.items():
        before = []
        after = []
        for seed in (0, 1):
            start = plug_in_by_hand(tmp_path, kind, seed, beta)
            before.append(bits_of(start, pieces).mean())
            end = load(tmp_path, f"plug-{kind}", 1000 + seed)
            after.append(bits_of(end, pieces).mean())
        assert cells[0] == mean_and_deviation(before)
        assert cells[1] == mean_and_deviation(after)
        assert cells[2] == mean_and_deviation(np.subtract(local, after))

    # A memory behind shut gates changes nothing at first.
    if beta == -30:
        assert table["linear"][0] == table["delta"][0] == table["local"][0]
    else:
        assert table["linear"][0] != table["local"][0]


@pytest.mark.parametrize("kind", ["local", "linear", "delta"])
def test_a_copy_goes_on_at_half_the_rate_on_other_text(kind, small, command, tmp_path):
    run_plug(command, small)
    for seed in (0, 1):
        first = train.read_checkpoint(tmp_path / f"lm-local-seed{seed}.pt")["settings"]
        then = train.read_checkpoint(tmp_path / f"lm-plug-{kind}-seed{1000 + seed}.pt")
        changed = dict(steps=2, lr=1.5e-3, seed=1000 + seed, kind=kind)

        assert (first["steps"], first["lr"], first["kind"]) == (25, 3e-3, "local")
        assert then["settings"] == {**first, **changed}
        assert kind in (then["config"]["attention"], then["config"]["update"])
        assert then["config"]["gate_init"] == (-1.5 if kind == "local" else -2.0)


def test_plug_saves_and_draws_the_losses_on_the_way(figures, small, command, tmp_path):
    run_plug(command, small)

    losses = {}
    for kind in plug.KINDS:
        for seed in (0, 1):
            path = tmp_path / f"lm-plug-{kind}-seed{1000 + seed}.pt"
            nats = train.read_checkpoint(path)["losses"]
            losses[kind, seed] = np.array(nats) / math.log(2)

    header, rows = rows_of(tmp_path / "plug.csv")
    assert header == ["kind", "seed", "before", "after", "step", "training_bits_per_byte"]
    saved = [(row[0], row[1], row[4], float(row[5])) for row in rows]
    expected = []
    for (kind, seed), (first, second) in losses.items():
        expected.append((kind, str(seed), "1", pytest.approx(first)))
        expected.append((kind, str(seed), "2", pytest.approx(second)))
    assert saved == expected

    [axis] = figures[0].axes
    lines = named_lines(axis)
    assert list(lines) == ["local", "linear", "delta"]
    for kind, (x, y) in lines.items():
        each = [losses["local", seed] - losses[kind, seed] for seed in (0, 1)]
        assert x == [1, 2]
        assert y == pytest.approx(np.mean(each, axis=0), abs=1e-5)
        points = points_of(axis, plug.common.COLOUR[kind])
        assert points == [([1, 2], pytest.approx(gain, abs=1e-5)) for gain in each]


def test_losses_are_averaged_over_at_most_20_stretches():
    steps = torch.stack([torch.arange(1.0, 51), torch.arange(101.0, 151)])

    ends, means = plug.stretch_means(steps)

    assert ends == [*range(3, 50, 3), 50]    # the last stretch is shorter
    assert means[:, 0].tolist() == [2.0, 102.0]
    assert means[:, -1].tolist() == [49.5, 149.5]


@pytest.mark.parametrize("after, finding", [
    (dict(linear=[1.9, 2.9], delta=[1.9, 2.9]), True),
    (dict(linear=[2.1, 2.5], delta=[1.9, 2.9]), False),
    (dict(linear=[1.9, 2.9], delta=[1.5, 3.1]), False),
])
def test_the_title_of_plug_is_a_finding_only_if_all_seeds_agree(after, finding):
    measured = {}
    for kind in plug.KINDS:
        for seed in (0, 1):
            value = after.get(kind, [2.0, 3.0])[seed]
            measured[kind, seed] = plug.Measurement(2.0, value, [1.0] * 7)

    title = plug.find_title(measured, range(2))

    assert (title == "A memory that is plugged in helps after 7 steps") == finding


def test_plug_goes_on_with_finished_trainings_and_shows_the_same(small, command):
    out, _ = run_plug(command, small)
    again, err = run_plug(command, small, "--resume")

    assert again == out
    assert "2/2" not in err


@pytest.mark.parametrize("name", [
    "local-seed1", "plug-local-seed1001", "plug-delta-seed1000",
])
def test_plug_looks_at_all_checkpoints_before_its_first_step(
        name, small, command, library, tmp_path, monkeypatch):
    path = train.train_lm(Recipe("delta", 7, steps=1), training_texts(library), tmp_path)
    path.rename(tmp_path / f"lm-{name}.pt")
    monkeypatch.setattr(train, "train_lm", no_training)

    code, out, err = command(plug.main, "--steps", 25, "--seeds", 2, *small)

    assert (code, out) == (2, "")
    assert f"lm-{name}.pt is of another training" in err


# --- book -----------------------------------------------------------------------------


@pytest.fixture
def models(small, library, tmp_path):
    """Train two seeds of each kind for a step. Returns {(kind, seed): path}."""
    texts = training_texts(library)
    paths = {}
    for kind in KINDS:
        for seed in (0, 1):
            paths[kind, seed] = train.train_lm(Recipe(kind, seed, 1), texts, tmp_path)
    return paths


@pytest.fixture
def text(tmp_path, monkeypatch):
    """Put random bytes in the place of the book. Returns all of them."""
    written = random.Random(0).randbytes(503)
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_bytes(written)
    monkeypatch.setattr(book.os, "__file__", str(tmp_path / "os.py"))
    monkeypatch.setattr(book, "BYTES", 300)
    return written


def read(command, tmp_path, paths):
    return command(book.main, "--load", *paths, "--out", tmp_path, "--threads", 1)


def some(models, *kinds):
    return [path for (kind, _), path in models.items() if kind in kinds]


def book_by_hand(models, text):
    """Read 296 bytes, which are whole segments. Returns {name: (seeds, 37)}."""
    pieces = torch.tensor([list(text[:297])])
    costs = {}
    for (kind, _), path in models.items():
        if kind == "full":
            continue
        model, _ = train.load_model(path)
        costs.setdefault(kind, []).append(segment_means(bits_of(model, pieces)))
        if kind in RULES:
            forgetful = segment_means(bits_alone(model, pieces))
            costs.setdefault(f"{kind} forgets", []).append(forgetful)
    return {name: np.array(each) for name, each in costs.items()}


NAMES = ["local", "xl", "linear", "linear forgets", "delta", "delta forgets"]
STRETCHES = {8: slice(0, 1), 32: slice(1, 4), 128: slice(4, 16), 296: slice(16, 37)}


def by_stretch(costs):
    """Average (seeds, 37) over the stretches. Returns (seeds, 4)."""
    return np.stack([costs[:, part].mean(1) for part in STRETCHES.values()], axis=1)


def test_book_prints_the_costs_by_position_and_the_gain_in_all(
        models, text, command, tmp_path):
    code, out, _ = read(command, tmp_path, some(models, "local", "xl", *RULES))
    costs = book_by_hand(models, text)

    title, header, *lines = out.splitlines()
    assert code == 0
    assert title == "297 bytes, 2 seeds; bits per byte up to byte"
    assert header.split() == ["8", "32", "128", "296"]
    for name in NAMES:
        line = lines.pop(0)
        shown = [float(cell) for cell in line[16:].split()]
        assert line[:16].strip() == name
        assert shown == pytest.approx(by_stretch(costs[name]).mean(0), abs=6e-4)
        if name != "local":
            words, cell = lines.pop(0).split(": ")
            gain = (costs["local"] - costs[name]).mean(1)
            assert words == "    less than local"
            assert cells_of(f"- {cell}")[1] == [mean_and_deviation(gain)]
    assert lines == []


def test_book_saves_and_draws_each_seed(figures, models, text, command, tmp_path):
    read(command, tmp_path, some(models, "local", "xl", *RULES))
    costs = book_by_hand(models, text)

    header, rows = rows_of(tmp_path / "book.csv")
    assert header == ["kind", "seed", "up_to_byte", "bits_per_byte"]
    expected = []
    for name in NAMES:
        for seed, values in enumerate(by_stretch(costs[name])):
            for end, cost in zip(STRETCHES, values, strict=True):
                expected.append([name, str(seed), str(end), pytest.approx(cost, rel=1e-5)])
    assert [[*row[:3], float(row[3])] for row in rows] == expected

    [axis] = figures[0].axes
    lines = named_lines(axis)
    assert list(lines) == NAMES
    for name, (x, y) in lines.items():
        gain = by_stretch(costs["local"] - costs[name])
        assert x == list(STRETCHES)
        assert y == pytest.approx(gain.mean(0), abs=1e-5)
    for kind in ["xl", *RULES]:
        points = points_of(axis, book.common.COLOUR[kind])
        gain = by_stretch(costs["local"] - costs[kind])
        assert points == [(list(STRETCHES), pytest.approx(y, abs=1e-5)) for y in gain]


def test_book_shows_the_same_whatever_the_order_of_the_files(
        models, text, command, tmp_path):
    paths = some(models, "local", "delta")
    again = [*paths[::-1]]

    assert read(command, tmp_path, paths)[1] == read(command, tmp_path, again)[1]


def test_book_takes_files_from_several_load_options(models, text, command, tmp_path):
    one, two = some(models, "local")

    code, out, _ = command(book.main, "--load", one, "--load", two, "--out", tmp_path,
                           "--threads", 1)

    assert code == 0
    assert "2 seeds" in out


def test_book_refuses_models_that_it_cant_compare_before_it_reads(
        models, command, tmp_path, monkeypatch):
    def read_nothing(N):
        raise AssertionError("this must be refused before the book is read")

    monkeypatch.setattr(book, "read_book", read_nothing)
    local = some(models, "local")
    delta = some(models, "delta")
    copy = tmp_path / "copy.pt"
    copy.write_bytes(delta[0].read_bytes())
    words = train.Path(train.__file__).with_name("assets") / "passkey-delta.pt"

    for paths, reason in [
        (delta, "needs a local model of seed 0"),
        ([local[0], *delta], "needs a local model of seed 1"),
        ([*local, delta[1]], "needs a delta model of seed 0"),
        ([*local, *delta, copy], "are both delta, seed 0"),
        ([*local, *some(models, "full")], "of kind full"),
        ([*local, words], "is not a language model"),
        ([tmp_path / "nothing.pt"], "No such file"),
    ]:
        code, out, err = read(command, tmp_path, paths)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert reason in err


def test_book_refuses_segments_of_two_lengths_before_it_reads(
        models, command, library, tmp_path, monkeypatch):
    monkeypatch.setattr(book, "read_book", None)
    monkeypatch.setattr(train, "SIZES", {**SIZES, "segment_len": 16})
    recipe = Recipe("linear", 0, steps=1)
    other = train.train_lm(recipe, training_texts(library), tmp_path / "other")

    code, _, err = read(command, tmp_path, [models["local", 0], other])

    assert code == 2
    assert err == "error: segments must be of one length, not of [8, 16] bytes\n"


@pytest.mark.parametrize("gains, finding", [
    (dict(linear=[0.1, 0.2]), True),
    (dict(linear=[0.1, 0.2], delta=[0.3, 0.1]), True),
    (dict(linear=[0.1, 0.2], delta=[0.3, -0.1]), False),
    (dict(linear=[-0.1, 0.9], delta=[0.3, 0.1]), False),
    (dict(xl=[0.1, 0.2]), False),
])
def test_the_title_of_book_is_a_finding_only_if_all_seeds_gain_at_its_end(gains, finding):
    by_position = {"local": torch.zeros(2, 3)}
    for name, last in gains.items():
        by_position[name] = torch.tensor([[-1.0, 0.0, last[0]], [0.0, -1.0, last[1]]])

    assert book.find_title(by_position).startswith("The memory still helps") == finding


def test_the_book_is_half_a_million_bytes_that_training_leaves_out():
    text = book.read_book(128)

    assert len(text) == 2 ** 19 + 1
    assert b"assert" in bytes(text.tolist())
    assert not [file for file in train.standard_library() if file.name == "topics.py"]


# --- sample ---------------------------------------------------------------------------


@pytest.fixture
def path(models):
    return models["delta", 0]


def continue_text(command, path, *options):
    code, out, _ = command(sample.main, "--load", path, "--prompt", "(x) é ", "--bytes", 30,
                           *options)
    assert code == 0
    return out


@pytest.mark.parametrize("options", [["--temperature", 0], ["--top-p", 1e-9]])
def test_sample_takes_the_likeliest_byte_if_told_so(options, path, command):
    model, _ = train.load_model(path)
    text = list("(x) é ".encode())
    for _ in range(30):
        logits, _ = model(torch.tensor([text]))
        text.append(logits[0, -1].argmax().item())

    shown = continue_text(command, path, *options)

    assert shown == bytes(text).decode(errors="replace") + "\n"


def test_each_option_of_sample_counts(path, command):
    first = continue_text(command, path)
    again = continue_text(command, path, "--seed", 0, "--temperature", 0.8, "--top-p", 0.95)
    others = [
        continue_text(command, path, "--seed", 1),
        continue_text(command, path, "--temperature", 0.1),
        continue_text(command, path, "--top-p", 0.1),
        continue_text(command, path, "--bytes", 29),
    ]

    assert first == again
    assert len({first, *others}) == 5


def test_sample_draws_a_byte_only_when_the_one_before_was_shown(path, monkeypatch):
    calls = []

    def noted_stream(model, tokens, state):
        calls.append(tokens.tolist())
        return train_stream(model, tokens, state)

    train_stream = sample.stream
    monkeypatch.setattr(sample, "stream", noted_stream)
    model, _ = train.load_model(path)

    drawn = sample.draw_bytes(model, b"ab", 5, 1.0, 1.0, None)
    first = next(drawn)
    assert calls == [[[97, 98]]]
    next(drawn)
    assert calls == [[[97, 98]], [[first]]]    # and the text is not read again


def test_sample_shows_a_character_when_all_its_bytes_are_there(path, command, monkeypatch):
    def bytes_of_characters(*_):
        yield from "é€".encode() + b"\xff" + "€".encode()[:2]

    monkeypatch.setattr(sample, "draw_bytes", bytes_of_characters)

    assert continue_text(command, path) == "(x) é é€\ufffd\ufffd\n"


@pytest.mark.parametrize("options", [
    ["--prompt", ""], ["--bytes", 0], ["--top-p", 1.1], ["--top-p", 0], ["--top-p", "nan"],
    ["--temperature", -1], ["--temperature", "nan"], ["--temperature", "0,8"],
    ["--seed", -1], ["--device", "abacus"], ["--load", "another.pt"], ["--load="],
])
def test_sample_refuses_a_wrong_option_by_its_name(options, path, command):
    code, _, err = command(sample.main, "--load", path, *options)

    name = options[0].strip("-=").replace("-", "[-_]")
    assert code == 2
    assert re.search(name, err.splitlines()[-1])
    assert "Traceback" not in err


def test_sample_refuses_a_model_of_words(command):
    words = train.Path(train.__file__).with_name("assets") / "passkey-delta.pt"

    code, out, err = command(sample.main, "--load", words)

    assert (code, out) == (2, "")
    assert err == f"error: {words} is not a model of bytes\n"
