"""The experiments on memories, times and texts, run in small."""

import csv
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

import common
import infini
import passkey
import train
from experiments import bench, recall, texts
from experiments.bench import Row
from experiments.recall import Case
from infini import InfiniTransformer
from test_infini import o_layer, same, sizes_stored, weights_of

RULES = ["linear", "delta"]
ASSETS = Path(passkey.__file__).with_name("assets")

each_rule = pytest.mark.parametrize("rule", RULES)
twice_or_not = pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])


# --- Helpers --------------------------------------------------------------------------


def rows_of(path):
    """Read a table. Returns {column: value} for each row."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- recall: the task -----------------------------------------------------------------


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def by_row(pairs):
    """Split pairs into rows of Python numbers: keys, values, questions, answers."""
    columns = [part.tolist() for part in pairs[:4]]
    return list(zip(*columns, strict=True))


@pytest.mark.parametrize("n", [8, 16, 256])
def test_recall_asks_for_the_value_of_each_key_in_another_order(n):
    pairs = recall.draw_pairs(n, 5, seeded(), twice=False)

    for keys, values, questions, answers in by_row(pairs):
        value = dict(zip(keys, values, strict=True))
        assert len(value) == n
        assert sorted(questions) == sorted(keys)
        assert questions != keys
        assert answers == [value[question] for question in questions]
    assert not pairs.replaced.any()


@pytest.mark.parametrize("n", [8, 16, 256])
def test_recall_asks_for_the_later_value_of_a_key_that_came_twice(n):
    pairs = recall.draw_pairs(n, 5, seeded(), twice=True)

    for keys, values, questions, answers in by_row(pairs):
        later = dict(zip(keys, values, strict=True))      # a dict keeps the later one
        again = [keys.count(question) == 2 for question in questions]
        assert len(questions) == len(later) == n - n // 4
        assert sorted(questions) == sorted(later)
        assert answers == [later[question] for question in questions]
        assert pairs.replaced.tolist() == again
        assert sum(again) == n // 4


def test_recall_repeats_the_first_quarter_of_the_keys_half_a_text_later():
    keys = recall.draw_pairs(16, 5, seeded(), twice=True).keys

    assert torch.equal(keys[:, 8:12], keys[:, :4])


def test_recall_draws_other_symbols_in_each_row():
    pairs = recall.draw_pairs(64, 100, seeded(), twice=False)

    for symbols in (pairs.keys, pairs.values):
        assert len(set(symbols.flatten().tolist())) == recall.N_SYMBOLS
        assert len({tuple(row) for row in symbols.tolist()}) == 100


# --- recall: the model ----------------------------------------------------------------


def double_model(rule, seed=0):
    torch.manual_seed(seed)
    return recall.RecallModel(rule, d_key=8).double()


def asked(model, pairs):
    return model(pairs.keys, pairs.values, pairs.questions)


def o_logits(model, row):
    """The model for one row of pairs, by the oracle of infini.py. Returns (m, symbols)."""
    keys, values, questions, _ = row
    key_vectors = model.key_vectors.numpy()
    value_vectors = model.value_vectors.numpy()
    x = []
    for key, value in zip(keys, values, strict=True):
        x.append(np.concatenate([key_vectors[key], value_vectors[value]]))
    for question in questions:
        x.append(np.concatenate([key_vectors[question], np.zeros(32)]))

    o, _ = o_layer(np.array(x), weights_of(model.layer), model.layer.config)
    w = weights_of(model.head)
    return o[len(keys):] @ w["weight"].T + w["bias"]


@each_rule
@twice_or_not
def test_recall_answers_as_the_equations_say(rule, twice):
    model = double_model(rule)
    pairs = recall.draw_pairs(24, 3, seeded(), twice)

    logits = asked(model, pairs)

    for found, row in zip(logits, by_row(pairs), strict=True):
        same(found, o_logits(model, row))


@each_rule
@pytest.mark.parametrize("n", recall.N_PAIRS)
def test_recall_comes_from_the_memory_alone(rule, n):
    model = double_model(rule)
    pairs = recall.draw_pairs(n, 2, seeded(), twice=False)
    others = pairs._replace(values=(pairs.values + 1) % recall.N_SYMBOLS)

    told = asked(model, pairs), asked(model, others)
    with torch.no_grad():
        model.layer.beta.fill_(-1e4)                      # the gate is shut
    shut = asked(model, pairs), asked(model, others)

    assert not torch.equal(*told)
    assert torch.equal(*shut)


def test_recall_begins_with_a_gate_that_is_mostly_memory():
    gate = recall.RecallModel("delta", d_key=16).layer.beta.sigmoid()

    same(gate, [1 / (1 + math.exp(-2))], 1e-5)


def test_recall_has_fixed_symbols_and_learns_all_else():
    model = recall.RecallModel("delta", d_key=16)

    learned = {name for name, _ in model.named_parameters()}
    fixed = {name for name, _ in model.named_buffers()}

    assert learned == {"layer.w_q.weight", "layer.w_k.weight", "layer.w_v.weight",
                       "layer.w_o.weight", "layer.beta", "head.weight", "head.bias"}
    assert fixed == {"key_vectors", "value_vectors"}


# --- recall: training and scoring -----------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """A list that grows by what recall draws: pairs, rows, and whether keys come twice."""
    draw = recall.draw_pairs
    asked_for = []

    def note_and_draw(n, batch, generator, twice):
        asked_for.append((n, batch, twice))
        return draw(n, batch, generator, twice)

    monkeypatch.setattr(recall, "draw_pairs", note_and_draw)
    return asked_for


def o_gradients(model, pairs):
    """The gradients of the mean surprise at the answers, one for each weight."""
    p = asked(model, pairs).softmax(-1)
    surprises = []
    for p_row, answers in zip(p, pairs.answers, strict=True):
        for p_question, answer in zip(p_row, answers, strict=True):
            surprises.append(-p_question[answer].log())
    loss = sum(surprises) / len(surprises)
    return torch.autograd.grad(loss, list(model.parameters()))


@each_rule
@twice_or_not
def test_recall_first_steps_against_the_gradient_by_a_fiftieth_of_the_rates(
        rule, twice, monkeypatch):
    monkeypatch.setattr(recall, "TRAINING_PAIRS", 64)
    torch.manual_seed(3)
    before = recall.RecallModel(rule, 8)
    pairs = recall.draw_pairs(16, 4, seeded(3), twice)    # up to 2 d_key

    after = recall.train_model(Case(rule, 8, twice), seed=3, steps=1, generator=seeded(3))

    moved = zip(before.named_parameters(), after.parameters(), o_gradients(before, pairs),
                strict=True)
    for (name, old), new, gradient in moved:
        rate = 1e-2 if name == "layer.beta" else 5e-3
        clear = gradient.abs() > 1e-5                     # Adam's first step has one length
        step = (new - old)[clear]
        assert clear.any()
        same(step / (rate / 50), -gradient[clear].sign(), 2e-2)


@pytest.mark.parametrize("d_key, in_turn", [
    (16, [8, 16, 32]),
    (32, [8, 16, 32, 64]),
    (128, [8, 16, 32, 64, 128, 256]),
])
@twice_or_not
def test_recall_trains_on_up_to_two_pairs_per_feature_every_other_time_on_the_most(
        d_key, in_turn, twice, drawn, monkeypatch):
    monkeypatch.setattr(recall, "TRAINING_PAIRS", 512)
    expected = []
    for n in in_turn:
        expected += [in_turn[-1], n]

    recall.train_model(Case("linear", d_key, twice), 0, len(expected), seeded())

    assert [n for n, _, _ in drawn] == expected
    assert all(n * batch == 512 for n, batch, _ in drawn)
    assert {case for _, _, case in drawn} == {twice}


def logits_that_name(symbols):
    """Logits that are highest at these symbols, (B, m) -> (B, m, symbols)."""
    return torch.nn.functional.one_hot(symbols, recall.N_SYMBOLS).float()


def o_percent(named, answers, counted):
    """How many in 100 of the counted questions are answered right? All are (B, m)."""
    right = 0
    total = 0
    for row in zip(named.tolist(), answers.tolist(), counted.tolist(), strict=True):
        for name, answer, counts in zip(*row, strict=True):
            right += counts and name == answer
            total += counts
    return 100 * right / total


@twice_or_not
def test_recall_scores_how_many_answers_in_100_are_right(twice):
    pairs = recall.draw_pairs(16, 50, seeded(), twice)
    guess = torch.rand(pairs.answers.shape, generator=seeded(1)) < 0.3
    guess[:, pairs.replaced] = False                      # these are all right
    guess[0] = True
    named = torch.where(guess, (pairs.answers + 1) % recall.N_SYMBOLS, pairs.answers)

    def model(keys, values, questions):
        assert torch.equal(questions, pairs.questions)
        return logits_that_name(named)

    found = recall.score(model, pairs)

    new = pairs.replaced.expand(named.shape)
    if twice:
        assert found.keys() == {"replaced", "others"}
        assert found["replaced"] == pytest.approx(o_percent(named, pairs.answers, new))
        assert found["others"] == pytest.approx(o_percent(named, pairs.answers, ~new))
    else:
        assert found.keys() == {"all"}
        assert found["all"] == pytest.approx(o_percent(named, pairs.answers, ~new))


@pytest.fixture
def few_pairs(monkeypatch):
    """Shrink the task to texts that are learned in a second."""
    monkeypatch.setattr(recall, "N_SYMBOLS", 32)
    monkeypatch.setattr(recall, "N_PAIRS", [8, 16])
    monkeypatch.setattr(recall, "EVALUATED_PAIRS", 512)


@each_rule
@twice_or_not
def test_recall_measures_the_model_that_it_trains_for_each_number_of_pairs(
        rule, twice, few_pairs, drawn):
    case = Case(rule, 8, twice)

    found = recall.measure(case, seed=2, steps=2)

    assert drawn[2:] == [(8, 64, twice), (16, 32, twice)]
    generator = seeded(2)
    model = recall.train_model(case, 2, 2, generator)
    for n in (8, 16):
        pairs = recall.draw_pairs(n, 512 // n, generator, twice)
        named = []
        for row in by_row(pairs):
            named.append(o_logits(model, row).argmax(-1))
        named = torch.from_numpy(np.array(named))
        for which, percent in found.items():
            counted = pairs.replaced == (which == "replaced")
            counted = counted.expand(named.shape)
            expected = o_percent(named, pairs.answers, counted)
            assert percent[n] == pytest.approx(expected, abs=0.5)    # a tie in float32


@each_rule
def test_recall_is_learned(rule, few_pairs):
    chance = 100 / 32

    before = recall.measure(Case(rule, 8, False), seed=0, steps=1)["all"]
    after = recall.measure(Case(rule, 8, False), seed=0, steps=150)["all"]

    assert before[8] < 3 * chance
    assert after[8] > 6 * chance


# --- recall: what is printed and drawn ------------------------------------------------

FALLING = {8: 90.0, 16: 70.0, 32: 50.0, 64: 30.0, 128: 10.0, 256: 0.0}


def lower(by):
    return {n: percent - by for n, percent in FALLING.items()}


def known_recall(case, seed, steps):
    """Stands in for a training. Each case and seed has numbers of its own."""
    loss = 4 * seed + case.d_key / 16
    if case.rule == "linear":
        loss += 20
    if case.twice:
        return {"replaced": lower(loss + 2), "others": lower(loss)}
    return {"all": lower(loss)}


@pytest.fixture
def known(monkeypatch):
    """Let recall find known_recall. Returns a list of what is trained."""
    jobs = []

    def note(*job):
        jobs.append(job)
        return known_recall(*job)

    monkeypatch.setattr(recall, "measure", note)
    return jobs


def table_of(out):
    """Read recall's table. Returns {name: cells}."""
    rows = {}
    for line in out.splitlines()[1:]:
        rows[line[:22].strip()] = line[22:].split()
    return rows


