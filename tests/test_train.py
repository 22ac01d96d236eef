"""The claims about train.py: text, optimizer, checkpoints, the loop and the language model.

Nearly all of them train a toy, a model of a few numbers, for a few steps.
"""

import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from infini import InfiniConfig, InfiniTransformer
from train import KINDS, Recipe, read_checkpoint, read_documents

# Sizes that differ from one another, so that no two axes can be taken for each other.
TOY = InfiniConfig(vocab_size=256, d_model=12, n_layers=2, n_heads=3, d_key=4, d_value=6,
                   d_ff=20, segment_len=5, gate_init=-1.0, gate_spread=2.0)

each_kind = pytest.mark.parametrize("kind", KINDS)


# --- Helpers --------------------------------------------------------------------------


def make_toy(kind="delta", dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return InfiniTransformer(replace(TOY, **KINDS[kind])).to(dtype)


def draw_tokens(B, T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TOY.vocab_size, (B, T), generator=generator)


def toy_loss(model, step):
    tokens = draw_tokens(2, 13, seed=step)
    logits, _ = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return loss, 24, {"shown": 1.0}


def gate_loss(model, step):
    """A loss of the betas alone, so that many steps take little time."""
    betas = [block.attention.beta for block in model.blocks]
    return torch.stack(betas).sum(), 1, {}


def train_toy(path, steps=7, loss_of=toy_loss, model=None, **other):
    """Train a toy. Returns it and the losses."""
    if model is None:
        model = make_toy()
    settings = dict(lr=0.01, gate_lr=0.1, seed=0)
    losses = train.train(model, loss_of, steps, path, **{**settings, **other})
    return model, losses


class Stopped(Exception):
    """Raised where a training stops that is not to end."""


def stop_at(last):
    """Make the toy's loss, and stop at this step."""
    def loss_of(model, step):
        if step == last:
            raise Stopped
        return toy_loss(model, step)

    return loss_of


def stop_toy(path, last, **other):
    with pytest.raises(Stopped):
        train_toy(path, loss_of=stop_at(last), **other)


def never(model, step):
    pytest.fail("a training began")


def copy_of(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def same_weights(weights, other):
    names = weights.keys() == other.keys()
    return names and all(torch.equal(weights[name], other[name]) for name in weights)


def assert_same_training(path, other):
    """Require two checkpoints to be of one training, bit for bit."""
    one = read_checkpoint(path)
    two = read_checkpoint(other)
    assert one["losses"] == two["losses"]
    assert one["config"] == two["config"]
    assert one["settings"] == two["settings"]
    assert same_weights(one["model"], two["model"])


def bits_of_bytes(model, tokens):
    """The bits of each byte but the first, from probabilities in float64. (B, T - 1)."""
    logits, _ = model(tokens[:, :-1])
    p = logits.detach().double().softmax(-1)
    p = p.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
    return -p.log2()


def bytes_of(documents):
    return [bytes(document.numpy()) for document in documents]


@pytest.fixture
def saved_often(monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 2)


@pytest.fixture
def small(monkeypatch):
    """Let the language model have 16 numbers per byte, and read 128 bytes per step."""
    monkeypatch.setitem(train.SIZES, "d_model", 16)
    monkeypatch.setitem(train.SIZES, "d_ff", 32)
    monkeypatch.setitem(train.SIZES, "segment_len", 8)


# --- Text -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library():
    """Read the standard library by train.py. Returns texts to train on, and held out."""
    training, held_out = read_documents()
    return bytes_of(training), bytes_of(held_out)


@pytest.fixture(scope="module")
def library_by_hand():
    """Read it in another way. Returns its texts in the order of their files' names."""
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages",
                "encodings", "topics.py"}
    files = []
    for folder, folders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        folders[:] = set(folders) - left_out
        for name in set(names) - left_out:
            if name.endswith(".py"):
                files.append(Path(folder, name))

    texts = [file.read_bytes() for file in sorted(files)]
    return list(dict.fromkeys(text for text in texts if text and b"\0" not in text))


def test_the_text_is_the_source_of_the_standard_library_without_tests_and_tables(
        library, library_by_hand):
    training, held_out = library

    assert sorted(training + held_out) == sorted(library_by_hand)
    assert len(held_out) == len(library_by_hand) // 10


def test_what_is_held_out_is_spread_over_the_library(library, library_by_hand):
    _, held_out = library

    place_of = {text: i / len(library_by_hand) for i, text in enumerate(library_by_hand)}
    places = torch.tensor([place_of[text] for text in held_out])
    in_each_quarter = places.histc(4, 0, 1)
    assert in_each_quarter.min() > len(held_out) / 10


def test_a_tenth_of_the_texts_is_held_out_and_every_text_is_in_one_part(folder):
    training, held_out = read_documents(folder)

    assert len(held_out) == 2
    found = sorted(len(document) for document in training + held_out)
    assert found == list(range(100, 4000, 200))


@pytest.mark.parametrize("n, n_held_out", [(2, 1), (9, 1), (19, 1), (20, 2)])
def test_at_least_one_text_is_held_out(n, n_held_out, tmp_path):
    for i in range(n):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")

    training, held_out = read_documents(tmp_path)

    assert (len(training), len(held_out)) == (n - n_held_out, n_held_out)


def test_the_order_of_the_file_system_does_not_matter(folder, monkeypatch):
    expected = [bytes_of(part) for part in read_documents(folder)]
    rglob = Path.rglob

    def rglob_backwards(root, pattern):
        return sorted(rglob(root, pattern), reverse=True)

    monkeypatch.setattr(Path, "rglob", rglob_backwards)
    found = [bytes_of(part) for part in read_documents(folder)]

    assert found == expected


@pytest.mark.parametrize("name, content", [
    (".hidden.txt", b"text"),
    (".hidden/a.txt", b"text"),
    ("deep/.hidden/deeper/a.txt", b"text"),
    ("binary.txt", b"te\0xt"),
    ("empty.txt", b""),
    ("copy.txt", bytes([40]) * 100),    # of the fixture's first text
])
def test_hidden_and_binary_files_copies_and_empty_texts_are_left_out(name, content, folder):
    expected = sorted(bytes_of(sum(read_documents(folder), [])))

    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    found = sorted(bytes_of(sum(read_documents(folder), [])))

    assert found == expected


def test_a_folder_in_a_hidden_one_is_not_hidden(folder):
    hidden = folder.rename(folder.with_name(".text"))

    assert len(sum(read_documents(hidden), [])) == 20


def test_texts_of_less_than_the_shortest_length_are_left_out_of_both_parts(folder):
    training, held_out = read_documents(folder)
    lengths = [len(document) for document in training]
    held_out_lengths = [len(document) for document in held_out]
    shortest = sorted(held_out_lengths)[1]

    training, held_out = read_documents(folder, shortest)
    assert [len(d) for d in training] == [n for n in lengths if n >= shortest]
    assert [len(d) for d in held_out] == [shortest]

    with pytest.raises(ValueError, match="has too few texts of"):
        read_documents(folder, shortest + 1)


def test_of_a_single_text_the_last_tenth_is_held_out(tmp_path):
    text = bytes(range(1, 101)) * 10
    (tmp_path / "book.txt").write_bytes(text)
    (tmp_path / "empty.txt").write_bytes(b"")    # is no text

    for root in (tmp_path, tmp_path / "book.txt"):
        training, held_out = read_documents(root)
        assert bytes_of(training) == [text[:900]]
        assert bytes_of(held_out) == [text[900:]]


def test_too_little_text_is_an_error_that_names_the_folder_and_the_length(tmp_path):
    (tmp_path / "book.txt").write_bytes(b"text" * 1000)

    with pytest.raises(ValueError, match=r"book.txt has too few texts of 1,024 bytes"):
        read_documents(tmp_path / "book.txt", shortest=1024)    # 400 are held out


def test_each_place_in_the_text_is_equally_likely_to_be_drawn():
    documents = [torch.arange(10), torch.arange(100, 150), torch.arange(5)]

    drawn = train.draw_sequences(documents, 8000, 10, random.Random(0))

    assert torch.equal(drawn, drawn[:, :1] + torch.arange(10))    # never across a border
    places, counts = drawn[:, 0].unique(return_counts=True)
    assert places.tolist() == [0, *range(100, 141)]
    assert (counts * 42 / 8000 - 1).abs().max() < 0.3


def numbered(first, last):
    """Make a text whose bytes are these numbers, so that a piece shows where it begins."""
    return torch.arange(first, last, dtype=torch.uint8)


def test_validation_pieces_do_not_overlap_and_are_whole():
    documents = [numbered(0, 70), numbered(70, 149), numbered(149, 209)]

    pieces = train.validation_pieces(documents, 20)

    assert torch.equal(pieces, pieces[:, :1] + torch.arange(20))
    assert pieces[:, 0].tolist() == [0, 20, 40, 70, 90, 110, 149, 169, 189]


@pytest.mark.parametrize("most, starts", [
    (9, [0, 20, 40, 60, 80, 100, 120, 140, 160]),
    (8, [0, 40, 80, 120, 160]),
    (5, [0, 40, 80, 120, 160]),
    (4, [0, 60, 120]),
])
def test_at_most_so_many_pieces_are_spread_evenly(most, starts):
    pieces = train.validation_pieces([numbered(0, 180)], 20, most)

    assert pieces[:, 0].tolist() == starts


def test_without_a_piece_there_is_an_error():
    with pytest.raises(ValueError, match="no held-out text has 1,024 bytes"):
        train.validation_pieces([torch.zeros(1023, dtype=torch.uint8)], 1024)


@pytest.mark.parametrize("n, n_taken", [(100, 100), (101, 51)])
def test_a_hundred_pieces_are_enough(n, n_taken):
    document = torch.zeros(2 * n, dtype=torch.uint8)

    assert len(train.validation_pieces([document], 2)) == n_taken


# --- Optimizer ------------------------------------------------------------------------


def names_in_groups(model, optimizer):
    """Return {peak rate: names of the parameters that have it}."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    groups = {}
    for group in optimizer.param_groups:
        groups[group["peak"]] = sorted(name_of[parameter] for parameter in group["params"])
    return groups


def test_gates_are_in_a_group_of_their_own_and_nothing_has_weight_decay():
    model = torch.nn.ParameterDict({
        "beta": torch.ones(3, 2),
        "alphabeta": torch.ones(2),
        "weight": torch.ones(2, 2),
        "deep": torch.nn.ParameterDict({"beta": torch.ones(3), "gain": torch.ones(3)}),
    })

    optimizer = train.make_optimizer(model, lr=0.1, gate_lr=0.2)

    assert names_in_groups(model, optimizer) == {
        0.1: ["alphabeta", "deep.gain", "weight"],
        0.2: ["beta", "deep.beta"],
    }
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0]


def test_a_model_without_gates_has_one_group():
    model = make_toy("local")

    optimizer = train.make_optimizer(model, lr=0.1, gate_lr=0.2)

    assert list(names_in_groups(model, optimizer)) == [0.1]


@pytest.mark.parametrize("step, share", [
    (0, 1 / 4),
    (2, 3 / 4 * (0.2 + 0.8 * (1 + math.cos(0.2 * math.pi)) / 2)),
    (3, 0.2 + 0.8 * (1 + math.cos(0.3 * math.pi)) / 2),
    (5, 0.6),
    (10, 0.2),
])
def test_the_rate_rises_linearly_and_then_falls_by_half_a_cosine(step, share):
    assert train.schedule(step, 10, warmup=4, final=0.2) == pytest.approx(share)


def test_unless_told_otherwise_the_rate_rises_for_50_steps_and_falls_to_a_tenth():
    assert train.schedule(0, 10 ** 9) == pytest.approx(0.02)
    assert train.schedule(48, 10 ** 9) == pytest.approx(0.98)
    assert train.schedule(49, 10 ** 9) == pytest.approx(1.0)
    assert train.schedule(1000, 1000) == pytest.approx(0.1)


def long_and_short_loss(model, step):
    """Make a loss whose gradient is longer than 1 in every other step only."""
    loss, n_tokens, numbers = toy_loss(model, step)
    factor = 50 if step % 2 else 0.01
    return factor * loss, n_tokens, numbers


def adam_by_hand(model, steps):
    """Train by Adam's equations, with gradients of at most 1 and rates of a schedule."""
    parameters = dict(model.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}

    for t in range(steps):
        loss, _, _ = long_and_short_loss(model, t)
        slopes = torch.autograd.grad(loss, list(parameters.values()))
        length = math.sqrt(sum((slope ** 2).sum().item() for slope in slopes))
        assert (length > 1) == (t % 2 == 1)

        share = min(1, (t + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * t / steps))
        for (name, p), slope in zip(parameters.items(), slopes, strict=True):
            slope = slope / max(1, length)
            first[name] = 0.9 * first[name] + 0.1 * slope
            second[name] = 0.98 * second[name] + 0.02 * slope ** 2
            mean = first[name] / (1 - 0.9 ** (t + 1))
            square = second[name] / (1 - 0.98 ** (t + 1))
            rate = 0.1 if name.endswith("beta") else 0.01
            p.data -= share * rate * mean / (square.sqrt() + 1e-8)


def test_training_is_adam_with_clip_and_schedule(tmp_path):
    expected = make_toy(dtype=torch.float64)
    adam_by_hand(expected, steps=60)

    model = make_toy(dtype=torch.float64)
    train_toy(tmp_path / "a.pt", 60, long_and_short_loss, model)

    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_step_is_by_a_share_of_each_peak_rate_and_returns_the_loss():
    model = make_toy()
    optimizer = train.make_optimizer(model, lr=0.01, gate_lr=0.1)
    before = copy_of(model)
    loss, _, _ = toy_loss(model, 0)

    found = train.take_step(model, optimizer, loss, share=0.5)

    assert found == loss.item()
    for name, p in model.named_parameters():    # Adam's first step is as long as its rate
        rate = 0.05 if name.endswith("beta") else 0.005
        moved = (p.detach() - before[name]).abs().max().item()
        assert moved == pytest.approx(rate, rel=0.01)


@pytest.mark.parametrize("clip", [0.25, 1e9])
def test_a_gradient_is_cut_to_the_length_of_clip(clip):
    model = make_toy()
    optimizer = train.make_optimizer(model, lr=0.01, gate_lr=0.1)
    loss, _, _ = toy_loss(model, 0)
    slopes = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    length = torch.cat([slope.flatten() for slope in slopes]).norm().item()

    train.take_step(model, optimizer, loss, clip=clip)

    left = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert left == pytest.approx(min(length, clip), rel=1e-4)


def nan_loss(loss):
    return loss * math.nan


def infinite_loss(loss):
    return loss + math.inf


def infinite_gradient(loss):
    return loss + (loss - loss.detach()).sqrt()    # the root's slope at 0


each_broken = pytest.mark.parametrize(
    "broken", [nan_loss, infinite_loss, infinite_gradient])


@each_broken
def test_a_loss_or_a_gradient_that_is_not_finite_changes_no_weight(broken):
    model = make_toy()
    optimizer = train.make_optimizer(model, lr=0.01, gate_lr=0.1)
    before = copy_of(model)
    loss, _, _ = toy_loss(model, 0)

    with pytest.raises(ValueError, match="the loss is .*, its gradient .* long"):
        train.take_step(model, optimizer, broken(loss))

    assert same_weights(model.state_dict(), before)


@each_broken
def test_a_training_stops_when_its_loss_or_gradient_is_not_finite(
        broken, saved_often, tmp_path):
    def loss_of(model, step):
        loss, n_tokens, numbers = toy_loss(model, step)
        if step == 5:
            loss = broken(loss)
        return loss, n_tokens, numbers

    with pytest.raises(ValueError, match="the loss is"):
        train_toy(tmp_path / "a.pt", loss_of=loss_of)

    assert len(read_checkpoint(tmp_path / "a.pt")["losses"]) == 4


# --- Checkpoints ----------------------------------------------------------------------


@each_kind
def test_a_checkpoint_holds_the_model_its_settings_and_every_loss(kind, tmp_path):
    path = tmp_path / "new" / "folder" / "a.pt"
    model, losses = train_toy(path, model=make_toy(kind), text="abc")

    loaded, settings = train.load_model(path)

    assert loaded.config == model.config
    assert same_weights(loaded.state_dict(), model.state_dict())
    assert not loaded.training
    assert settings == dict(steps=7, lr=0.01, gate_lr=0.1, seed=0, text="abc")
    assert read_checkpoint(path)["losses"] == losses
    assert len(losses) == 7


def test_a_finished_training_does_not_keep_the_state_of_its_optimizer(tmp_path):
    train_toy(tmp_path / "a.pt", 1)

    assert read_checkpoint(tmp_path / "a.pt")["optimizer"] is None


def test_a_model_is_in_training_mode_while_it_is_trained(tmp_path):
    modes = []

    def loss_of(model, step):
        modes.append(model.training)
        return toy_loss(model, step)

    train_toy(tmp_path / "a.pt", 2, loss_of, make_toy().eval())

    assert modes == [True, True]


def test_a_checkpoint_is_saved_every_100_steps_and_at_the_end(tmp_path):
    path = tmp_path / "a.pt"
    saved = []

    def loss_of(model, step):
        if path.exists():
            saved.append(len(read_checkpoint(path)["losses"]))
        return gate_loss(model, step)

    train_toy(path, 102, loss_of)

    assert saved == [100, 100]
    assert len(read_checkpoint(path)["losses"]) == 102


def test_a_link_stays_a_link(saved_often, tmp_path):
    (tmp_path / "link.pt").symlink_to("file.pt")

    train_toy(tmp_path / "link.pt")

    assert (tmp_path / "link.pt").is_symlink()
    assert len(read_checkpoint(tmp_path / "file.pt")["losses"]) == 7


@contextmanager
def no_file_longer_than(n_bytes):
    """Let a write beyond so many bytes fail, as on a full disk."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint_whole(tmp_path, command):
    path = tmp_path / "a.pt"

    def main():
        train_toy(path)

    assert command(main)[0] == 0
    before = path.read_bytes()
    with no_file_longer_than(len(before) // 2):
        code, _, err = command(main)

    *_, last = err.splitlines()
    assert code == 2
    assert last.startswith("error: ") and "File too large" in last
    assert path.read_bytes() == before


class Harmful:
    """Makes a folder when it is read, if code in a pickle is run."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("place", ["everything", "config", "settings", "model", "losses"])
def test_no_code_in_a_checkpoint_is_ever_run(place, tmp_path):
    train_toy(tmp_path / "a.pt", 1)
    content = read_checkpoint(tmp_path / "a.pt")
    content[place] = Harmful(tmp_path / "ran")
    if place == "everything":
        content = content[place]
    torch.save(content, tmp_path / "a.pt")

    with pytest.raises(ValueError, match="no checkpoint"):
        train.load_model(tmp_path / "a.pt")

    assert not (tmp_path / "ran").exists()


def without(content, name):
    return {key: value for key, value in content.items() if key != name}


def broken_files(path):
    """Write a checkpoint, and return {what is wrong: other bytes of such a file}."""
    train_toy(path, 1)
    whole = path.read_bytes()
    content = read_checkpoint(path)
    config = content["config"]

    wrong = {
        "a list": [1],
        "no config": without(content, "config"),
        "no model": without(content, "model"),
        "no settings": without(content, "settings"),
        "an empty config": {**content, "config": None},
        "another config": {**content, "config": {**config, "d_key": 8}},
        "an option of another version": {**content, "config": {**config, "form": "fast"}},
        "other weights": {**content, "model": {"weight": torch.zeros(1)}},
        "settings without names": {**content, "settings": 3},
    }
    files = {"empty": b"", "text": b"text", "cut": whole[:-1], "half": whole[:9999]}
    for name, content in wrong.items():
        torch.save(content, path)
        files[name] = path.read_bytes()
    return files


def test_a_file_that_is_no_checkpoint_is_refused_in_one_line_and_kept(tmp_path, command):
    path = tmp_path / "a.pt"

    def main():
        train_toy(path, loss_of=never)

    for wrong, content in broken_files(path).items():
        path.write_bytes(content)
        code, _, err = command(main)

        assert (code, err.count("\n")) == (2, 1), wrong
        assert err.startswith(f"error: {path} is no checkpoint of this version"), wrong
        assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["missing.pt", "."])
