"""The claims about infini.py, each tested against something that shares no code with it.

First comes the oracle. It is float64 NumPy, written from the equations as loops over single
tokens, slow and plain. Then come a few helpers, and then the claims: the equations, the
contract of state and segments, precision, what the memory can hold, plug and play,
streaming, devices, and what is refused.
"""

import inspect
import io
import itertools
import math
import random
import re
from dataclasses import FrozenInstanceError, asdict, replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import infini
from infini import (
    InfiniAttention,
    InfiniConfig,
    InfiniTransformer,
    Memory,
    Previous,
    State,
    generate,
    inject_memory,
    sample,
    stream,
)

torch.set_num_threads(1)    # everything here is too small to share

RULES = ["linear", "delta"]
KINDS = ["infini-linear", "infini-delta", "local", "xl", "full"]
PRECISIONS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# Sizes that differ from one another, so that no two axes can be taken for each other.
SMALL = InfiniConfig(vocab_size=17, d_model=12, n_layers=2, n_heads=3, d_key=4, d_value=6,
                     d_ff=20, segment_len=5, rope_base=10.0)

each_rule = pytest.mark.parametrize("rule", RULES)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_precision = pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
each_half = pytest.mark.parametrize("dtype", PRECISIONS[2:], ids=str)
single_and_double = pytest.mark.parametrize("dtype", PRECISIONS[:2], ids=str)
decoder_or_encoder = pytest.mark.parametrize(
    "causal", [True, False], ids=["decoder", "encoder"])
autocast_or_not = pytest.mark.parametrize(
    "autocast", [False, True], ids=["plain", "autocast"])


# --- The oracle -----------------------------------------------------------------------


def o_rnn(x, h, w_x, w_h):
    """Eq. 1."""
    return np.tanh(x.numpy() @ w_x.numpy() + h.numpy() @ w_h.numpy())


def o_sigma(x):
    """ELU + 1 of each feature."""
    return np.array([xi + 1 if xi > 0 else math.exp(xi) for xi in x])


def o_rotate(x, position, base):
    """RoPE for one token. A feature and its partner are one complex number."""
    half = len(x) // 2
    turn = np.exp(1j * position * base ** (-np.arange(half) / half))
    y = (x[:half] + 1j * x[half:]) * turn
    return np.concatenate([y.real, y.imag])


def o_attend(q, k, v):
    """Eq. 6 for one token that sees all of the keys."""
    scores = np.array([q @ kj / math.sqrt(len(q)) for kj in k])
    weights = np.exp(scores - scores.max())
    return weights / weights.sum() @ v


def o_read(q, M, z):
    """Eq. 7 for one token. An empty memory answers 0."""
    weight = o_sigma(q) @ z
    if weight == 0:
        return np.zeros(M.shape[1])
    return o_sigma(q) @ M / weight


def o_write(keys, values, M, z, rule):
    """Eqs. 8 and 9 for one segment, token by token. Both rules read the old memory."""
    M_new = M.copy()
    z_new = z.copy()

    for k, v in zip(keys, values, strict=True):
        binding = v
        if rule == "delta":
            binding = v - o_read(k, M, z)
        for i, weight in enumerate(o_sigma(k)):
            M_new[i] += weight * binding
            z_new[i] += weight
    return M_new, z_new


def o_seen(t, T, c):
    """Which tokens does token t of T attend to? From the first one to before the end."""
    first = t // c.segment_len * c.segment_len
    end = min(T, first + c.segment_len)

    if c.attention == "xl":
        first = max(0, first - c.segment_len)
    if c.attention == "full":
        first = 0
        end = T
    if c.causal:
        end = t + 1
    return first, end


def o_head(q, k, v, beta, c):
    """Eqs. 6-10 for one head of one document. q, k: (T, d_key), v: (T, d_value).

    Returns a: (T, d_value), M, z.
    """
    T = len(q)
    N = c.segment_len
    M = np.zeros((c.d_key, c.d_value))
    z = np.zeros(c.d_key)
    a = np.zeros((T, c.d_value))
    q_turned = [o_rotate(row, t, c.rope_base) for t, row in enumerate(q)]
    k_turned = [o_rotate(row, t, c.rope_base) for t, row in enumerate(k)]

    for t in range(T):
        if t > 0 and t % N == 0:                         # the segment before is complete
            M, z = o_write(k[t - N:t], v[t - N:t], M, z, c.update)

        first, end = o_seen(t, T, c)
        a[t] = o_attend(q_turned[t], k_turned[first:end], v[first:end])
        if c.attention == "infini":
            gate = 1 / (1 + math.exp(-beta))
            a[t] = gate * o_read(q[t], M, z) + (1 - gate) * a[t]

    if T % N == 0:
        M, z = o_write(k[T - N:], v[T - N:], M, z, c.update)
    return a, M, z


def o_layer(x, w, c):
    """Eqs. 5-11 for one document. x: (T, d_model), w: the layer's weights by name.

    Returns o: (T, d_model), [(M, z)].
    """
    q = x @ w["w_q.weight"].T
    k = x @ w["w_k.weight"].T
    v = x @ w["w_v.weight"].T

    heads = []
    memories = []
    for h in range(c.n_heads):
        keys = slice(h * c.d_key, (h + 1) * c.d_key)
        values = slice(h * c.d_value, (h + 1) * c.d_value)
        beta = w["beta"][h] if "beta" in w else 0.0

        a, M, z = o_head(q[:, keys], k[:, keys], v[:, values], beta, c)
        heads.append(a)
        memories.append((M, z))
    return np.concatenate(heads, 1) @ w["w_o.weight"].T, memories


def o_norm(x, gain, eps):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + eps) * gain


def o_gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def o_model(model, tokens):
    """The whole model for one document. tokens: (T,). Returns logits: (T, vocab_size)."""
    w = weights_of(model)
    eps = torch.finfo(model.head.weight.dtype).eps

    x = w["embedding.weight"][np.asarray(tokens)]
    for block in model.blocks:
        b = weights_of(block)
        layer = weights_of(block.attention)
        o, _ = o_layer(o_norm(x, b["norm1.weight"], eps), layer, model.config)
        x = x + o
        y = o_norm(x, b["norm2.weight"], eps)
        x = x + o_gelu(y @ b["up.weight"].T) @ b["down.weight"].T
    return o_norm(x, w["norm.weight"], eps) @ w["head.weight"].T


# --- Helpers --------------------------------------------------------------------------


def weights_of(module):
    return {name: p.detach().double().numpy() for name, p in module.named_parameters()}


def make(kind="infini-delta", dtype=torch.float64, seed=0, **sizes):
    """A small model with random gates and gains, so that nothing is 0 or 1 by chance."""
    attention, _, update = kind.partition("-")
    config = replace(SMALL, attention=attention, update=update or "delta", **sizes)
    torch.manual_seed(seed)
    model = InfiniTransformer(config).to(dtype)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("beta"):
                p.normal_()
            elif p.dim() == 1:
                p.uniform_(0.5, 1.5)
    return model


def layer_of(kind="infini-delta", dtype=torch.float64, **sizes):
    return make(kind, dtype, **sizes).blocks[0].attention


def tokens_of(B, T, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SMALL.vocab_size, (B, T), generator=generator)


def normal(*shape, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def filled(dtype=torch.float64):
    """A memory of two documents that holds something."""
    memory = Memory.empty(2, 3, 4, 6, dtype)
    k = normal(2, 3, 7, 4, seed=3).to(dtype)
    v = normal(2, 3, 7, 6, seed=4).to(dtype)
    return infini.update_linear(memory, k, v)


def wide(dtype):
    """The precision of what is computed from numbers of this precision."""
    return torch.promote_types(dtype, torch.float32)


def tolerance_of(dtype):
    """Queries, keys and values may be rounded. What is computed from them is not."""
    return 1e-10 if dtype == torch.float64 else 1e-5


def same(a, b, tolerance=1e-10):
    a = torch.as_tensor(a).detach()
    b = torch.as_tensor(b).detach()
    assert a.shape == b.shape
    assert torch.isfinite(a).all()
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)


def all_same(found, expected, tolerance=1e-10):
    for a, b in zip(found, expected, strict=True):
        same(a, b, tolerance)


