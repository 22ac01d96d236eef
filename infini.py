"""Infini-attention in one file, to be read from top to bottom beside the paper:
T. Munkhdalai, M. Faruqui, S. Gopal, "Leave No Context Behind: Efficient Infinite Context Transformers with
Infini-attention", arXiv 2404.07143, version 2 (9 August 2024).

Glossary (row vectors, as in the paper)

    paper        code            shape                     what it is
    -----------  --------------  ------------------------  --------------------------------------------------------
                 B, T            numbers                   documents in a batch, tokens in one call
    N, S, s      N, S, s         numbers                   tokens in a segment, complete segments in a call, segment
    H, l         H, n_layers     numbers                   heads per layer, layers
    X            x               (B, T, d_model)           input of the layer
    Q, K         q, k            (B, H, T, d_key)          queries, keys: without positions, as the memory wants them
    V            v               (B, H, T, d_value)        values
    sigma        sigma           as its input              ELU + 1, which makes a positive kernel of queries and keys
    M            M               (B, H, d_key, d_value)    the memory: sums of sigma(key)^T value
    z            z               (B, H, d_key)             its normaliser: sum of sigma(key)
    A_dot        a_dot           (B, H, T, d_value)        what the local softmax attention found in this segment
    A_mem        a_mem           (B, H, T, d_value)        what the memory gave back from the segments before
    beta         beta            (H,)                      one number per head; sigmoid(beta) is the memory's weight
    O            o               (B, T, d_model)           output of the layer

Where each equation lives: version 2's number (version 1's, four lower, in brackets)

    1  rnn    2  mnm    3  attention    4 (-)  InfiniAttention.segment    5 (1)  InfiniAttention.project
    6 (2)  local_attention    7 (3)  retrieve    8 (4)  update_linear    9 (5)  update_delta    10 (6)  inject
    11 (7)  InfiniAttention.forward

Where the paper is silent or prints something odd, a comment that begins with "Departure:" says what we do.
"""
import math
import sys
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHOICES = dict(update=("linear", "delta"), attention=("infini", "local", "xl", "full"), form=("parallel", "recurrent"))


def require(ok, name, was, must):
    """The one way in which bad input is refused: one line, which argument, what it was, what it must be."""
    if not ok:
        raise ValueError(f"{name} was {was}, must be {must}")


@dataclass(frozen=True)
class InfiniConfig:
    """The sizes and the kind of a model. Raises ValueError, which names the field, on anything that makes no sense."""
    vocab_size: int = 256        # bytes
    d_model: int = 128
    n_layers: int = 3
    n_heads: int = 4
    d_key: int = 32              # per head; even, since RoPE turns pairs
    d_value: int = 32            # per head
    d_ff: int = 512
    segment_len: int = 64        # N
    update: str = "delta"        # rule of the memory; or "linear"
    attention: str = "infini"    # or without memory: "local" (the segment), "xl" (and the one before), "full" (all)
    causal: bool = True          # False: the encoder variant, in which a segment sees all of itself
    rope_base: float = 100.0     # small, since positions count inside the segment (but for "full") only
    gate_init: float = 0.0       # beta at the start; 0: half memory, half segment
    gate_spread: float = 0.0     # from the first head's beta at the start to the last one's; gate_init is in the middle
    form: str = "parallel"       # all complete segments at once, or "recurrent": one after the other. Same numbers.
    checkpoint: bool = False     # in training, recompute each segment in the backward pass instead of storing it

    def __post_init__(self):
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            kind = type(field.default)
            if name in CHOICES:
                require(value in CHOICES[name], name, repr(value), "one of " + ", ".join(CHOICES[name]))
            elif kind is bool:
                require(isinstance(value, bool), name, repr(value), "True or False")
            elif kind is int:
                ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
                require(ok, name, repr(value), "a whole number of at least 1")
            else:
                ok = isinstance(value, (int, float)) and not math.isnan(value)
                require(ok, name, repr(value), "a number")
        require(self.d_key % 2 == 0, "d_key", self.d_key, "even (RoPE turns pairs of features)")
        require(0 < self.rope_base < math.inf, "rope_base", self.rope_base, "positive and finite")
        require(abs(self.gate_spread) < math.inf, "gate_spread", self.gate_spread, "finite")


# --- Background: three layers of one shape, (input, state) -> (output, state) -----------------------------------------

def rnn(x, h, w_x, w_h):
    """A recurrent network, Eq. 1: all of the past is one vector. x: (B, d_in), h: (B, d_h). Returns the next h."""
    return torch.tanh(x @ w_x + h @ w_h)