def test_a_file_that_can_not_be_read_is_an_error_of_the_system(name, tmp_path):
    with pytest.raises(OSError):
        read_checkpoint(tmp_path / name)


# --- Stopped and resumed --------------------------------------------------------------


@pytest.mark.parametrize("stop, saved", [(1, 0), (2, 2), (3, 2), (6, 6)])
def test_a_resumed_training_equals_an_uninterrupted_one(stop, saved, saved_often, tmp_path):
    steps = []

    def loss_of(model, step):
        steps.append(step)
        return toy_loss(model, step)

    whole, losses = train_toy(tmp_path / "whole.pt")
    stop_toy(tmp_path / "cut.pt", stop)
    model, resumed = train_toy(tmp_path / "cut.pt", loss_of=loss_of, resume=True)

    assert steps == list(range(saved, 7))
    assert resumed == losses
    assert same_weights(model.state_dict(), whole.state_dict())
    assert_same_training(tmp_path / "cut.pt", tmp_path / "whole.pt")


@each_kind
def test_each_kind_of_model_can_be_resumed(kind, saved_often, tmp_path):
    train_toy(tmp_path / "whole.pt", model=make_toy(kind))
    stop_toy(tmp_path / "cut.pt", 5, model=make_toy(kind))

    other = make_toy(kind, seed=1)    # its weights are not used
    train_toy(tmp_path / "cut.pt", model=other, resume=True)

    assert_same_training(tmp_path / "cut.pt", tmp_path / "whole.pt")


