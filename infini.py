"""Infini-attention in one file, to be read from top to bottom beside the paper.

T. Munkhdalai, M. Faruqui, S. Gopal, "Leave No Context Behind: Efficient Infinite Context
Transformers with Infini-attention", arXiv 2404.07143, version 2 (9 August 2024).

Glossary (row vectors, as in the paper)

    paper    code         shape                   what it is
             B, T         numbers                 documents in a batch, tokens in one call
    N, S, s  N, S, s      numbers                 tokens in a segment; segments; one of them
    H, l     H, n_layers  numbers                 heads per layer, layers
    X        x            (B, T, d_model)         input of the layer
    Q, K     q, k         (B, H, T, d_key)        queries and keys, without positions
    V        v            (B, H, T, d_value)      values
    sigma    sigma        as its input            ELU + 1, makes queries and keys positive
    M        M            (B, H, d_key, d_value)  the memory, a sum of sigma(key)^T value
    z        z            (B, H, d_key)           its normaliser, a sum of sigma(key)
    A_dot    a_dot        (B, H, T, d_value)      what softmax finds in this segment
    A_mem    a_mem        (B, H, T, d_value)      what the memory returns of earlier ones
    beta     beta         (H,)                    sigmoid(beta) is the memory's weight
    O        o            (B, T, d_model)         output of the layer

Where each equation lives: version 2's number (version 1's in brackets)

    1 (-) rnn        2 (-) mnm              3 (-) attention     4 (-) segment
    5 (1) project    6 (2) local_attention  7 (3) retrieve      8 (4) update_linear
    9 (5) update_delta     10 (6) inject    11 (7) forward of InfiniAttention

"Departure:" begins what we do where the paper is silent or odd.
"""

import math
import sys
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class InfiniConfig:
    """Holds the sizes and the kind of a model.

    Raises ValueError if a field makes no sense.
    """

    vocab_size: int = 256        # bytes
    d_model: int = 128
    n_layers: int = 3
    n_heads: int = 4
    d_key: int = 32              # per head; even, since RoPE turns pairs of features
    d_value: int = 32            # per head
    d_ff: int = 512
    segment_len: int = 64        # N
    update: str = "delta"        # how the memory is written; or "linear"
    attention: str = "infini"    # or a baseline: "local" sees its segment only, "xl" the
                                 # one before, too, and "full" all of the text
    causal: bool = True          # False: an encoder, where a segment sees all of itself
    rope_base: float = 100.0     # of positions, which count inside a segment
    # Departure: the paper does not give the first beta. At 0, memory and segment weigh
    # the same.
    gate_init: float = 0.0       # mean of a layer's betas at the start
    gate_spread: float = 0.0     # by this much they rise from the first head to the last
    checkpoint: bool = False     # save memory: the backward pass computes segments again

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "n_layers", "n_heads",
                     "d_key", "d_value", "d_ff", "segment_len"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a whole number above 0, not {size!r}")

        if self.d_key % 2 == 1:
            raise ValueError(f"d_key must be even, not {self.d_key}: RoPE turns pairs")
        if self.update not in UPDATE:
            raise ValueError(f"update must be one of {list(UPDATE)}, not {self.update!r}")
        if self.attention not in ATTENTION:
            raise ValueError(f"attention must be one of {list(ATTENTION)}, "
                             f"not {self.attention!r}")
        if not 1 <= self.rope_base < math.inf:
            raise ValueError(f"rope_base must be at least 1, not {self.rope_base!r}")
        if not math.isfinite(self.gate_init) or not math.isfinite(self.gate_spread):
            raise ValueError("gate_init and gate_spread must be finite numbers")


# --- Background: two ways to carry the past, and one that carries nothing -------------


def rnn(x, h, w_x, w_h):
    """Carry the past in one vector, Eq. 1.

    x: (B, d_in), h: (B, d_h). Returns the next h.
    """
    return torch.tanh(x @ w_x + h @ w_h)


