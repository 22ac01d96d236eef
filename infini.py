"""Infini-attention in one file, to be read from top to bottom beside the paper: T. Munkhdalai,
M. Faruqui, S. Gopal, "Leave No Context Behind: Efficient Infinite Context Transformers with
Infini-attention", arXiv 2404.07143, version 2 (9 August 2024).

Glossary (row vectors, as in the paper)

    paper    code         shape                   what it is
             B, T         numbers                 documents in a batch, tokens in one call
    N, S, s  N, S, s      numbers                 tokens in a segment; segments in a call; segment
    H, l     H, n_layers  numbers                 heads per layer, layers
    X        x            (B, T, d_model)         input of the layer
    Q, K     q, k         (B, H, T, d_key)        queries and keys, without positions
    V        v            (B, H, T, d_value)      values
    sigma    sigma        as its input            ELU + 1, makes queries and keys positive
    M        M            (B, H, d_key, d_value)  the memory: sigma(key)^T value, summed
    z        z            (B, H, d_key)           its normaliser: sum of sigma(key)
    A_dot    a_dot        (B, H, T, d_value)      what softmax attention finds in this segment
    A_mem    a_mem        (B, H, T, d_value)      what the memory returns of all earlier segments
    beta     beta         (H,)                    sigmoid(beta) is the memory's weight in a head
    O        o            (B, T, d_model)         output of the layer

Where each equation lives: version 2's number (version 1's in brackets)

    1 (-) rnn        2 (-) mnm              3 (-) attention     4 (-) segment
    5 (1) project    6 (2) local_attention  7 (3) retrieve      8 (4) update_linear
    9 (5) update_delta     10 (6) inject    11 (7) forward of InfiniAttention

"Departure:" begins what we do where the paper is silent or odd.
"""
import math
import sys
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

@dataclass(frozen=True)
class InfiniConfig:
    """Holds the sizes and the kind of a model. Raises ValueError if a field makes no sense."""
    vocab_size: int = 256        # bytes
    d_model: int = 128
    n_layers: int = 3
    n_heads: int = 4
    d_key: int = 32              # per head; even, since RoPE turns pairs of features
    d_value: int = 32            # per head
    d_ff: int = 512
    segment_len: int = 64        # N
    update: str = "delta"        # how the memory is written; or "linear"
    attention: str = "infini"    # or a baseline without this memory: "local", "xl", "full"
    causal: bool = True          # False: an encoder, where a segment sees all of itself
    rope_base: float = 100.0     # small, since positions count inside a segment
    # Departure: the paper does not give the first beta. At 0 memory and segment weigh the same.
    gate_init: float = 0.0       # mean of a layer's betas at the start
    gate_spread: float = 0.0     # by this much they rise from the first head to the last
    form: str = "parallel"       # segments below 512 tokens at once; "recurrent": one by one
    checkpoint: bool = False     # recompute each segment in the backward pass, to save memory

    def __post_init__(self):
        check_config(self)       # see the end of this file

# --- Background: three layers of one shape, (input, state) -> (output, state) --------------------
def rnn(x, h, w_x, w_h):
    """Carry the past in one vector, Eq. 1. x: (B, d_in), h: (B, d_h). Returns the next h."""
    return torch.tanh(x @ w_x + h @ w_h)

def mnm_read(theta, q):
    """Run the memory network forward. theta: list of weight matrices, q: (..., d_key)."""
    for w in theta[:-1]:
        q = torch.tanh(q @ w)
    return q @ theta[-1]

def mnm_write(theta, k, v, lr=1.0):
    """Store a key and its value by a gradient step on 1/2 |v - mnm_read(theta, k)|^2. Returns the
    new theta. With a single matrix M it is M + lr k^T (v - k M), the delta rule."""
    gradients = torch.func.grad(lambda theta: 0.5 * (v - mnm_read(theta, k)).square().sum())(theta)
    return [w - lr * g for w, g in zip(theta, gradients)]