def test_recall_trains_ten_cases_with_three_seeds(known, command, tmp_path):
    code, _, _ = command(recall.main, "--out", tmp_path, "--threads", 1)

    once = {(Case(rule, d_key, False), seed, 1000)
            for rule in RULES for d_key in (16, 32, 64, 128) for seed in (0, 1, 2)}
    twice = {(Case(rule, 32, True), seed, 1000) for rule in RULES for seed in (0, 1, 2)}
    assert code == 0
    assert len(known) == len(set(known))
    assert set(known) == once | twice


def test_recall_prints_a_mean_and_a_deviation_over_seeds(known, command, tmp_path):
    _, out, _ = command(recall.main, "--out", tmp_path, "--threads", 1)

    rows = table_of(out)
    assert out.split("\n")[0].split()[-6:] == [str(n) for n in FALLING]
    assert list(rows) == [
        "linear 16", "linear 32", "linear 64", "linear 128",
        "delta 16", "delta 32", "delta 64", "delta 128",
        "linear 32, replaced", "linear 32, others",
        "delta 32, replaced", "delta 32, others",
    ]
    assert rows["delta 16"] == ["85+-4", "65+-4", "45+-4", "25+-4", "5+-4", "-5+-4"]
    assert rows["linear 128"][0] == "58+-4"
    assert rows["delta 32, replaced"][0] == "82+-4"
    assert rows["delta 32, others"][0] == rows["delta 32"][0] == "84+-4"


