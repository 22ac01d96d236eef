"""Each experiment is run in small. What it prints, draws and writes is computed another way."""
import copy
import csv
import hashlib
import importlib
import math
import random
import re
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

import infini
import passkey
import train
from experiments import bench, book, compare, curves, gates, plug, recall, sharpness, texts
from infini import InfiniConfig, InfiniTransformer
from passkey import one_key
from test_infini import KINDS, RULES, SMALL, make, o_sigma, same
from test_passkey import save

LM = dict(batch=2, segments=4, lr=4e-3, gate_lr=3e-2, n_layers=2, d_model=16, n_heads=2, d_key=4,
          segment_len=8, rope_base=10.0, gate_init=-1.5, gate_spread=5.1)

@pytest.fixture
def small(monkeypatch, folder, tmp_path):    # arguments for text, files and threads
    monkeypatch.setattr(train, "LM", LM)
    return ["--data", folder, "--out", tmp_path, "--threads", 1]

def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))

def pieces(folder, length):
    return train.validation_pieces(train.read_documents(folder)[1], length)

@torch.no_grad()
def bits_of(model, tokens):    # of every byte but the first, (n, T), from the probabilities
    p = model(tokens[:, :-1])[0].double().softmax(-1).gather(-1, tokens[:, 1:, None])
    return -p[..., 0].log2()

def trained(path, folder, **told):    # the model in a checkpoint whose training was told this
    model, settings = train.load_model(path)
    text = b"".join(document.numpy() for document in train.read_documents(folder)[0])
    told["text"] = hashlib.sha256(text).hexdigest()
    assert told.items() <= settings.items()
    return model

def cells(line):    # the name and the cells of a table's row, each a list of numbers
    name, rest = line.replace(",", "").split(maxsplit=1)
    numbers = re.findall(r"-?[\d.]+(?: \+- [\d.]+)?", rest)
    return [name, *([float(x) for x in cell.split(" +- ")] for cell in numbers)]

def near(cell, values):    # does it hold their mean and standard deviation?
    return cell == pytest.approx([np.mean(values), np.std(values, ddof=1)], abs=1.1e-4)

def save_model(path, training="short", seed=0, **config):
    torch.manual_seed(seed)
    model = InfiniTransformer(passkey.model_config(**config))
    return save(path, model, training=training, seed=seed)

# --- curves and compare --------------------------------------------------------------------------
def test_curves_show_each_point_with_plain_ticks_and_can_be_told_apart(figures, tmp_path):
    lines = {"a": ([1, 4.5, 2 ** 20], [0.5, 20.0, 1000.0]), "b": (torch.tensor([2]), torch.ones(1))}
    for scale in ("linear", "log"):
        curves.draw_lines(lines, tmp_path / "x.png", "tokens", "share", scale)
        axis, = figures[-1].axes
        assert (axis.get_xscale(), axis.get_yscale()) == (scale, "linear")
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("tokens", "share") and axis.get_legend()
    assert len({line.get_marker() for line in axis.lines} - {"None"}) == 2
    same(np.array(axis.lines[0].get_data()), np.array(lines["a"]))
    assert [text.get_text() for text in axis.get_xticklabels()] == ["1", "2", "4.5", "1M"]
    assert rows_of(tmp_path / "x.csv") == [
        ["curve", "tokens", "share"], ["a", "1.0", "0.5"], ["a", "4.5", "20.0"],
        ["a", "1048576.0", "1000.0"], ["b", "2.0", "1.0"]]
    assert curves.mean_and_deviation(torch.tensor([1.0, 2.0, 6.0])) == "3.0000 +- 2.6458"
    assert curves.mean_and_deviation(torch.tensor([1.5])) == "1.5000"