def mnm(x, h, theta, w_x, w_h, w_q, w_k, w_v, lr=1.0):
    """Carry the past in the weights of a small network, Eq. 2. Returns the next h and theta.
    x: (B, d_in), h: (B, d_h), w_q, w_k: (d_h, d_key), w_v: (d_h, d_h). All rows share one theta."""
    h = rnn(x, h, w_x, w_h)
    return h + mnm_read(theta, h @ w_q), mnm_write(theta, h @ w_k, h @ w_v, lr)

def local_attention(q, k, v, causal=True):
    """Attend inside the segment, Eq. 6. With `causal` no token sees a later one.
    q: (..., T, d_key), k: (..., L, d_key), v: (..., L, d_value). The queries belong to the last T
    of the L tokens. Returns a_dot: (..., T, d_value).
    Departure: the paper prints sqrt(d_model). Like every Transformer we divide by sqrt(d_key)."""
    T, L = q.shape[-2], k.shape[-2]
    scores = q / math.sqrt(q.shape[-1]) @ k.mT                       # (..., T, L)
    if causal:
        scores += q.new_full((T, L), -math.inf).triu(L - T + 1)      # hide the future
    return scores.softmax(-1) @ v

def attention(x, w_q, w_k, w_v):
    """Attend to one segment and carry nothing, Eq. 3. x: (B, N, d_model), w_*: (d_model, d)."""
    return local_attention(x @ w_q, x @ w_k, x @ w_v)

# --- The memory ----------------------------------------------------------------------------------
class Memory(NamedTuple):
    """Sums up the past of a layer in d_key * (d_value + 1) numbers per head."""
    M: torch.Tensor    # (B, H, d_key, d_value)
    z: torch.Tensor    # (B, H, d_key)

    @staticmethod
    def empty(batch, n_heads, d_key, d_value, dtype=torch.float32, device=None):
        """Make a memory of nothing. Departure: M_0 and z_0 are not given; we take zeros."""
        M = torch.zeros(batch, n_heads, d_key, d_value, dtype=dtype, device=device)
        return Memory(M, M.new_zeros(batch, n_heads, d_key))

