"""Page-locking at the end of a call costs no more than what the call saved."""

from greenroom.core.pinning import PinningAllowance


def test_a_fifth_of_what_was_dropped_may_be_locked() -> None:
    allowance = PinningAllowance()
    assert allowance.take() == 0
    allowance.dropped(1000)
    allowance.dropped(500)
    assert allowance.take() == 300


def test_what_was_taken_counts_no_more() -> None:
    allowance = PinningAllowance()
    allowance.dropped(1000)
    allowance.take()
    assert allowance.take() == 0