def test_a_resumed_training_shows_its_own_speed_and_what_is_left(
        saved_often, tmp_path, capsys, monkeypatch):
    stop_toy(tmp_path / "a.pt", 4)
    capsys.readouterr()

    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr(train.common.time, "perf_counter", seconds.__next__)
    _, losses = train_toy(tmp_path / "a.pt", resume=True)

    first, _, last = capsys.readouterr().err.splitlines()
    assert first == f"a: 5/7  loss {losses[4]:.4f}  shown 1.0000  2 tokens/s  20 s left"
    assert last == f"a: 7/7  loss {losses[6]:.4f}  shown 1.0000  2 tokens/s  0 s left"


def test_ctrl_c_is_one_line_and_loses_what_came_after_the_last_checkpoint(
        saved_often, tmp_path, command):
    def press_ctrl_c(model, step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
        return toy_loss(model, step)

    def main():
        train_toy(tmp_path / "a.pt", loss_of=press_ctrl_c)

    code, out, err = command(main)

    progress, *rest = err.splitlines()
    assert code == 130
    assert progress.startswith("a: 1/7")
    assert rest == ["", "stopped; checkpoints are as last saved"]
    assert len(read_checkpoint(tmp_path / "a.pt")["losses"]) == 4


def kill(*ignored):
    os.kill(os.getpid(), signal.SIGKILL)


def write_half_and_be_killed(path, content):
    with open(path, "wb") as file:
        file.write(content[:len(content) // 2])
    kill()


def train_until_killed(path, when):
    """Go on with a training until it is killed at a step, or while it writes a file."""
    def loss_of(model, step):
        if step == when:
            kill()
        return toy_loss(model, step)

    train.SAVE_EVERY = 2    # this is a process of its own
    if when == "writing":
        Path.write_bytes = write_half_and_be_killed
    train_toy(path, 12, loss_of, resume=True)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_training_that_is_killed_a_few_times_ends_as_one_that_is_not(tmp_path):
    path = tmp_path / "cut.pt"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_train", "torch._dynamo"])    # imported only once

    codes = []
    n_steps = []
    for when in (3, "writing", 7, "writing", None):
        process = context.Process(target=train_until_killed, args=(path, when))
        process.start()
        process.join()
        codes.append(process.exitcode)
        n_steps.append(len(read_checkpoint(path)["losses"]))

    train_toy(tmp_path / "whole.pt", 12)
    assert codes == [-signal.SIGKILL] * 4 + [0]
    assert n_steps == [2, 2, 6, 6, 12]
    assert_same_training(path, tmp_path / "whole.pt")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name, other", [
    ("steps", dict(steps=8)),
    ("lr", dict(lr=0.02)),
    ("gate_lr", dict(gate_lr=0.2)),
    ("seed", dict(seed=1)),
    ("text", dict(text="abc")),          # the file does not have it
])
def test_a_file_of_another_training_is_refused_before_the_first_step_and_kept(
        name, other, resume, tmp_path):
    path = tmp_path / "a.pt"
    train_toy(path)
    before = path.read_bytes()

    with pytest.raises(ValueError, match=f"a.pt is of another training, with {name} "):
        train_toy(path, loss_of=never, resume=resume, **other)

    assert path.read_bytes() == before


@pytest.mark.parametrize("name, kind", [("update", "linear"), ("attention", "local")])
def test_a_file_of_another_kind_of_model_is_of_another_training(name, kind, tmp_path):
    train_toy(tmp_path / "a.pt")

    with pytest.raises(ValueError, match=f"a.pt is of another training, with {name} "):
        train_toy(tmp_path / "a.pt", loss_of=never, model=make_toy(kind))


def test_a_file_with_more_settings_is_of_another_training(tmp_path):
    train_toy(tmp_path / "a.pt", text="abc")

    with pytest.raises(ValueError, match="a.pt is of another training, with text abc"):
        train_toy(tmp_path / "a.pt", loss_of=never)


def test_a_training_that_is_not_finished_is_refused_without_resume_and_kept(
        saved_often, tmp_path):
    path = tmp_path / "a.pt"
    stop_toy(path, 6)    # the last but one is saved
    before = path.read_bytes()

    with pytest.raises(ValueError, match="a.pt is not finished; --resume goes on with it"):
        train_toy(path, loss_of=never)

    assert path.read_bytes() == before


def test_a_finished_training_begins_anew_without_resume(tmp_path):
    _, losses = train_toy(tmp_path / "a.pt")

    _, again = train_toy(tmp_path / "a.pt")

    assert again == losses


def test_a_finished_training_trains_nothing_when_it_is_resumed(tmp_path):
    path = tmp_path / "a.pt"
    model, losses = train_toy(path)
    before = path.read_bytes()

    other, resumed = train_toy(path, loss_of=never, model=make_toy(seed=1), resume=True)

    assert resumed == losses
    assert same_weights(other.state_dict(), model.state_dict())
    assert path.read_bytes() == before


# --- The language model ---------------------------------------------------------------


def read_by(model):
    """Return a list that grows by the tokens of each call of the model."""
    calls = []

    def listen(model, inputs):
        calls.append(inputs[0])

    model.register_forward_pre_hook(listen)
    return calls


def test_the_loss_is_of_the_next_bytes():
    model = make_toy()
    calls = read_by(model)
    document = torch.arange(250, dtype=torch.uint8)    # the next byte is the next number

    loss, n_tokens, numbers = train.lm_loss([document], seed=0, length=40)(model, 5)

    given = calls[0]
    assert given.shape == (1, 40)
    assert n_tokens == 40
    bits = bits_of_bytes(model, torch.cat([given, given[:, -1:] + 1], dim=1)).mean().item()
    assert loss.item() == pytest.approx(bits * math.log(2), rel=1e-5)
    assert numbers == {"bits per byte": pytest.approx(bits, rel=1e-5)}


def test_seed_and_step_alone_decide_what_is_drawn():
    documents = [torch.arange(250, dtype=torch.uint8)]
    drawn = {}
    for seed, step in ((0, 5), (0, 6), (1, 5), (5, 0)):
        for kind in KINDS:
            model = make_toy(kind)
            calls = read_by(model)
            train.lm_loss(documents, seed, length=40)(model, step)
            tokens = drawn.setdefault((seed, step), calls[0])
            assert torch.equal(calls[0], tokens)

    starts = {tokens[0, 0].item() for tokens in drawn.values()}
    assert len(starts) == 4


@each_kind
def test_bits_are_those_of_the_probabilities(kind):
    model = make_toy(kind)
    tokens = draw_tokens(9, 21)    # more than are read at once

    found = train.bits(model, tokens)

    torch.testing.assert_close(found.double(), bits_of_bytes(model, tokens),
                               rtol=1e-5, atol=1e-5)


@each_kind
def test_forgetting_is_reading_each_segment_on_its_own(kind):
    model = make_toy(kind)
    tokens = draw_tokens(9, 21)    # four segments of five, and the last one's next byte

    found = train.bits(model, tokens, forget=True)

    expected = []
    for start in range(0, 20, 5):
        expected.append(bits_of_bytes(model, tokens[:, start:start + 6]))
    torch.testing.assert_close(found.double(), torch.cat(expected, dim=1),
                               rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, attention, update", [
    ("local", "local", "delta"),
    ("xl", "xl", "delta"),
    ("linear", "infini", "linear"),
    ("delta", "infini", "delta"),
    ("full", "full", "delta"),
])
def test_kinds_differ_in_attention_or_rule_and_all_else_is_equal(kind, attention, update):
    config = Recipe(kind, n_layers=3).config()

    ours = Recipe("delta", n_layers=3).config()
    assert config == replace(ours, attention=attention, update=update)
    assert config.n_layers == 3


