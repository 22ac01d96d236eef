"""The claims about infini.py, each tested against something that shares no code with it. The oracle
is float64 NumPy, written from the equations as loops over single tokens, slow and plain."""
import io
import math
import random
import re
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import infini
from infini import InfiniConfig, InfiniTransformer, Memory, State, generate, inject_memory, stream

torch.set_num_threads(1)    # everything here is too small to share
RULES = ["linear", "delta"]
FORMS = ["parallel", "recurrent"]
KINDS = ["infini-linear", "infini-delta", "local", "xl", "full"]
SMALL = InfiniConfig(vocab_size=17, d_model=12, n_layers=2, n_heads=3, d_key=4, d_value=6, d_ff=20,
                     segment_len=5, rope_base=10.0)

def pytest_generate_tests(metafunc):    # run a test with each rule, form or kind that it takes
    for name, values in (("rule", RULES), ("form", FORMS), ("kind", KINDS)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)

# --- The oracle ----------------------------------------------------------------------------------
def o_sigma(x):
    return np.array([xi + 1 if xi > 0 else math.exp(xi) for xi in x])

def o_rotate(x, position, base):
    half = len(x) // 2                                       # a feature and its partner are one
    turn = np.exp(1j * position * base ** (-np.arange(half) / half))    # complex number
    y = (x[:half] + 1j * x[half:]) * turn
    return np.concatenate([y.real, y.imag])

def o_attend(q, k, v):
    """Eq. 6 for one token that sees all of the keys."""
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
    T, N, a = len(q), c.segment_len, np.zeros((len(q), c.d_value))
    M, z = np.zeros((c.d_key, c.d_value)), np.zeros(c.d_key)
    for t in range(T):
        start, end = t // N * N, min(T, (t // N + 1) * N)    # of its segment
        if t == start > 0:
            M, z = o_write(k[t - N:t], v[t - N:t], M, z, c.update)
        first = {"xl": max(0, start - N), "full": 0}.get(c.attention, start)
        seen = range(first, t + 1 if c.causal else T if c.attention == "full" else end)
        keys = [o_rotate(k[j], j, c.rope_base) for j in seen]
        a[t] = o_attend(o_rotate(q[t], t, c.rope_base), keys, v[first:])
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

def o_norm(x, gain, eps):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + eps) * gain

def o_model(model, tokens):
    """The whole InfiniTransformer for one document. tokens: (T,). Returns (T, vocab_size)."""
    w, c, eps = weights_of(model), model.config, torch.finfo(model.head.weight.dtype).eps
    x = w["embedding.weight"][np.asarray(tokens)]
    for i in range(c.n_layers):
        at = f"blocks.{i}."
        layer = {n.removeprefix(at + "attention."): p for n, p in w.items() if n.startswith(at)}
        x = x + o_layer(o_norm(x, w[at + "norm1.weight"], eps), layer, c)[0]
        y = o_norm(x, w[at + "norm2.weight"], eps) @ w[at + "up.weight"].T
        gelu = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        x = x + gelu @ w[at + "down.weight"].T
    return o_norm(x, w["norm.weight"], eps) @ w["head.weight"].T

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
    k, v = normal(B, H, 7, d_key, seed=seed), normal(B, H, 7, d_value, seed=seed + 1)
    return infini.update_linear(memory, k, v)

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

def refused(line, call, *inputs, **settings):
    """Require a refusal that begins with this line: what was wrong, and what it must be."""
    with pytest.raises(ValueError) as error:
        call(*inputs, **settings)
        pytest.fail(f"not refused: {line}")
    assert re.fullmatch(f"(?=.+ was .+, must be .+){re.escape(line)}.*", str(error.value))

# --- Eqs. 1-11 against NumPy ---------------------------------------------------------------------
def test_each_equation_of_the_paper_has_one_home_in_the_code():
    source = Path(infini.__file__).read_text(encoding="utf-8")
    assert sorted(map(int, re.findall(r"\bEqs?\. (\d+)", source))) == list(range(1, 12))
    index = re.findall(r"\b(\d+) \((-|\d+)\) \w+", infini.__doc__)    # numbers of both versions
    assert index == [(str(n), str(n - 4) if n > 4 else "-") for n in range(1, 12)]

def test_eq1_rnn_carries_the_past_in_one_vector():
    x, h, w_x, w_h = normal(2, 3), normal(2, 4, seed=3), normal(3, 4), normal(4, 4)
    same(infini.rnn(x, h, w_x, w_h), np.tanh(x.numpy() @ w_x.numpy() + h.numpy() @ w_h.numpy()))