def relative_error(a, b):
    error = np.abs(a.detach().double().numpy() - b)
    return error.max() / np.abs(b).max()


def differ(a, b):
    return (a - b).abs().max() > 1e-3


def gradients(y, inputs):
    """The gradients of a random sum of y, one for each of the inputs."""
    weights = normal(*y.shape, seed=7).to(y)
    return torch.autograd.grad((weights * y).sum(), list(inputs))


def tensors_in(states):
    """All tensors that the states of some layers hold."""
    found = []
    for state in states:
        if state.memory is not None:
            found.extend(state.memory)
        found.extend([state.k, state.v])
    return found


def chunked(model, tokens, lengths):
    """Read the tokens in calls of these lengths. Returns all outputs and the last state."""
    outputs = []
    state = None
    for chunk in tokens.split(lengths, dim=1):
        output, state = model(chunk, state)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def one_by_one(layer, x, state=None):
    """Eq. 4 in a loop over the segments of x: what the layer does, written plainly."""
    q, k, v = layer.project(x)
    if state is None:
        state = layer.begin(layer.empty_memory(k, v), k, v)

    outputs = []
    end = 0
    while end < x.shape[1]:
        start = end
        end = min(x.shape[1], start + layer.N - state.k.shape[2])
        now = slice(start, end)
        a, state = layer.segment(q[:, :, now], k[:, :, now], v[:, :, now], state)
        outputs.append(a)
    return torch.cat(outputs, dim=2), state


def lengths_heard(module):
    """A list that grows by the number of tokens in each call of the module."""
    lengths = []

    def listen(module, inputs):
        lengths.append(inputs[0].shape[1])

    module.register_forward_pre_hook(listen)
    return lengths


