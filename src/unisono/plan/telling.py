"""A simulated step, and weeks of a run, for a reader and as data."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from unisono.events import readable
from unisono.plan.goodput import HOUR_S, Campaign, Outcome, best_interval, expected, live
from unisono.plan.planner import Candidate, Question, words
from unisono.plan.simulator import Step, Trouble, Wires, Work, simulate

LIVES = 8
"""Campaigns that are let pass, with different failures."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """What was simulated.

    Attributes:
        chosen: the division, and what the cost model says of it.
        plain: the step without trouble.
        lives: outcomes of a campaign, each with other failures.
    """

    question: Question
    chosen: Candidate
    work: Work
    step: Step
    plain: Step
    campaign: Campaign | None = None
    lives: tuple[Outcome, ...] = ()

    @classmethod
    def of(cls, question: Question, chosen: Candidate, work: Work, wires: Wires, trouble: Trouble) -> "Simulated":
        """Of one step."""
        plain = simulate(work, wires)
        is_plain = not trouble.slow and not trouble.jitter
        return cls(question, chosen, work, plain if is_plain else simulate(work, wires, trouble), plain)

    def through(self, campaign: Campaign, seed: int) -> "Simulated":
        """And of weeks."""
        return replace(self, campaign=campaign, lives=tuple(live(campaign, seed + n) for n in range(LIVES)))

    @property
    def title(self) -> str:
        """Of a picture."""
        return f"{self.question.model.name} on {self.question.cluster}: {words(self.chosen.division)}"

    @property
    def goodput(self) -> float:
        """Mean of the campaigns."""
        return sum(one.goodput for one in self.lives) / len(self.lives)

    def as_dict(self) -> dict[str, Any]:
        """As data."""
        known: dict[str, Any] = {
            "model": self.question.model.name,
            "cluster": str(self.question.cluster),
            "division": asdict(self.chosen.division),
            "ranks": self.work.ranks,
            "step_s": self.step.seconds,
            "without_trouble_s": self.plain.seconds,
            "predicted_s": self.chosen.step_s,
            "bubble": self.step.bubble,
            "sent_bytes_between_nodes": self.step.sent_bytes,
            "events": self.step.events,
            "replicas_simulated": len(self.step.counts),
        }
        if self.campaign is not None:
            shares = self._shares()
            known |= {"campaign": asdict(self.campaign), "steps_between_checkpoints": self.campaign.steps}
            known |= {"goodput": self.goodput, "goodput_expected": expected(self.campaign), "shares": shares}
        return known

    def _shares(self) -> dict[str, float]:
        whole = sum(sum(one.seconds.values()) for one in self.lives)
        return {kind: sum(one.seconds[kind] for one in self.lives) / whole for kind in self.lives[0].seconds}

    def as_text(self) -> str:
        """For a reader."""
        step, plain = self.step, self.plain
        lines = [
            self.title,
            f"{self.work.ranks} ranks: {self.work.replicas} replicas of {self.work.stages} stages of {self.work.team}; "
            f"{len(step.counts)} replicas simulated, {step.events:,} events",
            f"a step takes {step.seconds:.4g} s (the cost model says {self.chosen.step_s:.4g}); stages wait "
            f"{step.bubble:.1%} of their timetable, {readable(round(step.sent_bytes))} go from node to node between "
            "stages",
        ]
        if step is not plain:
            longer = step.seconds / plain.seconds
            lines.append(f"without slow ranks and jitter it would take {plain.seconds:.4g} s: {longer:.2f} times")
        return "\n".join([*lines, *self._weeks()])

    def _weeks(self) -> list[str]:
        campaign = self.campaign
        if campaign is None:
            return []
        failures = sum(one.failures for one in self.lives) / len(self.lives)
        best = best_interval(campaign.failure_s, campaign.checkpoint_s) / HOUR_S * 60
        lines = [
            "",
            f"{campaign.weeks:g} weeks with a failure every {campaign.failure_s / HOUR_S:.3g} hours ({failures:.0f} of "
            f"them), a checkpoint every {campaign.steps} steps ({campaign.steps * campaign.step_s / 60:.3g} minutes; "
            f"{best:.3g} cost least)",
            f"goodput {self.goodput:.1%}, mean of {len(self.lives)}; with a spare always at hand it is "
            f"{expected(campaign):.1%}",
        ]
        for kind, share in self._shares().items():
            if share >= 0.0005:
                lines.append(f"  {kind:<11} {share:6.1%}")
        return lines