def mnm_read(theta, q):
    """Run the memory network forward. theta: list of weight matrices, q: (..., d_key)."""
    for w in theta[:-1]:
        q = torch.tanh(q @ w)
    return q @ theta[-1]


def mnm_write(theta, k, v, lr=1.0):
    """Store a key and its value by a gradient step on 1/2 |v - mnm_read(theta, k)|^2.

    With a single matrix M this is M + lr k^T (v - k M), the delta rule. Returns the new
    theta.
    """
    def error(theta):
        return 0.5 * (v - mnm_read(theta, k)).square().sum()

    gradients = torch.func.grad(error)(theta)
    return [w - lr * g for w, g in zip(theta, gradients, strict=True)]


def mnm(x, h, theta, w_x, w_h, w_q, w_k, w_v, lr=1.0):    # noqa: PLR0913 (all that Eq. 2 has)
    """Carry the past in the weights of a small network, Eq. 2.

    x: (B, d_in), h: (B, d_h), w_q, w_k: (d_h, d_key), w_v: (d_h, d_h). All rows of the
    batch share one theta. Returns the next h and theta.
    """
    h = rnn(x, h, w_x, w_h)
    read = mnm_read(theta, h @ w_q)                      # (B, d_h)    read first,
    theta = mnm_write(theta, h @ w_k, h @ w_v, lr)       # then write
    return h + read, theta


def local_attention(q, k, v, causal=True):
    """Attend inside the segment, Eq. 6. With `causal`, no token sees a later one.

    q: (..., T, d_key), k: (..., L, d_key), v: (..., L, d_value). The queries are those of
    the last T of the L tokens. Returns a_dot: (..., T, d_value).

    Departure: the paper prints sqrt(d_model). Like every Transformer, we divide by
    sqrt(d_key).
    """
    T, L = q.shape[-2], k.shape[-2]
    scores = q / math.sqrt(q.shape[-1]) @ k.mT           # (..., T, L)
    if causal:
        future = q.new_full((T, L), -math.inf).triu(L - T + 1)
        scores = scores + future                         # e^-inf is 0
    return scores.softmax(-1) @ v


def attention(x, w_q, w_k, w_v):
    """Attend to one segment and carry nothing on, Eq. 3.

    x: (B, N, d_model), w_q, w_k: (d_model, d_key), w_v: (d_model, d_value).
    """
    return local_attention(x @ w_q, x @ w_k, x @ w_v)


# --- The memory -----------------------------------------------------------------------


class Memory(NamedTuple):
    """Sums up the past of a layer in d_key * (d_value + 1) numbers per head."""

    M: torch.Tensor    # (B, H, d_key, d_value)
    z: torch.Tensor    # (B, H, d_key)

    @staticmethod
    def empty(batch, n_heads, d_key, d_value, dtype=torch.float32, device=None):
        """Make a memory of nothing. Departure: M_0 and z_0 are not given; we take zeros."""
        M = torch.zeros(batch, n_heads, d_key, d_value, dtype=dtype, device=device)
        z = torch.zeros(batch, n_heads, d_key, dtype=dtype, device=device)
        return Memory(M, z)