def sizes_stored(run):
    """How large are the tensors that run() stores for the backward pass?"""
    sizes = []

    def store(tensor):
        sizes.append(tensor.numel())
        return tensor

    def give_back(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(store, give_back):
        run()
    return sizes


def refused(name):
    """Require a ValueError that names the argument and says what it must be."""
    return pytest.raises(ValueError, match=rf"^{name} must (be|have) ")


# --- Eqs. 1-11 against the oracle -----------------------------------------------------

HOMES = {
    1: infini.rnn,
    2: infini.mnm,
    3: infini.attention,
    4: InfiniAttention.segment,
    5: InfiniAttention.project,
    6: infini.local_attention,
    7: infini.retrieve,
    8: infini.update_linear,
    9: infini.update_delta,
    10: infini.inject,
    11: InfiniAttention.forward,
}


def test_each_equation_lives_where_the_index_says():
    index = re.findall(r"(\d+) \((-|\d+)\) (\w+)", infini.__doc__)
    expected = []
    for number, home in HOMES.items():
        number_in_version_1 = str(number - 4) if number > 4 else "-"
        expected.append((str(number), number_in_version_1, home.__name__))

    assert index == expected


@pytest.mark.parametrize("number", HOMES)
def test_the_home_of_an_equation_says_its_number(number):
    first_paragraph = inspect.getdoc(HOMES[number]).split("\n\n")[0]

    assert re.findall(r"Eq\. (\d+)", first_paragraph) == [str(number)]


def test_eq1_rnn_carries_the_past_in_one_vector():
    x = normal(2, 3)
    h = normal(2, 4, seed=3)
    w_x = normal(3, 4)
    w_h = normal(4, 4)

    found = infini.rnn(x, h, w_x, w_h)

    same(found, o_rnn(x, h, w_x, w_h))


def mnm_weights():
    """x, h, a network of two layers, and the five matrices of Eq. 2."""
    x = normal(2, 3)
    h = normal(2, 4, seed=3)
    theta = [0.3 * normal(5, 16), 0.3 * normal(16, 4)]
    w_x = normal(3, 4)
    w_h = normal(4, 4)
    w_q = normal(4, 5)
    w_k = normal(4, 5, seed=8)
    w_v = normal(4, 4, seed=9)
    return x, h, theta, w_x, w_h, w_q, w_k, w_v


def test_eq2_mnm_reads_the_past_by_a_forward_pass_of_the_network():
    x, h, theta, *matrices = mnm_weights()
    w_x, w_h, w_q, w_k, w_v = matrices

    found, _ = infini.mnm(x, h, theta, *matrices, lr=0.1)

    h = o_rnn(x, h, w_x, w_h)
    w1, w2 = (w.numpy() for w in theta)
    hidden = np.tanh(h @ w_q.numpy() @ w1)
    same(found, h + hidden @ w2)


def test_eq2_mnm_writes_by_a_gradient_step():
    x, h, theta, *matrices = mnm_weights()
    w_x, w_h, w_q, w_k, w_v = matrices

    _, found = infini.mnm(x, h, theta, *matrices, lr=0.1)

    h = o_rnn(x, h, w_x, w_h)
    k = h @ w_k.numpy()
    v = h @ w_v.numpy()

    # The gradient of 1/2 |v - tanh(k w1) w2|^2, by hand.
    w1, w2 = (w.numpy() for w in theta)
    hidden = np.tanh(k @ w1)
    error = v - hidden @ w2
    error_of_hidden = error @ w2.T * (1 - hidden ** 2)
    same(found[0], w1 + 0.1 * k.T @ error_of_hidden)
    same(found[1], w2 + 0.1 * hidden.T @ error)


def test_eq2_mnm_can_learn_what_to_write():
    x, h, theta, *others, w_v = mnm_weights()
    w_v.requires_grad_()

    h, theta = infini.mnm(x, h, theta, *others, w_v)
    h, theta = infini.mnm(x, h, theta, *others, w_v)

    gradient, = torch.autograd.grad(h.sum(), [w_v])
    assert gradient.abs().max() > 1e-3


def test_mnm_with_a_single_matrix_is_the_delta_rule():
    k = normal(2, 5)
    v = normal(2, 4, seed=3)
    M = normal(5, 4, seed=4)

    found, = infini.mnm_write([M], k, v)

    same(found, M + k.T @ (v - k @ M))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("L", [5, 8])
def test_eq6_softmax_over_the_keys_divided_by_the_root_of_d_key(L, causal):
    q = normal(2, 5, 4)                                  # the last 5 of L tokens ask
    k = normal(2, L, 4, seed=3)
    v = normal(2, L, 6, seed=4)

    a_dot = infini.local_attention(q, k, v, causal)

    for b, t in np.ndindex(2, 5):
        end = L - 5 + t + 1 if causal else L
        query = q[b, t].numpy()
        keys = k[b, :end].numpy()
        values = v[b, :end].numpy()
        same(a_dot[b, t], o_attend(query, keys, values))


def test_eq3_plain_attention_is_eq6_and_causal():
    x = normal(2, 5, 12)
    w_q = normal(12, 4)
    w_k = normal(12, 4, seed=3)
    w_v = normal(12, 6, seed=4)

    found = infini.attention(x, w_q, w_k, w_v)

    q = (x @ w_q).numpy()
    k = (x @ w_k).numpy()
    v = (x @ w_v).numpy()
    for b, t in np.ndindex(2, 5):
        expected = o_attend(q[b, t], k[b, :t + 1], v[b, :t + 1])
        same(found[b, t], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_rope_turns_pairs_by_angles_that_are_exact_in_half_precision_too(dtype):
    x = normal(5, 32).to(dtype)
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-10)
    positions = torch.tensor([0, 1, 2, 255, 511])

    turned = infini.rotary(x, positions, base=10_000.0)

    assert turned.dtype == dtype
    for y, row, position in zip(turned, x, positions, strict=True):
        expected = o_rotate(row.double().numpy(), position.item(), 10_000.0)
        same(y.double(), expected, tolerance)


def test_sigma_is_elu_plus_one():
    x = torch.linspace(-60, 30, 91)

    relative = infini.sigma(x).double().numpy() / o_sigma(x.tolist())

    same(relative, np.ones(91), 1e-5)


def test_sigma_keeps_small_weights_that_elu_plus_one_loses_in_float32():
    x = torch.tensor([-20.0])

    assert F.elu(x) + 1 == 0
    assert infini.sigma(x) > 0


def test_the_slope_of_sigma_is_one_above_zero_and_e_to_the_x_below():
    x = torch.linspace(-60, 30, 91, requires_grad=True)

    infini.sigma(x).sum().backward()

    slope = np.minimum(1, np.exp(x.detach().double().numpy()))
    same(x.grad, slope, 1e-5)


def test_eq10_a_gate_per_head_weighs_the_memory_by_the_sigmoid_of_beta():
    beta = torch.tensor([-1.0, 0.0, 2.0]).double()
    a_mem = normal(4, 2, 3, 5, 6)
    a_dot = normal(4, 2, 3, 5, 6, seed=3)

    a = infini.inject(beta, a_mem, a_dot)

    for h in range(3):
        gate = 1 / (1 + math.exp(-beta[h]))
        past = a_mem[:, :, h]
        present = a_dot[:, :, h]
        same(a[:, :, h], gate * past + (1 - gate) * present)


@decoder_or_encoder
@pytest.mark.parametrize("T", [3, 5, 20, 23])
@each_kind
def test_eqs4_5_and_11_a_layer_reads_many_segments_as_the_oracle_does(kind, T, causal):
    layer = layer_of(kind, causal=causal)
    x = normal(2, T, 12)

    o, _ = layer(x)

    for b in range(2):                                   # two documents never touch
        expected, _ = o_layer(x[b].numpy(), weights_of(layer), layer.config)
        same(o[b], expected)


@pytest.mark.parametrize("T", [3, 5, 20, 23])
@each_rule
def test_a_segment_enters_the_memory_when_it_is_complete(rule, T):
    layer = layer_of("infini-" + rule)
    x = normal(2, T, 12)

    _, state = layer(x)

    assert state.k.shape[2] == T % 5                     # until then its keys wait
    for b in range(2):
        _, memories = o_layer(x[b].numpy(), weights_of(layer), layer.config)
        for h, (M, z) in enumerate(memories):
            same(state.memory.M[b, h], M)
            same(state.memory.z[b, h], z)


@each_kind
def test_a_model_gives_the_logits_of_the_oracle(kind):
    model = make(kind)
    tokens = tokens_of(2, 23)

    logits, _ = model(tokens)

    same(logits, np.stack([o_model(model, row) for row in tokens]))


# --- Contract 1: state is a value of fixed size ---------------------------------------


@each_kind
def test_a_call_leaves_no_trace_in_the_model(kind):
    model = make(kind)
    tokens = tokens_of(2, 18)

    first, _ = model(tokens)
    second, _ = model(tokens)

    assert torch.equal(first, second)
    assert list(model.buffers()) == []


@each_kind
def test_a_call_does_not_change_the_state_that_it_is_given(kind):
    model = make(kind)
    tokens = tokens_of(2, 18)
    _, state = model(tokens)
    before = [t.clone() for t in tensors_in(state)]

    model(tokens, state)
    model.absorb(tokens, state)

    after = tensors_in(state)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


@each_kind
def test_a_second_backward_works_too(kind):
    model = make(kind)
    tokens = tokens_of(2, 18)

    for _ in range(2):
        logits, _ = model(tokens)
        logits.sum().backward()


def table_1(kind, T):
    """How many numbers one layer of SMALL remembers after T tokens of one document."""
    N = SMALL.segment_len
    token = SMALL.n_heads * (SMALL.d_key + SMALL.d_value)    # a key and a value
    memory = SMALL.n_heads * SMALL.d_key * (SMALL.d_value + 1)
    still_open = T % N * token                               # at most N - 1 tokens

    if kind == "full":
        return T * token
    if kind == "local":
        return still_open
    if kind == "xl":
        return still_open + N * token
    return still_open + memory


@pytest.mark.parametrize("chunk_len", [7, 20, 100])
@pytest.mark.parametrize("T", [5, 53, 60])
@each_kind
def test_a_state_has_the_size_of_table_1(kind, T, chunk_len):
    model = make(kind, n_layers=1)

    _, state = stream(model, tokens_of(1, T), chunk_len=chunk_len)

    assert sum(t.numel() for t in tensors_in(state)) == table_1(kind, T)


@pytest.mark.parametrize("chunk_len", [7, 20, 100])
@pytest.mark.parametrize("T", [3, 5, 53, 60])
@each_kind
def test_a_state_is_no_view_of_something_larger(kind, T, chunk_len):
    model = make(kind, n_layers=1)

    _, state = stream(model, tokens_of(1, T), chunk_len=chunk_len)

    for tensor in tensors_in(state):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


def papers_model(attention):
    """The model of section 4.2, without numbers."""
    config = InfiniConfig(d_model=1024, n_layers=12, n_heads=8, d_key=128, d_value=128,
                          d_ff=4096, segment_len=2048, attention=attention)
    with torch.device("meta"):
        return InfiniTransformer(config)


@pytest.mark.parametrize("attention, numbers", [
    ("infini", 128 * (128 + 1) * 8 * 12),                # 1.6M
    ("xl", (128 + 128) * 8 * 2048 * 12)])                # 50M
def test_the_papers_sizes_fit_together_and_need_the_memory_of_table_2(attention, numbers):
    model = papers_model(attention)
    tokens = torch.zeros(1, 2 * 2048, dtype=torch.long, device="meta")

    logits, state = model(tokens)
    logits.sum().backward()

    assert logits.shape == (1, 2 * 2048, 256)
    assert sum(t.numel() for t in tensors_in(state)) == numbers


# --- Contract 2: calls may end anywhere -----------------------------------------------

CUTS = {
    "one by one": [1] * 33,
    "segments": [5, 5, 5, 5, 5, 5, 3],
    "two segments": [10, 10, 10, 3],
    "inside of segments": [4, 1, 5, 23],
    "a long rest": [1, 32],
    "an open segment stays open": [2, 1, 1, 29],
    "over many borders": [7, 14, 12],
}

each_cut = pytest.mark.parametrize("lengths", CUTS.values(), ids=CUTS.keys())


@each_cut
@each_kind
def test_any_cutting_into_calls_gives_the_logits_of_one_call(kind, lengths):
    model = make(kind)
    tokens = tokens_of(2, 33)
    expected, expected_state = model(tokens)

    logits, state = chunked(model, tokens, lengths)

    same(logits, expected)
    all_same(tensors_in(state), tensors_in(expected_state))


@each_kind
def test_gradients_flow_through_the_states_of_several_calls(kind):
    model = make(kind)
    tokens = tokens_of(2, 33)
    whole, _ = model(tokens)
    expected = gradients(whole, model.parameters())

    logits, _ = chunked(model, tokens, [7, 1, 1, 14, 10])

    all_same(gradients(logits, model.parameters()), expected)


@pytest.mark.parametrize("L", range(5))
@pytest.mark.parametrize("T", range(1, 17))
def test_new_tokens_are_cut_where_segments_begin_and_end(T, L):
    first, whole, rest = layer_of().cut(T, L)

    assert first + whole + rest == T
    assert first == min(T, (5 - L) % 5)                  # what the open segment lacks
    assert whole % 5 == 0
    assert rest < 5


def test_full_attention_never_completes_its_segment():
    assert layer_of("full").cut(1000, 0) == (0, 0, 1000)
    assert layer_of("full").cut(1000, 7) == (1000, 0, 0)


# --- Contract 3: segments at once equal segments one by one ---------------------------


@single_and_double
@each_kind
def test_all_segments_at_once_equal_a_loop_over_segments(kind, dtype):
    layer = layer_of(kind, dtype)
    x = normal(2, 33, 12).to(dtype)
    _, state = one_by_one(layer, x[:, :7])
    expected, expected_state = one_by_one(layer, x[:, 7:], state)

    _, state = layer(x[:, :7])
    q, k, v = layer.project(x[:, 7:])
    a, state = layer.scan(q, k, v, state)

    same(a, expected, tolerance_of(dtype))
    all_same(tensors_in([state]), tensors_in([expected_state]), tolerance_of(dtype))


@single_and_double
@each_kind
def test_all_segments_at_once_have_the_gradients_of_a_loop(kind, dtype):
    layer = layer_of(kind, dtype)
    x = normal(2, 33, 12).to(dtype).requires_grad_()
    _, state = one_by_one(layer, x[:, :7])
    a, _ = one_by_one(layer, x[:, 7:], state)
    inputs = [x, *layer.parameters()]
    used = [p for p in inputs if p is not layer.w_o.weight]
    expected = gradients(a, used)

    _, state = layer(x[:, :7])
    q, k, v = layer.project(x[:, 7:])
    a, _ = layer.scan(q, k, v, state)
    found = gradients(a, used)

    for g, h in zip(found, expected, strict=True):
        scale = max(1.0, h.abs().max().item())
        same(g / scale, h / scale, tolerance_of(dtype))


def queries_of(step):
    """How many queries was each call of a layer's step given?"""
    return [call.args[0].shape[2] for call in step.call_args_list]


@pytest.mark.parametrize("kind", ["infini-linear", "infini-delta", "local"])
def test_complete_segments_run_at_once_and_only_the_ends_alone(kind):
    layer = layer_of(kind)
    layer.segment = Mock(wraps=layer.segment)
    layer.segments = Mock(wraps=layer.segments)

    layer(normal(1, 52, 12))                             # 10 segments and 2 tokens

    assert queries_of(layer.segments) == [50]
    assert queries_of(layer.segment) == [2]


# --- Contract 4: causality ------------------------------------------------------------


def texts_with_one_change(T):
    """T texts, of which text t differs from the last one, text T, in token t only."""
    tokens = tokens_of(1, T).repeat(T + 1, 1)
    for t in range(T):
        tokens[t, t] = (tokens[t, t] + 1) % SMALL.vocab_size
    return tokens


@each_kind
def test_no_logit_depends_on_a_later_token_or_on_another_document(kind):
    model = make(kind)

    *changed, logits = model(texts_with_one_change(18))[0]

    for t in range(18):
        same(changed[t][:t], logits[:t])
        assert differ(changed[t][t], logits[t])


@pytest.mark.parametrize("kind", ["infini-linear", "infini-delta", "local", "xl"])
def test_an_encoders_segment_sees_all_of_itself_and_its_memory_only_the_past(kind):
    model = make(kind, causal=False)

    *changed, logits = model(texts_with_one_change(18))[0]

    for t in range(18):
        start = t // 5 * 5
        same(changed[t][:start], logits[:start])
        assert differ(changed[t][start], logits[start])


@pytest.mark.parametrize("kind", ["infini-linear", "infini-delta", "local", "xl"])
def test_an_encoder_goes_on_where_a_segment_begins(kind):
    model = make(kind, causal=False)
    tokens = tokens_of(2, 23)
    expected, _ = model(tokens)

    logits, _ = chunked(model, tokens, [5, 15, 3])

    same(logits, expected)


# --- Contract 5: gradients through the memory -----------------------------------------


@each_rule
def test_gradients_flow_through_the_memory_of_three_segments(rule):
    layer = layer_of("infini-" + rule, segment_len=2, d_model=3, n_heads=2, d_key=2,
                     d_value=1)
    x = normal(1, 7, 3).requires_grad_()

    def output(x, *parameters):
        return layer(x)[0]

    assert torch.autograd.gradcheck(output, (x, *layer.parameters()), atol=1e-6)


@each_kind
def test_checkpointing_changes_no_logit_and_no_gradient(kind):
    tokens = tokens_of(2, 33)
    model = make(kind)
    _, state = model(tokens[:, :3])
    expected, _ = model(tokens[:, 3:], state)
    expected_gradients = gradients(expected, model.parameters())

    model = make(kind, checkpoint=True)
    _, state = model(tokens[:, :3])
    logits, _ = model(tokens[:, 3:], state)

    same(logits, expected)
    all_same(gradients(logits, model.parameters()), expected_gradients)


@each_kind
def test_checkpointing_computes_each_segment_again_in_the_backward_pass(kind):
    model = make(kind, checkpoint=True, n_layers=1)
    tokens = tokens_of(2, 23)
    lengths = lengths_heard(model.blocks[0])

    _, state = model(tokens[:, :3])
    logits, _ = model(tokens[:, 3:], state)
    logits.sum().backward()

    forward = [3, 2, 5, 5, 5, 3]
    if kind == "full":
        forward = [3, 20]
    assert lengths == forward + forward[::-1]


@each_kind
def test_checkpointing_stores_less_than_half(kind):
    tokens = tokens_of(2, 103)
    plain = make(kind)
    frugal = make(kind, checkpoint=True)

    stored = sum(sizes_stored(lambda: plain(tokens)))
    stored_by_frugal = sum(sizes_stored(lambda: frugal(tokens)))

    assert stored_by_frugal < 0.5 * stored


def test_a_model_that_does_not_train_computes_nothing_segment_by_segment():
    model = make(checkpoint=True).eval()
    lengths = lengths_heard(model.blocks[0])

    model(tokens_of(2, 103))

    assert lengths == [103]


# --- Contract 6: the memory's precision -----------------------------------------------

@autocast_or_not
@each_precision
def test_eq7_is_computed_in_float32_or_wider(dtype, autocast):
    q = normal(2, 3, 5, 4).to(dtype)
    memory = filled(wide(dtype))

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        a_mem = infini.retrieve(q, memory)

    assert a_mem.dtype == wide(dtype)
    for b, h, t in np.ndindex(2, 3, 5):
        query = q[b, h, t].double().numpy()
        M = memory.M[b, h].double().numpy()
        z = memory.z[b, h].double().numpy()
        expected = o_read(query, M, z)
        same(a_mem[b, h, t], expected, tolerance_of(dtype))


@autocast_or_not
@each_precision
@each_rule
def test_eqs8_and_9_are_computed_in_float32_or_wider(rule, dtype, autocast):
    k = normal(2, 3, 5, 4, seed=10).to(dtype)
    v = normal(2, 3, 5, 6, seed=20).to(dtype)
    memory = filled(wide(dtype))

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        M, z = infini.UPDATE[rule](memory, k, v)

    assert M.dtype == z.dtype == wide(dtype)
    for b, h in np.ndindex(2, 3):
        keys = k[b, h].double().numpy()
        values = v[b, h].double().numpy()
        before = [y[b, h].double().numpy() for y in memory]
        expected_M, expected_z = o_write(keys, values, *before, rule)
        same(M[b, h], expected_M, tolerance_of(dtype))
        same(z[b, h], expected_z, tolerance_of(dtype))


@autocast_or_not
@each_precision
@each_rule
def test_many_segments_are_written_at_once_in_float32_or_wider(rule, dtype, autocast):
    k = normal(4, 2, 3, 5, 4, seed=10).to(dtype)         # (S, B, H, N, d_key)
    v = normal(4, 2, 3, 5, 6, seed=20).to(dtype)
    memory = filled(wide(dtype))
    layer = layer_of("infini-" + rule)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before, after = layer.write_all(memory, k, v)

    for s in range(4):
        same(before.M[s], memory.M, tolerance_of(dtype))
        same(before.z[s], memory.z, tolerance_of(dtype))
        memory = infini.UPDATE[rule](memory, k[s], v[s])
    same(after.M, memory.M, tolerance_of(dtype))
    same(after.z, memory.z, tolerance_of(dtype))
    assert {y.dtype for y in (*before, *after)} == {wide(dtype)}


@each_half
@each_kind
def test_a_model_in_half_precision_agrees_with_the_oracle(kind, dtype):
    model = make(kind, dtype)
    tokens = tokens_of(1, 23)

    logits, _ = chunked(model, tokens, [3, 9, 1, 10])

    assert logits.dtype == dtype
    assert relative_error(logits[0], o_model(model, tokens[0])) < 0.05


@each_kind
def test_under_autocast_calls_may_end_anywhere_too(kind):
    model = make(kind, torch.float32)
    tokens = tokens_of(1, 23)

    with torch.autocast("cpu", torch.bfloat16):
        logits, state = chunked(model, tokens, [3, 9, 1, 10])

    assert relative_error(logits[0], o_model(model, tokens[0])) < 0.05
    assert state[0].k.dtype == torch.bfloat16            # the state of a baseline, too
    if kind.startswith("infini"):
        assert state[0].memory.M.dtype == torch.float32
        assert state[0].memory.z.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_rule
def test_a_million_tokens_leave_finite_numbers_and_are_all_counted(rule, dtype):
    model = make("infini-" + rule, dtype, d_model=8, n_layers=1, n_heads=1, d_key=4,
                 d_value=4, d_ff=8, segment_len=64)
    tokens = tokens_of(1, 2 ** 20)
    tokens[:, 2 ** 19:] = 3                              # half of them are the same one

    logits, state = stream(model, tokens, chunk_len=2 ** 14)

    M, z = state[0].memory
    assert torch.isfinite(logits).all()
    assert torch.isfinite(M).all()
    found = z[0, 0].double().numpy()
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    same(found / expected_z(model, tokens[0]), np.ones(4), tolerance)


def expected_z(model, tokens):
    """The sum of sigma(k) over the tokens, in float64. Equal tokens have equal keys."""
    block = model.blocks[0]
    vocabulary = torch.arange(SMALL.vocab_size).unsqueeze(0)
    with torch.no_grad():
        _, k, _ = block.attention.project(block.norm1(model.embedding(vocabulary)))

    counts = np.bincount(tokens.numpy(), minlength=SMALL.vocab_size)
    weights = np.stack([o_sigma(row) for row in k[0, 0].double().numpy()])
    return counts @ weights


# --- Contract 7: an empty memory ------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 1000])             # e^-1000 is 0 in any precision
def test_reading_an_empty_memory_gives_exactly_zero_with_finite_gradients(scale):
    q = (scale * normal(2, 3, 5, 4)).float().requires_grad_()

    a_mem = infini.retrieve(q, Memory.empty(2, 3, 4, 6))
    a_mem.sum().backward()

    assert torch.equal(a_mem, torch.zeros(2, 3, 5, 6))
    assert torch.isfinite(q.grad).all()


def test_a_query_that_nothing_answers_has_finite_gradients():
    q = torch.full((1, 1, 1, 4), -90.0, requires_grad=True)
    memory = Memory(torch.ones(1, 1, 4, 6), torch.ones(1, 1, 4))

    infini.retrieve(q, memory).sum().backward()

    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize("norm, divisor", [(2e-30, 2e-30), (0.5e-30, 1.0)])
def test_a_sum_below_1e_30_counts_as_an_empty_memory(norm, divisor):
    sx = torch.ones(1, 2)
    z = torch.tensor([norm, 0.0])

    assert infini.normaliser(sx, z).item() == pytest.approx(divisor)


@each_rule
def test_the_first_segment_reads_nothing_from_the_memory(rule):
    layer = layer_of("infini-" + rule)
    layer.beta.data.fill_(math.inf)

    o, _ = layer(normal(2, 23, 12))

    assert torch.equal(o[:, :5], torch.zeros(2, 5, 12))
    assert (o[:, 5:].abs().amax(-1) > 0).all()


# --- Contract 8: positions, and Eq. 6 by PyTorch's kernel -----------------------------


@each_rule
def test_rope_does_not_touch_the_memory(rule):
    x = normal(2, 23, 12)
    layer = layer_of("infini-" + rule, rope_base=10.0)
    other = layer_of("infini-" + rule, rope_base=1000.0)
    layer.beta.data.fill_(math.inf)                      # read the memory only
    other.beta.data.fill_(math.inf)

    o, state = layer(x)
    other_o, other_state = other(x)

    assert torch.equal(o, other_o)                       # queries have no positions,
    assert torch.equal(state.memory.M, other_state.memory.M)    # and keys have none


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [0, 1, 5, 8])
@pytest.mark.parametrize("axes", [(2,), (4, 2)], ids=["a segment", "segments at once"])
@pytest.mark.parametrize("d_value", [4, 6])
def test_pytorchs_kernel_computes_eq6(d_value, axes, T, causal):
    q = normal(*axes, 3, T, 4)
    k = normal(*axes, 3, 8, 4, seed=3)
    v = normal(*axes, 3, 8, d_value, seed=4)

    found = infini.fused_attention(q, k, v, causal)

    same(found, infini.local_attention(q, k, v, causal))