def test_compare_prints_what_can_be_computed_by_hand(
        small, folder, tmp_path, monkeypatch, command):
    monkeypatch.setattr(compare, "context_memory", lambda config, length: 70 * length)
    code, out, err = command(compare.main, "--steps", 3, "--seeds", 2, *small)
    assert code == 0 and err.count("3/3 steps") == 10
    tokens, costs, forgot = pieces(folder, 129), {}, {}
    for kind, seed in ((kind, seed) for kind in train.KINDS for seed in (0, 1)):
        model = trained(tmp_path / f"lm-{kind}-seed{seed}.pt", folder, kind=kind, seed=seed,
                        steps=3, batch=2, length=32, lr=4e-3, gate_lr=3e-2)
        assert model.config == InfiniConfig(
            d_model=16, n_layers=2, n_heads=2, d_key=4, d_value=4, d_ff=64, segment_len=8,
            rope_base=10.0, gate_init=-1.5, gate_spread=5.1, **train.KINDS[kind])
        cost = bits_of(model, tokens[:, :33] if kind == "full" else tokens)
        costs[kind, seed] = cost.unflatten(1, (-1, 8)).mean((0, 2)).numpy()
        alone = torch.stack([bits_of(model, tokens[:, i:i + 9]) for i in range(0, 32, 8)])
        forgot.setdefault(kind, []).append(alone.mean())
    header, *rows = rows_of(tmp_path / "compare.csv")
    assert header == ["kind", "seed", "segment", "bits_per_byte"]
    assert [(kind, int(seed), int(i), float(x)) for kind, seed, i, x in rows] == [
        (*who, i, pytest.approx(x)) for who, cost in costs.items() for i, x in enumerate(cost, 1)]
    assert f"\n{len(tokens)} held-out pieces of 32 bytes, 2 seeds" in out
    header, *lines = out.splitlines()[-6:]
    assert re.sub("  +", "|", header) == (
        "kind|bits per byte|less than local|perplexity|forgetful|numbers kept|Table 1")
    memory = dict(local=0, xl=256, linear=80, delta=80, full=1024)
    for kind, line in zip(train.KINDS, lines, strict=True):
        name, value, gain, perplexity, *without, counted, formula = cells(line)
        values, local = (np.array([np.mean(costs[k, seed][:4]) for seed in (0, 1)])
                         for k in (kind, "local"))
        assert name == kind and near(value, values) and near(gain, local - values)
        assert perplexity == pytest.approx([2 ** values.mean()], rel=1e-5)
        assert (counted, formula) == ([memory[kind]], [70 * 32]) and len(without) == (kind in RULES)
        assert all(near(cell, forgot[kind]) for cell in without)
    drawn = rows_of(tmp_path / "context.csv")[1:]
    s = np.mean([costs["full", 0], costs["full", 1]], 0)
    same([[float(x) for x in row[1:]] for row in drawn[-3:]],
         [(1, s[0]), (2, s[1]), (4, s[2:].mean())], 1e-5)
    assert [row[0] for row in drawn if row[1] == "4.0"] == [*train.KINDS] and len(drawn) == 23
    kept = [[float(x) for x in row[1:]] for row in rows_of(tmp_path / "memory.csv")[1:]]
    same(kept, [(max(1, memory[kind]), np.mean(costs[kind, seed][:4]))
                for kind in memory for seed in (0, 1)], 1e-5)
    code, again, err = command(compare.main, "--steps", 3, "--seeds", 2, *small, "--resume")
    assert code == 0 and again == out and "3/3 steps" not in err
    assert compare.by_position(torch.arange(9.0)) == ([1, 2, 4, 8, 9], [0, 1, 2.5, 5.5, 8])

@pytest.mark.parametrize("kind", KINDS)
def test_compare_knows_by_table_1_what_a_state_holds(kind):
    model = make(kind)
    for length in (2 * SMALL.segment_len, 5 * SMALL.segment_len):
        state = model(torch.zeros(1, length, dtype=torch.long))[1]
        assert compare.numbers_in(state) == compare.context_memory(model.config, length)
    paper = replace(model.config, n_layers=12, n_heads=8, d_key=128, d_value=128, segment_len=2048)
    numbers = dict(infini=1_585_152, xl=50_331_648, full=16 * 50_331_648, local=0)
    assert compare.context_memory(paper, 2 ** 15) == numbers[paper.attention]