def at_least_float32(x):
    """Widen half precision.

    Departure: the paper does not give the memory's precision. M and z are long sums. In
    half precision they overflow or stop counting after a few segments.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(x):
    """Switch autocast off, which would multiply M and z in half precision."""
    known = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type if known else "cpu", enabled=False)


def sigma(x):
    """Compute ELU(x) + 1 (section 3.1.2), which is 1 + x above zero and e^x below.

    Departure: F.elu(x) + 1 computes (e^x - 1) + 1, which in float32 has no digits left
    below x = -16. We compute e^x itself, since a million such small weights add up.
    """
    x = at_least_float32(x)
    positive = x.relu()
    return positive + (x - positive).exp()               # x - positive: its negative part


def normaliser(sx, z):
    """Compute sigma(x) z, by which a read is divided. sx is sigma(x): (..., T, d_key).

    Departure: a read of the empty memory would be 0/0. We divide by 1 instead, so that it
    is exactly 0. A sum below 1e-30 counts as empty, since its gradient would overflow.
    """
    norm = (sx * z.unsqueeze(-2)).sum(-1, keepdim=True)  # (..., T, 1)
    return torch.where(norm > 1e-30, norm, 1.0)


def retrieve(q, memory):
    """Read the memory, Eq. 7. It returns a mean of all that was written for the keys.

    What was written for a key k has the weight sigma(q) sigma(k)^T in this mean.
    q: (..., T, d_key), without positions (section 4.1). Returns a_mem: (..., T, d_value).
    """
    sq = sigma(q)                                        # (..., T, d_key)
    with full_precision(sq):
        return sq @ memory.M / normaliser(sq, memory.z)


def update_linear(memory, k, v):
    """Write a segment, Eq. 8 (Linear).

    k: (..., N, d_key), v: (..., N, d_value). Returns the new Memory.
    """
    sk = sigma(k)                                        # (..., N, d_key)
    with full_precision(sk):
        M = memory.M + sk.mT @ v.to(sk.dtype)
        z = memory.z + sk.sum(-2)
        return Memory(M, z)


def update_delta(memory, k, v):
    """Write each value less what its key reads already, Eq. 9 (Linear + Delta).

    k: (..., N, d_key), v: (..., N, d_value). Returns the new Memory.

    Departure: the paper says that M stays unmodified if the binding is already stored.
    This holds only while the memory returns the stored value. Written twice, a binding
    makes z grow but not M, and from then on its value is read back smaller. We keep the
    equation as printed.
    """
    return update_linear(memory, k, v - retrieve(k, memory))


UPDATE = {"linear": update_linear, "delta": update_delta}

# --- The layer ------------------------------------------------------------------------

KERNEL_FROM = 512    # from so many keys on, PyTorch's attention kernel is faster


def fused_attention(q, k, v, causal):
    """Compute local_attention by PyTorch's kernel, which never stores the T x L scores."""
    T, L = q.shape[-2], k.shape[-2]
    mask = None
    if causal and T < L:
        mask = q.new_ones(T, L, dtype=torch.bool).tril(L - T)

    # The kernel knows one axis of documents. With two of them it would be twice as slow.
    axes = q.shape[:-3]
    q, k, v = q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4)
    a = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and T == L)
    return a.unflatten(0, axes)


def rotary(x, positions, base):
    """Turn pairs of features of x: (..., T, d) by angles that grow with positions: (T,)."""
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    i = torch.arange(half, device=x.device, dtype=dtype)
    angles = positions.unsqueeze(-1) * base ** (-i / half)           # (T, d/2) radians

    cos = angles.cos().to(x.dtype)
    sin = angles.sin().to(x.dtype)
    swapped = x.roll(half, -1)                                       # the halves of x
    return x * torch.cat([cos, cos], -1) + swapped * torch.cat([-sin, sin], -1)


def inject(beta, a_mem, a_dot):
    """Mix past and present by one gate per head, Eq. 10.

    beta: (H,), a_mem, a_dot: (..., H, T, d_value).
    """
    gate = torch.sigmoid(beta).view(-1, 1, 1)
    return gate * a_mem.to(a_dot.dtype) + (1 - gate) * a_dot


class State(NamedTuple):
    """Holds all that a layer keeps between two calls. It is a value: no call changes it.

    Departure: the paper does not say what happens to a segment that is shorter than N. Here
    a segment enters the memory when it is complete. Until then its keys and values wait.
    """

    memory: Any        # of all complete segments: a Memory, or what a baseline keeps
    k: torch.Tensor    # (B, H, L, d_key)      keys of the open segment, L < N
    v: torch.Tensor    # (B, H, L, d_value)    and its values