@pytest.mark.parametrize("L, calls", [(511, 0), (512, 1)])
def test_pytorchs_kernel_takes_over_at_512_keys(L, calls, monkeypatch):
    kernel = Mock(wraps=infini.fused_attention)
    monkeypatch.setattr(infini, "fused_attention", kernel)
    q = normal(1, 3, 5, 4)
    k = normal(1, 3, L, 4)

    layer_of().attend(q, k, k)

    assert kernel.call_count == calls


def long_text(N, causal):
    """Two segments and some tokens. Its calls end in all kinds of places."""
    x = normal(1, 2 * N + 100, 12).requires_grad_()
    lengths = [2 * N + 100]
    if causal:
        lengths = [N - 200, 202, N - 2, 1, 99]
    return x, lengths


@decoder_or_encoder
@pytest.mark.parametrize("N", [511, 512])
@each_kind
def test_long_segments_by_the_kernel_are_those_of_eq6(kind, N, causal, monkeypatch):
    layer = layer_of(kind, segment_len=N, causal=causal, n_heads=1, d_value=4)
    x, lengths = long_text(N, causal)
    inputs = [x, *layer.parameters()]

    o, state = chunked(layer, x, lengths)
    found = [o, *tensors_in([state]), *gradients(o, inputs)]

    monkeypatch.setattr(infini, "KERNEL_FROM", math.inf)
    o, state = chunked(layer, x, lengths)
    all_same(found, [o, *tensors_in([state]), *gradients(o, inputs)])


