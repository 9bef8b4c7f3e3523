"""The server of programs serves whatever files a program has open."""

import subprocess

import pytest

from tests.helpers.quick_python import quick_programs


@pytest.mark.parametrize("first", range(3, 63, 15))
def test_no_number_of_a_programs_files_stops_the_server(first):
    """Few numbers at a time: the server's own files, which they may replace in the fork, lie above as many."""
    python = str(quick_programs() / "python")
    files = " ".join(f"{number}<&0" for number in range(first, first + 15))
    program = f"""exec {python} -c 'print("began", flush=True); exit(int(open({first}).readline()))' {files}"""
    with subprocess.Popen(["bash", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as waits:
        assert waits.stdout.readline() == "began\n"
        subprocess.run([python, "-c", ""], check=True, timeout=10)
        assert waits.poll() is None
        waits.communicate("7\n")
    assert waits.returncode == 7
