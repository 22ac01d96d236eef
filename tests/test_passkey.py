"""The claims about passkey.py: the prompt, the ways of training, the evaluation and the table."""
import csv
import math
import random
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import passkey
import train
from infini import InfiniTransformer, generate
from passkey import Found, encode, one_key, write_hay, write_input
from test_infini import KINDS

SENTENCES = ["The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.",
             "There and back again."]
PARAGRAPH = " ".join(SENTENCES) + " "
DIGITS = [passkey.TOKEN[digit] for digit in "0123456789"]


def text_of(tokens):
    return re.sub(r"(?<=\d) (?=\d)", "", passkey.decode(tokens))


def new_model(kind="infini-delta"):
    torch.manual_seed(0)
    attention, _, update = kind.partition("-")
    return InfiniTransformer(passkey.model_config(attention=attention, update=update or "delta"))


def save(path, model=None, **settings):
    model = model or new_model()
    train.write_checkpoint(path, dict(
        model=model.state_dict(), config=asdict(model.config), losses=torch.zeros(1),
        settings={**dict(training="short", seed=7, digits=4), **settings}, gates=None, optimizer=None))
    return path


# --- The prompt ----------------------------------------------------------------------------------
def test_the_prompt_is_the_papers_word_for_word():
    text = ("There is an important info hidden inside a lot of irrelevant text. Find it and "
            "memorize them. I will quiz you about the important information there. "
            + 2 * PARAGRAPH + "The pass key is 9054. Remember it. 9054 is the pass key. "
            + 3 * PARAGRAPH + "What is the pass key? The pass key is 9054")
    tokens = write_input(one_key("9054"), write_hay("paper", 5, None), 2)
    assert text_of(tokens) == text and torch.equal(encode(text), tokens)
    assert len(passkey.VOCABULARY) == 53 == len({*passkey.words(text), *"0123456789"})
    with pytest.raises(ValueError, match="'purple'"):
        encode("The sky is purple.")


def test_hay_is_as_long_as_the_papers_without_digits_and_shuffled_by_sentences_or_by_words():
    rng = random.Random(0)
    for kind in ("paper", "shuffled", "words"):
        tokens = write_hay(kind, 7, rng)
        assert len(tokens) == 7 * 24 and not set(tokens.tolist()) & set(DIGITS)
        assert (kind == "paper") == torch.equal(tokens, write_hay(kind, 7, rng))
        assert len(write_hay(kind, 0, rng)) == 0
        counts = {text_of(tokens).count(sentence) for sentence in SENTENCES}
        assert counts == {7} if kind != "words" else counts < {0, 1} and len(set(tokens)) > 30
        assert (kind == "paper") == (text_of(tokens) + " " == 7 * PARAGRAPH)


# --- Training ------------------------------------------------------------------------------------
class Listener(torch.nn.Module):
    """Stands in for a model and keeps the inputs that it is trained on."""
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(1, 1)

    def forward(self, tokens):
        self.inputs = tokens
        return torch.zeros(*tokens.shape, 53, requires_grad=True), None


def shown(way, steps, seed=0, of=100):
    """The inputs of some steps of a training, without the last digit, which is a target only."""
    listener, loss_of = Listener(), passkey.way_loss(way, seed, of)
    for step in steps:
        _, n_tokens, _ = loss_of(listener, step)
        assert n_tokens == listener.inputs.numel() + len(listener.inputs)
        yield listener.inputs


def keys_in(inputs):
    return [re.search(r"The pass key is (\d+)\.", text_of(row))[1] for row in inputs]


def test_no_key_of_the_evaluation_is_ever_trained_on_and_in_every_fourth_step_keys_are_longer_or_shorter():
    draws = {way: [keys_in(inputs) for inputs in shown(way, range(100))]
             for way in ("local", "short", "plain")}
    steps = sum(draws.values(), [])
    trained, lengths = sum(steps, []), [len(keys[0]) for keys in steps]
    assert set(lengths) == {3, 4, 5, 6} and 0.67 < lengths.count(4) / len(lengths) < 0.83
    asked = {key for seed in range(20) for n in (3, 4, 5, 6)
             for key in passkey.draw_keys(random.Random(seed), 500, n, held_out=True)}
    assert not set(trained) & asked and set(sum(draws["plain"], [])) < set(trained)
    held_out = {key for key in asked if len(key) == 4}
    assert 900 < len(held_out) < 1100    # one in ten
    same_digit = [np.mean([len(set(key)) < 4 for key in keys if len(key) == 4])
                  for keys in (trained, held_out)]
    assert same_digit == pytest.approx([1 - 120 / 625, 1 - 5040 / 10_000], abs=0.06)
    assert max(len(set(key)) for key in trained) == 5    # only five different digits


