import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from torch.distributed import HashStore

from cmtool.errors import InputError, ResourceError, Stopped
from cmtool.system.dist import STDOUT, Group, assemble, contact, no_stdout


def two():
    store = HashStore()
    return Group(0, 2, store), Group(1, 2, store)


def test_processes_find_each_other_beside_what_an_earlier_start_left_in_the_store():
    store = HashStore()
    for _ in range(2):
        with ThreadPoolExecutor() as pool:
            early = pool.submit(assemble, store, 0, 2)
            time.sleep(0.2)  # long enough to answer the name of an earlier start
            late = pool.submit(assemble, store, 1, 2)
            ours, theirs = early.result(10), late.result(10)
        assert not theirs.check(["greeting"])
        ours.set("greeting", "hello")
        assert theirs.get("greeting") == b"hello"


def test_the_others_hear_of_the_first_failure_only():
    leading, other = two()
    for group in (other, leading):
        with pytest.raises(InputError) as caught, contact(group, lambda: 7):
            raise InputError(f"bad image of {group.rank}")
        assert caught.value.rank == group.rank
    assert leading.failure() == other.failure() == "rank 1 failed after step 7: bad image of 1"


def test_a_stop_that_all_agreed_on_is_no_failure():
    leading, other = two()
    with pytest.raises(Stopped), contact(leading, lambda: 7):
        raise Stopped("stopped", "", 15)
    assert other.failure() is None


def test_what_torch_says_of_a_lost_process_becomes_what_ended_it():
    leading, other = two()
    silent = pytest.raises(ResourceError, match="after step 7: connection closed")
    with silent, contact(leading, lambda: 7):
        raise RuntimeError("[/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    other.confess("rank 1 failed after step 6: boom")
    told = pytest.raises(ResourceError, match="rank 1 failed after step 6: boom")
    with told, contact(leading, lambda: 7):
        raise RuntimeError("Timed out waiting 4000ms for recv operation to complete")


def test_a_bug_stays_a_traceback_and_names_its_process():
    leading, other = two()
    with pytest.raises(RuntimeError, match="shapes") as caught, contact(other, lambda: 7):
        raise RuntimeError("shapes do not match")
    assert caught.value.__notes__ == ["in rank 1, after step 7"]
    assert leading.failure() == "rank 1 failed after step 7: RuntimeError('shapes do not match')"


def test_a_meeting_waits_for_the_leading_process_or_hears_that_it_failed():
    leading, other = two()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(other.meet, "drawn")
        assert not waiting.done()
        leading.meet("drawn")
        waiting.result(10)
        waiting = pool.submit(other.meet, "written")
        leading.confess("rank 0 failed after step 7: the disk is full")
        with pytest.raises(ResourceError, match="the disk is full"):
            waiting.result(10)


def test_one_process_waits_for_nobody():
    alone = Group()
    alone.meet("drawn")
    assert alone.agreed(lambda: 3, "three") == alone.together(lambda: 3, "three") == 3
    assert alone.gather(3) == [3]
    with pytest.raises(InputError):
        alone.together(lambda: (_ for _ in ()).throw(InputError("bad")), "bad")


def test_processes_line_up_only_where_gpus_compute(monkeypatch):
    waited = []
    monkeypatch.setattr(dist, "all_reduce", lambda _, op, group: waited.append(group))
    Group(0, 2).line_up()
    assert waited == []
    Group(0, 2, talk="gloo").line_up()
    assert waited == ["gloo"]


def test_what_a_library_says_on_stdout_while_processes_connect_is_dropped(capfd):
    with no_stdout():
        os.write(STDOUT, b"[Gloo] Rank 0 is connected to 1 peer ranks.\n")
    os.write(STDOUT, b"checkpoints/step-0000003\n")
    assert capfd.readouterr() == ("checkpoints/step-0000003\n", "")
