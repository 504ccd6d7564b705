"""When replicas agree, as configuration."""

from typing import Literal, Self

from pydantic import Field, model_validator

from unisono.config.section import Section


class OuterConfig(Section):
    """diloco: how the model follows what replicas have learned: SGD, whose gradient is how far they have moved."""

    lr: float = Field(0.7, gt=0, description="Learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum.")
    nesterov: bool = Field(True, description="Nesterov's.")


class SyncConfig(Section):
    """When replicas agree. All but every_step trade exactness for speed: the result depends on how many there are."""

    mode: Literal["every_step", "local", "diloco", "server", "hogwild", "pipedream", "pipedream_2bw"] = Field(
        "every_step",
        description="local: replicas take steps of their own, and their average is taken every `period` steps. diloco: "
        "the model follows them by an outer optimizer. server: workers wait for nobody within a step; each pushes the "
        "gradient of some micro-batches to a parameter server, and pulls what others have pushed. hogwild: all compute "
        "with one copy of the parameters and update it at any time, without locks; for sparse gradients. pipedream: a "
        "pipeline whose stages are updated every `push` micro-batches and do not drain for it: each backward uses the "
        "weights of its forward, of which a stage keeps as many versions as there are stages from it on; "
        "pipedream_2bw: two.",
    )
    replicas: int | None = Field(
        None, ge=1, description="How many train apart, on any number of workers; default: one a worker."
    )
    period: int | None = Field(None, ge=1, description="Steps from one agreement to the next.")
    after: int = Field(0, ge=0, description="Steps that are trained together first, as with every_step.")
    outer: OuterConfig = Field(default_factory=lambda: OuterConfig())
    compression: Literal["none", "bf16", "int8"] = Field(
        "none", description="What replicas tell each other of how far they have moved: smaller numbers."
    )
    fragments: int = Field(1, ge=1, description="Parts of the model that agree in turn, each once in a period.")
    delay: int = Field(
        0, ge=0, description="Steps that replicas go on for while they exchange what they tell each other."
    )
    mix: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="With a delay: how much of its own values a replica keeps when an agreement comes.",
    )
    clients: int | None = Field(
        None,
        ge=1,
        description="Data are divided among so many clients (a dataset may say how), of which `replicas` train in each "
        "period; what each has learned counts by its samples (federated averaging).",
    )
    proximal: float = Field(0.0, ge=0, description="A pull of every replica towards the model, by this rate (FedProx).")
    staleness: int | None = Field(
        None,
        ge=0,
        description="server: pushes that a worker may be ahead of the slowest; default: any number. 0: workers compute "
        "in rounds, with the same values, and servers are updated once a round.",
    )
    servers: int = Field(4, ge=1, le=64, description="server: parts of the model, read and updated one by one.")
    serving: int = Field(
        0,
        ge=0,
        description="server: workers of each host that compute nothing and update the servers of their host for all "
        "others: processes of their own. 0: the workers of a host update its servers in the memory that they share, "
        "and answer those of other hosts on threads.",
    )
    backup: int = Field(
        0,
        ge=0,
        description="server, in rounds: workers that may be late: a round ends when all others have brought theirs.",
    )
    accepted: int | None = Field(
        None, ge=1, description="server, in rounds: pushes that count in a round; default: one a worker, less backup."
    )
    push: int = Field(1, ge=1, description="server, hogwild: micro-batches of a push; pipedream: of an update.")
    stages: int | None = Field(
        None,
        ge=2,
        description="pipedream: stages of the pipeline, on as many workers or on one; default: layout.pipeline.",
    )
    damping: Literal["none", "rate", "momentum", "both"] = Field(
        "none",
        description="server: of a push before which t others came since its values were read: the rate is divided by "
        "1 + t, the momentum is lower by t / (1 + t), down to 0; or both.",
    )

    record: bool = Field(
        False, description="server: the order of pushes is kept in the run's directory, and can be replayed."
    )
    replay: str | None = Field(
        None, description="server: the directory of a run that was recorded: one worker does the same again."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        of_server = {"staleness", "servers", "serving", "backup", "accepted", "push", "damping", "record", "replay"}
        further = set(type(self).model_fields) - of_server - {"stages"}
        known = {
            "every_step": set(),
            "server": of_server,
            "hogwild": {"push"},
            "pipedream": {"push", "stages"},
            "pipedream_2bw": {"push"},
        }.get(self.mode, further)
        if given := sorted(self._given() - known - {"mode"}):
            if self.mode == "hogwild" and given[0] in ("record", "replay"):
                raise ValueError(
                    f"{given[0]} is given and mode is hogwild: updates without locks have no order, and some are lost; "
                    "use mode server"
                )
            modes = "server" if given[0] in of_server else "pipedream" if given[0] == "stages" else "local or diloco"
            raise ValueError(f"{given[0]} is given and mode is {self.mode}; it is for {modes}")
        if self.backup and self.staleness:
            raise ValueError(f"backup is for rounds, in which nobody is ahead; leave out staleness {self.staleness}")
        if self.accepted and not self.in_rounds:
            raise ValueError("accepted is for rounds; set staleness to 0, or backup")
        if self.damping != "none" and self.in_rounds:
            raise ValueError("damping is for pushes that are stale, and in rounds none is; leave it out")
        if not self.apart:
            return self
        if self.period is None:
            raise ValueError(f"mode is {self.mode} and period is missing: after how many steps do replicas agree?")
        if self.mode != "diloco" and "outer" in self._given():
            raise ValueError(f"outer is for mode diloco, not {self.mode}")
        if "mix" in self._given() and not self.delay:
            raise ValueError("mix is given, and an agreement counts at once, so replicas keep nothing; give a delay")
        if self.clients is not None:
            self._refuse_with_clients()
        if self.fragments > self.period:
            raise ValueError(f"{self.fragments} fragments cannot agree in turn within {self.period} steps")
        if self.delay >= self.period:
            raise ValueError(f"delay is {self.delay}; an agreement comes before the next, within {self.period} steps")
        return self

    def _refuse_with_clients(self) -> None:
        """Clients change from period to period: what each has learned is agreed on as a whole."""
        further = {"after": self.after > 0, "fragments": self.fragments > 1, "delay": self.delay > 0}
        if given := [name for name, wrong in further.items() if wrong]:
            raise ValueError(f"{given[0]} is given, and clients change from period to period; leave {given[0]} out")
        if self.replicas is not None and self.clients is not None and self.replicas > self.clients:
            raise ValueError(
                f"replicas is {self.replicas} and clients is {self.clients}; no more can train at a time than there are"
            )

    def _given(self) -> set[str]:
        """Keys with other values than their defaults: a resolved configuration has all keys."""
        fields = type(self).model_fields
        return {name for name in fields if getattr(self, name) != fields[name].get_default(call_default_factory=True)}

    @property
    def relaxed(self) -> bool:
        """Whether anything but the exact mode is wanted."""
        return self.mode != "every_step"

    @property
    def in_rounds(self) -> bool:
        """Whether a parameter server is updated once a round."""
        return self.mode == "server" and (self.staleness == 0 or self.backup > 0)

    @property
    def pushes(self) -> bool:
        """Whether workers take units of a step, and update the state with each one's gradient."""
        return self.mode in ("server", "hogwild")

    @property
    def stashes(self) -> bool:
        """Whether weights are kept in several versions, by a pipeline that does not drain."""
        return self.mode in ("pipedream", "pipedream_2bw")

    @property
    def apart(self) -> bool:
        """Whether replicas train apart."""
        return self.mode in ("local", "diloco")

    @property
    def inexact(self) -> str | None:
        """Why a run's result differs from one time to the next, in a few words; None where it does not."""
        if self.mode == "hogwild":
            return "workers update the state without locks"
        if self.mode != "server" or self.replay is not None or (self.in_rounds and not self.backup):
            return None
        return "whoever is late does not count" if self.backup else "workers push in whatever order they come"