def at_least_float32(x):
    """Widen half precision. Departure: the paper does not give the memory's precision. M and z are
    long sums. In half precision they overflow or stop counting after a few segments."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def sigma(x):
    """Compute ELU(x) + 1 (section 3.1.2), which is 1 + x above zero and e^x below.
    Departure: F.elu(x) + 1 computes (e^x - 1) + 1, which in float32 has no digits left below
    x = -16. We compute e^x itself, since a million such small weights add up."""
    x = at_least_float32(x)
    positive = x.relu()
    return (x - positive).exp() + positive    # backward is 3 times faster than with x.clamp(max=0)

def full_precision(x):
    """Switch autocast off, which would multiply M and z in half precision."""
    known = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type if known else "cpu", enabled=False)

def normaliser(sx, z):
    """Compute sigma(x) z, by which a read is divided. sx: (..., T, d_key). Returns (..., T, 1).
    Departure: with an empty memory the paper's quotient is 0/0. We divide by 1 instead, so that
    the read is exactly 0. A sum below 1e-30 counts as empty, since its gradient would overflow."""
    norm = (sx * z.unsqueeze(-2)).sum(-1, keepdim=True)    # = sx @ z, but faster for small sizes
    return torch.where(norm > 1e-30, norm, 1.0)

def retrieve(q, memory):
    """Read the memory, Eq. 7. The read is a mean of all values, weighted by sigma(q) sigma(k)^T.
    q: (..., T, d_key), without position embeddings (paper, 4.1). Returns (..., T, d_value)."""
    sq = sigma(q)
    with full_precision(sq):
        return sq @ memory.M / normaliser(sq, memory.z)

def update_linear(memory, k, v):
    """Write a segment, Eq. 8 (Linear). k: (..., N, d_key), v: (..., N, d_value). Returns Memory."""
    sk = sigma(k)
    with full_precision(sk):
        return Memory(memory.M + sk.mT @ v.to(sk.dtype), memory.z + sk.sum(-2))

def update_delta(memory, k, v):
    """Write only the part of each value that the memory lacks, Eq. 9 (Linear + Delta).
    Departure: the paper says that M stays unmodified if the binding is already stored. This holds
    only while the memory returns the stored value. Written twice, a binding makes z grow but not
    M, and from then on its value is read back smaller. We keep the equation as printed."""
    return update_linear(memory, k, v - retrieve(k, memory))

UPDATE = {"linear": update_linear, "delta": update_delta}

# --- The layer -----------------------------------------------------------------------------------
def rotary(x, positions, base):
    """Turn pairs of features of x: (..., T, d) by an angle that grows with positions: (T,)."""
    half = x.shape[-1] // 2
    i = torch.arange(half, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    angles = positions.unsqueeze(-1) * base ** (-i / half)           # (T, d/2) radians
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    return x * cos + x.roll(half, -1) * sin                          # roll: the halves swapped

def inject(beta, a_mem, a_dot):
    """Mix past and present by one gate per head, Eq. 10. beta: (H,), a_*: (..., H, T, d_value)."""
    gate = torch.sigmoid(beta).view(-1, 1, 1)
    return gate * a_mem.to(a_dot.dtype) + (1 - gate) * a_dot

class State(NamedTuple):
    """Holds all that a layer keeps between two calls. It is a value, and no call changes it.
    Departure: the paper does not say what happens to a segment that is shorter than N. Here a
    segment enters the memory when it is complete. Until then its keys and values wait here."""
    memory: Optional[Memory]    # of all complete segments
    k: torch.Tensor             # (B, H, L, d_key)      keys of the open segment, L < N
    v: torch.Tensor             # (B, H, L, d_value)    and its values

    def append(self, k, v):
        return torch.cat([self.k.to(k.dtype), k], 2), torch.cat([self.v.to(v.dtype), v], 2)

class InfiniAttention(nn.Module):
    """Attends to the segment and reads all earlier segments from a memory of fixed size."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.w_q = nn.Linear(c.d_model, c.n_heads * c.d_key, bias=False)
        self.w_k = nn.Linear(c.d_model, c.n_heads * c.d_key, bias=False)
        self.w_v = nn.Linear(c.d_model, c.n_heads * c.d_value, bias=False)
        self.w_o = nn.Linear(c.n_heads * c.d_value, c.d_model, bias=False)
        if c.attention == "infini":    # the betas are all that the memory adds
            rise = (torch.arange(c.n_heads) - (c.n_heads - 1) / 2) / max(1, c.n_heads - 1)
            self.beta = nn.Parameter(c.gate_init + c.gate_spread * rise)    # rise: -1/2 ... 1/2
        self.N = sys.maxsize if c.attention == "full" else c.segment_len    # full: one segment
        self.long = self.N >= 512    # such segments are faster one by one, by PyTorch's kernel

    def project(self, x):
        """Compute queries, keys and values, Eq. 5. Segment and memory use the same ones."""
        heads = self.config.n_heads, -1
        return [w(x).unflatten(-1, heads).transpose(1, 2) for w in (self.w_q, self.w_k, self.w_v)]

    def attend(self, q, k, v):
        """Give queries and keys positions, then attend. The memory never sees these positions.
        Departure: the paper does not name an embedding. We use RoPE, counted inside the segment."""
        T, L, base = q.shape[-2], k.shape[-2], self.config.rope_base
        positions = torch.arange(L, device=q.device)
        q, k = rotary(q, positions[L - T:], base), rotary(k, positions, base)
        kernel = fused_attention if self.long else local_attention
        return kernel(q, k, v, self.config.causal)

    def segment(self, q, k, v, state):
        """Read a segment, O_s, M_s = infini-attention(X_s, M_{s-1}), Eq. 4, or a part of it.
        q, k, v: (B, H, T, d). Returns a: (B, H, T, d_value) and the next state. Without queries
        (T = 0 in q) it only writes."""
        k, v = state.append(k, v)                        # the segment so far: (B, H, L + T, d)
        a_dot = self.attend(q, k, v)                     # look around in the segment,
        a_mem = retrieve(q, state.memory)                # read the segments before it,
        a = inject(self.beta, a_mem, a_dot)              # mix the two,
        if k.shape[2] < self.N:
            return a, State(state.memory, k, v)
        memory = UPDATE[self.config.update](state.memory, k, v)
        return a, self.empty_state(q, memory)            # and write only then

    def pieces(self, T, L, one_by_one):
        """Cut T new tokens where segments end. L tokens are already open. Returns the lengths."""
        rest = min(T, -L % self.N)
        S, start = divmod(T - rest, self.N)
        complete = [self.N] * S if one_by_one else [S * self.N]
        return [length for length in (rest, *complete, start) if length]

    def empty_state(self, x, memory=None):
        """Make the state where a segment begins. x: any tensor of B documents."""
        c, B = self.config, x.shape[0]
        k, v = (x.detach().new_empty(B, c.n_heads, 0, d) for d in (c.d_key, c.d_value))
        if memory is None and c.attention == "infini":
            memory = Memory.empty(B, c.n_heads, c.d_key, c.d_value, sigma(k).dtype, x.device)
        return State(Previous(k, v) if memory is None and c.attention == "xl" else memory, k, v)

    def forward(self, x, state=None, predict=True):
        """Read T more tokens of each document, and project what the heads found, Eq. 11.
        x: (B, T, d_model). state: what the call before returned. Returns o: (B, T, d_model) and the
        next state. Calls may end anywhere, as segments are counted from the start of the document.
        predict: False only writes; o is (B, 0, d_model). Raises ValueError if x or state misfit."""
        check_input(self, x, state)
        state = self.empty_state(x) if state is None else state
        kind, outputs = self.config.attention, []
        one_by_one = self.config.form == "recurrent" or kind == "xl" or self.long
        lengths = self.pieces(x.shape[1], state.k.shape[2], one_by_one)
        for q, k, v in zip(*(y.split(lengths, 2) for y in self.project(x))):
            q = q if predict else q[:, :, :0]                        # no query, no read
            if k.shape[2] > self.N:
                a, state = segments_at_once(self, q, k, v, state)    # equal, but faster
            elif kind == "infini":
                a, state = self.segment(q, k, v, state)
            else:
                a, state = baseline_segment(self, q, k, v, state)
            outputs.append(a)
        a = torch.cat(outputs, 2)                                    # (B, H, T, d_value)
        return self.w_o(a.transpose(1, 2).flatten(2)), state         # heads side by side

