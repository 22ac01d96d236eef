"""The claims about passkey.py: the prompt, its keys, the ways of training, the search.

No test trains for more than a few steps. What the shipped models find is tested at the
end, together with the command.
"""

import csv
import math
import random
import re
import runpy
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import common
import passkey
import train
from infini import InfiniTransformer, generate
from passkey import (
    WAYS,
    Found,
    Looked,
    Run,
    Search,
    draw_keys,
    encode,
    is_held_out,
    one_key,
    plan_runs,
    way_loss,
    write_hay,
    write_input,
)

RULES = ["linear", "delta"]
KINDS = ["infini-linear", "infini-delta", "local", "xl", "full"]
ASSETS = Path(passkey.__file__).with_name("assets")

# The prompt once more, as appendix B of the paper prints it.
INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and "
    "memorize them. I will quiz you about the important information there."
)
SENTENCES = [
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
]
PARAGRAPH = " ".join(SENTENCES)
NEEDLE_9054 = "The pass key is 9054. Remember it. 9054 is the pass key."
QUESTION = "What is the pass key? The pass key is"

DIGIT_IDS = torch.tensor([passkey.TOKEN[digit] for digit in "0123456789"])

each_kind = pytest.mark.parametrize("kind", KINDS)
each_hay = pytest.mark.parametrize("hay", ["paper", "shuffled", "words"])
each_start = pytest.mark.parametrize("name", ["short", "plain"])    # from nothing, or not


# --- Helpers --------------------------------------------------------------------------


def text_of(tokens):
    """Write tokens as a text, with spaces where English has them."""
    text = " ".join(passkey.VOCABULARY[token] for token in tokens)
    text = re.sub(r"(?<=\d) (?=\d)", "", text)
    return re.sub(r" (?=[.?])", "", text)


def new_model(kind="infini-delta", seed=0, **sizes):
    """Make an untrained model, of the size that passkey.py trains if no other is given."""
    attention, _, rule = kind.partition("-")
    torch.manual_seed(seed)
    config = passkey.model_config(attention=attention, update=rule or "delta", **sizes)
    return InfiniTransformer(config)


def small_model(kind="infini-delta"):
    """Make an untrained model in float64, which reads long inputs fast."""
    return new_model(kind, d_model=16, n_heads=2, d_key=8, d_value=8, d_ff=16).double()


def save(path, model, settings, losses=()):
    """Write a checkpoint as `train` does."""
    train.write_checkpoint(path, dict(
        config=asdict(model.config),
        settings=settings,
        model=model.state_dict(),
        optimizer=None,
        losses=list(losses),
    ))
    return path


def save_run(run, out, losses=()):
    """Write the checkpoint of a training, as if it had got as far as these losses."""
    return save(run.path(out), InfiniTransformer(run.config()), run.settings(), losses)


def same_training(path, other):
    """Tell whether two checkpoints are of one training, bit for bit."""
    one = train.read_checkpoint(path)
    two = train.read_checkpoint(other)
    same = one["settings"] == two["settings"] and one["losses"] == two["losses"]
    for name, weights in one["model"].items():
        same = same and torch.equal(weights, two["model"][name])
    return same


def note_calls(model):
    """Return a list that grows by all tokens that the model absorbs."""
    absorb = model.absorb
    calls = []

    def note(tokens, state=None):
        calls.append(tokens)
        return absorb(tokens, state)

    model.absorb = note
    return calls


@pytest.fixture
def no_training(monkeypatch):
    """Let the test fail at the first step of a training."""
    def fail(*args, **settings):
        pytest.fail("a training began")

    monkeypatch.setattr(train, "train", fail)


# --- The prompt -----------------------------------------------------------------------


def test_the_prompt_is_the_papers_word_for_word():
    paragraphs = [INTRO, PARAGRAPH, PARAGRAPH, NEEDLE_9054, PARAGRAPH, QUESTION, "9054"]

    tokens = write_input(one_key("9054"), write_hay("paper", 3, None), before=2 * 24)

    assert text_of(tokens) == " ".join(paragraphs)


def test_the_prompt_needs_53_words_marks_and_digits():
    prompt = " ".join([INTRO, PARAGRAPH, NEEDLE_9054, QUESTION])
    needed = set(re.findall("[A-Za-z]+|[.?]", prompt)) | set("0123456789")

    assert len(needed) == 53
    assert set(passkey.VOCABULARY) == needed
    assert new_model().config.vocab_size == 53


def test_a_word_of_no_prompt_is_refused():
    with pytest.raises(ValueError, match="'purple'"):
        encode("The sky is purple.")


def test_who_changes_encoded_text_changes_nobody_elses():
    encode(QUESTION).zero_()

    assert text_of(encode(QUESTION)) == QUESTION


@pytest.mark.parametrize("before", [0, 7, 24, 48])
def test_the_needle_stands_anywhere_in_the_hay(before):
    hay = encode(PARAGRAPH + " " + PARAGRAPH)
    parts = [encode(INTRO), hay[:before], encode(NEEDLE_9054), hay[before:],
             encode(QUESTION), encode("9054")]

    tokens = write_input(one_key("9054"), hay, before)

    assert torch.equal(tokens, torch.cat(parts))


def test_another_needle_may_hold_the_key_backwards():
    task = one_key("9054", needle="The key is {0}. Again, {1}.")

    assert task.needle == "The key is 9054. Again, 4509."
    assert task.answer == "9054"


@each_hay
@pytest.mark.parametrize("n", [0, 1, 7])
def test_a_paragraph_of_any_hay_has_24_tokens_and_no_digit(hay, n):
    tokens = write_hay(hay, n, random.Random(0))

    assert tokens.shape == (24 * n,)
    assert tokens.dtype == torch.long
    assert not torch.isin(tokens, DIGIT_IDS).any()


def test_the_papers_hay_is_its_paragraph_again_and_again():
    text = text_of(write_hay("paper", 3, None))

    assert text == " ".join([PARAGRAPH, PARAGRAPH, PARAGRAPH])


def test_shuffled_hay_has_the_sentences_of_each_paragraph_in_another_order():
    tokens = write_hay("shuffled", 20, random.Random(0))
    paragraphs = [text_of(paragraph) for paragraph in tokens.split(24)]

    for paragraph in paragraphs:
        assert sorted(re.findall(r"\w[^.]+\.", paragraph)) == sorted(SENTENCES)
    assert len(set(paragraphs)) > 10


def test_random_words_are_all_words_of_the_prompt_in_no_order():
    tokens = write_hay("words", 100, random.Random(0))

    assert set(tokens.tolist()) == set(range(53)) - set(DIGIT_IDS.tolist())
    assert "The grass is green." not in text_of(tokens)


@each_hay
def test_hay_goes_on_where_the_call_before_ended(hay):
    rng = random.Random(0)

    pieces = [write_hay(hay, n, rng) for n in (3, 1, 6)]

    assert torch.equal(torch.cat(pieces), write_hay(hay, 10, random.Random(0)))