def mnm_read(theta, q):
    """The memory network at work: a forward pass. theta: list of weight matrices, q: (..., d_key)."""
    for w in theta[:-1]:
        q = torch.tanh(q @ w)
    return q @ theta[-1]


def mnm_write(theta, k, v, lr=1.0):
    """Write a binding key -> value into the weights: one gradient step on 1/2 |v - read(k)|^2. Returns new weights.

    With a single matrix, theta = [M], this is M + lr k^T (v - k M): update_delta but for sigma and its normaliser.
    """
    gradients = torch.func.grad(lambda theta: 0.5 * (v - mnm_read(theta, k)).square().sum())(theta)
    return [w - lr * g for w, g in zip(theta, gradients)]


def mnm(x, h, theta, w_x, w_h, w_q, w_k, w_v, lr=1.0):
    """Metalearned Neural Memory, Eq. 2: all of the past is one vector and the weights of a small network.

    x: (B, d_in), h: (B, d_h); w_q, w_k: (d_h, d_key), w_v: (d_h, d_h). Returns the next h and theta. The B rows are
    of one document: they share the memory.
    """
    h = rnn(x, h, w_x, w_h)
    return h + mnm_read(theta, h @ w_q), mnm_write(theta, h @ w_k, h @ w_v, lr)


def attention(x, w_q, w_k, w_v):
    """Plain attention, Eq. 3: nothing reaches the next segment. x: (B, N, d_model), w_*: (d_model, d)."""
    return local_attention(x @ w_q, x @ w_k, x @ w_v)


# --- The memory ----------------------------------------------------------------------------------------------------

class Memory(NamedTuple):
    """The past of one layer: d_key * (d_value + 1) numbers per head, however long it was."""
    M: torch.Tensor    # (B, H, d_key, d_value)
    z: torch.Tensor    # (B, H, d_key)

    @staticmethod
    def empty(batch, n_heads, d_key, d_value, dtype=torch.float32, device=None):
        """Departure: the paper does not give M_0 and z_0. We start from zeros."""
        return Memory(torch.zeros(batch, n_heads, d_key, d_value, dtype=dtype, device=device),
                      torch.zeros(batch, n_heads, d_key, dtype=dtype, device=device))


def at_least_float32(x):
    # Departure: M and z only ever grow, and half precision overflows or stops counting after a few segments.
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sigma(x):
    """ELU(x) + 1 in at least float32 (section 3.1.2): 1 + x above zero, e^x below, so never negative.

    F.elu(x) + 1 is the same on paper, but computes (e^x - 1) + 1, which in float32 is good for nothing below -16;
    among a million tokens a key that leaks e^-16 still counts.
    """
    x = at_least_float32(x)
    positive = x.relu()
    return (x - positive).exp() + positive    # x - positive is x.clamp(max=0), whose gradient takes thrice as long


