"""The way from the model to the disk: every row arrives where it belongs, and nothing waits that need not."""

import dataclasses
import os
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_fixtures import ExactReader, collector, small_job, wanted_rows

from cache_spec import UserError
from harvest.pipeline import Writer, make_shards, writer_threads
from harvest.shard import prepare_shard


def make_all(job, **changes):
    write, made = collector()
    make_shards(job, range(job.plan.n_shards), write, lambda n: None, **changes)
    return made


@settings(max_examples=40, deadline=None)
@given(
    probs=st.lists(st.sampled_from([0.0, 0.05, 0.3, 1.0]), max_size=3),
    batch_windows=st.integers(1, 20),
    pad=st.booleans(),
    layers=st.sampled_from([(1,), (0, 2)]),
    n_rows=st.integers(130, 192),
    reuse=st.booleans(),
)
def test_every_row_is_the_activation_of_its_own_token_and_nothing_else(
    probs, batch_windows, pad, layers, n_rows, reuse
):
    job = small_job(probs=probs, batch_windows=batch_windows, pad=pad, layers=layers, n_rows=n_rows, reuse=reuse)
    for arrays, columns in make_all(job).values():
        for hook in job.plan.hooks:
            for i, variant in enumerate(job.plan.variants):
                assert np.array_equal(arrays[hook.name, variant.name], wanted_rows(job, columns, hook, i))


def shapes_of(job):
    """Of every batch that the model has read."""
    assert isinstance(job.reader, ExactReader)
    return job.reader.shapes


def test_short_batches_are_padded_only_when_asked():
    for pad, shapes in ((False, {(6, 10), (2, 10)}), (True, {(6, 10)})):
        job = small_job(probs=(1.0,), pad=pad)
        make_all(job)
        assert set(shapes_of(job)) == shapes


def test_all_variants_of_a_window_are_in_one_batch():
    batches = []

    class Remembering(ExactReader):
        def read(self, tokens):
            batches.append(tokens.numpy().copy())
            return super().read(tokens)

    job = small_job(probs=(0.5, 1.0))
    job = dataclasses.replace(job, reader=Remembering(job.plan))
    make_all(job)
    for tokens in batches:
        clean, *masked = np.split(tokens, 3)
        for variant in masked:
            assert ((variant == clean) | (variant == 2)).all()


def test_rows_before_the_first_replaced_token_are_the_clean_rows_bit_for_bit():
    class Noisy(ExactReader):
        """Rounds differently in every place of a batch, as real models may."""

        def read(self, tokens):
            noise = 1 + torch.arange(len(tokens))[:, None, None] * 2.0**-9
            return {point: values * noise for point, values in super().read(tokens).items()}

    job = small_job(probs=(0.2,))
    job = dataclasses.replace(job, reader=Noisy(job.plan))
    n_same = 0
    for shard, (arrays, columns) in make_all(job).items():
        first = prepare_shard(job.plan, job.windows, job.tokenizer, shard).first[1]
        before = columns["pos"] < first[columns["window"] - columns["window"].min()]
        clean, masked = arrays["layer_1", "clean"], arrays["layer_1", "masked"]
        assert np.array_equal(clean[before], masked[before])
        assert not (clean[~before] == masked[~before]).all(axis=1).any()
        n_same += before.sum()
    assert n_same > 20


class LateCopies:
    """Copies nothing before it must, as a busy GPU would; notes when each batch was sent and waited for."""

    def __init__(self, depth):
        self.depth, self.log, self.n_sent = depth, [], 0

    def send(self, tensors):
        number, self.n_sent = self.n_sent, self.n_sent + 1
        self.log.append(("sent", number))
        return Late(self, number, tensors)


@dataclasses.dataclass
class Late:
    copies: LateCopies
    number: int
    tensors: list

    def wait(self):
        self.copies.log.append(("waited", self.number))
        return [tensor.numpy() for tensor in self.tensors]