def test_recall_shows_a_row_when_its_seeds_are_ready(monkeypatch, command, tmp_path):
    shown = []

    def side_by_side(function, jobs):
        for job in jobs:
            shown.append(f"trained {job[0].rule} {job[0].d_key}")
            yield known_recall(*job)

    def print_row(name, *cells):
        shown.append(name)

    monkeypatch.setattr(recall, "side_by_side", side_by_side)
    monkeypatch.setattr(recall, "print_row", print_row)

    command(recall.main, "--out", tmp_path, "--threads", 1)

    assert shown[1:9] == [*["trained linear 16"] * 3, "linear 16",
                          *["trained linear 32"] * 3, "linear 32"]


def test_recall_leaves_each_seed_in_a_table(known, command, tmp_path):
    command(recall.main, "--out", tmp_path, "--threads", 1)

    rows = rows_of(tmp_path / "recall.csv")
    assert len(rows) == 6 * 3 * (8 + 2 * 2)
    for row in rows:
        twice = row["answers"] != "all"
        case = Case(row["rule"], int(row["d_key"]), twice)
        expected = known_recall(case, int(row["seed"]), 1000)
        percent = expected[row["answers"]][int(row["pairs"])]
        assert float(row["recall_percent"]) == pytest.approx(percent)


def lines_drawn(axis):
    """Find the lines of an axis, by the names at their ends."""
    names = {}
    for text in axis.texts:
        names[text.xy] = text.get_text()
    found = {}
    for line in axis.lines:
        x, y = line.get_data()
        if line.get_linestyle() != "None":
            found[names[x[-1], y[-1]]] = line
    return found


