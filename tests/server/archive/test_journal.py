"""What is acknowledged is on the disk until it is delivered, and is erased then."""

import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest

from tests.support import ROOT

pytest.importorskip("pynetdicom", reason="needs requirements-dicom.txt")

from server.archive.journal import (
    SEGMENT,
    Accepted,
    Journal,
    JournalError,
    JournalFull,
    Result,
    Task,
)

PIXELS = b"pixels of a patient, " * 5000


def _claimed(journal: Journal, stage: str) -> Task:
    task = journal.claim(stage)
    assert task is not None
    return task


def test_an_object_goes_through_its_stages_and_is_erased(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal") as journal:
        assert journal.accept("1.2.3", PIXELS) == (Accepted.NEW, 1)
        task = _claimed(journal, SEGMENT)
        assert journal.claim(SEGMENT) is None, "it is somebody's already"
        assert journal.contents(task) == [PIXELS]
        journal.segmented(task, [Result("1.2.3.1", b"one"), Result("1.2.3.2", b"two")], ["a", "b"])
        journal.release(task)
        first, second = _claimed(journal, "a"), _claimed(journal, "b")
        assert journal.contents(first) == [b"one", b"two"]
        assert not journal.delivered(first)
        assert journal.delivered(second)
        state = journal.state()
        assert (state.waiting, state.dead, state.bytes) == ({}, {}, 0)


def test_what_is_delivered_leaves_no_trace_in_the_files(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.accept("1.2.3", PIXELS)
        held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert b"pixels of a patient" in held
        task = _claimed(journal, SEGMENT)
        journal.segmented(task, [Result("1.2.4", b"mask of a patient" * 1000)], ["stow"])
        held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert b"pixels of a patient" not in held
        journal.delivered(_claimed(journal, "stow"))
        held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert b"patient" not in held
        assert b"1.2.3" not in held and b"1.2.4" not in held


def test_only_this_user_may_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    with Journal(folder) as journal:
        journal.accept("1.2.3", PIXELS)
        assert folder.stat().st_mode & 0o777 == 0o700
        for path in folder.iterdir():
            assert path.stat().st_mode & 0o777 == 0o600, path


def test_the_same_object_is_taken_once(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.accept("1.2.3", b"a photo")
        assert journal.accept("1.2.3", b"a photo") == (Accepted.DUPLICATE, 1)
        task = _claimed(journal, SEGMENT)
        journal.segmented(task, [Result("1.2.3.9", b"its mask")], ["stow"])
        assert journal.knows("1.2.3") and journal.knows("1.2.3.9")
        # An archive that sends on what it stores.
        assert journal.accept("1.2.3.9", b"its mask")[0] is Accepted.OWN
        journal.delivered(_claimed(journal, "stow"))
        assert journal.accept("1.2.3", b"a photo")[0] is Accepted.DUPLICATE
        assert journal.accept("1.2.3", b"another photo")[0] is Accepted.NEW


def test_receipts_are_kept_for_a_while_only(tmp_path: Path) -> None:
    with Journal(tmp_path, keep_s=0) as journal:
        for uid in ("1.2.3", "1.2.4"):
            journal.accept(uid, uid.encode())
            journal.segmented(_claimed(journal, SEGMENT), [Result(uid + ".9", b"")], ["stow"])
            journal.delivered(_claimed(journal, "stow"))
        assert not journal.knows("1.2.3")


def test_a_full_journal_refuses_and_takes_again_what_fits(tmp_path: Path) -> None:
    with Journal(tmp_path, max_bytes=1000) as journal:
        journal.accept("1.1", bytes(600))
        with pytest.raises(JournalFull):
            journal.accept("1.2", bytes(601))
        task = _claimed(journal, SEGMENT)
        journal.segmented(task, [Result("1.3", bytes(10))], ["stow"])
        assert journal.accept("1.2", bytes(601))[0] is Accepted.NEW


def test_a_disk_that_would_be_too_full_refuses(tmp_path: Path) -> None:
    with Journal(tmp_path, min_free_bytes=1 << 60) as journal:
        assert not journal.has_room
        with pytest.raises(JournalFull):
            journal.accept("1.1", b"")


def test_dead_letters_wait_for_a_person(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        for number in range(3):
            journal.accept(f"1.{number}", f"{number}".encode())
            task = _claimed(journal, SEGMENT)
            journal.failed(task, "refused", "It is no photo.", None)
            journal.release(task)
        assert journal.state().dead == {(SEGMENT, "refused"): 3}
        letters = journal.dead_letters()
        assert [(one.object, one.reason, one.attempts) for one in letters] == [
            (number, "refused", 1) for number in (1, 2, 3)
        ]
    with Journal(tmp_path) as journal, Journal(tmp_path, alone=False) as command:
        assert journal.claim(SEGMENT) is None
        assert command.retry([2]) == 1
        assert _claimed(journal, SEGMENT).object == 2
        assert command.discard([1, 2]) == 1, "one that is tried again is not discarded"
        assert [one.object for one in command.dead_letters()] == [3]


def test_a_destination_that_is_gone_buries_its_deliveries(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.accept("1.1", b"")
        journal.segmented(_claimed(journal, SEGMENT), [Result("1.2", b"")], ["stow", "send"])
        assert journal.bury_others([SEGMENT, "stow"]) == 1
        assert journal.state().dead == {("send", "no_destination"): 1}


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path), pytest.raises(JournalError, match="Another process"):
        Journal(tmp_path)
    Journal(tmp_path).close()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JournalError, match="file"):
        Journal(tmp_path / "file")
    with pytest.raises(JournalError, match="no journal"):
        Journal(tmp_path / "none", alone=False)
    (tmp_path / "journal.sqlite").write_bytes(b"something else " * 100)
    with pytest.raises(JournalError, match="cannot be used"):
        Journal(tmp_path)


def test_what_is_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import itertools, sys
        from pathlib import Path
        from server.archive.journal import Journal
        journal = Journal(Path(sys.argv[1]))
        for number in itertools.count():
            journal.accept(f"1.{number}", f"{number} ".encode() * 3000)
            print(number, flush=True)
        """
    )
    for _ in range(3):
        command = [sys.executable, "-c", script, str(tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(20):
                process.stdout.readline()
            process.kill()
            last = int(([b"19", *process.stdout.read().split()])[-1])
        with Journal(tmp_path) as journal:
            assert all(journal.knows(f"1.{number}") for number in range(last + 1))
            tasks = iter(partial(journal.claim, SEGMENT), None)
            contents = [journal.contents(task) for task in tasks]
            assert len(contents) >= last + 1
            assert all(len({*content.split()}) == 1 for (content,) in contents)
