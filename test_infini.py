"""The claims of the paper and of the README, each tested against something that shares no code with infini.py.

The oracle below is float64 NumPy, written from the equations as loops over single tokens: slow, plain, independent.
"""
import argparse
import ast
import copy
import csv
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nbclient import NotebookClient
from torch.utils.flop_counter import FlopCounterMode

import infini
import passkey
import train
from infini import (InfiniAttention, InfiniConfig, InfiniTransformer, Memory, State, generate, inject, inject_memory,
                    local_attention, retrieve, rotary, sigma, stream, update_delta, update_linear)

RULES = ["linear", "delta"]
torch.set_num_threads(1)    # everything here is too small to share
KINDS = ["infini-linear", "infini-delta", "local", "xl", "full"]
SMALL = InfiniConfig(vocab_size=17, d_model=12, n_layers=2, n_heads=3, d_key=4, d_value=6, d_ff=20, segment_len=5,
                     rope_base=10.0)


# --- The oracle ----------------------------------------------------------------------------------------------------

def o_sigma(x):
    return np.array([xi + 1 if xi > 0 else math.exp(xi) for xi in x])


def o_rotate(x, position, base):
    half = len(x) // 2
    y = np.zeros(len(x))
    for i in range(half):
        angle = position * base ** (-i / half)
        y[i] = x[i] * math.cos(angle) - x[half + i] * math.sin(angle)
        y[half + i] = x[half + i] * math.cos(angle) + x[i] * math.sin(angle)
    return y


def o_read(q, M, z):
    """Eq. 7 for one token; an empty memory answers 0."""
    weight = sum(o_sigma(q)[i] * z[i] for i in range(len(z)))
    return np.zeros(M.shape[1]) if weight == 0 else o_sigma(q) @ M / weight


def o_write(keys, values, M, z, rule):
    """Eqs. 8 and 9 for one segment, token by token; both rules read the memory as it was before the segment."""
    M_new, z_new = M.copy(), z.copy()
    for k, v in zip(keys, values):
        binding = v - o_read(k, M, z) if rule == "delta" else v
        for i in range(len(k)):
            M_new[i] += o_sigma(k)[i] * binding
            z_new[i] += o_sigma(k)[i]
    return M_new, z_new


def o_head(q, k, v, beta, c):
    """Eqs. 6-10 for one head of one document. q, k: (T, d_key), v: (T, d_value). Returns a: (T, d_value), M, z."""
    T, N = len(q), c.segment_len
    M, z = np.zeros((c.d_key, c.d_value)), np.zeros(c.d_key)
    a = np.zeros((T, c.d_value))
    for t in range(T):
        s = t // N
        if t % N == 0 and s > 0:
            M, z = o_write(k[t - N:t], v[t - N:t], M, z, c.update)
        first = {"infini": s * N, "local": s * N, "xl": max(0, s - 1) * N, "full": 0}[c.attention]
        last = t if c.causal else (T - 1 if c.attention == "full" else min(T, (s + 1) * N) - 1)
        scores = np.array([o_rotate(q[t], t, c.rope_base) @ o_rotate(k[j], j, c.rope_base) / math.sqrt(c.d_key)
                           for j in range(first, last + 1)])
        weights = np.exp(scores - scores.max())
        a[t] = sum(w / weights.sum() * v[j] for w, j in zip(weights, range(first, last + 1)))
        if c.attention == "infini":
            g = 1 / (1 + math.exp(-beta))
            a[t] = g * o_read(q[t], M, z) + (1 - g) * a[t]
    if T % N == 0:
        M, z = o_write(k[T - N:], v[T - N:], M, z, c.update)
    return a, M, z


def o_layer(x, w, c):
    """Eqs. 5-11 for one document. x: (T, d_model), w: the layer's weights by name. Returns o: (T, d_model), [(M, z)]."""
    q, k, v = x @ w["w_q.weight"].T, x @ w["w_k.weight"].T, x @ w["w_v.weight"].T
    heads, memories = [], []
    for h in range(c.n_heads):
        keys, values = slice(h * c.d_key, (h + 1) * c.d_key), slice(h * c.d_value, (h + 1) * c.d_value)
        a, M, z = o_head(q[:, keys], k[:, keys], v[:, values], w["beta"][h] if "beta" in w else 0.0, c)
        heads.append(a)
        memories.append((M, z))
    return np.concatenate(heads, 1) @ w["w_o.weight"].T, memories


def o_norm(x, gain):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + np.finfo(np.float64).eps) * gain


def o_model(model, tokens):
    """The whole InfiniTransformer for one document. tokens: (T,). Returns logits: (T, vocab_size)."""
    w, c = weights_of(model), model.config
    x = w["embedding.weight"][np.asarray(tokens)]
    for i in range(c.n_layers):
        block = {n.removeprefix(f"blocks.{i}."): p for n, p in w.items() if n.startswith(f"blocks.{i}.")}
        layer = {n.removeprefix("attention."): p for n, p in block.items() if n.startswith("attention.")}
        x = x + o_layer(o_norm(x, block["norm1.weight"]), layer, c)[0]
        y = o_norm(x, block["norm2.weight"]) @ block["up.weight"].T
        x = x + (y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))) @ block["down.weight"].T
    return o_norm(x, w["norm.weight"]) @ w["head.weight"].T


# --- Helpers -------------------------------------------------------------------------------------------------------

def weights_of(module):
    return {name: p.detach().double().numpy() for name, p in module.named_parameters()}


def make(kind="infini-delta", dtype=torch.float64, seed=0, **sizes):
    """A small model with random gates and gains, so that nothing cancels or is 1 by chance."""
    attention, _, update = kind.partition("-")
    torch.manual_seed(seed)
    model = InfiniTransformer(replace(SMALL, attention=attention, update=update or "delta", **sizes)).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.normal_() if name.endswith("beta") else p.uniform_(0.5, 1.5)
    return model


def layer_of(kind="infini-delta", **sizes):
    return make(kind, **sizes).blocks[0].attention