def test_recall_draws_a_colour_per_rule_and_a_shade_per_size(
        known, command, tmp_path, figures):
    command(recall.main, "--out", tmp_path, "--threads", 1)

    axis, = figures[-1].axes
    lines = lines_drawn(axis)
    sizes = [16, 32, 64, 128]
    for rule in RULES:
        own = [lines[f"{rule}, d_key {d_key}"] for d_key in sizes]
        shades = [line.get_alpha() for line in own]
        assert {line.get_color() for line in own} == {common.COLOUR[rule]}
        assert sorted(set(shades)) == shades
        for d_key, line in zip(sizes, own, strict=True):
            mean = known_recall(Case(rule, d_key, False), seed=1, steps=0)["all"]
            same(np.array(line.get_xdata()), list(mean), 1e-5)
            same(np.array(line.get_ydata()), list(mean.values()), 1e-5)
    assert len(lines) == 8
    assert (tmp_path / "recall.png").stat().st_size > 10_000


def test_recall_draws_a_point_for_each_seed(known, command, tmp_path, figures):
    command(recall.main, "--out", tmp_path, "--threads", 1)

    axis, = figures[-1].axes
    points = {rule: [] for rule in RULES}
    for line in axis.lines:
        if line.get_linestyle() == "None":
            for rule in RULES:
                if to_rgba(line.get_color()) == to_rgba(common.COLOUR[rule]):
                    points[rule] += zip(*line.get_data(), strict=True)

    for rule in RULES:
        expected = []
        for d_key in (16, 32, 64, 128):
            for seed in (0, 1, 2):
                curve = known_recall(Case(rule, d_key, False), seed, 0)["all"]
                expected += curve.items()
        same(sorted(points[rule]), sorted(expected), 1e-5)


@pytest.mark.parametrize("delta, linear, title", [
    ([50.0, 60.0], [30.0, 36.0], "Of 32 pairs, Delta names 55% and Linear 33%"),
    ([50.0, 60.0], [30.0, 50.0], "How many pairs does a memory hold?"),
    ([50.0, 60.0], [70.0, 70.0], "How many pairs does a memory hold?"),
])
def test_recall_says_its_finding_only_if_all_seeds_agree(delta, linear, title):
    measured = {
        Case("linear", 32, False): [{"all": {32: percent}} for percent in linear],
        Case("delta", 32, False): [{"all": {32: percent}} for percent in delta],
    }

    assert recall.find_title(measured) == title


@pytest.mark.filterwarnings("error")
def test_recall_quick_is_one_seed_of_two_sizes_without_a_warning(
        monkeypatch, command, tmp_path):
    assert recall.QUICK == recall.Plan([16, 32], seeds=1, steps=400)
    monkeypatch.setattr(recall, "QUICK", recall.Plan([16, 32], seeds=1, steps=2))
    monkeypatch.setattr(recall, "N_PAIRS", [8, 32])
    monkeypatch.setattr(recall, "EVALUATED_PAIRS", 256)

    code, out, err = command(recall.main, "--quick", "--out", tmp_path, "--threads", 1)

    rows = table_of(out)
    expected = recall.measure(Case("delta", 32, True), seed=0, steps=2)
    assert code == 0
    assert len(err.splitlines()) == 1
    assert list(rows) == ["linear 16", "linear 32", "delta 16", "delta 32",
                          "linear 32, replaced", "linear 32, others",
                          "delta 32, replaced", "delta 32, others"]
    for which, percent in expected.items():
        cells = rows[f"delta 32, {which}"]
        assert cells == [f"{percent[8]:.0f}", f"{percent[32]:.0f}"]


# --- texts ----------------------------------------------------------------------------

PARAGRAPH = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. "
    "There and back again."
)


def o_needle(name, key):
    """Write what is hidden in each text."""
    told = f"The pass key is {key}. Remember it. {key} is the pass key."
    back = "".join(reversed(key))
    decoy = f"The blue info is {back}. Find it. {back} is the blue info."
    after = {
        "border": " Here we go.",
        "decoy": f" {PARAGRAPH} {decoy}",
        "twice": f" {PARAGRAPH} {told}",
    }
    return told + after.get(name, "")


