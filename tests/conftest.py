"""What the tests share: a folder of texts, the figures that are saved, a command's run."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
import torch
from matplotlib.figure import Figure
from nbclient import execute

from common import run_command

torch.set_num_threads(1)    # everything here is too small to share

# --- The lesson takes long, so it runs beside all other tests --------------------------

LESSON = pytest.StashKey()


def waits_for_the_lesson(item):
    return "walkthrough_run" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items):
    items.sort(key=waits_for_the_lesson)    # these come last


def pytest_collection_finish(session):
    wanted = any(waits_for_the_lesson(item) for item in session.items)
    if not wanted or session.config.option.collectonly:
        return

    path = Path(__file__).parent.with_name("walkthrough.ipynb")
    lesson = nbformat.read(path, as_version=4)
    thread = ThreadPoolExecutor(1)
    running = thread.submit(execute, lesson, cwd=path.parent, timeout=1800)
    session.config.stash[LESSON] = running


@pytest.fixture
def walkthrough_run(request):
    """Wait for the lesson. Returns it with its outputs, and raises if a cell failed."""
    return request.config.stash[LESSON].result()


# --- Fixtures -------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Write 20 texts of 100, 300, ..., 3,900 bytes. Text i repeats one byte, 40 + i."""
    root = tmp_path / "text"
    (root / "deep").mkdir(parents=True)
    for i in range(20):
        where = root / "deep" if i % 2 else root
        (where / f"{i:02}.txt").write_bytes(bytes([40 + i]) * (100 + 200 * i))
    return root


@pytest.fixture
def figures(monkeypatch):
    """Return a list that grows by each figure that is saved."""
    saved = []
    savefig = Figure.savefig

    def note_and_save(figure, *args, **options):
        saved.append(figure)
        savefig(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", note_and_save)
    return saved


@pytest.fixture
def command(monkeypatch, capsys):
    """Return a function that runs main as a command with these arguments.

    It returns the exit code, the standard output and the standard error.
    """
    def run(main, *arguments):
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["command", *words])
        capsys.readouterr()         # what was shown before is not the command's

        code = 0
        try:
            run_command(main)
        except SystemExit as stop:
            code = stop.code
        torch.set_num_threads(1)    # again, whatever --threads said

        out, err = capsys.readouterr()
        return code, out, err

    return run
