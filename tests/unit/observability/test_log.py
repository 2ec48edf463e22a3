"""One line for each event, on the console and in the driver's file."""

from __future__ import annotations

import io
import logging
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import rich.console

from qwench.errors import Stopped
from qwench.observability.console import LiveConsole, PlainConsole, QuietConsole
from qwench.observability.log import DRIVER_LOG, failures_logged, open_driver_log, open_process_log, write_driver_log
from qwench.observability.processes import STACKS, stacks_written

_logger = logging.getLogger("qwench.somewhere")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    package = logging.getLogger("qwench")
    handlers, level = list(package.handlers), package.level
    yield
    for handler in [handler for handler in package.handlers if handler not in handlers]:
        package.removeHandler(handler)
        handler.close()
    package.setLevel(level)


def test_a_plain_console_shows_one_line_for_each_message_and_names_the_level_of_warnings() -> None:
    shown = io.StringIO()
    open_driver_log("info", PlainConsole(rich.console.Console(file=shown, width=40)))
    _logger.debug("not shown")
    _logger.info("resuming from %s", "a [folder] " + "x" * 60)
    _logger.warning("engine 1 is lost")
    assert shown.getvalue() == f"resuming from a [folder] {'x' * 60}\nwarning: engine 1 is lost\n"


def test_a_terminal_shows_the_message() -> None:
    shown = io.StringIO()
    open_driver_log("warning", LiveConsole(rich.console.Console(file=shown, force_terminal=True, no_color=True, width=80)))
    _logger.info("not shown")
    _logger.warning("engine [1] is lost")
    assert shown.getvalue() == "warning: engine [1] is lost\n"


def test_the_file_has_what_was_logged_before_it_was_opened_and_a_second_run_appends(tmp_path: Path) -> None:
    console = PlainConsole(rich.console.Console(file=io.StringIO()))
    for run in ("first", "second"):
        open_driver_log("info", console)
        _logger.critical("%s begins", run)
        write_driver_log(tmp_path / "new" / "run")
        _logger.error("%s ends", run)
    assert stacks_written() == f"The stacks of all processes are in {tmp_path / 'new' / 'run' / STACKS}."
    kinds = [type(handler).__name__ for handler in logging.getLogger("qwench").handlers]
    assert sorted(kinds) == ["_DriverLog", "_LineHandler"], "what was kept is written, and the first run's file is closed"
    lines = (tmp_path / "new" / "run" / "driver.log").read_text().splitlines()
    assert [re.sub(r"^\S+ \S+ ", "", line) for line in lines] == [
        "CRITICAL qwench.somewhere: first begins",
        "ERROR qwench.somewhere: first ends",
        "CRITICAL qwench.somewhere: second begins",
        "ERROR qwench.somewhere: second ends",
    ]


def test_a_rank_writes_its_name_and_the_main_rank_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    open_process_log("debug", "rank 3")
    _logger.debug("built")
    open_process_log("debug", "rank 0", to_stdout=True)
    _logger.info("built too")
    out, err = capsys.readouterr()
    assert out == "built too\n"
    assert re.fullmatch(r"\[rank 3\] \S+ \S+ DEBUG qwench\.somewhere: built\n", err)


def test_an_error_that_ends_a_run_is_in_the_file_with_its_traceback_and_not_twice_on_the_console(tmp_path: Path) -> None:
    shown = io.StringIO()
    open_driver_log("error", PlainConsole(rich.console.Console(file=shown)))
    write_driver_log(tmp_path)
    with pytest.raises(ValueError, match="no gradient"), failures_logged():
        raise ValueError("no gradient")
    text = (tmp_path / DRIVER_LOG).read_text()
    assert "CRITICAL qwench: the run failed\nTraceback" in text and text.endswith("ValueError: no gradient\n")
    assert shown.getvalue() == ""


@pytest.mark.parametrize(("error", "name"), [(Stopped(signal.SIGTERM), "SIGTERM"), (KeyboardInterrupt(), "SIGINT")])
def test_a_signal_that_ends_a_run_is_named_in_the_file(tmp_path: Path, error: BaseException, name: str) -> None:
    open_driver_log("info", QuietConsole())
    write_driver_log(tmp_path)
    with pytest.raises(type(error)), failures_logged():
        raise error
    assert (tmp_path / DRIVER_LOG).read_text().endswith(f"INFO qwench: the run was stopped by {name}\n")


def test_a_full_disk_of_the_log_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_driver_log("info", QuietConsole())
    write_driver_log(tmp_path)
    [file] = [handler for handler in logging.getLogger("qwench").handlers if isinstance(handler, logging.FileHandler)]
    file.setStream(Path("/dev/full").open("w", encoding="utf-8")).close()  # noqa: SIM115 - the handler closes it
    for text in ("one", "two"):
        _logger.info(text)
    file.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"qwench: {tmp_path / DRIVER_LOG} cannot be written to (No space left on device; ")
    assert line.endswith("; the console has what it lacks")


def test_a_closed_log_holds_no_file(tmp_path: Path) -> None:
    open_driver_log("info", PlainConsole(rich.console.Console(file=io.StringIO())))
    write_driver_log(tmp_path)
    [file] = [handler for handler in logging.getLogger("qwench").handlers if isinstance(handler, logging.FileHandler)]
    assert file.stream is not None
    file.close()
    assert file.stream is None
