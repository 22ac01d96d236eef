"""The claims about experiments/sharpness.py, against NumPy in float64."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import passkey
import train
from experiments import sharpness
from infini import InfiniTransformer
from passkey import HAY, INTRO, NEEDLE, QUESTION, encode

ASSETS = Path(passkey.__file__).with_name("assets")
PLAIN = ASSETS / "passkey-plain.pt"
N = 32        # tokens of a segment
HAY_N = 24    # tokens of a paragraph
KEY = "9054"


# --- The model once more --------------------------------------------------------------


def sigma(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def norm(x, weight):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True)) * weight


def gelu(x):
    erf = np.vectorize(math.erf)
    return x * (1 + erf(x / math.sqrt(2))) / 2


def turn(x, base):
    """Rotate the pairs of (H, T, d) by the place in the segment."""
    T, half = x.shape[1], x.shape[2] // 2
    angles = np.arange(T)[:, None] * base ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * np.cos(angles) - second * np.sin(angles),
                           second * np.cos(angles) + first * np.sin(angles)], axis=-1)


class Oracle:
    """Reads one text, segment by segment. It knows the last layer's q and k of each one."""

    def __init__(self, model):
        self.w = {name: w.detach().double().numpy() for name, w in model.named_parameters()}
        self.c = model.config

    def layer(self, i, x, M, z):
        """Return the layer's output, q, k, and the memory after the segment."""
        def weight(name):
            return self.w[f"blocks.{i}.{name}"]

        y = norm(x, weight("norm1.weight"))
        heads = []
        for name in "qkv":
            projected = y @ weight(f"attention.w_{name}.weight").T
            heads.append(projected.reshape(len(x), self.c.n_heads, -1).transpose(1, 0, 2))
        q, k, v = heads

        scores = turn(q, self.c.rope_base) @ turn(k, self.c.rope_base).transpose(0, 2, 1)
        scores = scores / math.sqrt(self.c.d_key)
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        a_dot = p / p.sum(-1, keepdims=True) @ v

        def recall(sx):
            total = (sx * z[:, None]).sum(-1, keepdims=True)
            return sx @ M / np.where(total > 1e-30, total, 1)

        gate = 1 / (1 + np.exp(-weight("attention.beta")))[:, None, None]
        a = gate * recall(sigma(q)) + (1 - gate) * a_dot
        x = x + a.transpose(1, 0, 2).reshape(len(x), -1) @ weight("attention.w_o.weight").T
        y = gelu(norm(x, weight("norm2.weight")) @ weight("up.weight").T)
        x = x + y @ weight("down.weight").T

        if len(x) == N:
            sk = sigma(k)
            new = v - recall(sk) if self.c.update == "delta" else v
            M, z = M + sk.transpose(0, 2, 1) @ new, z + sk.sum(1)
        return x, q, k, M, z

    def read(self, tokens, memories=None):
        """Return logits, the memories, and the last layer's q and k of all tokens."""
        c = self.c
        if memories is None:
            M = np.zeros((c.n_heads, c.d_key, c.d_value))
            z = np.zeros((c.n_heads, c.d_key))
            memories = [(M, z)] * c.n_layers
        logits, queries, keys = [], [], []
        for start in range(0, len(tokens), N):
            x = self.w["embedding.weight"][tokens[start:start + N]]
            after = []
            for i, (M, z) in enumerate(memories):
                x, q, k, M, z = self.layer(i, x, M, z)
                after.append((M, z))
            memories = after
            logits.append(norm(x, self.w["norm.weight"]) @ self.w["head.weight"].T)
            queries.append(q)
            keys.append(k)
        return (np.concatenate(logits), memories, np.concatenate(queries, 1),
                np.concatenate(keys, 1))