class InfiniAttention(nn.Module):
    """Attends to its segment, and reads all earlier ones from a memory of fixed size."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.N = c.segment_len
        self.w_q = nn.Linear(c.d_model, c.n_heads * c.d_key, bias=False)
        self.w_k = nn.Linear(c.d_model, c.n_heads * c.d_key, bias=False)
        self.w_v = nn.Linear(c.d_model, c.n_heads * c.d_value, bias=False)
        self.w_o = nn.Linear(c.n_heads * c.d_value, c.d_model, bias=False)

        # One number per head is all that the memory adds.
        rise = torch.linspace(-0.5, 0.5, c.n_heads) if c.n_heads > 1 else torch.zeros(1)
        self.beta = nn.Parameter(c.gate_init + c.gate_spread * rise)

    def project(self, x):
        """Compute queries, keys and values, Eq. 5. Segment and memory use the same ones."""
        def heads(y):
            return y.unflatten(-1, (self.config.n_heads, -1)).transpose(1, 2)

        return heads(self.w_q(x)), heads(self.w_k(x)), heads(self.w_v(x))    # (B, H, T, d)

    def attend(self, q, k, v):
        """Attend to the segment, with positions that the memory never sees (section 4.1).

        Departure: the paper does not name an embedding. We use RoPE inside the segment.
        """
        T, L = q.shape[-2], k.shape[-2]
        positions = torch.arange(L, device=q.device)
        q = rotary(q, positions[L - T:], self.config.rope_base)
        k = rotary(k, positions, self.config.rope_base)
        if L < KERNEL_FROM:
            return local_attention(q, k, v, self.config.causal)
        return fused_attention(q, k, v, self.config.causal)

    # A kind of attention is what it remembers, how it reads and how it writes.

    def empty_memory(self, k, v):
        """Make M_0 and z_0 for the documents of k and v."""
        B, H, _, d_key = k.shape
        dtype = at_least_float32(k[:, :, :0]).dtype
        return Memory.empty(B, H, d_key, v.shape[-1], dtype, k.device)

    def read(self, q, k, v, memory):
        """Look around in the segment and back into the memory.

        Returns a: (B, H, T, d_value).
        """
        a_dot = self.attend(q, k, v)                     # Eq. 6
        a_mem = retrieve(q, memory)                      # Eq. 7
        return inject(self.beta, a_mem, a_dot)           # Eq. 10

    def write(self, memory, k, v):
        """Put a complete segment into the memory."""
        return UPDATE[self.config.update](memory, k, v)  # Eq. 8 or 9

    # The rest is the same for all kinds.

    def segment(self, q, k, v, state):
        """Read a segment, O_s, M_s = infini-attention(X_s, M_{s-1}), Eq. 4.

        q, k, v: (B, H, T, d), its next T tokens. Returns a: (B, H, T, d_value) and the next
        state.
        """
        k = torch.cat([state.k, k], dim=2)               # (B, H, L + T, d_key)
        v = torch.cat([state.v, v], dim=2)               # (B, H, L + T, d_value)
        a = self.read(q, k, v, state.memory)             # read first,
        if k.shape[2] < self.N:
            return a, State(state.memory, k, v)          # (more of it is to come)
        memory = self.write(state.memory, k, v)          # then write
        return a, self.begin(memory, k, v)

    def begin(self, memory, k, v):
        """Make the state in which the next segment begins."""
        no_key = k[:, :, :0].detach().clone()            # a view would keep all of k alive
        no_value = v[:, :, :0].detach().clone()
        return State(memory, no_key, no_value)

    def segments(self, q, k, v, state):
        """Do what `segment` does for S complete segments at once, which is faster.

        The segments become the first axis. So Eqs. 6, 7 and 10 need no other code.
        """
        S = k.shape[2] // self.N
        q = q.unflatten(2, (S, -1)).movedim(2, 0).contiguous()    # (S, B, H, N, d_key)
        k = k.unflatten(2, (S, -1)).movedim(2, 0).contiguous()
        v = v.unflatten(2, (S, -1)).movedim(2, 0).contiguous()

        before, after = self.write_all(state.memory, k, v)
        a = self.read(q, k, v, before)                            # (S, B, H, N, d_value)
        a = a.movedim(0, 2).flatten(2, 3)                         # (B, H, S N, d_value)
        return a, self.begin(after, k[0], v[0])

    def write_all(self, memory, k, v):
        """Do what `write` does for S segments at once. k, v: (S, B, H, N, d).

        Delta's rule is M_s = M_{s-1} - erase_s M_{s-1} + write_s. Only these small steps
        run in order. Returns the memory before each segment, (S, ...), and after the last.
        """
        sk = sigma(k)
        with full_precision(sk):
            z = torch.cat([memory.z.unsqueeze(0), sk.sum(-2)]).cumsum(0)    # z_0 ... z_S
            write = sk.mT @ v.to(sk.dtype)                       # (S, B, H, d_key, d_value)
            M = [memory.M]
            if self.config.update == "linear":
                for write_s in write:
                    M.append(M[-1] + write_s)
            else:
                erase = sk.mT @ (sk / normaliser(sk, z[:-1]))    # (S, B, H, d_key, d_key)
                for erase_s, write_s in zip(erase, write, strict=True):
                    M.append(M[-1] - erase_s @ M[-1] + write_s)

        return Memory(torch.stack(M[:-1]), z[:-1]), Memory(M[-1], z[-1].clone())

    def check(self, state, k):
        """Refuse a state that does not fit, and of which PyTorch would not complain."""
        L = state.k.shape[2]
        if type(state.memory) is not type(self.empty_memory(k, k)) or L >= self.N:
            raise ValueError("state must be of the same kind of attention and segment_len")
        if len(state.k) != len(k):
            raise ValueError(f"state must be of {len(k)} documents, not of {len(state.k)}")
        if L > 0 and not self.config.causal:
            raise ValueError("state has open tokens, which an encoder can't go on from")

    def cut(self, T, L):
        """Cut T new tokens where segments begin and end, when L tokens wait already."""
        first = min(T, -L % self.N)                      # these complete the open segment,
        whole = (T - first) // self.N * self.N           # these are complete segments,
        rest = T - first - whole                         # and these open the next one
        return first, whole, rest

    def scan(self, q, k, v, state):
        """Read and write all segments of the new tokens. Returns as `segment`."""
        if state is None:
            state = self.begin(self.empty_memory(k, v), k, v)
        else:
            self.check(state, k)

        first, whole, rest = self.cut(k.shape[2], state.k.shape[2])
        steps = (first, self.segment), (whole, self.segments), (rest, self.segment)
        outputs = []
        for length, step in steps:
            if length > 0:
                a, state = step(q[:, :, :length], k[:, :, :length], v[:, :, :length], state)
                q, k, v = q[:, :, length:], k[:, :, length:], v[:, :, length:]
                outputs.append(a)
        return torch.cat(outputs, dim=2), state

    def forward(self, x, state=None):
        """Read T more tokens of each document, and project what the heads found, Eq. 11.

        x: (B, T, d_model). state: what the call before returned, or None at the start.
        Calls may end anywhere, as segments are counted from the start of the document.
        Returns o: (B, T, d_model) and the next state. Raises ValueError if the state does
        not fit.
        """
        q, k, v = self.project(x)
        a, state = self.scan(q, k, v, state)             # (B, H, T, d_value)
        o = self.w_o(a.transpose(1, 2).flatten(2))       # heads side by side
        return o, state

    def absorb(self, x, state=None):
        """Write T more tokens and ask nothing. Returns the next state."""
        q, k, v = self.project(x)
        _, state = self.scan(q[:, :, :0], k, v, state)   # no query, no read
        return state


# --- Baselines: the same layer, which reads and writes something else -----------------


class LocalAttention(InfiniAttention):
    """Sees its own segment only."""

    def __init__(self, config):
        super().__init__(config)
        self.beta = None                                 # there is nothing to mix

    def empty_memory(self, k, v):
        return None

    def read(self, q, k, v, memory):
        return self.attend(q, k, v)

    def write(self, memory, k, v):
        return None

    def write_all(self, memory, k, v):
        return None, None


class Previous(NamedTuple):
    """Holds keys and values of the segment before, all that Transformer-XL remembers."""

    k: torch.Tensor    # (B, H, N, d_key); N is 0 in the first segment
    v: torch.Tensor    # (B, H, N, d_value)


class XLAttention(LocalAttention):
    """Sees its own segment and the one before (Transformer-XL)."""

    def empty_memory(self, k, v):
        return Previous(k[:, :, :0].detach().clone(), v[:, :, :0].detach().clone())

    def read(self, q, k, v, memory):
        k = torch.cat([memory.k, k], dim=2)
        v = torch.cat([memory.v, v], dim=2)
        return self.attend(q, k, v)

    def write(self, memory, k, v):
        return Previous(k.detach(), v.detach())          # through it no gradient flows

    def segments(self, q, k, v, state):
        """Read one segment after the other, since the first one may see less."""
        outputs = []
        for start in range(0, k.shape[2], self.N):
            now = slice(start, start + self.N)
            a, state = self.segment(q[:, :, now], k[:, :, now], v[:, :, now], state)
            outputs.append(a)
        return torch.cat(outputs, dim=2), state


class FullAttention(LocalAttention):
    """Sees all of the text, as one segment without an end."""

    def __init__(self, config):
        super().__init__(config)
        self.N = sys.maxsize

    def empty_memory(self, k, v):
        return ()                                        # unlike local's None, see `check`


ATTENTION = {
    "infini": InfiniAttention,
    "local": LocalAttention,
    "xl": XLAttention,
    "full": FullAttention,
}

# --- The model ------------------------------------------------------------------------


class Block(nn.Module):
    """Applies attention, then a feed-forward network, each with a norm and a residual."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.d_model)
        self.attention = ATTENTION[config.attention](config)
        self.norm2 = nn.RMSNorm(config.d_model)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x, state=None):
        o, state = self.attention(self.norm1(x), state)
        x = x + o
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x, state

    def absorb(self, x, state=None):
        return self.attention.absorb(self.norm1(x), state)


