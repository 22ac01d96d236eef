"""The claims about passkey.py: the prompt, the ways of training, the evaluation and the table."""
import random
import re
import sys
from copy import deepcopy
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch

import passkey
import train
from infini import InfiniTransformer, generate
from passkey import Found, encode, one_key, write_hay, write_input
from test_infini import KINDS, RULES

SENTENCES = ["The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.",
             "There and back again."]
PARAGRAPH = " ".join(SENTENCES) + " "
DIGITS = [passkey.TOKEN[digit] for digit in "0123456789"]

def text_of(tokens):
    text = " ".join(passkey.VOCABULARY[token] for token in tokens)
    return re.sub(r"(?<=\d) (?=\d)| (?=[.?])", "", text)

def new_model(kind="infini-delta", seed=0):
    torch.manual_seed(seed)
    attention, _, rule = kind.partition("-")
    return InfiniTransformer(passkey.model_config(attention=attention, update=rule or "delta"))

def save(path, model=new_model(), **settings):
    train.write_checkpoint(path, dict(
        model=model.state_dict(), config=dict(vars(model.config)), losses=torch.zeros(0),
        gates=torch.zeros(0), optimizer=None,
        settings=dict(training="short", seed=7, digits=4, steps=0) | settings))
    return path

# --- The prompt ----------------------------------------------------------------------------------
def test_the_prompt_is_the_papers_word_for_word():
    text = ("There is an important info hidden inside a lot of irrelevant text. Find it and "
            "memorize them. I will quiz you about the important information there. "
            + 2 * PARAGRAPH + "The pass key is 9054. Remember it. 9054 is the pass key. "
            + 3 * PARAGRAPH + "What is the pass key? The pass key is 9054")
    tokens = write_input(one_key("9054"), write_hay("paper", 5, None), 2 * 24)
    encode(text).zero_()    # ours alone, so that the next one is as before
    assert text_of(tokens) == text and torch.equal(encode(text), tokens)
    assert len(passkey.VOCABULARY) == 53 == len({*passkey.words(text), *"0123456789"})
    with pytest.raises(ValueError, match="'purple'"):
        encode("The sky is purple.")
    rng = random.Random(0)    # other hay is as long, without digits, of the same sentences or words
    for kind in ("paper", "shuffled", "words"):
        tokens = write_hay(kind, 7, rng)
        assert len(tokens) == 7 * 24 and not set(tokens.tolist()) & set(DIGITS)
        assert (kind == "paper") == torch.equal(tokens, write_hay(kind, 7, rng))
        assert (kind == "paper") == (text_of(tokens) + " " == 7 * PARAGRAPH)
        counts = {text_of(tokens).count(sentence) for sentence in SENTENCES}
        assert counts == {7} if kind != "words" else counts < {0, 1} and len(set(tokens)) > 30
        assert len(write_hay(kind, 0, rng)) == 0

# --- Training ------------------------------------------------------------------------------------
def shown(way, steps, seed=0, of=100):    # inputs, without the last digit, a target only
    model = Mock(side_effect=lambda tokens, *_, **options: (
        torch.zeros(*tokens.shape, 53).requires_grad_(), None), blocks=[],
        config=passkey.model_config())
    model.embedding.weight.device = "cpu"
    for step in steps:
        _, n_tokens, _ = passkey.way_loss(way, seed, of)(model, step)
        inputs = torch.cat([call.args[0] for call in model.call_args_list[-2:]], 1)
        assert n_tokens == inputs.numel() + len(inputs)
        yield inputs

def keys_in(inputs):
    return [re.search(r"The pass key is (\d+)\.", text_of(row))[1] for row in inputs]