def o_tasks(name):
    """The tasks of a text, for the three keys of seed 7."""
    digits = 6 if name == "6-digits" else 4
    keys = [task.answer for task in passkey.Search([], [], 3, 7, digits).tasks()]
    return [passkey.Task(o_needle(name, key), passkey.QUESTION, key) for key in keys]


def o_hay(name):
    return "words" if name == "words" else "paper"


def search_arguments():
    return SimpleNamespace(lengths=[1024, 8192], depths=[0, 0.25], keys=3, eval_seed=7)


each_text = pytest.mark.parametrize(
    "name", ["paper", "words", "6-digits", "border", "decoy", "twice"])


@each_text
def test_texts_differ_from_the_papers_in_one_thing_each(name):
    search = texts.make_search(texts.TEXTS[name], search_arguments())

    assert search.tasks() == o_tasks(name)
    assert search.hay == o_hay(name)
    assert (search.lengths, search.depths) == ([1024, 8192], [0, 0.25])


@each_text
def test_texts_let_the_answer_begin_a_segment_at_1k_in_border_and_6_digits(name):
    task = o_tasks(name)[0]
    hay = PARAGRAPH * passkey.paragraphs(1024, task)
    text = passkey.INTRO + task.needle + hay + task.question

    begins = len(passkey.encode(text)) % passkey.model_config().segment_len == 0

    assert begins == (name in ("border", "6-digits"))


def test_texts_find_what_the_search_of_passkey_finds(command, tmp_path):
    path = ASSETS / "passkey-delta.pt"
    options = ["--lengths", "1K", "--depths", "0,100", "--keys", 3, "--eval-seed", 7]

    code, out, _ = command(texts.main, "--load", path, *options,
                           "--out", tmp_path, "--threads", 1)

    assert code == 0
    model, _ = train.load_model(path)
    shares = set()
    for name, text in texts.TEXTS.items():
        found = list(passkey.evaluate(model, o_tasks(name), [1024], [0, 1], o_hay(name)))
        rows = rows_of(tmp_path / f"texts-{name}.csv")
        assert [float(row["digits_right"]) for row in rows] == [
            cell.digits_right for cell in found]
        assert f"\n{name}: {text.what}\n" in out
        shares |= {cell.digits_right for cell in found}
    assert len(shares) > 3                                # so the texts do differ


def test_texts_read_all_files_however_they_are_given(command, tmp_path):
    files = [ASSETS / "passkey-delta.pt", ASSETS / "passkey-linear.pt"]
    options = ["--lengths", 200, "--depths", 0, "--keys", 1, "--threads", 1]

    _, together, _ = command(texts.main, "--load", *files, *options,
                             "--out", tmp_path / "a")
    _, apart, _ = command(texts.main, "--load", files[0], "--load", files[1], *options,
                          "--out", tmp_path / "b")

    assert together == apart
    for name in texts.TEXTS:
        rows = rows_of(tmp_path / "b" / f"texts-{name}.csv")
        assert [Path(row["model"]) for row in rows] == files


def test_texts_refuse_too_many_keys_before_all_work(command, tmp_path):
    code, out, err = command(texts.main, "--load", ASSETS / "passkey-delta.pt",
                             "--keys", 1000, "--out", tmp_path)

    assert code == 2
    assert out == ""
    assert err == "error: of keys with 4 digits, at most 909 are held out\n"


# --- bench: how it measures -----------------------------------------------------------