def test_eq2_mnm_reads_the_past_by_a_forward_pass_and_then_writes_by_a_gradient_step():
    x, h, w1, w2 = normal(2, 3), normal(2, 4, seed=3), 0.3 * normal(5, 16), 0.3 * normal(16, 4)
    w_x, w_h, w_q, w_k = normal(3, 4), normal(4, 4), normal(4, 5), normal(4, 5, seed=8)
    w_v = normal(4, 4, seed=9).requires_grad_()
    h1, theta = infini.mnm(x, h, [w1, w2], w_x, w_h, w_q, w_k, w_v, lr=0.1)
    c = np.tanh(x.numpy() @ w_x.numpy() + h.numpy() @ w_h.numpy())
    w1, w2, q, k, v = (w1.numpy(), w2.numpy(), *(c @ w.detach().numpy() for w in (w_q, w_k, w_v)))
    same(h1, c + np.tanh(q @ w1) @ w2)
    hidden = np.tanh(k @ w1)
    error = v - hidden @ w2                                  # the gradient by hand
    same(theta[0], w1 + 0.1 * k.T @ (error @ w2.T * (1 - hidden ** 2)))
    same(theta[1], w2 + 0.1 * hidden.T @ error)
    h2, _ = infini.mnm(x, h1, theta, w_x, w_h, w_q, w_k, w_v)
    assert torch.autograd.grad(h2.sum(), w_v)[0].abs().max() > 0    # what to write can be learned
    k, v, M = torch.tensor(k), torch.tensor(v), normal(5, 4)     # one matrix: the delta rule
    same(infini.mnm_write([M], k, v)[0], M + k.T @ (v - k @ M))

@pytest.mark.parametrize("L", [5, 8])
def test_eqs3_and_6_attention_is_causal_by_default_and_divides_by_the_root_of_d_key(L):
    x, w_q, w_k, w_v = normal(2, L, 12), normal(12, 4), normal(12, 4, seed=3), normal(12, 6, seed=4)
    q, k, v = x[:, L - 5:] @ w_q, x @ w_k, x @ w_v           # queries of the last 5 tokens
    plain, causal = infini.attention(x, w_q, w_k, w_v)[:, L - 5:], infini.local_attention(q, k, v)
    both_ways = infini.local_attention(q, k, v, causal=False)
    for b, t in np.ndindex(2, 5):
        seen = L - 5 + t + 1
        same(causal[b, t], o_attend(q[b, t], k[b, :seen], v[b, :seen]))
        same(plain[b, t], causal[b, t])
        same(both_ways[b, t], o_attend(q[b, t], k[b], v[b]))

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.bfloat16, 0.03),
                                              (torch.float16, 0.004)])
def test_rope_turns_pairs_by_angles_that_are_exact_in_half_precision_too(dtype, tolerance):
    x, positions = normal(5, 32).to(dtype), torch.tensor([0, 1, 2, 1023, 2047])
    turned = infini.rotary(x, positions, 10_000.0)
    assert turned.dtype == dtype
    for y, row, position in zip(turned, x.double().numpy(), positions.tolist()):
        same(y.double(), o_rotate(row, position, 10_000.0), tolerance)

def test_sigma_is_elu_plus_one_and_keeps_small_weights_that_float32_elu_plus_one_loses():
    x = torch.linspace(-60, 30, 91, requires_grad=True)
    same(infini.sigma(x).detach().double().numpy() / o_sigma(x.tolist()), np.ones(91), 1e-5)
    assert torch.nn.functional.elu(x).min() == -1 and infini.sigma(x.half()).dtype == torch.float32
    infini.sigma(x).sum().backward()
    same(x.grad, np.minimum(1, np.exp(x.detach().double().numpy())), 1e-5)

@pytest.mark.parametrize("dtype, autocast", [(torch.float64, False), (torch.float32, True),
                                             (torch.bfloat16, False), (torch.float16, False)])
def test_eqs7_to_9_one_by_one_or_at_once_are_computed_in_float32_or_wider(rule, dtype, autocast):
    """Queries, keys and values may be rounded. What is computed from them is not."""
    q, k = (normal(4, 2, 3, 5, 4, seed=seed).to(dtype) for seed in (9, 10))    # (S, B, H, N, d)
    v, wide = normal(4, 2, 3, 5, 6, seed=20).to(dtype), torch.promote_types(dtype, torch.float32)
    memory, update = Memory(*(y.to(wide) for y in filled())), infini.UPDATE[rule]
    before, reads, tolerance = [memory], [], 1e-10 if dtype == torch.float64 else 1e-5
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        at_once = infini.scan(memory, k, v, rule)
        for s in range(4):
            reads.append(infini.retrieve(q[s], before[s]))
            before.append(update(before[s], k[s], v[s]))
    assert all(y.dtype == wide for y in (*at_once, *reads, *before[-1]))
    q, k, v = (y.double().numpy() for y in (q, k, v))
    for b, h in np.ndindex(2, 3):
        M, z = (y[b, h].double().numpy() for y in memory)
        for s in range(4):
            same(reads[s][b, h], np.array([o_read(row, M, z) for row in q[s, b, h]]), tolerance)
            M, z = o_write(k[s, b, h], v[s, b, h], M, z, rule)
            for one, every, expected in zip(before[s + 1], at_once, (M, z)):
                same(one[b, h], expected, tolerance)
                same(every[s + 1, b, h], expected, tolerance)