def test_the_kernel_stores_no_score_for_each_pair_of_tokens():
    layer = layer_of("full", d_value=4)
    x = normal(1, 600, 12)

    sizes = sizes_stored(lambda: layer(x))

    assert 600 * 12 <= max(sizes) < 600 * 600


# --- Contract 9: the baselines --------------------------------------------------------


def shapes_of(kind):
    return {name: p.shape for name, p in make(kind).named_parameters()}


@pytest.mark.parametrize("kind", ["local", "xl", "full"])
def test_only_the_betas_are_missing_in_a_model_without_memory(kind):
    betas = {f"blocks.{i}.attention.beta": (3,) for i in range(2)}

    assert shapes_of("infini-delta") == {**shapes_of(kind), **betas}


@pytest.mark.parametrize("beta", [-1e4, -math.inf])
def test_a_gate_of_zero_is_the_local_model(beta):
    x = normal(2, 23, 12)
    local = layer_of("local")
    layer = layer_of("infini-delta")
    layer.load_state_dict(local.state_dict(), strict=False)
    layer.beta.data.fill_(beta)

    assert torch.equal(layer(x)[0], local(x)[0])


def test_a_gate_of_one_reads_the_memory_only():
    x = normal(2, 23, 12)
    layer = layer_of("infini-delta")
    layer.beta.data.fill_(math.inf)
    expected, _ = layer(x)

    def something_else(q, k, v):
        return torch.full_like(v, 7.0)

    layer.attend = something_else

    assert torch.equal(layer(x)[0], expected)


def test_xl_sends_no_gradient_to_the_segment_before():
    layer = layer_of("xl")
    x = normal(1, 15, 12).requires_grad_()

    o, _ = layer(x)
    o[:, 10:].sum().backward()

    assert (x.grad[0, :10] == 0).all()
    assert (x.grad[0, 10:] != 0).all()


@pytest.mark.parametrize("kind", ["local", "xl"])
def test_where_a_segment_ends_local_and_xl_remember_no_graph(kind):
    model = make(kind)

    _, state = model(tokens_of(2, 10))

    for tensor in tensors_in(state):
        assert not tensor.requires_grad


# --- What the memory can and can't hold -----------------------------------------------


def orthogonal_keys(n):
    """n keys, of which sigma is 801 on one feature and 0 on all others, even in float64."""
    one_feature = torch.eye(n, dtype=torch.bool)
    return torch.where(one_feature, 800.0, -800.0).double()[None, None]


def empty_memory_of(k, d_value):
    return Memory.empty(1, 1, k.shape[-1], d_value, dtype=torch.float64)


