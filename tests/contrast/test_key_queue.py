"""The queue slot by slot, its derived sums, its digest and its state."""

import collections
import logging
import random

import pytest
import torch
from torch.nn import functional as F

from paco_ds.contrast import key_queue
from paco_ds.contrast.key_queue import KeyQueue, QueueSnapshot, digest
from paco_ds.errors import CheckpointError
from paco_ds.losses import ParametricContrastiveLoss
from paco_ds.losses.base import Anchors

DIM = 3
AWKWARD = pytest.mark.parametrize("length", [15, 16, 17])
PUSHES = pytest.mark.parametrize("batch", [4, 5, 16, 40])


def numbered(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that carry their number in the sequence of all keys pushed; labels 0 to 6."""
    numbers = torch.arange(start, start + count)
    return numbers[:, None].expand(-1, DIM).float() + torch.tensor([0.0, 0.25, 0.5]), numbers % 7


def filled(length: int, pushed: int) -> KeyQueue:
    queue = KeyQueue(length, DIM)
    queue.push(*numbered(0, pushed))
    return queue


@AWKWARD
@PUSHES
def test_each_key_lies_in_its_slot(length, batch):
    """After every push, slot n % K holds the newest key of that residue, through several wrap-arounds."""
    queue = KeyQueue(length, DIM)
    slots: list[int | None] = [None] * length
    for start in range(0, 5 * 40, batch):
        queue.push(*numbered(start, batch))
        for n in range(start, start + batch):
            slots[n % length] = n
        assert queue.count == start + batch
        assert len(queue) == sum(n is not None for n in slots)
        for slot, newest in enumerate(slots):
            if newest is not None:
                assert queue.keys_KD[slot].tolist() == [newest, newest + 0.25, newest + 0.5]
                assert queue.labels_K[slot] == newest % 7


@AWKWARD
def test_portions_do_not_matter(length):
    """The same sequence in pushes of any size leaves the same queue, bit for bit."""
    digests = set()
    for batch in (1, 4, 5, 20, 60):
        queue = KeyQueue(length, DIM)
        for start in range(0, 60, batch):
            queue.push(*numbered(start, batch))
        digests.add(int(queue.digest()))
    assert len(digests) == 1


@pytest.mark.parametrize("seed", range(40))
def test_any_length_and_any_pushes_leave_what_a_deque_would(seed):
    """K from 0 to 50, G of every push from 0 to 120, a save and restore in the middle; the seed is the case."""
    draw = random.Random(seed)
    length = draw.randrange(51)
    queue, model, number = KeyQueue(length, DIM), collections.deque(maxlen=length), 0
    for _ in range(draw.randrange(1, 12)):
        count = draw.choice([0, 1, length, length + 1, draw.randrange(121)])
        queue.push(*numbered(number, count))
        model.extend(range(number, number + count))
        number += count
        if draw.random() < 0.3:
            state, queue = queue.state_dict(), KeyQueue(length, DIM)
            queue.load_state_dict(state)
    snapshot = queue.snapshot(7)
    assert queue.count == number
    assert sorted(snapshot.keys_ND[:, 0].tolist()) == list(model)
    assert all(queue.keys_KD[n % length, 0] == n and queue.labels_K[n % length] == n % 7 for n in model)
    assert snapshot.class_count_C.tolist() == [sum(n % 7 == c for n in model) for c in range(7)]
    sums = [sum(n for n in model if n % 7 == c) for c in range(7)]
    assert snapshot.class_sum_CD[:, 0].tolist() == pytest.approx(sums)


def test_more_keys_than_slots_warn_once(caplog):
    """The last K are kept, with one warning that names the setting."""
    queue = KeyQueue(4, DIM)
    with caplog.at_level(logging.WARNING):
        queue.push(*numbered(0, 10))
        queue.push(*numbered(10, 10))
    assert len(caplog.records) == 1
    assert "queue.length is 4 but a step brings 10 keys" in caplog.text
    assert sorted(queue.keys_KD[:, 0].tolist()) == [16, 17, 18, 19]


def test_length_zero_stays_empty(caplog):
    """No queue: pushes are counted and nothing else."""
    queue = KeyQueue(0, DIM)
    queue.push(*numbered(0, 10))
    assert (len(queue), queue.count) == (0, 10)
    assert queue.snapshot(7).keys_ND.shape == (0, DIM)
    assert not caplog.records


def test_queue_keeps_no_graph():
    """Keys with a gradient are stored without it."""
    keys, labels = numbered(0, 4)
    queue = KeyQueue(8, DIM)
    queue.push(keys.requires_grad_(), labels)
    assert not queue.snapshot(7).class_sum_CD.requires_grad


@pytest.mark.parametrize(
    ("keys", "labels", "message"),
    [
        (torch.zeros(4, DIM + 1), torch.zeros(4, dtype=torch.int64), r"takes keys \[G, 3\]"),
        (torch.zeros(4, DIM), torch.zeros(5, dtype=torch.int64), r"\(4, 3\) and \(5,\)"),
        (torch.zeros(4, DIM).half(), torch.zeros(4, dtype=torch.int64), "float32"),
        (torch.zeros(4, DIM), torch.zeros(4), "int64"),
    ],
)
def test_push_refuses_what_does_not_fit(keys, labels, message):
    """Shapes and dtypes are part of the meaning."""
    with pytest.raises(ValueError, match=message):
        KeyQueue(8, DIM).push(keys, labels)


class TestSnapshot:
    @pytest.mark.parametrize("pushed", [0, 1, 9, 16, 50], ids=lambda n: f"pushed_{n}")
    def test_sums_equal_a_plain_loop(self, pushed):
        """S_y and n_y over filled slots only, zero for classes that are not there."""
        queue = KeyQueue(16, DIM)
        generator = torch.Generator().manual_seed(pushed)
        queue.push(torch.randn(pushed, DIM, generator=generator), torch.randint(5, (pushed,), generator=generator))
        snapshot = queue.snapshot(num_classes=9)
        sums, counts = torch.zeros(9, DIM), [0] * 9
        for slot in range(min(pushed, 16)):
            sums[queue.labels_K[slot]] += queue.keys_KD[slot]
            counts[queue.labels_K[slot]] += 1
        torch.testing.assert_close(snapshot.class_sum_CD, sums)
        assert snapshot.class_count_C.tolist() == counts
        assert torch.equal(snapshot.keys_ND, queue.keys_KD[:pushed])
        assert torch.equal(snapshot.labels_N, queue.labels_K[:pushed])

    def test_it_shares_the_queues_memory_and_leaves_a_gradient_valid_after_the_next_push(self):
        """Half a gigabyte a rank at a million keys; what backward needs is kept apart."""
        queue = KeyQueue(8, DIM)
        queue.push(F.normalize(torch.randn(8, DIM, generator=torch.Generator().manual_seed(0))), torch.arange(8))
        loss = ParametricContrastiveLoss(alpha=0.1, temperature=0.2)
        labels, logits = torch.tensor([0, 3]), torch.zeros(2, 8)
        gradients = []
        for push_first in (False, True):
            query = F.normalize(torch.ones(2, DIM)).requires_grad_()
            snapshot = queue.snapshot(8)
            assert snapshot.keys_ND.data_ptr() == queue.keys_KD.data_ptr()
            output = loss(Anchors(labels, logits, query, None, snapshot)).loss
            if push_first:
                queue.push(*numbered(100, 8))
            gradients.append(torch.autograd.grad(output, query)[0])
        assert torch.equal(*gradients)

    def test_keys_of_the_step_are_met_with_those_of_the_queue(self):
        """Keys, labels and sums of both, and the queue itself as it was."""
        queue, newest = filled(8, 11), numbered(50, 5)
        before = queue.digest()
        snapshot = queue.snapshot(7, newest)
        expected = QueueSnapshot.of(
            torch.cat([queue.keys_KD, newest[0]]), torch.cat([queue.labels_K, newest[1]]), num_classes=7
        )
        for name in ("keys_ND", "labels_N", "class_count_C"):
            assert torch.equal(getattr(snapshot, name), getattr(expected, name))
        assert torch.equal(snapshot.class_sums(torch.arange(7)), expected.class_sums(torch.arange(7)))
        assert torch.equal(queue.digest(), before)
        assert len(KeyQueue(0, DIM).snapshot(7, newest).keys_ND) == 5

    def test_it_copies_nothing_and_knows_of_a_later_push(self):
        """It is the queue as the step saw it: until the next push, after which it is refused."""
        queue = filled(8, 8)
        snapshot = queue.snapshot(7)
        assert snapshot.keys_ND.data_ptr() == queue.keys_KD.data_ptr()
        snapshot.check_current()
        queue.push(*numbered(100, 1))
        with pytest.raises(ValueError, match="take a new one after each push"):
            snapshot.check_current()
        queue.snapshot(7).check_current()

    def test_sums_take_room_for_the_classes_present_only(self):
        """100,000 classes, and a queue of 16 keys: rows for 16 classes, of which 7 have keys, and one of zeros."""
        snapshot = filled(16, 16).snapshot(100_000)
        assert snapshot.present_sum_RD.shape == (17, DIM)
        assert snapshot.present_sum_RD.any(1).sum() == 7
        assert torch.equal(snapshot.class_sums(torch.tensor([7, 99_999])), torch.zeros(2, DIM))

    def test_sums_do_not_depend_on_threads(self):
        """Bit-equal with one thread and two."""
        generator = torch.Generator().manual_seed(0)
        keys = torch.randn(4096, 64, generator=generator)
        labels = torch.randint(10, (4096,), generator=generator)
        threads = torch.get_num_threads()
        sums = []
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                sums.append(QueueSnapshot.of(keys, labels, 10).class_sum_CD)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(*sums)

    def test_refuses_labels_beyond_the_classes(self):
        """A checkpoint's queue of another data set is named as such."""
        loaded = KeyQueue(8, DIM)
        loaded.load_state_dict(filled(8, 8).state_dict())
        with pytest.raises(ValueError, match="class 6, but there are 5 classes"):
            loaded.snapshot(num_classes=5)

    def test_a_push_of_a_refused_step_changes_nothing(self):
        """Decided by a flag on the device: keys, labels and count are those before; an applied one goes on."""
        queue, expected = filled(8, 11), filled(8, 11)
        queue.push(*numbered(50, 5), torch.tensor(False))
        assert torch.equal(queue.digest(), expected.digest())
        queue.push(*numbered(50, 5), torch.tensor(True))
        expected.push(*numbered(50, 5))
        assert torch.equal(queue.digest(), expected.digest())


class TestDigest:
    def test_a_queue_of_length_0_has_a_digest(self):
        """Two views through one encoder need no queue, and ranks compare digests all the same."""
        assert torch.equal(KeyQueue(0, 4).digest(), KeyQueue(0, 4).digest())

    def test_equal_queues_have_equal_digests(self):
        """And it is one int64."""
        a, b = filled(16, 20).digest(), filled(16, 20).digest()
        assert a.dtype == torch.int64
        assert torch.equal(a, b)

    @pytest.mark.parametrize("bit", [0, 13, 31])
    @pytest.mark.parametrize("word", [0, 20, 47])
    def test_one_flipped_bit_shows(self, word, bit):
        """Any bit of any key, the sign too."""
        queue = filled(16, 16)
        before = queue.digest()
        mask = torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
        queue.keys_KD.view(torch.int32).view(-1)[word] ^= mask
        assert not torch.equal(queue.digest(), before)

    def test_a_digest_taken_in_portions_is_that_of_the_whole(self, monkeypatch):
        """So that a long queue needs no memory of its size."""
        whole = filled(16, 20).digest()
        monkeypatch.setattr(key_queue, "_DIGEST_WORDS", 5)
        assert torch.equal(filled(16, 20).digest(), whole)

    def test_order_labels_and_count_show(self):
        """Keys that change places, a label, a count."""
        digests = {int(filled(16, 16).digest()), int(filled(16, 15).digest())}
        swapped, relabelled, counted = filled(16, 16), filled(16, 16), filled(16, 16)
        swapped.keys_KD[[2, 5]] = swapped.keys_KD[[5, 2]]
        relabelled.labels_K[3] += 1
        counted.pushed += 16
        digests |= {int(queue.digest()) for queue in (swapped, relabelled, counted)}
        assert len(digests) == 5


class TestState:
    def test_round_trip_goes_on_as_before(self):
        """A restored queue is bit-equal and takes the next push to the same slots."""
        queue, restored = filled(16, 21), KeyQueue(16, DIM)
        restored.load_state_dict(queue.state_dict())
        assert torch.equal(restored.digest(), queue.digest())
        for each in (queue, restored):
            each.push(*numbered(21, 5))
        assert torch.equal(restored.digest(), queue.digest())

    def test_a_saved_state_does_not_change(self):
        """Later pushes leave it alone."""
        queue = filled(16, 16)
        state = queue.state_dict()
        before = digest(state.values())
        queue.push(*numbered(50, 4))
        assert torch.equal(digest(state.values()), before)

    @pytest.mark.parametrize("own", [KeyQueue(8, DIM), KeyQueue(16, DIM + 1)], ids=["length", "dim"])
    def test_another_shape_is_refused_naming_the_setting(self, own):
        """The message names queue.length and leaves the queue as it was."""
        with pytest.raises(CheckpointError, match=r"queue\.length"):
            own.load_state_dict(filled(16, 4).state_dict())
        assert own.count == 0

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"keys": torch.zeros(16, DIM, dtype=torch.float64)}, "keys is torch.float64"),
            ({"count": torch.tensor(-1)}, "count is -1"),
            ({"extra": torch.tensor(1)}, "extra"),
        ],
    )
    def test_a_damaged_state_is_refused(self, change, message):
        """Other dtypes, impossible counts and unknown tensors."""
        with pytest.raises(CheckpointError, match=message):
            KeyQueue(16, DIM).load_state_dict(filled(16, 4).state_dict() | change)


@pytest.mark.parametrize(("length", "dim"), [(-1, 3), (4, 0)])
def test_impossible_sizes_are_refused(length, dim):
    """The message names the setting."""
    with pytest.raises(ValueError, match=r"queue\.length"):
        KeyQueue(length, dim)
