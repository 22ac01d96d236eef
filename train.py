"""A training loop, and a small language model to use it on.

    python train.py        train a model of bytes, and say how good it is
"""

import hashlib
import io
import math
import os
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from common import Progress
from infini import InfiniConfig, InfiniTransformer

# --- Text -----------------------------------------------------------------------------


def text_files(root):
    """List the files in a folder, or the file itself, in the order of their names."""
    if root.is_file():
        return [root]
    files = []
    for file in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if file.is_file() and not hidden:
            files.append(file)
    return files


def standard_library():
    """List the source files of Python's standard library, without tests and tables."""
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages",
                "encodings", "topics.py"}
    root = Path(os.__file__).parent
    files = []
    for file in text_files(root):
        parts = set(file.relative_to(root).parts)
        if file.suffix == ".py" and not parts & left_out:
            files.append(file)
    return files


def read_documents(root=None, shortest=1):
    """Read texts as byte tensors. Returns those to train on, and a tenth that is held out.

    root: a folder or a file. None is the source code of Python's standard library. Left
    out are hidden and binary files, copies, and texts of less than `shortest` bytes. Of a
    single text, the last tenth is held out. Raises ValueError if there is too little text.
    """
    files = standard_library() if root is None else text_files(Path(root))
    texts = [file.read_bytes() for file in files]
    texts = [text for text in texts if text and 0 not in text]    # a 0 means binary
    random.Random(0).shuffle(texts)
    texts = list(dict.fromkeys(texts))                            # no copies

    if len(texts) == 1:
        cut = len(texts[0]) * 9 // 10
        held_out, training = [texts[0][cut:]], [texts[0][:cut]]
    else:
        n_held_out = max(1, len(texts) // 10)
        held_out, training = texts[:n_held_out], texts[n_held_out:]

    training = [as_tensor(text) for text in training if len(text) >= shortest]
    held_out = [as_tensor(text) for text in held_out if len(text) >= shortest]
    if not training or not held_out:
        raise ValueError(f"{root or 'the library'} has too few texts of {shortest:,} bytes")
    return training, held_out


def as_tensor(text):
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def draw_sequences(documents, batch, length, rng):
    """Draw (batch, length) bytes. Each place in the text is equally likely."""
    places = [max(0, len(document) - length + 1) for document in documents]
    drawn = []
    for document in rng.choices(documents, places, k=batch):
        start = rng.randrange(len(document) - length + 1)
        drawn.append(document[start:start + length])
    return torch.stack(drawn).long()


def validation_pieces(documents, length, most=100):
    """Cut documents into pieces that do not overlap, at most `most`, spread evenly.

    Returns (n, length) bytes. Raises ValueError if all documents are shorter.
    """
    pieces = []
    for document in documents:
        for piece in document.split(length):
            if len(piece) == length:
                pieces.append(piece)
    if not pieces:
        raise ValueError(f"no held-out text has {length:,} bytes")
    every = math.ceil(len(pieces) / most)
    return torch.stack(pieces[::every]).long()


# --- Optimizer ------------------------------------------------------------------------


def make_optimizer(model, lr, gate_lr):
    """Make AdamW with a group of its own for the gates.

    Departure: the paper uses Adafactor with one rate. Adam moves a number by about its
    rate per step. A beta must move by about 4 to open or shut a gate, so gates have a rate
    of their own. Nothing has weight decay, which would pull gates to a half.
    """
    gates = []
    rest = []
    for name, parameter in model.named_parameters():
        if "beta" in name.split("."):
            gates.append(parameter)
        else:
            rest.append(parameter)

    groups = [dict(params=rest, peak=lr), dict(params=gates, peak=gate_lr)]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)


def schedule(step, steps, warmup=50, final=0.1):
    """Return the share of the peak rate: a linear warm-up, then half a cosine."""
    rise = min(1.0, (step + 1) / warmup)
    cosine = (1 + math.cos(math.pi * step / steps)) / 2           # from 1 to 0
    return rise * (final + (1 - final) * cosine)


def take_step(model, optimizer, loss, share=1.0, clip=1.0):
    """Take one step with a share of the peak rates. Returns the loss as a number.

    Raises ValueError, and changes no weight, if the loss or its gradient is not finite.
    """
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak"]

    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    if not (loss.isfinite() and norm.isfinite()):
        raise ValueError(f"the loss is {loss.item()}, its gradient {norm.item()} long")

    optimizer.step()
    return loss.item()


# --- Checkpoints ----------------------------------------------------------------------