def test_betas_rise_from_minus_4_to_1():
    model = InfiniTransformer(Recipe().config())

    betas = model.gates().logit()

    expected = torch.tensor([[-4.05, -2.35, -0.65, 1.05]] * 2)
    torch.testing.assert_close(betas, expected, rtol=1e-4, atol=1e-4)


def test_a_file_is_named_after_the_recipe_or_its_kind_and_the_seed():
    assert Recipe("xl", seed=3).path("out") == Path("out/lm-xl-seed3.pt")
    assert Recipe("xl", name="fast").path("out") == Path("out/lm-fast-seed0.pt")


@pytest.mark.parametrize("other", [
    dict(seed=1),
    dict(steps=4),
    dict(lr=0.1),
    dict(gate_lr=0.1),
    dict(n_layers=1),
])
def test_the_recipe_decides_every_number(other, small, folder, tmp_path):
    documents, _ = read_documents(folder, 129)
    recipe = Recipe(steps=3)
    first = train.train_lm(recipe, documents, tmp_path / "first")
    train.train_lm(Recipe(seed=7, steps=1), documents, tmp_path)    # does not matter
    again = train.train_lm(recipe, documents, tmp_path / "again")
    different = train.train_lm(replace(recipe, **other), documents, tmp_path / "other")

    assert_same_training(again, first)
    weights = read_checkpoint(first)["model"]
    assert not same_weights(read_checkpoint(different)["model"], weights)