def test_keys_depths_and_hay_differ_from_step_to_step_and_seed_to_seed_and_repeat():
    drawn = [next(shown(way, [step], seed)) for way, step, seed in (
        ("short", 41, 0), ("short", 43, 0), ("short", 41, 1), ("short", 0, 41), ("plain", 41, 0),
        ("plain", 43, 0), ("plain", 41, 1))]
    keys = [set(keys_in(inputs)) for inputs in drawn]
    assert sum(map(len, keys)) == len(set.union(*keys))
    assert torch.equal(drawn[0], next(shown("short", [41]))) and len(keys[0]) > 3
    rows = [row for inputs in shown("short", range(40, 140), of=100) for row in inputs]
    pure = [text_of(row).count(PARAGRAPH.strip()) > len(row) // 24 - 4 for row in rows if len(row) > 170]
    assert 0.4 < np.mean(pure) < 0.6    # half of the hay is shuffled sentences or random words
    for row in rows[:100]:    # each digit of an answer is told the right ones before it
        needle, again, answer = re.findall(r"\d+", text_of(row))
        assert needle == again == answer + needle[-1]


@pytest.mark.parametrize("way, longest, most", [("short", 256, 1024), ("plain", 5000, 5000)])
def test_inputs_are_as_long_as_asked_for_and_a_quarter_of_the_needles_stands_at_the_very_end(
        way, longest, most):
    places, lengths = [], []
    for inputs in shown(way, range(300), of=300):
        lengths.append(inputs.shape[1] + 1)
        empty = write_input(one_key("0" * len(keys_in(inputs)[0])), encode(""), 0).tolist()
        assert 0.5 * most < inputs.numel() < 1.1 * most and (lengths[-1] - len(empty)) % 24 == 0
        for row in inputs.tolist() if lengths[-1] > 180 else []:
            first = next(i for i, token in enumerate(row) if token in DIGITS)
            places.append((first - empty.index(DIGITS[0])) / (lengths[-1] - len(empty)))
    grown = lengths if way == "plain" else lengths[90:]    # they grow where a way has no start
    assert max(lengths[:20]) > 1000 if way == "plain" else max(lengths[:20]) < 110
    assert 0.9 * longest < max(grown) <= min(5120, longest + 24 + 6) and min(grown) < 90
    assert np.median(grown) == pytest.approx(math.sqrt(64 * longest), rel=0.3)    # log-uniform
    shares = np.histogram(places, [0, 0.25, 0.5, 0.75, 1, 1.1])[0] / len(places)
    assert shares.sum() == pytest.approx(1) and shares[:3].min() > 0.1 and 0.2 < shares[4] < 0.45


def test_only_the_digits_of_the_answer_count_in_the_loss():
    logits = torch.randn(2, 70, 53, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits.data[0, 66, DIGITS[9]] = logits.data[1, 69, DIGITS[7]] = 9    # two of eight are right
    loss, numbers = passkey.answer_loss(logits, [one_key(key) for key in ("9054", "1177")])
    p = logits.detach().double().softmax(-1)
    expected = [-math.log(p[row, 66 + i, DIGITS[int(key[i])]])
                for row, key in enumerate(["9054", "1177"]) for i in range(4)]
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-5)
    assert numbers == {"digits right": 0.25}
    loss.backward()
    assert (logits.grad[:, :66] == 0).all() and (logits.grad[:, 66:] != 0).all()


def test_each_way_is_trained_as_the_docstring_says(tmp_path, monkeypatch):
    done = []
    def listen(model, loss_of, steps, path, lr, gate_lr, resume, settings):
        c, start = model.config, model.head.weight.detach().clone()
        done.append((path.stem, c.attention, c.update, steps, lr, gate_lr, settings, resume))
        starts.append(start)
        model.head.weight.data += 1    # what it has learned
        save(path, model)
    monkeypatch.setattr(passkey, "train", listen)
    starts, options = [], (5, None, tmp_path, "cpu", True)
    ways = ["local", "short", "plain"]
    paths = [passkey.train_ways("-", ways, *options), passkey.train_ways("linear", ways, *options),
             passkey.train_ways("delta", ["plain"], *options)]
    assert [[path.stem for path in some] for some in paths] == [
        ["passkey-local-seed5"], ["passkey-short-linear-seed5", "passkey-plain-linear-seed5"],
        ["passkey-plain-delta-seed5"]]
    assert done == [
        (f"passkey-{name}-seed5", kind, rule, steps, lr, 1e-2, dict(training=way, seed=5, digits=4), True)
        for name, way, kind, rule, steps, lr in (
            ("local", "local", "local", "delta", 4800, 4e-3),
            ("short-linear", "short", "infini", "linear", 4800, 4e-3),
            ("plain-linear", "plain", "infini", "linear", 1600, 2e-3),
            ("short-delta", "short", "infini", "delta", 4800, 4e-3),
            ("plain-delta", "plain", "infini", "delta", 1600, 2e-3))]
    torch.manual_seed(5)
    fresh = InfiniTransformer(passkey.model_config()).head.weight
    for start, expected in zip(starts, [fresh, fresh, fresh + 1, fresh, fresh + 1]):
        assert torch.equal(start, expected)
    assert sum(p.numel() for p in new_model().parameters()) // 1000 == 138


# --- Evaluation ----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, hay", [*((kind, "paper") for kind in KINDS), ("xl", "words"),
                                       ("infini-delta", "shuffled")])