def tokens_of(B, T, seed=1):
    return torch.randint(0, SMALL.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def normal(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(a, b, tolerance=1e-10):
    a, b = (torch.as_tensor(t).detach() for t in (a, b))
    assert a.shape == b.shape and torch.isfinite(a).all()
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)


def gradients(model, tokens, state=None):
    logits, _ = model(tokens, state)
    (logits * normal(*logits.shape).to(logits)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def filled(B=2, H=3, d_key=4, d_value=6, seed=3):
    """A memory that holds something."""
    memory = Memory.empty(B, H, d_key, d_value, dtype=torch.float64)
    return update_linear(memory, normal(B, H, 7, d_key, seed=seed), normal(B, H, 7, d_value, seed=seed + 1))


# --- Eqs. 1-3: the background --------------------------------------------------------------------------------------

def test_eq1_rnn_carries_the_past_in_one_vector():
    x, h, w_x, w_h = normal(2, 3), normal(2, 4, seed=3), normal(3, 4), normal(4, 4)
    expected = [[math.tanh(sum(x[b, i] * w_x[i, j] for i in range(3)) + sum(h[b, i] * w_h[i, j] for i in range(4)))
                 for j in range(4)] for b in range(2)]
    same(infini.rnn(x, h, w_x, w_h), np.array(expected))


def test_eq2_a_gradient_step_of_a_linear_one_layer_mnm_is_the_delta_rule_without_sigma_and_normaliser():
    M, k, v = normal(4, 6), normal(3, 4), normal(3, 6, seed=5)
    same(infini.mnm_write([M], k, v)[0], M + k.T @ (v - k @ M))


def test_eq2_mnm_writes_what_it_can_read_back_through_a_nonlinear_network():
    theta = [0.3 * normal(4, 16), 0.3 * normal(16, 6, seed=4)]
    k, v = normal(3, 4), normal(3, 6, seed=5)
    error = [(infini.mnm_read(theta, k) - v).square().sum().item()]
    for _ in range(200):
        theta = infini.mnm_write(theta, k, v, lr=0.05)
        error.append((infini.mnm_read(theta, k) - v).square().sum().item())
    assert error[-1] < 1e-3 * error[0]


def test_eq2_mnm_reads_the_past_only_and_its_writing_can_be_learned():
    x, h, theta = normal(2, 3), normal(2, 4, seed=3), [normal(5, 4)]
    w_x, w_h, w_q, w_k, w_v = normal(3, 4), normal(4, 4), normal(4, 5), normal(4, 5, seed=8), normal(4, 4, seed=9)
    w_v.requires_grad_()
    h1, theta1 = infini.mnm(x, h, theta, w_x, w_h, w_q, w_k, w_v)
    controller = np.tanh(x.numpy() @ w_x.numpy() + h.numpy() @ w_h.numpy())
    same(h1, controller + controller @ w_q.numpy() @ theta[0].numpy())
    h2, _ = infini.mnm(x, h1, theta1, w_x, w_h, w_q, w_k, w_v)
    assert not h1.requires_grad and torch.autograd.grad(h2.sum(), w_v)[0].abs().max() > 0


def test_eq3_plain_attention_forgets_the_segment_before():
    x, w_q, w_k, w_v = normal(2, 5, 12), normal(12, 4), normal(12, 4, seed=3), normal(12, 6, seed=4)
    out = infini.attention(x, w_q, w_k, w_v)
    for b in range(2):
        q, k, v = (x[b] @ w for w in (w_q, w_k, w_v))
        for t in range(5):
            weights = np.exp([float(q[t] @ k[j]) / math.sqrt(4) for j in range(t + 1)])
            same(out[b, t], (weights / weights.sum()) @ v[:t + 1].numpy())


# --- Eqs. 5-11 against the oracle ----------------------------------------------------------------------------------

def test_eq5_heads_are_split_by_features_not_by_tokens():
    layer, x = layer_of(), normal(2, 7, 12)
    for y, name, d in zip(layer.project(x), ("w_q.weight", "w_k.weight", "w_v.weight"), (4, 4, 6)):
        w = weights_of(layer)[name]
        for b in range(2):
            for h in range(3):
                for t in range(7):
                    same(y[b, h, t], w[h * d:(h + 1) * d] @ x[b, t].numpy())


def test_eq6_local_attention_divides_by_the_root_of_d_key():
    q, k, v = normal(2, 3, 5, 4), normal(2, 3, 5, 4, seed=3), normal(2, 3, 5, 6, seed=4)
    for causal in (True, False):
        out = local_attention(q, k, v, causal)
        for b in range(2):
            for h in range(3):
                for t in range(5):
                    seen = t + 1 if causal else 5
                    weights = np.exp([float(q[b, h, t] @ k[b, h, j]) / math.sqrt(4) for j in range(seen)])
                    same(out[b, h, t], (weights / weights.sum()) @ v[b, h, :seen].numpy())


def test_rope_turns_pairs_so_that_only_the_distance_counts():
    q, k = normal(4), normal(4, seed=3)
    turned = rotary(q.expand(9, 4), torch.arange(9), 10.0)
    for t in range(9):
        same(turned[t], o_rotate(q.numpy(), t, 10.0))
    keys = rotary(k.expand(9, 4), torch.arange(9), 10.0)
    same(turned[5] @ keys[2], turned[8] @ keys[5])


def test_sigma_is_elu_plus_one_and_stays_exact_where_float32_elu_plus_one_is_lost():
    x = torch.linspace(-30, 30, 61)
    same(sigma(x), np.array([o_sigma([float(xi)])[0] for xi in x]), 1e-6)
    assert (F.elu(x[:13]) + 1 == 0).any() and (sigma(x) > 0).all()
    x = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    sigma(x).sum().backward()
    same(x.grad, np.array([math.exp(-2), 1.0, 1.0]), 1e-6)


def test_eq7_retrieval_against_the_oracle():
    memory, q = filled(), normal(2, 3, 5, 4)
    a_mem = retrieve(q, memory)
    for b in range(2):
        for h in range(3):
            for t in range(5):
                same(a_mem[b, h, t], o_read(q[b, h, t].numpy(), memory.M[b, h].numpy(), memory.z[b, h].numpy()))


@pytest.mark.parametrize("rule, update", [("linear", update_linear), ("delta", update_delta)])
def test_eq8_and_eq9_updates_against_the_oracle(rule, update):
    memory = Memory.empty(2, 3, 4, 6, dtype=torch.float64)
    M, z = np.zeros((2, 3, 4, 6)), np.zeros((2, 3, 4))
    for s in range(3):
        k, v = normal(2, 3, 5, 4, seed=10 + s), normal(2, 3, 5, 6, seed=20 + s)
        memory = update(memory, k, v)
        for b in range(2):
            for h in range(3):
                M[b, h], z[b, h] = o_write(k[b, h].numpy(), v[b, h].numpy(), M[b, h], z[b, h], rule)
        same(memory.M, M)
        same(memory.z, z)


def test_eq10_the_gate_weighs_the_memory_and_one_minus_the_gate_the_segment():
    beta, a_mem, a_dot = normal(3), normal(2, 3, 5, 6), normal(2, 3, 5, 6, seed=3)
    a = inject(beta, a_mem, a_dot)
    for h in range(3):
        g = 1 / (1 + math.exp(-beta[h]))
        same(a[:, h], g * a_mem[:, h] + (1 - g) * a_dot[:, h])


@pytest.mark.parametrize("T", [3, 5, 20, 23])
@pytest.mark.parametrize("kind", KINDS)
def test_eq4_and_eq11_the_whole_layer_over_many_segments_against_the_oracle(kind, T):
    layer, x = layer_of(kind), normal(2, T, 12)
    o, state = layer(x)
    for b in range(2):
        expected, memories = o_layer(x[b].numpy(), weights_of(layer), layer.config)
        same(o[b], expected)
        if state.memory is not None:
            for h, (M, z) in enumerate(memories):
                same(state.memory.M[b, h], M)
                same(state.memory.z[b, h], z)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_model_against_the_oracle(kind):
    model, tokens = make(kind), tokens_of(2, 18)
    logits, _ = model(tokens)
    for b in range(2):
        same(logits[b], o_model(model, tokens[b]))


def test_linear_memory_is_linear_attention_over_exactly_the_segments_before():
    layer, x = layer_of("infini-linear"), normal(2, 17, 12)
    with torch.no_grad():
        layer.beta.fill_(1e4)                                    # nothing but the memory
        layer.w_o = torch.nn.Identity()
    a_mem, _ = layer(x)
    q, k, v = (y.detach().numpy() for y in layer.project(x))
    for b in range(2):
        for t in range(17):
            past = range(t // 5 * 5)                             # all earlier segments, nothing of its own
            for h in range(3):
                w = [o_sigma(q[b, h, t]) @ o_sigma(k[b, h, j]) for j in past]
                expected = sum(wj * v[b, h, j] for wj, j in zip(w, past)) / sum(w) if w else np.zeros(6)
                same(a_mem[b, t, h * 6:(h + 1) * 6], expected)


# --- Contract 1: state is a value ----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_two_documents_in_a_batch_never_touch(kind):
    model, tokens = make(kind), tokens_of(3, 18)
    logits, _ = model(tokens)
    for b in range(3):
        same(model(tokens[b:b + 1])[0][0], logits[b])


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_leaves_no_trace(kind):
    model, tokens = make(kind), tokens_of(2, 18)
    first, state = model(tokens)
    kept = [t.clone() for t in tensors_in(state)]
    again, _ = model(tokens)
    model(tokens, state)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors_in(state)))
    assert not list(model.buffers())
    for _ in range(2):                                           # a second backward works too
        model(tokens)[0].sum().backward()


def tensors_in(state):
    return [t for s in state for t in (*(s.memory or ()), s.k, s.v)]


@pytest.mark.parametrize("rule", RULES)
def test_the_state_has_the_same_size_after_1_and_after_1000_segments(rule):
    model, tokens = make("infini-" + rule, torch.float32), tokens_of(1, 5004)
    for T, open_tokens in ((5, 0), (5000, 0), (4, 4), (5004, 4)):    # at most N - 1 = 4 tokens are open
        _, state = stream(model, tokens[:, :T], chunk_len=333)
        size = 2 * 3 * (4 * (6 + 1) + open_tokens * (4 + 6))
        assert sum(t.numel() for t in tensors_in(state)) == size
        assert sum(t.untyped_storage().nbytes() for t in tensors_in(state)) == 4 * size      # no view of something large


def test_xl_keeps_at_most_two_segments_and_full_keeps_all():
    for kind, most in (("local", 4), ("xl", 9), ("full", 53)):
        model, state, lengths = make(kind, torch.float32), None, []
        for t in range(53):
            _, state = stream(model, tokens_of(1, 1, seed=t), state)
            lengths.append(state[0].k.shape[2])
        assert max(lengths) == most and state[0].memory is None


# --- Contract 2: chunking does not matter --------------------------------------------------------------------------

def chunked(model, tokens, cuts):
    outputs, state = [], None
    for piece in tokens.split(cuts, 1):
        logits, state = model(piece, state)
        outputs.append(logits)
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_cutting_into_calls_gives_the_logits_of_one_call(kind, form):
    model, tokens = make(kind, form=form), tokens_of(2, 33)
    whole, state = model(tokens)
    draw = np.random.default_rng(0)
    ways = [[1] * 33, [5] * 6 + [3], [10, 10, 10, 3], [33], [4, 1, 5, 23], [1, 32]]
    for _ in range(6):
        ends = np.sort(draw.choice(np.arange(1, 33), draw.integers(1, 12), replace=False))
        ways.append(np.diff([0, *ends, 33]).tolist())
    for cuts in ways:
        logits, after = chunked(model, tokens, cuts)
        same(logits, whole)
        for a, b in zip(tensors_in(after), tensors_in(state)):
            same(a, b)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_flow_from_call_to_call_as_in_one_call(rule):
    model, tokens = make("infini-" + rule), tokens_of(2, 23)
    whole = gradients(model, tokens)
    model.zero_grad()
    logits, _ = chunked(model, tokens, [7, 1, 9, 6])
    (logits * normal(*logits.shape)).sum().backward()
    for name, p in model.named_parameters():
        same(p.grad, whole[name])


# --- Contract 3: two forms, one function ---------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("kind", KINDS)
def test_parallel_equals_recurrent_gradients_too(kind, dtype, tolerance):
    tokens = tokens_of(2, 33)
    results = []
    for form in ("parallel", "recurrent"):
        model = make(kind, dtype, form=form)
        _, state = model(tokens[:, :7])
        logits, after = model(tokens[:, 7:], state)              # begins and ends inside a segment
        results.append([logits, *tensors_in(after), *gradients(model, tokens).values()])
    for a, b in zip(*results):
        scale = max(1.0, b.abs().max().item())
        same(a / scale, b / scale, tolerance)


def test_parallel_really_is_another_computation():
    calls = []
    layer = layer_of(form="parallel")
    layer.segment = lambda *a: calls.append(a) or InfiniAttention.segment(layer, *a)
    layer(normal(1, 50, 12))
    assert calls == []


# --- Contract 4: causality -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_logit_depends_on_a_later_token_by_perturbation(kind, form):
    model, tokens = make(kind, form=form), tokens_of(1, 18)
    logits, _ = model(tokens)
    for t in range(18):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % SMALL.vocab_size
        other, _ = model(changed)
        assert torch.equal(other[0, :t], logits[0, :t])
        assert not torch.equal(other[0, t], logits[0, t])


@pytest.mark.parametrize("kind", KINDS)
def test_no_output_depends_on_a_later_input_by_gradient(kind):
    layer = layer_of(kind)
    seen = torch.autograd.functional.jacobian(lambda x: layer(x)[0].sum((0, 2)), normal(1, 18, 12)).abs().sum((1, 3))
    reach = {"local": 0, "xl": 1, "full": 18}.get(kind, 18)      # how many segments back an output may look
    for t in range(18):
        for j in range(18):
            assert (seen[t, j] > 0) == (j <= t and (t // 5 - j // 5 <= reach if kind != "xl" else t // 5 == j // 5))


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_sees_its_whole_segment_and_the_past_only(kind):
    layer, x = layer_of(kind, causal=False), normal(2, 18, 12)
    o, state = layer(x)
    for b in range(2):
        same(o[b], o_layer(x[b].numpy(), weights_of(layer), layer.config)[0])
    with pytest.raises(ValueError, match="causal=False"):
        layer(x, state)                                          # 3 tokens are open
    if kind != "full":
        _, state = layer(x[:, :10])
        same(layer(x[:, 10:], state)[0], o[:, 10:])              # a call that begins where a segment begins


# --- Contract 5: gradients through the memory ----------------------------------------------------------------------

@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@pytest.mark.parametrize("rule", RULES)
def test_gradcheck_through_three_segments(rule, form):
    layer = layer_of("infini-" + rule, form=form, segment_len=3, d_model=4, n_heads=2, d_key=2, d_value=3)
    x = normal(2, 10, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *p: layer(x)[0], (x, *layer.parameters()), atol=1e-6)


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@pytest.mark.parametrize("rule", RULES)
def test_the_last_segment_teaches_the_first_what_to_write(rule, form):
    layer, x = layer_of("infini-" + rule, form=form), normal(1, 20, 12).requires_grad_()
    layer(x)[0][:, 15:].sum().backward()
    assert (x.grad.abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_gradients_are_the_same_and_store_less(kind):
    tokens, found, stored = tokens_of(2, 103), [], []
    for checkpoint in (False, True):
        model = make(kind, checkpoint=checkpoint)
        _, state = model(tokens[:, :3])
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            logits, _ = model(tokens[:, 3:], state)
        (logits * normal(*logits.shape)).sum().backward()
        found.append([p.grad for p in model.parameters()])
        stored.append(sum(saved))
    for a, b in zip(*found):
        same(a, b)
    assert stored[1] < 0.5 * stored[0]


# --- Contract 6 and 7: finite numbers, an empty memory -------------------------------------------------------------

@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@pytest.mark.parametrize("rule", RULES)
def test_half_precision_leaves_the_memory_in_float32_and_finite(rule, form, autocast):
    model = make("infini-" + rule, torch.float32 if autocast else torch.bfloat16, form=form)
    reference = copy.deepcopy(model).double()
    tokens = tokens_of(2, 203)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, state = model(tokens)
    logits.float().sum().backward()
    expected = reference(tokens)[1]
    assert all(s.memory.M.dtype == s.memory.z.dtype == torch.float32 for s in state)
    same(state[0].memory.z / expected[0].memory.z, torch.ones(2, 3, 4), 0.02)
    assert torch.isfinite(logits).all() and all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_memory_counts_in_float32_under_autocast_where_bfloat16_stops_at_256():
    k, v = torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 6)       # sigma(0) = 1
    for update in (update_linear, update_delta):
        memory = Memory.empty(1, 1, 4, 6)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(501):
                memory = update(memory, k, v)
            q = torch.full((1, 1, 1, 4), 0.1)
            a_mem = retrieve(q, memory._replace(M=memory.M + 1 / 3))
        assert (memory.z == 1002).all()
        same(a_mem, retrieve(q, memory._replace(M=memory.M + 1 / 3)), 1e-7)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_from_another_precision_is_read_as_the_models_own(kind, autocast):
    model, tokens = make(kind, torch.float32), tokens_of(2, 18)
    half = model if autocast else copy.deepcopy(model).bfloat16()
    _, state = model(tokens)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, after = half(tokens, state)
        assert half(tokens, after)[0].dtype == logits.dtype == torch.bfloat16
    same(logits.float().softmax(-1), model(tokens, state)[0].softmax(-1), 0.15)


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@pytest.mark.parametrize("rule", RULES)
def test_the_first_segment_is_exactly_one_minus_the_gate_times_a_dot(rule, form):
    layer, x = layer_of("infini-" + rule, form=form, dtype=torch.float32), normal(2, 5, 12).float()
    layer.w_o = torch.nn.Identity()
    o, _ = layer(x)
    a_dot = layer.attend(*layer.project(x))
    expected = (1 - torch.sigmoid(layer.beta)).view(3, 1, 1) * a_dot
    assert torch.equal(o, expected.transpose(1, 2).flatten(2))
    o.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_reading_an_empty_memory_gives_exactly_zero_with_finite_gradients():
    for scale in (1, 1e3):                                       # e^-1000 is 0 in any precision: z stays empty there
        q = (scale * normal(2, 3, 5, 4).float()).requires_grad_()
        a_mem = retrieve(q, Memory.empty(2, 3, 4, 6))
        assert torch.equal(a_mem, torch.zeros(2, 3, 5, 6))
        a_mem.sum().backward()
        assert torch.isfinite(q.grad).all()
    q = torch.full((1, 1, 1, 4), -90.0, requires_grad=True)      # nothing in the memory answers
    retrieve(q, Memory(torch.ones(1, 1, 4, 6), torch.ones(1, 1, 4))).sum().backward()
    assert torch.isfinite(q.grad).all()


# --- Contract 8 and 9: positions, baselines ------------------------------------------------------------------------

def test_the_memory_knows_no_order_inside_a_segment():
    layer, x = layer_of("infini-linear"), normal(2, 15, 12)
    shuffled = torch.cat([s[:, torch.randperm(5, generator=torch.Generator().manual_seed(s0))]
                          for s0, s in enumerate(x.split(5, 1))], 1)
    a, b = layer(x)[1].memory, layer(shuffled)[1].memory
    same(a.M, b.M)
    same(a.z, b.z)
    assert (a.M - layer(x.flip(2))[1].memory.M).abs().max() > 0.1


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@pytest.mark.parametrize("rule", RULES)
def test_rope_changes_the_local_attention_and_not_the_memory(rule, form):
    x = normal(2, 23, 12)
    o, states = zip(*(layer_of("infini-" + rule, rope_base=base, form=form)(x) for base in (10.0, 1000.0)))
    assert torch.equal(states[0].memory.M, states[1].memory.M) and torch.equal(states[0].memory.z, states[1].memory.z)
    assert (o[0] - o[1]).abs().max() > 1e-3
    layers = [layer_of("infini-" + rule, rope_base=base, form=form) for base in (10.0, 1000.0)]
    for layer in layers:
        layer.beta.data.fill_(1e4)                               # what is read does not depend on positions either
    assert torch.equal(layers[0](x)[0], layers[1](x)[0])


def test_local_is_the_same_model_and_only_the_betas_are_missing():
    names = {kind: {n: p.shape for n, p in make(kind).named_parameters()} for kind in KINDS}
    extra = {"blocks.0.attention.beta", "blocks.1.attention.beta"}
    assert set(names["infini-delta"]) - set(names["local"]) == extra
    assert names["local"] == names["xl"] == names["full"]
    assert names["local"] == {n: s for n, s in names["infini-delta"].items() if n not in extra}


def test_a_gate_of_zero_is_the_local_model_and_a_gate_of_one_reads_the_memory_only():
    x = normal(2, 23, 12)
    layer, local = layer_of("infini-delta"), layer_of("local")
    layer.load_state_dict(local.state_dict(), strict=False)
    for beta in (-1e4, -math.inf):
        layer.beta.data.fill_(beta)
        assert torch.equal(layer(x)[0], local(x)[0])
    layer.beta.data.fill_(math.inf)
    o = layer(x)[0]
    assert torch.equal(o[:, :5], torch.zeros(2, 5, 12)) and (o[:, 5:].abs().amax(-1) > 0).all()
    layer.attend = lambda q, k, v: torch.full((*q.shape[:-1], 6), 7.0, dtype=q.dtype)
    assert torch.equal(layer(x)[0], o)


def test_xl_sees_one_segment_back_but_sends_no_gradient_there():
    layer, x = layer_of("xl"), normal(1, 15, 12).requires_grad_()
    y = x.detach().clone()
    y[0, 6] += 1
    changed = (layer(x)[0] - layer(y)[0])[0].abs().amax(-1) > 0
    assert changed.tolist() == [False] * 6 + [True] * 9
    y = x.detach().clone()
    y[0, 3] += 1
    assert ((layer(x)[0] - layer(y)[0])[0].abs().amax(-1) > 0).tolist() == [False] * 3 + [True] * 7 + [False] * 5
    layer(x)[0][:, 10:].sum().backward()
    assert (x.grad[0, :10] == 0).all()


# --- What the memory can and can't hold ----------------------------------------------------------------------------

def orthogonal_keys(n, sharp=800.0):
    """n keys with orthogonal sigma(k): 1 + sharp on one feature, e^-sharp, which is 0 even in float64, on the others."""
    return torch.where(torch.eye(n, dtype=torch.bool), sharp, -sharp).double()[None, None]


@pytest.mark.parametrize("update", [update_linear, update_delta])
def test_orthogonal_keys_are_recalled_exactly(update):
    k, v = orthogonal_keys(8), normal(1, 1, 8, 6)
    memory = Memory.empty(1, 1, 8, 6, dtype=torch.float64)
    for s in range(4):                                           # two bindings per segment
        memory = update(memory, k[:, :, 2 * s:2 * s + 2], v[:, :, 2 * s:2 * s + 2])
    same(retrieve(k, memory), v)


def test_a_key_that_all_but_misses_the_memory_still_reads_a_mean_of_it_and_delta_subtracts_that():
    """Silent spot: the quotient of Eq. 7 does not know how little the past agrees with a key, only what it says."""
    k, v = orthogonal_keys(8, sharp=60.0), normal(1, 1, 8, 6)    # sigma is e^-60 where it was 0
    first = update_delta(Memory.empty(1, 1, 8, 6, dtype=torch.float64), k[:, :, :2], v[:, :, :2])
    leak = retrieve(k[:, :, 2:3], first)
    same(leak, v[:, :, :2].mean(2, keepdim=True))
    same(retrieve(k[:, :, 2:3], update_delta(first, k[:, :, 2:3], v[:, :, 2:3])), v[:, :, 2:3] - leak)
    same(retrieve(k[:, :, 2:3], update_linear(first, k[:, :, 2:3], v[:, :, 2:3])), v[:, :, 2:3])


def test_delta_leaves_m_unmodified_if_the_memory_already_answers_and_linear_does_not():
    memory, k = filled(), normal(2, 3, 5, 4)
    v = retrieve(k, memory)
    same(update_delta(memory, k, v).M, memory.M)
    assert (update_linear(memory, k, v).M - memory.M).abs().max() > 0.1
    same(update_delta(memory, k, v).z, update_linear(memory, k, v).z)


def test_a_binding_written_again_is_kept_by_linear_but_fades_under_delta():
    """Silent spot: z grows with every writing and M does not, so the paper's claim about delta fails at the third."""
    k, v = orthogonal_keys(8)[:, :, :1], normal(1, 1, 1, 6)
    linear = delta = Memory.empty(1, 1, 8, 6, dtype=torch.float64)
    share = []
    for times in range(1, 5):
        linear, delta = update_linear(linear, k, v), update_delta(delta, k, v)
        same(retrieve(k, linear), v)
        share.append((retrieve(k, delta) / v).mean().item())
    same(np.array(share), np.array([1, 1 / 2, (1 + 1 / 2) / 3, (3 / 2 + 1 / 2) / 4]), 1e-9)


# --- Sizes: Table 1 and Table 2 ------------------------------------------------------------------------------------

def test_tables_1_and_2_memory_sizes_from_the_codes_own_state():
    paper = InfiniConfig(vocab_size=256, d_model=1024, n_layers=12, n_heads=8, d_key=128, d_value=128, d_ff=4096,
                         segment_len=2048)
    sizes = {}
    for attention in ("infini", "xl"):
        with torch.device("meta"):
            model = InfiniTransformer(replace(paper, attention=attention))
            _, state = model(torch.zeros(1, 2 * 2048, dtype=torch.long))
        sizes[attention] = sum(t.numel() for t in tensors_in(state))
    assert sizes["infini"] == 128 * (128 + 1) * 8 * 12 == 1_585_152
    assert sizes["xl"] == (128 + 128) * 8 * 2048 * 12 == 50_331_648


# --- Plug and play -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rule", RULES)
def test_an_injected_memory_behind_closed_gates_changes_nothing(rule):
    local, tokens = make("local"), tokens_of(2, 23)
    model = inject_memory(local, update=rule, gate_init=-1e4)
    assert torch.equal(model(tokens)[0], local(tokens)[0])
    count = [sum(p.numel() for p in m.parameters()) for m in (local, model)]
    assert count[1] - count[0] == SMALL.n_layers * SMALL.n_heads
    assert model.config == replace(local.config, attention="infini", update=rule, gate_init=-1e4)
    opened = inject_memory(local, update=rule, gate_init=1.0)
    same(opened.gates(), np.full((2, 3), 1 / (1 + math.exp(-1))))
    same(opened(tokens)[0][0], o_model(opened, tokens[0]))
    before = local(tokens)[0]
    opened.embedding.weight.data.zero_()                         # a copy: the old model keeps its own weights
    assert torch.equal(local(tokens)[0], before)


def test_betas_start_at_gate_init_or_evenly_spaced_around_it():
    for n_heads, gate_init, spread, expected in ((4, -1.5, 6.0, [-4.5, -2.5, -0.5, 1.5]), (3, 0.5, 2.0, [-0.5, 0.5, 1.5]),
                                                    (1, -2.0, 9.0, [-2.0]), (2, 3.0, 0.0, [3.0, 3.0])):
        model = InfiniTransformer(replace(SMALL, n_heads=n_heads, gate_init=gate_init, gate_spread=spread))
        assert all(block.attention.beta.tolist() == pytest.approx(expected, abs=1e-6) for block in model.blocks)
    plugged = inject_memory(InfiniTransformer(replace(SMALL, attention="local", gate_spread=1.0)), gate_init=-3.0)
    assert all(block.attention.beta.tolist() == [-3.0] * SMALL.n_heads for block in plugged.blocks)


def test_gates_are_parameters_per_head_that_are_saved_and_trained():
    model = make("infini-delta")
    expected = torch.stack([1 / (1 + torch.exp(-model.state_dict()[f"blocks.{i}.attention.beta"])) for i in range(2)])
    assert model.gates().shape == (2, 3)
    same(model.gates(), expected)
    found = gradients(model, tokens_of(2, 23))
    assert all((found[f"blocks.{i}.attention.beta"] != 0).all() for i in range(2))
    fresh = InfiniTransformer(SMALL).gates()
    assert torch.equal(fresh, torch.full((2, 3), 0.5))           # neither shut nor saturated at the start


# --- Generation ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_equals_rerunning_the_whole_prefix(kind):
    model, text = make(kind), tokens_of(3, 13)
    out = generate(model, text, 9, temperature=0)
    for _ in range(9):
        text = torch.cat([text, model(text)[0][:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, text)
    assert torch.equal(generate(model, tokens_of(3, 13), 9, temperature=0), out)
    assert torch.equal(generate(model, tokens_of(3, 13), 0), tokens_of(3, 13))


def test_generation_reads_a_prompt_of_any_length_in_chunks():
    model, text = make(), tokens_of(2, 123)
    logits, state = stream(model, text, chunk_len=11)
    same(logits, model(text)[0][:, -1])
    seen = []
    out = generate(model, text[:, 100:], 5, temperature=0, state=stream(model, text[:, :100])[1], on_token=seen.append)
    assert torch.equal(out[:, 23:], generate(model, text, 5, temperature=0)[:, 123:])
    assert torch.equal(torch.stack(seen, 1), out[:, 23:])


def test_samples_follow_temperature_and_top_p_and_repeat_with_the_generators_seed():
    model, prompt = make(), tokens_of(1, 8).expand(4000, 8)
    def draw(seed=0, **kw):
        return generate(model, prompt, 1, generator=torch.Generator().manual_seed(seed), **kw)[:, -1]
    assert torch.equal(draw(), draw()) and not torch.equal(draw(), draw(1))
    logits = model(prompt[:1])[0][0, -1].detach().numpy()
    for temperature in (0.5, 1.0, 2.0):
        p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        frequency = np.bincount(draw(temperature=temperature), minlength=17) / 4000
        assert np.abs(frequency - p).max() < 0.04                # five standard deviations of 4,000 draws
        for top_p in (0.3, 0.7):
            order = np.argsort(-p)
            nucleus = order[:np.searchsorted(np.cumsum(p[order]), top_p) + 1]
            assert set(draw(temperature=temperature, top_p=top_p).tolist()) <= set(nucleus.tolist())
            q = np.where(np.isin(np.arange(17), nucleus), p, 0) / p[nucleus].sum()
            frequency = np.bincount(draw(temperature=temperature, top_p=top_p), minlength=17) / 4000
            assert np.abs(frequency - q).max() < 0.04


# --- Contract 10: devices, compile, files --------------------------------------------------------------------------

def test_a_state_dict_loads_with_weights_only():
    model, file = make(), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = make(seed=9)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(tokens_of(1, 13))[0], model(tokens_of(1, 13))[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute")          # torch.compile looks at it, we don't
@pytest.mark.parametrize("rule", RULES)
def test_a_compiled_model_gives_the_same_logits(rule):
    model, tokens = make("infini-" + rule, n_layers=1), tokens_of(2, 13)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)    # needs no C++ compiler
    logits, state = compiled(tokens)
    same(logits, model(tokens)[0])
    same(compiled(tokens, state)[0], model(tokens, state)[0])


# --- Contract 11: bad input ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("field, value", [
    ("segment_len", 0), ("segment_len", 2.5), ("d_key", 3), ("d_key", 0), ("n_heads", -1), ("n_layers", True),
    ("d_model", "64"), ("vocab_size", None), ("update", "hebb"), ("attention", "flash"), ("form", ["parallel"]),
    ("causal", 1), ("checkpoint", "no"), ("rope_base", 0), ("rope_base", math.inf), ("gate_init", math.nan),
    ("gate_spread", math.inf)])
def test_a_config_that_makes_no_sense_is_refused_by_the_name_of_its_field(field, value):
    with pytest.raises(ValueError, match=rf"^{field} was .*must be") as error:
        replace(SMALL, **{field: value})
    assert "\n" not in str(error.value) and repr(value) in str(error.value)


def test_bad_tokens_states_and_settings_are_refused_with_one_line():
    model, tokens = make(), tokens_of(2, 13)
    _, state = model(tokens)
    cases = [
        (lambda: model(tokens + SMALL.vocab_size), "tokens"), (lambda: model(tokens - SMALL.vocab_size), "tokens"),
        (lambda: model(tokens.float()), "float32"), (lambda: model(tokens[0]), r"\(13,\)"),
        (lambda: model(tokens[:, :0]), r"\(2, 0\)"), (lambda: model(tokens.tolist()), "list"),
        (lambda: model(tokens.to("meta")), "device"), (lambda: model(tokens > 3), "bool"),
        (lambda: model(tokens[:1], state), "state"), (lambda: model(tokens, state[:1]), "2 States"),
        (lambda: model(tokens, 3), "int"), (lambda: make("local")(tokens, state), "memory"),
        (lambda: make(d_value=8)(tokens, state), "state.v"), (lambda: make(d_key=6)(tokens, state), "state.k"),
        (lambda: make(segment_len=3)(tokens, state), "segment_len"), (lambda: make(n_heads=2)(tokens, state), "state.k"),
        (lambda: make(dtype=torch.float32)(tokens, state), "float64"), (lambda: model(tokens, [None, state[1]]), "state"),
        (lambda: model(tokens, [State(s.memory, s.k.to("meta"), s.v) for s in state]), "device"),
        (lambda: model.blocks[0].attention(normal(2, 13)), r"\(2, 13\)"),
        (lambda: model.blocks[0].attention(normal(2, 13, 7)), r"\(2, 13, 7\)"),
        (lambda: make("local").gates(), "attention"), (lambda: inject_memory(model), "attention"),
        (lambda: inject_memory(make("local"), update="hebb"), "update"),
        (lambda: generate(model, tokens, -1), "max_new_tokens"), (lambda: generate(model, tokens, 2.0), "max_new_tokens"),
        (lambda: generate(model, tokens, 3, temperature=-1), "temperature"),
        (lambda: generate(model, tokens, 3, temperature=math.nan), "temperature"),
        (lambda: generate(model, tokens, 3, top_p=0), "top_p"), (lambda: generate(model, tokens, 3, top_p=1.5), "top_p"),
        (lambda: generate(model, tokens[:, :0], 3), r"\(2, 0\)"), (lambda: generate(model, tokens[0], 3), r"\(13,\)"),
        (lambda: generate(model, tokens.tolist(), 3), "list"), (lambda: stream(model, tokens, chunk_len=0), "chunk_len"),
        (lambda: generate(make(causal=False), tokens, 3), "causal"),
    ]
    for i, (call, match) in enumerate(cases):
        with pytest.raises(ValueError, match=match) as error:
            call()
            pytest.fail(f"case {i}, {match}, was not refused")
        assert re.fullmatch(r".+ was .+, must be .+", str(error.value)), i


# --- train.py: the loop that everything is trained with ------------------------------------------------------------

def toy_loss(model, step):
    tokens = torch.randint(0, SMALL.vocab_size, (2, 13), generator=torch.Generator().manual_seed(step))
    logits, _ = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), tokens.numel(), {}


def test_a_loss_that_is_not_finite_stops_the_training_and_spares_the_checkpoint(tmp_path):
    def infinite_at_step_5(model, step):
        loss, n_tokens, shown = toy_loss(model, step)
        return loss * (math.inf if step == 5 else 1), n_tokens, shown
    with pytest.raises(ValueError, match="loss was inf, its gradient .* at step 6"):
        train_toy(tmp_path / "a.pt", loss_of=infinite_at_step_5)
    content = train.read_checkpoint(tmp_path / "a.pt")
    assert len(content["losses"]) == 4 and all(torch.isfinite(p).all() for p in content["model"].values())


def train_toy(path, steps=7, loss_of=toy_loss, **kw):
    model = make(dtype=torch.float32)
    kw = dict(dict(lr=1e-2, gate_lr=1e-1, weight_decay=0.1, warmup=2, save_every=2, settings=dict(seed=0)), **kw)
    return model, train.train(model, loss_of, steps, path, **kw)


def test_gates_have_a_rate_of_their_own_and_no_weight_decay(tmp_path):
    start = dict(make(dtype=torch.float32).named_parameters())
    moved = {}
    for name, rates in (("gates", dict(lr=0.0, gate_lr=0.1)), ("rest", dict(lr=0.1, gate_lr=0.0))):
        model, _ = train_toy(tmp_path / name, **rates)
        moved[name] = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert moved["gates"] == {n for n in start if n.endswith("beta")} and moved["rest"] == set(start) - moved["gates"]
    groups = train.make_optimizer(model, 0.1, 0.2, 0.3).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {n: decay[id(p)] for n, p in model.named_parameters()} == {n: 0.3 * (p.dim() > 1) for n, p in start.items()}


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    rates = [train.schedule(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] and rates[9] > 0.97
    assert rates[50] == pytest.approx(0.55) and rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_a_training_that_is_interrupted_and_resumed_equals_one_that_is_not_bit_for_bit(tmp_path):
    whole, losses = train_toy(tmp_path / "whole.pt")

    def ctrl_c_at_step_4(model, step):
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return toy_loss(model, step)
    with pytest.raises(KeyboardInterrupt, match="after step 5 of 7"):
        train_toy(tmp_path / "cut.pt", loss_of=ctrl_c_at_step_4)
    assert len(train.read_checkpoint(tmp_path / "cut.pt")["losses"]) == 5
    model, resumed = train_toy(tmp_path / "cut.pt", resume=True)
    assert resumed == losses and len(losses) == 7
    again, _ = train_toy(tmp_path / "cut.pt", resume=True, loss_of=None)      # it is done: no loss is asked for
    loaded, settings = train.load_model(tmp_path / "cut.pt")
    for other in (model, again, loaded):
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), other.parameters()))
    assert loaded.config == whole.config and settings["seed"] == 0 and settings["lr"] == 1e-2


