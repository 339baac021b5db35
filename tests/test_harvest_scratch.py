"""The folder in which a machine's processes build shards for a store: empty for the first, gone after the last, and the
claims of the killed left in it for whoever comes next."""

import fcntl
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from harvest_fixtures import request_for, save_model, write_text
from store_fixtures import IMPATIENT

from cache_spec import verify_cache
from cache_spec.layout import CLAIMS, RECORDS, ROOT, record_file
from cache_spec.plan import Plan
from cache_spec.publish import publish_shard
from cache_spec.state import read_plan, recorded_shards
from cache_spec.store_path import StorePath, place_of
from harvest import run, target
from harvest.claim_board import FolderBoard
from harvest.claims import Claims
from harvest.model import LoadedModel, load_model
from harvest.request import Request
from harvest.share import Share
from harvest.store_board import StoreBoard


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "scratch" / "cache.zarr-0123456789ab"


def kill(board: Path, name: str) -> None:
    """What a process leaves that held this claim and was killed: the file, which nobody has locked."""
    (board / name).unlink(missing_ok=True)
    (board / name).write_bytes(b"{}\n")


def test_the_first_finds_it_empty_and_the_last_takes_it_away(folder):
    (folder / "0123").mkdir(parents=True)
    (folder / "0123" / "shard").write_bytes(b"left by a killed process")
    with target._shared(folder):
        assert list(folder.iterdir()) == []
        (folder / "mine").mkdir()
        with target._shared(folder):
            assert (folder / "mine").exists()
        assert (folder / "mine").exists()
    assert list(folder.parent.iterdir()) == []


def test_the_last_leaves_the_claims_of_the_killed_and_nothing_else(folder):
    claims = folder / "claims"
    with target._shared(folder):
        (folder / "mine").mkdir()
        mine = FolderBoard(claims)
        assert mine.post("000000.0", b"{}\n")
        kill(claims, "000001.0")
        (claims / ".000002.0.0123.partial").write_bytes(b"half of one")
        mine.remove("000000.0")
    assert [path for path in folder.parent.rglob("*") if path.is_file()] == [claims / "000001.0"]
    with target._shared(folder):
        board = FolderBoard(claims)
        assert board.is_abandoned("000001.0")
        (claims / ".000002.0.0123.partial").write_bytes(b"half of one")
        board.clear()
    assert list(folder.parent.iterdir()) == []


@pytest.fixture
def before_trying(monkeypatch):
    """Has something done, once, just before a process tries whether it is alone, as any pause of it would allow."""
    real, waiting = fcntl.flock, []

    def flock(fd: int, how: int) -> None:
        if how & fcntl.LOCK_NB and waiting:
            waiting.pop()(fd)
        real(fd, how)

    monkeypatch.setattr(target.fcntl, "flock", flock)
    return waiting.append


def begin(process: ExitStack, folder: Path) -> None:
    """A process joins and builds something."""
    process.enter_context(target._shared(folder))
    (folder / "0123").mkdir()
    (folder / "0123" / "shard").write_bytes(b"half of it")


def test_who_joins_while_the_last_leaves_and_another_begins_takes_nothing_from_it(folder, before_trying):
    with ExitStack() as another, ExitStack() as last:
        last.enter_context(target._shared(folder))

        def change(fd: int) -> None:
            last.close()
            begin(another, folder)

        before_trying(change)
        with target._shared(folder):
            assert (folder / "0123" / "shard").exists()
            another.close()
            assert (folder / "0123" / "shard").exists()  # the one that joined is not alone with an old lock
    assert list(folder.parent.iterdir()) == []


def test_of_two_that_leave_at_once_the_slower_takes_nothing_from_one_that_begins(folder, before_trying):
    """To try whether it is alone, a process lets go of the lock that it shares, for a moment."""
    with ExitStack() as another, ExitStack() as fast, ExitStack() as slow:
        fast.enter_context(target._shared(folder))
        slow.enter_context(target._shared(folder))

        def change(fd: int) -> None:
            fcntl.flock(fd, fcntl.LOCK_UN)
            fast.close()
            begin(another, folder)

        before_trying(change)
        slow.close()
        assert (folder / "0123" / "shard").exists()
    assert list(folder.parent.iterdir()) == []


@pytest.fixture
def loaded(tmp_path) -> LoadedModel:
    return load_model(str(save_model(tmp_path / "model")))


@pytest.fixture
def request_of_text(loaded, tmp_path) -> Request:
    return request_for(loaded, write_text(tmp_path / "text.txt", 400))


