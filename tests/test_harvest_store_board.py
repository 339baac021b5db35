"""Claims in an object store: one owner each, signs of life that others see, and a death that the machine knows of."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_fixtures import bounded

from cache_spec.layout import CLAIMS
from cache_spec.store import open_store
from harvest.claim_board import HEAD_BYTES, FolderBoard
from harvest.claims import Claims
from harvest.share import Share
from harvest.store_board import StoreBoard

ROOT = Path(__file__).parent.parent


@pytest.fixture
def store(tmp_path):
    pytest.importorskip("obstore")
    return open_store(f"file://{tmp_path}/store")


def board(store, folder) -> StoreBoard:
    return StoreBoard(store, FolderBoard(folder))


def test_a_claim_has_one_owner_and_is_read_by_others(store, tmp_path):
    mine, other = board(store, tmp_path / "a"), board(store, tmp_path / "b")
    assert mine.post("000003.0", b"{}\n")
    assert not other.post("000003.0", b"{}\n")
    store.put(f"{CLAIMS}/notes.txt", b"not a claim")
    assert other.names() == ["000003.0"]
    before = other.read("000003.0")
    mine.beat("000003.0")
    after = other.read("000003.0")
    assert before is not None
    assert after is not None
    assert (after.head[:3], after.n_bytes - before.n_bytes) == (b"{}\n", 1)
    other.beat("000003.0")  # not its own
    assert other.read("000003.0") == after
    mine.remove("000003.0")
    assert other.read("000003.0") is None
    assert other.names() == []


def test_a_death_is_known_on_the_machine_and_only_there(store, tmp_path):
    dead, here, elsewhere = board(store, tmp_path / "a"), board(store, tmp_path / "a"), board(store, tmp_path / "b")
    dead.post("000000.0", b"{}\n")
    assert not here.is_abandoned("000000.0")
    (tmp_path / "a" / "000000.0").unlink()
    (tmp_path / "a" / "000000.0").write_bytes(b"{}\n")  # what is left when the process that held it is gone
    assert here.is_abandoned("000000.0")
    assert not elsewhere.is_abandoned("000000.0")
    here.clear()
    assert store.list(CLAIMS) == []
    assert not (tmp_path / "a").exists()


def test_two_processes_share_shards_by_claims_in_the_store(store, tmp_path):
    first = Claims(board(store, tmp_path / "a"), Share(), machine="a")
    second = Claims(board(store, tmp_path / "b"), Share(), machine="b")
    assert first.take(0)
    second.look(read=True)
    assert list(second.others()) == [0]
    assert not second.is_dead(second.others()[0])
    assert second.take(1)
    first.give_back(0)
    second.look(read=True)
    assert second.others() == {}
    second.give_back(1)
    assert store.list(CLAIMS) == []


def test_what_a_killed_process_left_here_gives_way_to_a_claim_of_its_name(store, tmp_path):
    """It was taken out of the store from elsewhere, say by who closed the cache; now the shard is missing again."""
    mine, here = board(store, tmp_path / "a"), board(store, tmp_path / "a")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "000003.0").write_bytes(b"{}\n")
    assert here.is_abandoned("000003.0")
    assert mine.post("000003.0", b"{}\n")
    assert not here.is_abandoned("000003.0")
    mine.remove("000003.0")
    assert store.list(CLAIMS) == []
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_process_killed_while_it_claims_is_known_to_be_dead_at_once(store, tmp_path, moment):
    """Whether the store has heard of the claim or not, and whatever comes after."""
    program = (
        "import os, signal\nfrom pathlib import Path\nfrom cache_spec.store import Store, open_store\n"
        "from harvest.claim_board import FolderBoard\nfrom harvest.store_board import StoreBoard\n"
        "create = Store.create\n"
        "def killed(*claim):\n"
        f"    if {moment == 'after'}: create(*claim)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Store.create = killed\n"
        f"store, here = open_store('file://{tmp_path}/store'), FolderBoard(Path('{tmp_path}/here'))\n"
        "StoreBoard(store, here).post('000000.0', b'{}\\n')"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == -signal.SIGKILL
    other = board(store, tmp_path / "here")
    assert other.names() == ["000000.0"] * (moment == "after")
    assert other.is_abandoned("000000.0")
    name = f"000000.{int(moment == 'after')}"
    assert other.post(name, b"{}\n")
    assert not board(store, tmp_path / "here").is_abandoned(name)
    other.remove(name)


def test_the_store_decides_though_a_living_process_here_has_a_claim_of_that_name(store, tmp_path):
    first, second = board(store, tmp_path / "a"), board(store, tmp_path / "a")
    assert first.post("000003.0", b"{}\n")
    store.delete(f"{CLAIMS}/000003.0")
    assert second.post("000003.0", b"{}\n")
    assert not second.is_abandoned("000003.0")
    second.remove("000003.0")
    assert store.list(CLAIMS) == []
    assert (tmp_path / "a" / "000003.0").exists()
    first.remove("000003.0")
    assert not (tmp_path / "a").exists()


def test_of_a_claim_of_a_terabyte_only_the_start_is_read(store, tmp_path):
    claims = board(store, tmp_path / "a")
    assert claims.post("000003.0", b"{}\n")
    with (tmp_path / "store" / CLAIMS / "000003.0").open("r+b") as large:
        large.truncate(2**40)
    with bounded(n_bytes=2**27):
        note = claims.read("000003.0")
    assert note is not None
    assert (note.head[:3], len(note.head), note.n_bytes) == (b"{}\n", HEAD_BYTES, 2**40)