@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [3, 5, 20, 23])
def test_eqs4_5_10_and_11_a_layer_reads_many_segments_as_the_oracle_does(kind, form, T, causal):
    layer, x = layer_of(kind, form=form, causal=causal), normal(2, T, 12)
    o, state = layer(x)
    for b in range(2):                                       # two documents never touch
        expected, memories = o_layer(x[b].numpy(), weights_of(layer), layer.config)
        same(o[b], expected)
        if kind.startswith("infini"):
            for h, (M, z) in enumerate(memories):
                same(state.memory.M[b, h], M)
                same(state.memory.z[b, h], z)

# --- Contract 1 and 2: state is a value of fixed size, and calls may end anywhere ----------------
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
def test_a_state_has_the_size_of_table_1_and_is_no_view_of_something_larger(kind, T, chunk_len):
    _, state = stream(make(kind, torch.float32, n_layers=1), tokens_of(1, T), chunk_len=chunk_len)
    token = 3 * (4 + 6)                                      # its key and value in 3 heads
    remembered = {"xl": 5 * token * (T >= 5), "local": 0, "full": 0}.get(kind, 3 * 4 * (6 + 1))
    still_open = token * (T if kind == "full" else T % 5)    # at most N - 1 = 4 tokens
    assert sum(t.numel() for t in tensors_in(state)) == remembered + still_open
    assert all(t.untyped_storage().nbytes() == 4 * t.numel() for t in tensors_in(state))

@pytest.mark.parametrize("attention, numbers", [("infini", 128 * (128 + 1) * 8 * 12),    # 1.6M
                                                ("xl", (128 + 128) * 8 * 2048 * 12)])    # 50M
def test_table_2_the_papers_own_sizes_fit_together_and_need_the_papers_memory(attention, numbers):
    with torch.device("meta"):
        model = InfiniTransformer(InfiniConfig(
            d_model=1024, n_layers=12, n_heads=8, d_key=128, d_value=128, d_ff=4096,
            segment_len=2048, attention=attention))
        logits, state = model(torch.zeros(2, 32_768, dtype=torch.long))    # 16 segments
        logits.sum().backward()
    assert logits.shape == (2, 32_768, 256)
    assert sum(t.numel() for t in tensors_in(state)) == 2 * numbers

def test_any_cutting_into_calls_gives_the_logits_of_one_call_and_its_gradients(kind, form):
    model, tokens = make(kind, form=form), tokens_of(2, 33)
    whole, state = model(tokens)
    expected, draw = gradients(model, tokens), np.random.default_rng(0)
    ways = [[1] * 33, [5] * 6 + [3], [10, 10, 10, 3], [33], [4, 1, 5, 23], [1, 32]]
    for _ in range(6):
        ends = np.sort(draw.choice(np.arange(1, 33), draw.integers(1, 12), replace=False))
        ways.append(np.diff([0, *ends, 33]).tolist())
    for lengths in ways:
        logits, after = chunked(model, tokens, lengths)
        for a, b in zip((logits, *tensors_in(after)), (whole, *tensors_in(state)), strict=True):
            same(a, b)
    model.zero_grad()
    (logits * normal(*logits.shape)).sum().backward()        # through the states of several calls
    for name, p in model.named_parameters():
        same(p.grad, expected[name])

@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_text_that_is_only_read_asks_nothing_of_the_last_layer(kind, form, checkpoint):
    model, tokens = make(kind, form=form, checkpoint=checkpoint), tokens_of(2, 33)
    first, last = (heard(block.up) for block in model.blocks)
    for cut in (1, 5, 18, 30):
        results = []
        for predict in (True, False):
            first.clear(), last.clear(), model.zero_grad()
            nothing, state = model(tokens[:, :cut], predict=predict)
            assert [sum(n for n, _ in calls) for calls in (first, last)] == [cut, cut * predict]
            logits, after = model(tokens[:, cut:], state)
            (logits * normal(*logits.shape)).sum().backward()
            results.append([logits, *tensors_in(state), *tensors_in(after),
                            *(p.grad.clone() for p in model.parameters())])
        assert nothing.shape == (2, 0, 17)
        for a, b in zip(*results, strict=True):
            same(a, b)

# --- Contract 3 to 5: two forms of one function, no future, gradients through the memory ----------
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
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