def write_checkpoint(path, content):
    """Write a file beside, then rename it. A kill in between leaves the old one whole."""
    path = Path(path).resolve()                                   # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(buffer.getbuffer())
    os.replace(beside, path)


def read_checkpoint(path):
    """Read what `train` wrote. No code in it is ever run.

    Raises OSError if the file can't be read, ValueError if it is no checkpoint.
    """
    data = io.BytesIO(Path(path).read_bytes())
    try:
        content = torch.load(data, map_location="cpu", weights_only=True)
        model = InfiniTransformer(InfiniConfig(**content["config"]))
        model.load_state_dict(content["model"])
        content["settings"] = dict(content["settings"])
        names = ["config", "settings", "model", "optimizer", "losses"]
        return {name: content[name] for name in names}
    except Exception as error:    # torch.load has many kinds
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is no checkpoint of this version ({reason})") from None


def load_model(path, device="cpu"):
    """Load the model in a checkpoint, ready for use. Returns it and its settings."""
    content = read_checkpoint(path)
    model = InfiniTransformer(InfiniConfig(**content["config"]))
    model.load_state_dict(content["model"])
    return model.to(device).eval(), content["settings"]


def find_start(path, config, settings, resume):
    """Find the checkpoint of this training to go on from. Returns its content, or None.

    Raises ValueError if the file is of another training, or of one that is not finished and
    would be written over.
    """
    if not Path(path).exists():
        return None
    old = read_checkpoint(path)
    was = {**old["config"], **old["settings"]}
    now = {**asdict(config), **settings}
    for name in {**now, **was}:
        if was.get(name) != now.get(name):
            raise ValueError(f"{path} is of another training, with {name} {was.get(name)}")

    unfinished = len(old["losses"]) < settings["steps"]
    if unfinished and not resume:
        raise ValueError(f"{path} is not finished; --resume goes on with it")
    return old if resume else None


# --- The loop -------------------------------------------------------------------------

SAVE_EVERY = 100    # steps


def train(model, loss_of, steps, path, lr, gate_lr, resume=False, **others):
    """Train a model and leave it in the checkpoint `path`. Returns the loss of every step.

    loss_of: (model, step) -> loss, tokens read, {name: number to show}. It draws by `step`
    alone, so a resumed training sees what an uninterrupted one sees, bit for bit.
    others: what else decides the result, plain values. They are stored as settings of the
    training beside steps and rates, and must be the same to resume.
    Raises ValueError if the file is of another training, or a loss is not finite.
    """
    settings = dict(steps=steps, lr=lr, gate_lr=gate_lr, **others)
    optimizer = make_optimizer(model, lr, gate_lr)
    losses = []

    start = find_start(path, model.config, settings, resume)
    if start is not None:
        model.load_state_dict(start["model"])
        losses = start["losses"]
        if len(losses) < steps:
            optimizer.load_state_dict(start["optimizer"])

    model.train()
    progress = Progress(Path(path).stem, steps, len(losses))
    for step in range(len(losses), steps):
        loss, n_tokens, numbers = loss_of(model, step)
        share = schedule(step, steps)
        losses.append(take_step(model, optimizer, loss, share))

        done = step + 1
        if done % SAVE_EVERY == 0 or done == steps:
            write_checkpoint(path, dict(
                config=asdict(model.config),
                settings=settings,
                model=model.state_dict(),
                optimizer=optimizer.state_dict() if done < steps else None,
                losses=losses,
            ))
        progress.show(done, n_tokens, loss=losses[-1], **numbers)
    return losses


# --- The language model ---------------------------------------------------------------

# The kinds of model that we compare. All else is equal.
KINDS = {
    "local": dict(attention="local"),
    "xl": dict(attention="xl"),
    "linear": dict(update="linear"),
    "delta": dict(update="delta"),
    "full": dict(attention="full"),
}

SEGMENTS = 16    # in a training sequence; a step reads one sequence

SIZES = dict(
    d_model=128,
    n_heads=4,
    d_key=32,
    d_value=32,
    d_ff=512,
    segment_len=128,
    rope_base=1e4,
    gate_init=-1.5,
    gate_spread=5.1,    # betas rise from about -4 to 1
)


