"""The claims of README.md and RESULTS.md about themselves and the tree."""

import argparse
import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

import passkey

ROOT = Path(passkey.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
NO_FIGURE = {"sample", "lesson"}    # experiments without a section in RESULTS.md


def read_code():
    """Return {file name: its code} of everything but the tests."""
    code = {}
    for pattern in ("*.py", "experiments/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            if not path.name.startswith("test_"):
                name = path.relative_to(ROOT).as_posix()
                code[name] = path.read_text(encoding="utf-8")
    return code


def experiments():
    """Return the names of all experiments."""
    return sorted(path.stem for path in ROOT.glob("experiments/*.py"))


# --- The tree -------------------------------------------------------------------------


def imported_by(code):
    """Return the first part of each module name that the code imports."""
    modules = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
    return modules


@pytest.mark.parametrize("name, forbidden", [
    ("infini.py", {"common", "train", "passkey", "experiments"}),
    ("common.py", {"infini", "train", "passkey", "experiments"}),
    ("train.py", {"passkey", "experiments"}),
    ("passkey.py", {"experiments"}),
])
def test_data_flows_from_infini_to_train_to_passkey_to_experiments(name, forbidden):
    code = read_code()[name]

    imported = imported_by(code) - {Path(name).stem}    # a script imports its own main

    assert not imported & forbidden


@pytest.mark.parametrize("name", sorted(set(experiments()) - {"lesson", "phantom"}))
def test_experiments_but_lesson_and_phantom_do_not_import_each_other(name):
    code = read_code()[f"experiments/{name}.py"].split("if __name__")[0]

    others = re.findall(r"^from experiments[. ].*", code, re.MULTILINE)

    assert not others


@pytest.mark.parametrize("name", sorted(set(experiments()) - NO_FIGURE))
def test_an_experiment_is_a_file_a_test_and_a_section_of_the_results(name):
    tests = [path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py")]
    sections = RESULTS.split("\n## ")

    own = [section for section in sections if f"\nexperiments/{name}.py" in section]

    assert len(own) == 1
    assert f"python -m experiments.{name}" in own[0]
    assert f"def test_{name}_" in "\n".join(tests)


def test_the_tree_in_the_readme_names_every_file_and_no_other():
    tree = README.split("## What is where")[1].split("To add an experiment")[0]

    named = set(re.findall(r"^ {4,8}([\w/]+\.?\w*)  ", tree, re.MULTILINE))

    code = {name.removeprefix("experiments/") for name in read_code()}
    pages = {"walkthrough.ipynb", "RESULTS.md", "test_infini.py"}
    assert named == code | pages | {"experiments/", "tests/"}


# --- README.md and RESULTS.md ---------------------------------------------------------


def departures_of(name, code):
    """List the innermost function or class around each line that says "Departure:"."""
    homes = []
    for number, line in enumerate(code.splitlines(), start=1):
        if "Departure: " not in line:
            continue
        home = name
        for node in ast.walk(ast.parse(code)):
            is_home = isinstance(node, (ast.FunctionDef, ast.ClassDef))
            if is_home and node.lineno <= number <= node.end_lineno:
                home = node.name    # ast.walk goes from the outside to the inside
        homes.append(home)
    return homes


def test_every_departure_in_the_code_has_a_row_in_the_readme_and_every_row_is_in_the_code():
    table = README.split("| the paper | here | where |")[1].split("\n\n")[0]

    rows = re.findall(r"\| `([\w.]+)` \|$", table, re.MULTILINE)

    found = []
    for name, code in read_code().items():
        found += departures_of(name, code)
    assert sorted(found) == sorted(rows)


def test_the_readmes_example_runs_and_its_shapes_are_right():
    example = re.search(r"```python\n(.+?)```", README, re.DOTALL).group(1)
    names = {}

    exec(example, names)

    assert names["o"].shape == (2, 7, 128)
    assert names["text"].shape == (2, 70)


def results_row(label):
    """Return the cells of a row of RESULTS.md's first table of output."""
    line = re.search(rf"^ +{re.escape(label)} +(\d.+)$", RESULTS, re.MULTILINE)
    return line.group(1).split()


def readme_row(model, rule):
    """Return the cells of a row of the README's table."""
    start = f"| {model} | {rule} | "
    line = next(line for line in README.splitlines() if line.startswith(start))
    return line.removeprefix(start).removesuffix(" |").split(" | ")


@pytest.mark.parametrize("way", ["plain", "sharp"])
@pytest.mark.parametrize("rule, name", [("linear", "Linear"), ("delta", "Linear + Delta")])
def test_the_readmes_numbers_are_those_of_the_results(way, rule, name):
    shown = readme_row(f"ours, `{way}`", name)

    _, at_32k, at_128k, _, at_512k, at_1m = results_row(f"{way} {rule} 0")
    assert shown == [at_32k, at_128k, at_512k, at_1m]


@pytest.mark.parametrize("rule, name", [("linear", "Linear"), ("delta", "Linear + Delta")])
def test_the_papers_numbers_in_the_readme_are_those_of_its_table_3(rule, name):
    shown = readme_row("the paper", name)

    at_32k, at_128k, _, at_512k, at_1m = passkey.PAPER[f"400 steps {rule}"].split()
    assert shown == [at_32k, at_128k, at_512k, at_1m]


@pytest.mark.parametrize("page", [README, RESULTS], ids=["README", "RESULTS"])
def test_links_and_pictures_lead_to_files_that_are_there(page):
    links = re.findall(r"\]\((?!http|#)([^)#]+)\)", page)

    missing = [link for link in links if not (ROOT / link).exists()]

    assert links
    assert not missing


def test_links_inside_the_results_lead_to_a_heading():
    headings = re.findall(r"^#+ (.+)$", RESULTS, re.MULTILINE)
    plain = [re.sub(r"[^\w -]", "", heading.lower()) for heading in headings]
    anchors = {heading.replace(" ", "-") for heading in plain}

    links = re.findall(r"\]\(#([\w-]+)\)", RESULTS)

    assert links
    assert set(links) <= anchors


def commands_of(page):
    """List the commands that a page shows, without what stands behind a #."""
    command = r"(?:^ {4}|`|&& )(python (?:-m )?[\w.]+ ?[^`\n#]*)"
    shown = re.findall(command, page, re.MULTILINE)
    return [line.strip() for line in shown if "NAME" not in line]


class Parsed(Exception):
    """Raised where a command would begin its work."""


@pytest.mark.parametrize("command", sorted(set(commands_of(README) + commands_of(RESULTS))))
def test_every_command_on_the_pages_is_one_that_its_parser_takes(
        command, monkeypatch, tmp_path):
    words = command.replace("FILE ...", "a.pt").replace("FILE", "a.pt").split()
    arguments = words[3:] if words[1] == "-m" else words[2:]
    module = words[2] if words[1] == "-m" else words[1].removesuffix(".py")
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser):
        parse(parser)
        raise Parsed

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", ["command", *arguments])

    with pytest.raises(Parsed):
        importlib.import_module(module).main()