def test_each_form_runs_its_own_code(kind, form, monkeypatch):
    calls, run = [], infini.segments_at_once
    monkeypatch.setattr(infini, "segments_at_once", lambda layer, q, *rest: (
        calls.append(q.shape[2]), run(layer, q, *rest))[1])
    layer_of(kind, form=form)(normal(1, 52, 12))             # 10 segments and 2 tokens
    at_once = form == "parallel" and kind not in ("xl", "full")
    assert calls == ([50] if at_once else [])                # "full" has a single segment
    for N in (511, 512) if at_once else ():                  # long segments go one by one
        layer_of(kind, form=form, segment_len=N)(normal(1, 1030, 12))
    assert calls == ([50, 1022] if at_once else [])

@pytest.mark.parametrize("causal, calls", [(True, [300, 500, 1, 499]), (False, [1300])])
def test_eq6_is_the_same_by_the_kernel_that_long_segments_use(kind, causal, calls, monkeypatch):
    x, results = normal(2, 1300, 12).requires_grad_(), []    # segments of 512, 512 and 276 tokens
    layer = layer_of(kind, segment_len=512, causal=causal, d_value=4)    # as d_key, for the kernel
    for kernel in (infini.fused_attention, infini.local_attention):
        monkeypatch.setattr(infini, "fused_attention", Mock(side_effect=kernel))
        outputs, state = [], None
        for piece in x.split(calls, 1):
            o, state = layer(piece, state)
            outputs.append(o)
        assert infini.fused_attention.called
        o = torch.cat(outputs, 1)
        results.append([o, *torch.autograd.grad(o.square().sum(), [x, *layer.parameters()])])
    for a, b in zip(*results):
        same(a, b)
    monkeypatch.setattr(infini, "fused_attention", None)     # not called for short ones
    if kind != "full":
        layer_of(kind, segment_len=511)(x.detach())

def test_no_logit_depends_on_a_later_token_or_on_another_document(kind, form):
    model, tokens = make(kind, form=form), tokens_of(1, 18).repeat(19, 1)
    for t in range(18):                                      # one token differs in each document
        tokens[t, t] = (tokens[t, t] + 1) % SMALL.vocab_size
    *changed, logits = model(tokens)[0]
    for t in range(18):
        same(changed[t][:t], logits[:t])
        assert (changed[t][t] - logits[t]).abs().max() > 1e-3

def test_gradients_flow_through_the_memory_of_three_segments(rule, form):
    layer = layer_of("infini-" + rule, form=form, segment_len=3, d_model=4, n_heads=2, d_key=2,
                     d_value=3)
    x = normal(1, 10, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *p: layer(x)[0], (x, *layer.parameters()), atol=1e-6)

def test_checkpointing_recomputes_segment_by_segment_stores_less_and_changes_no_gradient(kind):
    tokens, found, stored = tokens_of(2, 103), [], []
    for checkpoint in (False, True):
        model, saved = make(kind, checkpoint=checkpoint), []
        calls = heard(model.blocks[0])
        _, state = model(tokens[:, :3])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t,
                                                      lambda t: t):
            logits, _ = model(tokens[:, 3:], state)
        (logits * normal(*logits.shape)).sum().backward()
        found.append([p.grad for p in model.parameters()])
        stored.append(sum(saved))
    for a, b in zip(*found):
        same(a, b)
    forward = [3, 100] if kind == "full" else [3, 2, *[5] * 19, 3]
    assert [length for length, _ in calls] == forward + forward[::-1]
    assert stored[1] < 0.5 * stored[0]
    same(model.eval()(tokens[:, 3:], state)[0], logits)
    assert calls[2 * len(forward):] == [(100, True)]         # nothing to recompute: all at once

# --- Contract 6 to 9: finite numbers, an empty memory, positions, baselines -----------------------

def test_reading_an_empty_memory_gives_exactly_zero_with_finite_gradients():
    for scale in (1, 1e3):                                   # e^-1000 is 0 in any precision
        q = (scale * normal(2, 3, 5, 4).float()).requires_grad_()
        a_mem = infini.retrieve(q, Memory.empty(2, 3, 4, 6))
        assert torch.equal(a_mem, torch.zeros(2, 3, 5, 6))
        a_mem.sum().backward()
        assert torch.isfinite(q.grad).all()
    q = torch.full((1, 1, 1, 4), -90.0, requires_grad=True)  # nothing in the memory answers
    infini.retrieve(q, Memory(torch.ones(1, 1, 4, 6), torch.ones(1, 1, 4))).sum().backward()
    assert torch.isfinite(q.grad).all()

