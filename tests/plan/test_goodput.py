"""Weeks with failures, beside Daly's formula and beside what must hold."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.errors import ConfigurationError
from unisono.plan.goodput import KINDS, WEEK_S, Campaign, best_interval, expected, live

PLAIN = Campaign(16_384, 128, 7.0, 50_000, spares=10**6, weeks=52)


@pytest.mark.parametrize("mtbf_h", [10_000, 50_000, 400_000])
@pytest.mark.parametrize("every", [0, 20, 1000])
def test_with_a_spare_at_hand_goodput_is_dalys(mtbf_h: float, every: int) -> None:
    """Daly, 2006, equation 13; a year of failures, one or eleven an hour."""
    campaign = replace(PLAIN, mtbf_h=mtbf_h, every=every)
    assert live(campaign, seed=3).goodput == pytest.approx(expected(campaign), abs=0.012)


def test_the_best_interval_is_youngs() -> None:
    """Nearly: no other interval is better by more than the formula's own order."""
    best = expected(PLAIN)
    assert best_interval(PLAIN.failure_s, 30) == pytest.approx((2 * PLAIN.failure_s * 30) ** 0.5)
    others = [expected(replace(PLAIN, every=max(1, round(PLAIN.steps * factor)))) for factor in (0.25, 0.5, 2, 4)]
    assert max(others) < best


@given(
    st.integers(1, 4096),
    st.integers(1, 64),
    st.floats(100, 1e6),
    st.integers(0, 100),
    st.integers(0, 8),
    st.booleans(),
    st.integers(0, 99),
)
def test_every_second_is_accounted_for(
    devices: int, replicas: int, mtbf_h: float, every: int, spares: int, elastic: bool, seed: int
) -> None:
    campaign = Campaign(
        devices, replicas, 5.0, mtbf_h, every=every, spares=spares, elastic=elastic, weeks=1.0, repair_h=3.0
    )
    found = live(campaign, seed)
    assert set(found.seconds) == set(KINDS) and min(found.seconds.values()) >= 0
    assert sum(found.seconds.values()) == pytest.approx(WEEK_S)
    assert found.steps * campaign.step_s <= found.seconds["useful"] + 1e-3 * WEEK_S


def test_elastic_runs_go_on_where_others_wait() -> None:
    campaign = replace(PLAIN, spares=0, weeks=8)
    waits, goes_on = live(campaign), live(replace(campaign, elastic=True))
    assert waits.seconds["waiting"] > 0.5 * 8 * WEEK_S and goes_on.seconds["waiting"] == 0
    assert goes_on.goodput > 4 * waits.goodput and goes_on.seconds["slower"] > 0
    assert live(replace(campaign, spares=32)).goodput > goes_on.goodput


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="mtbf_h is 0; give a number above 0"):
        live(replace(PLAIN, mtbf_h=0))
    with pytest.raises(ConfigurationError, match="spares is -1; give 0 or more"):
        live(replace(PLAIN, spares=-1))