def test_the_answers_are_those_of_one_call_on_each_whole_input(kind, hay, monkeypatch):
    tasks, written = [one_key(key) for key in ("9054", "1177", "0000")], []
    lengths, depths = [100, 300, 700 if kind == "full" else 2300], [0, 0.3, 1]
    def listening(model, questions, n, **options):
        written.append(generate(model, questions, n, **options)[:, -4:])
        right = torch.stack([encode("9055"), encode("1177"), encode("1111")])
        return torch.cat([questions, right], 1)    # 3 of 4, 4 of 4, none
    monkeypatch.setattr(passkey, "generate", listening)
    model = new_model(kind).double()
    found = list(passkey.evaluate(model, tasks, lengths, depths, hay))
    assert sorted(f[:2] for f in found) == [(n, depth) for n in lengths for depth in depths]
    assert all(f[2:] == pytest.approx((7 / 12, 1 / 3)) for f in found)
    for f, answer in zip(found, written, strict=True):
        empty = len(write_input(tasks[0], encode(""), 0))
        n = next(n for n in range(99) if empty + 24 * n >= f.tokens)
        before = round(f.depth * n)
        text = torch.cat([write_hay(hay, before, random.Random("before")),
                          write_hay(hay, n - before, random.Random("behind"))])
        inputs = torch.stack([write_input(task, text, before)[:-4] for task in tasks])
        assert torch.equal(answer, generate(model, inputs, 4, temperature=0)[:, -4:]), f


# --- Table and picture ---------------------------------------------------------------------------
def test_the_papers_numbers_beside_ours_are_those_of_its_table_3():
    rows = {who: np.array([cell.split("/") for cell in cells.split()], int).T.tolist()
            for who, cells in passkey.PAPER.items()}    # start, middle, end; at 32K ... 1M
    assert rows == {
        ("short", "linear"): [[14, 11, 6, 6, 8], [13, 14, 3, 7, 6], [98, 100, 100, 99, 98]],
        ("short", "delta"): [[13, 6, 7, 6, 7], [11, 9, 5, 8, 6], [99, 99, 99, 97, 97]],
        ("plain", "linear"): [[100, 100, 100, 97, 96], [100, 100, 100, 99, 94], [100] * 5],
        ("plain", "delta"): [[100] * 5, [100] * 5, [100, 99, 99, 100, 100]]}
    lengths = ["32K", "128K", "256K", "512K", "1M"]
    assert [passkey.short(n) for n in passkey.PAPER_LENGTHS] == lengths
    assert [passkey.length(n) for n in lengths] == [2 ** n for n in (15, 17, 18, 19, 20)]