def full_precision(x):
    """A context without autocast, which would multiply M and z in half precision."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def normaliser(sx, z):
    """sigma(x) z, which divides what is read. sx: (..., T, d_key), z: (..., d_key). Returns (..., T, 1).

    Departure: in the first segment the paper's quotient is 0/0. Dividing by 1 instead makes it exactly 0. A sum below
    1e-30 counts as empty too: its gradient, with a square of it in the denominator, would overflow float32.
    """
    norm = (sx * z.unsqueeze(-2)).sum(-1, keepdim=True)    # sx @ z, but small products with a vector are slow
    return torch.where(norm > 1e-30, norm, 1.0)


def retrieve(q, memory):
    """Read the memory, Eq. 7: a mean of all stored values, weighted by how much their keys agree with the query.

    q: (..., T, d_key) without position embeddings (section 4.1). Returns a_mem: (..., T, d_value).
    """
    sq = sigma(q)
    with full_precision(sq):
        return sq @ memory.M / normaliser(sq, memory.z)


def update_linear(memory, k, v):
    """Write a segment, Eq. 8: add what its keys bind to its values. k: (..., N, d_key), v: (..., N, d_value)."""
    sk = sigma(k)
    with full_precision(sk):
        return Memory(memory.M + sk.mT @ v.to(sk.dtype), memory.z + sk.sum(-2))


def update_delta(memory, k, v):
    """Write a segment, Eq. 9: add only what the memory does not yet answer to these keys. Shapes as update_linear.

    z grows as in update_linear. So "M is left unmodified if the binding exists" holds only while the memory returns
    the stored value: after a second writing z has grown, M has not, and the binding is read back smaller.
    """
    return update_linear(memory, k, v - retrieve(k, memory))


UPDATE = dict(linear=update_linear, delta=update_delta)


def scan(memory, k, v, update):
    """What S updates in a row leave, computed together: the memories before segment 1, 2, ..., S and after the last.

    k: (B, S, H, N, d_key), v: (B, S, H, N, d_value). Returns M: (B, S + 1, H, d_key, d_value), z: (B, S + 1, H, d_key).
    Linear is a cumulative sum over segments. So is the z of both rules, and with z known beforehand the delta rule is
    M_s = M_{s-1} - erase_s M_{s-1} + write_s: only this small recurrence is left to run in order.
    """
    sk = sigma(k)
    with full_precision(sk):
        write = sk.mT @ v.to(sk.dtype)                                        # (B, S, H, d_key, d_value)
        z = torch.cat([memory.z.unsqueeze(1), sk.sum(-2)], 1).cumsum(1)       # (B, S + 1, H, d_key)
        if update == "linear":
            return Memory(torch.cat([memory.M.unsqueeze(1), write], 1).cumsum(1), z)
        erase = sk.mT @ (sk / normaliser(sk, z[:, :-1]))                      # (B, S, H, d_key, d_key)
        M = [memory.M]
        for erase_s, write_s in zip(erase.unbind(1), write.unbind(1)):
            M.append(M[-1] - erase_s @ M[-1] + write_s)
        return Memory(torch.stack(M, 1), z)


# --- Inside the segment --------------------------------------------------------------------------------------------

def rotary(x, positions, base):
    """Rotary position embedding (Su et al. 2021). x: (..., T, d), positions: (T,). Returns x, its pairs turned."""
    half = x.shape[-1] // 2
    i = torch.arange(half, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    angles = positions.unsqueeze(-1) * base ** (-i / half)                    # (T, d/2) radians
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return x * torch.cat([cos, cos], -1) + x.roll(half, -1) * torch.cat([-sin, sin], -1)    # roll: halves swapped


def local_attention(q, k, v, causal=True):
    """Softmax attention inside the segment, Eq. 6.

    q: (..., T, d_key), k: (..., L, d_key), v: (..., L, d_value). The queries are those of the last T of the L tokens,
    and `causal` hides from each what comes after it. Returns a_dot: (..., T, d_value).
    Departure: the paper prints sqrt(d_model); like every Transformer we divide by sqrt(d_key).
    """
    T, L = q.shape[-2], k.shape[-2]
    scores = q / math.sqrt(q.shape[-1]) @ k.mT                                # (..., T, L)
    if causal:
        scores += q.new_full((T, L), -math.inf).triu(L - T + 1)               # the future
    return scores.softmax(-1) @ v


def inject(beta, a_mem, a_dot):
    """Long-term context injection, Eq. 10: each head mixes past and present. beta: (H,), a_*: (..., H, T, d_value)."""
    gate = torch.sigmoid(beta).view(-1, 1, 1)
    return gate * a_mem.to(a_dot.dtype) + (1 - gate) * a_dot


# --- The layer -----------------------------------------------------------------------------------------------------

class State(NamedTuple):
    """All that a layer keeps between two calls. A value: no call changes it."""
    memory: Optional[Memory]    # None where attention is not "infini"
    k: torch.Tensor             # (B, H, L, d_key)      keys of the open segment, L < N, without positions,
    v: torch.Tensor             # (B, H, L, d_value)    and its values; "xl" keeps the segment before too, "full" all


class InfiniAttention(nn.Module):
    """An attention layer with a memory of the segments before, or one of the three baselines that have none."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.w_q = nn.Linear(c.d_model, c.n_heads * c.d_key, bias=False)
        self.w_k = nn.Linear(c.d_model, c.n_heads * c.d_key, bias=False)
        self.w_v = nn.Linear(c.d_model, c.n_heads * c.d_value, bias=False)
        self.w_o = nn.Linear(c.n_heads * c.d_value, c.d_model, bias=False)
        if c.attention == "infini":
            place = (torch.arange(c.n_heads) - (c.n_heads - 1) / 2) / max(1, c.n_heads - 1)    # -1/2 ... 1/2
            self.beta = nn.Parameter(c.gate_init + c.gate_spread * place)    # all that the memory adds
        self.N = sys.maxsize if c.attention == "full" else c.segment_len    # full attention: a segment without end
        self.prior = c.segment_len if c.attention == "xl" else 0            # tokens kept of the segment before

    def empty_state(self, x):
        """The state before the first token of documents like x: (B, T, d_model)."""
        c, B = self.config, x.shape[0]
        memory = None
        if c.attention == "infini":
            memory = Memory.empty(B, c.n_heads, c.d_key, c.d_value, at_least_float32(x[:0]).dtype, x.device)
        return State(memory, x.new_empty(B, c.n_heads, 0, c.d_key), x.new_empty(B, c.n_heads, 0, c.d_value))

    def forward(self, x, state=None):
        """Read T more tokens of each document. x: (B, T, d_model). Returns o: (B, T, d_model) and the next state.

        Segments begin every N tokens from the start of the document, so calls may end anywhere: the state holds the
        keys and values of a segment that is still open. Raises ValueError on an x or a state that does not fit.
        """
        require(x.dim() == 3 and x.shape[1] > 0 and x.shape[2] == self.config.d_model, "x of shape", tuple(x.shape),
                f"(B, T, {self.config.d_model}) with T of at least 1")
        state = self.empty_state(x) if state is None else self.check(state, x)
        q, k, v = self.project(x)
        lengths = self.cut(x.shape[1], state.k.shape[2], self.config.form)
        outputs = []
        for piece in zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2)):
            at_end = state.k.shape[2] == self.prior and piece[0].shape[2] % self.N == 0
            together = at_end and self.config.form == "parallel"
            a, state = (self.segments if together else self.segment)(*piece, state)
            outputs.append(a)
        a = torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]
        return self.w_o(a.transpose(1, 2).flatten(2)), state                  # Eq. 11: heads side by side, projected

    def project(self, x):
        """Queries, keys and values, Eq. 5: used for the segment and for the memory alike. x: (B, T, d_model)."""
        def heads(y, d):
            return y.unflatten(-1, (-1, d)).transpose(1, 2)                   # (B, H, T, d)
        c = self.config
        return heads(self.w_q(x), c.d_key), heads(self.w_k(x), c.d_key), heads(self.w_v(x), c.d_value)

    def cut(self, T, L, form):
        """Cut T new tokens where segments end: to the next end, then the complete segments, then the beginning of one.

        L: tokens in the state. "xl" cuts off the very first segment too, the only one that has none before it.
        """
        to_end = self.prior - L if L < self.prior else -L % self.N
        head = min(to_end, T)
        S, tail = (T - head) // self.N, (T - head) % self.N
        body = [self.N] * S if form == "recurrent" else [self.N * S]
        return [length for length in [head, *body, tail] if length]

    def segment(self, q, k, v, state):
        """O_s, M_s = infini-attention(X_s, M_{s-1}), Eq. 4, for one segment or the next part of it: the definition.

        Reads M_{s-1} first and writes after, when the segment is complete. Returns a: (B, H, T, d_value), next state.
        """
        T, memory = q.shape[2], state.memory
        k = torch.cat([state.k.to(k.dtype), k], 2)                            # (B, H, L + T, d_key)
        v = torch.cat([state.v.to(v.dtype), v], 2)
        a = self.attend(q, k, v)
        if memory is not None:
            a = inject(self.beta, retrieve(q, memory), a)
        if k.shape[2] % self.N == 0:
            if memory is not None:
                memory = UPDATE[self.config.update](memory, k, v)
            keep = k.shape[2] - self.prior
            k, v = k[:, :, keep:].detach().clone(), v[:, :, keep:].detach().clone()
        return a, State(memory, k, v)

    def segments(self, q, k, v, state):
        """The same for S complete segments at once, S times `segment` in one go. q, k, v: (B, H, S N, d)."""
        q, k, v = (y.unflatten(2, (-1, self.N)).transpose(1, 2).contiguous() for y in (q, k, v))    # (B, S, H, N, d)
        k_seen, v_seen, memory = k, v, None
        if self.prior:    # xl: each segment sees the one before it too, without gradient      (B, S, H, 2 N, d)
            k_seen, v_seen = (torch.cat([torch.cat([old.to(new.dtype).unsqueeze(1), new[:, :-1]], 1).detach(), new], 3)
                              for old, new in ((state.k, k), (state.v, v)))
        a = self.attend(q, k_seen, v_seen)
        if state.memory is not None:
            M, z = scan(state.memory, k, v, self.config.update)
            a = inject(self.beta, retrieve(q, Memory(M[:, :-1], z[:, :-1])), a)
            memory = Memory(M[:, -1].clone(), z[:, -1].clone())               # a view would keep all S of them alive
        keep = self.N - self.prior
        state = State(memory, k[:, -1, :, keep:].detach().clone(), v[:, -1, :, keep:].detach().clone())
        return a.transpose(1, 2).flatten(2, 3), state

    def attend(self, q, k, v):
        """Local attention with positions. Only here: the memory has seen q and k without them (section 4.1)."""
        T, L = q.shape[-2], k.shape[-2]
        positions = torch.arange(L, device=q.device)    # Departure: they count inside the segment (for xl, the two)
        q, k = (rotary(y, positions[L - y.shape[-2]:], self.config.rope_base) for y in (q, k))
        if self.config.attention == "full":    # the baseline whose cost is all here: fused, its T x L scores are never stored
            square = T == L and self.config.causal
            mask = None if T == L else torch.ones(T, L, dtype=torch.bool, device=q.device).tril(L - T)
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=square)
        return local_attention(q, k, v, self.config.causal)

    def check(self, state, x):
        """Refuse a state that belongs to another model, batch or device, or one that an encoder can't go on from."""
        c, B, infini = self.config, x.shape[0], self.config.attention == "infini"
        require(isinstance(state, State), "state", type(state).__name__, "a State that this layer returned")
        require((state.memory is not None) == infini, "state", "without a memory" if infini else "one with a memory",
                f"the state of a model with attention={c.attention!r}")
        L = state.k.shape[2] if state.k.dim() == 4 else 0
        parts = [("k", state.k, (B, c.n_heads, L, c.d_key)), ("v", state.v, (B, c.n_heads, L, c.d_value))]
        if infini:
            parts += [("memory.M", state.memory.M, (B, c.n_heads, c.d_key, c.d_value)),
                      ("memory.z", state.memory.z, (B, c.n_heads, c.d_key))]
            dtype, wide = state.memory.M.dtype, at_least_float32(x[:0]).dtype
            require(dtype == wide, "state.memory of dtype", dtype, f"{wide} for an input of {x.dtype}")
        for name, part, shape in parts:
            require(part.shape == shape, f"state.{name} of shape", tuple(part.shape), f"{shape}, as model and batch")
            require(part.device == x.device, f"state.{name} on device", part.device, f"{x.device}, as the input")
        most = self.N + self.prior
        require(L < most, "state with open tokens", L, f"below {most}, as segment_len = {c.segment_len} makes it")
        require(c.causal or L % self.N == 0, "state", f"inside a segment ({L % self.N} tokens)",
                "at the end of one: with causal=False a call begins where a segment begins")
        return state


