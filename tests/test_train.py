"""The claims about train.py: the loop, checkpoints, the language model and the command."""
import copy
import math
import multiprocessing
import os
import random
import shutil
import signal
import sysconfig
import threading
import time
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from test_infini import KINDS, SMALL, make, same, tokens_of

TINY = ["--steps", 2, "--segment-len", 8, "--n-layers", 1, "--d-model", 16]    # 128 bytes per step

def toy_loss(model, step):
    tokens = tokens_of(2, 13, seed=step)
    loss = F.cross_entropy(model(tokens[:, :-1])[0].mT, tokens[:, 1:])
    return loss, 24, {"shown": 1.0}

def train_toy(path, steps=7, loss_of=toy_loss, model=None, **other):
    model = model or make(dtype=torch.float32)
    options = dict(lr=0.01, gate_lr=0.1, warmup=2, save_every=2, settings=dict(seed=0))
    return model, train.train(model, loss_of, steps, path, **{**options, **other})

def equal(model, other):
    return all(torch.equal(p, other.state_dict()[name]) for name, p in model.state_dict().items())

# --- Optimizer and loop --------------------------------------------------------------------------
def test_each_parameter_is_in_one_group_and_training_is_adam_with_clip_and_schedule(tmp_path):
    model = torch.nn.ParameterDict({name: torch.ones(shape) for name, shape in dict(
        beta=(3, 2), alphabeta=(2, 2), cube=(2, 3, 4), gain=(3,), scale=()).items()})
    model.deep = torch.nn.ParameterDict(dict(beta=torch.ones(3), weight=torch.ones(2, 2)))
    names = {p: name for name, p in model.named_parameters()}
    groups = {(group["peak"], group["weight_decay"]): sorted(names[p] for p in group["params"])
              for group in train.make_optimizer(model, 0.1, 0.2, 0.3).param_groups}
    assert groups == {(0.1, 0.3): ["alphabeta", "cube", "deep.weight"],
                      (0.1, 0): ["gain", "scale"], (0.2, 0): ["beta", "deep.beta"]}
    def loss_of(model, step):    # the gradient is longer than 1 in every second step only
        loss, *rest = toy_loss(model, step)
        return loss * (50 if step % 2 else 0.01), *rest
    by_hand = make()
    adam = torch.optim.AdamW([dict(params=[p], gate=name.endswith("beta"), weight_decay=0.2 * (
        p.dim() == 2)) for name, p in by_hand.named_parameters()], betas=(0.9, 0.98))
    for t in range(7):
        slopes = torch.autograd.grad(loss_of(by_hand, t)[0], by_hand.parameters())
        length = math.sqrt(sum((slope ** 2).sum().item() for slope in slopes))
        assert (length > 1) == (t % 2 == 1)
        share = min(1, (t + 1) / 3) * (0.55 + 0.45 * math.cos(math.pi * t / 7))
        for group, slope in zip(adam.param_groups, slopes):
            group["params"][0].grad = slope / max(1, length)
            group["lr"] = share * (0.1 if group["gate"] else 0.01)
        adam.step()
    model, _ = train_toy(tmp_path / "new/a", 7, loss_of, make(), weight_decay=0.2, warmup=3)
    for p, q in zip(model.parameters(), by_hand.parameters()):
        same(p, q, 1e-5)

@pytest.mark.parametrize("broken", [lambda loss: loss * math.nan, lambda loss: loss + math.inf,
                                    lambda loss: loss + (loss - loss.detach()).sqrt()])
def test_no_step_is_taken_with_a_loss_or_a_gradient_that_is_not_finite(broken, tmp_path):
    def loss_of(model, step):
        loss, *rest = toy_loss(model, step)
        seen.append(copy.deepcopy(model))
        return broken(loss) if step == 5 else loss, *rest
    model, seen = make(dtype=torch.float32), []
    with pytest.raises(ValueError, match="loss was .*, its gradient .* at step 6"):
        train_toy(tmp_path / "a.pt", loss_of=loss_of, model=model, save_every=5)
    assert equal(model, seen[5]) and equal(model, train.load_model(tmp_path / "a.pt")[0])

