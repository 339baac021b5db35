"""What the command prints when it is done, and the memory that it keeps."""

import torch

from train.report import keep_freed_memory, notes, print_preset, print_results


def fact(name: str, **changes) -> dict:
    return {
        "name": name,
        "status": "complete",
        "config": {"k": 20, "d_sae": 100},
        "held_out": {"l0": 3.14159, "explained_variance": 0.5, "n_dead": 2},
        "calibration": {"clean_l0_at_training_threshold": 20.4},
        **changes,
    }


def test_a_run_without_held_out_rows_and_a_failed_one_have_a_line_in_the_table_too(capsys, tmp_path):
    unseen = {"l0": None, "explained_variance": None, "n_dead": 0}
    failure = {"step": 1312, "reason": "its loss is nan", "checkpoint": 1300}
    facts = [fact("a"), fact("bb", held_out=unseen), fact("c", status="failed", failure=failure, held_out=None)]
    print_results(facts, tmp_path)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[1].split()[:4] == ["a", "3.14", "0.5000", "2"]
    assert lines[2].split()[:4] == ["bb", "-", "-", "0"]
    assert lines[3].startswith("c ")
    assert "failed at step 1,312" in lines[3]
    assert all(line.endswith(f"/{name}") for line, name in zip(lines[1:], ("a", "bb", "c"), strict=True))


def test_many_dead_latents_and_a_threshold_that_had_drifted_get_a_note(capsys, tmp_path):
    dense = fact("dense", config={"k": 0, "d_sae": 100}, calibration=None)
    assert notes([fact("fine"), fact("uncalibrated", calibration=None), dense]) == []
    dead = fact("dying", held_out={"l0": 3.0, "explained_variance": 0.5, "n_dead": 11})
    drifted = fact("drifted", calibration={"clean_l0_at_training_threshold": 31.2})
    first, second = notes([dead, drifted])
    assert first.startswith("dying: 11 of 100 latents are dead")
    assert second == "drifted: the threshold averaged in training gave L0 31.2 on clean rows; it was calibrated to 20"
    print_results([dead, drifted], tmp_path)
    assert capsys.readouterr().out.count("\nnote: ") == 2


def test_a_preset_is_printed_as_options_that_could_have_been_typed(capsys):
    print_preset("paper", {"batch_size": 2048, "lr": ["1e-3", "3e-4"]})
    print_preset("paper", {})
    print_preset("", {"batch_size": 1})
    assert capsys.readouterr().out.splitlines() == [
        "preset    paper: --batch-size 2048 --lr 1e-3,3e-4",
        "preset    paper: everything in it was given",
    ]


def test_keeping_freed_memory_changes_no_result():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    before = x @ x
    keep_freed_memory()
    assert (x @ x).equal(before)


def test_a_run_that_diverged_and_a_jumprelu_far_from_its_aim_get_a_note():
    diverged = fact("wild") | {"held_out": {"l0": 20.0, "explained_variance": -3.0, "n_dead": 0}}
    far = fact("far") | {"config": {"arch": "jumprelu", "k": 8, "d_sae": 100}, "calibration": None}
    far |= {"held_out": {"l0": 44.0, "explained_variance": 0.9, "n_dead": 0}}
    first, second = notes([diverged, far])
    assert first.startswith("wild: it reconstructs worse than the mean row would, so it diverged")
    assert second.startswith("far: L0 is 44.0 on clean rows and 8 was aimed at")
