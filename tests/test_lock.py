"""The lock of a folder: one process at a time, whatever an earlier one left behind."""

import multiprocessing
import threading

import pytest

from hacan.errors import UserError
from hacan.lock import LOCK, OWNER, FolderLock


def _try(folder, start, tried, winners):
    lock = FolderLock(folder, remedy="wait", wait=0)
    start.wait()
    try:
        lock.acquire()
        winners.put(1)
    except UserError:
        winners.put(0)
    tried.wait()  # nobody releases before all have tried
    lock.release()


@pytest.mark.parametrize("left", ["", "[]", '{"pid": 1, "host": "elsewhere"}', "\0"])
def test_one_of_several_processes_gets_a_folder_with_a_stale_lock(tmp_path, left):
    context = multiprocessing.get_context("fork")
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / LOCK).write_text(left)
        (folder / OWNER).write_text(left)
        start, tried, winners = context.Barrier(4), context.Barrier(4), context.SimpleQueue()
        processes = [context.Process(target=_try, args=(folder, start, tried, winners)) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert sum(winners.get() for _ in processes) == 1


def test_a_refusal_names_the_owner_if_it_is_known(tmp_path):
    with FolderLock(tmp_path, remedy="wait for it"):
        refused = []

        def other():
            with pytest.raises(UserError, match=r"in use by another process \(process \d+ on .*\); wait for it"):
                FolderLock(tmp_path, remedy="wait for it", wait=0).acquire()
            (tmp_path / OWNER).write_text("[]")
            with pytest.raises(UserError, match="in use by another process; wait for it"):
                FolderLock(tmp_path, remedy="wait for it", wait=0).acquire()
            refused.append(True)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert refused
    assert not (tmp_path / OWNER).exists()
