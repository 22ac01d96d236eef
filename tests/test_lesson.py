"""The lesson: its saved outputs, its size, and what experiments/lesson.py measures."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from PIL import Image

import infini
import passkey
import train
from experiments import lesson, phantom
from infini import Memory, retrieve, sigma, update_delta, update_linear

ROOT = Path(train.__file__).parent


def notebook():
    return nbformat.read(ROOT / "walkthrough.ipynb", as_version=4)


def code_cells():
    return [cell for cell in notebook().cells if cell.cell_type == "code"]


def prose():
    return "\n".join(c.source for c in notebook().cells if c.cell_type == "markdown")


def outputs_of(cells):
    outputs = []
    for cell in cells:
        outputs += cell.get("outputs", [])
    return outputs


def load(name):
    model, _ = train.load_model(ROOT / f"assets/passkey-{name}.pt")
    return model


# --- The notebook ---------------------------------------------------------------------


def test_the_lesson_runs_from_top_to_bottom_without_a_warning(walkthrough_run):
    outputs = outputs_of(walkthrough_run.cells)
    assert all(output.get("name") != "stderr" for output in outputs)


def test_the_saved_outputs_are_of_this_code_and_these_models():
    saved = notebook()
    refresh = "refresh them: python -m experiments.lesson"
    assert saved.metadata["stamp"] == lesson.fingerprint(saved.cells), refresh


def test_the_stamp_changes_with_a_cell_and_with_a_file(tmp_path, monkeypatch):
    cells = notebook().cells
    before = lesson.fingerprint(cells)
    cells[1].source += "\n"
    assert lesson.fingerprint(cells) != before

    for name in lesson.MODULES + [f"assets/{name}" for name in lesson.ASSETS]:
        copy = tmp_path / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    (tmp_path / "RESULTS.md").write_bytes((ROOT / "RESULTS.md").read_bytes())
    monkeypatch.setattr(lesson, "ROOT", tmp_path)
    cells = notebook().cells
    assert lesson.fingerprint(cells) == before
    with open(tmp_path / "infini.py", "a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert lesson.fingerprint(cells) != before


def test_the_lesson_is_as_short_as_it_promises_and_nothing_is_folded():
    cells = code_cells()
    lines = [cell.source.splitlines() for cell in cells]
    assert len(cells) <= 45
    assert max(len(cell) for cell in lines) <= 15
    assert max(len(line) for cell in lines for line in cell) <= 100
    assert all(not cell.metadata for cell in notebook().cells)
    assert (ROOT / "walkthrough.ipynb").stat().st_size < 1_200_000
    assert prose().count("<details>") == prose().count("</details>") > 8


def test_the_saved_lesson_holds_no_warning_and_no_path_of_the_machine_that_made_it():
    for output in outputs_of(code_cells()):
        assert output.get("name") != "stderr"
        data = {k: v for k, v in output.get("data", {}).items() if "image" not in k}
        text = output.get("text", "") + json.dumps(data)
        assert "Warning" not in text and "Traceback" not in text
        assert not re.search(r"(?<![\w.)<])(~|[A-Za-z]:\\|/)[\w.-]+[/\\]\w", text), text


def test_the_first_cell_says_in_one_line_what_is_missing(tmp_path):
    done = subprocess.run([sys.executable, "-"], input=code_cells()[0].source, cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "infini.py" in done.stderr


def test_the_first_cell_gets_the_files_of_a_repository_and_goes_there(tmp_path):
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "infini.py").write_text("")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], cwd=origin, check=True)

    source = code_cells()[0].source.replace('REPOSITORY = ""', f'REPOSITORY = "{origin}"')
    source += "\nimport infini\nprint(os.getcwd())"
    done = subprocess.run([sys.executable, "-"], input=source, cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == tmp_path


def test_every_name_of_our_code_that_the_lesson_uses_is_there():
    text = prose() + "\n".join(cell.source for cell in code_cells())
    modules = {"lesson": lesson, "passkey": passkey, "train": train, "phantom": phantom,
               "infini": infini}
    pattern = r"(?<![\w/.])(lesson|passkey|train|phantom|infini)\.(?!py\b)(\w+)"
    named = re.findall(pattern, text)
    assert len(named) > 40
    for module, name in named:
        assert hasattr(modules[module], name), f"{module}.{name}"
    for path in re.findall(r"(?:assets|experiments)/[\w-]+\.\w+", text):
        assert (ROOT / path).exists(), path


def test_the_readmes_still_picture_is_the_lessons_first():
    for output in outputs_of(code_cells()):
        if "image/png" in output.get("data", {}):
            assert base64.b64decode(output["data"]["image/png"]) == (
                ROOT / "assets/idea.png").read_bytes()
            return


# --- What the lesson says in numbers --------------------------------------------------


def test_the_numbers_that_are_worked_out_by_hand():
    keys = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    values = torch.tensor([[8.0, 0.0, 0.0], [0.0, 8.0, 0.0]])
    memory = update_linear(Memory(torch.zeros(2, 3), torch.zeros(2)), keys, values)
    assert memory.M.tolist() == [[24, 8, 0], [8, 24, 0]] and memory.z.tolist() == [4, 4]
    assert retrieve(keys[:1], memory).tolist() == [[5, 3, 0]]

    memory = update_delta(memory, keys[:1], torch.tensor([[0.0, 0.0, 8.0]]))
    assert memory.M.tolist() == [[9, -1, 24], [3, 21, 8]] and memory.z.tolist() == [7, 5]


def test_a_slider_at_1_shows_the_share_that_the_model_has(monkeypatch):
    shown = []
    monkeypatch.setattr(lesson, "display", lambda html: shown.append(html.data))
    model = load("plain")
    lesson.show_slider(model, "9054", 1)
    cells = re.findall(r"<b>([\d.]+)%</b>", shown[0])

    q, k, _ = lesson.look_inside(model, [passkey.one_key("9054")])
    head = lesson.heads_that_matter(model)[1]
    weights = sigma(k[0, head]) @ sigma(q[0, head, 1])
    own = weights[lesson.COPIES[0] + 1] + weights[lesson.COPIES[1] + 1]
    needle = weights[:lesson.NEEDLE_END].sum()
    for n, cell in zip([2 ** 10, 2 ** 12, 2 ** 14, 2 ** 16, 2 ** 18, 2 ** 20], cells,
                       strict=True):
        share = own / (needle + n * weights[96:192].mean())
        assert float(cell) == pytest.approx(100 * share.item(), abs=0.2)


def test_the_digits_of_a_needle_stand_where_the_lesson_looks():
    text = lesson.write_texts([passkey.one_key("9054")], 6)[0]
    for copy in lesson.COPIES:
        assert text[copy:copy + 4].tolist() == passkey.token_ids("9054")
    needle = passkey.token_ids(passkey.one_key("9054").needle)
    assert text[lesson.START:lesson.NEEDLE_END].tolist() == needle
    paragraph = sorted(passkey.token_ids(passkey.HAY))
    assert sorted(text[96:120].tolist()) == paragraph    # nothing but hay there


def test_without_positions_in_layer_1_the_staircase_and_the_digits_are_gone():
    model = load("linear")
    tasks = lesson.draw_tasks(8)
    heads = lesson.heads_that_matter(model)
    right = lesson.share_of_places(model, tasks, heads).diagonal()
    broken = lesson.without_positions(model, 1)
    wrong = lesson.share_of_places(broken, tasks, heads).diagonal()
    assert right.min() > 0.9 and wrong.max() < 0.5

    assert lesson.digits_right(model, 512, 0.5, 8) == 1
    assert lesson.digits_right(broken, 512, 0.5, 8) < 0.6
    assert lesson.digits_right(lesson.without_positions(model, 2), 512, 0.5, 8) == 1


def test_an_emptied_memory_costs_a_trained_model_its_answer():
    texts = lesson.write_texts(lesson.draw_tasks(8), 7)
    with torch.no_grad():
        as_it_is, emptied = lesson.losses_with_and_without(load("delta"), texts)
    assert as_it_is < 0.1 and emptied > 2.3


def test_gates_are_shut_in_a_copy():
    model = load("delta")
    changed = lesson.with_gates_shut(model, [(2, 1)]).gates()
    before = model.gates()
    assert changed[1, 0] < 1e-6 and before[1, 0] > 0.1
    assert torch.equal(changed[0], before[0]) and torch.equal(changed[1, 1:], before[1, 1:])


def one_line(x):
    return x + 1


def test_a_mistake_that_changes_nothing_is_refused():
    assert lesson.changed(one_line, "+ 1", "+ 2")(1) == 3
    with pytest.raises(ValueError, match="one_line"):
        lesson.changed(one_line, "+ 7", "+ 2")


def test_judge_tells_right_from_wrong(capsys):
    lesson.judge(infini.retrieve, infini.retrieve)
    lesson.judge(infini.inject, infini.inject)
    lesson.judge(update_linear, update_delta)
    verdicts = capsys.readouterr().out.splitlines()
    assert ["right" in line for line in verdicts] == [True, True, False]


@pytest.mark.parametrize("name", ["recall", "compare"])
def test_the_numbers_of_other_experiments_are_those_of_the_results(name):
    block = lesson.result_block(name)
    rows = block.splitlines()
    assert len(rows) >= 4 and "linear" in block and "python" not in block
    results = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    assert all(row.strip() in results for row in rows)


def test_the_moving_picture_loops_and_stands_still_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(lesson, "STOPS", [1, 4])
    monkeypatch.setattr(lesson, "STILL", 3)
    lesson.draw_million(tmp_path / "million.gif")
    with Image.open(tmp_path / "million.gif") as picture:
        assert picture.info["loop"] == 0
        picture.seek(picture.n_frames - 1)
        assert picture.info["duration"] >= 400    # four frames of a seventh of a second

    with Image.open(ROOT / "assets/million.gif") as picture:
        assert picture.info["loop"] == 0 and picture.n_frames > 30
        picture.seek(picture.n_frames - 1)
        assert picture.info["duration"] >= 3000
    assert (ROOT / "assets/million.gif").stat().st_size < 1_500_000


def test_what_the_moving_picture_shows_is_what_the_model_does(monkeypatch):
    monkeypatch.setattr(lesson, "STOPS", [1, 20])
    model = load("plain")
    *_, last = lesson.follow(model, "9054")
    assert last.n_tokens == 480 and last.answer == list("9054")

    # The same share, with all that was read in one call.
    task = passkey.one_key("9054")
    hay = passkey.write_hay("paper", 20, None)
    text = passkey.write_input(task, hay, before=0)[None, :-1]
    seen = []

    def note(layer, arguments):
        seen.extend(layer.project(arguments[0]))

    hook = model.blocks[1].attention.register_forward_pre_hook(note)
    model(text)
    hook.remove()

    head = lesson.heads_that_matter(model)[1]
    past = text.shape[1] // 32 * 32
    weights = sigma(seen[1][0, head, :past]) @ sigma(seen[0][0, head, -3])
    own = weights[lesson.COPIES[0] + 1] + weights[lesson.COPIES[1] + 1]
    assert last.shares[1] == pytest.approx((own / weights.sum()).item(), rel=1e-3)