def test_a_model_can_be_given_to_go_on_from(small, folder, tmp_path):
    documents, _ = read_documents(folder, 129)
    recipe = Recipe(steps=1, lr=0.0, gate_lr=0.0)
    torch.manual_seed(5)
    model = InfiniTransformer(recipe.config())

    path = train.train_lm(recipe, documents, tmp_path, model=model)

    assert same_weights(read_checkpoint(path)["model"], model.state_dict())


def test_a_file_of_another_text_is_of_another_training(small, folder, tmp_path):
    documents, _ = read_documents(folder, 129)
    train.train_lm(Recipe(steps=1), documents, tmp_path)

    documents[0][0] += 1
    with pytest.raises(ValueError, match="is of another training, with text "):
        train.train_lm(Recipe(steps=1), documents, tmp_path)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_all_files_are_checked_before_any_training(place, small, folder, tmp_path):
    documents, _ = read_documents(folder, 129)
    recipes = [Recipe("local", steps=1), Recipe("xl", steps=1), Recipe("full", steps=1)]
    other = replace(recipes[place], n_layers=1)

    train.check_files(recipes, documents, tmp_path, resume=False)
    train.train_lm(recipes[place], documents, tmp_path)
    train.check_files(recipes, documents, tmp_path, resume=False)
    other.path(tmp_path).unlink()
    path = train.train_lm(other, documents, tmp_path)

    with pytest.raises(ValueError, match=f"{path.name} is of another training"):
        train.check_files(recipes, documents, tmp_path, resume=False)


