"""Replicas take steps of their own, and agree now and then: local SGD, DiLoCo, and their streaming form.

In every step the replicas' blocks are updated by their owners, like those of any model, each replica's from its own
micro-batches. After some steps the owner of a part of the model itself brings it up to what replicas have made of that
part, and gives it back to them. That is a commit of its own in the same step, once all replicas have done the step.

McMahan et al., 2017 (federated averaging); Stich, 2018; Li et al., 2018 (FedProx); Lin et al., 2018 (post-local);
Douillard et al., 2023 (DiLoCo) and 2025 (streaming).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unisono.comm.compression import Cast, Codec, Quantized
from unisono.comm.journal import Image
from unisono.config import OuterConfig, SyncConfig, TrainingConfig
from unisono.data.clients import parts_of
from unisono.optim.blockwise import Unit
from unisono.plan.agreement import Agreements, fragments
from unisono.plan.assignment import Run
from unisono.plan.blocks import FlatLayout
from unisono.run.clients import Federation
from unisono.run.rng import derive
from unisono.run.summation import fold
from unisono.sync.every_step import EveryStep, Versions
from unisono.sync.ownership import OwnedRun, Owner
from unisono.sync.phases import Phases
from unisono.sync.sums import StepSums
from unisono.sync.telling import Column, StartGather, Telling

MOMENTUM, SENT = "outer_momentum", "sent"
"""State of the model itself, and of a replica whose words are under way."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How replicas agree.

    Attributes:
        when: after which steps.
        outer: how the model follows them; None where it is their average.
        mix: how much of its own values a replica keeps, where an agreement comes with a delay.
        proximal: the rate by which replicas are pulled towards the model.
        federation: the clients that take turns as replicas; None where replicas stay what they are.
    """

    when: Agreements
    outer: OuterConfig | None
    mix: float
    proximal: float
    federation: Federation | None = None

    def mean(self, told: Sequence[Tensor], step: int) -> Tensor:
        """Of what replicas have told, after a step: by how much each counts."""
        if self.federation is None:
            return fold(told, torch.add) / len(told)
        weights = self.federation.weights(step)
        return fold([words * weight for words, weight in zip(told, weights, strict=True)], torch.add)


class LocalSteps(EveryStep):
    """The policy of replicas that train apart; until they do, it is the exact one.

    Arguments:
        terms: how they agree.
        telling: what replicas tell each other.
        fragment_of: a parameter of the model itself -> when it is its turn.
        owner: whose memory the replicas' values are.
        versions: how far all blocks are.
        kept: the blocks that this host keeps.
        arguments: as of `EveryStep`.
    """

    def __init__(
        self,
        terms: Terms,
        telling: Telling,
        fragment_of: Sequence[int],
        owner: Owner,
        versions: Versions,
        kept: Sequence[int],
        *arguments: object,
    ) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._terms = terms
        self._telling = telling
        each = len(self._flat.blocks) // (1 + self._flat.replicas)
        self._of_replicas = [block for block in kept if block >= each]
        self._fragment_of = fragment_of
        self._owner = owner
        self._all_versions = versions
        self._columns: dict[Run, list[Column]] = {}
        self._images: dict[Run, Image] = {}

    def _bring(self, runs: Sequence[OwnedRun], step: int, phases: Phases) -> None:
        """First what is each replica's own, then what they agree on."""
        when = self._terms.when
        if not when.apart(step):
            super()._bring(runs, step, phases)
            return
        mine = list(runs)
        self._bring_replicas(mine, step, phases)
        if when.due(step):
            mine += self._await(
                lambda: self._all_versions.await_all(step, self._of_replicas),
                phases,
                "update",
                lambda further: self._bring_replicas(further, step, phases),
            )
            self._hear([owned for owned in mine if not owned.replica], step)
            phases.enter("update")
        for owned in mine:
            if not owned.replica and not self._holdings.is_done(owned.run, step):
                self._agree(owned, step)
        self._telling.over()

    def _bring_replicas(self, runs: Sequence[OwnedRun], step: int, phases: Phases) -> None:
        super()._bring([owned for owned in runs if owned.replica], step, phases)

    def _hear(self, runs: Sequence[OwnedRun], step: int) -> None:
        """Replicas tell what they have to after a step; what counts from now on has come."""
        when, columns = self._terms.when, [column for owned in runs for column in self._columns_of(owned)]

        def of(fragments: Collection[int]) -> list[Column]:
            return [c for c in columns if self._fragment_of[c.common.parameter] in fragments]

        told = {fragment for fragment in range(when.fragments) if when.sends(step, fragment)}
        if told:
            self._telling.begin(step, of(told))
        counts = {fragment for fragment in range(when.fragments) if when.applies(step, fragment)}
        if counts and when.delay:
            self._telling.end_into(step - when.delay, of(counts), SENT)
        elif counts:
            self._telling.end(step)

    def _commit(self, owned: OwnedRun, step: int, update: Callable[[], None] | None) -> None:
        """As of `EveryStep`; where replicas part after the step, they take the model's values with it."""
        if not self._terms.when.parts(step):
            super()._commit(owned, step, update)
        elif owned.replica:
            self._holdings.journal.advance(owned.image, step)
        else:
            columns = self._columns_of(owned)

            def update_and_part() -> None:
                if update is not None:
                    update()
                for column in columns:
                    for replica in self._here(column):
                        _take_over(replica, column.common)
                    if MOMENTUM in column.common.state:
                        column.common.state[MOMENTUM].zero_()

            self._commit_column(owned, step, update_and_part)

    def _agree(self, owned: OwnedRun, step: int) -> None:
        """Bring a run of the model itself, and of all replicas, to what they have agreed on after ``step``."""
        when, columns = self._terms.when, self._columns_of(owned)
        parts = {self._fragment_of[column.common.parameter] for column in columns}
        if not any(when.sends(step, part) or when.applies(step, part) for part in parts):
            super()._commit(owned, step, None)
            return

        def update() -> None:
            for column in columns:
                part = self._fragment_of[column.common.parameter]
                told = self._telling.words(step, column) if when.sends(step, part) else []
                if when.applies(step, part):  # what was told before, with a delay
                    kept = [replica.state[SENT] for replica in column.replicas] if when.delay else told
                    self._apply(column, self._terms.mean([w for w in kept if w is not None], step))
                for replica, words in zip(column.replicas if when.delay else (), told, strict=False):
                    if words is not None:  # else it is under way
                        replica.state[SENT].copy_(words)

        self._commit_column(owned, step, update)

    def _apply(self, column: Column, mean: Tensor) -> None:
        """The model follows what replicas have told on average, and they follow it; new clients begin anew."""
        terms, common = self._terms, column.common
        if self._telling.values:
            common.values.copy_(mean)
        else:
            follow(common, mean, terms.outer)
        keep = terms.mix if terms.when.delay else 0.0
        for replica in self._here(column):
            if terms.federation is not None:
                _take_over(replica, common)
                replica.present[0] = self._optimizer.begins_with_state(replica)  # the model takes no steps of its own
            elif keep:
                replica.values.lerp_(common.values, 1 - keep)
            else:
                replica.values.copy_(common.values)

    def _told_norm(self, step: int, norms: Sequence[float]) -> float | None:
        """The largest; None where other hosts have the gradients of some replicas."""
        elsewhere = self._terms.when.apart(step) and not all(self._telling.here)
        return None if elsewhere else super()._told_norm(step, norms)

    def _reduce(self, owned: OwnedRun, sums: StepSums) -> None:
        """The mean gradient, and the pull towards the model."""
        super()._reduce(owned, sums)
        if self._terms.proximal and owned.replica:
            for span in owned.spans:
                apart, common = self._owner.beside_the_model(span)
                span.scratch.add_(apart - common, alpha=self._terms.proximal)

    def _finish_buffers(self, step: int, values: Sequence[Tensor]) -> None:
        """Replicas agree on buffers with the first fragment; counters are those of the first replica."""
        when, each = self._terms.when, len(values) // (1 + self._flat.replicas)
        for b in range(each):
            common, *replicas = values[b::each]
            if when.applies(step, 0) and common.dtype.is_floating_point:
                common.copy_(self._terms.mean(replicas, step))
            elif when.applies(step, 0):
                common.copy_(replicas[0])
            for replica in replicas if when.applies(step, 0) or when.parts(step) else ():
                replica.copy_(common)

    def _columns_of(self, owned: OwnedRun) -> list[Column]:
        """For each unit of a run of the model itself: it, and that of every replica."""
        if owned.run not in self._columns:
            self._columns[owned.run] = [Column(*column) for column in self._owner.columns(owned.run)]
        return self._columns[owned.run]

    def _here(self, column: Column) -> list[Unit]:
        """The replicas that this host keeps."""
        return [replica for replica, here in zip(column.replicas, self._telling.here, strict=True) if here]

    def _commit_column(self, owned: OwnedRun, step: int, update: Callable[[], None]) -> None:
        """Change a run of the model itself and of all replicas, whole or not at all."""
        if owned.run not in self._images:
            self._images[owned.run] = self._owner.memory.image(owned.run, column=True)
        image = self._images[owned.run]
        if self._under_way is not None and self._under_way.snapshot:
            keep_aside(image if self._terms.when.parts(step) else owned.image)
        self._holdings.journal.commit(image, step, update)


