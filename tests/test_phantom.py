"""Tests of experiments/phantom.py, to be merged into tests/test_experiments.py."""

import csv

import numpy as np
import pytest
import torch

from experiments import phantom, recall

# --- phantom: everything again in float64, one token at a time ------------------------


def o_sigma(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def o_read(q, M, z):
    """Read with one query. q: (d_key,)."""
    norm = o_sigma(q) @ z
    return o_sigma(q) @ M / (norm if norm > 1e-30 else 1.0)


def o_phantom(M, z):
    """Read with z as if it were sigma of a query."""
    return z @ M / (z @ z if z @ z > 1e-30 else 1.0)


def o_write(segments, subtract):
    """Write segments of (keys, values) into one memory. subtract: of (key, M, z)."""
    first_k, first_v = segments[0]
    M = np.zeros((first_k.shape[1], first_v.shape[1]))
    z = np.zeros(first_k.shape[1])
    for keys, values in segments:
        new_M = M.copy()
        new_z = z.copy()
        for k, v in zip(keys, values, strict=True):
            new_M += np.outer(o_sigma(k), v - subtract(k, M, z))
            new_z += o_sigma(k)
        M = new_M
        z = new_z
    return M, z


O_SUBTRACT = {
    "nothing (Linear, Eq. 8)": lambda k, M, z: 0,
    "all but the phantom": lambda k, M, z: o_read(k, M, z) - o_phantom(M, z),
    "the phantom alone": lambda k, M, z: o_phantom(M, z),
    "all it reads (Delta, Eq. 9)": lambda k, M, z: o_read(k, M, z),
}


def double_model(rule="linear"):
    torch.manual_seed(0)
    return recall.RecallModel(rule, phantom.D_KEY).double()


def some_pairs(n=24, batch=2):
    generator = torch.Generator().manual_seed(5)
    return recall.draw_pairs(n, batch, generator, twice=False)


def o_segments(model, pairs, row):
    """Compute keys and values of a row's pairs, in segments of eight."""
    key_vectors = model.key_vectors[pairs.keys[row]]
    told = np.hstack([key_vectors, model.value_vectors[pairs.values[row]]])
    k = told @ model.layer.w_k.weight.detach().numpy().T
    v = told @ model.layer.w_v.weight.detach().numpy().T
    return [(k[i:i + 8], v[i:i + 8]) for i in range(0, len(k), 8)]


def o_answer(model, pairs, row, M, z, from_read=0):
    """Ask all questions of one memory, which they leave as it is."""
    layer = model.layer
    asked = np.hstack([model.key_vectors[pairs.questions[row]], np.zeros((24, 32))])
    weights = [w.weight.detach().numpy() for w in (layer.w_q, layer.w_k, layer.w_v)]
    q, k, v = (asked @ weight.T for weight in weights)
    w_o = layer.w_o.weight.detach().numpy()
    head = model.head.weight.detach().numpy()
    bias = model.head.bias.detach().numpy()
    gate = 1 / (1 + np.exp(-layer.beta.item()))

    logits = []
    for i in range(len(asked)):
        here = slice(i // 8 * 8, i // 8 * 8 + 8)
        a_dot = layer.attend(*(torch.tensor(x[None, None, here]) for x in (q, k, v)))
        a_mem = o_read(q[i], M, z) - from_read
        a = gate * a_mem + (1 - gate) * a_dot[0, 0, i % 8].detach().numpy()
        logits.append(head @ (w_o @ a) + bias)
    return np.array(logits)


@pytest.mark.parametrize("name", O_SUBTRACT)
def test_phantom_subtracts_what_its_row_says_and_leaves_questions_unwritten(name):
    model = double_model()
    pairs = some_pairs()
    logits = phantom.answer(model, pairs, phantom.SUBTRACT[name]).detach()
    for row in range(2):
        M, z = o_write(o_segments(model, pairs, row), O_SUBTRACT[name])
        wanted = o_answer(model, pairs, row, M, z)
        assert np.allclose(logits[row], wanted, atol=1e-10)


def test_phantom_of_another_memory_is_that_of_the_row_before():
    model = double_model()
    pairs = some_pairs()
    subtract = phantom.SUBTRACT["another memory's phantom"]
    logits = phantom.answer(model, pairs, subtract).detach()

    segments = [o_segments(model, pairs, row) for row in range(2)]
    M = np.zeros((2, 32, 64))
    z = np.zeros((2, 32))
    for s in range(3):
        phantoms = [o_phantom(M[row], z[row]) for row in range(2)]
        for row in range(2):
            for k, v in zip(*segments[row][s], strict=True):
                M[row] += np.outer(o_sigma(k), v - phantoms[1 - row])
                z[row] += o_sigma(k)
    for row in range(2):
        wanted = o_answer(model, pairs, row, M[row], z[row])
        assert np.allclose(logits[row], wanted, atol=1e-10)


def test_phantom_is_taken_from_each_read_after_a_linear_write():
    model = double_model()
    pairs = some_pairs()
    logits = phantom.answer(model, pairs, phantom.nothing, from_read=True).detach()
    for row in range(2):
        M, z = o_write(o_segments(model, pairs, row), lambda k, M, z: 0)
        wanted = o_answer(model, pairs, row, M, z, from_read=o_phantom(M, z))
        assert np.allclose(logits[row], wanted, atol=1e-10)


def test_phantom_noise_is_as_long_as_what_is_read_and_points_elsewhere():
    torch.manual_seed(1)
    k = torch.randn(3, 1, 8, 16)
    empty = phantom.Memory.empty(3, 1, 16, 64)
    memory = phantom.update_linear(empty, k, torch.randn(3, 1, 8, 64))
    read = phantom.retrieve(k, memory)
    first = phantom.noise(memory, k)
    again = phantom.noise(memory, k)
    assert torch.allclose(first.norm(dim=-1), read.norm(dim=-1))
    for other in (read, again):
        assert torch.cosine_similarity(first, other, dim=-1).mean().abs() < 0.1


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_phantom_knows_which_subtraction_is_which_equation(rule):
    """Before the first question's segment is written, both kinds of asking agree."""
    model = double_model(rule)
    pairs = some_pairs()
    written = model(pairs.keys, pairs.values, pairs.questions)
    unwritten = phantom.answer(model, pairs, phantom.EQUATION[rule])
    assert torch.allclose(written[:, :8], unwritten[:, :8], atol=1e-10)
    assert not torch.allclose(written[:, 8:], unwritten[:, 8:], atol=1e-3)


@pytest.mark.parametrize("kind", ["sparse", "random"])
@pytest.mark.parametrize("rule", ["linear", "delta"])
@pytest.mark.parametrize("neutral", [False, True])
def test_phantom_fills_untrained_memories(kind, rule, neutral, monkeypatch):
    monkeypatch.setattr(phantom, "TRIALS", 5)
    monkeypatch.setattr(phantom, "UNTRAINED_PAIRS", [2, 8, 20])
    found = phantom.measure_untrained(kind, rule, neutral)

    generator = torch.Generator().manual_seed(2)
    for n in (2, 8, 20):
        keys = np.full((5, n, 16), -8.0)
        for i in range(n):
            keys[:, i, i % 16] = 8
        if kind == "random":
            keys = torch.randn(5, n, 16, generator=generator).double().numpy()
        candidates = torch.randn(5, 512, 32, generator=generator).double().numpy()

        errors = []
        rights = []
        for trial in range(5):
            segments = []
            if neutral:
                segments.append((np.full((1, 16), -2.0), np.zeros((1, 32))))
            for i in range(n):
                segments.append((keys[trial, i:i + 1], candidates[trial, i:i + 1]))
            everything = O_SUBTRACT["all it reads (Delta, Eq. 9)"]
            nothing = O_SUBTRACT["nothing (Linear, Eq. 8)"]
            M, z = o_write(segments, everything if rule == "delta" else nothing)
            for i in range(n):
                read = o_read(keys[trial, i], M, z)
                errors.append(((read - candidates[trial, i]) ** 2).sum())
                rights.append((candidates[trial] @ read).argmax() == i)

        error = sum(errors) / (candidates[:, :n] ** 2).sum()
        assert found[n] == pytest.approx((error, 100 * np.mean(rights)), abs=1e-4)


def test_phantom_overlap_is_the_mean_cosine_of_two_keys():
    k = torch.randn(2, 1, 5, 4, generator=torch.Generator().manual_seed(1))
    cosines = []
    for keys in o_sigma(k[:, 0].double().numpy()):
        for i in range(5):
            for j in range(i):
                norms = np.linalg.norm(keys[i]) * np.linalg.norm(keys[j])
                cosines.append(keys[i] @ keys[j] / norms)
    assert phantom.overlap(k) == pytest.approx(np.mean(cosines), abs=1e-6)


def test_phantom_untrained_delta_errs_more_but_names_more_where_keys_overlap():
    """RESULTS.md: at 2 pairs Delta is worse by far. On the dial it wins from 0.19 on."""
    for kind in ("sparse", "random"):
        linear = phantom.measure_untrained(kind, "linear", neutral=False)
        delta = phantom.measure_untrained(kind, "delta", neutral=False)
        for n in phantom.UNTRAINED_PAIRS:
            assert delta[n][0] > linear[n][0]
    assert phantom.measure_untrained("sparse", "delta", neutral=True)[2][0] < 0.01

    linear = phantom.turn_dial("linear")
    delta = phantom.turn_dial("delta")
    assert list(linear) == list(delta) == sorted(linear)
    for x in linear:
        assert (delta[x] > linear[x]) == (x > 0.15)


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_phantom_finds_each_number_by_its_name(rule, monkeypatch):
    """Another score stands in, which tells any two ways of asking apart."""
    monkeypatch.setattr(recall, "EVALUATED_PAIRS", 128)
    monkeypatch.setattr(phantom, "score", lambda logits, pairs: logits.abs().sum().item())
    model = double_model(rule)
    found = phantom.evaluate(model, rule)

    own = phantom.all_it_reads if rule == "delta" else phantom.nothing
    for n in (8, 16, 32, 64):
        generator = torch.Generator().manual_seed(99)
        pairs = recall.draw_pairs(n, 128 // n, generator, twice=False)
        logits = model(pairs.keys, pairs.values, pairs.questions)
        assert found["questions written", n] == pytest.approx(logits.abs().sum().item())
        logits = phantom.answer(model, pairs, own)
        assert found["questions unwritten", n] == pytest.approx(logits.abs().sum().item())

    pairs = recall.draw_pairs(32, 4, torch.Generator().manual_seed(99), twice=False)
    for name, subtract in phantom.SUBTRACT.items():
        if name != "noise of that norm":
            logits = phantom.answer(model, pairs, subtract)
            assert found[name, 32] == pytest.approx(logits.abs().sum().item())
    logits = phantom.answer(model, pairs, phantom.nothing, from_read=True)
    assert found[phantom.FROM_READ, 32] == pytest.approx(logits.abs().sum().item())

    keys = []
    for row in range(4):
        keys.append(np.vstack([k for k, _ in o_segments(model, pairs, row)]))
    wanted = phantom.overlap(torch.tensor(np.array(keys)))
    assert phantom.key_overlap(model) == pytest.approx(wanted)


@pytest.mark.parametrize("questions_written", [True, False])
def test_phantom_trains_as_recall_does_but_for_the_questions(questions_written):
    """Recall's own training is repeated bit for bit, as long as questions are written."""
    torch.manual_seed(3)
    model = recall.RecallModel("delta", phantom.D_KEY)
    phantom.train_model(model, "delta", questions_written, seed=3, steps=3)

    case = recall.Case("delta", phantom.D_KEY, twice=False)
    theirs = recall.train_model(case, 3, 3, torch.Generator().manual_seed(3))
    same = torch.equal(model.layer.w_k.weight, theirs.layer.w_k.weight)
    assert same == questions_written


def test_phantom_prints_draws_and_saves_all_seeds(tmp_path, monkeypatch, command, figures):
    def measure(rule, questions_written, seed, steps):
        assert steps == 1000
        found = {}
        for what in ("overlap, untrained", "overlap, trained", phantom.FROM_READ):
            found[what, 32] = 0.5
        for what in ("questions written", "questions unwritten"):
            for n in phantom.N_PAIRS:
                found[what, n] = n + 10.0 * seed + (rule == "delta")
        for name in phantom.SUBTRACT:
            found[name, 32] = 50.0 if name == "the phantom alone" else 30.0
        return found

    monkeypatch.setattr(phantom, "TRIALS", 2)
    monkeypatch.setattr(phantom, "measure", measure)
    code, out, _ = command(phantom.main, "--out", tmp_path, "--threads", 1)
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["delta,", "never", "written", "19+-10", "27+-10", "43+-10", "75+-10"] in rows
    assert ["the", "phantom", "alone", "50+-0", "50+-0"] in rows

    with open(tmp_path / "phantom.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 1 + 12 * (2 + 8 + 6 + 1)
    assert ["delta", "False", "2", "questions written", "64", "85.0"] in rows
    assert figures[0].get_suptitle().startswith("Delta wins because")


@pytest.mark.parametrize(("alone", "rest", "holds"), [
    (31, 30, True),
    (30, 30, False),
    (31, 31, False),
])
def test_phantom_title_claims_only_what_each_model_shows(alone, rest, holds):
    measured = {}
    for rule in ("linear", "delta"):
        measured[rule, True, "nothing (Linear, Eq. 8)", 32] = [30, 30]
        measured[rule, True, "the phantom alone", 32] = [50, 50]
        measured[rule, True, "all but the phantom", 32] = [29, 29]
    measured["delta", True, "the phantom alone", 32][1] = alone
    measured["delta", True, "all but the phantom", 32][1] = rest
    assert ("wins" in phantom.find_title(measured)) == holds


def test_phantom_quick_is_one_seed_and_few_steps(tmp_path, monkeypatch, command):
    jobs = []
    measure = phantom.measure

    def note_and_measure(*job):
        jobs.append(job)
        return measure(*job[:3], 1)

    monkeypatch.setattr(phantom, "TRIALS", 2)
    monkeypatch.setattr(phantom, "measure", note_and_measure)
    monkeypatch.setattr(recall, "EVALUATED_PAIRS", 128)
    code, out, _ = command(phantom.main, "--quick", "--out", tmp_path, "--threads", 1)
    assert code == 0 and "+-" not in out
    assert [job[2:] for job in jobs] == [(0, 400)] * 4