# --- The model -----------------------------------------------------------------------------------
class Block(nn.Module):
    """Applies attention, then a feed-forward network, each with a norm and a residual."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.d_model)
        self.attention = InfiniAttention(config)
        self.norm2 = nn.RMSNorm(config.d_model)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x, state, predict=True):
        o, state = self.attention(self.norm1(x), state, predict)
        x = x + o if predict else o                                  # (B, 0, d_model) else
        return x + self.down(F.gelu(self.up(self.norm2(x)))), state

class InfiniTransformer(nn.Module):
    """Predicts the next token by `n_layers` blocks between an embedding and an output head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):    # keep the variance of what passes through
                nn.init.normal_(module.weight, std=module.in_features ** -0.5)

    def forward(self, tokens, state=None, predict=True):
        """Read T more tokens of each document. tokens: (B, T) whole numbers.
        state: what the call before returned, a list with a State per layer. Returns logits for the
        token after each, (B, T, vocab_size), and the next state. Raises ValueError on a misfit.
        predict: False only reads. The last layer only writes, and logits are (B, 0, vocab_size)."""
        check_tokens(self, tokens, state)
        x, states = self.embedding(tokens), []                       # (B, T, d_model)
        for block, s in zip(self.blocks, state or [None] * len(self.blocks)):
            recompute = self.config.checkpoint and self.training
            asked = predict or block is not self.blocks[-1]          # a next layer asks for x
            x, s = self.recomputed(block, x, s, asked) if recompute else block(x, s, asked)
            states.append(s)
        return self.head(self.norm(x)), states

    @staticmethod
    def recomputed(block, x, s, predict):
        """Run a block segment by segment, storing only what enters each one (section 4.1)."""
        s, outputs = block.attention.empty_state(x) if s is None else s, []
        for piece in x.split(block.attention.pieces(x.shape[1], s.k.shape[2], True), 1):
            piece, s = checkpoint(block, piece, s, predict, use_reentrant=False,
                                  preserve_rng_state=False)
            outputs.append(piece)
        return torch.cat(outputs, 1), s

    def gates(self):
        """Return sigmoid(beta), (n_layers, n_heads). A gate of 1 reads only the memory."""
        require(self.config.attention == "infini", "attention", self.config.attention, "infini")
        return torch.stack([block.attention.beta.detach() for block in self.blocks]).sigmoid()