def test_rope_changes_the_local_attention_and_not_the_memory(rule, form):
    x, layers = normal(2, 23, 12), [layer_of("infini-" + rule, rope_base=base, form=form)
                                    for base in (10.0, 1000.0)]
    (o, state), (other_o, other_state) = (layer(x) for layer in layers)
    assert all(torch.equal(a, b) for a, b in zip(state.memory, other_state.memory))
    assert (o - other_o).abs().max() > 1e-3
    for layer in layers:
        layer.beta.data.fill_(1e4)                           # queries have no positions either
    assert torch.equal(layers[0](x)[0], layers[1](x)[0])

def test_only_the_betas_are_missing_in_a_model_without_memory():
    shapes = [{n: p.shape for n, p in make(kind).named_parameters()} for kind in KINDS]
    betas = {f"blocks.{i}.attention.beta": (3,) for i in range(2)}
    assert shapes[0] == shapes[1] == {**shapes[2], **betas} and shapes[2] == shapes[3] == shapes[4]

def test_a_gate_of_zero_is_the_local_model_and_a_gate_of_one_reads_the_memory_only(form):
    x, layer, local = normal(2, 23, 12), *(layer_of(k, form=form) for k in ("infini", "local"))
    layer.load_state_dict(local.state_dict(), strict=False)
    for beta in (-1e4, -math.inf):
        layer.beta.data.fill_(beta)
        assert torch.equal(layer(x)[0], local(x)[0])
    layer.beta.data.fill_(math.inf)
    o = layer(x)[0]
    assert torch.equal(o[:, :5], torch.zeros(2, 5, 12)) and (o[:, 5:].abs().amax(-1) > 0).all()
    layer.attend = lambda q, k, v: torch.full((*q.shape[:-1], 6), 7.0, dtype=q.dtype)
    assert torch.equal(layer(x)[0], o)

def test_full_attention_stores_no_score_for_each_pair_of_tokens():
    layer, saved = layer_of("full", d_value=4), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()), lambda t: t):
        layer(normal(1, 200, 12))
    assert 200 * 12 <= max(saved) < 200 * 200

def test_xl_sends_no_gradient_to_the_segment_before():
    layer, x = layer_of("xl"), normal(1, 15, 12).requires_grad_()
    layer(x)[0][:, 10:].sum().backward()
    assert (x.grad[0, :10] == 0).all() and (x.grad[0, 10:] != 0).all()

# --- What the memory can and can't hold ----------------------------------------------------------
def orthogonal_keys(n, sharp=800.0):
    """n keys, of which sigma is 1 + sharp on one feature and e^-sharp on the others. At 800 that is
    0 even in float64, so that sigma(k) are orthogonal. Also an empty memory for them."""
    k = torch.where(torch.eye(n, dtype=torch.bool), sharp, -sharp).double()[None, None]
    return k, Memory.empty(1, 1, n, 6, dtype=torch.float64)

def test_delta_leaves_m_unmodified_if_the_memory_already_answers_and_linear_does_not():
    memory, k = filled(), normal(2, 3, 5, 4)
    v = infini.retrieve(k, memory)
    linear, delta = infini.update_linear(memory, k, v), infini.update_delta(memory, k, v)
    same(delta.M, memory.M)
    assert (linear.M - memory.M).abs().max() > 0.1

def test_a_binding_written_again_is_kept_by_linear_but_fades_under_delta():
    """z grows with every writing and M does not, so the paper's claim fails at the third."""
    (k, linear), v = orthogonal_keys(8), normal(1, 1, 1, 6)
    delta, k = linear, k[:, :, :1]
    for share in (1, 1 / 2, (1 + 1 / 2) / 3, (3 / 2 + 1 / 2) / 4):
        linear, delta = infini.update_linear(linear, k, v), infini.update_delta(delta, k, v)
        same(infini.retrieve(k, linear), v)
        same(infini.retrieve(k, delta), share * v)

# --- The start, plug and play --------------------------------------------------------------------

def test_initial_weights_keep_the_variance_of_what_passes_through():
    torch.manual_seed(0)
    sizes = dict(d_model=128, n_layers=1, n_heads=3, d_key=96, d_value=16, d_ff=512)
    model = InfiniTransformer(InfiniConfig(vocab_size=384, **sizes))
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    found = [m(normal(2000, m.in_features).float()) for m in linear] + [model.embedding.weight]
    assert [y.var().item() for y in found] == pytest.approx([1] * 8, abs=0.05)

def test_betas_start_at_gate_init_or_evenly_spaced_around_it():
    for n_heads, gate_init, spread, expected in ((4, -1.5, 6.0, [-4.5, -2.5, -0.5, 1.5]),
                                                 (3, 0.5, 2.0, [-0.5, 0.5, 1.5]),
                                                 (1, -2.0, 9.0, [-2.0]), (2, 3.0, 0.0, [3.0, 3.0])):
        config = replace(SMALL, n_heads=n_heads, gate_init=gate_init, gate_spread=spread)
        for block in InfiniTransformer(config).blocks:
            assert block.attention.beta.tolist() == pytest.approx(expected, abs=1e-6)