# --- Stopped and resumed -------------------------------------------------------------------------
@pytest.mark.parametrize("at, presses, saved", [(0, 1, 1), (4, 1, 5), (6, 1, 7), (5, 2, 4)])
def test_a_training_stopped_by_ctrl_c_and_resumed_ends_as_one_that_was_not_stopped(
        at, presses, saved, tmp_path, capfd, monkeypatch):
    gates, steps, before = [], [], signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:    # where no Ctrl-C can be caught
        whole, losses = pool.submit(train_toy, tmp_path / "whole.pt", loss_of=lambda *at: (
            gates.append(at[0].gates()) or toy_loss(*at))).result()
    def loss_of(model, step):
        for _ in range(presses * (step == at)):
            signal.raise_signal(signal.SIGINT)
        return toy_loss(model, step)
    path = tmp_path / "cut.pt"
    with pytest.raises(KeyboardInterrupt, match=["", "stopped after", "at once"][presses]):
        train_toy(path, loss_of=loss_of)
    assert signal.getsignal(signal.SIGINT) is before and "finishing" in capfd.readouterr().err
    monkeypatch.setattr(time, "perf_counter", iter(range(999)).__next__)    # a second per step
    model, resumed = train_toy(path, resume=True,
                               loss_of=lambda *at: steps.append(at[1]) or toy_loss(*at))
    shown, mean = capfd.readouterr().err.splitlines(), sum(losses[saved:]) / max(1, 7 - saved)
    assert saved == 7 or f"24 tokens/s  0:0{6 - saved} left" in shown[0]
    assert saved == 7 or f"cut: 7/7 steps  loss {mean:.4f}" in shown[-1]
    assert resumed == losses and equal(model, whole) and steps == list(range(saved, 7))
    content, (loaded, _) = train.read_checkpoint(path), train.load_model(path)
    assert content["losses"].tolist() == losses and content["optimizer"] is None
    assert torch.equal(content["gates"], torch.stack([*gates, whole.gates()])[1:])
    assert equal(loaded, whole) and loaded.config == whole.config and not loaded.training

def test_a_training_needs_no_standard_error(tmp_path, monkeypatch):
    closed = open(tmp_path / "err", "w")
    closed.close()
    for stream in (None, closed, Mock(write=Mock(side_effect=OSError(28, "full")))):
        monkeypatch.setattr("sys.stderr", stream)
        assert len(train_toy(tmp_path / "a.pt", 2)[1]) == 2

@pytest.mark.filterwarnings("ignore")    # of torch.compile
def test_a_compiled_model_is_saved_under_the_names_of_the_model_inside(tmp_path):
    model = make(dtype=torch.float32)
    train.train(torch.compile(model, backend="eager"), toy_loss, 2, tmp_path / "a.pt", 0.01, 0.1)
    assert equal(model, train.load_model(tmp_path / "a.pt")[0])

def train_until_killed(path, last, seconds):    # some time after `last` more steps
    steps = iter(range(1, 999))
    def loss_of(model, step):
        if next(steps) == last:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return toy_loss(model, step)
    train_toy(path, 150, loss_of, resume=True)

@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_training_that_is_killed_ten_times_ends_as_one_that_is_not(tmp_path):
    context, rng = multiprocessing.get_context("forkserver"), random.Random(0)
    context.set_forkserver_preload(["test_train", "torch._dynamo"])    # imported only once
    codes, done, path = [], [], tmp_path / "cut.pt"
    for last in [*(rng.randint(4, 9) for _ in range(10)), None]:
        process = context.Process(target=train_until_killed, args=(path, last, rng.random() / 100))
        process.start()
        process.join()
        codes.append(process.exitcode)
        done.append(len(train.read_checkpoint(path)["losses"]))
    assert codes == [-signal.SIGKILL] * 10 + [0] and done == sorted(set(done)) and done[-1] == 150
    gates, content = [], train.read_checkpoint(path)
    whole, losses = train_toy(tmp_path / "whole.pt", 150, lambda *at: (
        gates.append(at[0].gates()) or toy_loss(*at)))
    assert content["losses"].tolist() == losses and equal(whole, train.load_model(path)[0])
    assert torch.equal(content["gates"], torch.stack([*gates, whole.gates()])[2::2])    # of 100

@pytest.mark.parametrize("stopped, error", [(1, KeyboardInterrupt), (0, BrokenExecutor)])
def test_a_process_that_ctrl_c_ended_is_a_stop_and_one_that_died_is_an_error(stopped, error):
    with pytest.raises(error), train.interrupts() as event:
        (event.set if stopped else event.clear)()
        raise BrokenExecutor("it died")