def test_no_step_is_taken_with_a_gradient_longer_than_1(tmp_path, monkeypatch):
    lengths, step = [], torch.optim.AdamW.step

    def listen(optimizer, *args, **kw):
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        lengths.append(torch.cat(gradients).norm().item())
        return step(optimizer, *args, **kw)
    monkeypatch.setattr(torch.optim.AdamW, "step", listen)
    train_toy(tmp_path / "a.pt", steps=3, loss_of=lambda *at: (toy_loss(*at)[0] * 100, *toy_loss(*at)[1:]))
    assert lengths == pytest.approx([1, 1, 1], rel=1e-3)


def test_a_killed_training_loses_only_the_steps_since_the_last_save(tmp_path):
    def killed_at_step_5(model, step):
        if step == 5:
            raise SystemError("killed")
        return toy_loss(model, step)
    with pytest.raises(SystemError):
        train_toy(tmp_path / "cut.pt", loss_of=killed_at_step_5)
    assert len(train.read_checkpoint(tmp_path / "cut.pt")["losses"]) == 4
    assert train_toy(tmp_path / "cut.pt", resume=True)[1] == train_toy(tmp_path / "whole.pt")[1]


def test_a_failed_write_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    train_toy(tmp_path / "a.pt", steps=2)
    before = (tmp_path / "a.pt").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        train_toy(tmp_path / "a.pt", steps=3)
    assert (tmp_path / "a.pt").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_checkpoint_of_another_training_is_not_resumed_and_a_broken_one_not_loaded(tmp_path):
    train_toy(tmp_path / "a.pt", steps=2)
    with pytest.raises(ValueError, match="seed = 0"):
        train_toy(tmp_path / "a.pt", resume=True, settings=dict(seed=1))
    whole = (tmp_path / "a.pt").read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"text"):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(ValueError, match="was no checkpoint"):
            train.load_model(tmp_path / "a.pt")
    with pytest.raises(OSError):
        train.load_model(tmp_path / "missing.pt")


