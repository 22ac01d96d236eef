"""The claims about infini.py, each tested against something that shares no code with it.

The oracle is float64 NumPy, written from the equations as loops over single tokens. It is slow,
plain and independent.
"""
import copy
import io
import math
import random
import re
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import infini
from infini import (InfiniAttention, InfiniConfig, InfiniTransformer, Memory, State, generate,
                    inject, inject_memory, local_attention, retrieve, rotary, sigma, stream,
                    update_delta, update_linear)

torch.set_num_threads(1)    # everything here is too small to share
RULES = ["linear", "delta"]
FORMS = ["parallel", "recurrent"]
KINDS = ["infini-linear", "infini-delta", "local", "xl", "full"]
SMALL = InfiniConfig(vocab_size=17, d_model=12, n_layers=2, n_heads=3, d_key=4, d_value=6, d_ff=20,
                     segment_len=5, rope_base=10.0)


# --- The oracle ----------------------------------------------------------------------------------
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


def o_attend(q, k, v):
    """Softmax attention of one query to all keys."""
    scores = np.array([sum(q[i] * kj[i] for i in range(len(q))) / math.sqrt(len(q)) for kj in k])
    weights = np.exp(scores - scores.max())
    return sum(w / weights.sum() * vj for w, vj in zip(weights, v))


def o_read(q, M, z):
    """Eq. 7 for one token. An empty memory answers 0."""
    weight = sum(o_sigma(q)[i] * z[i] for i in range(len(z)))
    return np.zeros(M.shape[1]) if weight == 0 else o_sigma(q) @ M / weight


def o_write(keys, values, M, z, rule):
    """Eqs. 8 and 9 for one segment, token by token. Both rules read the memory of before."""
    M_new, z_new = M.copy(), z.copy()
    for k, v in zip(keys, values):
        binding = v - o_read(k, M, z) if rule == "delta" else v
        for i in range(len(k)):
            M_new[i] += o_sigma(k)[i] * binding
            z_new[i] += o_sigma(k)[i]
    return M_new, z_new


def o_head(q, k, v, beta, c):
    """Eqs. 6-10 for one head of one document. q, k: (T, d_key), v: (T, d_value).
    Returns a: (T, d_value), M, z."""
    T, N = len(q), c.segment_len
    M, z = np.zeros((c.d_key, c.d_value)), np.zeros(c.d_key)
    a = np.zeros((T, c.d_value))
    for t in range(T):
        s = t // N
        if t % N == 0 and s > 0:
            M, z = o_write(k[t - N:t], v[t - N:t], M, z, c.update)
        first = {"infini": s * N, "local": s * N, "xl": max(0, s - 1) * N, "full": 0}[c.attention]
        last = T - 1 if c.attention == "full" else min(T, (s + 1) * N) - 1
        seen = range(first, (t if c.causal else last) + 1)
        a[t] = o_attend(o_rotate(q[t], t, c.rope_base),
                        [o_rotate(k[j], j, c.rope_base) for j in seen], [v[j] for j in seen])
        if c.attention == "infini":
            g = 1 / (1 + math.exp(-beta))
            a[t] = g * o_read(q[t], M, z) + (1 - g) * a[t]
    if T % N == 0:
        M, z = o_write(k[T - N:], v[T - N:], M, z, c.update)
    return a, M, z


def o_layer(x, w, c):
    """Eqs. 5-11 for one document. x: (T, d_model), w: the layer's weights by name.
    Returns o: (T, d_model), [(M, z)]."""
    q, k, v = x @ w["w_q.weight"].T, x @ w["w_k.weight"].T, x @ w["w_v.weight"].T
    heads, memories = [], []
    for h in range(c.n_heads):
        keys, values = (slice(h * d, (h + 1) * d) for d in (c.d_key, c.d_value))
        beta = w["beta"][h] if "beta" in w else 0.0
        a, M, z = o_head(q[:, keys], k[:, keys], v[:, values], beta, c)
        heads.append(a)
        memories.append((M, z))
    return np.concatenate(heads, 1) @ w["w_o.weight"].T, memories


def o_norm(x, gain):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + np.finfo(np.float64).eps) * gain


def o_model(model, tokens):
    """The whole InfiniTransformer for one document. tokens: (T,). Returns (T, vocab_size)."""
    w, c = weights_of(model), model.config
    x = w["embedding.weight"][np.asarray(tokens)]
    for i in range(c.n_layers):
        at = f"blocks.{i}."
        layer = {n.removeprefix(at + "attention."): p for n, p in w.items() if n.startswith(at)}
        x = x + o_layer(o_norm(x, w[at + "norm1.weight"]), layer, c)[0]
        y = o_norm(x, w[at + "norm2.weight"]) @ w[at + "up.weight"].T
        gelu = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        x = x + gelu @ w[at + "down.weight"].T
    return o_norm(x, w["norm.weight"]) @ w["head.weight"].T


# --- Helpers -------------------------------------------------------------------------------------
def weights_of(module):
    return {name: p.detach().double().numpy() for name, p in module.named_parameters()}


def make(kind="infini-delta", dtype=torch.float64, seed=0, **sizes):
    """A small model with random gates and gains, so that nothing cancels or is 1 by chance."""
    attention, _, update = kind.partition("-")
    torch.manual_seed(seed)
    config = replace(SMALL, attention=attention, update=update or "delta", **sizes)
    model = InfiniTransformer(config).to(dtype)
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
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


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
    k, v = normal(B, H, 7, d_key, seed=seed), normal(B, H, 7, d_value, seed=seed + 1)
    return update_linear(memory, k, v)


def tensors_in(state):
    return [t for s in state for t in (*(s.memory or ()), s.k, s.v)]


def chunked(model, tokens, lengths):
    """Read the tokens in calls of these lengths. Returns all logits and the last state."""
    outputs, state = [], None
    for piece in tokens.split(lengths, 1):
        logits, state = model(piece, state)
        outputs.append(logits)
    return torch.cat(outputs, 1), state


def heard(module):
    """A list to which each call of the module adds its length and whether it keeps a graph."""
    calls = []
    module.register_forward_pre_hook(
        lambda _, inputs: calls.append((inputs[0].shape[1], torch.is_grad_enabled())))
    return calls


# --- Eqs. 1-3: the background --------------------------------------------------------------------
def test_eq1_rnn_carries_the_past_in_one_vector():
    x, h, w_x, w_h = normal(2, 3), normal(2, 4, seed=3), normal(3, 4), normal(4, 4)
    same(infini.rnn(x, h, w_x, w_h), np.tanh(x.numpy() @ w_x.numpy() + h.numpy() @ w_h.numpy()))


def test_eq2_a_gradient_step_of_a_linear_mnm_is_the_delta_rule_without_sigma_and_normaliser():
    M, k, v = normal(4, 6), normal(3, 4), normal(3, 6, seed=5)
    same(infini.mnm_write([M], k, v)[0], M + k.T @ (v - k @ M))