def test_another_kind_of_hay_is_refused():
    with pytest.raises(ValueError, match="'straw'"):
        write_hay("straw", 1, random.Random(0))


@pytest.mark.parametrize("n", [65, 88, 89, 1000, 1024])
def test_an_input_has_at_least_n_tokens_and_no_paragraph_too_many(n):
    task = one_key("9054")
    hay = write_hay("paper", passkey.paragraphs(n, task), None)

    assert n <= len(write_input(task, hay, 0)) < n + 24


@pytest.mark.parametrize("n", [1, 63, 64])
def test_the_shortest_input_has_64_tokens_and_no_hay(n):
    task = one_key("9054")

    assert passkey.paragraphs(n, task) == 0
    assert len(write_input(task, encode(""), 0)) == 64 == passkey.SHORTEST


# --- Keys -----------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [3, 4, 5])
def test_one_key_in_ten_is_held_out(digits):
    keys = [str(i).zfill(digits) for i in range(10 ** digits)]

    n_held_out = sum(is_held_out(key) for key in keys)

    assert n_held_out == pytest.approx(10 ** digits / 10, rel=0.02)


@pytest.mark.parametrize("digits", [3, 4, 5, 6])
def test_evaluation_keys_are_held_out_and_all_different(digits):
    keys = draw_keys(random.Random(0), 90, digits, held_out=True)

    assert all(is_held_out(key) for key in keys)
    assert {len(key) for key in keys} == {digits}
    assert len(set(keys)) == 90


@pytest.mark.parametrize("digits, most", [(3, 90), (4, 909)])
def test_more_keys_than_are_held_out_are_refused(digits, most):
    assert len(draw_keys(random.Random(0), most, digits, held_out=True)) == most

    with pytest.raises(ValueError, match=f"at most {most}"):
        draw_keys(random.Random(0), most + 1, digits, held_out=True)


def test_training_keys_are_not_held_out_and_have_at_most_five_different_digits():
    keys = draw_keys(random.Random(0), 2000, 6, held_out=False)

    assert not any(is_held_out(key) for key in keys)
    assert {len(key) for key in keys} == {6}
    assert max(len(set(key)) for key in keys) == 5
    assert len(set("".join(keys))) == 10


def test_training_keys_repeat_a_digit_more_often_than_evaluation_keys():
    def share_of_repeats(held_out):
        keys = draw_keys(random.Random(0), 900, 4, held_out)
        return sum(len(set(key)) < 4 for key in keys) / len(keys)

    assert share_of_repeats(held_out=False) == pytest.approx(1 - 120 / 625, abs=0.04)
    assert share_of_repeats(held_out=True) == pytest.approx(1 - 5040 / 10_000, abs=0.04)


def test_the_same_seed_draws_the_same_keys():
    def keys_of(seed):
        return [task.answer for task in Search([], [], seed=seed).tasks()]

    assert keys_of(1234)[:4] == ["2363", "4157", "8632", "8433"]    # those of RESULTS.md
    assert keys_of(1234) == keys_of(1234)
    assert len(set(keys_of(1234)) & set(keys_of(5))) < 4


def test_a_search_has_as_many_keys_as_long_and_in_such_a_needle_as_asked_for():
    search = Search([], [], n_keys=7, digits=5, needle="Remember {0}.")

    tasks = search.tasks()

    assert len(tasks) == 7
    for task in tasks:
        assert len(task.answer) == 5
        assert task.needle == f"Remember {task.answer}."
        assert task.question == QUESTION


# --- Training inputs ------------------------------------------------------------------


class Drawn(NamedTuple):
    """Holds a training input, and what it was made of."""

    tokens: torch.Tensor
    key: str
    before: int           # tokens of hay before the needle
    hay: torch.Tensor


def take_apart(tokens, n_digits):
    """Find the first number in an input. It is the key in its needle."""
    n_intro = len(encode(INTRO))
    n_end = len(encode(QUESTION)) + n_digits
    n_needle = len(encode(passkey.NEEDLE.format("0" * n_digits)))

    first = torch.isin(tokens, DIGIT_IDS).nonzero()[0].item()
    needle = first - len(encode("The pass key is"))
    key = text_of(tokens[first:first + n_digits])
    hay = torch.cat([tokens[n_intro:needle], tokens[needle + n_needle:-n_end]])
    return Drawn(tokens, key, needle - n_intro, hay)


@cache
def draw_steps(name, n_steps=300, N=32):
    """Draw the inputs of many steps of a way, (B, T) each, with their digits."""
    way = WAYS[name]
    rng = random.Random(0)
    return [passkey.draw_inputs(rng, way, way.longest, N) for _ in range(n_steps)]


@cache
def draw_documents(name):
    """Draw many training inputs of a way, and take them apart."""
    documents = []
    for inputs, n_digits in draw_steps(name):
        documents += [take_apart(tokens, n_digits) for tokens in inputs]
    return documents


def share_of(found):
    """Return the share of what is true."""
    found = list(found)
    return sum(found) / len(found)