@pytest.fixture
def root(tmp_path) -> StorePath:
    pytest.importorskip("obstore")
    root = place_of(f"file://{tmp_path}/store", IMPATIENT)
    assert isinstance(root, StorePath)
    return root


def test_after_a_death_and_a_stop_the_next_does_not_wait_for_the_dead(
    loaded, request_of_text, root, tmp_path, monkeypatch, capsys
):
    """As torchrun does it: a rank is killed, the others are stopped, and all are started again."""
    scratch = tmp_path / "scratch"
    claims = target._scratch_folder(root, scratch) / "claims"
    dead = Claims(StoreBoard(root.store, FolderBoard(claims)), Share(index=1, count=2))
    assert dead.take(1)
    kill(claims, "000001.0")

    def stopped(*arguments):
        publish_shard(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(target, "publish_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        run.harvest(loaded, request_of_text, str(root), scratch=scratch, claim_timeout=2.0)
    assert 0 < len(recorded_shards(root)) < 3
    assert root.store.list(CLAIMS) == [f"{CLAIMS}/000001.0"]
    capsys.readouterr()
    monkeypatch.setattr(target, "publish_shard", publish_shard)
    run.harvest(loaded, request_of_text, str(root), scratch=scratch, claim_timeout=2.0)
    said = capsys.readouterr().out
    assert "complete" in said
    assert "waiting" not in said
    assert root.store.list(CLAIMS) == []
    assert list(scratch.iterdir()) == []


def test_each_url_has_a_scratch_folder_of_its_own_and_one_process_of_it_plans_at_a_time(root, tmp_path):
    others = place_of(f"file://{tmp_path}/other/store", IMPATIENT)
    assert isinstance(others, StorePath)
    assert target._scratch_folder(root, tmp_path) != target._scratch_folder(others, tmp_path)
    with ExitStack() as stack:
        first, second, other = (
            stack.enter_context(target.open_target(str(place), tmp_path / "scratch")) for place in (root, root, others)
        )
        with first.planning(), other.planning():  # which waits for nobody
            planned = threading.Event()

            def plan_too() -> None:
                with second.planning():
                    planned.set()

            late = threading.Thread(target=plan_too)
            late.start()
            assert not planned.wait(0.2)
        late.join()
        assert planned.is_set()


def test_the_planners_files_are_fetched_once_a_machine_and_not_by_who_made_them(
    loaded, request_of_text, root, tmp_path, monkeypatch
):
    fetched, fetch = [], target._fetch

    def noted(source: StorePath, path: Path) -> None:
        fetched.append(path.name)
        fetch(source, path)

    monkeypatch.setattr(target, "_fetch", noted)
    run.harvest(loaded, request_of_text, str(root), scratch=tmp_path / "a")
    assert fetched == []
    plan, here = read_plan(root), tmp_path / "b"
    with target.open_target(str(root), here) as first, target.open_target(str(root), here) as second:
        first.prepare(plan)
        second.prepare(plan)
        assert sorted(fetched) == ["window_docs.npy", "windows.npy"]


def test_a_document_that_was_deleted_because_it_was_damaged_is_made_again(loaded, request_of_text, root, tmp_path):
    run.harvest(loaded, request_of_text, str(root), scratch=tmp_path / "scratch")
    root.store.delete(f"layer_1/clean/{ROOT}")
    assert {problem.file for problem in verify_cache(root)} == {f"layer_1/clean/{ROOT}"}
    run.harvest(loaded, request_of_text, str(root), scratch=tmp_path / "scratch")
    assert verify_cache(root) == []


def test_one_shard_is_on_this_disk_at_a_time_and_none_that_is_committed(
    loaded, request_of_text, root, tmp_path, monkeypatch
):
    there = []

    def noted(place: StorePath, plan: Plan, shard: int, folder: Path) -> None:
        there.append([path.name for path in (folder / RECORDS).iterdir()])
        publish_shard(place, plan, shard, folder)

    monkeypatch.setattr(target, "publish_shard", noted)
    run.harvest(loaded, request_of_text, str(root), scratch=tmp_path / "scratch")
    assert sorted(there) == [[Path(record_file(shard)).name] for shard in range(6)]
    with target.open_target(str(root), tmp_path / "scratch") as late:
        late.write(read_plan(root), 0, {}, {}, 1)  # another has committed it: what it holds is not looked at
    assert len(there) == 6