# --- train.py: the language model ----------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    """A folder of 20 documents of 100 to 3,900 bytes, no two of which share a byte."""
    (tmp_path / "text" / "deep").mkdir(parents=True)
    for i in range(20):
        (tmp_path / "text" / ("deep" if i % 2 else ".") / f"{i}.txt").write_bytes(bytes([i + 40]) * (100 + 200 * i))
    return tmp_path / "text"


def test_the_standard_library_is_the_default_corpus_without_its_tests_and_split_by_file():
    training, validation = train.read_documents()
    documents = [bytes(document.tolist()) for document in training + validation if len(document)]
    root = Path(train.__file__).parent                           # of this project, whose files are not in it
    assert len(training) > 300 and 0.08 < len(validation) / len(training) < 0.12 and sum(map(len, documents)) > 5e6
    assert Path(random.__file__).read_bytes() in documents and Path(train.__file__).read_bytes() not in documents
    assert not any(b"class RegressionTests(unittest.TestCase)" in document for document in documents)
    assert [len(d) for d in train.read_documents()[1]] == [len(d) for d in validation]


def test_every_sequence_is_cut_from_a_single_document_and_any_place_can_be_drawn(folder):
    training, validation = train.read_documents(folder)
    assert len(training) == 18 and len(validation) == 2
    assert not {d[0].item() for d in training} & {d[0].item() for d in validation}
    rows = train.draw_sequences(training, 300, 1000, random.Random(0))
    assert rows.shape == (300, 1000) and (rows == rows[:, :1]).all()
    counts = {i: int((rows[:, 0] == i + 40).sum()) for i in range(20)}
    assert not any(counts[i] for i in range(4)) and counts[max(d[0].item() - 40 for d in training)] > 20
    with pytest.raises(ValueError, match="--data was without a document of 4,000 bytes .the longest: 3,"):
        train.draw_sequences(training, 1, 4000, random.Random(0))
    counting = [torch.arange(250, dtype=torch.uint8)]
    firsts = {int(row[0]) for row in train.draw_sequences(counting, 2000, 200, random.Random(0))}
    assert firsts == set(range(51))