def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint_whole(folder, tmp_path, command):
    resource = pytest.importorskip("resource", reason="Windows has no limit for a file's size")
    args = [train.main, *TINY, "--data", folder, "--out", tmp_path / "new" / "out"]
    command(*args)
    before, = [file.read_bytes() for file in args[-1].iterdir()]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        code, _, err = command(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and err.splitlines()[-1].startswith("error: ") and err.count("error") == 1
    assert [file.read_bytes() for file in args[-1].iterdir()] == [before]

def test_a_broken_harmful_or_other_checkpoint_is_refused_in_one_line(folder, command, monkeypatch):
    monkeypatch.chdir(folder.parent)
    path, args = Path("lm-delta-seed0.pt"), [train.main, *TINY, "--data", folder, "--out", "."]
    code, _, err = command(*args, "--resume")
    assert code == 0 and f"{path} is not there to resume, so the training begins anew\n" in err
    whole, content = path.read_bytes(), train.read_checkpoint(path)
    with pytest.raises(ValueError, match="loss was nan"):    # stopped after a step that was saved
        train.train(train.load_model(path)[0], lambda model, step: (
            sum(p.sum() for p in model.parameters()) * (1 if step == 0 else math.nan), 1, {}), 2,
            "part.pt", 0.1, 0.1, save_every=1)
    command(train.main, "--help")    # takes away what was shown until here
    code = type("Code", (), dict(__reduce__=lambda _: (os.mkdir, ("ran",))))()
    part = torch.load(path.with_name("part.pt"), weights_only=True)    # has an optimizer
    weights = {name: w.clone() for name, w in content["model"].items()}
    weights["head.weight"][0, 0] = math.nan
    moments = copy.deepcopy(part["optimizer"])
    moments[0]["exp_avg"] = torch.zeros(2)
    steps = {i: dict(state, step=torch.tensor(7.0)) for i, state in part["optimizer"].items()}
    changes = [dict(settings=code), dict(config=None), dict(settings=[1]), dict(config={"a": 3}),
               dict(config=dict(content["config"], d_key=8)), dict(model={"a": torch.zeros(1)}),
               dict(model=weights), dict(model={n: w.int() for n, w in weights.items()}),
               dict(losses="text"), dict(losses=content["losses"][:1]), dict(gates=3),
               dict(model=[1]), dict(optimizer=part["optimizer"]), dict(part, optimizer={}),
               dict(part, optimizer=moments), dict(part, optimizer=steps),
               dict(config={k: v for k, v in content["config"].items() if k != "rope_base"}),
               dict(part, settings=dict(part["settings"], steps=0)), dict(part, optimizer={7: {}})]
    for bad in (b"", b"text", whole[:-1], [1], {}, *({**content, **change} for change in changes),
                *({k: v for k, v in content.items() if k != name} for name in content)):
        path.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, path)
        for words in ([train.main, "sample", "--load", path], [*args, "--resume"]):
            code, _, err = command(*words)
            *notes, error = err.splitlines()
            assert code == 2 and f"error: {path} was no checkpoint" in error, bad
            assert len(notes) == ("--resume" in words) and all("not used" in n for n in notes)
    assert not Path("ran").exists()
    for part, name, value in (("config", "update", "linear"), ("config", "rope_base", 7.0),
                              ("settings", "starting_weights", 0.0), ("settings", "lr", 0.1)):
        torch.save({**content, part: {**content[part], name: value}}, path)
        error = f"error: {path} was of another training ({name} = {value!r}), must be of this one"
        code, _, err = command(*args, "--resume")
        assert code == 2 and err.splitlines()[-1] == error