def inject_memory(model, update="delta", gate_init=0.0):
    """Give a trained model with attention="local" a memory (section 4.3, plug and play).
    Returns a new model with a copy of every weight. New are only the betas, which start at
    `gate_init`. At -20 nothing changes yet; at 0 the untrained memory has half the say at once.
    Raises ValueError if the model is of another kind or has other weights than its config says."""
    require(model.config.attention == "local", "attention", model.config.attention, "local")
    config = replace(model.config, attention="infini", update=update, gate_init=gate_init,
                     gate_spread=0.0)
    fresh = InfiniTransformer(config).to(model.embedding.weight)
    old, sizes = model.state_dict(), {name: w.shape for name, w in fresh.state_dict().items()}
    wrong = [name for name in {**old, **sizes} if not name.endswith("attention.beta")
             and (name not in old or old[name].shape != sizes.get(name))]
    require(not wrong, "weights of the model", f"other in {wrong[:3]}", "those of its config")
    new = deepcopy(model)
    new.config = config
    for block, other in zip(new.blocks, fresh.blocks):
        block.attention.config, block.attention.beta = config, other.attention.beta
    return new

# --- Streaming -----------------------------------------------------------------------------------
@torch.no_grad()
def stream(model, tokens, state=None, chunk_len=2048):
    """Read a text of any length with a fixed amount of memory, `chunk_len` tokens per call.
    tokens: (B, T). Returns the logits after the last token, (B, vocab_size), and the state."""
    chunk_len = require_number("chunk_len", chunk_len, 1, whole=True)
    check_tokens(model, tokens, state)
    *pieces, last = tokens.split(chunk_len, 1)
    for piece in pieces:
        _, state = model(piece, state, predict=False)
    logits, state = model(last, state)
    return logits[:, -1], state

@torch.no_grad()
def generate(model, prompt, max_new_tokens, temperature=1.0, top_p=1.0, generator=None,
             state=None, on_token=None):
    """Continue a batch of prompts, token by token. The cost of a token does not grow.
    prompt: (B, T). temperature: 1 samples from the model's own distribution, 0 takes the most
    likely token. top_p: sample from the most likely tokens that together have this probability.
    generator: a torch.Generator. state: of the text before. on_token: gets each token, (B,).
    Returns prompt and continuation, (B, T + max_new_tokens). Raises ValueError on bad arguments."""
    require_number("max_new_tokens", max_new_tokens, 0, whole=True)
    require_number("temperature", temperature, 0)
    require_number("top_p", top_p, 0)
    require(0 < top_p <= 1, "top_p", top_p, "above 0 and at most 1")
    require(model.config.causal, "causal", False, "True, as an encoder has no next token")
    check_tokens(model, prompt, state)
    tokens = [prompt]
    for _ in range(max_new_tokens):
        logits, state = stream(model, tokens[-1], state)
        require(logits.isfinite().all(), "model with logits", "inf or nan", "one of finite numbers")
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)                  # (B, 1)
        else:
            scores = logits.float() - logits.float().amax(-1, keepdim=True)    # at most 0
            p, order = (scores / max(temperature, 1e-30)).softmax(-1).sort(-1, descending=True)
            p = p.masked_fill(p.cumsum(-1) - p >= max(top_p, 1e-30), 0)    # one stays
            token = order.gather(-1, p.multinomial(1, generator=generator))
        tokens.append(token)
        if on_token is not None:
            on_token(token[:, 0])
    return torch.cat(tokens, 1)

