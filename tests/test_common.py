"""The claims about common.py: arguments, errors, progress, processes, tables, pictures."""

import csv
import os
import pickle
import runpy
import signal
import time
from concurrent.futures import BrokenExecutor
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes

import common
import passkey
from common import COLOUR, MARKER, Progress, side_by_side

each_kind = pytest.mark.parametrize("kind", COLOUR)


# --- Arguments ------------------------------------------------------------------------


@pytest.mark.parametrize("parse, text, value", [
    (common.count, "1", 1),
    (common.count, "20", 20),
    (common.seed, "0", 0),
    (common.seed, "1234", 1234),
    (common.share, "0", 0.0),
    (common.share, "0.5", 0.5),
    (common.share, "1", 1.0),
    (common.percent, "0", 0.0),
    (common.percent, "12.5", 0.125),
    (common.percent, "100", 1.0),
    (common.path, "a/b", Path("a/b")),
    (common.usable_device, "cpu", "cpu"),
    (common.length, "1", 1),
    (common.length, "1000", 1000),
    (common.length, "32K", 32_768),
    (common.length, "2k", 2048),
    (common.length, "3M", 3_145_728),
    (common.length, "3m", 3_145_728),
])
def test_an_argument_is_read(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize("parse, texts", [
    (common.count, ["", "0", "-1", "1.5", "nan", "inf", "x"]),
    (common.seed, ["", "-1", "0.5", "nan", "x"]),
    (common.share, ["", "-0.001", "1.001", "nan", "inf", "-inf", "x"]),
    (common.percent, ["", "-0.1", "100.1", "nan", "inf", "x"]),
    (common.path, [""]),
    (common.usable_device, ["", "abacus", "meta", "cuda:99"]),
    (common.length, ["", "0", "-1", "0K", "-1K", "1.5K", "K", "1G", "1KK", "nan"]),
    (common.listed(common.count), ["", ",", "1,", "1,,2", "1,0", "1;2"]),
])
def test_an_argument_that_makes_no_sense_is_refused(parse, texts):
    for text in texts:
        with pytest.raises(ValueError):
            parse(text)
            pytest.fail(f"{text!r} was read")


def test_values_with_commas_are_sorted_and_have_no_copies():
    parse = common.listed(common.length)

    assert parse("2K,1K,7,2048") == [7, 1024, 2048]
    assert parse("7") == [7]


def parser_with(add_arguments, *arguments, **options):
    parser = common.new_parser("Does something.")
    add_arguments(parser, *arguments, **options)
    return parser


def refusal(parser, words, capsys):
    """Require that a parser refuses the words. Returns its last line."""
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(words)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_parser_shows_what_it_takes_by_default():
    parser = parser_with(common.add_shared_arguments)

    assert "folder for all files (default: out)" in parser.format_help()


def test_the_folder_for_files_is_made_and_a_file_is_refused(tmp_path, capsys):
    parser = parser_with(common.add_shared_arguments)
    (tmp_path / "file").touch()

    args = parser.parse_args(["--out", str(tmp_path / "new" / "out")])

    assert args.out.is_dir()
    line = refusal(parser, ["--out", str(tmp_path / "file")], capsys)
    assert "--out: invalid folder value" in line


def test_a_parser_does_not_guess_abbreviations(capsys):
    parser = parser_with(common.add_shared_arguments)

    assert "unrecognized arguments: --thr" in refusal(parser, ["--thr", "2"], capsys)


def test_a_refusal_names_the_option_and_what_it_must_be(capsys):
    parser = parser_with(common.add_shared_arguments)
    parser.add_argument("--depths", type=common.listed(common.percent))

    assert "--threads: invalid count value: '0'" in refusal(parser, ["--threads=0"], capsys)
    assert "--out: invalid folder value: ''" in refusal(parser, ["--out="], capsys)
    line = refusal(parser, ["--depths=0,101"], capsys)
    assert "--depths: invalid list of percent value: '0,101'" in line


def test_the_shared_arguments_are_out_device_and_threads():
    parser = parser_with(common.add_shared_arguments)
    without = parser_with(common.add_shared_arguments, device=False)

    assert vars(parser.parse_args([])) == dict(out=Path("out"), device="cpu", threads=None)
    assert vars(without.parse_args([])) == dict(out=Path("out"), threads=None)
    words = ["--out", "new", "--device", "cpu", "--threads", "2"]
    assert vars(parser.parse_args(words)) == dict(out=Path("new"), device="cpu", threads=2)


def test_several_files_can_be_given_at_once_or_one_by_one():
    parser = parser_with(common.add_files_argument, "models")

    words = ["--load", "a.pt", "b.pt", "--load", "c.pt"]

    assert parser.parse_args(words).load == [Path("a.pt"), Path("b.pt"), Path("c.pt")]


def test_files_must_be_given_unless_they_are_not_required(capsys):
    parser = parser_with(common.add_files_argument, "models")
    optional = parser_with(common.add_files_argument, "models", required=False)

    assert "required: --load" in refusal(parser, [], capsys)
    assert "--load: invalid path value" in refusal(parser, ["--load", ""], capsys)
    assert optional.parse_args([]).load is None


# --- Running a command ----------------------------------------------------------------


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("error, line", [
    (ValueError("a must be 2"), "error: a must be 2\n"),
    (OSError(28, "No space left"), "error: [Errno 28] No space left\n"),
    (MemoryError("too much"), "error: too much\n"),
    (BrokenExecutor("terminated"), "error: a process died, perhaps for want of memory\n"),
])
def test_a_users_mistake_is_one_line_and_exit_code_2(error, line, command):
    assert command(raising(error)) == (2, "", line)


def test_ctrl_c_is_one_line_and_exit_code_130(command):
    code, out, err = command(raising(KeyboardInterrupt))

    assert (code, out) == (130, "")
    assert err == "\nstopped; checkpoints are as last saved\n"


@pytest.mark.parametrize("error", [RuntimeError, TypeError, KeyError, ImportError])
def test_our_own_mistake_is_a_traceback(error):
    with pytest.raises(error):
        common.run_command(raising(error))


def test_what_a_command_prints_is_left_alone(command):
    def main():
        print("done")

    assert command(main) == (0, "done\n", "")


def test_threads_are_set_unless_it_is_left_to_pytorch(two_threads):
    common.set_threads(None)
    assert torch.get_num_threads() == 2

    common.set_threads(1)
    assert torch.get_num_threads() == 1


# --- Progress -------------------------------------------------------------------------


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.seconds = 1000.0

    def read(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock.read)
    return clock


def test_progress_prints_what_is_done_the_speed_and_the_time_left(clock, capsys):
    progress = Progress("reading", 4000)

    clock.seconds += 2
    progress.show(1000, 3000, loss=0.5, right=1 / 3)

    out, err = capsys.readouterr()
    assert out == ""
    assert err == ("reading: 1,000/4,000  loss 0.5000  right 0.3333  "
                   "1,500 tokens/s  6 s left\n")


def test_the_speed_is_of_all_tokens_so_far(clock, capsys):
    progress = Progress("reading", 10)

    for done in (1, 2, 3):
        clock.seconds += 10
        progress.show(done, 100 * done)

    assert capsys.readouterr().err.splitlines() == [
        "reading: 1/10  10 tokens/s  90 s left",
        "reading: 2/10  15 tokens/s  80 s left",
        "reading: 3/10  20 tokens/s  70 s left",
    ]


def test_what_was_done_before_does_not_count_as_fast(clock, capsys):
    progress = Progress("reading", 10, done=6)

    clock.seconds += 4
    progress.show(8, 100)

    assert capsys.readouterr().err == "reading: 8/10  25 tokens/s  4 s left\n"


@pytest.mark.parametrize("every", [5.0, 2.0])
def test_progress_is_printed_at_once_then_every_few_seconds_and_at_the_end(
        every, clock, capsys):
    options = {} if every == 5.0 else {"every": every}    # five seconds unless told
    progress = Progress("reading", 5, **options)
    start = clock.seconds

    times = [0.5, 0.25 + every, 0.5 + every, 0.25 + 2 * every, 0.375 + 2 * every]
    for done, seconds in enumerate(times, start=1):
        clock.seconds = start + seconds
        progress.show(done, 1)

    shown = [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["reading: 1/5", "reading: 3/5", "reading: 5/5"]


# --- Processes ------------------------------------------------------------------------
#
# A worker imports torch anew, which takes seconds. So each claim that needs workers is
# tested with as few of them as possible.


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def describe_worker(job, seconds):
    """Wait, then say which job this is and what the process that does it is like."""
    time.sleep(seconds)
    ends_on_ctrl_c = signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    return job, os.getpid(), torch.get_num_threads(), ends_on_ctrl_c


def test_results_come_in_the_order_of_jobs_from_as_many_processes_as_threads(
        two_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")    # a worker takes one core all the same

    found = list(side_by_side(describe_worker, [("a", 1.0), ("b", 0.0), ("c", 0.0)]))

    jobs, processes, n_threads, ends_on_ctrl_c = zip(*found, strict=True)
    assert jobs == ("a", "b", "c")
    assert len(set(processes)) == 2
    assert os.getpid() not in processes
    assert n_threads == (1, 1, 1)
    assert ends_on_ctrl_c == (True, True, True)


def test_with_one_thread_jobs_run_in_this_process_one_after_the_other():
    found = list(side_by_side(describe_worker, [("a", 0.0), ("b", 0.0)]))

    here = os.getpid()
    assert found == [("a", here, 1, False), ("b", here, 1, False)]


def test_a_single_job_runs_in_this_process_with_all_threads(two_threads):
    found = list(side_by_side(describe_worker, [("a", 0.0)]))

    assert found == [("a", os.getpid(), 2, False)]


def test_no_job_has_no_result(two_threads):
    assert list(side_by_side(describe_worker, [])) == []


def die_or_work(path):
    if path is None:
        os._exit(9)    # as when the system wants the memory back
    time.sleep(60)
    path.write_text("done")


def test_a_worker_that_dies_is_one_line_at_once(
        two_threads, tmp_path, command, monkeypatch):
    start = BaseProcess.start

    def start_late(process):    # when the first worker is watched already
        time.sleep(0.2)
        start(process)

    monkeypatch.setattr(BaseProcess, "start", start_late)

    def main():
        list(side_by_side(die_or_work, [(tmp_path / "long",), (None,)]))

    code, out, err = command(main)

    assert (code, out) == (2, "")
    assert err == "error: a process died, perhaps for want of memory\n"
    assert not (tmp_path / "long").exists()    # nobody waited for the other worker


def test_a_job_is_copied_into_another_process_and_not_sent_as_open_files():
    job = (torch.arange(5), "a")

    tensor, text = pickle.loads(ForkingPickler.dumps(common.Copy(job)))

    assert torch.equal(tensor, job[0])
    assert text == "a"
    assert not job[0].is_shared()    # as it would be in a file of its own


# Here a script is started as `%run passkey.py` in a notebook starts it, or a profiler.
# Then its functions have two homes, `__main__` here and `__mp_main__` in its workers, and
# neither process finds what the other one means. So a script imports its own main by the
# module's name, in its last lines.


def test_a_script_that_another_one_starts_gets_its_workers_results(tmp_path, command):
    script = Path(passkey.__file__)
    models = [script.with_name("assets") / f"passkey-{rule}.pt" for rule in passkey.GROWTH]

    def start():
        runpy.run_path(str(script), run_name="__main__")

    code, out, _ = command(start, "--load", *models, "--lengths", 256, "--depths", 0,
                           "--keys", 1, "--out", tmp_path, "--threads", 2)

    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert "sharp linear 0 100" in rows
    assert "sharp delta 0 100" in rows


# --- Tables ---------------------------------------------------------------------------


def test_a_row_has_its_name_on_the_left_and_its_cells_on_the_right(capsys):
    common.print_row("delta", ["100", 7])
    common.print_row("delta", ["100", 7], name_width=6, width=4)

    assert capsys.readouterr().out.splitlines() == [
        "delta                            100           7",
        "delta  100   7",
    ]


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_a_table_is_written_into_a_new_folder(tmp_path):
    path = tmp_path / "new" / "table.csv"

    common.write_csv(path, ["name", "value"], [["é, \"x\"", 0.5], ["b", 2]])

    assert read_csv(path) == [["name", "value"], ["é, \"x\"", "0.5"], ["b", "2"]]
    assert os.listdir(path.parent) == ["table.csv"]


def test_an_old_table_stays_whole_until_the_new_one_is(tmp_path):
    def rows_that_fail():
        yield ["b", 2]
        raise ValueError("no more rows")

    path = tmp_path / "table.csv"
    common.write_csv(path, ["name", "value"], [["a", 1]])

    with pytest.raises(ValueError, match="no more rows"):
        common.write_csv(path, ["name", "value"], rows_that_fail())

    assert read_csv(path) == [["name", "value"], ["a", "1"]]


def test_a_link_to_a_table_stays_a_link(tmp_path):
    (tmp_path / "link.csv").symlink_to("table.csv")

    common.write_csv(tmp_path / "link.csv", ["name"], [["a"]])

    assert (tmp_path / "link.csv").is_symlink()
    assert read_csv(tmp_path / "table.csv") == [["name"], ["a"]]


@pytest.mark.parametrize("n, text", [
    (7, "7"),
    (1000, "1,000"),
    (1023, "1,023"),
    (1024, "1K"),
    (1025, "1,025"),
    (32_768, "32K"),
    (2 ** 20 - 2 ** 10, "1023K"),
    (2 ** 20, "1M"),
    (2 ** 20 + 2 ** 10, "1025K"),
    (3 * 2 ** 20, "3M"),
])
def test_a_length_is_written_with_k_or_m_if_it_is_whole(n, text):
    assert common.format_length(n) == text
    assert text[-1] not in "KM" or common.length(text) == n


def test_the_deviation_over_seeds_is_written_if_there_are_several():
    assert common.mean_and_deviation([0.5]) == "0.5000"
    assert common.mean_and_deviation([1.0, 2.0, 6.0]) == "3.0000 +- 2.6458"
    assert common.mean_and_deviation(torch.tensor([1.0, 3.0])) == "2.0000 +- 1.4142"


@pytest.mark.parametrize("n_segments, base, ends", [
    (1, 2, [1]),
    (2, 2, [1, 2]),
    (8, 2, [1, 2, 4, 8]),
    (9, 2, [1, 2, 4, 8, 9]),
    (16, 4, [1, 4, 16]),
    (20, 4, [1, 4, 16, 20]),
])
def test_costs_are_averaged_over_stretches_of_segments(n_segments, base, ends):
    costs = torch.arange(1.0, n_segments + 1)    # the cost of a segment is its number
    both = torch.stack([costs, 10 * costs])

    found_ends, found = common.by_position(both, base)

    firsts = [1] + [end + 1 for end in ends[:-1]]
    means = [(first + end) / 2 for first, end in zip(firsts, ends, strict=True)]
    assert found_ends == ends
    torch.testing.assert_close(found, torch.tensor([means, [10 * mean for mean in means]]))


# --- Pictures -------------------------------------------------------------------------


def test_each_kind_has_a_colour_and_a_marker_of_its_own():
    assert COLOUR.keys() == MARKER.keys()
    assert len(set(COLOUR.values())) == len(COLOUR)
    assert len(set(MARKER.values())) == len(MARKER)
    assert (COLOUR["linear"], COLOUR["delta"]) == ("C2", "C3")    # green and red
    assert (COLOUR["local"], COLOUR["xl"], COLOUR["full"]) == ("0.5", "C5", "C4")


def test_a_figure_is_of_so_many_inches_and_axes():
    figure, axes = common.new_figure(5, 3, rows=2, columns=3, sharex=True)
    _, single = common.new_figure(5, 3)

    assert figure.get_size_inches().tolist() == [5, 3]
    assert axes.shape == (2, 3)
    assert axes[0, 0].get_shared_x_axes().joined(axes[0, 0], axes[1, 2])
    assert isinstance(single, Axes)


def test_a_figure_is_saved_as_a_png_file_in_a_new_folder(tmp_path):
    figure, _ = common.new_figure(2, 1)

    common.save_figure(figure, tmp_path / "new" / "a.png")

    content = (tmp_path / "new" / "a.png").read_bytes()
    width, height = (int.from_bytes(content[i:i + 4], "big") for i in (16, 20))
    assert content.startswith(b"\x89PNG")
    assert (width, height) == (300, 150)    # 150 dots per inch


@each_kind
def test_a_line_has_its_kinds_colour_and_marker_and_is_named_where_it_ends(kind):
    _, axis = common.new_figure(4, 3)

    common.draw_line(axis, [1, 2, 4], [0.5, 0.25, 0.125], kind, "name")

    line, = axis.lines
    name, = axis.texts
    assert line.get_xydata().tolist() == [[1, 0.5], [2, 0.25], [4, 0.125]]
    assert (line.get_color(), line.get_marker()) == (COLOUR[kind], MARKER[kind])
    assert line.get_alpha() == 1
    assert (name.get_text(), name.get_color()) == ("name", COLOUR[kind])
    assert name.xy == (4, 0.125)


def test_a_size_is_a_shade_and_a_style_can_be_changed():
    _, axis = common.new_figure(4, 3)

    common.draw_line(axis, [1, 2], [3, 4], "delta", "name", shade=0.4, marker="x",
                     linestyle=":")

    line, = axis.lines
    assert line.get_alpha() == 0.4
    assert line.get_color() == COLOUR["delta"]
    assert (line.get_marker(), line.get_linestyle()) == ("x", ":")


@each_kind
def test_points_have_their_kinds_colour_and_marker_and_no_line(kind):
    _, axis = common.new_figure(4, 3)

    common.draw_points(axis, [1, 2], torch.tensor([[3, 4, 5], [6, 7, 8]]), kind)

    assert [seed.get_ydata().tolist() for seed in axis.lines] == [[3, 6], [4, 7], [5, 8]]
    for seed in axis.lines:
        assert seed.get_xdata().tolist() == [1, 2]
        assert (seed.get_color(), seed.get_marker()) == (COLOUR[kind], MARKER[kind])
        assert seed.get_linestyle() == "None"


def heights_of_names(axis):
    """Return {name: where it stands, in points}."""
    axis.figure.draw_without_rendering()
    heights = {}
    for name in axis.texts:
        at = axis.transData.transform(name.xy)[1] * 72 / axis.figure.dpi
        heights[name.get_text()] = at + name.xyann[1]
    return heights


def axis_with_names(ends):
    """Draw a line to each of the ends. ends: {name: (x, y)}. Returns the axis."""
    _, axis = common.new_figure(4, 3)
    for name, (x, y) in ends.items():
        common.draw_line(axis, [0, x], [0, y], "delta", name)
    axis.set_ylim(0, 1)
    return axis


def test_names_of_lines_that_end_together_are_moved_apart():
    axis = axis_with_names({"c": (1, 0.51), "a": (1, 0.5), "far": (1, 0.9), "b": (1, 0.5)})
    before = heights_of_names(axis)

    common.spread_names(axis)

    after = heights_of_names(axis)
    assert after["a"] == pytest.approx(before["a"])
    assert after["b"] == pytest.approx(before["a"] + 9)
    assert after["c"] == pytest.approx(before["a"] + 18)
    assert after["far"] == pytest.approx(before["far"])


def test_names_at_another_x_stay_where_they_are():
    axis = axis_with_names({"a": (1, 0.5), "b": (2, 0.5)})
    before = heights_of_names(axis)

    common.spread_names(axis, least=20)

    assert heights_of_names(axis) == pytest.approx(before)


def test_a_logarithmic_axis_has_a_tick_at_each_length():
    _, axis = common.new_figure(4, 3)

    common.set_lengths(axis, [512, 1024, 2 ** 20])

    assert axis.get_xscale() == "log"
    assert axis.get_xticks().tolist() == [512, 1024, 2 ** 20]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["512", "1K", "1M"]
    assert axis.get_xticks(minor=True).tolist() == []


def test_a_heat_map_shows_each_number_in_its_row_and_column():
    _, axis = common.new_figure(4, 3)
    grid = [[0.0, 11.0, 22.0], [33.0, 44.0, 50.0]]

    image = common.heat_map(axis, grid, 50, "{:.1f}", ["a", "b", "c"], ["above", "below"])

    assert image.get_array().tolist() == grid
    assert image.get_clim() == (0, 50)
    shown = {text.get_position(): text.get_text() for text in axis.texts}
    assert shown == {(0, 0): "0.0", (1, 0): "11.0", (2, 0): "22.0",
                     (0, 1): "33.0", (1, 1): "44.0", (2, 1): "50.0"}
    assert [label.get_text() for label in axis.get_xticklabels()] == ["a", "b", "c"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["above", "below"]


def test_numbers_on_a_dark_ground_are_white():
    _, axis = common.new_figure(4, 3)

    common.heat_map(axis, [[0, 59, 60, 61, 100]], 100, "{:.0f}", list("abcde"), ["row"])

    colours = {text.get_text(): text.get_color() for text in axis.texts}
    assert colours == {"0": "white", "59": "white", "60": "white", "61": "black",
                       "100": "black"}
