"""The store: made once for each set of facts, exact, and damaged files are named."""

import pytest
import torch

from cache_spec import UserError
from evaluate.store import Store


class Maker:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.n += 1
        rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).t()  # not contiguous
        return {"x": rows.requires_grad_(), "mask": torch.tensor([True, False]), "ids": torch.arange(3)}


def test_the_same_facts_are_made_once_and_come_back_exactly(tmp_path):
    make = Maker()
    first = Store(tmp_path / "new").get("rows", {"model": "a", "seed": 0}, make)
    again = Store(tmp_path / "new").get("rows", {"seed": 0, "model": "a"}, make)
    assert make.n == 1
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert tensor.dtype == again[name].dtype
        assert torch.equal(tensor, again[name])
        assert not tensor.requires_grad


def test_other_facts_or_another_name_are_made_again(tmp_path):
    make, store = Maker(), Store(tmp_path)
    for name, facts in (("rows", {"seed": 0}), ("rows", {"seed": 1}), ("other", {"seed": 0})):
        store.get(name, facts, make)
    assert make.n == 3
    assert len(list(tmp_path.iterdir())) == 3


def test_without_a_folder_nothing_is_kept(tmp_path):
    make = Maker()
    for _ in range(2):
        Store(None).get("rows", {}, make)
    assert make.n == 2


def test_a_damaged_file_is_named_and_made_again_when_deleted(tmp_path):
    make, store = Maker(), Store(tmp_path)
    store.get("rows", {}, make)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{file.name} is damaged .*; delete it, and it is made again"):
        store.get("rows", {}, make)
    file.unlink()
    store.get("rows", {}, make)
    assert make.n == 2


def test_what_is_interrupted_while_it_is_made_leaves_nothing(tmp_path):
    def stopped() -> dict[str, torch.Tensor]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path / "new").get("rows", {}, stopped)
    assert not list(tmp_path.rglob("*.*"))
