"""Both trees, killed or stopped at random moments of a run and started again: the result is the same."""

import os
import random
import signal
import time

import pytest

from irpe_train.errors import Preempted
from tests.end_to_end.test_reliability import TREES, assert_same_run, data, starting  # noqa: F401

FLAGS = ["--deterministic", "--save-interval", "1", "--num_workers", "1", "--resume", "auto"]


@pytest.mark.parametrize(
    ("name", "times"),
    [("SIGKILL", 1), ("SIGTERM", 1)]
    + [pytest.param(*long, marks=pytest.mark.slow) for long in (("SIGKILL", 40), ("SIGTERM", 40), ("SIGINT", 20))],
)
@pytest.mark.parametrize("tree", TREES)
def test_ended_at_any_moment_and_started_again_equals_uninterrupted(tree, name, times, data, tmp_path):  # noqa: F811
    began = time.monotonic()
    (ended,) = starting(tree, data, tmp_path / "whole", *FLAGS).wait(120)
    assert ended.code == 0, ended.text
    whole, draw, sent, folder, codes = time.monotonic() - began, random.Random(f"{tree} {name}"), 0, 0, []
    while sent < times or codes[-1] != 0:
        began = time.monotonic()
        ranks = starting(tree, data, tmp_path / f"cut{folder}", *FLAGS)
        if sent < times:
            ranks.processes[0].join(draw.uniform(0, whole))
            if ranks.processes[0].is_alive():
                os.kill(ranks.processes[0].pid, getattr(signal, name))
                sent += 1
        (ended,) = ranks.wait(120)
        codes.append(ended.code)
        whole = min(whole, time.monotonic() - began) if ended.code == 0 else whole  # the first one is slow
        if ended.code == 0:
            assert_same_run(tmp_path / f"cut{folder}", tmp_path / "whole")
            folder += 1
        elif name == "SIGKILL":
            assert ended.code == -signal.SIGKILL, ended.text
        else:  # before the program's first line a signal has its usual effect
            usual = {"SIGTERM": [-signal.SIGTERM], "SIGINT": [-signal.SIGINT, 130, 1]}[name]  # 1: from multiprocessing
            early = ended.code in usual and not ended.text
            assert ended.code == Preempted.EXIT_CODE or early, (ended.code, ended.text)
    print(f"{tree} {name}: {sent} sent in {folder} runs, statuses {sorted(set(codes))}")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("tree", TREES)
def test_two_ranks_told_to_stop_at_any_moment_leave_alike_and_equal_uninterrupted(tree, data, tmp_path):  # noqa: F811
    """One of them or both, with their workers, six times. The other must learn of it."""
    flags, began, draw = [*FLAGS, "--dist_timeout", "20"], time.monotonic(), random.Random(tree)
    for ended in starting(tree, data, tmp_path / "whole", *flags, world_size=2).wait(120):
        assert ended.code == 0, ended.text
    whole, heard, folder, told = time.monotonic() - began, 0, 0, []
    while heard < 6 or told[-1][1] != [0, 0]:
        began, ranks = time.monotonic(), starting(tree, data, tmp_path / f"cut{folder}", *flags, world_size=2)
        whom = draw.choice(([0], [1], [0, 1])) if heard < 6 else []
        ranks.processes[0].join(draw.uniform(0, whole) if whom else 0)
        for rank in whom:
            if ranks.processes[rank].is_alive():
                os.killpg(ranks.processes[rank].pid, signal.SIGTERM)
        ended = ranks.wait(120)
        told.append((whom, codes := [one.code for one in ended]))
        if codes == [0, 0]:
            assert_same_run(tmp_path / f"cut{folder}", tmp_path / "whole")
            folder, whole = folder + 1, min(whole, time.monotonic() - began)  # the first one is slow
        elif codes == [Preempted.EXIT_CODE] * 2:
            heard += 1
        else:  # before the program's first line a signal has its usual effect, and the other rank waits for this one
            early = [one for one in ended if one.code == -signal.SIGTERM and not one.text]
            assert early and all(one in early or one.code in (1, Preempted.EXIT_CODE) for one in ended), ended
    print(f"{tree}: (told, statuses) {told}")