def follow(common: Unit, moved: Tensor, outer: OuterConfig | None) -> None:
    """The model goes by what replicas have moved on average: all of it, or as the outer optimizer says."""
    if outer is None:
        common.values.sub_(moved)
        return
    momentum = common.state[MOMENTUM]
    if not common.present[0]:
        momentum.zero_()
    momentum.mul_(outer.momentum).add_(moved)
    step = moved.add(momentum, alpha=outer.momentum) if outer.nesterov else momentum
    common.values.sub_(step, alpha=outer.lr)
    common.present[0] = 1


def keep_aside(image: Image) -> None:
    """The consistent copy of what is about to change."""
    for target, source in zip(image.snapshot, image.live, strict=True):
        target.copy_(source)


def _take_over(replica: Unit, common: Unit) -> None:
    """A replica begins with the model's values and state."""
    replica.values.copy_(common.values)
    for key, value in replica.state.items():
        if key in common.state:
            value.copy_(common.state[key])
    replica.present[0] = common.present[0]


def kept_by_agreements(config: SyncConfig) -> tuple[list[str], list[str]]:
    """The state that agreements keep for the model itself, and for each replica."""
    return [MOMENTUM] if config.mode == "diloco" else [], [SENT] if config.delay else []


def agreements(config: SyncConfig) -> Agreements:
    """After which steps replicas agree."""
    assert config.period is not None
    return Agreements(config.period, config.after, config.fragments, config.delay)