# --- The model around it -------------------------------------------------------------------------------------------

class Block(nn.Module):
    """Attention and a feed-forward network, each with a norm before it and a residual connection around it."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.d_model)
        self.attention = InfiniAttention(config)
        self.norm2 = nn.RMSNorm(config.d_model)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x, state):
        o, state = self.attention(self.norm1(x), state)
        x = x + o
        return x + self.down(F.gelu(self.up(self.norm2(x)))), state


class InfiniTransformer(nn.Module):
    """A decoder of `n_layers` blocks over tokens 0 ... vocab_size - 1, with an output head of its own."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):    # keeps the variance; PyTorch's own default is a third of it
                nn.init.normal_(module.weight, std=module.in_features ** -0.5)

    def forward(self, tokens, state=None):
        """Read T more tokens of each document.

        tokens: (B, T) whole numbers. state: what the call before returned, None at the start of the documents.
        Returns logits for the token after each, (B, T, vocab_size), and the next state: a list with a State per layer.
        Raises ValueError on tokens or a state that do not fit the model.
        """
        self.check(tokens, state)
        x = self.embedding(tokens)                                            # (B, T, d_model)
        after = []
        for block, s in zip(self.blocks, state or [None] * len(self.blocks)):
            x, s = self.recompute(block, x, s) if self.config.checkpoint and self.training else block(x, s)
            after.append(s)
        return self.head(self.norm(x)), after

    @staticmethod
    def recompute(block, x, s):
        """Gradient checkpointing, a segment at a time (section 4.1): stored are its input and the memory before it."""
        s = block.attention.empty_state(x) if s is None else s
        outputs = []
        for piece in x.split(block.attention.cut(x.shape[1], s.k.shape[2], "recurrent"), 1):
            piece, s = checkpoint(block, piece, s, use_reentrant=False, preserve_rng_state=False)    # no dropout
            outputs.append(piece)
        return torch.cat(outputs, 1), s

    def gates(self):
        """sigmoid(beta) of every head, (n_layers, n_heads): 1 reads the memory only, 0 the segment only."""
        require(self.config.attention == "infini", "attention", repr(self.config.attention), "'infini' to have gates")
        return torch.stack([block.attention.beta.detach() for block in self.blocks]).sigmoid()

    def check(self, tokens, state):
        """Refuse what is no batch of tokens of this model, and a state with another number of layers."""
        c, own = self.config, self.embedding.weight.device
        require(torch.is_tensor(tokens), "tokens", type(tokens).__name__, "a tensor of shape (B, T)")
        ok = tokens.dim() == 2 and tokens.numel() > 0
        require(ok, "tokens of shape", tuple(tokens.shape), "(B, T), both at least 1")
        require(tokens.dtype in (torch.int32, torch.int64), "tokens of dtype", tokens.dtype, "int64 or int32")
        require(tokens.device == own, "tokens on device", tokens.device, f"{own}, as the model")
        if not (torch.compiler.is_compiling() or tokens.is_meta):    # this looks at numbers, which those don't have
            low, high = tokens.min().item(), tokens.max().item()
            require(low >= 0 and high < c.vocab_size, "tokens", f"in {low} ... {high}", f"in 0 ... {c.vocab_size - 1}")
        if state is not None:
            ok = isinstance(state, list) and [type(s) for s in state] == [State] * c.n_layers
            require(ok, "state", type(state).__name__, f"None or a list of {c.n_layers} States, one per layer")


