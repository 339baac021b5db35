"""Shares: every shard belongs to exactly one process, whoever started them, and a wrong share is one sentence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_spec import UserError
from harvest.share import Share, local_device, read_share

SRUN = {"SLURM_JOB_ID": "9", "SLURM_STEP_ID": "0"}


def array(number, count, first=0, step=1):
    """What Slurm tells job `number` of an array of `count` jobs; each has one task, in its batch script."""
    return {
        "SLURM_JOB_ID": str(100 + number),
        "SLURM_ARRAY_TASK_ID": str(number),
        "SLURM_ARRAY_TASK_MIN": str(first),
        "SLURM_ARRAY_TASK_MAX": str(first + step * (count - 1)),
        "SLURM_ARRAY_TASK_STEP": str(step),
        "SLURM_ARRAY_TASK_COUNT": str(count),
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "1",
    }


def torchrun(rank, size):
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}


def srun(number, size):
    return {**SRUN, "SLURM_PROCID": str(number), "SLURM_NTASKS": str(size), "SLURM_LOCALID": str(number)}


@given(n_shards=st.integers(0, 200), count=st.integers(1, 20))
def test_every_shard_belongs_to_exactly_one_process(n_shards, count):
    shares = [read_share(f"{index}/{count}", {}) for index in range(count)]
    for shard in range(n_shards):
        assert [share.index for share in shares if share.owns(shard)] == [shard % count]


@pytest.mark.parametrize("started", [torchrun, srun, array])
@pytest.mark.parametrize("count", [2, 5])
def test_the_environments_of_torchrun_srun_and_arrays_share_all_shards(started, count):
    shares = [read_share("", started(index, count)) for index in range(count)]
    assert [(share.index, share.count) for share in shares] == [(index, count) for index in range(count)]
    assert len({share.source for share in shares}) == 1
    assert shares[0].source.split(" ")[0] in started(0, count)


def test_the_tasks_of_every_job_of_an_array_share_all_shards():
    shares = [
        read_share("", {**array(number, 3, first=5), **srun(task, 4)}) for number in (5, 6, 7) for task in range(4)
    ]
    assert [share.index for share in shares] == list(range(12))
    assert {share.count for share in shares} == {12}
    assert "SLURM_ARRAY_TASK_ID" in shares[0].source
    assert "SLURM_PROCID" in shares[0].source


def test_the_tasks_of_a_smaller_step_share_all_shards():
    shares = [read_share("", {**srun(task, 8), "SLURM_STEP_NUM_TASKS": "2"}) for task in range(2)]
    assert [(share.index, share.count) for share in shares] == [(0, 2), (1, 2)]


def test_an_array_may_count_from_anywhere_in_equal_steps():
    assert read_share("", array(30, 4, first=10, step=10)) == Share(index=2, count=4, source="SLURM_ARRAY_TASK_ID")
    bare = {f"SLURM_ARRAY_TASK_{name}": value for name, value in (("ID", "2"), ("MIN", "1"), ("COUNT", "3"))}
    assert read_share("", bare) == Share(index=1, count=3, source="SLURM_ARRAY_TASK_ID")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"RANK": "", "WORLD_SIZE": ""},
        torchrun(0, 1),
        array(4, 1, first=4),
        {"SLURM_JOB_ID": "9", "SLURM_NTASKS": "8"},  # a shell that salloc opened
        {"SLURM_JOB_ID": "9", "SLURM_PROCID": "0"},  # sbatch without -n
        {"SLURM_JOB_ID": "9", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},  # sbatch -n 8, its script without srun
    ],
)
def test_a_process_alone_makes_every_shard(environ):
    share = read_share("", environ)
    assert share == Share()
    assert all(map(share.owns, range(10)))


def test_the_option_comes_before_the_environment_and_torchrun_before_slurm():
    everything = {**torchrun(1, 3), **srun(2, 4)}
    assert read_share("0/1", everything) == Share(index=0, count=1, source="--shard")
    assert read_share(" 1/2 ", everything) == Share(index=1, count=2, source="--shard")
    assert read_share("", everything) == Share(index=1, count=3, source="RANK and WORLD_SIZE")


@pytest.mark.parametrize("text", ["2", "2/2", "3/2", "-1/2", "1/0", "0/0", "a/b", "1/2/3", "1.0/2", "/2", "1/", "1 2"])
def test_a_wrong_share_says_how_it_is_written(text):
    with pytest.raises(UserError, match=rf"--shard is '{text}'; give i/n with i from 0 to n - 1, such as 0/4"):
        read_share(text, {})


@given(st.text(max_size=8) | st.from_regex(r"-?\d{1,2}/\d{1,2}", fullmatch=True))
def test_any_text_is_a_share_or_a_sentence(text):
    said = ""
    try:
        share = read_share(text, {})
    except UserError as error:
        share, said = Share(), str(error)
    assert 0 <= share.index < share.count
    assert "\n" not in said


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"RANK": "0"}, "of RANK and WORLD_SIZE only RANK is set"),
        ({"WORLD_SIZE": "2"}, "of RANK and WORLD_SIZE only WORLD_SIZE is set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE is 2"),
        ({"RANK": "two", "WORLD_SIZE": "2"}, "RANK is 'two' in the environment, which is no number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({**SRUN, "SLURM_PROCID": "4", "SLURM_NTASKS": "4"}, "SLURM_PROCID is 4 and SLURM_NTASKS is 4"),
        ({**SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "4(x2)"}, r"SLURM_NTASKS is '4\(x2\)'"),
        ({**array(2, 3), "SLURM_ARRAY_TASK_MAX": "7"}, "the 3 numbers of this Slurm array, from 0, are not evenly"),
        ({**array(2, 3), "SLURM_ARRAY_TASK_ID": "7"}, "use an array such as 0-2"),
        ({**array(3, 3, step=2), "SLURM_ARRAY_TASK_ID": "3"}, "are not evenly spaced"),
        ({**array(0, 3), "SLURM_ARRAY_TASK_COUNT": ""}, "SLURM_ARRAY_TASK_COUNT is ''"),
    ],
)
def test_an_environment_that_makes_no_sense_is_one_sentence_with_a_way_out(environ, said):
    with pytest.raises(UserError, match=said) as caught:
        read_share("", environ)
    assert "--shard" in str(caught.value)
    assert read_share("0/1", environ).count == 1  # the way out


@pytest.mark.parametrize(
    ("device", "environ", "wanted"),
    [
        ("cuda", {}, "cuda"),
        ("cuda", torchrun(2, 4), "cuda:2"),
        ("cuda", srun(3, 4), "cuda:3"),
        ("cuda", {**srun(3, 4), **torchrun(1, 4)}, "cuda:1"),
        ("cuda", {**srun(3, 4), "CUDA_VISIBLE_DEVICES": "6"}, "cuda"),
        ("cuda", {**srun(3, 4), "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "cuda:3"),
        ("cuda", {**torchrun(1, 2), "CUDA_VISIBLE_DEVICES": ""}, "cuda:1"),
        ("cuda:0", torchrun(2, 4), "cuda:0"),
        ("cpu", torchrun(2, 4), "cpu"),
    ],
)
def test_each_process_of_a_machine_takes_its_own_gpu(device, environ, wanted):
    assert local_device(device, environ) == wanted


def test_a_local_rank_that_is_no_number_is_one_sentence():
    with pytest.raises(UserError, match="LOCAL_RANK is 'first'"):
        local_device("cuda", {"LOCAL_RANK": "first"})