def test_a_training_that_is_not_finished_is_in_the_way_unless_it_is_resumed(
        small, folder, tmp_path, saved_often, monkeypatch):
    def stop_after_the_second_step(progress, done, n_tokens, **numbers):
        if done == 2:
            raise Stopped

    documents, _ = read_documents(folder, 129)
    recipe = Recipe(steps=3)
    monkeypatch.setattr(train.Progress, "show", stop_after_the_second_step)
    with pytest.raises(Stopped):
        train.train_lm(recipe, documents, tmp_path)

    train.check_files([recipe], documents, tmp_path, resume=True)
    with pytest.raises(ValueError, match="is not finished; --resume goes on with it"):
        train.check_files([recipe], documents, tmp_path, resume=False)


# --- The command ----------------------------------------------------------------------


def held_out_pieces(folder):
    """Cut the held-out texts into pieces of 129 bytes, in another way than train.py."""
    pieces = []
    for text in bytes_of(read_documents(folder)[1]):
        while len(text) >= 129:
            pieces.append(list(text[:129]))
            text = text[129:]
    return torch.tensor(pieces)


def test_the_command_trains_as_it_is_told(small, folder, tmp_path, command):
    code, _, err = command(
        train.main, "--data", folder, "--out", tmp_path / "new", "--kind", "linear",
        "--steps", 2, "--lr", 0.1, "--seed", 3, "--n-layers", 1)

    model, settings = train.load_model(tmp_path / "new" / "lm-linear-seed3.pt")
    assert code == 0
    assert err.splitlines()[-1].startswith("lm-linear-seed3: 2/2  loss ")
    assert "  bits per byte " in err
    assert (model.config.update, model.config.n_layers) == ("linear", 1)

    text = settings.pop("text")
    assert len(text) == 64
    assert settings == dict(steps=2, lr=0.1, gate_lr=0.01, seed=3, kind="linear",
                            length=128)