def test_eq2_mnm_writes_by_a_gradient_step_and_reads_by_a_forward_pass():
    w1, w2 = (0.3 * normal(4, 16)).numpy(), (0.3 * normal(16, 6, seed=4)).numpy()
    k, v, lr = normal(3, 4).numpy(), normal(3, 6, seed=5).numpy(), 0.05
    theta = [torch.tensor(w1), torch.tensor(w2)]
    for _ in range(3):
        hidden = np.tanh(k @ w1)
        same(infini.mnm_read(theta, torch.tensor(k)), hidden @ w2)
        error = v - hidden @ w2                              # the gradient, by hand
        w1, w2 = w1 + lr * k.T @ (error @ w2.T * (1 - hidden ** 2)), w2 + lr * hidden.T @ error
        theta = infini.mnm_write(theta, torch.tensor(k), torch.tensor(v), lr)
        same(theta[0], w1)
        same(theta[1], w2)


def test_eq2_mnm_reads_the_past_only_and_its_writing_can_be_learned():
    x, h, theta = normal(2, 3), normal(2, 4, seed=3), normal(5, 4)
    w_x, w_h, w_q = normal(3, 4), normal(4, 4), normal(4, 5)
    w_k, w_v = normal(4, 5, seed=8), normal(4, 4, seed=9).requires_grad_()
    h1, (theta1,) = infini.mnm(x, h, [theta], w_x, w_h, w_q, w_k, w_v, lr=0.1)
    c = torch.tensor(np.tanh(x.numpy() @ w_x.numpy() + h.numpy() @ w_h.numpy()))
    same(h1, c + c @ w_q @ theta)
    same(theta1, theta + 0.1 * (c @ w_k).T @ (c @ w_v - c @ w_k @ theta))
    h2, _ = infini.mnm(x, h1, [theta1], w_x, w_h, w_q, w_k, w_v)
    assert not h1.requires_grad and torch.autograd.grad(h2.sum(), w_v)[0].abs().max() > 0


def test_eq3_plain_attention_sees_its_own_segment_and_no_later_token():
    x, w_q, w_k, w_v = normal(2, 5, 12), normal(12, 4), normal(12, 4, seed=3), normal(12, 6, seed=4)
    out, q, k, v = infini.attention(x, w_q, w_k, w_v), x @ w_q, x @ w_k, x @ w_v
    for b, t in np.ndindex(2, 5):
        same(out[b, t], o_attend(q[b, t], k[b, :t + 1], v[b, :t + 1]))


# --- Eqs. 5-11 against the oracle ----------------------------------------------------------------
def test_eq5_heads_are_split_by_features_not_by_tokens():
    layer, x = layer_of(), normal(2, 7, 12)
    for y, name, d in zip(layer.project(x), ("w_q", "w_k", "w_v"), (4, 4, 6)):
        w = weights_of(layer)[name + ".weight"]
        for b, h, t in np.ndindex(2, 3, 7):
            same(y[b, h, t], w[h * d:(h + 1) * d] @ x[b, t].numpy())


@pytest.mark.parametrize("L", [5, 8])
def test_eq6_local_attention_divides_by_the_root_of_d_key_and_is_causal_by_default(L):
    q, k, v = normal(2, 3, 5, 4), normal(2, 3, L, 4, seed=3), normal(2, 3, L, 6, seed=4)
    causal, both_ways = local_attention(q, k, v), local_attention(q, k, v, causal=False)
    for b, h, t in np.ndindex(2, 3, 5):                      # the queries belong to the last 5
        seen = L - 5 + t + 1
        same(causal[b, h, t], o_attend(q[b, h, t], k[b, h, :seen], v[b, h, :seen]))
        same(both_ways[b, h, t], o_attend(q[b, h, t], k[b, h], v[b, h]))


