"""Samplers of timesteps with a process group: other levels on every rank, one state, that of one process."""

from __future__ import annotations

import pytest
import torch
from curriculum_programs import SAMPLERS, draw, draw_and_learn, random_weights, train_with_a_curriculum

STEPS, BATCH = 24, 6


def joined(parts):
    """Samples of all ranks in the order in which one process draws them."""
    return torch.stack(parts, 1).flatten()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", SAMPLERS)
def test_ranks_share_a_stream_and_a_state(on_ranks, name, ranks):
    found = on_ranks(ranks, draw_and_learn, name, STEPS, BATCH)
    alone = draw_and_learn(name, STEPS, BATCH * ranks, alone=True)
    for step, levels in enumerate(alone.levels):
        assert torch.equal(joined([each.levels[step] for each in found]), levels)
        assert torch.equal(joined([each.clusters[step] for each in found]), alone.clusters[step])
    for each in found:
        assert each.state.keys() == alone.state.keys()
        for key, value in each.state.items():
            assert torch.equal(value.nan_to_num(-1), found[0].state[key].nan_to_num(-1)), key
            assert torch.allclose(value, alone.state[key], rtol=1e-12, equal_nan=True), key
        assert torch.equal(each.generator, found[0].generator)
        assert torch.equal(each.generator, alone.generator)
    assert any(not torch.equal(found[0].levels[step], found[1].levels[step]) for step in range(STEPS))


def test_curricula_learn(on_ranks):
    """The states that are compared above are no longer those of the beginning."""
    found = on_ranks(2, draw_and_learn, "curriculum", STEPS, BATCH)
    assert found[0].state["current_phase"] > 2
    found = on_ranks(2, draw_and_learn, "second moment", STEPS, BATCH)
    assert (found[0].state["counts"] > 0).all()


def test_other_batch_sizes_are_learned_from(on_ranks):
    first, second = on_ranks(2, draw_and_learn, "second moment", 3, BATCH, part=True)
    assert torch.equal(first.state["losses"], second.state["losses"])
    assert first.state["counts"].sum() == 3 * (BATCH + BATCH - 2)


def test_generators_are_rank_0s(on_ranks):
    seeded = on_ranks(2, draw, seeds=[3, 9])
    assert torch.equal(*[generator for _, generator, _ in seeded])
    default = on_ranks(2, draw, seeds=[None, None])
    assert torch.equal(*[generator for _, generator, _ in default])
    assert not torch.equal(default[0][0], default[1][0])
    for _, _, error in default:
        assert error.startswith("generator: expected none with process_group")


@pytest.mark.parametrize("weighting", ["uw", "dwa", "rlw"])
def test_training_with_a_curriculum_is_that_of_one_process(on_ranks, weighting):
    found = on_ranks(2, train_with_a_curriculum, weighting, 12, BATCH)
    alone = train_with_a_curriculum(weighting, 12, 2 * BATCH, alone=True)
    assert alone["curriculum.current_phase"] > 1
    for name, value in alone.items():
        assert torch.equal(found[0][name], found[1][name]), name
        assert (found[0][name] - value).abs().max() <= 1e-6 * value.abs().max().clamp(min=1e-3), name


def test_random_weights_of_losses_are_rank_0s(on_ranks):
    """Generators of the ranks differ."""
    (mine, grad), (theirs, other) = on_ranks(2, random_weights)
    assert torch.equal(mine, theirs)
    assert torch.equal(grad, other)