def federation_of(config: TrainingConfig, dataset: object) -> Federation | None:
    """The clients of a run, and what each has of a dataset; None where replicas share all of it."""
    sync = config.sync
    if sync.clients is None:
        return None
    assert sync.replicas is not None and sync.period is not None
    return Federation(parts_of(dataset, sync.clients), sync.replicas, sync.period, config.seed)


def terms_of(config: TrainingConfig, federation: Federation | None) -> Terms:
    """How replicas agree in a run."""
    sync = config.sync
    outer = sync.outer if sync.mode == "diloco" else None
    return Terms(agreements(sync), outer, sync.mix, sync.proximal, federation)


def telling_of(config: TrainingConfig, here: Sequence[bool], gather: StartGather | None) -> Telling:
    """What replicas of a run tell each other.

    Arguments:
        here, gather: see `Telling`.
    """
    sync = config.sync
    codecs: dict[str, Codec | None] = {"none": None, "bf16": Cast(torch.bfloat16), "int8": Quantized()}
    plain = sync.mode == "local" and sync.compression == "none" and not sync.delay  # their average, to the last bit
    return Telling(codecs[sync.compression], derive(config.seed, "sent"), plain, here, gather)


def turns_of(flat: FlatLayout, config: SyncConfig) -> list[int]:
    """The fragment of each parameter of the model itself: when it is its turn."""
    return fragments([spec.tensor.numel for spec in flat.own], config.fragments)


def replica_of(config: TrainingConfig) -> Callable[[int, int], int]:
    """(step, micro-batch) -> the virtual replica that computes it, 0 for the model itself."""
    if not config.sync.apart:
        return lambda step, micro_batch: 0
    when, replicas, count = agreements(config.sync), config.sync.replicas, config.micro_batches
    assert replicas is not None
    return lambda step, micro_batch: 1 + micro_batch * replicas // count if when.apart(step) else 0


def told_of(config: SyncConfig, steps: int) -> list[str]:
    """What a user should know of a run whose replicas train apart."""
    told = [
        f"{config.replicas} replicas train apart, and agree every {config.period} steps: the result depends on how "
        "many there are, not on workers"
    ]
    if config.clients is not None:
        told = [
            f"{config.replicas} of {config.clients} clients train in each period of {config.period} steps; what each "
            "has learned counts by its samples"
        ]
    when = agreements(config)
    lasts = sorted({when.last(steps, fragment) for fragment in range(config.fragments)})
    if lasts[0] < steps:
        which = f"step {lasts[0]}" if len(lasts) == 1 else f"steps {lasts[0]} to {lasts[-1]}, by fragment,"
        told.append(
            f"replicas agree for the last time after {which} of {steps}: what they learn later is not in the model"
        )
    return told