def test_book_reads_one_document_with_a_memory_and_without(
        small, tmp_path, monkeypatch, command):
    assert command(compare.main, "--steps", 3, "--seeds", 2, *small)[0] == 0
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_bytes(text := random.Random(0).randbytes(303))
    monkeypatch.setattr(book.os, "__file__", tmp_path / "os.py")
    paths = {(kind, seed): tmp_path / f"lm-{kind}-seed{seed}.pt"
             for kind in ("local", "xl", "delta") for seed in (0, 1)}
    options = ["--out", tmp_path, "--threads", 1]
    code, out, err = command(book.main, "--load", *paths.values(), *options)
    tokens, costs = torch.tensor([[*text]])[:, :297], {}
    for (kind, seed), path in paths.items():
        model = train.load_model(path)[0]
        costs.setdefault(kind, []).append(bits_of(model, tokens)[0])
        costs.setdefault(f"{kind} forgets", []).append(torch.cat([
            bits_of(model, tokens[:, i:i + 9])[0] for i in range(0, 296, 8)]))
    mean = {name: np.mean(np.stack(cost), 0) for name, cost in costs.items()}
    title, header, *lines = out.splitlines()
    assert code == 0 and title.startswith("303 bytes, 2 seeds") and len(lines) == 7
    assert header.split() == ["8", "32", "128", "296"]
    drawn = rows_of(tmp_path / "book.csv")[1:]
    for i, name in enumerate(["local", "xl", "delta", "delta forgets"]):
        line, gain = lines[max(0, 2 * i - 1)], mean["local"] - mean[name]
        parts = [slice(0, 8), slice(8, 32), slice(32, 128), slice(128, 296)]
        assert line[:16].strip() == name
        same([*map(float, line[16:].split())], [mean[name][part].mean() for part in parts], 6e-4)
        same([float(row[2]) for row in drawn[4 * i:][:4]], [gain[p].mean() for p in parts], 1e-5)
        gains = [(a - b).mean() for a, b in zip(costs["local"], costs[name])]
        assert i == 0 or near(cells("a " + lines[2 * i].split(": ")[1])[1], gains)
    full = [tmp_path / f"lm-full-seed{seed}.pt" for seed in (0, 1)]
    for bad in ([paths["xl", 0]], [*paths.values()][1:], [*paths.values(), *full]):
        assert command(book.main, "--load", *bad, *options)[0] == 2

# --- gates and plug ------------------------------------------------------------------------------
def test_gates_are_shown_as_training_noted_them(small, figures, folder, tmp_path, command):
    code, out, _ = command(gates.main, "--steps", 102, "--rule", "linear", "--seed", 4, *small)
    tables = re.findall(r"gates (.+): sigmoid.+\nlayer 1 (.+)\nlayer 2 (.+)", out)
    header, *rows = rows_of(tmp_path / "gates.csv")
    assert code == 0 and header == ["gate_lr", "step", "layer", "head", "gate"]
    steps = [*range(2, 103, 2)]
    for rate, table, above, below in zip((0.03, 0.004), tables, *(
            figures[0].axes[:2], figures[0].axes[2:4]), strict=True):
        path = tmp_path / f"lm-linear-gates-{rate}-seed4.pt"
        model = trained(path, folder, gate_lr=rate, lr=0.004, seed=4, steps=102, kind="linear")
        history, last = train.read_checkpoint(path)["gates"], model.gates()
        assert float(table[0]) == rate and above.get_title() == f"learning rate of the gates {rate}"
        same([[*map(float, line.split())] for line in table[1:]], last, 5e-4)
        same(above.images[0].get_array(), last, 1e-6)
        some = [row for row in rows if float(row[0]) == rate]
        assert [row[1:4] for row in some] == [[str(step), layer, head] for step in steps
                                              for layer in "12" for head in "12"]
        same([float(row[4]) for row in some], history.flatten(), 1e-6)
        for line, style, values in zip(below.lines, ["C1--", "C1--", "C0-", "C0-"],
                                       history.flatten(1).T, strict=True):
            assert to_rgba(line.get_color()) == to_rgba(style[:2])
            assert line.get_linestyle() == style[2:] and [*line.get_xdata()] == steps
            same(line.get_ydata(), values, 1e-6)

