"""Weeks of training with failures: what part of the time brings the run forward, and where the rest goes.

A job computes steps and saves every so many of them. A device's failure costs what was computed since the last
checkpoint, and a restart; with spares it goes on at once, without one it waits for a repair, or, elastic, goes on with
the replicas that are whole, more slowly, and takes the repaired ones back at its next checkpoint.
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np

from unisono.errors import ConfigurationError

HOUR_S = 3600.0
WEEK_S = 7 * 24 * HOUR_S
MOST_MEANS = 500
"""Mean times between failures that pass without one so rarely that nothing gets done."""
KINDS = ("useful", "saving", "lost", "restarting", "waiting", "slower")


@dataclass(frozen=True, slots=True)
class Campaign:
    """A run of weeks.

    Attributes:
        devices: that compute.
        replicas: of the model.
        step_s: of a step with all replicas.
        mtbf_h: of a device, mean hours between failures.
        checkpoint_s: of saving, in which nothing is computed.
        every: steps between checkpoints; 0: as many as cost least (Young, 1974; Daly, 2006).
        restart_s: from a failure until all compute again.
        repair_h: mean hours until a failed device is back.
        spares: further devices that stand by.
        elastic: go on with the replicas that are whole.
        weeks: of it.
    """

    devices: int
    replicas: int
    step_s: float
    mtbf_h: float
    checkpoint_s: float = 30.0
    every: int = 0
    restart_s: float = 300.0
    repair_h: float = 12.0
    spares: int = 0
    elastic: bool = False
    weeks: float = 4.0

    @property
    def failure_s(self) -> float:
        """Mean seconds between failures of any device."""
        return self.mtbf_h * HOUR_S / self.devices

    @property
    def steps(self) -> int:
        """Between checkpoints."""
        return self.every or max(1, round(best_interval(self.failure_s, self.checkpoint_s) / self.step_s))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of it.

    Attributes:
        seconds: of each kind of time, by `KINDS`; they add up to the campaign.
        steps: that were kept.
        failures: of devices.
    """

    seconds: dict[str, float]
    steps: int
    failures: int

    @property
    def goodput(self) -> float:
        """The part of the time that brought the run forward, at full speed."""
        return self.seconds["useful"] / sum(self.seconds.values())


def best_interval(failure_s: float, checkpoint_s: float) -> float:
    """Seconds of computing between checkpoints that lose least.

    >>> round(best_interval(24 * 3600, 30))
    2277
    """
    return math.sqrt(2 * failure_s * checkpoint_s) if checkpoint_s else failure_s / 100


def expected(campaign: Campaign) -> float:
    """Goodput by the closed formula, where a spare is always there: what saving, losing and restarting leave.

    Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", 2006, equation 13: with
    failures at random, work of ``w`` seconds and its checkpoint take M e^(R/M) (e^((w + d)/M) - 1).
    """
    mean, work = campaign.failure_s, campaign.steps * campaign.step_s
    if campaign.restart_s + work + campaign.checkpoint_s > MOST_MEANS * mean:
        return 0.0
    wall = mean * math.exp(campaign.restart_s / mean) * math.expm1((work + campaign.checkpoint_s) / mean)
    return work / wall


def live(campaign: Campaign, seed: int = 0) -> Outcome:
    """Let the weeks pass, failure by failure.

    Raises:
        ConfigurationError: for numbers that cannot be.
    """
    _refuse(campaign)
    return _Life(campaign, np.random.default_rng(seed)).pass_by()


def _refuse(campaign: Campaign) -> None:
    for name in ("devices", "replicas", "step_s", "mtbf_h", "weeks"):
        if not 0 < getattr(campaign, name) < math.inf:
            raise ConfigurationError(f"{name} is {getattr(campaign, name):g}; give a number above 0")
    for name in ("checkpoint_s", "restart_s", "repair_h", "spares", "every"):
        if not 0 <= getattr(campaign, name) < math.inf:
            raise ConfigurationError(f"{name} is {getattr(campaign, name):g}; give 0 or more")


class _Life:
    """A campaign under way."""

    def __init__(self, campaign: Campaign, random: np.random.Generator) -> None:
        self.campaign, self.random = campaign, random
        self.now, self.end = 0.0, campaign.weeks * WEEK_S
        self.spent = dict.fromkeys(KINDS, 0.0)
        self.repairs: list[float] = []  # when a failed device is back
        self.missing = 0  # devices that no spare took the place of
        self.spares = campaign.spares
        self.steps = self.failures = 0
        self.next_failure = random.exponential(campaign.failure_s)

    def pass_by(self) -> Outcome:
        while self.now < self.end:
            if self._speed() == 0.0:
                self._wait()
            else:
                self._period()
        return Outcome(self.spent, self.steps, self.failures)

    def _speed(self) -> float:
        """Of the whole: each missing device takes its replica with it, if the others go on."""
        if not self.missing:
            return 1.0
        return max(0, self.campaign.replicas - self.missing) / self.campaign.replicas if self.campaign.elastic else 0.0

    def _spend(self, kind: str, seconds: float) -> None:
        seconds = min(seconds, self.end - self.now)
        self.spent[kind] += seconds
        self.now += seconds

    def _period(self) -> None:
        """Steps up to a checkpoint, or to a failure before it."""
        self._back()
        speed, campaign = self._speed(), self.campaign
        work = campaign.steps * campaign.step_s / speed
        until = min(self.end, self.now + work + campaign.checkpoint_s)
        if self.next_failure >= until:
            computed = min(work, self.end - self.now)
            self._spend("useful", computed * speed)
            self._spend("slower", computed * (1 - speed))
            self.steps += int(computed * speed / campaign.step_s + 1e-9)
            self._spend("saving", campaign.checkpoint_s)
            return
        self._spend("lost", max(0.0, self.next_failure - self.now))
        self._fail()
        self._spend("restarting", campaign.restart_s)

    def _fail(self) -> None:
        self.failures += 1
        self.next_failure = self.now + self.random.exponential(self.campaign.failure_s)
        heapq.heappush(self.repairs, self.now + self.random.exponential(self.campaign.repair_h * HOUR_S))
        if self.spares:
            self.spares -= 1
        else:
            self.missing += 1

    def _back(self) -> None:
        """Devices that are repaired take their places, or stand by."""
        while self.repairs and self.repairs[0] <= self.now:
            heapq.heappop(self.repairs)
            if self.missing:
                self.missing -= 1
            else:
                self.spares += 1

    def _wait(self) -> None:
        """Nothing can be computed until a device is back; nothing that stands still fails."""
        began = self.now
        self._spend("waiting", max(0.0, self.repairs[0] - self.now))
        self.next_failure += self.now - began
        self._back()
        if self._speed() > 0:
            self._spend("restarting", self.campaign.restart_s)