def inject_memory(model, update="delta", gate_init=0.0):
    """Plug and play (section 4.3): a trained model with attention="local" becomes an Infini-Transformer.

    Returns a new model with a copy of every weight. Only the betas are new, n_layers * n_heads numbers that start at
    `gate_init`: very negative (-20) changes nothing yet, 0 gives the untrained memory half the say at once.
    """
    require(model.config.attention == "local", "attention of the model", repr(model.config.attention), "'local'")
    new = InfiniTransformer(replace(model.config, attention="infini", update=update, gate_init=gate_init,
                                    gate_spread=0.0))
    new.to(model.embedding.weight).load_state_dict(model.state_dict(), strict=False)    # all but the betas
    return new.train(model.training)


# --- Streaming -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def stream(model, tokens, state=None, chunk_len=2048):
    """Read a text of any length at a constant use of memory, `chunk_len` tokens a call.

    tokens: (B, T). Returns the logits after the last token, (B, vocab_size), and the state.
    """
    require(isinstance(chunk_len, int) and chunk_len >= 1, "chunk_len", repr(chunk_len), "a whole number of at least 1")
    model.check(tokens, state)
    for piece in tokens.split(chunk_len, 1):
        logits, state = model(piece, state)
    return logits[:, -1], state


@torch.no_grad()
def generate(model, prompt, max_new_tokens, temperature=1.0, top_p=1.0, generator=None, state=None, on_token=None):
    """Continue a batch of prompts, token by token, at a constant cost per token however much came before.

    prompt: (B, T). temperature: 0 takes the likeliest token, 1 samples from the model's own distribution. top_p: sample
    only from the likeliest tokens that together have this probability. generator: a torch.Generator for the samples.
    state: of what came before the prompt. on_token: called with each new token, (B,), as soon as it is there.
    Returns prompt and continuation, (B, T + max_new_tokens). Raises ValueError on settings that make no sense.
    """
    whole = isinstance(max_new_tokens, int) and max_new_tokens >= 0
    require(whole, "max_new_tokens", repr(max_new_tokens), "a whole number of at least 0")
    require(0 <= temperature < math.inf, "temperature", temperature, "0 or more, and finite")
    require(0 < top_p <= 1, "top_p", top_p, "above 0 and at most 1")
    require(model.config.causal, "causal", False, "True to generate: an encoder has no next token")
    tokens = [prompt]
    logits, state = stream(model, prompt, state)
    for i in range(max_new_tokens):
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)                           # (B, 1)
        else:
            logits = logits.float() - logits.float().amax(-1, keepdim=True)   # so that no temperature overflows
            p, order = (logits / max(temperature, 1e-30)).softmax(-1).sort(-1, descending=True)
            p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)                   # the likeliest one always stays
            token = order.gather(-1, p.multinomial(1, generator=generator))
        tokens.append(token)
        if on_token is not None:
            on_token(token[:, 0])
        if i + 1 < max_new_tokens:
            logits, state = model(token, state)
            logits = logits[:, -1]
    return torch.cat(tokens, 1)
