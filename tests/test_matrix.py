"""A matrix runs a part with each change and the rest in the soak."""

import pytest

from tests.matrix import matrix


def test_cases_that_are_not_for_each_change_are_soak_tests():
    """Every combination is there, once."""
    first, second, third, fourth = matrix((1, 2), "ab", each_change=[(1, "a"), (2, "b")])
    assert (first, fourth) == ((1, "a"), (2, "b"))
    assert [case.values for case in (second, third)] == [(1, "b"), (2, "a")]
    assert all([mark.name for mark in case.marks] == ["soak"] for case in (second, third))


@pytest.mark.parametrize(
    ("cases", "message"), [([(1, "a")], "no case of each change has"), ([(3, "a")], "are no combinations")]
)
def test_a_matrix_without_a_value_is_refused(cases, message):
    """Thinning out cannot silently drop a value, or keep a case that does not exist."""
    with pytest.raises(ValueError, match=message):
        matrix((1, 2), "ab", each_change=cases)
