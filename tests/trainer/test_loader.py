"""The order is a pure function of (seed, epoch, global index)."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from test_packing import PAD, build

from gradsmith.data.loader import Loader, evaluation_batches, permutation
from gradsmith.data.packing import IGNORED, Sequences
from gradsmith.data.processor import Batch


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    return Sequences(build([9] * 50, chat=False), 8, True, "language_modeling", PAD)


def global_batch(loader: Loader, step: int, world: int, micro_batch: int) -> torch.Tensor:
    ranks = [
        list(loader.micro_batches(step, rank=rank, world=world, micro_batch=micro_batch))
        for rank in range(world)
    ]
    batches = [ranks[r][a] for a in range(len(ranks[0])) for r in range(world)]
    return torch.cat([batch.inputs["input_ids"] for batch in batches])


def test_the_global_batch_is_the_same_for_any_ranks_and_accumulation(sequences):
    loader = Loader(sequences, seed=7, global_batch=8)
    for step in (0, 5, 6, 1000):
        whole = global_batch(loader, step, 1, 8)
        expected = [sequences[int(k)].input_ids for k in loader.indices(step)]
        assert torch.equal(whole, torch.from_numpy(np.stack(expected)))
        for world, micro_batch in ((1, 2), (2, 4), (2, 1), (4, 2), (4, 1)):
            assert torch.equal(global_batch(loader, step, world, micro_batch), whole)


def test_an_epoch_has_every_sequence_once_and_the_next_another_order(sequences):
    loader = Loader(sequences, seed=7, global_batch=8)
    n = len(sequences)
    order = np.concatenate([loader.indices(step) for step in range(2 * n // 8 + 1)])
    assert sorted(order[:n]) == list(range(n))
    assert sorted(order[n : 2 * n]) == list(range(n))
    assert order[:n].tolist() != order[n : 2 * n].tolist()
    assert order[:n].tolist() != list(range(n))


def test_a_batch_larger_than_the_data_spans_epochs(sequences):
    n = len(sequences)
    found = Loader(sequences, seed=7, global_batch=3 * n).indices(1)
    assert np.bincount(found).tolist() == [3] * n


def test_any_step_is_found_without_the_ones_before(sequences):
    running = Loader(sequences, seed=3, global_batch=6)
    steps = [running.indices(step) for step in range(40)]
    for step in (39, 11, 0, 17):
        fresh = Loader(sequences, seed=3, global_batch=6)
        assert fresh.indices(step).tolist() == steps[step].tolist()


def test_the_order_does_not_change_from_version_to_version():
    assert permutation(1234, 0, 8).tolist() == [7, 3, 0, 1, 4, 2, 5, 6]
    assert permutation(1234, 1, 8).tolist() == [0, 5, 6, 4, 2, 1, 7, 3]
    assert permutation(1235, 0, 8).tolist() != permutation(1234, 0, 8).tolist()


def test_batches_are_int64_tensors_and_target_tokens_counts_them():
    split = build([4, 9, 6, 8, 3, 7], chat=True)
    loader = Loader(Sequences(split, 8, False, "chat", PAD), seed=0, global_batch=4)
    for step in range(5):
        batches = list(loader.micro_batches(step, rank=0, world=1, micro_batch=2))
        assert [b.inputs["input_ids"].shape for b in batches] == [(2, 8), (2, 8)]
        for batch in batches:
            assert batch.inputs["input_ids"].dtype == batch.labels["labels"].dtype == torch.int64
            assert batch.inputs["position_ids"].dtype == torch.int64
        counted = sum(int((batch.labels["labels"] != IGNORED).sum()) for batch in batches)
        assert loader.items(step) == counted


def test_what_does_not_divide_is_refused(sequences):
    loader = Loader(sequences, seed=7, global_batch=8)
    with pytest.raises(ValueError, match="8 is no multiple of world 3"):
        loader.micro_batches(0, rank=0, world=3, micro_batch=1)


@pytest.mark.parametrize(("world", "batch", "limit"), [(1, 4, None), (2, 4, 13), (3, 4, 13)])
def test_evaluation_covers_each_row_once_in_batches_of_one_number(sequences, world, batch, limit):
    ranks = [
        list(evaluation_batches(sequences, rank=r, world=world, batch=batch, limit=limit))
        for r in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    found = [
        row.tolist()
        for batches in ranks
        for b in batches
        for row, labels in zip(b.inputs["input_ids"], b.labels["labels"], strict=True)
        if (labels != IGNORED).any()
    ]
    count = limit or len(sequences)
    chosen = [k * len(sequences) // count for k in range(count)]  # spread over the split
    assert chosen[-1] + len(sequences) // count >= len(sequences) - 1
    expected = [sequences[k].input_ids.tolist() for k in chosen]
    assert sorted(found) == sorted(expected)


class Slow:
    """Rows that take a while to make, and one that cannot be made."""

    reference = None

    def __init__(self, bad=None):
        self.items, self.lengths = np.ones(12), np.ones(12, np.int64)
        self.bad, self.made = bad, []

    def __len__(self):
        return 12

    def batch(self, rows, draws=None):
        time.sleep(0.05)
        if self.bad is not None and self.bad in draws:
            raise OSError("the disk is gone")
        self.made.append(draws.tolist())
        return Batch({"x": torch.from_numpy(np.asarray(rows))}, {})


def test_the_next_batches_are_made_while_the_model_works():
    dataset = Slow()
    loader = Loader(dataset, seed=1, global_batch=4)
    waits = []
    for step in range(4):
        for batch in loader.micro_batches(step, rank=0, world=1, micro_batch=2):
            assert len(batch.inputs["x"]) == 2
            waits.append(loader.waited - sum(waits))
            time.sleep(0.08)  # the model
    assert waits[0] >= 0.045
    assert sum(waits[1:]) < 0.5 * sum(waits)
    assert dataset.made[:8] == [[k, k + 1] for k in range(0, 16, 2)]  # in order, each once


def test_a_step_may_be_gone_over_twice():
    """As a loss that needs a statistic of the whole global batch does."""
    loader = Loader(Slow(), seed=1, global_batch=4)
    passes = []
    for _ in range(2):
        batches = loader.micro_batches(2, rank=0, world=1, micro_batch=2)
        passes.append([batch.inputs["x"].tolist() for batch in batches])
    assert passes[0] == passes[1]
    assert [row for rows in passes[0] for row in rows] == loader.indices(2).tolist()


def test_what_fails_in_the_other_thread_fails_in_the_step():
    loader = Loader(Slow(bad=6), seed=1, global_batch=4)
    assert len(list(loader.micro_batches(0, rank=0, world=1, micro_batch=2))) == 2
    with pytest.raises(OSError, match="the disk is gone"):
        list(loader.micro_batches(1, rank=0, world=1, micro_batch=2))