class Clock:
    """Stands still, unless somebody works."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """Give bench a clock that only the test moves."""
    stopped = Clock()
    monkeypatch.setattr(bench, "time", stopped)
    return stopped


def test_bench_takes_the_median_of_actions_that_take_turns(clock):
    turns = []
    takes = {"a": [1, 50, 3, 2, 4], "b": [7, 7, 9, 90, 8]}

    def action_of(name):
        durations = iter(takes[name])

        def action():
            turns.append(name)
            clock.now += next(durations)

        return action

    found = bench.medians({"a": action_of("a"), "b": action_of("b")}, repeats=5)

    assert found == {"a": 3, "b": 8}
    assert turns == ["a", "b"] * 5


def test_bench_divides_the_first_by_the_second():
    assert Row("what", 6.0, 4.0, "MB").ratio() == 1.5
    assert bench.time_row("what", 6.0, 4.0, "s") == Row("what", 6.0, 4.0, "s")
    assert bench.time_row("what", 6.0, 4.0, "ms", 2) == Row("what", 3e3, 2e3, "ms")
    assert bench.time_row("what", 6.0, 3.0, "us", 3) == Row("what", 2e6, 1e6, "us")


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")


def peak_growth(megabytes):
    """Say by how much the peak grows when so much is allocated, in this process."""
    before = bench.peak_memory()
    torch.ones(megabytes * 2 ** 18)
    return bench.peak_memory() - before


@on_linux
def test_bench_sees_what_a_process_allocates_in_megabytes():
    grown = bench.in_new_process(peak_growth, 300)

    assert grown == pytest.approx(300, abs=40)


@on_linux
def test_bench_measures_the_peak_of_a_process_alone():
    block = torch.ones(2 ** 26)                           # 256 MB, in this process
    here = bench.peak_memory()
    del block

    there = bench.in_new_process(bench.peak_memory)

    assert 20 < there < here - 128


@on_linux
def test_bench_means_the_memory_in_use_and_not_what_is_only_reserved():
    resource = pytest.importorskip("resource")

    peak = bench.peak_memory()

    known = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10
    assert peak == pytest.approx(known, rel=0.02)


def test_bench_knows_no_peak_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "Path", lambda *parts: tmp_path / "proc")

    assert math.isnan(bench.peak_memory())


# --- bench: what it measures ----------------------------------------------------------

# A second for each token that a layer of this kind reads, in each document.
PRICE = {"local": 2, "linear": 3, "delta": 4, "full": 5}
SEGMENT = 7          # for each call of `segment`
PAPER = 100          # for each token more in a layer of the paper's size


@pytest.fixture
def work(clock, monkeypatch):
    """Let the clock count what the layers do.

    Returns a list of the tokens that each call reads, in all documents.
    """
    scan = infini.InfiniAttention.scan
    segment = infini.InfiniAttention.segment
    read = []

    def counted_scan(layer, q, k, v, state):
        config = layer.config
        kind = config.update if config.attention == "infini" else config.attention
        price = PRICE[kind] + PAPER * (config.d_model == 1024)
        clock.now += price * q.shape[0] * q.shape[2]      # `absorb` asks nothing
        read.append(k.shape[0] * k.shape[2])
        return scan(layer, q, k, v, state)

    def counted_segment(layer, *inputs):
        clock.now += SEGMENT
        return segment(layer, *inputs)

    monkeypatch.setattr(infini.InfiniAttention, "scan", counted_scan)
    monkeypatch.setattr(infini.InfiniAttention, "segment", counted_segment)
    return read


SMALL_SIZES = dict(
    repeats=1,
    small_step=[(3, 64), (1, 32)],
    paper_step=(2, 8),
    text=4096,
    long_text=8192,
    new_tokens=5,
    asked=(2, 64),
    many_segments=(1, 96),
    checkpointed=[(3, 64, "infini"), (1, 96, "full")],
    peer={"small": (2, 64, 1), "paper": (1, 8, 1)},
)


@pytest.fixture
def small_sizes(monkeypatch):
    monkeypatch.setattr(bench, "SIZES", SMALL_SIZES)


def pretended_peak(function, *arguments):
    """Stands in for a new process. Says in a number what it would have measured."""
    if function is bench.streaming_peak:
        n, = arguments
        return n / 2
    assert function is bench.training_peak
    config, batch, length = arguments
    extra = {"infini": 1, "full": 2}[config.attention] + 10 * config.checkpoint
    return batch * length + 1000 * extra


def expected_rows():
    """What the clock says, computed by hand. The small model has two layers."""
    n_step = 2 * (3 * 64 + 32)
    n_text = 2048 + 2 * 2048                              # the first chunk skips a layer
    one_token = 2 * SEGMENT
    all_asked = 2 * 2 * 64
    four_asked = 2 * 32 + 2 * 2 * 32
    chain = 2 * 96

    return [
        Row("peak memory, streaming 8K / 4K tokens", 4096, 2048, "MB"),
        Row("peak memory, training, 192 tokens, checkpoint=True / infini",
            192 + 11_000, 192 + 1000, "MB"),
        Row("peak memory, training, 96 tokens, checkpoint=True / full",
            96 + 11_000, 96 + 2000, "MB"),
        Row("training step, small, Linear / local", 3e3 * n_step, 2e3 * n_step, "ms"),
        Row("training step, small, Delta / local", 4e3 * n_step, 2e3 * n_step, "ms"),
        Row("training step, paper layer, Linear / local", 16 * 103 + 7, 16 * 102 + 7, "s"),
        Row("training step, paper layer, Delta / local", 16 * 104 + 7, 16 * 102 + 7, "s"),
        Row("streaming, time per token, Linear / local",
            3e6 * n_text / 4096, 2e6 * n_text / 4096, "us"),
        Row("streaming, time per token, Delta / local",
            4e6 * n_text / 4096, 2e6 * n_text / 4096, "us"),
        Row("generate, time per token, Linear / local",
            1e6 * (2 * 3 + one_token), 1e6 * (2 * 2 + one_token), "us"),
        Row("generate, time per token, Delta / local",
            1e6 * (2 * 4 + one_token), 1e6 * (2 * 2 + one_token), "us"),
        Row("training step, small, Linear, every token asked / the last four",
            3e3 * all_asked, 3e3 * four_asked, "ms"),
        Row("training speed, small, Linear, segments at once / one by one",
            96 / (3 * chain), 96 / (3 * chain + 2 * 3 * SEGMENT), "tokens/s"),
        Row("streaming, small, 4,096 tokens, full / infini",
            5 * 2 * 4096 + 2 * SEGMENT, 4 * n_text, "s"),
    ]


def test_bench_divides_what_its_rows_say(work, small_sizes, monkeypatch):
    monkeypatch.setattr(bench, "in_new_process", pretended_peak)

    rows = []
    for measure in bench.MEASUREMENTS:
        rows += measure()

    for row, expected in zip(rows, expected_rows(), strict=True):
        assert row.what == expected.what
        assert row.unit == expected.unit
        assert row.first == pytest.approx(expected.first), row.what
        assert row.second == pytest.approx(expected.second), row.what


def test_bench_repeats_short_actions_four_times_as_often(work, small_sizes, monkeypatch):
    asked_for = {}
    medians = bench.medians

    def note(actions, repeats):
        asked_for[measure] = repeats
        return medians(actions, 1)

    monkeypatch.setattr(bench, "in_new_process", pretended_peak)
    monkeypatch.setattr(bench, "medians", note)
    monkeypatch.setitem(SMALL_SIZES, "repeats", 5)
    for measure in bench.MEASUREMENTS:
        list(measure())

    assert asked_for == {
        bench.training_small: 20,
        bench.training_paper: 5,
        bench.streaming: 5,
        bench.generating: 5,
        bench.asking_all: 20,
        bench.segments_at_once: 5,
        bench.streaming_full: 3,
    }


def test_bench_measures_the_sizes_that_results_names():
    sizes = bench.SIZES

    steps = [batch * length for batch, length in sizes["small_step"]]
    assert steps == [1024, 1008, 1024]
    assert [length for _, length in sizes["small_step"]] == [64, 112, 256]
    assert (sizes["text"], sizes["long_text"]) == (32_768, 1_048_576)
    assert sizes["paper_step"] == (1, 16_384)
    paper = bench.paper_config("linear")
    assert (paper.n_heads, paper.d_key, paper.d_value) == (8, 128, 128)
    assert paper.segment_len == 2048


def test_bench_trains_as_train_does(work):
    torch.manual_seed(0)
    model = InfiniTransformer(bench.small_config("delta"))
    tokens = bench.random_tokens(2, 41)
    step = bench.training_step(model, [(2, 40), (2, 40)])

    def loss():
        logits, _ = model(tokens[:, :-1])
        p = logits.softmax(-1).gather(-1, tokens[:, 1:, None])
        return -p.log().mean().item()

    before = {name: p.clone() for name, p in model.named_parameters()}
    first = loss()
    work.clear()
    step()
    read = list(work)
    last = loss()

    assert read == [2 * 40] * 2 * 2                       # two steps of two layers
    assert last < first
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name


def test_bench_runs_a_layer_forward_and_backward_or_forward_alone():
    layer = infini.InfiniAttention(bench.small_config("delta"))
    x = torch.randn(2, 40, 64)
    outputs = []

    def keep_output(layer, inputs, output):
        outputs.append(output[0])

    layer.register_forward_hook(keep_output)

    bench.layer_read(layer, x)()
    untouched = [p.grad is None for p in layer.parameters()]
    bench.layer_step(layer, x)()

    alone, trained = outputs
    assert all(untouched)
    assert not alone.requires_grad
    gradients = torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))
    for p, gradient in zip(layer.parameters(), gradients, strict=True):
        same(p.grad, gradient, 1e-5)


@each_rule
def test_bench_one_by_one_is_the_same_layer_without_its_fast_form(rule):
    config = bench.small_config(rule)
    at_once = InfiniTransformer(config).double()
    one_by_one = bench.one_by_one_model(config).double()
    one_by_one.load_state_dict(at_once.state_dict())
    tokens = bench.random_tokens(2, 100)

    logits, states = at_once(tokens)
    found, found_states = one_by_one(tokens)

    same(found, logits)
    for state, expected in zip(found_states, states, strict=True):
        same(state.memory.M, expected.memory.M)
        same(state.k, expected.k)


def test_bench_streaming_reads_the_whole_text_before_it_looks_at_the_peak(
        work, monkeypatch):
    monkeypatch.setattr(bench, "peak_memory", lambda: sum(work))

    found = bench.streaming_peak(5000)

    assert found == 2 * 5000                              # two layers


def test_bench_counts_only_what_the_step_adds_to_the_peak(work, monkeypatch):
    monkeypatch.setattr(bench, "peak_memory", lambda: 1000 + sum(work))

    found = bench.training_peak(bench.small_config("linear"), 3, 64)

    assert work[:2] == [1, 1]                             # the smallest step
    assert found == 2 * 3 * 64                            # two layers


def megabytes_stored(config, batch, length):
    """How much do the feed-forward networks of a step store for its backward pass?"""
    model = InfiniTransformer(config)
    tokens = bench.random_tokens(batch, length)

    sizes = sizes_stored(lambda: model(tokens))
    n_numbers = sum(size for size in sizes if size == batch * length * config.d_ff)
    return 4 * n_numbers / 2 ** 20


@on_linux
def test_bench_training_peak_holds_what_is_stored_and_less_with_checkpoint():
    stored = bench.small_config("delta")
    again = passkey.model_config(checkpoint=True)
    least = megabytes_stored(stored, 16, 256)

    peak_stored = bench.in_new_process(bench.training_peak, stored, 16, 256)
    peak_again = bench.in_new_process(bench.training_peak, again, 16, 256)

    assert 15 < least < peak_stored < 20 * least
    assert peak_again < 0.6 * peak_stored


# --- bench: beside the peer -----------------------------------------------------------


def slow_and_wrong(ours):
    """Stands in for the peer's layer. Runs ours twice, and is off by 2."""
    def layer(x):
        ours(x)
        o, memory = ours(x)
        return o + 2, memory

    return layer