def test_rope_turns_pairs_so_that_only_the_distance_counts():
    q, k = normal(6), normal(6, seed=3)
    turned, keys = (rotary(x.expand(9, 6), torch.arange(9), 10.0) for x in (q, k))
    for t in range(9):
        same(turned[t], o_rotate(q.numpy(), t, 10.0))
    same(turned[5] @ keys[2], turned[8] @ keys[5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_angles_of_rope_are_exact_in_half_precision_too(dtype):
    x, positions = normal(4, 32).to(dtype), torch.tensor([0, 1, 1023, 2047])
    turned = rotary(x, positions, 10_000.0)
    assert turned.dtype == dtype
    for row, position, expected in zip(x.double().numpy(), positions.tolist(), turned.double()):
        same(expected, o_rotate(row, position, 10_000.0), 0.03)    # as bfloat16 rounds x itself


def test_sigma_is_elu_plus_one_and_keeps_small_weights_that_float32_elu_plus_one_loses():
    x = torch.linspace(-60, 30, 91)
    relative = sigma(x).double() / torch.tensor(np.array([o_sigma([float(xi)])[0] for xi in x]))
    same(relative, torch.ones(91), 1e-5)
    assert (F.elu(x) + 1 == 0).any() and sigma(x.bfloat16()).dtype == torch.float32
    x = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    sigma(x).sum().backward()
    same(x.grad, np.array([math.exp(-2), 1.0, 1.0]), 1e-6)


def test_eq7_retrieval_against_the_oracle():
    memory, q = filled(), normal(2, 3, 5, 4)
    a_mem = retrieve(q, memory)
    for b, h, t in np.ndindex(2, 3, 5):
        same(a_mem[b, h, t], o_read(q[b, h, t].numpy(), *(y[b, h].numpy() for y in memory)))


@pytest.mark.parametrize("dtype, autocast", [(torch.float64, False), (torch.float32, True),
                                             (torch.bfloat16, False), (torch.float16, False)])
@pytest.mark.parametrize("rule", RULES)
def test_eqs7_to_9_one_by_one_or_at_once_are_computed_in_float32_or_wider(rule, dtype, autocast):
    """Keys and values may be rounded. What is computed from them is not."""
    q, k = (normal(2, 3, 3, 5, 4, seed=seed).to(dtype) for seed in (9, 10))    # (B, S, H, N, d)
    v, memory = normal(2, 3, 3, 5, 6, seed=20).to(dtype), filled()
    wide, tolerance = (dtype, 1e-10) if dtype == torch.float64 else (torch.float32, 1e-5)
    before, reads = [Memory(*(y.to(wide) for y in memory))], []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        at_once = infini.scan(before[0], k, v, rule)
        for s in range(3):
            reads.append(retrieve(q[:, s], before[s]))
            update = {"linear": update_linear, "delta": update_delta}[rule]
            before.append(update(before[s], k[:, s], v[:, s]))
    assert all(y.dtype == wide for y in (*at_once, *reads, *before[-1]))
    q, k, v = (y.double().numpy() for y in (q, k, v))
    for b, h in np.ndindex(2, 3):
        M, z = (y[b, h].numpy() for y in memory)
        for s in range(4):
            same(before[s].M[b, h], M, tolerance)
            same(before[s].z[b, h], z, tolerance)
            same(at_once.M[b, s, h], M, tolerance)
            same(at_once.z[b, s, h], z, tolerance)
            if s < 3:
                same(reads[s][b, h], [o_read(row, M, z) for row in q[b, s, h]], tolerance)
                M, z = o_write(k[b, s, h], v[b, s, h], M, z, rule)


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
        if kind in ("infini-linear", "infini-delta"):
            for h, (M, z) in enumerate(memories):
                same(state.memory.M[b, h], M)
                same(state.memory.z[b, h], z)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_model_against_the_oracle(kind):
    model, tokens = make(kind), tokens_of(2, 18)
    logits, _ = model(tokens)
    for b in range(2):
        same(logits[b], o_model(model, tokens[b]))
    assert torch.equal(model(tokens.int())[0], logits)


def test_linear_memory_is_linear_attention_over_exactly_the_segments_before():
    layer, x = layer_of("infini-linear"), normal(2, 17, 12)
    with torch.no_grad():
        layer.beta.fill_(1e4)                                # nothing but the memory
        layer.w_o = torch.nn.Identity()
    a_mem, _ = layer(x)
    q, k, v = (y.detach().numpy() for y in layer.project(x))
    for b, h, t in np.ndindex(2, 3, 17):
        past = range(t // 5 * 5)                             # the segments before, not its own
        w = [o_sigma(q[b, h, t]) @ o_sigma(k[b, h, j]) for j in past]
        expected = sum(wj * v[b, h, j] for wj, j in zip(w, past)) / sum(w) if w else np.zeros(6)
        same(a_mem[b, t, h * 6:(h + 1) * 6], expected)


def test_each_equation_has_one_home_which_the_index_names():
    source = Path(infini.__file__).read_text(encoding="utf-8")
    numbers = [int(n) for n in re.findall(r"\bEqs?\. (\d+)", source)]
    assert sorted(numbers) == list(range(1, 12))
    index = re.findall(r"\b(\d+) \((-|\d+)\) (\w+)", infini.__doc__)
    assert [int(number) for number, _, _ in index] == list(range(1, 12))
    for number, in_version_1, name in index:
        home = getattr(infini, name, None) or getattr(InfiniAttention, name)
        assert re.search(rf"Eq\. {number}\b", home.__doc__), name
        assert in_version_1 == ("-" if int(number) < 5 else str(int(number) - 4))


# --- Contract 1: state is a value ----------------------------------------------------------------
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
    assert torch.equal(first, again) and not list(model.buffers())
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors_in(state)))
    for _ in range(2):                                       # a second backward works, too
        model(tokens)[0].sum().backward()


@pytest.mark.parametrize("T, chunk_len", [(4, 4), (5, 5), (53, 53), (53, 10), (60, 20), (53, 7),
                                          (60, 13), (53, 1), (5000, 1000), (5004, 333)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_has_the_size_of_table_1_and_is_no_view_of_something_larger(kind, T, chunk_len):
    _, state = stream(make(kind, torch.float32), tokens_of(1, T), chunk_len=chunk_len)
    token = 3 * (4 + 6)                                      # its key and value in 3 heads
    remembered = {"xl": 5 * token * (T >= 5), "local": 0, "full": 0}.get(kind, 3 * 4 * (6 + 1))
    still_open = token * (T if kind == "full" else T % 5)    # at most N - 1 = 4 tokens
    assert sum(t.numel() for t in tensors_in(state)) == 2 * (remembered + still_open)
    for t in tensors_in(state):
        assert t.untyped_storage().nbytes() == 4 * t.numel()


def test_tables_1_and_2_the_memory_of_the_papers_model_is_1_6m_numbers_and_that_of_xl_50m():
    sizes = dict(d_model=1024, n_layers=12, n_heads=8, d_key=128, d_value=128, d_ff=4096,
                 segment_len=2048)
    for attention, numbers in (("infini", 128 * (128 + 1) * 8 * 12), ("local", 0),
                               ("xl", (128 + 128) * 8 * 2048 * 12)):
        with torch.device("meta"):
            model = InfiniTransformer(InfiniConfig(attention=attention, **sizes))
            logits, state = model(torch.zeros(2, 32_768, dtype=torch.long))    # 16 segments
        assert sum(t.numel() for t in tensors_in(state)) == 2 * numbers
        logits.sum().backward()
        assert logits.shape == (2, 32_768, 256) and all(p.grad is not None for p in model.norm.parameters())


# --- Contract 2: chunking does not matter --------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_cutting_into_calls_gives_the_logits_of_one_call(kind, form):
    model, tokens = make(kind, form=form), tokens_of(2, 33)
    whole, state = model(tokens)
    draw = np.random.default_rng(0)
    ways = [[1] * 33, [5] * 6 + [3], [10, 10, 10, 3], [33], [4, 1, 5, 23], [1, 32]]
    for _ in range(6):
        ends = np.sort(draw.choice(np.arange(1, 33), draw.integers(1, 12), replace=False))
        ways.append(np.diff([0, *ends, 33]).tolist())
    for lengths in ways:
        logits, after = chunked(model, tokens, lengths)
        same(logits, whole)
        for a, b in zip(tensors_in(after), tensors_in(state)):
            same(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_from_call_to_call_as_in_one_call(kind):
    model, tokens = make(kind), tokens_of(2, 23)
    whole = gradients(model, tokens)
    model.zero_grad()
    logits, _ = chunked(model, tokens, [7, 1, 9, 6])
    (logits * normal(*logits.shape)).sum().backward()
    for name, p in model.named_parameters():
        same(p.grad, whole[name])


# --- Contract 3: two forms, one function ---------------------------------------------------------
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("kind", KINDS)
def test_parallel_equals_recurrent_gradients_too(kind, dtype, tolerance):
    tokens, results = tokens_of(2, 33), []
    for form in FORMS:
        model = make(kind, dtype, form=form)
        _, state = model(tokens[:, :7])
        logits, after = model(tokens[:, 7:], state)          # begins and ends inside a segment
        results.append([logits, *tensors_in(after), *gradients(model, tokens).values()])
    for a, b in zip(*results):
        scale = max(1.0, b.abs().max().item())
        same(a / scale, b / scale, tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_form_runs_its_own_code(kind, form, monkeypatch):
    """Otherwise the comparison of the two forms might compare a thing with itself."""
    calls = []
    for owner, name in ((InfiniAttention, "segment"), (infini, "baseline_segment"),
                        (infini, "segments_at_once")):
        def listen(*inputs, name=name, run=getattr(owner, name)):
            calls.append(name)
            return run(*inputs)
        monkeypatch.setattr(owner, name, listen)
    layer_of(kind, form=form)(normal(1, 52, 12))             # 10 segments and 2 tokens
    one = "segment" if kind.startswith("infini") else "baseline_segment"
    at_once = form == "parallel" and kind != "xl"
    expected = ["segments_at_once", one] if at_once else [one] * 11
    assert calls == ([one] if kind == "full" else expected)


# --- Contract 4: causality -----------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
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
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x)[0].sum((0, 2)),
                                                  normal(1, 18, 12))
    seen = jacobian.abs().sum((1, 3)) > 0
    segments_back = 0 if kind in ("local", "xl") else 18     # xl sends no gradient back
    for t, j in np.ndindex(18, 18):
        assert seen[t, j] == (j <= t and t // 5 - j // 5 <= segments_back)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_sees_its_whole_segment_and_the_past_only(kind, form):
    layer, x = layer_of(kind, causal=False, form=form), normal(2, 18, 12)
    o, state = layer(x)
    for b in range(2):
        same(o[b], o_layer(x[b].numpy(), weights_of(layer), layer.config)[0])
    with pytest.raises(ValueError, match="causal=False"):
        layer(x, state)                                      # 3 tokens are open
    if kind != "full":
        _, state = layer(x[:, :10])
        same(layer(x[:, 10:], state)[0], o[:, 10:])          # a call from where a segment begins


# --- Contract 5: gradients through the memory ----------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_gradcheck_through_three_segments(rule, form):
    layer = layer_of("infini-" + rule, form=form, segment_len=3, d_model=4, n_heads=2, d_key=2,
                     d_value=3)
    x = normal(2, 10, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *p: layer(x)[0], (x, *layer.parameters()), atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_the_last_segment_teaches_the_first_what_to_write(rule, form):
    layer, x = layer_of("infini-" + rule, form=form), normal(1, 20, 12).requires_grad_()
    layer(x)[0][:, 15:].sum().backward()
    assert (x.grad.abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_recomputes_segment_by_segment_stores_less_and_changes_no_gradient(kind):
    tokens, found, stored = tokens_of(2, 103), [], []
    for checkpoint in (False, True):
        model, saved = make(kind, checkpoint=checkpoint), []
        _, state = model(tokens[:, :3])
        calls = heard(model.blocks[0])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t,
                                                      lambda t: t):
            logits, _ = model(tokens[:, 3:], state)
        (logits * normal(*logits.shape)).sum().backward()
        found.append([p.grad for p in model.parameters()])
        stored.append(sum(saved))
    for a, b in zip(*found):
        same(a, b)
    forward = [100] if kind == "full" else [2, *[5] * 19, 3]
    assert [length for length, _ in calls] == forward + forward[::-1]
    assert stored[1] < 0.5 * stored[0]
    model.eval()
    same(model(tokens[:, 3:], state)[0], logits)
    assert calls[2 * len(forward):] == [(100, True)]         # nothing to store: all at once


# --- Contract 6 and 7: finite numbers, an empty memory -------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_half_precision_leaves_the_memory_in_float32_and_finite(rule, form, dtype):
    model, tokens = make("infini-" + rule, dtype, form=form), tokens_of(2, 203)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        logits, state = model(tokens)
    logits.float().sum().backward()
    assert all(t.dtype == torch.float32 for s in state for t in s.memory)
    expected = copy.deepcopy(model).double()(tokens)[1]
    same(state[0].memory.z / expected[0].memory.z, torch.ones(2, 3, 4), 0.02)
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_memory_counts_where_bfloat16_stops_at_256():
    k, v = torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 6)   # sigma(0) = 1
    for update in (update_linear, update_delta):
        memory = Memory.empty(1, 1, 4, 6)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(501):
                memory = update(memory, k, v)
        assert (memory.z == 1002).all() and memory.M.dtype == torch.float32


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_the_first_segment_is_exactly_one_minus_the_gate_times_a_dot(rule, form):
    layer = layer_of("infini-" + rule, form=form, dtype=torch.float32)
    x, layer.w_o = normal(2, 5, 12).float(), torch.nn.Identity()
    o, _ = layer(x)
    expected = (1 - torch.sigmoid(layer.beta)).view(3, 1, 1) * layer.attend(*layer.project(x))
    assert torch.equal(o, expected.transpose(1, 2).flatten(2))
    o.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_reading_an_empty_memory_gives_exactly_zero_with_finite_gradients():
    for scale in (1, 1e3):                                   # e^-1000 is 0 in any precision
        q = (scale * normal(2, 3, 5, 4).float()).requires_grad_()
        a_mem = retrieve(q, Memory.empty(2, 3, 4, 6))
        assert torch.equal(a_mem, torch.zeros(2, 3, 5, 6))
        a_mem.sum().backward()
        assert torch.isfinite(q.grad).all()
    q = torch.full((1, 1, 1, 4), -90.0, requires_grad=True)  # nothing in the memory answers
    retrieve(q, Memory(torch.ones(1, 1, 4, 6), torch.ones(1, 1, 4))).sum().backward()
    assert torch.isfinite(q.grad).all()


# --- Contract 8 and 9: positions, baselines ------------------------------------------------------
def test_the_memory_knows_no_order_inside_a_segment():
    layer, x = layer_of("infini-linear"), normal(2, 15, 12)
    order = torch.tensor([3, 0, 4, 2, 1, 6, 9, 5, 8, 7, 14, 10, 12, 11, 13])
    a, b, other = (layer(y)[1].memory for y in (x, x[:, order], x.flip(2)))
    same(a.M, b.M)
    same(a.z, b.z)
    assert (a.M - other.M).abs().max() > 0.1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_rope_changes_the_local_attention_and_not_the_memory(rule, form):
    x, layers = normal(2, 23, 12), [layer_of("infini-" + rule, rope_base=base, form=form)
                                    for base in (10.0, 1000.0)]
    (o, state), (other_o, other_state) = (layer(x) for layer in layers)
    assert all(torch.equal(a, b) for a, b in zip(state.memory, other_state.memory))
    assert (o - other_o).abs().max() > 1e-3
    for layer in layers:
        layer.beta.data.fill_(1e4)                           # queries have no positions either
    assert torch.equal(layers[0](x)[0], layers[1](x)[0])


def test_local_is_the_same_model_and_only_the_betas_are_missing():
    shapes = {kind: {n: p.shape for n, p in make(kind).named_parameters()} for kind in KINDS}
    betas = {f"blocks.{i}.attention.beta": (3,) for i in range(2)}
    assert shapes["infini-delta"] == shapes["infini-linear"] == {**shapes["local"], **betas}
    assert shapes["local"] == shapes["xl"] == shapes["full"]


@pytest.mark.parametrize("form", FORMS)
def test_a_gate_of_zero_is_the_local_model_and_a_gate_of_one_reads_the_memory_only(form):
    x = normal(2, 23, 12)
    layer, local = layer_of("infini-delta", form=form), layer_of("local", form=form)
    layer.load_state_dict(local.state_dict(), strict=False)
    for beta in (-1e4, -math.inf):
        layer.beta.data.fill_(beta)
        assert torch.equal(layer(x)[0], local(x)[0])
    layer.beta.data.fill_(math.inf)
    o = layer(x)[0]
    assert torch.equal(o[:, :5], torch.zeros(2, 5, 12)) and (o[:, 5:].abs().amax(-1) > 0).all()
    layer.attend = lambda q, k, v: torch.full_like(v, 7.0)
    assert torch.equal(layer(x)[0], o) or form == "recurrent"


def test_xl_sees_one_segment_back_but_sends_no_gradient_there():
    layer, x = layer_of("xl"), normal(1, 15, 12).requires_grad_()
    for changed, reaches in ((3, range(3, 10)), (6, range(6, 15))):
        y = x.detach().clone()
        y[0, changed] += 1
        differs = (layer(x)[0] - layer(y)[0])[0].abs().amax(-1) > 0
        assert differs.nonzero().flatten().tolist() == list(reaches)
    layer(x)[0][:, 10:].sum().backward()
    assert (x.grad[0, :10] == 0).all()


# --- What the memory can and can't hold ----------------------------------------------------------
def orthogonal_keys(n, sharp=800.0):
    """n keys with orthogonal sigma(k), which is 1 + sharp on one feature and e^-sharp on the
    others. At 800 that is 0 even in float64."""
    return torch.where(torch.eye(n, dtype=torch.bool), sharp, -sharp).double()[None, None]


@pytest.mark.parametrize("update", [update_linear, update_delta])
def test_orthogonal_keys_are_recalled_exactly(update):
    k, v = orthogonal_keys(8), normal(1, 1, 8, 6)
    memory = Memory.empty(1, 1, 8, 6, dtype=torch.float64)
    for s in range(4):                                       # two bindings per segment
        memory = update(memory, k[:, :, 2 * s:2 * s + 2], v[:, :, 2 * s:2 * s + 2])
    same(retrieve(k, memory), v)


def test_a_key_that_all_but_misses_the_memory_reads_a_mean_of_it_and_delta_subtracts_that():
    """The quotient of Eq. 7 tells what the past says, but not how little it agrees with a key."""
    k, v = orthogonal_keys(8, sharp=60.0), normal(1, 1, 8, 6)    # sigma is e^-60 where it was 0
    first = update_delta(Memory.empty(1, 1, 8, 6, dtype=torch.float64), k[:, :, :2], v[:, :, :2])
    third, value = k[:, :, 2:3], v[:, :, 2:3]
    leak = retrieve(third, first)
    same(leak, v[:, :, :2].mean(2, keepdim=True))
    same(retrieve(third, update_delta(first, third, value)), value - leak)
    same(retrieve(third, update_linear(first, third, value)), value)


def test_delta_leaves_m_unmodified_if_the_memory_already_answers_and_linear_does_not():
    memory, k = filled(), normal(2, 3, 5, 4)
    v = retrieve(k, memory)
    same(update_delta(memory, k, v).M, memory.M)
    assert (update_linear(memory, k, v).M - memory.M).abs().max() > 0.1
    same(update_delta(memory, k, v).z, update_linear(memory, k, v).z)


def test_a_binding_written_again_is_kept_by_linear_but_fades_under_delta():
    """z grows with every writing and M does not, so the paper's claim fails at the third."""
    k, v = orthogonal_keys(8)[:, :, :1], normal(1, 1, 1, 6)
    linear = delta = Memory.empty(1, 1, 8, 6, dtype=torch.float64)
    for share in (1, 1 / 2, (1 + 1 / 2) / 3, (3 / 2 + 1 / 2) / 4):
        linear, delta = update_linear(linear, k, v), update_delta(delta, k, v)
        same(retrieve(k, linear), v)
        same(retrieve(k, delta), share * v)


# --- The start, plug and play --------------------------------------------------------------------
def test_the_defaults_are_a_causal_infini_transformer_with_linear_and_delta():
    expected = dict(vocab_size=256, update="delta", attention="infini", causal=True, gate_init=0.0,
                    gate_spread=0.0, form="parallel", checkpoint=False)
    assert expected.items() <= asdict(InfiniConfig()).items()
    plugged = inject_memory(InfiniTransformer(replace(SMALL, attention="local"))).config
    assert (plugged.update, plugged.gate_init) == ("delta", 0.0)


def test_initial_weights_keep_the_variance_of_what_passes_through():
    torch.manual_seed(0)
    model = InfiniTransformer(InfiniConfig(vocab_size=384, d_model=128, n_layers=1, n_heads=3,
                                           d_key=96, d_value=16, d_ff=512))
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    for module in linear:
        y = module(normal(2000, module.in_features).float())
        assert y.var().item() == pytest.approx(1, abs=0.05)
    assert len(linear) == 7 and model.embedding.weight.var().item() == pytest.approx(1, abs=0.05)


def test_betas_start_at_gate_init_or_evenly_spaced_around_it():
    for n_heads, gate_init, spread, expected in ((4, -1.5, 6.0, [-4.5, -2.5, -0.5, 1.5]),
                                                 (3, 0.5, 2.0, [-0.5, 0.5, 1.5]),
                                                 (1, -2.0, 9.0, [-2.0]), (2, 3.0, 0.0, [3.0, 3.0])):
        config = replace(SMALL, n_heads=n_heads, gate_init=gate_init, gate_spread=spread)
        for block in InfiniTransformer(config).blocks:
            assert block.attention.beta.tolist() == pytest.approx(expected, abs=1e-6)
    local = InfiniTransformer(replace(SMALL, attention="local", gate_init=1.0, gate_spread=1.0))
    for block in inject_memory(local, gate_init=-3.0).blocks:
        assert block.attention.beta.tolist() == [-3.0] * 3


def test_gates_are_one_parameter_per_head_that_is_saved_and_trained():
    model = make("infini-delta")
    betas = [model.state_dict()[f"blocks.{i}.attention.beta"] for i in range(2)]
    same(model.gates(), torch.stack([1 / (1 + torch.exp(-beta)) for beta in betas]))
    assert model.gates().shape == (2, 3) and not model.gates().requires_grad
    found = gradients(model, tokens_of(2, 23))
    assert all((found[f"blocks.{i}.attention.beta"] != 0).all() for i in range(2))
    assert torch.equal(InfiniTransformer(SMALL).gates(), torch.full((2, 3), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_an_injected_memory_behind_closed_gates_changes_nothing(rule, dtype):
    local, tokens = make("local", dtype), tokens_of(2, 23)
    before = local(tokens)[0]
    model = inject_memory(local, update=rule, gate_init=-1e4)
    assert torch.equal(model(tokens)[0], before)
    same(inject_memory(local, update=rule, gate_init=-20)(tokens)[0], before, 1e-6)
    assert model.config == replace(local.config, attention="infini", update=rule, gate_init=-1e4)
    names = {n for n, _ in model.named_parameters()} - {n for n, _ in local.named_parameters()}
    assert names == {"blocks.0.attention.beta", "blocks.1.attention.beta"}    # nothing else is new
    opened = inject_memory(local, update=rule, gate_init=1.0)
    same(opened.gates(), np.full((2, 3), 1 / (1 + math.exp(-1))), 1e-6)
    same(opened(tokens)[0][0], o_model(opened, tokens[0]), 1e-4 if dtype == torch.float32 else 1e-6)
    opened.embedding.weight.data.zero_()                     # the old model keeps its own weights
    assert torch.equal(local(tokens)[0], before)


def test_an_injected_model_keeps_its_mode_and_precision():
    for dtype in (torch.float32, torch.float64):
        for training in (True, False):
            plugged = inject_memory(make("local", dtype).train(training))
            assert all(module.training == training for module in plugged.modules())
            assert all(p.dtype == dtype for p in plugged.parameters())


def test_a_memory_is_injected_only_if_every_weight_finds_its_place():
    normed, shorter, longer, extended = (make("local") for _ in range(4))
    torch.nn.utils.parametrizations.weight_norm(normed.blocks[1].attention.w_q)
    del shorter.blocks[1]
    longer.blocks.append(make("local").blocks[1])
    extended.blocks[0].attention.w_q.bias = torch.nn.Parameter(torch.ones(12))
    for model, name in ((torch.compile(make("local")), "_orig_mod.embedding.weight"),
                        (normed, "w_q.parametrizations"), (shorter, "blocks.1.norm1.weight"),
                        (longer, "blocks.2.norm1.weight"), (extended, "w_q.bias")):
        with pytest.raises(ValueError, match=f"weights of the model was .*{name}.* must be"):
            inject_memory(model)


# --- Streaming and generation --------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_equals_rerunning_the_whole_prefix(kind):
    model, text = make(kind), tokens_of(3, 13)
    out = generate(model, text, 9, temperature=0)
    for _ in range(9):
        text = torch.cat([text, model(text)[0][:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, text)
    assert torch.equal(generate(model, tokens_of(3, 13), 9, temperature=0), out)
    assert torch.equal(generate(model, tokens_of(3, 13), 0), tokens_of(3, 13))


def test_a_text_goes_on_from_the_state_of_the_text_before():
    model, text, seen = make(), tokens_of(2, 123), []
    logits, state = stream(model, text[:, :100], chunk_len=11)
    same(logits, model(text[:, :100])[0][:, -1])
    same(stream(model, text[:, 100:], state)[0], model(text)[0][:, -1])
    out = generate(model, text[:, 100:], 5, temperature=0, state=state, on_token=seen.append)
    assert torch.equal(out[:, 23:], generate(model, text, 5, temperature=0)[:, 123:])
    assert torch.equal(torch.stack(seen, 1), out[:, 23:])


def test_streaming_and_generation_read_in_chunks_and_keep_no_graph():
    model, text = make(), tokens_of(1, 5000)
    calls = heard(model)
    logits, state = stream(model, text[:, :123], chunk_len=50)
    assert calls == [(50, False), (50, False), (23, False)]
    assert not any(t.requires_grad for t in (logits, *tensors_in(state)))
    calls.clear()
    generate(model, text, 4)                                 # a new token costs a call of length 1
    assert calls == [(length, False) for length in (2048, 2048, 904, 1, 1, 1)]


def test_samples_follow_temperature_and_top_p_and_repeat_with_the_generators_seed():
    model, prompt = make(), tokens_of(1, 8).expand(4000, 8)

    def draw(seed=0, **settings):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, prompt, 1, generator=generator, **settings)[:, -1]
    assert torch.equal(draw(), draw()) and not torch.equal(draw(), draw(1))
    logits = model(prompt[:1])[0][0, -1].detach().numpy()
    for settings in ({}, dict(temperature=0.5), dict(temperature=2.0), dict(top_p=0.3),
                     dict(temperature=2.0, top_p=0.7), dict(top_p=np.float64(0.7))):
        p = np.exp(logits / settings.get("temperature", 1.0))
        p, order = p / p.sum(), np.argsort(-p)
        nucleus = order[:np.searchsorted(np.cumsum(p[order]), settings.get("top_p", 1.0)) + 1]
        frequency = np.bincount(draw(**settings), minlength=17) / 4000
        assert set(np.flatnonzero(frequency)) <= set(nucleus.tolist())
        expected = np.where(np.isin(np.arange(17), nucleus), p, 0) / p[nucleus].sum()
        assert np.abs(frequency - expected).max() < 0.04     # five standard deviations


def test_top_p_takes_no_token_more_than_needed_and_a_tiny_temperature_the_likeliest():
    model, prompt = make(vocab_size=4), torch.zeros(500, 3, dtype=torch.long)
    greedy = generate(model, prompt, 1, temperature=0)
    for tiny in (dict(temperature=1e-300), dict(temperature=5e-324), dict(top_p=1e-300)):
        assert torch.equal(generate(model, prompt, 1, **tiny), greedy)
    torch.nn.init.zeros_(model.head.weight)                  # four tokens of probability 1/4
    torch.manual_seed(0)
    for top_p, many in ((0.2, 1), (0.25, 1), (0.5, 2), (0.51, 3), (1.0, 4)):
        assert len(generate(model, prompt, 1, top_p=top_p)[:, -1].unique()) == many


# --- Contract 10: devices, compile, files, transforms --------------------------------------------
HERE = [torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else []


@pytest.mark.parametrize("device", ["meta", *HERE])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_where_to_has_put_it(kind, checkpoint, device):
    """The meta device has no numbers, but refuses to mix with another device."""
    model, tokens = make(kind, torch.float32, checkpoint=checkpoint), tokens_of(2, 23)
    there = copy.deepcopy(model).to(device)
    logits, state = chunked(there, tokens.to(device), [13, 7, 3])
    logits.sum().backward()
    text = generate(there, tokens.to(device), 3, temperature=0)
    assert text.shape == (2, 26) and logits.shape == (2, 23, 17)
    found = (logits, text, *tensors_in(state), *(p.grad for p in there.parameters()))
    assert {t.device.type for t in found} == {device}
    if kind == "local":
        assert inject_memory(there)(tokens.to(device))[0].device.type == device
    if device != "meta":
        same(logits.cpu(), model(tokens)[0], 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_config_and_state_load_with_weights_only(kind):
    model, file, tokens = make(kind, segment_len=np.int64(5)), io.BytesIO(), tokens_of(1, 13)
    logits, state = model(tokens)
    torch.save((model.state_dict(), asdict(model.config), state), file)
    file.seek(0)
    with torch.serialization.safe_globals([State, Memory, infini.Previous]):
        weights, config, loaded = torch.load(file, weights_only=True)
    other = InfiniTransformer(InfiniConfig(**config)).double()
    other.load_state_dict(weights)
    assert torch.equal(other(tokens)[0], logits)
    assert torch.equal(other(tokens, loaded)[0], model(tokens, state)[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute")    # torch.compile looks at it, we don't
@pytest.mark.parametrize("rule", RULES)
def test_a_compiled_model_gives_the_same_logits(rule):
    model, tokens = make("infini-" + rule, n_layers=1), tokens_of(2, 13)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    logits, state = compiled(tokens)                         # this backend needs no C++ compiler
    same(logits, model(tokens)[0])
    same(compiled(tokens, state)[0], model(tokens, state)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_per_document_by_vmap_are_those_of_one_document_at_a_time(kind):
    model, tokens = make(kind), tokens_of(3, 13)
    weights = dict(model.named_parameters())

    def cost(weights, row):
        return torch.func.functional_call(model, weights, (row[None],))[0].square().sum()
    found = torch.func.vmap(torch.func.grad(cost), (None, 0))(weights, tokens)
    for b in range(3):
        expected = torch.autograd.grad(cost(weights, tokens[b]), list(weights.values()))
        for name, gradient in zip(weights, expected):
            same(found[name][b], gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_fake_tensors_find_the_shapes_of_a_model(kind):
    with FakeTensorMode():
        model, tokens = make(kind), torch.zeros(2, 13, dtype=torch.long)
        logits, state = model(tokens)
        assert logits.shape == model(tokens, state)[0].shape == (2, 13, 17)


# --- Contract 11: bad input ----------------------------------------------------------------------
@pytest.mark.parametrize("field, value, must", [
    ("segment_len", 0, "a whole number of at least 1"), ("segment_len", 2.5, "a whole number"),
    ("d_key", 3, "even"), ("d_key", 0, "a whole number"), ("n_heads", -1, "a whole number"),
    ("n_layers", True, "a whole number"), ("d_model", "64", "a whole number"),
    ("vocab_size", None, "a whole number"), ("d_ff", 10 ** 400, "a whole number"),
    ("update", "hebb", "one of linear, delta"), ("form", ["parallel"], "one of parallel, rec"),
    ("attention", "flash", "one of infini, local, xl, full"), ("causal", 1, "one of True, False"),
    ("checkpoint", "no", "one of True, False"), ("rope_base", 0.0, "positive"),
    ("rope_base", -2.0, "positive"), ("rope_base", 10 ** 400, "a finite number"),
    ("gate_init", math.nan, "a finite number"), ("gate_init", "0", "a finite number"),
    ("gate_spread", math.inf, "a finite number"), ("gate_spread", False, "a finite number")])
def test_a_config_that_makes_no_sense_is_refused_by_the_name_of_its_field(field, value, must):
    with pytest.raises(ValueError) as error:
        replace(SMALL, **{field: value})
    assert str(error.value).startswith(f"{field} was {value!r}, must be {must}")


def test_numpys_numbers_are_numbers_and_become_pythons():
    config = replace(SMALL, d_model=np.int64(16), n_layers=np.uint8(1), rope_base=np.float32(50),
                     gate_init=np.int32(-1), gate_spread=2)
    expected = dict(d_model=16, n_layers=1, rope_base=50.0, gate_init=-1.0, gate_spread=2.0)
    for name, value in expected.items():
        assert getattr(config, name) == value and type(getattr(config, name)) is type(value)
    text = generate(InfiniTransformer(config), tokens_of(1, 3), np.int64(2), np.float32(0.5))
    assert text.shape == (1, 5)
    with pytest.raises(FrozenInstanceError):                 # nothing changes after it was checked
        config.d_model = 3


def test_bad_tokens_states_and_settings_are_refused_with_one_line():
    model, tokens, x = make(), tokens_of(2, 13), normal(2, 13, 12)
    local, xl, encoder = make("local"), make("xl"), make(causal=False)
    layer, (_, state), (_, of_local), (_, of_xl) = (model.blocks[0].attention, model(tokens),
                                                    local(tokens), xl(tokens))
    (s, _), meta = state, [y.to("meta") for y in state[0].memory]
    cases = [
        (lambda: model(tokens + 17), "tokens was in 17 ... 32, must be in 0 ... 16"),
        (lambda: model(tokens - 1), "tokens was in -1 ... 15, must be in 0 ... 16"),
        (lambda: model(tokens + 1), "tokens was in 1 ... 17, must be in 0 ... 16"),
        (lambda: model(tokens.float()), "tokens of dtype was torch.float32, must be int64 or int"),
        (lambda: model(tokens > 3), "tokens of dtype was torch.bool"),
        (lambda: model(tokens.byte()), "tokens of dtype was torch.uint8"),
        (lambda: model(tokens[0]), "tokens of shape was (13,), must be (B, T), not empty"),
        (lambda: model(tokens[:, :0]), "tokens of shape was (2, 0)"),
        (lambda: model(tokens[:0]), "tokens of shape was (0, 13)"),
        (lambda: model(tokens.tolist()), "tokens was list, must be a tensor of shape (B, T)"),
        (lambda: model(tokens.to("meta")), "tokens on device was meta, must be cpu"),
        (lambda: model(tokens, 3), "state was int, must be None or a list of 2 States"),
        (lambda: model(tokens, s), "state was State, must be None or a list"),
        (lambda: model(tokens, tuple(state)), "state was tuple, must be None or a list"),
        (lambda: model(tokens, state[:1]), "state was list, must be None or a list of 2 States"),
        (lambda: model(tokens, []), "state was list, must be None or a list of 2 States"),
        (lambda: model(tokens, [None, s]), "state was list, must be None or a list of 2 States"),
        (lambda: layer(x[0]), "x of shape was (13, 12), must be (B, T, 12) with T of at least 1"),
        (lambda: layer(x[..., :7]), "x of shape was (2, 13, 7), must be (B, T, 12)"),
        (lambda: layer(x[:, :0]), "x of shape was (2, 0, 12)"),
        (lambda: layer(x, tuple(s)), "state was tuple, must be a State"),
        (lambda: layer(x, s.memory), "state was Memory, must be a State"),
        (lambda: local(tokens, state), "state with memory was Memory, must be NoneType"),
        (lambda: model(tokens, of_local), "state with memory was NoneType, must be Memory"),
        (lambda: model(tokens, of_xl), "state with memory was Previous, must be Memory"),
        (lambda: xl(tokens, state), "state with memory was Memory, must be Previous"),
        (lambda: model(tokens[:1], state), "state.memory of shape was (2, 3, 4, 6), must be [1, 3"),
        (lambda: local(tokens[:1], of_local), "state.k of shape was (2, 3, 3, 4), must be [1, 3, "),
        (lambda: xl(tokens[:1], of_xl), "state.memory of shape was (2, 3, 5, 4), must be [1, 3, "),
        (lambda: make(n_heads=2)(tokens, state), "state.memory of shape was (2, 3, 4, 6), must be"),
        (lambda: make("local", d_value=8)(tokens, of_local), "state.v of shape was (2, 3, 3, 6)"),
        (lambda: make("local", d_key=6)(tokens, of_local), "state.k of shape was (2, 3, 3, 4)"),
        (lambda: layer(x, s._replace(k=s.k[0])), "state.k of shape was (3, 3, 4), must be [2, 3, "),
        (lambda: layer(x, s._replace(memory=s.memory._replace(z=s.k))), "state.memory of shape"),
        (lambda: layer(x, s._replace(k=s.k.to("meta"))), "state.k on device was meta, must be cpu"),
        (lambda: layer(x, s._replace(memory=Memory(*meta))), "state.memory on device was meta"),
        (lambda: make(dtype=torch.float32)(tokens, state), "state.memory of dtype was torch.float64"
         ", must be torch.float32 for an x of torch.float32"),
        (lambda: make(segment_len=3)(tokens, state), "state with open tokens was 3, must be below "
         "segment_len = 3"),
        (lambda: encoder(tokens, state), "state with open tokens was 3, must be 0 at a call with"),
        (lambda: local.gates(), "attention was local, must be infini"),
        (lambda: inject_memory(model), "attention was infini, must be local"),
        (lambda: inject_memory(local, update="hebb"), "update was 'hebb', must be one of linear"),
        (lambda: inject_memory(local, gate_init="0"), "gate_init was '0', must be a finite number"),
        (lambda: stream(model, tokens, chunk_len=0), "chunk_len was 0, must be a whole number"),
        (lambda: stream(model, tokens.tolist()), "tokens was list, must be a tensor"),
        (lambda: generate(model, tokens, -1), "max_new_tokens was -1, must be a whole number of"),
        (lambda: generate(model, tokens, 2.0), "max_new_tokens was 2.0, must be a whole number"),
        (lambda: generate(model, tokens, 3, -0.1), "temperature was -0.1, must be a finite number "
         "of at least 0"),
        (lambda: generate(model, tokens, 3, math.nan), "temperature was nan, must be a finite"),
        (lambda: generate(model, tokens, 3, "a"), "temperature was 'a', must be a finite number"),
        (lambda: generate(model, tokens, 3, top_p=0), "top_p was 0, must be above 0 and at most 1"),
        (lambda: generate(model, tokens, 3, top_p=1.5), "top_p was 1.5, must be above 0 and at"),
        (lambda: generate(model, tokens, 3, top_p=None), "top_p was None, must be a finite number"),
        (lambda: generate(model, tokens[:, :0], 3), "tokens of shape was (2, 0)"),
        (lambda: generate(model, tokens.tolist(), 3), "tokens was list, must be a tensor"),
        (lambda: generate(encoder, tokens, 3), "causal was False, must be True"),
    ]
    for call, line in cases:
        try:
            call()
        except ValueError as error:
            refusal = str(error)
        else:
            refusal = "not refused"
        assert refusal.startswith(line) and re.fullmatch(r".+ was .+, must be .+", refusal)


# --- Hard to break -------------------------------------------------------------------------------
@pytest.mark.parametrize("part", range(4))
def test_200_random_models_texts_and_cuts_agree_with_the_oracle(part):
    """Kinds, sizes, lengths, forms, checkpoints, precisions, causal or not, and where calls end."""
    for seed in range(50 * part, 50 * part + 50):
        draw = random.Random(seed)
        kind, causal = draw.choice(KINDS), draw.random() < 0.8
        dtype = draw.choice([torch.float64] * 3 + [torch.float32])
        sizes = dict(d_model=draw.randint(1, 9), n_layers=draw.randint(1, 2),
                     n_heads=draw.randint(1, 3), d_key=2 * draw.randint(1, 3),
                     d_value=draw.randint(1, 5), d_ff=draw.randint(1, 9),
                     segment_len=draw.randint(1, 7), rope_base=draw.choice([1.5, 50.0, 1e4]),
                     causal=causal, form=draw.choice(FORMS), checkpoint=draw.random() < 0.3)
        model, T, N = make(kind, dtype, seed, **sizes), draw.randint(1, 30), sizes["segment_len"]
        tokens = tokens_of(draw.randint(1, 2), T, seed)
        # An encoder goes on where a segment begins. If it is a "full" one, it can't go on at all.
        ends = range(1, T) if causal else [] if kind == "full" else range(N, T, N)
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


@pytest.mark.parametrize("rule, dtype, repeated", [
    ("linear", torch.float32, True), ("linear", torch.bfloat16, False),
    ("delta", torch.float32, False), ("delta", torch.bfloat16, True)])
def test_a_million_tokens_leave_finite_numbers_and_a_memory_that_counted_them_all(rule, dtype,
                                                                                  repeated):
    model, n = make("infini-" + rule, dtype, d_model=8, n_layers=1, n_heads=1, d_key=4, d_value=4,
                    d_ff=8, segment_len=64), 2 ** 20
    tokens = torch.full((1, n), 3) if repeated else tokens_of(1, n)
    logits, state = stream(model, tokens)
    M, z = (y[0, 0] for y in state[0].memory)
    assert all(torch.isfinite(y).all() for y in (logits, M, z)) and M.abs().max() > 1
    with torch.no_grad():                                    # each token's key and value
        x = model.blocks[0].norm1(model.embedding(torch.arange(SMALL.vocab_size)[None]))
        _, k, v = (y[0, 0].double().numpy() for y in model.blocks[0].attention.project(x))
    counts = np.bincount(tokens[0].numpy(), minlength=SMALL.vocab_size)
    weights = np.stack([count * o_sigma(row) for count, row in zip(counts, k)])
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    same(z / torch.from_numpy(weights.sum(0)), np.ones(4), tolerance)
    if rule == "linear":
        same(M / np.abs(weights.T @ v).max(), weights.T @ v / np.abs(weights.T @ v).max(), tolerance)


@pytest.mark.parametrize("rule", RULES)
def test_in_float32_the_memory_of_a_long_text_answers_as_in_float64(rule):
    model, tokens = make("infini-" + rule, torch.float32), tokens_of(1, 2 ** 15)
    (logits, _), (expected, _) = (stream(m, tokens) for m in (model, copy.deepcopy(model).double()))
    assert 0 < (logits - expected).abs().max() < 1e-5 * expected.abs().max()