@pytest.mark.parametrize("gate", [-30, 2])
def test_plug_starts_where_local_ended_if_gates_are_closed(gate, small, folder, tmp_path, command):
    code, out, _ = command(plug.main, "--steps", 25, "--seeds", 2, "--plug-gate", gate, *small)
    header, *lines = out.splitlines()[-4:]
    assert re.sub("  +", "|", header) == "goes on as|at the start|2 steps on|less than local"
    table, tokens = {name: row for name, *row in map(cells, lines)}, pieces(folder, 33)
    local = [trained(tmp_path / f"lm-local-seed{seed}.pt", folder, steps=25) for seed in (0, 1)]
    starts = [bits_of(model, tokens).mean() for model in local]
    weights = [sum(p.double().sum().item() for p in model.parameters()) for model in local]
    ends, losses = {}, []
    for kind in ("local", "linear", "delta"):
        paths = {seed: tmp_path / f"lm-plug-{kind}-seed{seed}.pt" for seed in (1000, 1001)}
        models = [trained(path, folder, lr=2e-3, gate_lr=3e-2, steps=2, seed=seed, length=32,
                          starting_weights=round(w + 4 * gate * (kind != "local"), 6))
                  for (seed, path), w in zip(paths.items(), weights)]
        assert all(kind in (model.config.attention, model.config.update) for model in models)
        ends[kind] = [bits_of(model, tokens).mean() for model in models]
        losses += np.mean([train.read_checkpoint(p)["losses"] for p in paths.values()], 0).tolist()
        assert near(table[kind][0], starts) == (gate == -30 or kind == "local")
        assert near(table[kind][1], ends[kind])
        assert near(table[kind][2], np.subtract(ends["local"], ends[kind]))
    drawn = rows_of(tmp_path / "plug.csv")[1:]
    assert [row[:2] for row in drawn] == [[kind, x] for kind in ends for x in ("1.0", "2.0")]
    same([float(row[2]) for row in drawn], np.array(losses) / math.log(2), 1e-6)
    ends, means = plug.means(torch.arange(250.0))
    assert ends.tolist() == [*range(3, 250, 3), 250]
    same(means[[0, -1]] * math.log(2), [1.0, 249.0], 1e-6)

# --- recall --------------------------------------------------------------------------------------
@pytest.mark.parametrize("twice", [False, True])
def test_recall_asks_in_another_order_for_the_last_value_of_each_key(twice):
    keys, values, asked, wanted, new = recall.draw(16, 50, torch.Generator().manual_seed(0), twice)
    replaced, order = 0, []
    for row in range(50):
        pairs = list(zip(keys[row].tolist(), values[row].tolist()))
        assert len(dict(pairs)) == len(asked[row]) == (12 if twice else 16)
        assert sorted(asked[row].tolist()) == sorted(dict(pairs))
        for question, value, is_new in zip(asked[row].tolist(), wanted[row].tolist(), new):
            assert dict(pairs)[question] == value    # a later pair of a dict counts
            assert bool(is_new) == ([key for key, _ in pairs].count(question) == 2)
        replaced += int(new.sum())
        order.append([key for key, _ in pairs].index(int(asked[row][0])))
    assert replaced == 50 * 4 * twice and len({*order}) == 1 and order[0] > 0