@pytest.fixture
def asked(monkeypatch):
    """Stands in for evaluate(). It keeps what it is asked, and finds 10 times a depth and less."""
    calls = []
    def found(model, tasks, lengths, depths, hay="paper"):
        calls.append((model, [task.answer for task in tasks], lengths, depths))
        for n in reversed(lengths):
            for d in depths:
                yield Found(n, d, (10 + 10 * d + n % 7) / 100, (2 + 3 * d) / 100)
    monkeypatch.setattr(passkey, "evaluate", found)
    return calls


def test_the_table_has_our_digits_the_papers_and_whole_keys_under_each_length(
        tmp_path, asked, command):
    args = [passkey.main, "--load", save(tmp_path / "a"), "--out", tmp_path, "--csv", tmp_path / "t"]
    code, out, _ = command(*args, "--lengths", "2K,32K,512K,1M", "--keys", 4)
    title, header, ours, paper, keys = (line for line in out.splitlines() if line)
    names = "training, rule, seed", "short delta 7", "    the paper, zero-shot", "    whole keys"
    assert code == 0 and "4 keys (2 beyond 32K)" in title and "0%/50%/100% of the hay" in title
    cells = [[n % 7 + 10 + 10 * d for d in (0, 0.5, 1)] for n in (2048, 32768, 524288, 2 ** 20)]
    rows = [["2K", "32K", "512K", "1M"], ["/".join(f"{x:.0f}" for x in cell) for cell in cells],
            ["", "13/11/99", "6/8/97", "7/6/97"], ["2/4/5"] * 4]
    ends = [0] + [header.index(f" {n}") + 1 + len(n) for n in rows[0]]
    for line, name, row in zip((header, ours, paper, keys), names, rows):
        assert line.startswith(name)
        assert [line[a:b].replace(name, "").strip() for a, b in zip(ends, ends[1:])] == row
    (model, first, lengths, _), (_, second, longer, _) = asked
    assert (lengths, longer) == ([2048, 32768], [524288, 2 ** 20]) and second == first[::2]
    rows = list(csv.reader((tmp_path / "t").open()))
    assert rows[0] == "training rule seed tokens depth digits_right keys_right".split()
    assert rows[1] == ["short", "delta", "7", "32768", "0.0", "0.11", "0.02"] and len(rows) == 13
    code, out, _ = command(*args, "--lengths", "32K,1M", "--depths", "30,0,100,50")
    *_, title, header, ours, keys = out.splitlines()
    assert "the worst of 4" in title and ours.split()[3:] == ["11", f"{10 + 2 ** 20 % 7}"]
    assert keys.split()[2:] == ["2", "2"] and asked[-1][3] == [0, 0.3, 0.5, 1]


def test_keys_of_the_evaluation_are_held_out_and_as_many_and_as_long_as_asked(
        tmp_path, asked, command):
    args = [passkey.main, "--load", save(tmp_path / "a"), save(tmp_path / "b", digits=6, seed=8)]
    def keys(*options):
        asked.clear()
        assert command(*args, "--out", tmp_path, "--lengths", 64, *options)[0] == 0
        return [call[1] for call in asked if call[2]]
    default, again, other = keys(), keys("--eval-seed", 1234), keys("--eval-seed", 5, "--keys", 9)
    assert default == again and [len(some) for some in default + other] == [20, 20, 9, 9]
    assert [{len(key) for key in some} for some in default] == [{4}, {6}]
    assert not set(default[0]) & set(other[0]) and all(map(passkey.is_held_out, default[0]))