def test_gates_are_one_parameter_per_head_that_is_saved_and_trained():
    model = make("infini-delta")
    betas = [model.state_dict()[f"blocks.{i}.attention.beta"] for i in range(2)]
    same(model.gates(), torch.stack([1 / (1 + torch.exp(-beta)) for beta in betas]))
    assert model.gates().shape == (2, 3) and not model.gates().requires_grad
    found = gradients(model, tokens_of(2, 23))
    assert all((found[f"blocks.{i}.attention.beta"] != 0).all() for i in range(2))

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_an_injected_memory_behind_closed_gates_changes_nothing(rule, dtype, tolerance):
    local, tokens = make("local", dtype), tokens_of(2, 23)
    before = local(tokens)[0]
    model = inject_memory(local, update=rule, gate_init=-1e4)
    assert torch.equal(model(tokens)[0], before)
    assert model.config == replace(local.config, attention="infini", update=rule, gate_init=-1e4)
    same(inject_memory(local, update=rule, gate_init=-20)(tokens)[0], before, 1e-6)
    opened = inject_memory(local.eval(), update=rule, gate_init=1.0)
    same(opened.gates(), np.full((2, 3), 1 / (1 + math.exp(-1))), 1e-6)
    same(opened(tokens)[0][0], o_model(opened, tokens[0]), tolerance)
    modes = [{m.training for m in new.modules()} for new in (model, opened)]
    assert modes == [{True}, {False}] and opened.head.weight.dtype == dtype
    opened.embedding.weight.data.zero_()                     # the old model keeps its own weights
    assert torch.equal(local(tokens)[0], before)
    tied = make("local", dtype).requires_grad_(False)
    tied.head.weight = tied.embedding.weight
    new = inject_memory(tied, update=rule)
    assert new.head.weight is new.embedding.weight is not tied.head.weight
    assert {n.split(".")[-1] for n, p in new.named_parameters() if p.requires_grad} == {"beta"}

def test_a_memory_is_injected_only_if_every_weight_finds_its_place():
    normed, shorter, longer, extended = (make("local") for _ in range(4))
    torch.nn.utils.parametrizations.weight_norm(normed.blocks[1].attention.w_q)
    del shorter.blocks[1]
    longer.blocks.append(make("local").blocks[1])
    extended.blocks[0].attention.w_q.bias = torch.nn.Parameter(torch.ones(12))
    for model, name in ((torch.compile(make("local")), "_orig_mod.embedding.weight"),
                        (normed, "blocks.1.attention.w_q.p"), (shorter, "blocks.1.norm1.weight"),
                        (longer, "blocks.2.norm1.weight"), (extended, "blocks.0.attention.w_q.b")):
        refused(f"weights of the model was other in ['{name}", inject_memory, model)