@each_rule
def test_a_memory_with_d_key_features_holds_d_key_bindings(rule):
    k = orthogonal_keys(8)
    v = normal(1, 1, 8, 6)

    memory = infini.UPDATE[rule](empty_memory_of(k, 6), k, v)

    same(infini.retrieve(k, memory), v)


def test_a_read_is_a_mean_of_all_values_that_were_written():
    k = normal(1, 1, 7, 4)
    v = torch.full((1, 1, 7, 6), 3.0).double()
    q = normal(1, 1, 5, 4, seed=3)

    memory = infini.update_linear(empty_memory_of(k, 6), k, v)

    same(infini.retrieve(q, memory), torch.full((1, 1, 5, 6), 3.0))


def test_delta_leaves_m_unmodified_if_the_memory_already_answers():
    memory = filled()
    k = normal(2, 3, 5, 4)
    v = infini.retrieve(k, memory)

    delta = infini.update_delta(memory, k, v)
    linear = infini.update_linear(memory, k, v)

    same(delta.M, memory.M)
    assert differ(linear.M, memory.M)


def test_delta_makes_z_grow_as_linear_does():
    memory = filled()
    k = normal(2, 3, 5, 4)
    v = normal(2, 3, 5, 6, seed=3)

    delta = infini.update_delta(memory, k, v)
    linear = infini.update_linear(memory, k, v)

    same(delta.z, linear.z)
    assert (delta.z > memory.z).all()


def test_a_binding_that_is_written_again_is_kept_by_linear():
    k = orthogonal_keys(8)[:, :, :1]
    v = normal(1, 1, 1, 6)
    memory = empty_memory_of(k, 6)

    for _ in range(4):
        memory = infini.update_linear(memory, k, v)
        same(infini.retrieve(k, memory), v)


def test_a_binding_that_is_written_again_is_read_as_half_under_delta():
    """z grows with every writing and M does not, so the paper's claim fails."""
    k = orthogonal_keys(8)[:, :, :1]
    v = normal(1, 1, 1, 6)

    memory = infini.update_delta(empty_memory_of(k, 6), k, v)
    same(infini.retrieve(k, memory), v)

    for _ in range(3):
        memory = infini.update_delta(memory, k, v)
        same(infini.retrieve(k, memory), v / 2)


# --- The start, and the gates ---------------------------------------------------------


def test_initial_weights_keep_the_variance_of_what_passes_through():
    torch.manual_seed(0)
    model = InfiniTransformer(InfiniConfig(vocab_size=384, n_layers=1, n_heads=3, d_key=96,
                                           d_value=16))

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            y = module(normal(2000, module.in_features).float())
            assert y.var().item() == pytest.approx(1, abs=0.05)
    assert model.embedding.weight.var().item() == pytest.approx(1, abs=0.05)


def first_betas(**sizes):
    model = InfiniTransformer(replace(SMALL, **sizes))
    return model.blocks[1].attention.beta.tolist()


def test_memory_and_segment_weigh_the_same_at_the_start():
    gates = InfiniTransformer(InfiniConfig()).gates()

    assert torch.equal(gates, torch.full((3, 4), 0.5))


def test_betas_start_at_gate_init():
    assert first_betas(n_heads=3, gate_init=-2.0) == [-2.0, -2.0, -2.0]


def test_betas_rise_by_gate_spread_from_the_first_head_to_the_last():
    found = first_betas(n_heads=3, gate_init=0.5, gate_spread=2.0)

    assert found == pytest.approx([-0.5, 0.5, 1.5])


def test_the_mean_of_betas_is_gate_init_for_an_even_number_of_heads_too():
    found = first_betas(n_heads=4, gate_init=-1.5, gate_spread=6.0)

    assert found == pytest.approx([-4.5, -2.5, -0.5, 1.5])


def test_a_single_head_starts_at_gate_init_whatever_the_spread():
    assert first_betas(n_heads=1, gate_init=-2.0, gate_spread=9.0) == [-2.0]


def test_gates_are_the_sigmoid_of_one_saved_number_per_head():
    model = make()
    saved = model.state_dict()

    gates = model.gates()

    assert not gates.requires_grad
    for i in range(2):
        beta = saved[f"blocks.{i}.attention.beta"]
        same(gates[i], 1 / (1 + torch.exp(-beta)))


def test_each_gate_is_trained():
    model = make()

    logits, _ = model(tokens_of(2, 23))

    betas = [block.attention.beta for block in model.blocks]
    for gradient in gradients(logits, betas):
        assert (gradient != 0).all()


# --- Plug and play --------------------------------------------------------------------