def test_the_heat_map_shows_each_share_at_its_depth_and_length(tmp_path, monkeypatch):
    figures, depths, lengths = [], [0, 0.3, 1], [1024, 100]
    monkeypatch.setattr(passkey.plt, "close", figures.append)
    share = {(n, d): (n % 7 + d * 50) / 100 for n in lengths for d in depths}
    found = [Found(n, d, x, 0.0) for (n, d), x in share.items()]
    passkey.draw({"a": found, "b": found[:0] + found}, lengths, depths, tmp_path / "a.png")
    first, second, *_ = figures[0].axes
    labels = [[tick.get_text() for tick in ticks] for ticks in (
        second.get_xticklabels(), second.get_yticklabels())]
    assert labels == [["1K", "100"], ["0%", "30%", "100%"]] and first.get_title() == "a"
    assert "length" in second.get_xlabel() and "depth" in first.get_ylabel()
    values = [[100 * share[n, d] for n in lengths] for d in depths]
    assert np.allclose(first.images[0].get_array(), values) and first.yaxis_inverted()
    assert {text.get_position(): text.get_text() for text in first.texts} == {
        (x, y): f"{value:.0f}" for y, line in enumerate(values) for x, value in enumerate(line)}
    assert first.images[0].get_clim() == (0, 100) and (tmp_path / "a.png").stat().st_size > 5000


# --- The command ---------------------------------------------------------------------------------
BAD = """--steps 0; --steps many; --training warm; --training ,; --lengths 1G; --lengths 65M; more
    --lengths 10; --lengths 1K,,2K; --depths 101; --depths nan; --depths -1; --keys 0; --keys 501
    --seed -1; --eval-seed -1; --eval-seed 1.5; --device abacus; --device meta; --threads 0; --st 3
    --rule hebb; --load missing.pt; --load .; --load FILE; --load LM; --out FILE; --csv .; --csv no/a"""


@pytest.mark.parametrize("arguments", BAD.replace("\n", ";").split(";"))
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(passkey, "train", None)    # nothing may be trained
    monkeypatch.setattr(passkey, "evaluate", None)
    Path("FILE").write_text("kept")
    content = train.read_checkpoint(save("LM"))
    train.write_checkpoint("LM", dict(content, settings={}))    # of another task
    code, out, err = command(passkey.main, *arguments.split())
    assert code == 2 and len(err.splitlines()) == 1 and err.strip() and not out
    assert Path("FILE").read_text() == "kept"


@pytest.mark.parametrize("rule", ["delta", "linear"])
def test_the_models_in_assets_find_keys_that_they_have_never_seen(rule, tmp_path, command):
    path = Path(passkey.__file__).parent / "assets" / f"passkey-{rule}.pt"
    assert train.load_model(path)[0].config.update == rule
    code, out, _ = command(passkey.main, "--load", path, "--out", tmp_path, "--lengths", "300,1K",
                           "--keys", 5)
    assert code == 0 and out.count("100/100/100") == 4 and f" {rule} " in out
    assert (tmp_path / "passkey.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "passkey.csv").read_text().splitlines()) == 1 + 2 * 3


def test_two_rules_trained_side_by_side_are_those_trained_one_after_the_other(
        tmp_path, command, monkeypatch):
    args = [passkey.main, "--steps", 2, "--lengths", 64, "--depths", 0, "--keys", 1, "--seed", 3]
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        code, out, err = command(*args, "--training", "short,local", "--out", tmp_path / f"{threads}")
        assert code == 0 and ("2/2 steps" in err) == (threads == 1)    # processes write by themselves
        rows = re.findall(r"^(.*) 3  ", out, re.M)
        assert rows == ["local -", "short linear", "short delta"]
    files = {path.name for path in (tmp_path / "2").glob("*.pt")}
    assert files == {f"passkey-{name}-seed3.pt" for name in ("local", "short-linear", "short-delta")}
    for name in files:
        one, two = (train.read_checkpoint(tmp_path / folder / name) for folder in "12")
        assert one["settings"] == two["settings"] and torch.equal(one["losses"], two["losses"])
        assert all(torch.equal(w, two["model"][key]) for key, w in one["model"].items())
    code, out, err = command(*args, "--threads", 1, "--out", tmp_path / "1", "--rule", "linear",
                             "--training", "plain", "--resume")
    assert code == 0 and re.findall(r"^(.*) 3  ", out, re.M) == ["plain linear"]
    assert "plain-linear-seed3: 2/2 steps" in err and "short-linear-seed3: 2/2 steps" not in err