def test_no_key_of_the_evaluation_is_ever_trained_on_and_a_quarter_of_the_steps_has_other_lengths():
    steps = [keys_in(inputs) for way in passkey.WAYS for inputs in shown(way, range(50))]
    trained, lengths = sum(steps, []), [len(keys[0]) for keys in steps]
    assert set(lengths) == {3, 4, 5, 6} and 0.67 < lengths.count(4) / len(lengths) < 0.83
    asked = {key for seed in range(40) for n in (3, 4, 5, 6) for key in
             passkey.draw_keys(random.Random(seed), 50 if n == 3 else 300, n, held_out=True)}
    held_out = {key for key in asked if len(key) == 4}
    assert not set(trained) & asked and 900 < len(held_out) < 1100    # one in ten
    same_digit = [np.mean([len(set(key)) < 4 for key in keys if len(key) == 4])
                  for keys in (trained, held_out)]
    assert same_digit == pytest.approx([1 - 120 / 625, 1 - 5040 / 10_000], abs=0.06)
    assert max(len(set(key)) for key in trained) == 5    # only five different digits

def test_keys_depths_and_hay_differ_from_step_to_step_and_seed_to_seed_and_repeat():
    drawn = [next(shown(way, [step], seed)) for way in ("short", "plain")
             for step, seed in ((41, 0), (43, 0), (41, 1), (1, 41))]
    keys = [set(keys_in(inputs)) for inputs in drawn]
    assert sum(map(len, keys)) == len(set.union(*keys)) and len(keys[0]) > 3
    inputs = {next(shown(way, [41])).numpy().tobytes() for way in ("local", "short", "short")}
    assert len(inputs) == 1    # the memory is their only difference
    for way, most in (("short", 0.5), ("plain", 0.25)):    # of the hay is the paper's paragraph
        rows = [row for inputs in shown(way, range(50, 150)) for row in inputs if len(row) > 140]
        pure = [text_of(row).count(PARAGRAPH.strip()) > len(row) // 24 - 6 for row in rows]
        assert np.mean(pure) == pytest.approx(most, abs=0.1)
        hay = [text_of(row[29:31]) for row, paper in zip(rows, pure) if paper]    # after the intro
        assert len(set(hay)) > 10    # it begins anywhere in a paragraph
    for row in rows[:100]:    # each digit of an answer is told the right ones before it
        needle, again, answer = re.findall(r"\d+", text_of(row))
        assert needle == again == answer + needle[-1]

@pytest.mark.parametrize("way, longest, tokens, n", [("short", 256, 1024, 300),
                                                     ("sharp", 5000, 2048, 200)])
def test_inputs_are_as_long_as_asked_with_needles_anywhere_and_half_at_the_end(
        way, longest, tokens, n):
    places, lengths, starts, before = [], [], [], encode("pass key is").tolist()
    for inputs, digits in ((x, len(keys_in(x)[0])) for x in shown(way, range(n), of=n)):
        lengths.append(inputs.shape[1] + 1)
        assert 2 <= (lengths[-1] - digits) % 32 <= 33 - digits    # no first token is asked
        empty = write_input(one_key("0" * digits), encode(""), 0).tolist()
        assert lengths[-1] <= longest    # 64 are not enough for six digits
        assert max(1, tokens // lengths[-1]) <= len(inputs) <= max(1, tokens // (lengths[-1] - 8))
        for row in inputs.tolist() if lengths[-1] > 140 else []:
            first = next(i for i in range(len(row)) if row[i - 3:i] == before)
            places.append((first - empty.index(DIGITS[0])) / (lengths[-1] - len(empty)))
            starts.append(first % 32)
    grown = lengths if way == "sharp" else lengths[90:]    # they grow where a way has no start
    assert max(lengths[:20]) > 1000 if way == "sharp" else max(lengths[:20]) < 90
    assert 0.9 * longest < max(grown) and min(grown) < 90
    assert np.median(grown) == pytest.approx((64 * longest) ** 0.5, rel=0.3)    # log-uniform
    shares = np.histogram(places, [0, 0.25, 0.5, 0.75, 1, 1.1])[0] / len(places)
    assert shares.sum() == pytest.approx(1) and shares[:3].min() > 0.08 and 0.45 < shares[4] < 0.58
    assert len(set(starts)) == 32    # at every place in a segment

def test_w_q_and_w_k_grow_sixfold_with_linear_and_fourfold_with_delta_in_sharp_only():
    for way, kind, factor, last in (
            ("local", "local", 1, 1), ("short", "infini-linear", 1, 1),
            ("plain", "infini-delta", 1, 1), ("sharp", "infini-linear", 6, 7),
            ("sharp", "infini-delta", 4, 9)):
        model = new_model(kind)
        before, loss_of = deepcopy(model.state_dict()), passkey.way_loss(way, 0, 10)
        with patch("passkey.plain_loss"):
            for step in range(10):
                loss_of(model, step)
                grown = factor ** (min(step + 1, last) / last)
                for name, weights in model.state_dict().items():
                    scale = grown if "w_q" in name or "w_k" in name else 1
                    assert torch.allclose(weights, scale * before[name], rtol=1e-5)
    assert "blocks.1.attention.w_q.weight" in before

@pytest.mark.parametrize("keys, n_hay", [
    (["9054", "1177"], 64), (["9054"], 4), (["117"], 0), (["123456"], 700)])
def test_only_the_digits_of_the_answer_count_in_the_loss(keys, n_hay):
    model, hay, n = new_model(), write_hay("paper", 30, None)[:n_hay], len(keys[0])
    model.head.weight.data[DIGITS[1]] *= 9    # so that some are right
    inputs = torch.stack([write_input(one_key(key), hay, 5) for key in keys])
    loss, n_tokens, numbers = passkey.answer_loss(model, inputs, n)
    loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    p = model(inputs)[0][:, -n - 1:-1].softmax(-1)    # read at once, with nothing left out
    cells = [(cell, DIGITS[int(digit)])
             for row, key in zip(p, keys) for cell, digit in zip(row, key)]
    expected = sum(-cell[digit].log() for cell, digit in cells) / len(cells)
    model.zero_grad()
    expected.backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)
    right = np.mean([cell.argmax() == digit for cell, digit in cells])
    assert (loss.item(), numbers["digits right"]) == pytest.approx((expected.item(), right))
    assert n_tokens == inputs.numel()

def test_each_way_is_trained_as_the_docstring_says(tmp_path, monkeypatch):
    def listen(model, loss_of, steps, path, lr, gate_lr, resume, settings):
        done.append((model.config.attention, model.config.update, steps, lr, gate_lr, resume))
        starts.append((model.head.weight.detach().clone(), settings))
        model.head.weight.data += 1    # what it has learned
        save(path, model)
    monkeypatch.setattr(passkey, "train", listen)
    done, starts = [], []
    paths = [path.stem for rule, ways, steps in (
        ("-", ["local", "short"], None), ("linear", [*passkey.WAYS], None), ("delta", ["sharp"], 3))
        for path in passkey.train_ways(rule, ways, 5, steps, tmp_path, "cpu", True)]
    assert paths == [f"passkey-{name}-seed5" for name in (
        "local", "short-linear", "plain-linear", "sharp-linear", "sharp-delta")]
    assert done == [
        ("local", "delta", 4000, 4e-3, 1e-2, True), ("infini", "linear", 4000, 4e-3, 1e-2, True),
        ("infini", "linear", 1600, 2e-3, 5e-3, True), ("infini", "linear", 1600, 2e-3, 5e-3, True),
        ("infini", "delta", 3, 4e-3, 1e-2, True), *[("infini", "delta", 3, 2e-3, 5e-3, True)] * 2]
    fresh, ways = new_model(seed=5), [*passkey.WAYS, "short", "plain", "sharp"]
    for way, (start, settings) in zip(ways, starts, strict=True):
        assert torch.equal(start, sum([1] * dict(plain=1, sharp=2).get(way, 0), fresh.head.weight))
        assert settings == dict(training=way, seed=5, digits=4)
    assert sum(p.numel() for p in fresh.parameters()) // 1000 == 138

# --- Evaluation, table and picture ---------------------------------------------------------------
@pytest.mark.parametrize("kind, hay", [*((kind, "paper") for kind in KINDS), ("xl", "words")])
def test_the_answers_are_those_of_one_call_on_each_whole_input(kind, hay, monkeypatch):
    tasks, written = [one_key(key) for key in ("9054", "1177", "0000")], []
    lengths, depths = [100, 300, 700 if kind == "full" else 2300], [0, 0.3, 1]
    def listening(model, questions, n, **options):
        assert not options["state"][0].k.requires_grad    # reading keeps no graph
        written.append(generate(model, questions, n, **options)[:, -4:])
        right = torch.stack([encode("9055"), encode("1177"), encode("1111")])
        return torch.cat([questions, right], 1)    # 3 of 4, 4 of 4, none
    monkeypatch.setattr(passkey, "generate", listening)
    model, empty = new_model(kind).double(), len(write_input(tasks[0], encode(""), 0))
    found = list(passkey.evaluate(model, tasks, lengths, depths, hay))
    assert sorted(f[:2] for f in found) == [(n, depth) for n in lengths for depth in depths]
    assert all(f[2:] == pytest.approx((7 / 12, 1 / 3)) for f in found)
    for f, answer in zip(found, written, strict=True):
        n = next(n for n in range(99) if empty + 24 * n >= f.tokens)
        before = round(f.depth * n)
        text = torch.cat([write_hay(hay, before, random.Random("before")),
                          write_hay(hay, n - before, random.Random("behind"))])
        inputs = torch.stack([write_input(task, text, 24 * before)[:-4] for task in tasks])
        assert torch.equal(answer, generate(model, inputs, 4, temperature=0)[:, -4:]), f

def test_the_papers_numbers_beside_ours_are_those_of_its_table_3():
    rows = {who: np.array([cell.split("/") for cell in cells.split()], int).T.tolist()
            for who, cells in passkey.PAPER.items()}    # start, middle, end; at 32K ... 1M
    assert rows == {
        "zero-shot linear": [[14, 11, 6, 6, 8], [13, 14, 3, 7, 6], [98, 100, 100, 99, 98]],
        "zero-shot delta": [[13, 6, 7, 6, 7], [11, 9, 5, 8, 6], [99, 99, 99, 97, 97]],
        "400 steps linear": [[100, 100, 100, 97, 96], [100, 100, 100, 99, 94], [100] * 5],
        "400 steps delta": [[100] * 5, [100] * 5, [100, 99, 99, 100, 100]]}
    lengths = [passkey.length(n) for n in ("32K", "128K", "256K", "512K", "1M")]
    assert passkey.PAPER_LENGTHS == lengths == [2 ** n for n in (15, 17, 18, 19, 20)]

@pytest.fixture
def asked(monkeypatch):    # stands in for evaluate(), and keeps what it is asked
    calls = []
    def found(model, tasks, lengths, depths, hay="paper"):
        calls.append(([answer for _, _, answer in tasks], lengths, depths))
        yield from (Found(n, d, (10 + 10 * d + n % 7) / 100, (2 + 3 * d) / 100)
                    for n in reversed(lengths) for d in depths)
    monkeypatch.setattr(passkey, "evaluate", found)
    monkeypatch.setattr(passkey, "train", None)    # nothing may be trained
    return calls

def test_the_table_has_our_digits_the_papers_and_whole_keys(tmp_path, asked, command):
    args = [passkey.main, "--load", save(tmp_path / "a"), "--out", tmp_path, "--keys", 4]
    code, out, _ = command(*args, "--lengths", "2K,32K,512K,1M", "--csv", tmp_path / "b.csv")
    title, header, *lines = out.splitlines()[1:]
    assert code == 0 and "4 keys (2 above 32K)" in title and "0%/50%/100% of hay" in title
    rows = {"training, rule, seed": ["2K", "32K", "512K", "1M"],
            "short delta 7": ["14/19/24", "11/16/21", "12/17/22", "14/19/24"],
            "    the paper, zero-shot": ["", "13/11/99", "6/8/97", "7/6/97"]}
    ends = [0] + [header.index(f" {n}") + 1 + len(n) for n in rows["training, rule, seed"]]
    for line, (name, row) in zip([header, *lines], rows.items(), strict=True):
        assert line.startswith(name)
        assert [line[a:b].replace(name, "").strip() for a, b in zip(ends, ends[1:])] == row
    (first, lengths, _), (second, longer, _) = asked
    assert (lengths, longer) == ([2048, 32768], [524288, 2 ** 20]) and second == first[::2]
    rows = (tmp_path / "b.csv").read_text().splitlines()
    assert rows[:2] == ["training,rule,seed,tokens,depth,digits_right,keys_right,model",
                        f"short,delta,7,32768,0.0,0.11,0.02,{tmp_path / 'a'}"] and len(rows) == 13
    code, out, _ = command(*args, "--lengths", "32K,1M", "--depths", "30,0,100,50")
    *_, title, header, ours = out.splitlines()
    assert "the worst of 4" in title and ours.split()[3:] == ["11", "14"]
    assert asked[-1][2] == [0, 0.3, 0.5, 1]

@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such a name")
def test_a_model_whose_name_is_no_text_is_in_the_table(tmp_path, asked, command):
    path = save(tmp_path / "\udcff.pt")
    assert command(passkey.main, "--load", path, "--out", tmp_path, "--lengths", 64)[0] == 0
    assert b"\xff.pt" in (tmp_path / "passkey.csv").read_bytes()

def test_keys_are_held_out_and_as_many_and_as_long_as_asked_for(tmp_path, asked, command):
    args = [passkey.main, "--load", save(tmp_path / "a"),
            "--load", save(tmp_path / "b", digits=6, seed=8)]
    def keys(*options):
        asked.clear()
        assert command(*args, "--out", tmp_path, "--lengths", 64, *options)[0] == 0
        return [keys for keys, lengths, _ in asked if lengths]
    default, again, other = keys(), keys("--eval-seed", 1234), keys("--eval-seed", 5, "--keys", 9)
    assert default == again and [len(some) for some in default + other] == [20, 20, 9, 9]
    assert [{len(key) for key in some} for some in default] == [{4}, {6}]
    assert not set(default[0]) & set(other[0]) and all(map(passkey.is_held_out, default[0]))
    many, = {*map(tuple, keys("--keys", 500)[:1])}
    assert len(set(many)) == 500    # none is asked for twice

def test_hay_keys_and_depths_that_cannot_be_are_refused():
    model, rng = InfiniTransformer(passkey.model_config()), random.Random(0)
    for refused in (lambda: passkey.write_hay("word", 1, rng),
                    lambda: passkey.draw_keys(rng, 91, 3, held_out=True),
                    lambda: [*passkey.evaluate(model, [one_key("1234")], [64], [50])]):
        with pytest.raises(ValueError, match="must be|at most|from 0"):
            refused()

def test_the_heat_map_shows_each_share_at_its_depth_and_length(tmp_path, figures):
    depths, lengths = [0, 0.3, 1], [1024, 100]
    share = {(n, d): (n % 7 + d * 50) / 100 for n in lengths for d in depths}
    found = [Found(n, d, x, 0.0) for (n, d), x in share.items()]
    passkey.draw([("a", found), ("a", found)], lengths, depths, tmp_path / "a.png")
    (first, second, *_), image = figures[0].axes, figures[0].axes[0].images[0]
    assert [tick.get_text() for tick in second.get_xticklabels()] == ["1K", "100"]
    assert [tick.get_text() for tick in first.get_yticklabels()] == ["0%", "30%", "100%"]
    assert [axis.get_subplotspec().colspan.start for axis in (first, second)] == [0, 1]
    assert "length" in second.get_xlabel() and "depth" in first.get_ylabel()
    values = [[100 * share[n, d] for n in lengths] for d in depths]
    assert np.allclose(image.norm(image.get_array()) * 100, values) and first.yaxis_inverted()
    assert {text.get_position(): text.get_text() for text in first.texts} == {
        (x, y): f"{value:.0f}" for y, line in enumerate(values) for x, value in enumerate(line)}

@pytest.mark.parametrize("arguments", """--steps 0; --steps many; --training warm; --training ,;
    --lengths 1G; --lengths 65M; --lengths 10; --lengths 1K,,2K; --depths 101; --depths nan; more;
    --depths -1; --keys 0; --keys 501; --seed -1; --eval-seed -1; --eval-seed 1.5; --st 3;
    --device abacus; --device meta; --threads 0; --rule hebb; --load missing.pt; --load .;
    --load FILE; --load LM; --out FILE; --csv .; --csv no/a.csv; --csv a.pt;
    --load OK --csv a; --load a.csv --csv a.csv; --load OK --seed 3; --load OK --resume;
    --load OK --training=short; --training local --rule delta; --load TEXT; --lengths 524,288;
    --load passkey.png --out .; --load OK --csv hard.csv""".split(";"))
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(passkey, "train", None)    # nothing may be trained
    Path("FILE").write_text("kept")
    for name in ("LM", "OK", "a.csv"):
        save(name)
    save("TEXT", digits="4")
    save("passkey.png")
    Path("hard.csv").hardlink_to("OK")
    train.write_checkpoint("LM", train.read_checkpoint("LM") | dict(settings=dict(steps=0)))
    code, out, err = command(passkey.main, *arguments.split())
    assert code == 2 and len(err.splitlines()) == 1 and err.strip() and not out
    assert Path("FILE").read_text() == "kept"

def test_the_models_in_assets_find_keys_that_they_have_never_seen(tmp_path, command):
    paths = [Path(passkey.__file__).with_name("assets") / f"passkey-{rule}.pt" for rule in RULES]
    assert [train.load_model(path)[0].config.update for path in paths] == RULES
    code, out, _ = command(passkey.main, "--load", *paths, "--out", tmp_path, "--lengths", "300,1K")
    shares = [int(n) for cell in re.findall(r"\d+/\d+/\d+", out) for n in cell.split("/")]
    assert code == 0 and shares.count(100) >= 11 and min(shares) >= 98 and len(shares) == 12
    assert all(f" {rule} " in out for rule in RULES)

def test_two_rules_trained_side_by_side_are_those_trained_one_after_the_other(
        tmp_path, command, monkeypatch):
    args = [passkey.main, "--steps", 2, "--lengths", 64, "--depths", 0, "--keys", 1, "--seed", 3]
    for n in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda: n)
        code, out, err = command(*args, "--training", "short,local", "--out", tmp_path / f"{n}")
        assert code == 0 and ("2/2 steps" in err) == (n == 1)    # processes have their own
        assert re.findall(r"^(.*) 3  ", out, re.M) == ["local -", "short linear", "short delta"]
    for name in ("local", "short-linear", "short-delta"):
        one, two = (train.read_checkpoint(tmp_path / n / f"passkey-{name}-seed3.pt") for n in "12")
        assert one["settings"] == two["settings"] and torch.equal(one["losses"], two["losses"])
        assert all(torch.equal(w, two["model"][key]) for key, w in one["model"].items())
    args += ["--out", tmp_path / "1", "--rule", "linear", "--training", "plain", "--resume"]
    code, out, err = command(*args)
    assert code == 0 and re.findall(r"^(.*) 3  ", out, re.M) == ["plain linear"]
    assert "plain-linear-seed3: 2/2 steps" in err and "short-linear-seed3: 2/2 steps" not in err
