"""The order of visits: every sample once an epoch, the same from any start and with any workers."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from diffmtl_fast.data import Batch, EpochOrder, batches
from diffmtl_fast.data.items import Memory, stacked


class Noisy:
    """Samples that show their index and the random number of their visit."""

    def __len__(self):
        return 10

    def item(self, index, source):
        return torch.tensor([[[index, -1.0 if source is None else source.random()]]]), None

    def name(self, index):
        return str(index)


def take(count, **options):
    order = EpochOrder(10, 4, 7, options.pop("start", 0))
    return torch.stack([batch.x for batch in islice(batches(Noisy(), order, **options), count)])


def test_every_sample_once_an_epoch():
    visits = take(10)[..., 0].view(4, 10)
    assert torch.equal(visits.sort(1).values, torch.arange(10.0).expand(4, 10))
    assert not torch.equal(visits[0], visits[1])


def test_the_order_goes_on_from_any_batch_with_any_workers():
    whole = take(9)
    assert torch.equal(take(4, start=5), whole[5:])
    assert torch.equal(take(4, start=5, workers=2), whole[5:])
    augmented = whole[..., 1].flatten().tolist()
    assert len(set(augmented)) == len(augmented)
    assert (take(3, augment=False)[..., 1] == -1).all()


def test_processes_share_what_one_would_see():
    one = [v for batch in islice(EpochOrder(10, 8, 3), 5) for v in batch]
    two = [islice(EpochOrder(10, 4, 3, rank=rank, world=2), 5) for rank in range(2)]
    assert [v for pair in zip(*two, strict=True) for batch in pair for v in batch] == one


@pytest.mark.parametrize("conditions", [None, torch.arange(5), [*"abcde"]])
def test_samples_in_memory(conditions):
    batch = Memory(torch.arange(5.0)[:, None], conditions).batch([3, 1])
    assert batch.x.tolist() == [[3.0], [1.0]]
    found = (
        batch.conditioning.tolist() if isinstance(batch.conditioning, torch.Tensor) else batch.conditioning
    )
    assert found == {type(None): None, torch.Tensor: [3, 1], list: ["d", "b"]}[type(conditions)]
    assert isinstance(batch.to(torch.device("cpu")), Batch)


def test_embeddings_of_two_shapes_are_refused():
    assert torch.equal(stacked([torch.zeros(2, 3), torch.ones(2, 3)])[1], torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"expected embeddings of one shape, found \[\(2, 3\), \(4, 3\)\]"):
        stacked([torch.zeros(2, 3), torch.zeros(4, 3)])