class Moment:
    """Holds a key's text, which the oracle has read up to the question at 1K."""

    def __init__(self, model):
        self.oracle = Oracle(model)
        hay = encode(HAY).tolist()
        needle = encode(NEEDLE.format(KEY)).tolist()
        text = encode(INTRO).tolist() + needle + hay * 80
        self.digits = encode(KEY).tolist()
        self.places = len(encode(INTRO)) + np.flatnonzero(np.isin(needle, self.digits))

        # 4 paragraphs and 9 periods of 96 tokens of hay stand before the question.
        end = len(encode(INTRO)) + len(needle) + 4 * HAY_N + 9 * 96
        border = end // N * N
        _, self.memories, _, self.keys = self.oracle.read(text[:border])
        _, after, _, _ = self.oracle.read(text[border:border + 96], self.memories)
        self.added = [(new - old) / 96 for new, old in
                      zip(after[-1], self.memories[-1], strict=True)]
        self.end = text[border:end] + encode(QUESTION).tolist() + self.digits[:-1]
        self.n = 4 * HAY_N + 9 * 96

    def ask(self, M, z):
        """Return the margin of each digit with this memory in the last layer."""
        memories = [*self.memories[:-1], (M, z)]
        logits, _, self.queries, _ = self.oracle.read(self.end, memories)
        margins = []
        for row, digit in zip(logits[-4:], self.digits, strict=True):
            margins.append(row[digit] - np.delete(row, digit).max())
        return np.array(margins)

    def after(self, more):
        """Return the margins after so many more tokens of hay in the last layer."""
        M, z = self.memories[-1]
        return self.ask(M + more * self.added[0], z + more * self.added[1])

    def half_lengths(self):
        M, z = self.memories[-1]
        lowered = []
        for head in range(len(z)):
            other = M.copy(), z.copy()
            other[0][head] = 1e15 * self.added[0][head]    # it reads only hay
            other[1][head] = 1e15 * self.added[1][head]
            lowered.append(self.ask(*other))
        halves = []
        for i, head in enumerate(np.argmin(lowered, axis=0)):
            sq = sigma(self.queries[head, i - 4])
            own = sum(sq @ sigma(self.keys[head, self.places[j]]) for j in (i, i + 4))
            halves.append(own / (sq @ self.added[1][head]))
        return halves


def tiny_model(rule):
    torch.manual_seed(0)
    config = passkey.model_config(update=rule, d_model=16, n_heads=2, d_key=4, d_value=6,
                                  d_ff=16, gate_init=0.0)
    return InfiniTransformer(config).double()


# --- Claims ---------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_sharpness_half_length_and_first_margin_of_a_tiny_model_are_numpys(rule):
    model = tiny_model(rule)
    moment = Moment(model)
    digits = sharpness.measure(model, [KEY])
    np.testing.assert_allclose(digits.half_length, moment.half_lengths(), rtol=1e-8)
    assert digits.wrong.tolist() == (moment.after(0) < 0).tolist()


@pytest.mark.parametrize("file", ["passkey-plain.pt", "passkey-delta.pt"])
def test_sharpness_at_its_reach_a_digit_is_lost_if_hay_adds_what_it_adds_at_1k(file):
    model, _ = train.load_model(ASSETS / file)
    moment = Moment(model)
    digits = sharpness.measure(model, [KEY])
    np.testing.assert_allclose(digits.half_length, moment.half_lengths(), rtol=1e-6)
    for i, reach in enumerate(digits.reach.tolist()):
        if reach == math.inf:
            assert moment.after(1e12)[i] > 0
        else:
            assert moment.after(0.97 * reach - moment.n)[i] > 0
            assert moment.after(1.03 * reach - moment.n)[i] < 0