def test_recall_is_from_the_memory_alone_and_a_mean_over_seeds(tmp_path, monkeypatch, command):
    torch.manual_seed(0)
    model = recall.Recall("linear", 8)
    keys, values, asked, *_ = recall.draw(16, 3, torch.Generator().manual_seed(0), False)
    with torch.no_grad():
        model.layer.beta[:] = -200.0                                      # the gate is shut
    assert torch.equal(model(keys, values, asked), model(keys, (values + 1) % 512, asked))
    def train_one(rule, d_key, twice, seed, steps):
        assert steps == 1000
        first = 100.0 if rule == "linear" else 60.0 + 10 * seed
        return torch.tensor([[10.0 + d_key] * 6, [first, 100, 80, 60 + seed, 0, 0]])
    monkeypatch.setattr(recall, "train_one", train_one)
    code, out, _ = command(recall.main, "--out", tmp_path, "--threads", 1)
    rows = {line[:22].strip(): line[22:].split() for line in out.splitlines()[1:]}
    assert code == 0 and len(rows) == 12
    assert rows["linear 16"] == ["100+-0", "100+-0", "80+-0", "61+-1", "0+-0", "0+-0"]
    assert rows["delta 128"][0] == "70+-10" and rows["delta 32, replaced"] == ["42+-0"] * 6
    drawn = rows_of(tmp_path / "recall.csv")[1:]
    assert len(drawn) == 8 * 6 and drawn[-6] == ["delta, d_key 128", "8.0", "70.0"]