@pytest.mark.parametrize("depth", [0, 1, 2, 5, 100])
def test_a_batch_is_waited_for_only_when_later_ones_are_under_way(depth):
    job = small_job(probs=(0.5,))
    copies = LateCopies(depth)
    late, plain = make_all(job, copies=copies), make_all(job)
    for shard, (arrays, columns) in plain.items():
        for name, values in {**arrays, **columns}.items():
            assert np.array_equal(values, {**late[shard][0], **late[shard][1]}[name])
    for number in range(copies.n_sent):
        queued = min(number + depth, copies.n_sent - 1)
        assert copies.log.index(("waited", number)) > copies.log.index(("sent", queued))
        if number + depth + 1 < copies.n_sent:
            assert copies.log.index(("waited", number)) < copies.log.index(("sent", number + depth + 1))


def test_the_model_works_on_the_next_shard_while_one_is_written():
    job = small_job()
    went_on = []

    def write(shard, arrays, columns):
        until = time.monotonic() + 20
        while shard < 2 and len(shapes_of(job)) <= 3 * (shard + 1) and time.monotonic() < until:
            time.sleep(0.001)
        went_on.append(len(shapes_of(job)) > 3 * (shard + 1))

    make_shards(job, range(3), write, lambda n: None)
    assert went_on == [True, True, False]  # each of the first two shards has three batches


def test_at_most_one_shard_waits_to_be_written_and_its_memory_is_left_alone():
    job = small_job()
    made, at_once, most = make_all(job), 0, 0

    def write(shard, arrays, columns):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        threading.Event().wait(0.05)  # the model is done with the next shard by now
        for name, values in arrays.items():
            assert np.array_equal(values, made[shard][0][name])
        at_once -= 1

    make_shards(job, range(3), write, lambda n: None)
    assert most == 1


@pytest.mark.parametrize("error", [OSError(5, "the disk failed"), KeyboardInterrupt("now")])
def test_an_error_of_the_writer_stops_the_model_at_once(error):
    job = small_job(n_rows=64 * 40, n_train_rows=64 * 40, batch_windows=1)
    failed = threading.Event()

    class Waiting(ExactReader):
        def read(self, tokens):
            if len(self.shapes) == 15:  # the second batch of the third shard
                failed.wait(20)
                threading.Event().wait(0.05)
            return super().read(tokens)

    job = dataclasses.replace(job, reader=Waiting(job.plan))
    written = []

    def write(shard, arrays, columns):
        if shard == 1:
            failed.set()
            raise error
        written.append(shard)

    with pytest.raises(type(error)) as caught:
        make_shards(job, range(40), write, lambda n: None)
    assert caught.value is error
    assert written == [0]
    assert len(shapes_of(job)) <= 16  # and not the rest of that shard


def test_an_error_of_the_model_lets_the_shard_before_it_be_written():
    job = small_job()

    class Failing(ExactReader):
        def read(self, tokens):
            if len(self.shapes) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().read(tokens)

    job = dataclasses.replace(job, reader=Failing(job.plan))
    written = []

    def write(shard, arrays, columns):
        threading.Event().wait(0.1)
        written.append(shard)

    with pytest.raises(UserError, match="3 windows in 2 variants do not fit on cpu; give a smaller --batch-windows"):
        make_shards(job, range(3), write, lambda n: None)
    assert written == [0]


def test_a_keyboard_interrupt_does_not_wait_for_the_writer():
    free, began = threading.Event(), threading.Event()

    def work():
        began.set()
        free.wait(20)

    def interrupted():
        with Writer() as writer:
            writer.start(work)
            began.wait(20)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not free.is_set()
    free.set()