def test_bench_compares_outputs_training_and_reading_with_the_peer(
        work, small_sizes, monkeypatch):
    monkeypatch.setattr(bench, "peer_of", slow_and_wrong)

    rows = {row.what: row for row in bench.beside_peer()}

    costs = {
        "small layer, linear": (2 * 64 * 3, 3),
        "small layer, delta": (2 * 64 * 4, 4),
        "paper layer, linear": (8 * 103 + SEGMENT, 103 + SEGMENT / 8),
        "paper layer, delta": (8 * 104 + SEGMENT, 104 + SEGMENT / 8),
    }
    assert len(rows) == 3 * len(costs)
    for what, (step, token) in costs.items():
        output = rows[f"output, {what}, largest difference / largest value"]
        assert output.first == pytest.approx(2, abs=1e-5)
        assert 0 < output.second < 5

        training = rows[f"training step, {what}, peer / ours"]
        reading = rows[f"reading, time per token, {what}, peer / ours"]
        assert training.unit == "ms"
        assert training.first == pytest.approx(2e3 * step)
        assert training.second == pytest.approx(1e3 * step)
        assert reading.unit == "us"
        assert reading.first == pytest.approx(2e6 * token)
        assert reading.second == pytest.approx(1e6 * token)


@each_rule
def test_bench_gives_the_peer_our_weights(rule):
    pytest.importorskip("infini_transformer_pytorch", reason="only --peer needs it")
    ours = infini.InfiniAttention(bench.small_config(rule))
    with torch.no_grad():
        ours.beta.normal_()
    theirs = bench.peer_of(ours)
    x = torch.nn.functional.rms_norm(torch.randn(2, 100, 64), (64,))

    o, _ = ours(x)
    found, _ = theirs(x)

    same(found, o, 1e-5)


