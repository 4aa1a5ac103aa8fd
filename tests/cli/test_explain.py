import os
import pty
import subprocess
import sys

import pytest

from cmtool.docs import page, titles


def test_the_list_has_each_topic_with_the_title_of_its_page(cmtool):
    rows = [line.split(maxsplit=1) for line in cmtool("explain").text.splitlines()]
    assert [topic for topic, _ in rows] == sorted(titles())
    assert all(page(topic).startswith(f"# {title}\n") for topic, title in rows)


@pytest.mark.parametrize("topic", titles())
def test_a_pipe_gets_the_markdown(cmtool, topic):
    assert cmtool("explain", topic).text == page(topic)


def test_a_terminal_gets_a_formatted_page_without_links_to_files():
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-m", "cmtool", "explain", "ct"]
    with subprocess.Popen(command, stdout=theirs, env=environment) as process:
        os.close(theirs)
        shown = b"".join(iter(lambda: written_to(ours), b"")).decode()
    shown = " ".join(shown.split())
    os.close(ours)
    assert process.returncode == 0
    assert "\x1b[" in shown
    assert "cmtool explain cd" in shown
    assert "cd.md" not in shown
    assert "```" not in shown


def written_to(terminal):
    """The next bytes written to a terminal; none when nobody has it open any more."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


def test_an_unknown_topic_is_two_lines_with_the_nearest_name(cmtool):
    done = cmtool("explain", "own-image")
    assert (done.code, done.out) == (2, b"")
    error, hint = done.err.splitlines()
    assert error == "error: no page 'own-image'"
    assert hint.startswith("hint: did you mean 'own-images'?")


def test_a_page_needs_no_torch():
    code = (
        "import sys; from cmtool.cli import build_app\n"
        "build_app('explain')(['explain', 'cd'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)