# --- Baselines: the same layer without this memory -----------------------------------------------
class Previous(NamedTuple):
    """Holds keys and values of the segment before, all that Transformer-XL remembers."""
    k: torch.Tensor    # (B, H, N, d_key)
    v: torch.Tensor    # (B, H, N, d_value)

def baseline_segment(layer, q, k, v, state):
    """Do what `segment` does, but "local" carries nothing to the next segment, "xl" carries keys
    and values of the last one, through which no gradient flows, and "full" has only one."""
    kind, before = layer.config.attention, state.memory
    k, v = state.append(k, v)
    seen = State.append(before, k, v) if kind == "xl" else (k, v)
    a = layer.attend(q, *seen)
    if k.shape[2] < layer.N:
        return a, State(before, k, v)
    return a, layer.empty_state(q, Previous(k.detach(), v.detach()) if kind == "xl" else None)

# --- For speed: PyTorch's kernel, and many segments at once --------------------------------------
def fused_attention(q, k, v, causal):
    """Compute local_attention by PyTorch's kernel. If d_key = d_value, it never stores the T x L
    scores. On a CPU it then has no second derivative."""
    T, L = q.shape[-2], k.shape[-2]
    mask = q.new_ones(T, L, dtype=torch.bool).tril(L - T) if causal and T < L else None
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and T == L)

def segments_at_once(layer, q, k, v, state):
    """Read S complete segments in one go. q, k, v: (B, H, S N, d). Returns as `segment`. Inside,
    segments come first, (S, B, H, N, d), so that each is one block of memory."""
    S = k.shape[2] // layer.N
    q, k, v = (y.unflatten(2, (S, -1)).movedim(2, 0).contiguous() for y in (q, k, v))
    a, memory = layer.attend(q, k, v), None                          # (S, B, H, N, d_value)
    if layer.config.attention == "infini":
        M, z = scan(state.memory, k, v, layer.config.update)
        a = inject(layer.beta, retrieve(q, Memory(M[:-1], z[:-1])), a)
        memory = Memory(M[-1].clone(), z[-1].clone())                # copies, not views of all
    return a.movedim(0, 2).flatten(2, 3), layer.empty_state(q[0], memory)

def scan(memory, k, v, update):
    """Compute the memory before each of S segments and after the last, all at once.
    k: (S, B, H, N, d_key), v: (S, B, H, N, d_value). Returns M: (S + 1, B, H, d_key, d_value) and
    z: (S + 1, B, H, d_key). All writes are known in advance, and so are all z. So the delta rule is
    M_s = M_{s-1} - erase_s M_{s-1} + write_s. Only these small steps run in order."""
    sk = sigma(k)
    with full_precision(sk):
        write = sk.mT @ v.to(sk.dtype)                               # (S, B, H, d_key, d_value)
        z = torch.cat([memory.z.unsqueeze(0), sk.sum(-2)]).cumsum(0)
        M = [memory.M]
        if update == "linear":
            for write_s in write:                                    # faster than a cumsum
                M.append(M[-1] + write_s)
        else:
            erase = sk.mT @ (sk / normaliser(sk, z[:-1]))            # (S, B, H, d_key, d_key)
            for erase_s, write_s in zip(erase, write):
                M.append(M[-1] - erase_s @ M[-1] + write_s)
        return Memory(torch.stack(M), z)