def test_the_command_says_what_a_held_out_byte_costs_with_and_without_memory(
        small, folder, tmp_path, command):
    code, out, _ = command(train.main, "--data", folder, "--out", tmp_path, "--steps", 2)

    model, _ = train.load_model(tmp_path / "lm-delta-seed0.pt")
    pieces = held_out_pieces(folder)
    cost = bits_of_bytes(model, pieces).mean()
    alone = [bits_of_bytes(model, pieces[:, i:i + 9]) for i in range(0, 128, 8)]
    assert code == 0
    assert out.splitlines() == [
        f"{cost:.4f} bits per byte on {len(pieces)} held-out pieces of 128 bytes",
        f"{torch.cat(alone, dim=1).mean():.4f} if it forgets after each segment",
        "sigmoid(beta), a row per layer and a column per head:",
        *str(model.gates()).splitlines(),
    ]


@each_kind
def test_each_kind_of_model_is_trained_and_only_a_memory_is_reported(
        kind, small, folder, tmp_path, command):
    code, out, _ = command(train.main, "--data", folder, "--out", tmp_path, "--steps", 1,
                           "--kind", kind)

    model, _ = train.load_model(tmp_path / f"lm-{kind}-seed0.pt")
    assert code == 0
    assert model.config.attention == KINDS[kind].get("attention", "infini")
    assert len(out.splitlines()) == (5 if kind in ("linear", "delta") else 1)