def recomputed(block, x, state=None):
    """Run a block segment by segment, and store only what enters each one (section 4.1).

    The backward pass computes each segment again. Returns as the block does.
    """
    layer = block.attention
    L = 0 if state is None else state.k.shape[2]
    first, whole, rest = layer.cut(x.shape[1], L)
    lengths = [first, *[layer.N] * (whole // layer.N), rest]

    outputs = []
    for piece in x.split(lengths, dim=1):
        if piece.shape[1] > 0:
            piece, state = checkpoint(block, piece, state, use_reentrant=False,
                                      preserve_rng_state=False)
            outputs.append(piece)
    return torch.cat(outputs, dim=1), state


class InfiniTransformer(nn.Module):
    """Predicts the next token by `n_layers` blocks between an embedding and a head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):            # keep the variance of what passes
                nn.init.normal_(module.weight, std=module.in_features ** -0.5)

    def forward(self, tokens, state=None):
        """Read T more tokens of each document, and predict the token after each.

        tokens: (B, T) whole numbers. state: what the call before returned, a list with a
        State per layer, or None at the start. Returns logits: (B, T, vocab_size) and the
        next state. Raises ValueError if a token is not in the vocabulary or the state does
        not fit.
        """
        x, states = self.run(self.blocks, tokens, state)
        return self.head(self.norm(x)), states

    def absorb(self, tokens, state=None):
        """Read T more tokens without predicting. Returns the next state.

        Nobody asks for what the last layer finds, so it only writes. Raises as `forward`.
        """
        *below, last = self.blocks
        x, states = self.run(below, tokens, state)
        states[-1] = last.absorb(x, states[-1])
        return states

    def run(self, blocks, tokens, state):
        """Run the first blocks. Returns x: (B, T, d_model) and the states of all blocks."""
        n_layers = len(self.blocks)
        states = [None] * n_layers if state is None else list(state)
        if len(states) != n_layers:
            raise ValueError(f"state must be of {n_layers} layers, not of {len(states)}")

        x = self.embed(tokens)                           # (B, T, d_model)
        for i, block in enumerate(blocks):
            if self.config.checkpoint and self.training:
                x, states[i] = recomputed(block, x, states[i])
            else:
                x, states[i] = block(x, states[i])
        return x, states

    def embed(self, tokens):
        """Look up the vector of each token. Returns (B, T, d_model)."""
        try:
            return self.embedding(tokens)
        except IndexError:
            last = self.config.vocab_size - 1
            raise ValueError(f"tokens must be whole numbers from 0 to {last}") from None

    def gates(self):
        """Return sigmoid(beta), (n_layers, n_heads). A gate of 1 reads only the memory."""
        betas = torch.stack([block.attention.beta.detach() for block in self.blocks])
        return betas.sigmoid()


def inject_memory(model, update="delta", gate_init=0.0):
    """Give a trained model with attention="local" a memory (section 4.3, plug and play).

    Returns a new model with a copy of every weight. New are only the betas, which start at
    `gate_init`. At -20 nothing changes yet. At 0 the untrained memory starts with half the
    weight. In the new model no weights are tied or frozen. Raises ValueError if the model
    is of another kind or has weights of its own.
    """
    if model.config.attention != "local":
        raise ValueError(f"model must be of kind local, not {model.config.attention}")
    config = replace(model.config, attention="infini", update=update,
                     gate_init=gate_init, gate_spread=0.0)
    new = InfiniTransformer(config).to(model.embedding.weight)

    missing, unexpected = new.load_state_dict(model.state_dict(), strict=False)
    others = [name for name in missing if not name.endswith("attention.beta")]
    if others or unexpected:
        raise ValueError(f"model must have its config's weights, not {others + unexpected}")
    return new.train(model.training)


# --- Streaming ------------------------------------------------------------------------


@torch.no_grad()
def stream(model, tokens, state=None, chunk_len=2048):
    """Read a text of any length with a fixed amount of memory, `chunk_len` tokens per call.

    tokens: (B, T). Returns the logits after the last token, (B, vocab_size), and the state.
    """
    *chunks, last = tokens.split(chunk_len, dim=1)
    for chunk in chunks:
        state = model.absorb(chunk, state)
    logits, state = model(last, state)
    return logits[:, -1], state


def sample(logits, temperature=1.0, top_p=1.0, generator=None):
    """Draw the next token from logits, (B, vocab_size). Returns (B, 1).

    temperature: 1 keeps the model's own distribution, 0 takes the most likely token.
    top_p: draw from the most likely tokens that together have this probability.
    generator: a torch.Generator. Raises ValueError if a number is out of its range.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)

    scores = logits.float() - logits.float().amax(-1, keepdim=True)    # no overflow below
    p = (scores / temperature).softmax(-1)

    p, order = p.sort(-1, descending=True)
    p_before = p.cumsum(-1) - p                          # of all more likely tokens
    p = p.masked_fill(p_before >= top_p, 0.0)
    drawn = p.multinomial(1, generator=generator)        # (B, 1)    places in this order
    return order.gather(-1, drawn)


@torch.no_grad()
def generate(model, prompt, max_new_tokens, temperature=1.0, top_p=1.0, generator=None,
             state=None):
    """Continue a batch of prompts, token by token. The cost of a token does not grow.

    prompt: (B, T). temperature, top_p, generator: see `sample`. state: of the text before
    the prompt. Returns prompt and continuation, (B, T + max_new_tokens).
    """
    tokens = [prompt]
    for _ in range(max_new_tokens):
        logits, state = stream(model, tokens[-1], state)
        tokens.append(sample(logits, temperature, top_p, generator))
    return torch.cat(tokens, dim=1)