# --- Streaming and generation --------------------------------------------------------------------
def test_greedy_generation_equals_rerunning_the_whole_prefix(kind):
    model, text = make(kind), tokens_of(3, 13)
    out = generate(model, text, 9, temperature=0)
    assert torch.equal(generate(model, text, 0), text)
    for _ in range(9):
        text = torch.cat([text, model(text)[0][:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, text)

def test_streaming_and_generation_read_in_chunks_and_keep_no_graph():
    model, text = make(), tokens_of(1, 5000)
    calls, asked = heard(model), heard(model.blocks[-1].up)
    logits, _ = stream(model, text[:, :123], chunk_len=50)
    assert calls == [(50, False), (50, False), (23, False)] and not logits.requires_grad
    assert [n for n, _ in asked] == [0, 0, 23]               # only the last logits are needed
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
                     dict(temperature=2.0, top_p=0.7)):
        p = np.exp(logits / settings.get("temperature", 1.0))
        p, order = p / p.sum(), np.argsort(-p)
        nucleus = order[:np.searchsorted(np.cumsum(p[order]), settings.get("top_p", 1.0)) + 1]
        expected = np.where(np.isin(np.arange(17), nucleus), p, 0) / p[nucleus].sum()
        frequency = np.bincount(draw(**settings), minlength=17) / 4000
        assert set(np.flatnonzero(frequency)) <= set(nucleus.tolist())
        assert np.abs(frequency - expected).max() < 0.04     # five standard deviations

# --- Contract 10: devices, files, compile, transforms --------------------------------------------

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
def test_a_compiled_model_gives_the_same_logits():
    model, tokens = make(n_layers=1), tokens_of(2, 13)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    logits, state = compiled(tokens)                         # this backend needs no C++ compiler
    same(logits, model(tokens)[0])
    same(compiled(tokens, state)[0], model(tokens, state)[0])

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

# --- Contract 11: bad input is refused in one line -----------------------------------------------
def test_a_config_that_makes_no_sense_is_refused_by_the_name_of_its_field():
    for must, bad in {
            "a whole number of at least 1": dict(segment_len=0, d_ff=2.5, d_key=0, n_heads=-1,
                                                 n_layers=True, d_model="64", vocab_size=None),
            "even": dict(d_key=3), "at least 1": dict(rope_base=0.99), "one of (False, True)": dict(
                causal=1, checkpoint="no"), "one of ('linear', 'delta')": dict(update="hebb"),
            "one of ('infini', 'local', 'xl', 'full')": dict(attention="flash"),
            "one of ('parallel', 'recurrent')": dict(form=["parallel"]),
            "a finite": dict(rope_base=10 ** 400, gate_init=math.nan, gate_spread="0")}.items():
        for field, value in bad.items():
            line = f"{field} was {value!r}, must be {must}"
            refused(line, lambda: replace(SMALL, **{field: value}))

def test_numpys_numbers_are_numbers_and_become_pythons_and_no_field_can_be_changed():
    config = replace(SMALL, d_model=np.int64(16), n_layers=np.uint8(1), rope_base=np.float32(50),
                     gate_init=np.int32(-1), gate_spread=2)
    expected = dict(d_model=16, n_layers=1, rope_base=50.0, gate_init=-1.0, gate_spread=2.0)
    for name, value in expected.items():
        assert getattr(config, name) == value and type(getattr(config, name)) is type(value)
    text = generate(InfiniTransformer(config), tokens_of(1, 3), np.int64(2), np.float32(0.5))
    assert text.shape == (1, 5)
    with pytest.raises(AttributeError):                      # and stay as they were checked
        config.d_model = 3

def test_bad_tokens_are_refused_by_the_model_by_stream_and_by_generate():
    model, tokens = make(), torch.arange(17)[None]
    for line, bad in (("tokens was in 1 ... 17, must be in 0 ... 16", tokens + 1),
                      ("tokens was in -1 ... 15, must be in 0 ... 16", tokens - 1),
                      ("tokens of dtype was torch.float32, must be int64 or", tokens.float()),
                      ("tokens of shape was (17,), must be (B, T), not empty", tokens[0]),
                      ("tokens of shape was (1, 0), must be (B, T)", tokens[:, :0]),
                      ("tokens of shape was (0, 17), must be (B, T)", tokens[:0]),
                      ("tokens was list, must be a tensor of shape", tokens.tolist()),
                      ("tokens on device was meta, must be cpu", tokens.to("meta"))):
        for call in (model, lambda bad: stream(model, bad), lambda bad: generate(model, bad, 1)):
            refused(line, call, bad)
    assert torch.equal(model(tokens.int())[0], model(tokens)[0])

def test_inputs_of_a_layer_and_states_that_do_not_fit_are_refused():
    model, local, xl, layer = make(), make("local"), make("xl"), layer_of()
    tokens, x = tokens_of(2, 13), normal(2, 13, 12)
    state, of_local, of_xl = (m(tokens)[1] for m in (model, local, xl))
    s, meta = state[0], Memory(*(y.to("meta") for y in state[0].memory))
    for line, call, *inputs in (
            ("x of shape was (13, 12), must be (B, T, 12) with T of at least 1", layer, x[0]),
            ("x of shape was (2, 13, 7)", layer, x[..., :7]), ("x of shape", layer, x[:, :0]),
            ("state was tuple, must be a State", layer, x, tuple(s)),
            ("state.k of shape was (2, 3, 3), must be [2, 3", layer, x, s._replace(k=s.k[..., 0])),
            ("state.memory of shape", layer, x, s._replace(memory=s.memory._replace(z=s.k))),
            ("state.k on device was meta, must be cpu", layer, x, s._replace(k=s.k.to("meta"))),
            ("state.memory on device was meta", layer, x, s._replace(memory=meta)),
            ("state was int, must be None or a list of 2 States", model, tokens, 3),
            ("state was tuple", model, tokens, tuple(state)), ("state was State", model, tokens, s),
            ("state was list, must be None or a list of 2", model, tokens, state[:1]),
            ("state was list", model, tokens, []), ("state was list", model, tokens, [None, s]),
            ("state with memory was Memory, must be NoneType for", local, tokens, state),
            ("state with memory was NoneType, must be Memory", model, tokens, of_local),
            ("state with memory was Previous, must be Memory", model, tokens, of_xl),
            ("state.memory of shape was (2, 3, 4, 6), must be [1, 3", model, tokens[:1], state),
            ("state.memory of shape was (2, 3, 5, 4), must be [1, 3", xl, tokens[:1], of_xl),
            ("state.k of shape was (2, 3, 3, 4), must be [1", local, tokens[:1], of_local),
            ("state.k of shape", make("local", d_key=6), tokens, of_local),
            ("state.v of shape", make("local", d_value=8), tokens, of_local),
            ("state.memory of dtype was torch.float64", make(dtype=torch.float32), tokens, state),
            ("state with open tokens was 3, must be below", make(segment_len=3), tokens, state),
            ("state with open tokens was 3, must be 0 at", make(causal=False), tokens, state)):
        refused(line, call, *inputs)

def test_settings_that_make_no_sense_are_refused():
    model, local, tokens = make(), make("local"), tokens_of(2, 13)
    refused("attention was local, must be infini", local.gates)
    refused("attention was infini, must be local", inject_memory, model)
    refused("update was 'hebb', must be one of ('linear', 'delta')", inject_memory, local, "hebb")
    refused("causal was False, must be True", generate, make(causal=False), tokens, 3)
    for function, must, name, *bad in (
            (stream, "a whole number of at least 1", "chunk_len", 0, 2.5),
            (generate, "a whole number of at least 0", "max_new_tokens", -1, 2.0, None),
            (generate, "a finite number of at least 0", "temperature", -0.1, math.nan, "a"),
            (generate, "a finite number of at least 0", "top_p", None, math.inf),
            (generate, "above 0 and at most 1", "top_p", 0, 1.5)):
        for value in bad:
            settings = {**({} if function is stream else {"max_new_tokens": 3}), name: value}
            refused(f"{name} was {value!r}, must be {must}", function, model, tokens, **settings)
    model.head.weight.data[0, 0] = math.nan
    refused("model with logits was inf or nan, must be", generate, model, tokens, 1, 0)

@pytest.mark.parametrize("seed", range(200))
def test_200_random_models_texts_and_cuts_agree_with_the_oracle(seed):
    """Kinds, sizes, lengths, forms, checkpoints, precisions, causal or not, and where calls end."""
    draw = random.Random(seed)
    kind, causal, N = draw.choice(KINDS), draw.random() < 0.8, draw.randint(1, 7)
    sizes = dict(d_model=draw.randint(1, 9), n_layers=draw.randint(1, 2), d_ff=draw.randint(1, 9),
                 n_heads=draw.randint(1, 3), d_key=2 * draw.randint(1, 3), segment_len=N,
                 d_value=draw.randint(1, 5), rope_base=draw.choice([1.5, 50.0, 1e4]), causal=causal,
                 form=draw.choice(FORMS), checkpoint=draw.random() < 0.3)
    dtype, T = draw.choice([torch.float64] * 3 + [torch.float32]), draw.randint(1, 30)
    model, tokens = make(kind, dtype, seed, **sizes), tokens_of(draw.randint(1, 2), T, seed)
    # An encoder goes on where a segment begins. If it is a "full" one, it can't go on at all.
    ends = range(1, T) if causal else [] if kind == "full" else range(N, T, N)
    ends = sorted(draw.sample(ends, draw.randint(0, min(4, len(ends)))))
    logits, _ = chunked(model, tokens, np.diff([0, *ends, T]).tolist())
    expected = np.stack([o_model(model, row) for row in tokens])
    scale = max(1.0, np.abs(expected).max())
    same(logits / scale, expected / scale, 1e-9 if dtype == torch.float64 else 1e-3)

@pytest.mark.parametrize("update, dtype, repeated", [
    ("linear", torch.float32, True), ("linear", torch.bfloat16, False),
    ("delta", torch.float32, False), ("delta", torch.bfloat16, True)])
def test_a_million_tokens_leave_finite_numbers_and_are_all_counted(update, dtype, repeated):
    model, n = make("infini-" + update, dtype, d_model=8, n_layers=1, n_heads=1, d_key=4, d_value=4,
                    d_ff=8, segment_len=64), 2 ** 20
    tokens = torch.full((1, n), 3) if repeated else tokens_of(1, n)
    logits, state = stream(model, tokens)
    M, z = (y[0, 0].double() for y in state[0].memory)
    assert all(torch.isfinite(y).all() for y in (logits, M, z)) and M.abs().max() > 1
    with torch.no_grad():                                    # each token's sigma(k), and how often
        x = model.blocks[0].norm1(model.embedding(torch.arange(SMALL.vocab_size)[None]))
        k = model.blocks[0].attention.project(x)[1][0, 0].double().numpy()
    counts = np.bincount(tokens[0].numpy(), minlength=SMALL.vocab_size)
    expected = sum(count * o_sigma(row) for count, row in zip(counts, k))
    same(z.numpy() / expected, np.ones(4), 1e-3 if dtype == torch.float32 else 2e-2)
