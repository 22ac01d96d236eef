"""What the tests of the scripts share."""
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import IPython.display  # noqa: F401  (two threads that import it first can block each other)
import matplotlib
import nbformat
import pytest
import torch
from matplotlib.figure import Figure
from nbclient import execute

from train import run_command

matplotlib.use("Agg")
torch.set_num_threads(1)    # everything here is too small to share
RUN = pytest.StashKey()     # the walkthrough, which runs beside all other tests

def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "walkthrough_run" in getattr(item, "fixturenames", ()))

def pytest_collection_finish(session):
    wanted = any("walkthrough_run" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly:
        path = Path(__file__).parent.with_name("walkthrough.ipynb")
        session.config.stash[RUN] = ThreadPoolExecutor(1).submit(
            execute, nbformat.read(path, as_version=4), cwd=path.parent, timeout=1800)

@pytest.fixture
def walkthrough_run(request):    # waits for the walkthrough; raises if a cell fails
    return request.config.stash[RUN].result()

@pytest.fixture
def folder(tmp_path):    # 20 documents of 100 to 3,900 bytes, no two of which share a byte
    (tmp_path / "text" / "deep").mkdir(parents=True)
    for i, where in enumerate(["text", "text/deep"] * 10):
        (tmp_path / where / f"{i:02}.txt").write_bytes(bytes([i + 40]) * (100 + 200 * i))
    return tmp_path / "text"

@pytest.fixture
def figures(monkeypatch):    # all that are saved
    found, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: (
        found.append(figure), save(figure, *args, **options)))
    return found

@pytest.fixture
def command(monkeypatch, capsys):    # (main, *arguments) -> exit code, standard output, error
    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            run_command(main)
            sys.exit(0)
        return stop.value.code, *capsys.readouterr()
    return run