@pytest.mark.parametrize(
    ("device", "cores", "environ", "wanted"),
    [
        ("cpu", 64, {}, 1),
        ("cuda", 2, {}, 1),
        ("cuda", 1, {}, 1),
        ("cuda:3", 16, {}, 8),
        ("cuda", 128, {}, 8),
        ("cuda", 64, {"LOCAL_WORLD_SIZE": "8"}, 4),
        ("cuda", 8, {"LOCAL_WORLD_SIZE": "8"}, 1),
        ("cuda", 12, {"LOCAL_WORLD_SIZE": "0"}, 6),
    ],
)
def test_the_writer_takes_half_of_the_cores_that_a_gpu_leaves(monkeypatch, device, cores, environ, wanted):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert writer_threads(torch.device(device), environ) == wanted


def test_every_token_of_every_variant_is_counted_once():
    job = small_job(probs=(0.3, 0.01), batch_windows=4)
    write, _ = collector()
    counted = []
    make_shards(job, range(3), write, counted.append)
    assert sum(counted) == 3 * job.plan.n_rows
    assert len(counted) > 3


@pytest.mark.parametrize(
    ("value", "scale", "message"),
    [
        (
            70000.0,
            1.0,
            "reaches 70,000 in shard 1, .* scale factor 1 fp16 ends at 65,504; .* resid_post.1=8$",
        ),
        (-70000.0, 1.0, "reaches 70,000 in shard 1, .* --scale-factor resid_post.1=8$"),
        (
            3e6,
            16.0,
            "reaches 3,000,000 in shard 1, .* 16 fp16 ends at 1,048,064; .* --scale-factor resid_post.1=256$",
        ),
        (float("nan"), 1.0, "gives infinite or NaN activations at resid_post.1 in shard 1"),
        (float("-inf"), 1.0, "gives infinite or NaN activations at resid_post.1 in shard 1"),
    ],
)
def test_a_value_beyond_fp16_stops_the_harvest_with_what_to_do(value, scale, message):
    class Wild(ExactReader):
        def read(self, tokens):
            found = super().read(tokens)
            if len(self.shapes) == 4:
                found[self.hook_points[0]][1, 2, 3] = value
            return found

    job = small_job()
    hooks = (dataclasses.replace(job.plan.hooks[0], scale_factor=scale),)
    job = dataclasses.replace(job, plan=dataclasses.replace(job.plan, hooks=hooks), reader=Wild(job.plan))
    write, made = collector()
    with pytest.raises(UserError, match=message):
        make_shards(job, range(3), write, lambda n: None)
    assert list(made) == [0]


def test_a_value_beyond_fp16_is_seen_in_what_goes_on_from_a_beginning():
    class Wild(ExactReader):
        def read_after(self, kept, rows, start, tokens):
            found = super().read_after(kept, rows, start, tokens)
            found[self.hook_points[0]][0, -1, 0] = 1e5
            return found

    job = small_job(probs=(0.05,))
    job = dataclasses.replace(job, reader=Wild(job.plan, reuse=True))
    with pytest.raises(UserError, match="reaches 100,000 in shard 0"):
        make_all(job)


def test_values_that_only_the_scale_brings_within_fp16_are_stored():
    class Large(ExactReader):
        def read(self, tokens):
            return {point: values * 128 for point, values in super().read(tokens).items()}

    job = small_job()
    hooks = (dataclasses.replace(job.plan.hooks[0], scale_factor=128.0),)
    scaled = dataclasses.replace(job, plan=dataclasses.replace(job.plan, hooks=hooks), reader=Large(job.plan))
    for shard, (arrays, _) in make_all(job).items():
        for name, values in make_all(scaled)[shard][0].items():
            assert np.array_equal(values, arrays[name])


def test_padding_is_thrown_away_before_it_is_looked_at():
    class Wild(ExactReader):
        def read(self, tokens):
            found = super().read(tokens)
            if len(self.shapes) == 3:  # one window and two to fill the batch up
                for values in found.values():
                    values.unflatten(0, (2, 3))[:, 1:] = float("nan")
            return found

    job = small_job(probs=(1.0,), pad=True)
    plain = make_all(job)
    wild = make_all(dataclasses.replace(job, reader=Wild(job.plan)))
    assert np.array_equal(wild[0][0]["layer_1", "masked"], plain[0][0]["layer_1", "masked"])
