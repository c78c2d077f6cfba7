"""What ranks hold of tensors is put together on the first, as DeepSpeed gathers it."""

import pytest
import torch

from paco_ds.distributed import parts
from paco_ds.distributed.parts import Part, Parts
from paco_ds.distributed.ranks import Ranks
from tests.distributed.test_optimizers import OFFLOAD, VIT
from tests.matrix import matrix

RUN = "tests.distributed.runs:parts_beside_wholes"


@pytest.mark.parametrize(
    ("world_size", "stage"),
    matrix((1, 2, 4), (0, 1, 2, 3), each_change=[(1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (4, 1), (4, 3)]),
)
def test_parts_are_those_of_the_whole_at_every_stage(pool, world_size, stage):
    """Of a network with small weights that stage 3 keeps whole on every rank, and of a ViT's AdamW."""
    for overrides in ((), VIT):
        settings = (*overrides, f"step.micro_batches={world_size}")
        first, *others = pool(world_size).run(RUN, stage=stage, overrides=settings)
        assert len(first) > 100
        assert [name for name, wrong in first if wrong] == []
        assert others == [[]] * (world_size - 1)


@pytest.mark.parametrize("stage", [1, 3])
def test_so_it_is_with_states_on_the_host(pool, stage):
    first, _ = pool(2).run(RUN, stage=stage, zero=OFFLOAD)
    assert [name for name, wrong in first if wrong] == []


class Store:
    """torch's, in this process."""

    def __init__(self):
        self.entries = {}

    def set(self, key, value):
        self.entries[key] = value.encode() if isinstance(value, str) else value

    def get(self, key):
        return self.entries[key]

    def wait(self, keys):
        assert all(key in self.entries for key in keys)

    def delete_key(self, key):
        del self.entries[key]


@pytest.fixture
def two(monkeypatch):
    """Two ranks of this process, and their store."""
    store = Store()
    monkeypatch.setattr(parts, "client_of_the_job", lambda world_size: store)
    return [Parts(Ranks(rank, 2, rank, torch.device("cpu"))) for rank in range(2)], store


def test_a_part_of_many_chunks_of_uneven_lengths(two, monkeypatch):
    """The store is empty afterwards; what no rank shares goes by nobody."""
    (first, other), store = two
    monkeypatch.setattr(parts, "CHUNK", 40)
    values, shape = torch.arange(77.0), torch.Size([7, 11])
    alike = torch.ones(3)
    store.set("paco_ds/rank_watchdog/0/parts/1/1/asked", "")
    assert other.whole({"a": Part(values[30:], 30, shape), "b": alike, "c": Part(values[:0], 0, torch.Size([2]))}) == {}
    whole = first.whole({"a": Part(values[:30], 0, shape), "b": alike, "c": Part(values[:2], 0, torch.Size([2]))})
    assert torch.equal(whole["a"], values.view(shape))
    assert torch.equal(whole["b"], alike)
    assert torch.equal(whole["c"], values[:2])
    assert store.entries == {}
    assert first.whole({"b": alike}) == {"b": alike}
    assert other.whole({"b": alike}) == {}


def test_one_rank_needs_no_store():
    """Parts of one rank are whole."""
    alone = Parts(Ranks(0, 1, 0, torch.device("cpu")))
    assert torch.equal(
        alone.whole({"a": Part(torch.arange(4.0), 0, torch.Size([2, 2]))})["a"], torch.arange(4.0).view(2, 2)
    )