def is_the_papers(hay):
    """Tell whether hay is the paper's paragraph again and again, wherever it begins."""
    text = encode(PARAGRAPH).repeat(len(hay) // 24 + 2)
    return any(torch.equal(hay, text[i:i + len(hay)]) for i in range(24))


@each_start
def test_every_training_input_is_a_prompt_and_ends_with_its_answer(name):
    for document in draw_documents(name):
        again = write_input(one_key(document.key), document.hay, document.before)
        assert torch.equal(document.tokens, again)


@each_start
def test_no_key_of_the_evaluation_occurs_in_training(name):
    trained = {document.key for document in draw_documents(name)}
    asked = {task.answer for task in Search([], [], n_keys=909).tasks()}

    assert not trained & asked
    assert not any(is_held_out(key) for key in trained)
    assert len(trained) > 200


@each_start
def test_a_quarter_of_the_steps_has_keys_of_three_five_or_six_digits(name):
    digits = [n_digits for _, n_digits in draw_steps(name)]

    assert set(digits) == {3, 4, 5, 6}
    assert digits.count(4) / len(digits) == pytest.approx(0.75, abs=0.07)


@pytest.mark.parametrize("name, longest", [("short", 256), ("plain", 5000)])
def test_lengths_are_log_uniform_up_to_the_longest(name, longest):
    lengths = [inputs.shape[1] for inputs, _ in draw_steps(name)]
    places = [math.log(n / 64, longest / 64) for n in lengths]    # from 0 to 1

    assert min(lengths) < 70
    assert 0.95 * longest < max(lengths) <= longest + 8    # that the answer fits, see below
    for border in (0.25, 0.5, 0.75):
        below = share_of(place < border for place in places)
        assert below == pytest.approx(border, abs=0.08)


@pytest.mark.parametrize("name, tokens", [("short", 1024), ("plain", 2048)])
def test_a_step_has_as_many_inputs_as_fit_into_its_tokens_and_at_least_one(name, tokens):
    for inputs, _ in draw_steps(name):
        B, T = inputs.shape
        assert B >= 1
        assert B == 1 or B * (T - 8) <= tokens
        assert (B + 1) * T > tokens


@pytest.mark.parametrize("N", [32, 16, 8])
def test_no_digit_is_asked_of_the_first_token_of_a_segment(N):
    asked = set()
    for inputs, n_digits in draw_steps("short", N=N):
        T = inputs.shape[1]
        writers = range(T - n_digits - 1, T - 1)    # each writes the token after it
        segments = {token // N for token in writers}
        assert len(segments) == 1
        asked |= {token % N for token in writers}

    assert asked == set(range(1, N))    # any other token of a segment may be asked


@each_start
def test_needles_stand_anywhere_and_half_of_them_at_the_very_end(name):
    long = [document for document in draw_documents(name) if len(document.hay) > 100]
    places = [document.before / len(document.hay) for document in long]

    assert share_of(place == 1 for place in places) == pytest.approx(0.5, abs=0.06)
    elsewhere = [place for place in places if place < 1]
    for border in (0.25, 0.5, 0.75):
        below = share_of(place < border for place in elsewhere)
        assert below == pytest.approx(border, abs=0.1)


def test_needles_stand_at_every_place_in_a_segment():
    places = {document.before % 32 for document in draw_documents("short")}

    assert places == set(range(32))


@pytest.mark.parametrize("name, share", [("short", 0.5), ("plain", 0.25)])
def test_at_least_half_of_the_filler_is_not_the_papers_paragraph(name, share):
    long = [document.hay for document in draw_documents(name) if len(document.hay) > 100]

    assert share_of(is_the_papers(hay) for hay in long) == pytest.approx(share, abs=0.07)


def test_hay_begins_anywhere_in_a_paragraph():
    long = [document.hay for document in draw_documents("short") if len(document.hay) > 100]
    beginnings = [text_of(hay[:24]) for hay in long if is_the_papers(hay)]

    assert len(set(beginnings)) == 24


# --- The loss -------------------------------------------------------------------------


def whole_loss(model, inputs, n_digits):
    """Read whole inputs at once. Returns the mean cost of the digits, and those written."""
    logits, _ = model(inputs[:, :-1])
    costs = []
    written = []
    for answer in range(-n_digits, 0):
        p = logits[:, answer].softmax(-1)
        costs.append(-p.gather(1, inputs[:, answer, None]).log())
        written.append(p.argmax(-1))
    return torch.cat(costs).mean(), torch.stack(written, dim=1)


@pytest.mark.parametrize("keys, n_hay", [
    (["9054", "1177", "0000"], 64),
    (["9054"], 4),
    (["117"], 0),
    (["123456"], 700),
])
def test_the_loss_of_an_answer_is_that_of_one_call_on_the_whole_input(keys, n_hay):
    hay = write_hay("paper", 30, None)[:n_hay]
    inputs = torch.stack([write_input(one_key(key), hay, n_hay // 2) for key in keys])
    n_digits = len(keys[0])

    model = new_model().double()
    loss, n_tokens, _ = passkey.answer_loss(model, inputs, n_digits)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected, _ = whole_loss(model, inputs, n_digits)
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))

    assert n_tokens == inputs.numel()
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("n_hay", [4, 64, 700])
def test_segments_before_that_of_the_answer_are_only_read(n_hay):
    hay = write_hay("paper", 30, None)[:n_hay]
    inputs = write_input(one_key("9054"), hay, 0)[None]
    model = small_model()
    calls = note_calls(model)

    passkey.answer_loss(model, inputs, 4)

    read, = calls
    assert read.shape[1] % 32 == 0
    assert inputs.shape[1] - 5 - read.shape[1] < 32    # before the one that writes first


def test_progress_shows_the_share_of_digits_that_are_right():
    tasks = [one_key("117"), one_key("905")]
    inputs = torch.stack([write_input(task, encode(""), 0) for task in tasks])
    model = new_model()
    with torch.no_grad():
        model.head.weight[DIGIT_IDS[1]] *= 9    # so that it writes many a 1

    _, _, numbers = passkey.answer_loss(model, inputs, 3)
    _, written = whole_loss(model, inputs, 3)

    right = (written == inputs[:, -3:]).float().mean().item()
    assert 0 < right < 1
    assert numbers == {"digits right": pytest.approx(right)}


# --- Ways of training -----------------------------------------------------------------


@pytest.fixture
def longest_asked(monkeypatch):
    """Let a way draw nothing and compute nothing. Notes how long inputs were to be."""
    noted = []

    def note(rng, way, longest, N):
        noted.append(longest)
        return torch.zeros(1, 64, dtype=torch.long), 4

    def no_loss(model, inputs, digits):
        return None

    monkeypatch.setattr(passkey, "draw_inputs", note)
    monkeypatch.setattr(passkey, "answer_loss", no_loss)
    return noted


def compute_losses(name, model, steps=20):
    """Compute the loss of every step of a way, and yield after each."""
    loss_of = way_loss(name, seed=0, steps=steps)
    for step in range(steps):
        loss_of(model, step)
        yield step


@pytest.mark.parametrize("name", ["local", "short"])
def test_without_a_start_inputs_grow_for_30_percent_of_the_steps(name, longest_asked):
    list(compute_losses(name, new_model()))

    growing = [64 * 4 ** (step / 6) for step in range(6)]
    assert longest_asked == pytest.approx(growing + 14 * [256])


@pytest.mark.parametrize("name", ["plain", "sharp"])
def test_with_a_start_inputs_are_long_from_the_first_step_on(name, longest_asked):
    list(compute_losses(name, new_model()))

    assert longest_asked == pytest.approx(20 * [5000])


def assert_grown(model, start, factor):
    """Compare W_Q and W_K with those at the start, and all other weights, too."""
    for name, weights in model.state_dict().items():
        grows = "w_q" in name or "w_k" in name
        expected = start[name] * (factor if grows else 1)
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule, factor, n_growing", [("linear", 6, 14), ("delta", 4, 18)])
def test_in_sharp_w_q_and_w_k_grow_a_little_before_each_of_the_first_steps(
        rule, factor, n_growing, longest_asked):
    model = new_model(f"infini-{rule}")
    start = deepcopy(model.state_dict())

    for step in compute_losses("sharp", model):
        steps_grown = min(step + 1, n_growing)
        assert_grown(model, start, factor ** (steps_grown / n_growing))


@pytest.mark.parametrize("steps", [1, 5, 25])
@pytest.mark.parametrize("rule, factor", [("linear", 6), ("delta", 4)])
def test_at_the_end_w_q_and_w_k_have_grown_by_the_whole_factor_in_any_number_of_steps(
        rule, factor, steps, longest_asked):
    model = new_model(f"infini-{rule}")
    start = deepcopy(model.state_dict())

    list(compute_losses("sharp", model, steps))

    assert_grown(model, start, factor)


@pytest.mark.parametrize("name", ["local", "short", "plain"])
def test_in_other_ways_no_weight_grows_by_itself(name, longest_asked):
    model = new_model()
    start = deepcopy(model.state_dict())

    list(compute_losses(name, model))

    assert_grown(model, start, factor=1)


def inputs_of(name, step, seed, monkeypatch):
    """Return the inputs that a way reads at a step."""
    seen = []

    def note(model, inputs, digits):
        seen.append(inputs)

    with monkeypatch.context() as patch:
        patch.setattr(passkey, "answer_loss", note)
        way_loss(name, seed, steps=100)(new_model(), step)
    return seen[0]


def test_seed_and_step_alone_decide_what_is_read(monkeypatch):
    first = inputs_of("short", 41, 0, monkeypatch)

    assert torch.equal(first, inputs_of("short", 41, 0, monkeypatch))
    assert not torch.equal(first, inputs_of("short", 42, 0, monkeypatch))
    assert not torch.equal(first, inputs_of("short", 41, 1, monkeypatch))
    assert not torch.equal(first, inputs_of("short", 1, 4, monkeypatch))


def test_local_and_short_read_the_same_so_that_only_the_memory_differs(monkeypatch):
    local = inputs_of("local", 41, 0, monkeypatch)
    short = inputs_of("short", 41, 0, monkeypatch)

    assert torch.equal(local, short)


def test_plain_and_sharp_do_not_read_the_same(monkeypatch):
    plain = inputs_of("plain", 41, 0, monkeypatch)
    sharp = inputs_of("sharp", 41, 0, monkeypatch)

    assert not torch.equal(plain, sharp)


def test_training_inputs_are_still_those_of_the_shipped_models(monkeypatch):
    inputs = inputs_of("short", 41, 0, monkeypatch)

    keys = [take_apart(tokens, 4).key for tokens in inputs]
    assert inputs.shape == (4, 232)
    assert keys == ["5355", "4255", "8273", "2321"]


def test_inputs_go_to_the_models_device(monkeypatch):
    devices = []

    def note(model, inputs, digits):
        devices.append(inputs.device.type)

    monkeypatch.setattr(passkey, "answer_loss", note)
    way_loss("short", seed=0, steps=100)(new_model().to("meta"), 0)

    assert devices == ["meta"]


def test_a_model_has_138000_parameters_and_segments_of_32_tokens():
    model = new_model()

    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert round(n_parameters, -3) == 138_000
    assert model.config.segment_len == 32


# --- Trainings ------------------------------------------------------------------------


@pytest.mark.parametrize("ways, rule, planned", [
    (["short"], "linear", ["short"]),
    (["plain"], "linear", ["short", "plain"]),
    (["sharp"], "delta", ["short", "plain", "sharp"]),
    (["sharp", "local", "short"], "delta", ["short", "plain", "sharp"]),
    (["local", "sharp"], None, ["local"]),
    (["local"], "linear", []),
    (["short"], None, []),
])
def test_before_a_training_come_those_that_it_goes_on_from(ways, rule, planned):
    runs = plan_runs(ways, rule, seed=5)

    assert [run.way for run in runs] == planned
    assert {run.rule for run in runs} <= {rule}
    assert {run.seed for run in runs} <= {5}


def test_steps_and_lengths_are_those_of_the_table_in_the_results():
    table = {name: (way.start, way.steps, way.longest) for name, way in WAYS.items()}

    assert table == {
        "local": (None, 4000, 256),
        "short": (None, 4000, 256),
        "plain": ("short", 1600, 5000),
        "sharp": ("plain", 1600, 5000),
    }


def test_local_is_short_without_a_memory_and_sharp_is_plain_once_more_with_growth():
    assert WAYS["local"] == replace(WAYS["short"], memory=False)
    assert WAYS["sharp"] == replace(WAYS["plain"], start="plain", grows=True)


@pytest.mark.parametrize("rule", RULES)
def test_the_shipped_models_were_trained_as_the_command_would_today(rule):
    model, settings = train.load_model(ASSETS / f"passkey-{rule}.pt")

    *_, sharp = plan_runs(["sharp"], rule, seed=0)
    assert model.config == sharp.config()
    assert settings == sharp.settings()


def test_other_steps_hold_for_all_trainings():
    runs = plan_runs(["sharp"], "linear", seed=0, steps=3)

    assert [run.settings()["steps"] for run in runs] == [3, 3, 3]


def test_the_file_of_a_training_has_its_way_rule_and_seed_in_its_name():
    sharp = Run("sharp", "delta", seed=2, steps=1)
    local = Run("local", None, seed=0, steps=1)

    assert sharp.path("out") == Path("out/passkey-sharp-delta-seed2.pt")
    assert local.path("out") == Path("out/passkey-local-seed0.pt")


@pytest.mark.parametrize("rule, kind", [
    ("linear", "infini-linear"), ("delta", "infini-delta"), (None, "local-delta")])
def test_a_rule_decides_the_kind_of_model(rule, kind):
    config = Run("short", rule, 0, 1).config()

    assert f"{config.attention}-{config.update}" == kind


class Training(NamedTuple):
    """Holds what `train` was asked to do."""

    first_weight: float      # of the model at the start
    arguments: dict


@pytest.fixture
def trainings(monkeypatch):
    """Let a training only add 1 to a weight of the model. Notes all of them."""
    noted = []

    def learn(model, loss_of, path, resume, **settings):
        weight = model.head.weight.data
        noted.append(Training(weight[0, 0].item(), dict(settings, resume=resume)))
        weight[0, 0] += 1
        save(path, model, settings)

    monkeypatch.setattr(train, "train", learn)
    return noted


@pytest.mark.parametrize("rule", RULES)
def test_each_training_goes_on_from_the_model_before(rule, tmp_path, trainings):
    runs = plan_runs(["sharp"], rule, seed=5)

    paths = passkey.train_runs(runs, tmp_path)

    fresh = new_model(seed=5).head.weight[0, 0].item()
    weights = [training.first_weight for training in trainings]
    assert weights == pytest.approx([fresh, fresh + 1, fresh + 2])
    assert paths == {run.way: run.path(tmp_path) for run in runs}
    model, _ = train.load_model(paths["sharp"])
    assert model.config == runs[0].config()


@pytest.mark.parametrize("resume", [True, False])
def test_a_training_gets_its_settings_and_whether_to_resume(resume, tmp_path, trainings):
    runs = plan_runs(["plain"], "linear", seed=5)

    passkey.train_runs(runs, tmp_path, resume=resume)

    for run, training in zip(runs, trainings, strict=True):
        assert training.arguments == dict(run.settings(), resume=resume)


def test_a_model_is_trained_on_the_device_that_is_asked_for(tmp_path, monkeypatch):
    devices = []

    def note(model, loss_of, **settings):
        devices.append(model.head.weight.device.type)

    monkeypatch.setattr(train, "train", note)
    passkey.train_runs(plan_runs(["short"], "delta", seed=0), tmp_path, device="meta")

    assert devices == ["meta"]


def test_models_of_one_seed_begin_with_the_same_weights_whatever_the_rule(
        tmp_path, trainings):
    for rule in [None, *RULES]:
        passkey.train_runs(plan_runs(["local", "short"], rule, seed=5), tmp_path)

    assert len({training.first_weight for training in trainings}) == 1
    assert len(trainings) == 3


def test_the_command_trains_what_is_asked_for_and_looks_with_that(
        tmp_path, trainings, command):
    code, out, _ = command(
        passkey.main, "--training", "local,plain", "--seed", 3, "--steps", 9, "--out",
        tmp_path, "--lengths", 64, "--keys", 1)

    done = [training.arguments for training in trainings]
    assert code == 0
    assert [(a["training"], a["rule"]) for a in done] == [
        ("local", None), ("short", "linear"), ("plain", "linear"), ("short", "delta"),
        ("plain", "delta")]
    assert {(a["seed"], a["steps"], a["resume"]) for a in done} == {(3, 9, False)}

    rows = out.splitlines()[3:]
    assert [columns_of(row)[0] for row in rows] == [
        "local - 3", "plain linear 3", "plain delta 3"]


def test_the_command_trains_only_the_rule_that_is_asked_for_and_the_control(
        tmp_path, trainings, command):
    code, _, _ = command(
        passkey.main, "--training", "local,short", "--rule", "delta", "--out", tmp_path,
        "--lengths", 64, "--keys", 1)

    assert code == 0
    assert [training.arguments["rule"] for training in trainings] == [None, "delta"]


@pytest.mark.parametrize("way, rule", [
    ("local", None), ("short", "linear"), ("sharp", "delta")])
def test_every_checkpoint_is_looked_at_before_the_first_step(
        way, rule, tmp_path, command, no_training):
    other = Run(way, rule, seed=0, steps=7)
    path = save_run(other, tmp_path, losses=[1.0] * 7)

    code, _, err = command(passkey.main, "--out", tmp_path)

    assert code == 2
    assert err == f"error: {path} is of another training, with steps 7\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_training_that_is_not_finished_is_not_written_over(
        tmp_path, command, no_training):
    path = save_run(Run("plain", "delta", seed=0, steps=7), tmp_path, losses=[1.0] * 6)
    before = path.read_bytes()

    code, _, err = command(
        passkey.main, "--training", "sharp", "--steps", 7, "--out", tmp_path)

    assert code == 2
    assert err == f"error: {path} is not finished; --resume goes on with it\n"
    assert path.read_bytes() == before


def stop_at(n_calls, monkeypatch):
    """Press Ctrl-C when a loss is computed for the n-th time."""
    compute = passkey.answer_loss
    calls = []

    def stop(model, inputs, digits):
        calls.append(inputs)
        if len(calls) == n_calls:
            raise KeyboardInterrupt
        return compute(model, inputs, digits)

    monkeypatch.setattr(passkey, "answer_loss", stop)


def test_with_resume_a_stopped_training_goes_on_as_if_never_stopped(
        tmp_path, command, monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    arguments = [passkey.main, "--training", "plain", "--rule", "linear", "--steps", 2,
                 "--lengths", 64, "--keys", 1, "--out"]
    whole = tmp_path / "whole"
    stopped = tmp_path / "stopped"

    command(*arguments, whole)
    with monkeypatch.context() as patch:
        stop_at(4, patch)    # the last step of the second training
        assert command(*arguments, stopped)[0] == 130
    code, _, err = command(*arguments, stopped, "--resume")

    assert code == 0
    assert "passkey-short-linear-seed0" not in err    # none of its steps is taken again
    for name in ("passkey-short-linear-seed0.pt", "passkey-plain-linear-seed0.pt"):
        assert same_training(whole / name, stopped / name)


def test_two_rules_side_by_side_are_trained_as_one_after_the_other(tmp_path, monkeypatch):
    plans = [plan_runs(["short"], rule, seed=3, steps=2) for rule in RULES]
    alone = tmp_path / "alone"
    beside = tmp_path / "beside"

    for plan in plans:
        passkey.train_runs(plan, alone)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    jobs = [(plan, beside) for plan in plans]
    results = list(common.side_by_side(passkey.train_runs, jobs))

    assert [paths["short"].parent for paths in results] == [beside, beside]
    for paths in results:
        assert same_training(paths["short"], alone / paths["short"].name)


# --- The search -----------------------------------------------------------------------


KEYS = ["9054", "1177", "0000"]
TASKS = [one_key(key) for key in KEYS]


def write_cell(tasks, n, depth, hay):
    """Write the whole inputs of a cell, without their answers. Returns (keys, T)."""
    empty = len(write_input(tasks[0], encode(""), 0))
    total = 0
    while empty + 24 * total < n:
        total += 1
    before = round(depth * total)

    text = torch.cat([
        write_hay(hay, before, random.Random("before")),
        write_hay(hay, total - before, random.Random("behind")),
    ])
    n_digits = len(tasks[0].answer)
    inputs = [write_input(task, text, 24 * before)[:-n_digits] for task in tasks]
    return torch.stack(inputs)


@pytest.fixture
def predictions(monkeypatch):
    """Notes what is predicted behind each question, instead of what is written."""
    noted = []

    def note(model, state, questions, answers):
        logits, _ = model(questions, state)
        noted.append(logits)
        return torch.ones_like(answers, dtype=torch.bool)

    monkeypatch.setattr(passkey, "ask", note)
    return noted


@pytest.mark.parametrize("kind, hay", [
    ("infini-linear", "paper"),
    ("infini-delta", "paper"),
    ("local", "paper"),
    ("xl", "paper"),
    ("full", "paper"),
    ("infini-delta", "shuffled"),
    ("xl", "words"),
])
def test_what_is_read_in_pieces_is_what_one_call_on_each_whole_input_reads(
        kind, hay, predictions):
    lengths = [100, 300, 600 if kind == "full" else 2300]
    depths = [0, 0.3, 1]
    model = small_model(kind)

    found = list(passkey.evaluate(model, TASKS, lengths, depths, hay))

    cells = [(cell.tokens, cell.depth) for cell in found]
    assert sorted(cells) == [(n, depth) for n in lengths for depth in depths]
    for (n, depth), prediction in zip(cells, predictions, strict=True):
        assert not prediction.requires_grad    # reading keeps no graph
        whole, _ = model(write_cell(TASKS, n, depth, hay))
        n_asked = len(encode(QUESTION))
        torch.testing.assert_close(prediction, whole[:, -n_asked:], rtol=1e-8, atol=1e-8)


@each_kind
def test_an_answer_is_what_the_model_writes_after_all_it_has_read(kind):
    text = write_hay("words", 3, random.Random(0)).expand(2, -1)
    questions = encode(QUESTION).expand(2, -1)
    model = small_model(kind)

    written = generate(model, torch.cat([text, questions], dim=1), 4, temperature=0)[:, -4:]
    answers = written.clone()
    answers[1, 2] = (answers[1, 2] + 1) % 53
    right = passkey.ask(model, model.absorb(text), questions, answers)

    assert right.tolist() == [[True] * 4, [True, True, False, True]]


def test_shares_are_of_all_digits_and_of_whole_keys(monkeypatch):
    def answer(model, state, questions, answers):
        return torch.tensor([
            [True, True, True, False],
            [True, True, True, True],
            [False, False, False, False],
        ])

    monkeypatch.setattr(passkey, "ask", answer)
    found, = passkey.evaluate(new_model(), TASKS, [100], [0.5])

    assert found.digits_right == pytest.approx(7 / 12)
    assert found.keys_right == pytest.approx(1 / 3)


def test_the_cells_are_read_in_an_order_in_which_hay_only_grows():
    cells = passkey.plan_cells([1000, 300, 301], [0.5, 0], one_key("9054"))

    # Inputs of 300 and 301 tokens have 10 paragraphs, those of 1000 have 39.
    assert cells == {
        0: {10: [(300, 0), (301, 0)], 39: [(1000, 0)]},
        5: {5: [(300, 0.5), (301, 0.5)]},
        20: {19: [(1000, 0.5)]},
    }
    assert list(cells) == [0, 5, 20]
    assert list(cells[0]) == [10, 39]


def test_hay_is_read_once_for_all_keys_or_all_lengths(predictions, capsys):
    model = small_model()
    calls = note_calls(model)

    list(passkey.evaluate(model, TASKS, [1000, 300, 301], [0.5, 0]))

    # All keys share the hay before the needle, all lengths that behind it (planned above).
    hay = 24 * 20 + 24 * len(KEYS) * (39 + 5 + 19)
    needles = 3 * len(KEYS) * len(encode(NEEDLE_9054))
    n_read = sum(tokens.numel() for tokens in calls)
    assert n_read == len(encode(INTRO)) + hay + needles
    assert f"looking: {hay:,}/{hay:,}" in capsys.readouterr().err


@pytest.mark.parametrize("n_keys, n, at_once", [(1, 2500, 80), (3, 1000, 26), (50, 300, 4)])
def test_a_call_reads_some_2000_tokens_at_most_or_four_paragraphs(
        n_keys, n, at_once, predictions):
    model = small_model()
    calls = note_calls(model)

    list(passkey.evaluate(model, n_keys * TASKS[:1], [n], [0]))

    assert max(tokens.shape[1] for tokens in calls) == 24 * at_once


@each_kind
def test_copies_of_a_state_go_on_as_their_documents(kind):
    documents = torch.stack([encode(QUESTION), encode(QUESTION).flip(0)]).repeat(1, 8)
    model = small_model(kind)
    state = model.absorb(documents)

    copied = passkey.copies(state, 3)
    more = documents[:, :40]
    whole = torch.cat([documents, more], dim=1)
    two_calls, _ = model(more.repeat_interleave(3, dim=0), copied)
    one_call, _ = model(whole.repeat_interleave(3, dim=0))

    torch.testing.assert_close(two_calls, one_call[:, -40:])


def test_all_that_is_read_goes_to_the_models_device(monkeypatch):
    devices = []

    def note(model, state, questions, answers):
        for tensor in (state[0].k, questions, answers):
            devices.append(tensor.device.type)
        return torch.ones(3, 4)

    monkeypatch.setattr(passkey, "ask", note)
    model = small_model().to("meta")
    calls = note_calls(model)
    list(passkey.evaluate(model, TASKS, [300], [0.5]))

    assert devices == ["meta", "meta", "meta"]
    assert {tokens.device.type for tokens in calls} == {"meta"}


@pytest.mark.parametrize("tasks", [
    [],
    [one_key("1234"), one_key("567")],
    [one_key("1234"), one_key("1234", needle="The key is {0}.")],
    [one_key("1234"), one_key("1234")._replace(question="What is the key?")],
    [one_key("1234"), one_key("1234")._replace(answer="12")],
])
def test_tasks_of_different_lengths_are_one_line(tasks):
    with pytest.raises(ValueError, match="^tasks must be of one length, and at least one$"):
        list(passkey.evaluate(new_model(), tasks, [64], [0]))


@pytest.mark.parametrize("depth", [-0.1, 1.1, 50, math.nan])
def test_a_depth_that_is_no_share_is_one_line(depth):
    with pytest.raises(ValueError, match="^depths must be from 0 to 1, not "):
        list(passkey.evaluate(new_model(), TASKS, [64], [0, depth]))


# --- The table ------------------------------------------------------------------------


def columns_of(row):
    """Cut a row of the table into its name and its cells."""
    name = row[:24].strip()
    return [name, *[row[i:i + 12].strip() for i in range(24, len(row), 12)]]


def found_with(shares, depths):
    """Make what was found. shares: {length: digits right at each depth}."""
    found = []
    for n, row in shares.items():
        for depth, share in zip(depths, row, strict=True):
            found.append(Found(n, depth, share, share / 2))
    return found


@pytest.fixture
def searches(monkeypatch):
    """Let a search find more the deeper the key. Notes lengths and keys of each."""
    noted = []

    def find(model, tasks, lengths, depths, hay="paper"):
        noted.append((lengths, [task.answer for task in tasks]))
        for n in lengths:
            for depth in depths:
                yield Found(n, depth, (1 + depth) / 4, depth / 4)

    monkeypatch.setattr(passkey, "evaluate", find)
    return noted


def test_the_papers_numbers_are_those_of_its_table_3():
    assert passkey.PAPER_LENGTHS == [32768, 131072, 262144, 524288, 1048576]

    cells = {name: row.split() for name, row in passkey.PAPER.items()}
    assert cells == {
        "zero-shot linear": ["14/13/98", "11/14/100", "6/3/100", "6/7/99", "8/6/98"],
        "zero-shot delta": ["13/11/99", "6/9/99", "7/5/99", "6/8/97", "7/6/97"],
        "400 steps linear":
            ["100/100/100", "100/100/100", "100/100/100", "97/99/100", "96/94/100"],
        "400 steps delta":
            ["100/100/100", "100/100/99", "100/100/99", "100/100/100", "100/100/100"],
    }


def test_a_cell_is_the_percent_of_digits_at_each_depth():
    found = found_with({300: [0.5, 1, 0.994], 1000: [0, 0.096, 0.25]}, [0, 0.5, 1])

    assert passkey.format_cell(found, 300) == "50/100/99"
    assert passkey.format_cell(found, 1000) == "0/10/25"


def test_of_more_than_three_depths_a_cell_is_the_worst():
    found = found_with({300: [1, 1, 0.98, 1], 1000: [1, 0.09, 1, 0.2]}, [0, 0.3, 0.6, 1])

    assert passkey.format_cell(found, 300) == "98"
    assert passkey.format_cell(found, 1000) == "9"


@pytest.mark.parametrize("search, title", [
    (Search([64], [0, 0.5, 1]),
     "Digits right in %, key at 0%/50%/100% of hay, 20 keys (10 above 32K)"),
    (Search([64], [0.3], n_keys=5),
     "Digits right in %, key at 30% of hay, 5 keys (3 above 32K)"),
    (Search([64], [0, 0.3, 0.5, 1], n_keys=1),
     "Digits right in %, key at the worst of 4 depths of hay, 1 keys (1 above 32K)"),
])
def test_the_title_says_what_is_looked_for(search, title, capsys):
    passkey.print_header(search)

    assert capsys.readouterr().out.splitlines()[1] == title


def test_the_papers_numbers_stand_below_ours(capsys):
    depths = [0, 0.5, 1]
    search = Search([2 ** 11, 2 ** 15, 2 ** 20], depths)
    found = found_with({2 ** 20: [0, 0, 1], 2 ** 15: [1, 1, 1], 2 ** 11: [1, 0, 1]}, depths)

    passkey.print_header(search)
    passkey.print_result(Looked("short", "delta", 7, found), search)

    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [columns_of(row) for row in rows] == [
        ["training, rule, seed", "2K", "32K", "1M"],
        ["short delta 7", "100/0/100", "100/100/100", "0/0/100"],
        ["the paper, zero-shot", "", "13/11/99", "7/6/97"],
    ]


@pytest.mark.parametrize("way, rule, papers", [
    ("short", "linear", "14/13/98"),
    ("short", "delta", "13/11/99"),
    ("plain", "linear", "100/100/100"),
    ("sharp", "delta", "100/100/100"),
])
def test_short_stands_above_zero_shot_and_the_others_above_400_steps(
        way, rule, papers, capsys):
    search = Search([2 ** 15], [0, 0.5, 1])
    found = found_with({2 ** 15: [0, 0, 0]}, search.depths)

    passkey.print_result(Looked(way, rule, 0, found), search)

    _, row = capsys.readouterr().out.splitlines()
    assert columns_of(row) == [
        f"the paper, {'zero-shot' if way == 'short' else '400 steps'}", papers]


@pytest.mark.parametrize("rule, changes", [
    (None, {}),                                # the paper shows no model without memory
    ("delta", dict(lengths=[2 ** 14])),
    ("delta", dict(depths=[0, 0.5])),
    ("delta", dict(hay="words")),
    ("delta", dict(digits=6)),
    ("delta", dict(needle="The key is {0}.")),
])
def test_the_paper_has_no_row_below_what_it_did_not_measure(rule, changes, capsys):
    search = replace(Search([2 ** 15], [0, 0.5, 1]), **changes)
    n = search.lengths[0]
    found = found_with({n: [0] * len(search.depths)}, search.depths)

    passkey.print_result(Looked("plain", rule, 0, found), search)

    row, = capsys.readouterr().out.splitlines()
    assert columns_of(row)[0] == f"plain {rule or '-'} 0"


def test_beyond_32k_every_second_key_is_looked_for(tmp_path, searches):
    path = save_run(Run("short", "delta", 7, 1), tmp_path)
    search = Search([64, 2 ** 15, 2 ** 15 + 1, 2 ** 20], [0], n_keys=5)

    looked = passkey.look(path, search)

    keys = [task.answer for task in search.tasks()]
    assert searches == [
        ([64, 2 ** 15], keys),
        ([2 ** 15 + 1, 2 ** 20], [keys[0], keys[2], keys[4]]),
    ]
    assert [cell.tokens for cell in looked.found] == search.lengths
    assert looked.name() == "short delta 7"


def test_a_search_in_other_text_is_made_in_that_text(tmp_path, monkeypatch):
    noted = []

    def find(model, tasks, lengths, depths, hay):
        noted.append((tasks[0].needle, lengths, depths, hay))
        return []

    monkeypatch.setattr(passkey, "evaluate", find)
    path = save_run(Run("short", "delta", 7, 1), tmp_path)
    passkey.look(path, Search([64, 2 ** 20], [0.3], needle="Remember it.", hay="words"))

    assert noted == [
        ("Remember it.", [64], [0.3], "words"),
        ("Remember it.", [2 ** 20], [0.3], "words"),
    ]


def test_every_cell_goes_into_the_csv_file(tmp_path, searches):
    paths = [
        save_run(Run("short", "delta", 7, 1), tmp_path),
        save_run(Run("local", None, 0, 1), tmp_path),
    ]

    table = tmp_path / "new" / "a.csv"
    results = passkey.table(paths, Search([64, 2 ** 20], [0, 1]), table)

    with open(table, newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["training", "rule", "seed", "tokens", "depth", "digits_right",
                      "keys_right", "model"]
    assert rows == [
        ["short", "delta", "7", "64", "0", "0.25", "0.0", str(paths[0])],
        ["short", "delta", "7", "64", "1", "0.5", "0.25", str(paths[0])],
        ["short", "delta", "7", "1048576", "0", "0.25", "0.0", str(paths[0])],
        ["short", "delta", "7", "1048576", "1", "0.5", "0.25", str(paths[0])],
        ["local", "", "0", "64", "0", "0.25", "0.0", str(paths[1])],
        ["local", "", "0", "64", "1", "0.5", "0.25", str(paths[1])],
        ["local", "", "0", "1048576", "0", "0.25", "0.0", str(paths[1])],
        ["local", "", "0", "1048576", "1", "0.5", "0.25", str(paths[1])],
    ]
    assert [looked.name() for looked in results] == ["short delta 7", "local - 0"]


def test_a_model_of_something_else_is_refused_before_all_work(tmp_path, searches, capsys):
    good = save_run(Run("short", "delta", 7, 1), tmp_path)
    bad = save(tmp_path / "lm.pt", new_model(), dict(steps=0, seed=0, kind="delta"))

    with pytest.raises(ValueError, match="lm.pt is not a model of passkey.py"):
        passkey.table([good, bad], Search([64], [0]), tmp_path / "a.csv")

    assert searches == []
    assert capsys.readouterr().out == ""


# --- The picture ----------------------------------------------------------------------


def labels_of(ticks):
    return [tick.get_text() for tick in ticks]


def test_the_heat_map_shows_each_share_at_its_depth_and_length(tmp_path, figures):
    search = Search([100, 1024], [0, 0.3, 1])
    found = found_with({1024: [0.1, 0.2, 0.3], 100: [0.4, 0.55, 1]}, search.depths)

    passkey.draw([Looked("sharp", "delta", 2, found)], search, tmp_path / "a.png")

    axis, bar = figures[0].axes
    image, = axis.images
    values = [[40, 10], [55, 20], [100, 30]]    # a row per depth, a column per length
    assert torch.allclose(torch.tensor(image.get_array()), torch.tensor(values).double())
    assert image.get_clim() == (0, 100)
    assert labels_of(axis.get_xticklabels()) == ["100", "1K"]
    assert labels_of(axis.get_yticklabels()) == ["0%", "30%", "100%"]
    assert axis.get_title() == "sharp delta 2"
    assert "length" in axis.get_xlabel()
    assert "depth" in axis.get_ylabel()
    assert "digits right (%)" in bar.get_ylabel()
    assert (tmp_path / "a.png").stat().st_size > 0


@pytest.mark.parametrize("n, rows, columns", [(1, 1, 1), (2, 1, 2), (3, 3, 1), (4, 2, 2)])
def test_an_even_number_of_heat_maps_has_two_columns(n, rows, columns, tmp_path, figures):
    search = Search([100], [0])
    looked = Looked("sharp", "delta", 2, found_with({100: [1]}, [0]))

    passkey.draw([looked] * n, search, tmp_path / "a.png")

    grid = figures[0].axes[0].get_subplotspec().get_gridspec()
    assert (grid.nrows, grid.ncols) == (rows, columns)
    assert len(figures[0].axes) == n + 1    # and the bar of colours


# --- The command ----------------------------------------------------------------------


def test_the_command_looks_where_and_for_what_it_is_asked(tmp_path, searches, command):
    path = save_run(Run("short", "delta", 7, 1), tmp_path)

    code, out, _ = command(
        passkey.main, "--load", path, "--lengths", "1M,2K", "--depths", "30,0,100,50",
        "--keys", 3, "--eval-seed", 5, "--out", tmp_path / "new")

    _, title, header, row = out.splitlines()
    keys = [task.answer for task in Search([], [], n_keys=3, seed=5).tasks()]
    assert code == 0
    assert searches == [([2 ** 11], keys), ([2 ** 20], [keys[0], keys[2]])]
    assert "the worst of 4 depths" in title
    assert columns_of(header) == ["training, rule, seed", "2K", "1M"]
    assert columns_of(row) == ["short delta 7", "25", "25"]
    assert {file.name for file in (tmp_path / "new").iterdir()} == {
        "passkey.csv", "passkey.png"}


def test_the_command_trains_and_looks_on_the_device_that_is_asked_for(
        tmp_path, command, monkeypatch):
    path = save_run(Run("short", "delta", 7, 1), tmp_path)
    devices = []

    def train_runs(runs, out, device, resume):
        devices.append(device)
        return {"short": path}

    def look(path, search, device):
        devices.append(device)
        return Looked("short", "delta", 7, found_with({64: [1]}, [0]))

    monkeypatch.setattr(common, "usable_device", str)    # also one that is not there
    monkeypatch.setattr(passkey, "train_runs", train_runs)
    monkeypatch.setattr(passkey, "look", look)
    code, _, _ = command(
        passkey.main, "--training", "short", "--rule", "delta", "--device", "abacus",
        "--lengths", 64, "--depths", 0, "--out", tmp_path)

    assert code == 0
    assert devices == ["abacus", "abacus"]


def test_a_model_that_is_looked_with_stays_as_it_is(tmp_path, searches, command):
    path = save_run(Run("short", "delta", 7, 1), tmp_path)
    before = path.read_bytes()

    code, _, _ = command(
        passkey.main, "--load", path, "--lengths", 64, "--out", tmp_path)

    assert code == 0
    assert path.read_bytes() == before


def test_without_options_it_looks_as_the_readme_shows(tmp_path, searches, command):
    path = save_run(Run("sharp", "delta", 0, 1), tmp_path)

    code, out, _ = command(passkey.main, "--load", path, "--out", tmp_path)

    _, title, header, *_ = out.splitlines()
    (_, keys), _ = searches
    assert code == 0
    assert keys[:2] == ["2363", "4157"]    # those of RESULTS.md
    assert title.endswith("key at 0%/50%/100% of hay, 20 keys (10 above 32K)")
    assert columns_of(header)[1:] == ["1K", "32K", "128K", "256K", "512K", "1M"]


def test_several_models_have_a_row_each_in_the_order_of_the_command(
        tmp_path, searches, command):
    paths = [save_run(Run("short", rule, seed, 1), tmp_path)
             for rule in RULES for seed in (1, 0)]

    code, out, _ = command(
        passkey.main, "--load", *paths[:3], "--load", paths[3], "--lengths", 64,
        "--out", tmp_path)

    names = [columns_of(row)[0] for row in out.splitlines()[3:]]
    assert code == 0
    assert names == ["short linear 1", "short linear 0", "short delta 1", "short delta 0"]


@pytest.mark.parametrize("arguments", [
    "--steps 0", "--steps many", "--training warm", "--training ,", "--training short,",
    "--lengths 1G", "--lengths 0", "--lengths 1K,,2K", "--depths 101", "--depths -1",
    "--depths nan", "--keys 0", "--seed -1", "--eval-seed 1.5", "--eval-seed -1",
    "--threads 0", "--rule hebb", "--device abacus", "--device meta", "--st 3", "--out=",
    "--load", "--load=", "--load FILE --training short",
])
def test_a_bad_argument_ends_with_exit_code_2_and_nothing_is_trained(
        arguments, tmp_path, command, no_training, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("kept")

    code, out, err = command(passkey.main, *arguments.split())

    option = arguments.split()[0].split("=")[0]
    assert code == 2
    assert out == ""
    assert "error: " in err.splitlines()[-1]
    assert option.removesuffix("=") in err.splitlines()[-1] or option == "--st"
    assert {file.name for file in tmp_path.iterdir()} <= {"FILE", "out"}


@pytest.mark.parametrize("arguments, message", [
    ("--keys 910", "of keys with 4 digits, at most 909 are held out"),
    ("--load missing.pt", "missing.pt"),
    ("--load .", "directory"),
    ("--load FILE", "FILE is no checkpoint of this version"),
])
def test_what_can_not_be_is_one_line_and_nothing_is_trained(
        arguments, message, tmp_path, command, no_training, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("kept")

    code, out, err = command(passkey.main, *arguments.split())

    line, = err.splitlines()
    assert code == 2
    assert out == ""
    assert line.startswith("error: ")
    assert message in line
    assert Path("FILE").read_text() == "kept"


def test_run_as_a_script_it_works_under_the_name_that_worker_processes_know(monkeypatch):
    called = []

    def note():
        called.append("passkey.main")

    monkeypatch.setattr(passkey, "main", note)
    runpy.run_path(passkey.__file__, run_name="__main__")

    assert called == ["passkey.main"]


@pytest.mark.parametrize("name", ["plain", "linear", "delta"])
def test_the_shipped_models_find_keys_that_they_have_never_seen(name, tmp_path, command):
    path = ASSETS / f"passkey-{name}.pt"

    code, out, _ = command(
        passkey.main, "--load", path, "--lengths", "300,1K", "--out", tmp_path)

    *_, row = out.splitlines()
    percents = re.findall(r"\d+", " ".join(columns_of(row)[1:]))
    assert code == 0
    assert len(percents) == 6
    assert min(int(percent) for percent in percents) >= 98