@each_precision
@each_rule
def test_an_injected_memory_behind_closed_gates_changes_nothing(rule, dtype):
    local = make("local", dtype)
    tokens = tokens_of(2, 23)
    before, _ = local(tokens)

    model = inject_memory(local, update=rule, gate_init=-1e4)
    after, state = model(tokens)

    assert torch.equal(after, before)
    assert state[0].memory.M.dtype == wide(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_at_a_beta_of_minus_20_nothing_changes_yet():
    local = make("local")
    tokens = tokens_of(2, 23)

    model = inject_memory(local, gate_init=-20.0)

    same(model(tokens)[0], local(tokens)[0], 1e-6)


@each_rule
def test_an_injected_memory_behind_open_gates_is_read(rule):
    local = make("local")
    tokens = tokens_of(1, 23)

    model = inject_memory(local, update=rule, gate_init=1.0)

    logits, _ = model(tokens)
    gate = 1 / (1 + math.exp(-1))
    same(model.gates(), np.full((2, 3), gate))
    same(logits[0], o_model(model, tokens[0]), 1e-6)


def test_the_config_of_an_injected_model_says_what_it_is():
    local = make("local", gate_init=3.0, gate_spread=2.0, segment_len=7)

    model = inject_memory(local, update="linear", gate_init=-2.0)

    assert model.config == replace(local.config, attention="infini", update="linear",
                                   gate_init=-2.0, gate_spread=0.0)


def test_an_injected_memory_is_one_of_delta_at_half_the_say_by_default():
    model = inject_memory(make("local"))

    assert model.config.update == "delta"
    same(model.gates(), torch.full((2, 3), 0.5))


def test_an_injected_model_has_weights_of_its_own():
    local = make("local")
    tokens = tokens_of(2, 23)
    before, _ = local(tokens)

    model = inject_memory(local)
    for p in model.parameters():
        p.data.zero_()

    assert torch.equal(local(tokens)[0], before)


@pytest.mark.parametrize("training", [True, False])
def test_an_injected_model_trains_if_the_old_one_did(training):
    local = make("local").train(training)

    model = inject_memory(local)

    assert {module.training for module in model.modules()} == {training}


# --- Reading without predicting -------------------------------------------------------


@pytest.mark.parametrize("T", [2, 18])
@each_kind
def test_absorb_leaves_the_state_that_forward_leaves(kind, T):
    model = make(kind)
    _, before = model(tokens_of(2, 7, seed=5))
    tokens = tokens_of(2, T)

    state = model.absorb(tokens)
    later_state = model.absorb(tokens, before)

    _, expected = model(tokens)
    _, later_expected = model(tokens, before)
    all_same(tensors_in(state), tensors_in(expected))
    all_same(tensors_in(later_state), tensors_in(later_expected))


@pytest.mark.parametrize("checkpoint", [False, True])
@each_kind
def test_gradients_flow_through_a_text_that_was_absorbed(kind, checkpoint):
    model = make(kind, checkpoint=checkpoint)
    tokens = tokens_of(2, 33)
    _, state = model(tokens[:, :18])
    expected, _ = model(tokens[:, 18:], state)
    expected = gradients(expected, model.parameters())

    state = model.absorb(tokens[:, :18])
    logits, _ = model(tokens[:, 18:], state)

    all_same(gradients(logits, model.parameters()), expected)


@each_kind
def test_absorb_asks_nothing_of_the_last_layer(kind):
    model = make(kind)
    below, last = model.blocks
    heard_below = lengths_heard(below.up)
    heard_last = lengths_heard(last.up)
    heard_output = lengths_heard(last.attention.w_o)

    model.absorb(tokens_of(2, 18))

    assert heard_below == [18]
    assert heard_last == []
    assert heard_output == []


@each_kind
def test_a_layer_that_absorbs_has_no_queries(kind):
    layer = layer_of(kind)
    layer.attend = Mock(wraps=layer.attend)

    layer.absorb(normal(2, 23, 12))

    for call in layer.attend.call_args_list:
        q = call.args[0]
        assert q.numel() == 0


@each_kind
def test_absorb_reads_long_segments_too(kind):
    layer = layer_of(kind, segment_len=512)
    x = normal(1, 1200, 12)

    state = layer.absorb(x)

    _, expected = layer(x)
    all_same(tensors_in([state]), tensors_in([expected]))


# --- Streaming and generation ---------------------------------------------------------


@pytest.mark.parametrize("chunk_len", [1, 7, 23, 100])
@each_kind
def test_a_stream_ends_in_the_logits_and_the_state_of_one_call(kind, chunk_len):
    model = make(kind)
    tokens = tokens_of(2, 23)
    _, state = model(tokens)
    expected, expected_state = model(tokens, state)

    logits, state = stream(model, tokens, state, chunk_len)

    same(logits, expected[:, -1])
    all_same(tensors_in(state), tensors_in(expected_state))


def test_a_stream_reads_in_chunks_and_predicts_after_the_last_one_only():
    model = make()
    heard_below = lengths_heard(model.blocks[0])
    heard_last = lengths_heard(model.blocks[1])

    stream(model, tokens_of(1, 123), chunk_len=50)

    assert heard_below == [50, 50, 23]
    assert heard_last == [23]


@each_kind
def test_a_stream_keeps_no_graph(kind):
    logits, state = stream(make(kind), tokens_of(1, 123), chunk_len=50)

    assert not logits.requires_grad
    for tensor in tensors_in(state):
        assert not tensor.requires_grad


def test_the_cost_of_a_new_token_does_not_grow():
    model = make()
    lengths = lengths_heard(model.blocks[0])

    generate(model, tokens_of(1, 5000), 4)

    assert lengths == [2048, 2048, 904, 1, 1, 1]


@each_kind
def test_greedy_generation_equals_rerunning_the_whole_prefix(kind):
    model = make(kind)
    text = tokens_of(3, 13)

    found = generate(model, text, 9, temperature=0)

    for _ in range(9):
        logits, _ = model(text)
        token = logits[:, -1].argmax(-1, keepdim=True)
        text = torch.cat([text, token], dim=1)
    assert torch.equal(found, text)


def test_generation_of_no_token_returns_the_prompt():
    prompt = tokens_of(3, 13)

    assert torch.equal(generate(make(), prompt, 0), prompt)


@each_kind
def test_generation_goes_on_from_a_state(kind):
    model = make(kind)
    text = tokens_of(3, 13)
    expected = generate(model, text, 9, temperature=0)

    _, state = stream(model, text[:, :8])
    found = generate(model, text[:, 8:], 9, temperature=0, state=state)

    assert torch.equal(found, expected[:, 8:])


def test_generation_samples_as_it_is_told():
    model = make()
    prompt = tokens_of(1, 13).expand(50, 13)
    logits, _ = stream(model, prompt)
    expected = sample(logits, 2.0, 0.7, torch.Generator().manual_seed(5))

    found = generate(model, prompt, 1, temperature=2.0, top_p=0.7,
                     generator=torch.Generator().manual_seed(5))

    assert torch.equal(found[:, -1:], expected)
    assert len(found[:, -1].unique()) > 1


def draw(logits, n=4000, seed=0, **settings):
    """n samples from the logits of one text, (vocab_size,)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sample(logits.expand(n, -1), generator=generator, **settings)
    assert tokens.shape == (n, 1)
    return tokens[:, 0]


def o_distribution(logits, temperature=1.0, top_p=1.0):
    """The probability of each token, by a loop from the most to the least likely one."""
    p = np.exp(logits.numpy() / temperature)
    p = p / p.sum()

    kept = np.zeros(len(p))
    for token in np.argsort(-p):
        if kept.sum() < top_p:
            kept[token] = p[token]
    return kept / kept.sum()


SETTINGS = {
    "plain": {},
    "colder": {"temperature": 0.5},
    "hotter": {"temperature": 2.0},
    "nucleus": {"top_p": 0.3},
    "hotter nucleus": {"temperature": 2.0, "top_p": 0.7},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_samples_follow_temperature_and_top_p(settings):
    logits = normal(17)
    expected = o_distribution(logits, **settings)

    tokens = draw(logits, **settings)

    frequency = np.bincount(tokens, minlength=17) / 4000
    assert (frequency[expected == 0] == 0).all()
    assert np.abs(frequency - expected).max() < 0.04     # five standard deviations


def test_samples_repeat_with_the_generators_seed():
    logits = normal(17)

    first = draw(logits, seed=1)

    assert torch.equal(first, draw(logits, seed=1))
    assert not torch.equal(first, draw(logits, seed=2))


def test_each_text_is_sampled_from_its_own_logits():
    logits = 100 * torch.eye(4)                          # text i can only go on with i

    assert sample(logits).flatten().tolist() == [0, 1, 2, 3]


def test_a_temperature_of_zero_takes_the_most_likely_token():
    logits = normal(5, 17)

    tokens = sample(logits, temperature=0)

    assert torch.equal(tokens, logits.argmax(-1, keepdim=True))


def test_a_temperature_near_zero_takes_the_most_likely_token_too():
    logits = 1e9 * normal(5, 17)

    tokens = sample(logits, temperature=1e-30)

    assert torch.equal(tokens, logits.argmax(-1, keepdim=True))


@pytest.mark.parametrize("top_p, n_tokens", [(0.49, 1), (0.5, 1), (0.51, 2), (1.0, 2)])
def test_top_p_keeps_the_most_likely_tokens_that_reach_it_together(top_p, n_tokens):
    logits = torch.tensor([0.0, -math.inf, 0.0])         # probabilities 1/2, 0, 1/2

    tokens = draw(logits, n=100, top_p=top_p)

    assert len(tokens.unique()) == n_tokens


@each_half
def test_samples_from_half_precision_are_not_rounded(dtype):
    logits = torch.zeros(1000).to(dtype)                 # sums of 1/1000 need digits

    tokens = draw(logits, top_p=0.5)

    assert 450 < len(tokens.unique()) <= 501


# --- Contract 10: devices, files, compile, transforms ---------------------------------


@each_kind
def test_nothing_stays_behind_when_a_model_moves_to_another_device(kind):
    model = make(kind, n_layers=1).to("meta")
    tokens = tokens_of(2, 18).to("meta")

    _, state = model(tokens)
    logits, state = model(tokens, state)
    logits.sum().backward()
    text = generate(model, tokens, 2, temperature=0.5, top_p=0.5)

    assert logits.device.type == text.device.type == "meta"
    for tensor in tensors_in(state):
        assert tensor.device.type == "meta"


@each_kind
def test_long_segments_move_to_another_device_too(kind):
    layer = layer_of(kind, segment_len=512).to("meta")
    x = normal(1, 600, 12).to("meta")

    _, state = layer(x)
    o, _ = layer(x, state)

    assert o.device.type == "meta"


def test_an_injected_memory_is_where_the_model_is():
    model = inject_memory(make("local").to("meta"))

    assert {p.device.type for p in model.parameters()} == {"meta"}


@each_kind
def test_weights_config_and_state_load_with_weights_only(kind):
    model = make(kind)
    tokens = tokens_of(1, 13)
    logits, state = model(tokens)

    file = io.BytesIO()
    torch.save((model.state_dict(), asdict(model.config), state), file)
    file.seek(0)
    with torch.serialization.safe_globals([State, Memory, Previous]):
        weights, config, loaded = torch.load(file, weights_only=True)

    other = InfiniTransformer(InfiniConfig(**config)).double()
    other.load_state_dict(weights)
    expected, _ = model(tokens, state)
    assert torch.equal(other(tokens)[0], logits)
    assert torch.equal(other(tokens, loaded)[0], expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute")    # torch.compile looks at it
def test_a_compiled_model_gives_the_same_logits():
    model = make(n_layers=1)
    tokens = tokens_of(2, 7)
    expected, expected_state = model(tokens)
    expected_later, _ = model(tokens, expected_state)

    # This backend needs no C++ compiler.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    logits, state = compiled(tokens)
    later, _ = compiled(tokens, state)

    same(logits, expected)
    same(later, expected_later)


@each_kind
def test_gradients_per_document_by_vmap_are_those_of_one_document_at_a_time(kind):
    model = make(kind)
    tokens = tokens_of(3, 13)
    weights = dict(model.named_parameters())

    def cost(weights, document):
        batch = document.unsqueeze(0)
        logits, _ = torch.func.functional_call(model, weights, (batch,))
        return logits.square().sum()

    gradient = torch.func.grad(cost)
    found = torch.func.vmap(gradient, in_dims=(None, 0))(weights, tokens)

    for b in range(3):
        expected = gradient(weights, tokens[b])
        for name in weights:
            same(found[name][b], expected[name])


# --- Contract 11: what would be silent is refused by name -----------------------------


SIZES = ["vocab_size", "d_model", "n_layers", "n_heads", "d_key", "d_value", "d_ff",
         "segment_len"]


@pytest.mark.parametrize("size", [0, -1, 2.5, "64", None])
@pytest.mark.parametrize("field", SIZES)
def test_a_size_must_be_a_whole_number_above_zero(field, size):
    with refused(field):
        replace(SMALL, **{field: size})


def test_d_key_must_be_even():
    with refused("d_key"):
        replace(SMALL, d_key=3)


def test_update_must_be_a_known_word():
    with refused("update"):
        replace(SMALL, update="hebb")


def test_attention_must_be_a_known_word():
    with refused("attention"):
        replace(SMALL, attention="flash")


@pytest.mark.parametrize("base", [0.99, -1.0, math.inf, math.nan])
def test_rope_base_must_be_at_least_1_and_finite(base):
    with refused("rope_base"):
        replace(SMALL, rope_base=base)


@pytest.mark.parametrize("beta", [math.inf, math.nan])
@pytest.mark.parametrize("field", ["gate_init", "gate_spread"])
def test_the_first_betas_must_be_finite(field, beta):
    with refused("gate_init and gate_spread"):
        replace(SMALL, **{field: beta})


def test_the_smallest_model_of_all_works():
    smallest = dict.fromkeys(SIZES, 1)
    smallest["d_key"] = 2
    model = InfiniTransformer(InfiniConfig(**smallest, rope_base=1))

    logits, _ = model(torch.zeros(1, 3, dtype=torch.long))

    assert torch.isfinite(logits).all()


def test_a_config_stays_as_it_was_checked():
    with pytest.raises(FrozenInstanceError):
        SMALL.d_model = 3


@pytest.mark.parametrize("token", [-1, 17])
def test_a_token_outside_of_the_vocabulary_is_refused(token):
    model = make()
    tokens = torch.tensor([[0, token, 16]])

    with refused("tokens"):
        model(tokens)
    with refused("tokens"):
        model.absorb(tokens)
    with refused("tokens"):
        stream(model, tokens)
    with refused("tokens"):
        generate(model, tokens, 1)


PAIRS = list(itertools.permutations(infini.ATTENTION, 2))


@pytest.mark.parametrize("kind, other", PAIRS)
def test_a_state_of_another_kind_of_attention_is_refused(kind, other):
    tokens = tokens_of(2, 10)                            # no token is left open
    _, state = make(other)(tokens)

    with refused("state"):
        make(kind)(tokens, state)


@pytest.mark.parametrize("kind", ["infini", "local", "xl"])
def test_a_state_with_as_many_open_tokens_as_a_segment_has_is_refused(kind):
    tokens = tokens_of(2, 13)                            # 3 tokens are left open
    _, state = make(kind)(tokens)

    make(kind, segment_len=4)(tokens, state)
    with refused("state"):
        make(kind, segment_len=3)(tokens, state)


@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_a_state_of_another_number_of_layers_is_refused(n_layers):
    model = make()
    tokens = tokens_of(2, 13)
    _, state = model(tokens)
    state = [state[0]] * n_layers

    with refused("state"):
        model(tokens, state)
    with refused("state"):
        model.absorb(tokens, state)


@pytest.mark.parametrize("before, now", [(1, 3), (3, 1)])
@each_kind
def test_a_state_of_another_number_of_documents_is_refused(kind, before, now):
    model = make(kind)
    _, state = model(tokens_of(before, 10))              # no token is left open

    with refused("state"):
        model(tokens_of(now, 10), state)


@each_kind
def test_an_encoder_refuses_a_state_with_open_tokens(kind):
    model = make(kind, causal=False)
    tokens = tokens_of(2, 11)
    _, state = model(tokens)                             # a single token is left open

    with pytest.raises(ValueError, match="^state has open tokens"):
        model(tokens, state)


@pytest.mark.parametrize("temperature", [-0.1, math.nan])
def test_temperature_must_be_at_least_zero(temperature):
    with refused("temperature"):
        sample(normal(2, 17), temperature)
    with refused("temperature"):
        generate(make(), tokens_of(2, 13), 1, temperature)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("top_p", [0, -0.1, 1.01, math.nan])
def test_top_p_must_be_above_zero_and_at_most_one(top_p, temperature):
    with refused("top_p"):
        sample(normal(2, 17), temperature, top_p)
    with refused("top_p"):
        generate(make(), tokens_of(2, 13), 1, temperature, top_p)


@pytest.mark.parametrize("kind", ["infini-linear", "infini-delta", "xl", "full"])
def test_only_a_local_model_gets_a_memory(kind):
    with refused("model"):
        inject_memory(make(kind))


def without_a_block(model):
    del model.blocks[1]
    return model


def with_one_block_more(model):
    model.blocks.append(make("local").blocks[1])
    return model


def with_a_bias(model):
    model.blocks[0].attention.w_q.bias = torch.nn.Parameter(torch.ones(12))
    return model


def with_normed_weights(model):
    torch.nn.utils.parametrizations.weight_norm(model.blocks[1].attention.w_q)
    return model


@pytest.mark.parametrize("change", [
    without_a_block, with_one_block_more, with_a_bias, with_normed_weights, torch.compile])
def test_a_memory_is_injected_only_if_every_weight_finds_its_place(change):
    model = change(make("local"))

    with refused("model"):
        inject_memory(model)


# --- Everything at once ---------------------------------------------------------------


def random_model(draw):
    """A model of any kind, with sizes that a test by hand would not think of."""
    sizes = {
        "d_model": draw.randint(1, 9),
        "n_layers": draw.randint(1, 2),
        "n_heads": draw.randint(1, 3),
        "d_key": 2 * draw.randint(1, 3),
        "d_value": draw.randint(1, 5),
        "d_ff": draw.randint(1, 9),
        "segment_len": draw.randint(1, 7),

        "rope_base": draw.choice([1.5, 50.0, 1e4]),
        "causal": draw.random() < 0.8,
        "checkpoint": draw.random() < 0.3,
    }
    kind = draw.choice(KINDS)
    dtype = torch.float32 if draw.random() < 0.25 else torch.float64
    return make(kind, dtype, seed=draw.randint(0, 999), **sizes)


def random_lengths(draw, T, c):
    """Lengths of calls, T tokens together, that end where the model can go on."""
    ends = range(1, T)
    if not c.causal:
        ends = range(c.segment_len, T, c.segment_len)
        if c.attention == "full":
            ends = []                                    # it sees all of the text

    n_cuts = draw.randint(0, min(4, len(ends)))
    chosen = sorted(draw.sample(ends, n_cuts))
    return np.diff([0, *chosen, T]).tolist()


@pytest.mark.parametrize("seed", range(200))
def test_200_random_models_texts_and_cuts_agree_with_the_oracle(seed):
    draw = random.Random(seed)
    model = random_model(draw)
    T = draw.randint(1, 30)
    lengths = random_lengths(draw, T, model.config)
    tokens = tokens_of(draw.randint(1, 2), T, seed)

    logits, _ = chunked(model, tokens, lengths)

    expected = np.stack([o_model(model, row) for row in tokens])
    scale = max(1.0, np.abs(expected).max())
    tolerance = 1e-9 if logits.dtype == torch.float64 else 1e-3
    same(logits / scale, expected / scale, tolerance)