# --- sharpness and texts -------------------------------------------------------------------------
@pytest.mark.parametrize("factors", [{}, dict(q=3), dict(k=3)])
def test_sharpness_weighs_the_needle_against_a_token_of_hay_for_each_digit(factors):
    torch.manual_seed(0)
    model, keys = InfiniTransformer(passkey.model_config(update="linear")), ["9054", "1177"]
    scaled = copy.deepcopy(model).double()
    for block in scaled.blocks:
        block.attention.w_q.weight.data *= factors.get("q", 1)
        block.attention.w_k.weight.data *= factors.get("k", 1)
    for n, (i, key) in product((200, 400), enumerate(keys)):
        halves, task = sharpness.half_lengths(model, n, keys, **factors)[:, :, i], one_key(key)
        assert halves.shape == (4, 2, 4)
        first, n_needle = (len(passkey.encode(text)) for text in (passkey.INTRO, task[0]))
        text = passkey.write_input(task, passkey.write_hay("paper", n // 96 * 4, None), 0)[:-1]
        start = (first + n_needle + 96) // 32 * 32    # of the hay that counts
        last, x = start + (n // 96 - 1) * 96, scaled.embedding(text[None])
        for layer, block in enumerate(scaled.blocks):
            q, k, _ = (y[0].detach().numpy() for y in block.attention.project(block.norm1(x)))
            sq, sk = (np.apply_along_axis(o_sigma, -1, y) for y in (q[:, -4:], k))
            weights = np.einsum("hqd,htd->qht", sq, sk)
            needle, hay = weights[..., first:first + n_needle], weights[..., start:last]
            same(halves[:, layer], needle.sum(-1) / hay.mean(-1), 1e-9)
            x, _ = block(x, None)

def test_sharpness_takes_the_best_head_of_the_worst_digit_and_scales_w_q_and_w_k(
        tmp_path, monkeypatch, command):
    models = [save_model(tmp_path / f"{way}.pt", way, 1, update="linear", attention=attention)
              for way, attention in (("plain", "infini"), ("sharp", "infini"), ("local", "local"))]
    def half_lengths(model, n, keys, q=1, k=1):
        assert len({*keys}) == 3 and not any(map(passkey.is_held_out, keys))
        halves = torch.rand(4, 2, 3, 4)
        halves[:, 1, :, 3], halves[2, 0, 1, 2], halves[2, 1, 1, 3] = 50 * n, 30 * n, 10 * n
        return halves * q ** 2 * k ** 3 * infini.sigma(torch.tensor([-3.0])).double()
    monkeypatch.setattr(sharpness, "half_lengths", half_lengths)
    options = ["--lengths", "1K,2K", "--keys", 3, "--out", tmp_path, "--threads", 1]
    assert command(sharpness.main, "--load", *models, *options)[0] == 2    # local has no memory
    assert command(sharpness.main, "--load", models[0], "--lengths", 512)[0] == 2
    code, out, _ = command(sharpness.main, "--load", *models[:2], *options)
    rows = [[float(cell.replace(",", "")) for cell in line[24:].split()]
            for line in out.splitlines()[2:]]
    factors, half = np.array(sharpness.FACTORS), 30 * 1.024 * np.exp(-3)
    curves = half * factors ** 2, half * factors ** 3, half * factors ** 5
    expected = [half, 2 * half], [half], [half * 0.05078125 / np.exp(-3)], *curves, [half, 2 * half]
    assert code == 0 and len(rows) == 7
    for row, values in zip(rows, expected):
        assert row == pytest.approx(values, rel=1e-3)
    drawn = [float(row[2]) for row in rows_of(tmp_path / "sharpness.csv")[1:]]
    same(np.array(drawn) / 1000, np.concatenate(curves), 1e-5)

def test_texts_differ_from_the_papers_in_one_thing_each(tmp_path, monkeypatch, command):
    path, asked = save_model(tmp_path / "a.pt", seed=2), []
    monkeypatch.setattr(passkey, "evaluate", lambda model, tasks, lengths, depths, hay: (
        asked.append((tasks, lengths, depths, hay)),
        [passkey.Found(n, depth, 0.25, 0.0) for n in lengths for depth in depths])[1])
    options = ["--lengths", "1K,8K", "--depths", "0,25", "--keys", 3, "--eval-seed", 7]
    code, out, _ = command(texts.main, "--load", path, *options, "--out", tmp_path, "--threads", 1)
    names, end = ["paper", "words", "6-digits", "border", "decoy", "twice"], " is the blue info."
    assert code == 0 and re.findall(r"^([\w-]+): ", out, re.M) == names
    keys = passkey.draw_keys(random.Random("evaluation 7"), 3, 4, held_out=True)
    for name, (tasks, *rest) in zip(names, asked[::2], strict=True):    # others: beyond 32K
        assert rest == [[1024, 8192], [0, 0.25], "words" if name == "words" else "paper"]
        assert [answer for _, _, answer in tasks] == keys or name == "6-digits"
        assert {len(answer) for _, _, answer in tasks} == {6 if name == "6-digits" else 4}
        for needle, question, key in tasks:
            decoy = f" {passkey.HAY} The blue info is {key[::-1]}. Find it. {key[::-1]}{end}"
            assert passkey.is_held_out(key) and question == passkey.QUESTION
            told = f"The pass key is {key}. Remember it. {key} is the pass key."
            more = {"border": " Here we go.", "decoy": decoy, "twice": f" {passkey.HAY} {told}"}
            assert needle == told + more.get(name, "") and len(passkey.encode(needle))
        text = passkey.INTRO + needle + passkey.HAY * passkey.paragraphs(1024, tasks[0]) + question
        assert (len(passkey.encode(text)) % 32 == 0) == (name in ("border", "6-digits"))    # at 1K
        rows = rows_of(tmp_path / f"texts-{name}.csv")
        assert len(rows) == 1 + 4 and rows[1][:3] == ["short", "delta", "2"]

# --- bench ---------------------------------------------------------------------------------------
def test_bench_divides_what_its_rows_say(tmp_path, monkeypatch, command):
    monkeypatch.setattr(bench, "SIZES", dict(
        repeats=1, rows=((1, 40),), paper_tokens=8, parallel_tokens=64, near=64, far=256,
        new_tokens=2, trained=((3, 64, "infini"), (1, 96, "full")),
        peer=(("tiny", bench.model_config, (2, 64, 64)), ("paper", bench.paper, (1, 8, 1024)))))
    monkeypatch.setattr(bench, "peer_of", lambda ours: lambda x: (ours(x)[0] + 2, None))
    monkeypatch.setattr(bench, "find_spec", lambda name: True)
    ran, written, forward = [], [], infini.InfiniAttention.forward
    monkeypatch.setattr(infini.InfiniAttention, "forward", lambda layer, *inputs: (
        ran.append(layer.config), written.append(inputs[-1] is False), forward(layer, *inputs))[2])
    def seconds(action):    # not how long it takes, but a number that says what runs
        ran.clear(), written.clear()
        action()
        kind = ran[0].attention if ran and ran[0].attention != "infini" else ran and ran[0].update
        number = dict(local=2.0, linear=3.0, delta=4.0, full=5.0).get(kind or "", 7.0)
        return number + 50 * any(written) + (
            1024 * (ran[0].d_model == 1024) + 100 * (ran[0].form == "recurrent") if ran else 0)
    monkeypatch.setattr(bench, "medians", lambda repeats, *actions: [*map(seconds, actions)])
    monkeypatch.setattr(bench, "in_new_process", lambda function, *args: args[-1] + len(str(args)))
    code, out, err = command(bench.main, "--out", tmp_path, "--threads", 1, "--peer")
    header, *rows = rows_of(tmp_path / "bench.csv")
    lines = [line for line in out.splitlines() if "they differ" not in line]
    assert out.count("they differ by 2\n") == 4
    assert code == 0 and not err and header == ["what", "first", "second", "unit", "ratio"]
    found = {what: (float(first), float(second)) for what, first, second, *_ in rows}
    for pattern, values in {
            "peak.*1M / 32K": (262, 69), "peak.* 64 tokens, checkpoint=True / infini": (93, 96),
            "peak.* 96 .*/ full": (125, 126), "training step, small, Linear / local": (3e3, 2e3),
            "t.*small, Delta": (4e3, 2e3), "t.*paper layer, Linear / local": (1027, 1026),
            "t.*paper.*Delta": (1028, 1026), "streaming, .*Linear / local": (3e6 / 64, 2e6 / 64),
            "gen.*Linear / l": (15e5, 1e6), "tr.*speed.*parallel / recurrent": (64 / 3, 64 / 103),
            "str.* 64 .*full / infini": (5, 4), "tr.*every token.* last": (3e3, 53e3),
            "tr.* tiny layer, linear, peer": (3e3, 3e3), "tr.* paper layer, delta": (1028e3,) * 2,
            "rea.*, tiny layer, delta, peer": (4e6 / 64, 4e6 / 64)}.items():
        assert [x for what, x in found.items() if re.match(pattern, what)] == [
            pytest.approx(values)], pattern
    for (what, first, second, _, ratio), line in zip(rows, lines[2:], strict=True):
        assert float(ratio) == pytest.approx(float(first) / float(second))
        assert line.startswith(what) and line.split()[-1] == f"{float(ratio):.3g}"

def test_bench_needs_the_peer_only_when_it_is_asked_for(monkeypatch, command):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    code, out, err = command(bench.main, "--peer")
    assert code == 2 and not out and "pip install infini-transformer" in err.splitlines()[-1]

@pytest.mark.skipif(sys.platform != "linux", reason="other systems count it in other ways")
def test_bench_measures_the_peak_of_a_process_alone():
    here = torch.ones(2 ** 26)    # 256 MB, of which a new process knows nothing
    peak = bench.peak_memory()
    del here
    assert bench.in_new_process(bench.peak_memory) < peak - 128 and bench.peak_memory() > peak - 9
    resource = importlib.import_module("resource")    # which Windows does not have
    assert peak < 1.02 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10