def test_the_command_goes_on_with_a_finished_training_without_a_step(
        small, folder, tmp_path, command):
    arguments = [train.main, "--data", folder, "--out", tmp_path, "--steps", 2]
    _, expected, _ = command(*arguments)

    code, out, err = command(*arguments, "--resume")

    assert (code, out, err) == (0, expected, "")


def test_train_py_runs_as_a_script(folder, tmp_path):
    script = Path(train.__file__)
    arguments = ["--data", folder, "--out", tmp_path, "--steps", "1", "--threads", "1"]

    done = subprocess.run([sys.executable, script, *arguments], cwd=script.parent,
                          capture_output=True, text=True)

    first, *_ = done.stdout.splitlines()
    assert done.returncode == 0
    assert "lm-delta-seed0: 1/1  loss " in done.stderr
    assert first.endswith("held-out pieces of 2,048 bytes")
    assert len(read_checkpoint(tmp_path / "lm-delta-seed0.pt")["losses"]) == 1


@pytest.mark.parametrize("option", [
    "--kind hebb",
    "--data=",
    "--steps 0",
    "--steps 1.5",
    "--lr -1",
    "--lr nan",
    "--lr 2",
    "--n-layers 0",
    "--seed -1",
    "--out=",
    "--device abacus",
    "--threads 0",
])
def test_an_option_that_makes_no_sense_is_named(option, command, monkeypatch):
    monkeypatch.setattr(train, "read_documents", never)

    code, out, err = command(train.main, *option.split())

    name = option.replace("=", " ").split()[0]
    assert (code, out) == (2, "")
    assert f": error: argument {name}: " in err.splitlines()[-1]


@pytest.mark.parametrize("arguments", ["--st 3", "more", "--resume=yes"])
def test_options_are_not_guessed(arguments, command, monkeypatch):
    monkeypatch.setattr(train, "read_documents", never)

    code, out, err = command(train.main, *arguments.split())

    assert (code, out) == (2, "")
    assert ": error: " in err.splitlines()[-1]


@pytest.mark.parametrize("name, content", [
    ("missing", None),
    ("empty", b""),
    ("binary", b"a\0b" * 9999),
    ("short", b"text"),
])
def test_a_text_that_can_not_be_used_is_one_line(
        name, content, tmp_path, command, monkeypatch):
    monkeypatch.setattr(train, "train", never)
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)

    code, out, err = command(train.main, "--data", path, "--out", tmp_path)

    assert (code, out) == (2, "")
    assert err == f"error: {path} has too few texts of 2,049 bytes\n"