# --- What is refused -----------------------------------------------------------------------------
def require(ok, name, was, must):
    """Refuse bad input in one line with the argument's name, its value and what it must be."""
    if not ok:
        raise ValueError(f"{name} was {was}, must be {must}")

def require_number(name, value, low=-sys.float_info.max, whole=False):
    """Refuse what is not a finite number of at least `low`. NumPy's numbers become Python's."""
    number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    plain = value.item() if hasattr(value, "item") else value
    must = f"a {'whole' if whole else 'finite'} number" + f" of at least {low}" * (low >= 0)
    require(number and low <= plain <= sys.float_info.max, name, repr(value), must)
    return plain

def check_config(config):
    words = {"update": ("linear", "delta"), "attention": ("infini", "local", "xl", "full"),
             "form": ("parallel", "recurrent")}
    for field in fields(config):
        name, value, kind = field.name, getattr(config, field.name), type(field.default)
        if kind in (int, float):
            value = require_number(name, value, *((1, True) if kind is int else ()))
            object.__setattr__(config, name, kind(value))
        else:
            must = words.get(name, (False, True))
            require(type(value) is kind and value in must, name, repr(value), f"one of {must}")
    require(config.d_key % 2 == 0, "d_key", config.d_key, "even (RoPE turns pairs of features)")
    require(config.rope_base >= 1, "rope_base", config.rope_base, "at least 1")

def check_input(layer, x, state):
    require(torch.is_tensor(x) and x.is_floating_point(), "x", getattr(x, "dtype", type(x)),
            "a tensor of floating-point numbers")
    c, shape = layer.config, tuple(x.shape)
    require(len(shape) == 3 and shape[1] > 0 and shape[2] == c.d_model, "x of shape", shape,
            f"(B, T, {c.d_model}) with T of at least 1")
    if state is None:
        return
    require(isinstance(state, State), "state", type(state).__name__, "a State from this layer")
    both = state, layer.empty_state(x)
    was, must = (type(s.memory).__name__ for s in both)
    require(was == must, "state with memory", was, f"{must} for attention={c.attention!r}")
    parts = [(*(s.memory or ()), s.k, s.v) for s in both]
    for name, was, must in zip(("memory", "memory", "k", "v")[-len(parts[0]):], *parts):
        fits = was.dim() == must.dim() and all(m in (0, n) for m, n in zip(must.shape, was.shape))
        require(fits, f"state.{name} of shape", tuple(was.shape), [n or "L" for n in must.shape])
        require(was.device == x.device, f"state.{name} on device", was.device, x.device)
        ok = was.dtype == must.dtype or c.attention != "infini" or name != "memory"
        require(ok, "state.memory of dtype", was.dtype, f"{must.dtype} for an x of {x.dtype}")
    L = state.k.shape[2]
    require(L < layer.N, "state with open tokens", L, f"below segment_len = {c.segment_len}")
    require(c.causal or L == 0, "state with open tokens", L, "0 at a call with causal=False")

def check_tokens(model, tokens, state):
    c, device = model.config, model.embedding.weight.device
    require(torch.is_tensor(tokens), "tokens", type(tokens).__name__, "a tensor of shape (B, T)")
    shape, dtype = tuple(tokens.shape), tokens.dtype
    require(len(shape) == 2 and 0 not in shape, "tokens of shape", shape, "(B, T), not empty")
    require(dtype in (torch.int32, torch.int64), "tokens of dtype", dtype, "int64 or int32")
    require(tokens.device == device, "tokens on device", tokens.device, f"{device}, as the model")
    ok = state is None or type(state) is list and [type(s) for s in state] == [State] * c.n_layers
    require(ok, "state", type(state).__name__, f"None or a list of {c.n_layers} States")
    if not torch.compiler.is_compiling():
        try:
            low, high = tokens.min().item(), tokens.max().item()
        except RuntimeError:    # meta, fake and vmapped tensors have no values to check
            return
        ok = 0 <= low and high < c.vocab_size
        require(ok, "tokens", f"in {low} ... {high}", f"in 0 ... {c.vocab_size - 1}")
