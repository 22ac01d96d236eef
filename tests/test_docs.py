"""The claims of README.md, RESULTS.md and the notebook about themselves and about the tree."""
import ast
import base64
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import passkey
import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
CODE = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for pattern in ("*.py", "experiments/*.py", "tests/*.py") for path in ROOT.glob(pattern)}
EXPERIMENTS = sorted({Path(n).stem for n in CODE if n.startswith("experiments/")} - {"curves"})
COMMANDS = re.findall(r"^ {4}(?:pip .* && )?(python .*)$", README + RESULTS, re.MULTILINE)

# --- Sizes, structure ----------------------------------------------------------------------------
def test_the_files_are_as_small_and_as_narrow_as_the_project_promises():
    limits = {"infini.py": 520, "train.py": 430, "passkey.py": 380, "experiments/bench.py": 180}
    n_lines = {name: len(code.splitlines()) for name, code in CODE.items()}
    tests = {name: n for name, n in n_lines.items() if name.startswith("test")}
    assert all(n <= limits.get(name, 900 if name in tests else 100) for name, n in n_lines.items())
    assert sum(tests.values()) <= 2100
    assert len(README.splitlines()) <= 130 and len(RESULTS.splitlines()) <= 220
    assert max(map(len, README.splitlines())) <= 110
    for name, text in {**CODE, "RESULTS.md": RESULTS}.items():
        assert max(map(len, text.splitlines())) <= 100, name

def test_nothing_is_imported_against_the_arrows_and_no_syntax_is_newer_than_python_3_10():
    allowed = {"infini.py": set(), "train.py": {"infini"}, "passkey.py": {"infini", "train"},
               "experiments": {"infini", "train", "passkey", "experiments.curves"}}
    for name, code in CODE.items():
        modules = set()
        for node in ast.walk(ast.parse(code, name, feature_version=(3, 10))):
            modules |= {node.module} if isinstance(node, ast.ImportFrom) else set()
            modules |= {a.name for a in node.names} if isinstance(node, ast.Import) else set()
        ours = {m for m in modules if m.split(".")[0] in ("infini", "train", "passkey",
                                                          "experiments")}
        assert ours <= allowed.get(name.split("/")[0], ours), name
    for cell in notebook().cells:
        if cell.cell_type == "code":
            ast.parse(cell.source, feature_version=(3, 10))

def test_an_experiment_is_one_file_one_test_and_one_section_of_the_results():
    tests = re.findall(r"^def test_(\w+)", CODE["tests/test_experiments.py"], re.MULTILINE)
    sections = re.findall(r"^## .*: experiments/(\w+)\.py$", RESULTS, re.MULTILINE)
    assert sorted(sections) == sorted(EXPERIMENTS)
    for name in EXPERIMENTS:
        assert any(test.startswith(name) for test in tests), name
        assert f"python -m experiments.{name}" in RESULTS and name + ".py " in README