def test_bench_needs_the_peer_only_when_it_is_asked_for(monkeypatch, command):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)

    code, out, err = command(bench.main, "--peer")

    assert code == 2
    assert out == ""
    assert "pip install infini-transformer-pytorch==0.2.1" in err.splitlines()[-1]


# --- bench: the command ---------------------------------------------------------------


def some_rows():
    yield Row("first thing", 3.0, 2.0, "ms")
    yield Row("second thing", 1.0, 8.0, "MB")


def peer_rows():
    yield Row("beside the peer", 5.0, 4.0, "us")


@pytest.mark.parametrize("options, n_rows", [([], 2), (["--peer"], 3)])
def test_bench_prints_and_writes_each_row_with_its_ratio(
        options, n_rows, monkeypatch, command, tmp_path):
    monkeypatch.setattr(bench, "MEASUREMENTS", [some_rows])
    monkeypatch.setattr(bench, "beside_peer", peer_rows)
    monkeypatch.setattr(bench, "find_spec", lambda name: True)

    code, out, err = command(bench.main, *options, "--out", tmp_path, "--threads", 1)

    expected = [
        ["first thing", "3.0", "2.0", "ms", "1.5"],
        ["second thing", "1.0", "8.0", "MB", "0.125"],
        ["beside the peer", "5.0", "4.0", "us", "1.25"],
    ][:n_rows]
    printed = out.splitlines()
    rows = rows_of(tmp_path / "bench.csv")
    assert (code, err) == (0, "")
    assert torch.__version__ in printed[0]
    assert [list(row.values()) for row in rows] == expected
    assert list(rows[0]) == ["what", "first", "second", "unit", "ratio"]
    for line, (what, first, second, unit, ratio) in zip(printed[2:], expected, strict=True):
        assert line.startswith(what)
        numbers = [f"{float(first):g}", "/", f"{float(second):g}", unit, ratio]
        assert line.split()[-5:] == numbers
