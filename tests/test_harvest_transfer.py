"""Copies from the model's device: chosen by the device, and whole when they are waited for."""

import pytest
import torch

from harvest.transfer import CudaCopies, PlainCopies, choose_copies


def test_copies_are_chosen_by_the_device(monkeypatch):
    assert isinstance(choose_copies(torch.device("cpu")), PlainCopies)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    assert isinstance(choose_copies(torch.device("cuda", 1)), CudaCopies)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_from_a_gpu_are_whole_when_waited_for():
    device = torch.device("cuda")
    copies = CudaCopies(device)
    waiting = []
    for i in range(20):
        value = torch.full((4096, 512), float(i), device=device)
        for _ in range(50):
            value = value + 1
        waiting.append((i, copies.send([value])))
    for i, sent in waiting:
        assert (sent.wait()[0] == i + 50).all()