@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_that_is_run_as_a_file_says_in_one_line_how_to_run_it(name):
    command = [sys.executable, f"experiments/{name}.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1
    assert f"python -m experiments.{name}" in done.stderr

# --- README.md and RESULTS.md --------------------------------------------------------------------
def test_the_tree_in_the_readme_names_every_file_and_no_other():
    tree = README[README.index("## What is where"):README.index("## Departures")]
    named = set(re.findall(r"^ {4,8}([\w/]+(?:\.\w+)?/?) +\w", tree, re.MULTILINE))
    there = {name.removeprefix("experiments/") for name in CODE if not name.startswith("tests/")}
    assert named == there | {"experiments/", "tests/", "walkthrough.ipynb", "RESULTS.md"}

def test_every_departure_in_the_code_is_a_row_of_the_readme_and_every_row_is_in_the_code():
    table = README[README.index("| the paper | here | where |"):].split("\n\n")[0]
    rows = re.findall(r"^\| .+ \| .+ \| `([\w.]+)` \|$", table, re.MULTILINE)
    found, files = [], [name for name in CODE if not name.startswith("test")]
    for name, (i, line) in ((n, x) for n in files for x in enumerate(CODE[n].splitlines(), 1)):
        if re.search(r"(^|\W)Departure: ", line):
            homes = [n for n in ast.walk(ast.parse(CODE[name])) if hasattr(n, "name") and
                     hasattr(n, "body") and n.lineno <= i <= n.end_lineno]
            found.append(max(homes, key=lambda n: n.lineno).name if homes else Path(name).name)
    assert sorted(found) == sorted(rows) and len(rows) == len(table.splitlines()) - 2

def test_the_readmes_example_runs():
    names = {}
    exec(re.search(r"```python\n(.+?)```", README, re.DOTALL).group(1), names)
    assert names["o"].shape == (2, 7, 128) and names["text"].shape == (2, 70)

def test_the_readmes_numbers_are_those_of_the_results():
    rows = re.findall(r"^\| (ours|the paper)(?:, `(\w+)`)? \| Linear( . Delta)? \| (\d.+) \|$",
                      README, re.MULTILINE)
    for who, way, delta, row in rows:
        rule = "delta" if delta else "linear"
        shown = re.search(rf"^    {way} {rule} 0 +(.+)$", RESULTS, re.M) if who == "ours" else None
        cells = shown[1].split()[1:] if shown else passkey.PAPER[f"400 steps {rule}"].split()
        assert row.split(" | ") == [cells[i] for i in (0, 1, 3, 4)]
    assert len(rows) == 6
    for name, cells in passkey.PAPER.items():
        way = "short" if name.startswith("zero-shot") else "sharp"
        ours = RESULTS.index(f"    {way} {name.split()[-1]} 0")
        shown = re.findall(r"\d+/\d+/\d+", RESULTS[ours:].splitlines()[1])
        assert shown == cells.split() and len(shown) == 5

def test_links_and_pictures_lead_to_files_that_are_there():
    for text in (README, RESULTS):
        links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
        for path in links + re.findall(r"\bassets/[\w.-]+\.\w+", text):
            assert (ROOT / path).exists(), path

@pytest.mark.parametrize("line", sorted(set(COMMANDS)))
def test_every_command_of_the_pages_is_one_that_its_parser_takes(line, monkeypatch, tmp_path):
    words = line.replace("FILE ...", "a.pt").replace("FILE", "a.pt").split()[1:]
    name = words[1] if words[0] == "-m" else Path(words[0]).stem
    module = importlib.import_module(name)
    def parsed(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(module, "set_up", parsed)
    monkeypatch.setattr(sys, "argv", ["command", *words[2 if words[0] == "-m" else 1:]])
    with pytest.raises(KeyboardInterrupt):
        module.main()

# --- walkthrough.ipynb ---------------------------------------------------------------------------
def notebook():
    return nbformat.read(ROOT / "walkthrough.ipynb", as_version=4)

def outputs_of(cells):
    return [output for cell in cells for output in cell.get("outputs", [])]

def test_the_walkthrough_runs_from_top_to_bottom_without_a_warning(walkthrough_run):
    assert all(o.get("name") != "stderr" for o in outputs_of(walkthrough_run.cells))

def test_the_saved_outputs_of_the_walkthrough_come_from_this_version_of_what_it_uses(monkeypatch):
    monkeypatch.chdir(ROOT)
    cells, names = [cell for cell in notebook().cells if cell.cell_type == "code"], {}
    exec("\n".join(cell.source for cell in cells[:3]), names)    # files, imports, fingerprint
    printed = outputs_of(cells[:3])[-1]["text"]
    assert names["fingerprint"]() in printed, "refresh: jupyter execute --inplace walkthrough.ipynb"

def test_the_walkthrough_is_as_short_as_it_promises_and_can_be_opened_alone(tmp_path):
    code = [cell for cell in notebook().cells if cell.cell_type == "code"]
    shown = [cell.source.splitlines() for cell in code if not cell.metadata.get("cellView")]
    assert len(shown) <= 30 and max(map(len, shown)) <= 15
    assert max(len(line) for cell in code for line in cell.source.splitlines()) <= 100
    assert not any("execution" in cell.metadata for cell in code)
    prose = "\n".join(c.source for c in notebook().cells if c.cell_type == "markdown")
    assert "](assets" not in prose and prose.count("<details>") == prose.count("</details>") > 8
    done = subprocess.run([sys.executable, "-"], input=code[0].source, cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "infini.py" in done.stderr

def test_the_readmes_picture_is_the_walkthroughs_first():
    pictures = [o["data"] for o in outputs_of(notebook().cells) if "image/png" in o.get("data", ())]
    picture = base64.b64decode(pictures[0]["image/png"])
    assert picture == (ROOT / "assets/idea.png").read_bytes()

def test_the_saved_walkthrough_holds_no_warning_and_no_path_of_the_machine_that_made_it():
    assert (ROOT / "walkthrough.ipynb").stat().st_size < 1_200_000
    for output in outputs_of(notebook().cells):
        data = {kind: text for kind, text in output.get("data", {}).items() if "image" not in kind}
        text = output.get("text", "") + json.dumps(data)
        assert output.get("name") != "stderr" and "Warning" not in text and "Traceback" not in text
        assert not re.search(r"(?<![\w.)])(~|[A-Za-z]:\\|/)[\w.-]+[/\\]\w", text), text

def test_every_name_of_our_code_that_the_walkthrough_mentions_is_there():
    prose = "\n".join(c.source for c in notebook().cells if c.cell_type == "markdown")
    named = re.findall(r"`(infini|train|passkey|experiments\.\w+)\.(?!py\b)(\w+)", prose)
    assert all(hasattr(importlib.import_module(module), name) for module, name in named)
    models = re.findall(r"assets/[\w-]+\.pt", prose)
    assert named and models and all((ROOT / path).exists() for path in models)