def test_validation_pieces_do_not_overlap_and_come_from_all_documents():
    documents = [torch.arange(i, i + 70, dtype=torch.uint8) for i in (0, 70, 140)]
    pieces = train.windows(documents, 20, 9)
    assert len(pieces) == 9 and len(torch.unique(pieces)) == 180
    assert {int(piece[0]) // 70 for piece in train.windows(documents, 20, 5)} == {0, 1, 2}


def test_a_single_file_is_cut_into_nine_tenths_and_one_tenth(tmp_path):
    (tmp_path / "book.txt").write_bytes(bytes(range(32, 132)) * 10)
    (training,), (validation,) = train.read_documents(tmp_path / "book.txt")
    assert len(training) == 900 and bytes(validation.tolist()) == bytes(range(32, 132))


@pytest.mark.parametrize("content, match", [(None, "without any text"), (b"", "without any text"),
                                            (b"ab\0cd" * 500, "binary"), (b"too short", "too short")])
def test_text_that_is_none_is_refused_in_one_line(content, match, tmp_path, monkeypatch, capsys):
    if content is not None:
        (tmp_path / "text").mkdir()
        (tmp_path / "text" / "a.txt").write_bytes(content)
        (tmp_path / "text" / "b.txt").write_bytes(content)
    code, _, err = command(monkeypatch, capsys, "--data", tmp_path / "text", "--out", tmp_path, "--steps", 1, script=train)
    assert code == 2 and re.search(match, err) and len(err.strip().splitlines()) == 1 and "--data" in err


@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_of_the_probabilities_and_forgetting_is_reading_each_segment_alone(kind):
    model, tokens = make(kind), torch.randint(0, SMALL.vocab_size, (3, 4 * SMALL.segment_len + 1))
    expected = -model(tokens[:, :-1])[0].softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0].log2()
    same(train.bits(model, tokens, at_once=1), expected, 1e-6)
    if kind == "full":
        return
    alone = [model(piece)[0] for piece in tokens[:, :-1].split(SMALL.segment_len, 1)]
    expected = -torch.cat(alone, 1).softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0].log2()
    same(train.bits(model, tokens, forget=True), expected, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_table_1_is_the_memory_that_a_state_holds(kind):
    model = make(kind)
    for segments in (2, 5):
        tokens = torch.randint(0, SMALL.vocab_size, (1, segments * SMALL.segment_len))
        assert train.numbers_in(model(tokens)[1]) == train.context_memory(model.config, tokens.shape[1])


def test_the_papers_own_sizes_fit_together_on_the_meta_device():
    sizes = dict(d_model=1024, n_layers=12, n_heads=8, d_key=128, d_value=128, d_ff=4096, segment_len=2048)
    with torch.device("meta"):
        knows_meta = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)     # torch's checkpointing does
        model = InfiniTransformer(InfiniConfig(**sizes, checkpoint=knows_meta))
        logits, state = model(torch.zeros(2, 32768, dtype=torch.long))
        logits.sum().backward()
    assert logits.shape == (2, 32768, 256) and all(p.grad.shape == p.shape for p in model.parameters())
    assert train.numbers_in(state) == 2 * 1_585_152 == 2 * train.context_memory(model.config, 32768)
    for attention, numbers in (("xl", 50_331_648), ("full", 16 * 50_331_648), ("local", 0)):
        assert train.context_memory(replace(model.config, attention=attention), 32768) == numbers


LM = ["--steps", 2, "--batch", 2, "--segments", 4, "--segment-len", 8, "--d-model", 16, "--n-layers", 2, "--n-heads", 2,
      "--d-key", 4, "--d-value", 6, "--d-ff", 16, "--windows", 3]