def test_sharpness_a_leap_tells_where_a_digit_is_lost_when_every_token_is_read(monkeypatch):
    monkeypatch.setattr(sharpness, "LONGEST", 40_000)
    model, _ = train.load_model(PLAIN)
    model = sharpness.multiply(model, "both", 0.75)    # so that it loses digits early
    lost = sharpness.measure(model, [KEY], look=True).lost
    near = lost[lost < 20_000]
    assert len(near) > 0

    # The same text, read token by token up to just before and just behind the length.
    hay = encode(HAY).repeat(4)
    for length in near.tolist():
        i = lost.tolist().index(length)
        for factor, found in (0.93, True), (1.07, False):
            periods = round((factor * length - 4 * HAY_N) / 96)
            tokens = [encode(INTRO), encode(NEEDLE.format(KEY)), hay.repeat(periods + 1),
                      encode(QUESTION), encode(KEY)[:-1]]
            with torch.no_grad():
                logits, _ = model(torch.cat(tokens)[None])
            named = logits[0, i - 4].argmax() == encode(KEY)[i]
            assert named == found


def test_sharpness_finds_the_length_at_which_a_margin_falls_below_zero():
    margins = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 2.0], [-3.0, -1.0, 0.5]])
    crossed = sharpness.first_below_zero([1e2, 1e4, 1e6], margins.double()).tolist()
    assert crossed == pytest.approx([1e3, 1e2, math.inf])


def test_sharpness_rounded_gives_the_sigma_that_bfloat16_has():
    x = torch.linspace(-20, 20, 1001).double()
    ours = torch.nn.functional.elu(x.bfloat16()) + 1
    exact = torch.where(x > 0, 1 + x, x.exp())
    got = torch.exp(sharpness.rounded(x).clamp(max=0)) + sharpness.rounded(x).relu()
    torch.testing.assert_close(got, ours.double())
    assert (got[x < -6.25] == 0).all()
    assert (exact[x < -6.25] > 0).all()


def test_sharpness_the_scaled_checkpoint_has_three_times_w_q_and_w_k_in_the_last_layer(
        tmp_path):
    sharpness.save_scaled(PLAIN, tmp_path)
    path = tmp_path / "passkey-scaled-linear-seed0.pt"
    before = train.read_checkpoint(PLAIN)
    after = train.read_checkpoint(path)
    assert after["settings"] == {**before["settings"], "training": "scaled"}

    larger = {"blocks.1.attention.w_q.weight", "blocks.1.attention.w_k.weight"}
    for name, weight in before["model"].items():
        factor = 3 if name in larger else 1
        torch.testing.assert_close(after["model"][name], factor * weight)

    looked = passkey.look(path, passkey.Search([64], [0], n_keys=2))
    assert looked.name() == "scaled linear 0"


def test_sharpness_prints_a_row_per_model_and_change_and_draws_both_pictures(
        monkeypatch, command, tmp_path, figures):
    monkeypatch.setattr(sharpness, "FACTORS", [3])
    monkeypatch.setattr(sharpness, "LONGEST", 3000)
    code, out, _ = command(sharpness.main, "--load", PLAIN, "--keys", 1, "--threads", 1,
                           "--out", tmp_path)
    assert code == 0
    lines = out.splitlines()
    names = [line[:26].strip() for line in lines[1:7]]
    assert names == ["plain linear 0", "W_Q x 3", "W_K x 3", "both x 3",
                     "both, last layer x 3", "sigma in bfloat16 x 1"]

    with open(tmp_path / "sharpness.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    reach = [float(row["reach, worst"]) for row in rows]
    assert reach[4] > 1e4 * reach[0]
    assert lines[1].split()[5] == f"{reach[0]:,.0f}"
    changed = [row["changed"] for row in rows]
    assert changed == ["", "W_Q", "W_K", "both", sharpness.LAST, "sigma in bfloat16"]
    assert len(figures) == 2
    for name in "predict.png", "sharpness.png", "passkey-scaled-linear-seed0.pt":
        assert (tmp_path / name).exists()


def test_sharpness_refuses_a_model_without_a_memory(command, tmp_path):
    local = passkey.Run("local", "", 0, 1)
    model = InfiniTransformer(passkey.model_config(attention="local"))
    train.train(model, passkey.way_loss("short", 0, 1), path=local.path(tmp_path),
                **local.settings())
    code, _, err = command(sharpness.main, "--load", local.path(tmp_path))
    assert code == 2
    assert "no memory" in err