def test_a_checkpoint_of_another_training_is_not_written_over_and_a_link_stays_one(tmp_path):
    train_toy(tmp_path / "a.pt", 2)
    (tmp_path / "link.pt").symlink_to("a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    for path in ("a.pt", "link.pt"):
        for other in (dict(lr=0.02), dict(settings=dict(seed=1)), dict(settings={}), dict(steps=3)):
            with pytest.raises(ValueError, match="was of another training"):
                train_toy(tmp_path / path, **{"steps": 2, **other})
    assert before == (tmp_path / "a.pt").read_bytes()
    (tmp_path / "other.pt").symlink_to("new.pt")
    train_toy(tmp_path / "other.pt", np.int64(2), lr=np.float64(0.01), gate_lr=np.float32(0.5))
    assert (tmp_path / "other.pt").is_symlink() and train.load_model(tmp_path / "new.pt")

def test_what_could_not_be_read_again_is_refused_before_the_first_step(tmp_path):
    model, never = make(dtype=torch.float32), Mock()
    model.register_buffer("more", torch.ones(1))
    for other in (dict(model=model), dict(settings=dict(path=tmp_path)), dict(steps=0),
                  *({name: x} for name in ("lr", "gate_lr", "clip") for x in (math.nan, -1))):
        with pytest.raises(ValueError, match="no checkpoint of this version|must be a"):
            train_toy(tmp_path / "a.pt", **{"loss_of": never, **other})
    assert not never.called and not [*tmp_path.iterdir()]
    train_toy(tmp_path / "a.pt", 2, model=(model := make()))    # float64
    assert equal(model, train.load_model(tmp_path / "a.pt")[0])

# --- Text and language model ---------------------------------------------------------------------
def test_the_text_is_the_standard_library_without_tests_and_each_tenth_file_is_held_out(
        folder, capsys):
    training, held_out = ([bytes(d.numpy()) for d in part] for part in train.read_documents())
    files = [file for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
             if not {"test", "tests", "site-packages", "dist-packages"} & set(file.parts)]
    order = {file.read_bytes(): i for i, file in enumerate(files)}
    assert set(training) | set(held_out) < set(order)
    assert len(training) // 9 - 2 <= len(held_out) <= len(training) // 9    # without copies
    assert not {d for d in held_out if len(d) > 1024} & set(training)
    places = torch.tensor([order[d] / len(order) for d in held_out])    # in the alphabet
    assert places.histc(4, 0, 1).min() > len(places) / 10
    assert [len(d) for d in train.read_documents()[1]] == [len(d) for d in held_out]
    names = [[d[0].item() - 40 for d in part] for part in train.read_documents(folder)]
    assert sorted(sum(names, [])) == list(range(20)) and len(names[1]) == 2
    for name in (".git/a.txt", ".b.txt", "out/c.csv", "d.bin", "e.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"new\0" if name == "d.bin" else b"new" * 500)
    new = train.read_documents(folder, folder / "out", shortest=301)    # 100, 300, 500, ...
    assert sorted(len(d) for part in new for d in part) == sorted([1500, *range(500, 4000, 200)])
    assert ("1 binary files or links, 0 copies and 2 of 21 texts, shorter than 301 bytes"
            in capsys.readouterr().err)
    for i in range(20):
        (folder / f"{i}copy.txt").write_bytes(bytes([i + 40]) * (100 + 200 * i))
    parts = [[bytes(d.numpy()) for d in part] for part in train.read_documents(folder)]
    assert len(parts[0]) + len(parts[1]) == 21 == len({*parts[0], *parts[1]})
    assert "21 copies" in capsys.readouterr().err
    (folder / "more").symlink_to(folder.parent)
    train.read_documents(folder)
    assert "2 binary files or links" in capsys.readouterr().err
    one, other = [[len(d) for d in part] for part in train.read_documents(folder, shortest=3700)]
    assert sorted(one + other) == [3700, 3900] and one and other
    (training,), (held_out,) = train.read_documents(folder, shortest=3900)
    assert (len(training), len(held_out)) == (3510, 390)
    (folder / "../book").write_bytes(bytes(range(32, 132)) * 10)    # of one file, its last tenth
    (training,), (held_out,) = train.read_documents(folder / "../book")
    assert len(training) == 900 and bytes(held_out.numpy()) == bytes(range(32, 132))

def test_each_place_of_a_text_is_equally_likely_and_validation_pieces_do_not_overlap():
    documents = [torch.arange(10), torch.arange(100, 150), torch.arange(5)]
    rows = train.draw_sequences(documents, 8000, 10, random.Random(0))
    assert torch.equal(rows, rows[:, :1] + torch.arange(10))    # all of a single document
    places, counts = rows[:, 0].unique(return_counts=True)
    assert places.tolist() == [0, *range(100, 141)] and (counts * 42 / 8000 - 1).abs().max() < 0.3
    documents = [torch.arange(i, i + 70, dtype=torch.uint8) for i in (0, 70, 140)]
    pieces = train.validation_pieces(documents, 20)
    assert torch.equal(pieces, pieces[:, :1] + torch.arange(20)) and pieces.dtype == torch.long
    assert pieces[:, 0].tolist() == [0, 20, 40, 70, 90, 110, 140, 160, 180]
    assert train.validation_pieces(documents, 20, most=5)[:, 0].tolist() == [0, 40, 90, 140, 180]

def test_a_loss_asks_for_the_next_bytes_and_seed_and_step_alone_decide_which():
    model, read = make(dtype=torch.float32, vocab_size=256), []
    model.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    for seed, step in ((0, 5), (0, 5), (0, 6), (1, 5), (5, 0)):
        loss_of = train.lm_loss([torch.arange(250, dtype=torch.uint8)], seed, batch=3, length=40)
        loss, n_tokens, shown = loss_of(model, step)
        assert read[-1].shape == (3, 40) and n_tokens == 120
        assert torch.equal(read[-1], read[0]) == ((seed, step) == (0, 5))
        p = model(read[-1])[0].softmax(-1).gather(-1, read.pop()[..., None] + 1)    # of the next
        assert loss.item() == pytest.approx(-p.log().mean().item(), rel=1e-5)
        assert shown == {"bits per byte": pytest.approx(-p.log2().mean().item(), rel=1e-5)}

@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_of_the_probabilities_and_forgetting_is_reading_each_segment_alone(kind):
    model, tokens = make(kind), tokens_of(3, 4 * SMALL.segment_len + 1)
    alone = [model(piece)[0] for piece in tokens[:, :-1].split(SMALL.segment_len, 1)]
    for forget, logits in ((False, model(tokens[:, :-1])[0]), (True, torch.cat(alone, 1))):
        expected = -logits.softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0].log2()
        same(train.bits(model, tokens, forget, at_once=45), expected, 1e-6)    # two, then one

def test_the_weights_do_not_depend_on_what_was_trained_before(folder, tmp_path):
    weights, documents = {}, train.read_documents(folder)[0]
    options = dict(train.LM, lr=0, gate_lr=0, d_model=16)
    for kind, seed in (("delta", 0), ("delta", 1), ("delta", 0), ("linear", 0)):
        model, _ = train.train_lm(kind, seed, documents, tmp_path, 1, **options)
        assert equal(weights.setdefault(seed, model), model) and not model.training
    assert not equal(weights[0], weights[1])
    assert model.config.d_value == model.config.d_key == 32 and model.config.d_ff == 64
    same(model.gates()[:, [0, 3]].logit(), torch.tensor([[-4.05, 1.05]] * 2), 1e-5)

def test_the_command_trains_says_what_a_held_out_byte_costs_and_resumes(folder, tmp_path, command):
    where = [train.main, *TINY, "--data", folder, "--out", tmp_path]
    other, path = ["--lr", 0.1, "--seed", 3], tmp_path / "lm-delta-seed3.pt"
    code, out, err = command(*where, *other)
    (model, settings), before = train.load_model(path), path.read_bytes()
    assert code == 0 and "lm-delta-seed3: 2/2 steps  loss " in err and "bits per byte " in err
    assert {**settings, "lr": 0.1, "gate_lr": 0.01, "seed": 3, "length": 128} == settings
    c = model.config
    assert (c.segment_len, c.n_layers, c.d_model, c.update) == (8, 1, 16, "delta")
    pieces = torch.stack([d[i:i + 129] for d in train.read_documents(folder)[1]
                          for i in range(0, len(d) - 128, 129)]).long()
    costs = []
    for n in (128, 8):    # the whole piece, or each segment alone
        given, target = pieces[:, :-1].reshape(-1, n), pieces[:, 1:].reshape(-1, n, 1)
        costs.append(-model(given)[0].softmax(-1).gather(-1, target).log2().mean().item())
    lines = [f"{costs[0]:.4f} bits per byte on {len(pieces)} held-out pieces of 128 bytes",
             f"{costs[1]:.4f} if it forgets after each segment"]
    assert out.splitlines()[:2] == lines and f"{model.gates()[0, 1]:.4f}" in out.splitlines()[-1]
    code, again, err = command(*where, *other, "--resume")
    assert (code, again) == (0, out) and "steps" not in err and path.read_bytes() == before
    assert "0 copies and 1 of 20 texts, shorter than 129 bytes, are not used" in err
    for kind in ("local", "xl", "full", "linear"):
        _, out, _ = command(*where, "--kind", kind)
        c = train.load_model(tmp_path / f"lm-{kind}-seed0.pt")[0].config
        assert kind in (c.attention, c.update) and ("forgets" in out) == (kind == "linear")

def test_sample_continues_a_text_and_each_of_its_options_counts(tmp_path, command, monkeypatch):
    model, _ = train_toy(tmp_path / "a.pt", 1, model=make(dtype=torch.float32, vocab_size=256))
    def sample(*options):
        load = ["sample", "--load", tmp_path / "a.pt", "--prompt", "(x) é ", "--bytes", 30]
        return command(train.main, *load, *options)[1]
    text = list("(x) é ".encode())
    for _ in range(30):
        text.append(model(torch.tensor([text]))[0][0, -1].argmax().item())
    for options in (["--temperature", 0], ["--temperature", 1e-9], ["--top-p", 1e-9]):
        assert sample(*options) == bytes(text).decode(errors="replace") + "\n"
    a, again, *others = (sample(*words) for words in (
        [], ["--seed", 0], ["--seed", 1], ["--temperature", 3], ["--top-p", 0.1]))
    assert a == again and len({a, *others}) == 4
    monkeypatch.setattr(train, "generate", lambda *_, on_token: [
        on_token(torch.tensor([byte])) for byte in "é€".encode()])    # of two and three bytes
    monkeypatch.setattr(torch, "set_num_threads", (threads := []).append)
    assert sample("--threads", 3) == "(x) é é€\n" and threads == [3]

@pytest.mark.parametrize("arguments", """--steps 0; --steps 1.5; --steps nan; --steps 99999999999;
    --segment-len 0; --d-model x; --lr -1; --lr nan; --lr 1e999; --lr 0,1; --lr 2; --gate-lr 0.1;
    more; --seed -1; --threads 0; --st 3; --kind hebb; --device meta; --device abacus; --out FILE;
    --out FILE/deeper; --data missing; --data EMPTY; --data BINARY; --data SHORT; --load FILE;
    --lr 0_1; --top-p 1; sample; sample --load .; sample --load no; sample --load FILE --steps 3;
    sample --load FILE --temperature 0,8; sample --load FILE --top-p 1.1;
    sample --load FILE --bytes 0; sample --load PASSKEY""".split(";"))
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", None)    # nothing may be trained
    for name, text in dict(FILE=b"kept", EMPTY=b"", BINARY=b"a\0b" * 999, SHORT=b"short").items():
        Path(name).write_bytes(text)
    shutil.copy(Path(train.__file__).with_name("assets") / "passkey-delta.pt", "PASSKEY")
    code, out, err = command(train.main, *arguments.split())
    assert (code, out, len(err.splitlines())) == (2, "", 1) and Path("FILE").read_text() == "kept"

def test_a_users_mistake_is_one_line_and_ours_a_traceback(command):
    for error, line in ((ValueError("\na was 1, must be 2\n3"), "a was 1, must be 2"),
                        (OSError(28, "full"), "[Errno 28] full"), (MemoryError(), "MemoryError"),
                        (ModuleNotFoundError("No module x"), "No module x"),
                        (RuntimeError("CUDA out of memory: 8"), "CUDA out of memory: 8")):
        assert command(Mock(side_effect=error, __module__="a")) == (2, "", f"error: {line}\n")
    assert command(train.main, "--data", "")[0] == 2
    assert command(Mock(side_effect=KeyboardInterrupt, __module__="a")) == (130, "", "\nstopped\n")
    for error in (RuntimeError("CUDA error"), RuntimeError("memory of a bug"), TypeError("a"),
                  ImportError("a")):
        with pytest.raises(type(error)):
            train.run_command(Mock(side_effect=error))

def test_jobs_run_side_by_side_in_processes_of_one_thread_and_give_results_in_order(monkeypatch):
    what = "__import__('os').getpid(), __import__('torch').get_num_threads()"
    jobs = [(f"__import__('time').sleep({1 - i}), {i}, {what}",) for i in range(2)]    # for eval,
    here = os.getpid()    # which loads nothing else that sets the number of threads
    monkeypatch.setenv("OMP_NUM_THREADS", "2")    # what a process takes if nobody says else
    for n in (1, 2):    # one thread, or one job
        monkeypatch.setattr(torch, "get_num_threads", lambda: n)
        assert [job[2:] for job in train.side_by_side(eval, jobs[n - 1:])] == [(here, n)] * (3 - n)
    with pytest.raises(RuntimeError, match="terminated"):    # as when memory runs out
        [*train.side_by_side(eval, [("__import__('os')._exit(9)",), *jobs])]
    (_, *first), (_, *second) = train.side_by_side(eval, jobs)
    assert first[::2] == [0, 1] and second[::2] == [1, 1] and len({first[1], second[1], here}) == 3
