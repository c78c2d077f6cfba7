"""Attacks harm a naive reader, and do nothing to ours but one clear line."""

import time

import pytest

from paco_ds.errors import UserError
from tests.hostile.corpus import ATTACKS, FLAG, Attack

LINES = 25  # a recipe's mistakes are a line each, up to a bound
SECONDS = 20  # on a busy machine; they take milliseconds


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_harms_a_naive_reader_and_is_one_line_to_ours(attack: Attack, tmp_path):
    """Nothing is executed, nothing is written outside, and it takes no time."""
    naive, ours = tmp_path / "naive", tmp_path / "ours"
    naive.mkdir()
    ours.mkdir()
    assert attack.naive(naive), "the attack does not work"
    began = time.monotonic()
    if attack.taken:
        attack.ours(ours)
    else:
        with pytest.raises(UserError, match=attack.said) as caught:
            attack.ours(ours)
        lines = str(caught.value).splitlines()
        assert len(lines) <= (LINES if "mistakes" in str(caught.value) else 1)
        assert all(len(line) < 1500 for line in lines)
    assert time.monotonic() - began < SECONDS
    assert not (ours / FLAG).exists()
    assert {path.name for path in tmp_path.iterdir()} == {"naive", "ours"}


def test_the_corpus_is_large_and_each_attack_is_another():
    names = [attack.name for attack in ATTACKS]
    assert len(names) == len(set(names)) >= 40