@dataclass(frozen=True)
class Recipe:
    """Says how a language model is trained. With the text it decides every number."""

    kind: str = "delta"
    seed: int = 0
    steps: int = 5000
    lr: float = 3e-3
    gate_lr: float = 1e-2
    n_layers: int = 2
    name: str = ""        # of the file; without one it is the kind

    def path(self, out):
        return Path(out) / f"lm-{self.name or self.kind}-seed{self.seed}.pt"

    def config(self):
        return InfiniConfig(n_layers=self.n_layers, **SIZES, **KINDS[self.kind])

    def settings(self, text):
        """List all that decides the result and is not in the config."""
        return dict(steps=self.steps, lr=self.lr, gate_lr=self.gate_lr, seed=self.seed,
                    kind=self.kind, text=text, length=sequence_length())


def sequence_length():
    """Return the bytes of a training sequence."""
    return SEGMENTS * SIZES["segment_len"]


def fingerprint(documents):
    """Return a number that tells this text from others."""
    return hashlib.sha256(b"".join(document.numpy() for document in documents)).hexdigest()


def check_files(recipes, documents, out, resume):
    """Raise ValueError if any training would meet a checkpoint that is in its way."""
    text = fingerprint(documents)
    for recipe in recipes:
        find_start(recipe.path(out), recipe.config(), recipe.settings(text), resume)


def lm_loss(documents, seed, length):
    """Make the loss of a language model, as `train` wants it.

    Seed and step alone decide what is drawn, so all kinds of model see the same bytes.
    """
    def loss_of(model, step):
        rng = random.Random(f"{seed}/{step}")
        tokens = draw_sequences(documents, 1, length + 1, rng)
        tokens = tokens.to(model.head.weight.device)

        with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
            logits, _ = model(tokens[:, :-1])                     # (1, length, 256)
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        return loss, length, {"bits per byte": loss.item() / math.log(2)}

    return loss_of


def train_lm(recipe, documents, out, device="cpu", resume=False, model=None):
    """Train a language model and leave it in the folder `out`. Returns its path.

    model: the one to go on from. Without it, the recipe makes a new one.
    """
    torch.manual_seed(recipe.seed)
    if model is None:
        model = InfiniTransformer(recipe.config())
    loss_of = lm_loss(documents, recipe.seed, sequence_length())
    settings = recipe.settings(fingerprint(documents))
    path = recipe.path(out)
    train(model.to(device), loss_of, path=path, resume=resume, **settings)
    return path


@torch.no_grad()
def bits(model, pieces, forget=False):
    """Compute the bits that each byte but the first costs, for pieces: (n, T + 1) bytes.

    forget: empty the memory before each segment, to see what it is worth. Then N must
    divide T. Returns (n, T).
    """
    device = model.head.weight.device
    costs = []
    for piece in pieces.split(8):
        given = piece[:, :-1].to(device)
        target = piece[:, 1:].to(device)
        if forget:                                                # each segment on its own
            given = given.unflatten(1, (-1, model.config.segment_len)).flatten(0, 1)

        logits, _ = model(given)
        cost = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(),
                               reduction="none")
        costs.append(cost.view(target.shape).cpu() / math.log(2))
    return torch.cat(costs)


def main():
    parser = common.new_parser("Train a language model of bytes.")
    add = parser.add_argument
    add("--kind", choices=KINDS, default="delta", help="of attention, or rule of memory")
    add("--data", type=common.path, help="text file or folder; unset, Python's source")
    add("--steps", type=common.count, default=5000, help="of training")
    add("--lr", type=common.share, default=3e-3, help="learning rate")
    add("--n-layers", type=common.count, default=2, help="of the model")
    add("--seed", type=common.seed, default=0, help="of weights and training text")
    add("--resume", action="store_true", help="go on with a training that was stopped")
    common.add_shared_arguments(parser)
    args = parser.parse_args()
    common.set_threads(args.threads)

    length = sequence_length()
    documents, held_out = read_documents(args.data, shortest=length + 1)
    pieces = validation_pieces(held_out, length + 1)

    recipe = Recipe(args.kind, args.seed, args.steps, args.lr, n_layers=args.n_layers)
    path = train_lm(recipe, documents, args.out, args.device, args.resume)
    model, _ = load_model(path, args.device)
    print_report(model, pieces)


def print_report(model, pieces):
    n, length = pieces.shape
    cost = bits(model, pieces).mean()
    print(f"{cost:.4f} bits per byte on {n} held-out pieces of {length - 1:,} bytes")
    if model.config.attention == "infini":
        cost = bits(model, pieces, forget=True).mean()
        print(f"{cost:.4f} if it forgets after each segment")
        print("sigmoid(beta), a row per layer and a column per head:")
        print(model.gates())


if __name__ == "__main__":
    common.run_command(main)