def test_the_language_model_is_trained_resumed_and_sampled_from(folder, tmp_path, monkeypatch, capsys):
    where = ["--data", folder, "--out", tmp_path]
    code, out, err = command(monkeypatch, capsys, *LM, *where, script=train)
    assert code == 0 and "2/2 steps" in err and re.search(r"\d\.\d{4} bits per byte on 3 held-out pieces of 32 bytes", out)
    first = (tmp_path / "lm-delta-seed0.pt").read_bytes()
    code, again, err = command(monkeypatch, capsys, *LM, *where, "--resume", script=train)
    assert code == 0 and again == out and "steps" not in err and (tmp_path / "lm-delta-seed0.pt").read_bytes() == first
    load = ["sample", "--load", tmp_path / "lm-delta-seed0.pt", "--prompt", "(x) é ", "--bytes", 40]
    texts = [command(monkeypatch, capsys, *load, "--seed", seed, script=train)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("(x) é ") and len(texts[0]) > 30


def test_compare_prints_a_row_for_every_kind_and_writes_its_files(folder, tmp_path, monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, "compare", *LM, "--seeds", 2, "--data", folder, "--out", tmp_path, script=train)
    table = {line.split()[0]: line for line in out.splitlines()[-5:]}
    assert code == 0 and list(table) == ["local", "xl", "linear", "delta", "full"]
    assert table["linear"].split()[-2:] == ["112"] * 2 and table["xl"].split()[-1] == "320"     # 4 * 7 * 2 * 2; 10 * 2 * 8 * 2
    rows = (tmp_path / "compare.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * (4 * 16 + 4)                     # segments: four times the training length, but for "full"
    mean = np.mean([float(row.split(",")[3]) for row in rows if row.startswith("delta") and int(row.split(",")[2]) <= 4])
    assert float(table["delta"].split()[7]) == pytest.approx(2 ** mean, rel=1e-3)      # per-byte perplexity
    bits = {kind: float(line.split()[1]) for kind, line in table.items()}
    assert all(float(line.split()[4]) == pytest.approx(bits["local"] - bits[kind], abs=2e-4) for kind, line in table.items())
    forgetful = []
    for seed in (0, 1):
        model, pieces = train.load_model(tmp_path / f"lm-delta-seed{seed}.pt")[0], train.windows(train.read_documents(folder)[1], 129, 3)
        costs = [-model(piece[:, :-1])[0].log_softmax(-1).gather(-1, piece[:, 1:, None]).mean()      # of 8 bytes alone
                 for piece in (pieces[:, i:i + 9] for i in range(0, 32, 8))]
        forgetful.append(torch.stack(costs).mean().item() / math.log(2))
    assert float(table["delta"].split()[8]) == pytest.approx(np.mean(forgetful), abs=2e-4)
    assert table["delta"].split()[1] == f"{mean:.4f}" and (tmp_path / "context.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("what", ["gates", "lengths", "plug"])
def test_the_other_experiments_run(what, folder, tmp_path, monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, what, *LM, "--lengths", "1,4", "--plug-gate", -30, "--lr", 1e-9, "--gate-lr", 2e-9,
                           "--seeds", 2, "--data", folder, "--out", tmp_path, script=train)
    assert code == 0 and (tmp_path / f"{what}.png").read_bytes().startswith(b"\x89PNG")
    if what == "plug":                                           # a closed gate: it begins exactly where "local" ended
        starts = [line.split()[1:4] for line in out.splitlines()[-3:]]
        assert starts[0] == starts[1] == starts[2] and re.fullmatch(r"\d\.\d{4}", starts[0][0])
        assert len((tmp_path / "plug.csv").read_text().splitlines()) == 1 + 3
    if what == "gates":
        assert out.count("0.017  0.741") == 2 * 2                # sigmoid(-1.5 -+ 5.1 / 2) of two heads, in each layer
        for rate in ("2e-09", "1e-09"):
            assert train.load_model(tmp_path / f"lm-delta-gates-{rate}-seed0.pt")[1]["gate_lr"] == float(rate)
    if what == "lengths":
        costs = {}
        for cut in (1, 4):
            models = [train.load_model(tmp_path / f"lm-delta-{cut}-segments-seed{seed}.pt")[0] for seed in (0, 1)]
            pieces = train.windows(train.read_documents(folder)[1], 33, 3)
            costs[cut] = torch.stack([train.bits(model, pieces).mean() for model in models])
            assert f"trained in {cut} segments: bits per byte in 4 {costs[cut].mean():.4f} +- {costs[cut].std():.4f}" in out
        assert len((tmp_path / "lengths.csv").read_text().splitlines()) == 1 + 2 * 3


def test_whatever_the_length_of_its_sequences_a_model_is_trained_on_the_same_bytes(folder):
    documents, calls = train.read_documents(folder)[0], []

    def model(tokens):
        calls.append(tokens)
        return torch.zeros(*tokens.shape, 256, requires_grad=True), None
    for cut in (10, 20, 40):
        loss, n_tokens, _ = train.lm_loss(documents, 0, 3, 40, cut, "cpu")(model, 5)
        assert n_tokens == 120 and calls[-1].shape == (120 // cut, cut) and torch.equal(calls[-1].view(3, 40), calls[0].view(3, 40))
        assert loss.item() == pytest.approx(math.log(256))


def test_targets_are_the_bytes_that_come_next_also_across_a_cut():
    document = torch.arange(200, dtype=torch.uint8)

    def successor(tokens):                                       # a model that knows what comes next
        return 100 * F.one_hot(tokens + 1, 256).float().requires_grad_(), None
    assert train.lm_loss([document], 0, 4, 60, 15, "cpu")(successor, 0)[0].item() < 1e-6


def test_a_curve_by_position_is_the_mean_of_ever_longer_pieces_and_loses_none():
    ends, means = train.by_position(torch.arange(11.0))
    assert ends == [1, 2, 4, 8, 11] and means == [0, 1, 2.5, 5.5, 9]


# --- passkey.py: the paper's task ----------------------------------------------------------------------------------

def test_the_prompt_is_the_papers_word_for_word():
    text = ("There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
            "about the important information there. " + 2 * "The grass is green. The sky is blue. The sun is yellow. "
            "Here we go. There and back again. " + "The pass key is 9054. Remember it. 9054 is the pass key. "
            + 3 * "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
            + "What is the pass key? The pass key is 9054")
    tokens = passkey.write_input(passkey.one_key("9054"), passkey.write_hay("paper", 5, None), 2)
    assert re.sub(r"(?<=\d) (?=\d)", "", passkey.decode(tokens)) == text
    assert torch.equal(passkey.encode(text), tokens)
    with pytest.raises(ValueError, match="'purple'"):
        passkey.encode("The sky is purple.")


class Listener(torch.nn.Module):
    """Stands in for a model, and keeps what a training shows it: the whole inputs, calls put together."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(1, 1)
        self.calls = []

    def forward(self, tokens, state=None):
        self.calls.append(tokens)
        memory = Memory.empty(len(tokens), 1, 2, 2)
        empty = torch.zeros(len(tokens), 1, 0, 2)
        return torch.zeros(*tokens.shape, len(passkey.VOCABULARY), requires_grad=True), [State(memory, empty, empty)]


def shown(loss_of, steps):
    """The inputs of some steps, without the last digit, which is a target only."""
    inputs = []
    for step in steps:
        listener = Listener()
        loss_of(listener, step)
        inputs.append(listener.calls)
    return inputs


def digits_in(row):
    return "".join(passkey.VOCABULARY[token] for token in row.tolist() if passkey.VOCABULARY[token].isdigit())


TRAININGS = {training: lambda seed=0, digits=4, training=training: passkey.loss_function(training, seed, digits, 60)
             for training in ("zero-shot", "plain", "fast-forward")}


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("digits", [3, 4])
def test_no_key_of_the_evaluation_is_ever_trained_on(training, digits):
    trained = set()
    for calls in shown(TRAININGS[training](digits=digits), range(60)):
        for row in (row for call in calls for row in call):
            trained |= set(re.findall(r"\d+(?=[ .])", re.sub(r"(?<=\d) (?=\d)", "", passkey.decode(row))))
    trained = {key for key in trained if len(key) == digits}
    asked = {key for seed in range(5) for key in passkey.draw_keys(random.Random(seed), 100, digits, held_out=True)}
    assert len(trained) > 100 and len(asked) > 50 and not {key for key in trained if key in asked}
    assert all(passkey.is_held_out(key) for key in asked)


@pytest.mark.parametrize("training", [*TRAININGS, "named"])
def test_keys_and_depths_differ_from_step_to_step_and_from_seed_to_seed_and_repeat_with_them(training):
    def keys(seed, step):
        calls, = shown(passkey.loss_function(training, seed, 4, 60), [step])
        return [digits_in(row)[:4] for call in calls for row in call if len(digits_in(row)) >= 8]
    assert keys(0, 41) == keys(0, 41) and len(set(keys(0, 40))) > 2              # inputs have grown by then
    assert not set(keys(0, 41)) & set(keys(0, 43)) and not set(keys(0, 41)) & set(keys(1, 41))


def test_the_needle_is_anywhere_a_quarter_of_them_at_the_end_and_the_input_as_long_as_asked_for():
    places, lengths, digits = [], [], {passkey.TOKEN[digit] for digit in "0123456789"}
    def loss_of(model, step):
        return passkey.plain_loss(model, random.Random(f"0/{step}"), 4, 1024, 1024, step / 299)
    for (tokens,) in shown(loss_of, range(300)):
        lengths.append(tokens.shape[1] + 1)
        empty = passkey.write_input(passkey.one_key("0" * ((len(digits_in(tokens[0])) + 1) // 3)), passkey.encode(""), 0)
        for row in tokens.tolist():
            first = min(i for i, token in enumerate(row) if token in digits)
            if lengths[-1] > 200:
                places.append((first - empty.tolist().index(passkey.TOKEN["0"])) / (lengths[-1] - len(empty)))
    assert max(lengths[:60]) < 170 and 800 < max(lengths) < 1024 + 24
    counts = [np.mean((np.array(places) * 4).astype(int) == quarter) for quarter in range(3)]
    assert all(0.1 < share < 0.28 for share in counts) and 0.2 < np.mean(np.array(places) == 1) < 0.4
    for n_tokens in (256, 1024, 5000):
        task = passkey.one_key("1234")
        total = passkey.paragraphs(n_tokens, task)
        assert n_tokens <= len(passkey.write_input(task, passkey.write_hay("paper", total, None), 0)) < n_tokens + 24
    assert passkey.TRAININGS["plain"][1] + 24 <= 5120            # the paper's 5K


def test_only_the_digits_of_the_answer_count_and_each_is_told_the_right_ones_before_it():
    logits = torch.randn(2, 70, len(passkey.VOCABULARY), requires_grad=True)
    loss, numbers = passkey.answer_loss(logits, [passkey.one_key(key) for key in ("9054", "1177")])
    p = logits.detach().double().softmax(-1)
    expected = [-math.log(p[row, 66 + i, passkey.TOKEN[key[i]]]) for row, key in enumerate(["9054", "1177"]) for i in range(4)]
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-5)
    loss.backward()
    assert (logits.grad[:, :66] == 0).all() and (logits.grad[:, 66:] != 0).all()
    for (tokens,) in shown(TRAININGS["plain"](), range(5)):
        for digits in map(digits_in, tokens):
            n = (len(digits) + 1) // 3
            assert digits[2 * n:] == digits[:n - 1] == digits[n:2 * n - 1]


def test_every_other_step_of_fast_forward_and_of_nothing_else_goes_on_from_a_state_that_hay_has_left():
    for training in TRAININGS:
        calls = [len(calls) for calls in shown(TRAININGS[training](), range(40, 48))]
        assert all((n > 1) == (training == "fast-forward" and step % 2 == 1) for step, n in enumerate(calls)), training


def test_each_of_several_named_keys_is_asked_for_by_its_name():
    for n_keys in (1, 8, 32):
        tasks = passkey.named_keys(random.Random(n_keys), n_keys)
        keys, names = dict(re.findall(r"(\w+) (\d)\.", tasks[0].needle)), [task.question for task in tasks]
        assert len(keys) == n_keys and {task.needle for task in tasks} == {tasks[0].needle}
        assert sorted(names) == sorted(keys) and all(keys[name] == task.answer for name, task in zip(names, tasks))
    assert len(set(keys.values())) > 5


@pytest.mark.parametrize("grown", [0.0, 0.19, 0.2, 1.0])
def test_named_keys_are_asked_for_in_copies_of_one_state_at_first_in_one_segment_without_hay(grown):
    torch.manual_seed(0)
    model, calls = InfiniTransformer(passkey.model_config()).double(), []
    model.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0]))
    loss, n_tokens, _ = passkey.named_loss(model, random.Random(3), 4, 1024, grown)
    texts, questions = calls
    n_keys, wholes, answers = len(questions) // len(texts), [], []
    for i, question in enumerate(questions):
        text = passkey.decode(texts[i // n_keys])
        answers.append(int(re.search(rf"\b{passkey.decode(question)} (\d)\.", text)[1]))
        wholes.append(torch.cat([texts[i // n_keys], question]))
    logits = model(torch.stack(wholes))[0][:, -1]
    same(loss, torch.nn.functional.cross_entropy(logits, torch.stack([passkey.encode(str(a))[0] for a in answers])), 1e-12)
    assert n_tokens == texts.numel() + questions.numel() and len(texts) > 1 and len({*answers}) > 1
    assert grown >= 0.2 or n_keys == 8 and len(wholes[0]) <= 32
    assert passkey.decode(texts[0]).startswith(passkey.INTRO[:30]) == (grown == 1.0)


def test_the_needles_share_is_its_part_of_the_kernel_weights_of_all_tokens_in_the_memory():
    torch.manual_seed(0)
    model, task = InfiniTransformer(passkey.model_config(update="linear")).double(), passkey.one_key("9054")
    shares = dict(passkey.needle_shares(model, task, [300, 130]))
    for n, share in shares.items():
        text = passkey.write_input(task, passkey.write_hay("paper", passkey.paragraphs(n, task), None), 0)[:-4]
        first, past = len(passkey.encode(passkey.INTRO)), (len(text) - 1) // 32 * 32       # in the memory: whole segments
        x = model.embedding(text[None])
        for block, heads in zip(model.blocks, share):
            q, k, _ = (y[0].detach().numpy() for y in block.attention.project(block.norm1(x)))
            sq, sk = np.apply_along_axis(o_sigma, -1, q[:, -1]), np.apply_along_axis(o_sigma, -1, k)
            weights = np.einsum("hd,htd->ht", sq, sk)
            expected = weights[:, first:first + len(passkey.encode(task.needle))].sum(1) / weights[:, :past].sum(1)
            same(heads, torch.from_numpy(expected), 1e-9)
            x, _ = block(x, None)
    assert list(shares) == [130, 300] and (shares[130] > shares[300]).all()


@pytest.mark.parametrize("rule", RULES)
def test_fast_forwarding_leaves_the_memory_that_reading_all_of_the_hay_leaves(rule):
    torch.manual_seed(0)
    model, hay = InfiniTransformer(passkey.model_config(update=rule)), passkey.encode(passkey.HAY)
    with torch.no_grad():
        _, start = model(torch.stack([passkey.encode(passkey.NEEDLE.format(key)) for key in ("9054", "1177")]))
        _, read = stream(model, hay.repeat(4 * 300).expand(2, -1), start)
        counted = passkey.fast_forward(model, start, 300, hay.repeat)
        question = passkey.encode(passkey.QUESTION).expand(2, -1)
        same(model(question, counted)[0].softmax(-1), model(question, read)[0].softmax(-1), 2e-3)
    for s, r, c in zip(start, read, counted):
        assert torch.equal(c.k, r.k) or (c.k - r.k).abs().max() < 1e-2
        assert (c.memory.z - r.memory.z).norm() < 1e-3 * r.memory.z.norm()
        assert (c.memory.M - r.memory.M).norm() < 2e-3 * r.memory.M.norm()
        assert (s.memory.M - r.memory.M).norm() > 0.9 * r.memory.M.norm()      # there is something to count


@pytest.mark.parametrize("kind", KINDS)
def test_reading_once_what_inputs_have_in_common_answers_as_one_call_on_each_whole_input(kind, monkeypatch):
    attention, _, rule = kind.partition("-")
    torch.manual_seed(0)
    model = InfiniTransformer(passkey.model_config(update=rule or "delta", attention=attention)).double()
    tasks, lengths, depths, written = [passkey.one_key(key) for key in ("9054", "1177", "0000")], [100, 300, 2300], [0, 0.3, 1], []

    def listening(*args, **kw):
        written.append(generate(*args, **kw)[:, -4:])
        return torch.cat([args[1], torch.stack([passkey.encode("9055")] * 3)], 1)
    monkeypatch.setattr(passkey, "generate", listening)
    found = list(passkey.find(model, tasks, lengths, depths))
    assert sorted(f[:2] for f in found) == sorted((n, depth) for n in lengths for depth in depths)
    assert all(f.digits_right == pytest.approx(4 / 12) and f.keys_right == 0 for f in found)    # 905., ...., ....
    answers = iter(written)
    for f, answer in zip(found, answers):
        total = passkey.paragraphs(f.tokens, tasks[0])
        inputs = [passkey.write_input(task, passkey.write_hay("paper", total, None), round(f.depth * total)) for task in tasks]
        assert f.tokens <= len(inputs[0]) < f.tokens + 24
        assert torch.equal(answer, generate(model, torch.stack(inputs)[:, :-4], 4, temperature=0)[:, -4:]), f
    assert next(answers, None) is None


def test_accuracy_counts_digits_and_whole_keys(monkeypatch):
    model = InfiniTransformer(passkey.model_config())
    tasks = [passkey.one_key(key) for key in ("1234", "1230")]
    monkeypatch.setattr(passkey, "generate", lambda model, prompt, *_, **kw: torch.cat(
        [prompt, torch.stack([passkey.encode("1234"), passkey.encode("1235")])], 1))
    found, = passkey.find(model, tasks, [128], [0.5])
    assert (found.digits_right, found.keys_right) == (7 / 8, 1 / 2)


def test_hay_of_every_kind_is_as_long_and_has_no_digits():
    rng = random.Random(0)
    for kind in ("paper", "shuffled", "other", "words"):
        hay = passkey.write_hay(kind, 7, rng)
        assert len(hay) == 7 * 24 and not digits_in(hay) and len(passkey.write_hay(kind, 0, rng)) == 0
    paper, shuffled = (passkey.decode(passkey.write_hay(kind, 3, rng)) for kind in ("paper", "shuffled"))
    assert paper != shuffled and sorted(re.split(r"(?<=\.) ", paper)) == sorted(re.split(r"(?<=\.) ", shuffled))


def command(monkeypatch, capsys, *arguments, script=passkey):
    """Run `python passkey.py arguments`. Returns exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments), "--threads", "1"])
    with pytest.raises(SystemExit) as stop:
        train.run(script.main)
        sys.exit(0)
    return stop.value.code, *capsys.readouterr()


def test_the_command_trains_prints_a_table_and_writes_its_files(tmp_path, monkeypatch, capsys):
    asked, find = [], passkey.find
    monkeypatch.setattr(passkey, "find", lambda model, tasks, *rest: asked.extend(tasks) or find(model, tasks, *rest))
    args = ["--steps", 2, "--lengths", "128,2K", "--depths", "0 100", "--keys", 3, "--out", tmp_path]
    code, out, err = command(monkeypatch, capsys, *args)
    assert code == 0 and err.count("2/2 steps") == 7 and "2K" in out and "fast-forward delta 0" in out
    rows = (tmp_path / "passkey.csv").read_text().splitlines()
    assert rows[0] == "training,rule,seed,text,tokens,depth,digits_right,keys_right,us_per_token,peak_mb"
    assert len(rows) == 1 + 7 * 2 * 2 and {row.split(",")[4] for row in rows[1:]} == {"128", "2048"}
    assert (tmp_path / "passkey.png").read_bytes().startswith(b"\x89PNG")
    assert len(asked) == 7 * (3 + 2) and all(passkey.is_held_out(task.answer) for task in asked)
    code, out, _ = command(monkeypatch, capsys, *args, "--text", "all", "--load", tmp_path / "passkey-plain-delta-seed0.pt")
    again = (tmp_path / "passkey.csv").read_text().splitlines()[1:]
    assert code == 0 and len(again) == 8 * 4 and "plain delta 0 decoy" in out
    measured = [[row.split(",")[:8] for row in some if ",paper," in row and "plain,delta" in row] for some in (rows, again)]
    assert measured[0] == measured[1] and len(measured[0]) == 4


def test_each_row_of_the_table_is_trained_as_the_readme_and_the_docstring_say(tmp_path, monkeypatch):
    args, done = argparse.Namespace(seed=5, steps=None, digits=4, device="cpu", out=tmp_path, resume=False), {}

    def listen(model, loss_of, steps, path, lr, gate_lr, **kw):
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        done[path.stem] = model.config, start, steps, lr, gate_lr, kw["settings"]["training"]
        model.head.weight.data += 1                              # what it has learned
        train.write_checkpoint(path, dict(model=model.state_dict(), config=asdict(model.config), settings={}, losses=0, gates=0,
                                          optimizer=0))
    monkeypatch.setattr(passkey, "train", listen)
    zero = passkey.train_one(args, "zero-shot", update="linear")
    for training in ("plain", "fast-forward"):
        passkey.train_one(args, training, zero, update="linear")
    for training in ("one-rate", "local"):
        passkey.train_one(args, training, **({} if training == "local" else dict(update="linear")))
    rows = {who: (config.attention, steps, lr, gate_lr, training) for who, (config, _, steps, lr, gate_lr, training) in done.items()}
    assert rows == {"passkey-zero-shot-linear-seed5": ("infini", 4800, 4e-3, 1e-2, "zero-shot"),
                    "passkey-plain-linear-seed5": ("infini", 1600, 2e-3, 1e-2, "plain"),
                    "passkey-fast-forward-linear-seed5": ("infini", 1600, 2e-3, 1e-2, "fast-forward"),
                    "passkey-one-rate-linear-seed5": ("infini", 4800, 4e-3, 4e-3, "one-rate"),
                    "passkey-local-seed5": ("local", 4800, 4e-3, 1e-2, "local")}
    starts = [start["head.weight"] for _, start, *_ in done.values()]
    assert torch.equal(starts[1], starts[0] + 1) and torch.equal(starts[2], starts[1])          # where zero-shot ended
    assert torch.equal(starts[3], starts[0]) and torch.equal(starts[4], starts[0])
    assert all(p.config.update == "linear" for p in [train.load_model(zero)[0]])


def test_the_papers_numbers_beside_ours_are_those_of_its_table_3():
    rows = {(training, rule): [tuple(map(int, cell.split("/"))) for cell in cells.split()]
            for (training, rule), cells in passkey.PAPER.items()}
    columns = {at: {who: [cell[i] for cell in cells] for who, cells in rows.items()} for i, at in enumerate(("start", "middle", "end"))}
    assert columns["start"] == {("zero-shot", "linear"): [14, 11, 6, 6, 8], ("zero-shot", "delta"): [13, 6, 7, 6, 7],
                                ("plain", "linear"): [100, 100, 100, 97, 96], ("plain", "delta"): [100] * 5}
    assert columns["middle"] == {("zero-shot", "linear"): [13, 14, 3, 7, 6], ("zero-shot", "delta"): [11, 9, 5, 8, 6],
                                 ("plain", "linear"): [100, 100, 100, 99, 94], ("plain", "delta"): [100] * 5}
    assert columns["end"] == {("zero-shot", "linear"): [98, 100, 100, 99, 98], ("zero-shot", "delta"): [99, 99, 99, 97, 97],
                              ("plain", "linear"): [100] * 5, ("plain", "delta"): [100, 99, 99, 100, 100]}


def test_the_command_measures_how_thin_a_key_gets(tmp_path, monkeypatch, capsys):
    args = ["dilution", "--steps", 2, "--rule", "delta", "--training", "local,zero-shot", "--lengths", "128,2K", "--out", tmp_path]
    code, out, err = command(monkeypatch, capsys, *args)
    first, last = map(float, out.splitlines()[-1].split()[-2:])
    assert code == 0 and 100 > first > last > 0 and (tmp_path / "dilution.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_without_memory_has_no_share_of_it_to_show(tmp_path, monkeypatch, capsys):
    code, out, err = command(monkeypatch, capsys, "dilution", "--steps", 2, "--training", "local", "--lengths", 128, "--out", tmp_path)
    assert code == 2 and "must have one with a memory" in err and not (tmp_path / "dilution.png").exists()


@pytest.mark.parametrize("option", ["digits", "load"])
def test_capacity_trains_its_own_models_on_keys_of_one_digit(option, tmp_path, monkeypatch, capsys):
    code, _, err = command(monkeypatch, capsys, "capacity", f"--{option}", 5, "--out", tmp_path)
    assert code == 2 and err.startswith(f"error: --{option} was given") and len(err.splitlines()) == 1


def test_the_command_measures_how_many_named_keys_a_memory_holds(tmp_path, monkeypatch, capsys):
    code, out, err = command(monkeypatch, capsys, "capacity", "--steps", 2, "--keys", 2, "--out", tmp_path)
    assert code == 0 and err.count("2/2 steps") == 6 and "linear, d_key = 64" in out
    rows = list(csv.DictReader((tmp_path / "capacity.csv").open()))
    assert [row["named keys in the input"] for row in rows[:6]] == ["1.0", "2.0", "4.0", "8.0", "16.0", "32.0"]
    assert (tmp_path / "capacity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [
    ["--steps", "0"], ["--steps", "many"], ["--training", "warm"], ["--lengths", "1G"], ["--lengths", "65M"], ["--digits", "2"], ["--text", "hay"], ["--lengths", "10"],
    ["--lengths", ""], ["--depths", "0,101"], ["--depths", "nan"], ["--keys", "0"], ["--seed", "-1"], ["--seed", "1.5"],
    ["--device", "abacus"], ["--device", "meta"], ["--threads", "0"], ["--rule", "hebb"], ["--load", "missing.pt"], ["--load", "."],
    ["--load", __file__], ["--out", __file__], ["--csv", "."], ["--csv", "no/table.csv"], ["--st", "3"]])
def test_bad_arguments_are_one_line_on_standard_error_and_exit_code_2(arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(passkey, "train_one", None)              # nothing may be trained
    code, out, err = command(monkeypatch, capsys, *arguments)
    assert code == 2 and len(err.strip().splitlines()) == 1 and "Traceback" not in err


# --- Hard to break -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("part", range(4))
def test_random_models_texts_and_cuts_agree_with_the_oracle(part):
    """200 cases: kind, sizes, lengths, forms, causal or not, checkpoints, precision, and where the text is cut."""
    for seed in range(50 * part, 50 * part + 50):
        draw = random.Random(seed)
        kind, dtype, causal = draw.choice(KINDS), draw.choice([torch.float64] * 3 + [torch.float32]), draw.random() < 0.8
        sizes = dict(d_model=draw.randint(1, 9), n_layers=draw.randint(1, 2), n_heads=draw.randint(1, 3),
                     d_key=2 * draw.randint(1, 3), d_value=draw.randint(1, 5), d_ff=draw.randint(1, 9),
                     segment_len=draw.randint(1, 7), rope_base=draw.choice([1.5, 50.0, 1e4]), causal=causal,
                     form=draw.choice(["parallel", "recurrent"]), checkpoint=draw.random() < 0.3)
        model, T = make(kind, dtype, seed, **sizes), draw.randint(1, 30)
        tokens = tokens_of(draw.randint(1, 2), T, seed)
        # an encoder goes on where a segment begins, and a "full" one can't go on at all
        ends = range(1, T) if causal else [] if kind == "full" else range(sizes["segment_len"], T, sizes["segment_len"])
        ends = sorted(draw.sample(ends, draw.randint(0, min(4, len(ends)))))
        case = f"seed {seed}: {kind}, {dtype}, {sizes}, cut at {ends} of {tuple(tokens.shape)}"
        try:
            logits, _ = chunked(model, tokens, np.diff([0, *ends, T]).tolist())
            expected = torch.stack([torch.from_numpy(o_model(model, row)) for row in tokens])
        except Exception as error:
            raise AssertionError(case) from error
        scale = max(1.0, expected.abs().max().item())
        error = (logits.double() - expected).abs().max().item() / scale
        assert error < (1e-9 if dtype == torch.float64 else 2e-3), f"{case}: {error}"


@pytest.mark.parametrize("repeated", [False, True], ids=["random", "repeated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_a_million_tokens_leave_finite_numbers_and_a_memory_that_counted_them_all(rule, dtype, repeated):
    sizes = dict(d_model=8, n_layers=1, n_heads=1, d_key=4, d_value=4, d_ff=8, segment_len=64)
    model, n = make("infini-" + rule, dtype, **sizes), 2 ** 20
    tokens = torch.full((1, n), 3) if repeated else tokens_of(1, n)
    logits, state = stream(model, tokens)
    assert all(torch.isfinite(t).all() for t in (logits, *tensors_in(state))) and state[0].memory.M.abs().max() > 1
    with torch.no_grad():                                        # each token's sigma(k), as often as the token was there
        layer, every = model.blocks[0].attention, torch.arange(SMALL.vocab_size)[None]
        k = layer.project(model.blocks[0].norm1(model.embedding(every)))[1][0, 0].double().numpy()
    counts = np.bincount(tokens[0].numpy(), minlength=SMALL.vocab_size)
    z = torch.from_numpy(sum(count * o_sigma(row) for count, row in zip(counts, k)))
    same(state[0].memory.z[0, 0] / z, np.ones(4), 1e-3 if dtype == torch.float32 else 2e-2)


def test_in_float32_the_memory_of_a_long_text_answers_as_in_float64():
    for rule in RULES:
        model, tokens = make("infini-" + rule, torch.float32), tokens_of(1, 2 ** 15)
        wide = copy.deepcopy(model).double()
        (logits, _), (expected, _) = (stream(m, tokens) for m in (model, wide))
        assert 0 < (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def train_until_killed(path, last, seconds, steps=200):
    """In a process of its own: SIGKILL to itself so many seconds after `last` steps, wherever it is then."""
    def loss_of(model, step):
        seen.append(step)
        if len(seen) == last:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return toy_loss(model, step)
    seen = []
    train_toy(path, steps, loss_of, save_every=2, resume=True)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_training_that_is_killed_ten_times_ends_with_the_weights_of_one_that_is_not(tmp_path):
    context, draw = multiprocessing.get_context("forkserver"), random.Random(0)
    context.set_forkserver_preload(["test_infini", "torch._dynamo"])    # what an optimizer imports: once, not ten times
    codes, done, path = [], [], tmp_path / "cut.pt"
    for last in [*(draw.randint(4, 9) for _ in range(10)), None]:
        process = context.Process(target=train_until_killed, args=(path, last, draw.uniform(0, 0.01)))
        process.start()
        process.join()
        codes.append(process.exitcode)
        done.append(len(train.read_checkpoint(path)["losses"]) if path.exists() else 0)
    assert codes == [-signal.SIGKILL] * 10 + [0] and done == sorted(set(done)) and done[-1] == 200, (codes, done)
    whole, losses = train_toy(tmp_path / "whole.pt", 200)
    cut = train.read_checkpoint(path)
    assert cut["losses"].tolist() == losses
    assert all(torch.equal(p, cut["model"][name]) for name, p in whole.named_parameters())


@pytest.mark.skipif(train.resource is None, reason="Windows has no limit for the size of a file")
def test_a_full_disk_is_one_line_and_exit_code_2_and_what_was_saved_before_is_whole(folder, tmp_path, monkeypatch, capsys):
    args, path = [*LM, "--data", folder, "--out", tmp_path], tmp_path / "lm-delta-seed0.pt"
    assert command(monkeypatch, capsys, *args, script=train)[0] == 0
    before, limits = path.read_bytes(), train.resource.getrlimit(train.resource.RLIMIT_FSIZE)
    train.resource.setrlimit(train.resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        code, _, err = command(monkeypatch, capsys, *args, "--lr", 0.5, script=train)
    finally:
        train.resource.setrlimit(train.resource.RLIMIT_FSIZE, limits)
    assert code == 2 and err.splitlines()[-1].startswith("error: ") and err.count("error") == 1
    assert path.read_bytes() == before and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("arguments", [["--out", "FILE"], ["--out", "FILE/deeper"], ["bench", "--csv", "/dev/full"]])
def test_what_cannot_be_written_is_one_line_and_exit_code_2(arguments, folder, tmp_path, monkeypatch, capsys):
    if "/dev/full" in arguments and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    monkeypatch.setattr(train, "measurements", lambda sizes: [("what", 1.0, 2.0, "s", "<", 1.0)])
    arguments = [a.replace("FILE", str(tmp_path / "file")) for a in arguments]
    (tmp_path / "file").write_text("kept")
    code, _, err = command(monkeypatch, capsys, *LM, "--data", folder, *arguments, script=train)
    assert code == 2 and len(err.strip().splitlines()) == 1 and (tmp_path / "file").read_text() == "kept"


def options_of(script, monkeypatch):
    """The options of a script that take a value, from its own parser."""
    found = []

    def stop(parser, *_):
        found.extend(action for action in parser._actions if action.option_strings and action.nargs != 0)
        raise SystemExit
    with monkeypatch.context() as patch:
        patch.setattr(train.Parser, "parse_args", stop)
        with pytest.raises(SystemExit):
            script.parse_arguments()
    return found


@pytest.fixture
def nothing_runs(monkeypatch, tmp_path):
    """Arguments are read, files opened, models made; where the work would begin the command ends with exit code 0."""
    def stop(*_, **kw):
        raise SystemExit(0)
    for script, names in ((train, ("train", "generate", "measurements")), (passkey, ("train", "find", "needle_shares"))):
        for name in names:
            monkeypatch.setattr(script, name, stop)
    monkeypatch.chdir(tmp_path)


def refused(arguments, script, monkeypatch, capsys):
    """Whether the command refuses the arguments. If it does, with one line and exit code 2: nothing else may happen."""
    try:
        code, _, err = command(monkeypatch, capsys, *arguments, script=script)
    except BaseException as error:
        raise AssertionError(f"{script.__name__}.py {arguments}") from error
    assert code in (0, 2) and len(err.strip().splitlines()) == (code == 2), f"{script.__name__}.py {arguments}: {err}"
    return code == 2


def save_model(model, path, **settings):
    train.write_checkpoint(path, dict(model=model.state_dict(), config=asdict(model.config), settings=settings,
                                      losses=torch.zeros(1), gates=torch.zeros(0), optimizer=None))


SCRIPTS = {"train.py": train, "passkey.py": passkey}
ABSURD = ["0", "-1", "2147483648", "9" * 30, "1e999", "nan", "text", "", "\0", "missing/file", "FOLDER", "FILE"]


@pytest.mark.parametrize("start", ["train.py", "train.py sample --load LM", "train.py bench", "passkey.py", "passkey.py capacity",
                                   "passkey.py --load PASSKEY", "passkey.py dilution --load PASSKEY"])
def test_absurd_values_of_every_argument_are_refused_in_one_line_or_taken(start, nothing_runs, folder, tmp_path, monkeypatch, capsys):
    files = {name: tmp_path / name for name in ("LM", "PASSKEY", "FILE", "FOLDER")}
    save_model(make(dtype=torch.float32, vocab_size=256), files["LM"], kind="delta", seed=0)
    save_model(InfiniTransformer(passkey.model_config()), files["PASSKEY"], training="zero-shot", seed=0, digits=4)
    files["FOLDER"].mkdir()
    script, *base = [files.get(word, word) for word in start.split()]
    base += [*LM, "--data", folder] if script == "train.py" else ["--steps", 1]
    assert not refused(base, SCRIPTS[script], monkeypatch, capsys)
    for option in options_of(SCRIPTS[script], monkeypatch):
        free = option.type in (str, Path)                        # any text may be a name, a prompt or a path
        if len(start.split()) > 1 and not free:
            continue                                             # numbers are read alike in every command
        for value in ABSURD:
            files["FILE"].write_text("no checkpoint")            # for a command may be told to write there
            arguments = [*base, option.option_strings[-1], files.get(value, value)]
            was = refused(arguments, SCRIPTS[script], monkeypatch, capsys)
            assert was or free or value in ("0", "-1", "2147483648"), arguments


@pytest.mark.parametrize("start", ["train.py sample", "passkey.py", "passkey.py dilution"])
def test_a_checkpoint_that_is_none_or_another_is_refused_in_one_line(start, nothing_runs, tmp_path, monkeypatch, capsys):
    script, *base = start.split()
    good = tmp_path / "good.pt"
    save_model(InfiniTransformer(passkey.model_config(**(dict(vocab_size=256) if script == "train.py" else {}))), good, training="zero-shot", seed=0, digits=4)
    whole, content = good.read_bytes(), train.read_checkpoint(good)
    for other in (b"", b"text", whole[:len(whole) // 2], whole[:-1], torch.zeros(3), [1], {}, dict(content, settings=None),
                  dict(content, model={"a": torch.zeros(1)}), dict(content, config=None), dict(content, settings={}),
                  *(dict(content, config=dict(content["config"], d_model=d)) for d in (62, 2 ** 50, "64", -1))):
        torch.save(other, tmp_path / "bad.pt")
        if isinstance(other, bytes):
            (tmp_path / "bad.pt").write_bytes(other)
        if script == "train.py" and isinstance(other, dict) and other.get("settings") == {}:
            continue                                             # a model can be sampled from without knowing its training
        assert refused([*base, "--load", tmp_path / "bad.pt"], SCRIPTS[script], monkeypatch, capsys), other
    for path in (tmp_path, tmp_path / "missing.pt"):
        assert refused([*base, "--load", path], SCRIPTS[script], monkeypatch, capsys)
    assert not refused([*base, "--load", good, "--prompt" if script == "train.py" else "--text", "paper"], SCRIPTS[script],
                       monkeypatch, capsys)


def test_a_loaded_model_is_asked_for_keys_of_as_many_digits_as_it_was_trained_on(tmp_path, monkeypatch, capsys):
    def listening(model, tasks, *rest):
        asked.extend(len(task.answer) for task in tasks)
        return [passkey.Found(64, 0.0, 1.0, 1.0, 1.0, 1.0)]
    monkeypatch.setattr(passkey, "find", listening)
    save_model(InfiniTransformer(passkey.model_config()), tmp_path / "a.pt", training="zero-shot", seed=0, digits=6)
    for arguments, digits in (([], 6), (["--digits", 3], 3)):
        asked = []
        args = ["--load", tmp_path / "a.pt", "--lengths", 64, "--depths", 0, "--keys", 2, "--out", tmp_path, *arguments]
        assert command(monkeypatch, capsys, *args)[0] == 0 and set(asked) == {digits}


def test_the_benchmark_measures_every_row_and_says_what_is_missed(tmp_path, monkeypatch, capsys):
    assert train.SMALL == {name: getattr(passkey.model_config(), name) for name in train.SMALL}
    monkeypatch.setattr(train, "BENCH", dict(
        repeats=1, rows=((1, 40),), paper_tokens=8, parallel_tokens=64, full_tokens=64, near=64, far=128, early=10, late=40,
        new_tokens=2, segments=2, matrix=8, drift=(8, 400)))
    monkeypatch.setattr(train, "in_new_process", lambda function, *args: function(*args))
    code, out, err = command(monkeypatch, capsys, "bench", "--csv", tmp_path / "b.csv", script=train)
    lines = (tmp_path / "b.csv").read_text().splitlines()
    assert code == 0 and not err and len(lines) == 1 + 11 + 4 and out.count("\n") == 2 + 11 + 4 and torch.__version__ in out
    assert all(0 < float(error) < 2e-6 for line in out.splitlines()[-2:] for error in line.split()[1:])      # float32
    assert out.count("missed") == sum(line.endswith("False") for line in lines) > 0


def test_the_operations_that_the_benchmark_counts_are_those_that_pytorch_counts():
    for rule in RULES:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            step, counted = train.layer_step(4 * 2048, update=rule)
            step()
        assert 0.96 < counted / counter.get_total_flops() <= 1, rule


@pytest.mark.skipif(train.resource is None, reason="Windows does not count it")
def test_peak_memory_is_that_of_the_process_alone():
    here = torch.ones(2 ** 26)                                   # 256 MB, of which a new process knows nothing
    assert train.in_new_process(train.peak_memory) < train.peak_memory() - here.nbytes / 2 ** 20 / 2


def test_no_syntax_is_newer_than_python_3_10():
    root = Path(train.__file__).parent
    sources = {path.name: path.read_text(encoding="utf-8") for path in root.glob("*.py")}
    for path in root.glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources[path.name] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert len(sources) >= 4
    for name, source in sources.items():
        ast.parse(source, name, feature_version=(3, 10))


# --- README.md -----------------------------------------------------------------------------------------------------

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")


def test_every_equation_is_linked_to_the_line_of_its_function():
    lines = Path(infini.__file__).read_text(encoding="utf-8").splitlines()
    rows = re.findall(r"^\| (\d+) \((.+?)\) \|.*\| \[`(\w+)`\]\(infini\.py#L(\d+)\) \|$", README, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(1, 12))
    assert all(old == ("-" if int(new) < 5 else str(int(new) - 4)) for new, old, _, _ in rows)
    for number, _, name, line in rows:
        assert lines[int(line) - 1].strip().startswith(f"def {name}(")
        body = "\n".join(lines[int(line) - 1:]).split("\n\n\n")[0].split("    def ")
        assert re.search(rf"Eq\. {number}\b", "".join(body[:2])), f"{name} does not name Eq. {number}"


def test_each_equation_has_one_home_in_the_code():
    numbers = [int(n) for n in re.findall(r"Eq\. (\d+)", Path(infini.__file__).read_text(encoding="utf-8"))]
    assert sorted(numbers) == list(range(1, 12))


def test_the_readme_tells_how_long_each_file_is_and_shows_pictures_that_are_there():
    rows = re.findall(r"^\| \[`([\w.]+)`\]\(\1\) \| (\d*) ?\|", README, re.MULTILINE)
    assert [name for name, _ in rows] == ["infini.py", "train.py", "passkey.py", "test_infini.py", "walkthrough.ipynb"]
    for name, lines in rows[:4]:
        assert abs(int(lines) - len(Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines())) <= 10, name
    for path in re.findall(r"\]\((?!http)([^)#]+)", README) + re.findall(r"assets/[\w.-]+\.\w+", README):
        assert Path(__file__).with_name(path.split("/")[0]).joinpath(*path.split("/")[1:]).exists(), path


def test_the_readmes_example_runs():
    example = re.search(r"```python\n(.+?)```", README, re.DOTALL).group(1)
    names = {}
    exec(example, names)
    assert names["o"].shape == (2, 7, 128) and names["text"].shape == (2, 70)


def test_every_departure_in_the_code_is_a_row_of_the_readme():
    code = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (infini, train))
    table = README[README.index("| the paper | here |"):].split("\n\n")[0]
    assert table.count("\n| ") >= code.count("Departure: ") >= 6


@pytest.mark.parametrize("error, line", [(ValueError("a was 1, must be 2"), "error: a was 1, must be 2"),
                                         (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device"),
                                         (MemoryError(), "error: out of memory"), (ValueError("\nfirst\nsecond"), "error: first"),
                                         (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), None),
                                         (RuntimeError("CUDA error: an illegal memory access"), False), (TypeError("a"), False)])
def test_what_the_user_did_wrong_is_one_line_and_a_mistake_of_ours_a_traceback(error, line, capsys):
    def main():
        raise error
    if line is False:
        with pytest.raises(type(error)):
            train.run(main)
    else:
        with pytest.raises(SystemExit) as stop:
            train.run(main)
        assert stop.value.code == 2 and capsys.readouterr().err == (line or f"error: {error}") + "\n"


# --- walkthrough.ipynb ---------------------------------------------------------------------------------------------

WALKTHROUGH = Path(__file__).with_name("walkthrough.ipynb")


def walkthrough():
    """The notebook, its code cells, and for each of their outputs its kind and all its texts."""
    notebook, outputs = nbformat.read(WALKTHROUGH, as_version=4), []
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for output in (output for cell in cells for output in cell.outputs):
        texts = [text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")]
        outputs.append((output.get("name", output.output_type), "\n".join([output.get("text", ""), *map(str, texts)])))
    return notebook, cells, outputs


def test_the_walkthrough_runs_from_top_to_bottom_in_a_fresh_kernel_and_no_cell_fails_or_warns():
    notebook = walkthrough()[0]
    client = NotebookClient(notebook, timeout=1800, kernel_name="python3",
                            resources={"metadata": {"path": str(WALKTHROUGH.parent)}})
    client.execute()    # raises if a cell fails
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        assert output.get("name") != "stderr", output.text


def test_the_saved_outputs_of_the_walkthrough_come_from_this_version_of_the_code():
    _, cells, outputs = walkthrough()
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in (infini, train, passkey)]
    sources += [cell.source for cell in cells]
    models = [WALKTHROUGH.with_name("assets").joinpath(f"passkey-{rule}.pt").read_bytes() for rule in RULES]
    code = hashlib.sha256("\0".join(sources).encode() + b"".join(models)).hexdigest()[:16]
    assert outputs[-1][1] == f"made by the code {code}\n", "to refresh: jupyter execute --inplace walkthrough.ipynb"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


def test_the_saved_outputs_of_the_walkthrough_hold_no_warning_and_no_path_of_the_machine_that_made_them():
    notebook, _, outputs = walkthrough()
    assert notebook.metadata.kernelspec.name == "python3" and WALKTHROUGH.stat().st_size < 1_500_000
    for kind, text in outputs:
        assert kind not in ("stderr", "error") and "Warning" not in text and "Traceback" not in text, text
        assert not re.search(r"(?<![\w.)])(~|[A-Za-z]:\\|/)[\w.-]+[/\\]\w", text), text


def test_every_function_and_model_that_the_walkthrough_names_is_there():
    prose = "\n".join(cell.source for cell in walkthrough()[0].cells if cell.cell_type == "markdown")
    named = re.findall(r"`(infini|train|passkey)\.(?!py`)(\w+)", prose)
    assert named and all(hasattr(sys.modules[module], name) for module, name in named)
    models = re.findall(r"assets/[\w-]+\.pt", prose)
    assert models and all(WALKTHROUGH.with_name("assets").joinpath(Path(path).name).exists() for path in models)
