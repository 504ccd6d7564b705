"""Federated averaging: the paper's algorithm as a plain loop, one result on any workers and hosts, who trains when."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import unisono
from tests import toys
from unisono.config import TrainingConfig, validate
from unisono.data.clients import parts_of
from unisono.errors import ConfigurationError, DataError, UnisonoError
from unisono.launch.local import LocalLauncher
from unisono.launch.possible import with_replicas
from unisono.optim.classes import pin_variant
from unisono.plan.hosts import Hosts
from unisono.run.clients import ClientSampler, Federation
from unisono.trainer import Trainer

SIZES = (18, 7, 22, 4, 9)


class Divided(toys.Samples):
    """Samples of five clients of unlike sizes, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        stops = np.cumsum(SIZES)
        self.clients = [range(stop - size, stop) for stop, size in zip(stops, SIZES, strict=True)]

    def __len__(self) -> int:
        return sum(SIZES)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return x.double(), y.double()


def federation(present: int = 3, period: int = 2) -> Federation:
    return Federation(parts_of(Divided(), len(SIZES)), present, period, 0)


@pytest.mark.parametrize("name", ["momentum", "adam", "adagrad"])
@pytest.mark.parametrize("proximal", [0.0, 0.5])
def test_it_is_the_algorithm_of_the_paper(name: str, proximal: float) -> None:
    """Three of five clients in a period of two steps, two micro-batches of two each; seven periods, by n_k."""
    model, make, steps, period = toys.MODELS["plain"]().double(), toys.OPTIMIZERS[name], 14, 2
    trainer = Trainer(
        model=lambda: copy.deepcopy(model),
        loss=nn.functional.mse_loss,
        data=Divided(),
        optimizer=make,
        sync={"mode": "local", "clients": 5, "replicas": 3, "period": period, "proximal": proximal},
        global_batch_size=12,
        micro_batch_size=2,
        observe={"progress": False},
    )
    trainer.fit(steps)
    data, all_clients = Divided(), federation(period=period)
    sampler = ClientSampler(len(data), 0, 12, 2, all_clients)
    drawn = set()
    for first in range(0, steps, period):
        chosen, learned = all_clients.chosen(first // period), []
        drawn |= set(chosen)
        for replica, client in enumerate(chosen):
            own = copy.deepcopy(model)
            optimizer = make(own.parameters())
            pin_variant(optimizer, torch.device("cpu"))
            for step in range(first, first + period):
                rows = [i for m in (0, 1) for i in sampler.indices(step, 2 * replica + m).tolist()]
                assert set(rows) <= set(data.clients[client])
                x, y = (torch.stack(part) for part in zip(*(data[i] for i in rows), strict=True))
                optimizer.zero_grad()
                torch.autograd.backward(nn.functional.mse_loss(own(x), y))
                with torch.no_grad():
                    for mine, common in zip(own.parameters(), model.parameters(), strict=True):
                        assert mine.grad is not None
                        mine.grad.add_(mine - common, alpha=proximal)
                optimizer.step()
            learned.append(own)
        total = sum(SIZES[client] for client in chosen)
        with torch.no_grad():
            for common, *values in zip(model.parameters(), *(own.parameters() for own in learned), strict=True):
                parts = (value * SIZES[client] / total for value, client in zip(values, chosen, strict=True))
                common.copy_(sum(parts, torch.zeros_like(common)))
    assert drawn == set(range(5)) and trainer.model is not None
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["rprop", "asgd", "nadam", "adagrad"])
def test_new_clients_begin_anew_whatever_the_outer_optimizer(name: str) -> None:
    """diloco whose outer step is the whole way is federated averaging, also by optimizers whose state is not 0."""

    def trained(sync: dict[str, Any]) -> nn.Module:
        trainer = Trainer(
            model=lambda: toys.MODELS["plain"]().double(),
            loss=nn.functional.mse_loss,
            data=Divided(),
            optimizer=toys.OPTIMIZERS[name],
            sync={"clients": 5, "replicas": 3, "period": 2, **sync},
            global_batch_size=12,
            micro_batch_size=2,
            observe={"progress": False},
        )
        trainer.fit(9)
        assert trainer.model is not None
        return trainer.model

    expected = trained({"mode": "local"})
    found = trained({"mode": "diloco", "outer": {"lr": 1.0, "momentum": 0.0, "nesterov": False}})
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def train(pool: LocalLauncher, workers: int, hosts: int = 1, **arguments: Any) -> Any:
    settings = {"global_batch_size": 24, "steps": 7, "deadline_s": 20.0, **arguments}
    return pool.run({"call": "tests.jobs:train", "arguments": settings}, workers, hosts=hosts).results[0]


@pytest.mark.parametrize("mode", ["local", "diloco"])
@pytest.mark.parametrize(("model", "optimizer"), [("norm", "adamw"), ("mlp", "adagrad"), ("tied", "lamb")])
def test_one_result_on_any_workers_and_hosts(
    pool: LocalLauncher, mode: str, model: str, optimizer: str, tmp_path: Path
) -> None:
    """Ten clients of one dataset, three in each period; stopped in the middle of one, and resumed."""
    sync = {"mode": mode, "clients": 10, "replicas": 3, "period": 3, "compression": "bf16"}
    settings: dict[str, Any] = {"model": model, "optimizer": optimizer, "sync": sync}
    expected = train(pool, 1, **settings)
    for workers, hosts in ((2, 1), (3, 1), (3, 3)):
        found = train(pool, workers, hosts, **settings)
        assert found["digest"] == expected["digest"] and found["losses"] == expected["losses"]
    train(pool, 2, run_dir=str(tmp_path), **{**settings, "steps": 4})
    assert train(pool, 3, 3, run_dir=str(tmp_path), resume=True, **settings)["digest"] == expected["digest"]


def test_a_worker_is_killed(pool: LocalLauncher) -> None:
    """(rank 1 of 3, in the agreement after step 4): the bits of the undisturbed run."""
    sync = {"mode": "local", "clients": 7, "replicas": 3, "period": 2}
    options: dict[str, Any] = {"model": "mlp", "global_batch_size": 24, "steps": 8, "sync": sync, "deadline_s": 20.0}
    expected = train(pool, 1, **options)["digest"]
    for moment in ("backward", "mid-update", "mid-commit"):
        strikes = [{"rank": 1, "step": 4, "moment": moment, "how": "kill"}]
        ending = pool.run({"call": "tests.jobs:struck", "arguments": {"strikes": strikes, **options}}, 3)
        assert ending.result["digest"] == expected


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 3), st.data())
def test_a_client_goes_through_its_own_samples(sizes: list[int], period: int, micro: int, data: Any) -> None:
    """Each of them once before any is used again; all different clients in a period; whoever asks for any part."""
    present = data.draw(st.integers(1, len(sizes)))
    stops = np.cumsum(sizes)
    clients = tuple(np.arange(stop - size, stop) for stop, size in zip(stops, sizes, strict=True))
    found = Federation(clients, present, period, 5)
    batch = 2 * micro * present
    sampler = ClientSampler(sum(sizes), 5, batch, micro, found)
    for number in range(3):
        chosen = found.chosen(number)
        assert len(set(chosen)) == present
        order = sampler.at(number * period * batch, period * batch).reshape(period, present, -1)
        for replica, client in enumerate(chosen):
            own = order[:, replica].reshape(-1).tolist()
            size = sizes[client]
            for first in range(0, len(own), size):
                part = own[first : first + size]
                assert len(set(part)) == len(part) and set(part) <= set(clients[client].tolist())
    everything = sampler.at(0, 3 * period * batch)
    at, count = data.draw(st.integers(0, batch)), data.draw(st.integers(1, batch))
    assert sampler.at(at, count).tolist() == everything[at : at + count].tolist()
    assert sampler.indices(period, 1).tolist() == everything[period * batch + micro :][:micro].tolist()
    assert sum(found.weights(1)) == pytest.approx(1.0)


def test_what_makes_no_sense_is_refused() -> None:
    def config(**sync: Any) -> TrainingConfig:
        given = {"mode": "local", "period": 2, "clients": 4, **sync}
        return validate(TrainingConfig, {"global_batch_size": 8, "micro_batch_size": 1, "sync": given}, "test")

    for wrong in ({"after": 2}, {"fragments": 2}, {"delay": 1}):
        with pytest.raises(ConfigurationError, match=f"{next(iter(wrong))} is given, and clients change from period"):
            config(**wrong)
    with pytest.raises(ConfigurationError, match="replicas is 8 and clients is 4; no more can train at a time than"):
        config(replicas=8)
    with pytest.raises(ConfigurationError, match=r"sync\.clients is 4, and there are 8 workers"):
        with_replicas(config(), Hosts((8,)))
    with pytest.raises(ConfigurationError, match="clients is given and mode is server; it is for local or diloco"):
        config(mode="server", period=None)
    with pytest.raises(ConfigurationError, match=r"sync\.clients is 3, and the dataset has 5 clients"):
        parts_of(Divided(), 3)
    with pytest.raises(ConfigurationError, match=r"sync\.clients is 3, and there are 2 samples"):
        parts_of([1, 2], 3)


class Odd(list[int]):
    clients: list[list[int]]


@pytest.mark.parametrize(
    ("clients", "said"),
    [([[0], []], "client 1 of the dataset has no samples"), ([[0], [3]], "3;"), ([[-1, 2], [0]], "sample -1;")],
)
def test_clients_without_data_are_refused(clients: list[list[int]], said: str) -> None:
    odd = Odd([1, 2, 3])
    odd.clients = clients
    with pytest.raises(DataError, match=said):
        parts_of(odd, 2)


def test_datasets_of_clients_are_one() -> None:
    data = unisono.Clients([toys.Samples(), [(torch.ones(6), torch.ones(4))] * 3])
    assert len(data) == toys.SAMPLES + 3 and torch.equal(data[toys.SAMPLES + 1][0], torch.ones(6))
    assert torch.equal(data[5][0], toys.Samples()[5][0])
    assert [len(part) for part in parts_of(data, 2)] == [toys.SAMPLES, 3]
    with pytest.raises(UnisonoError, match="the client 1's dataset is empty"):
        unisono.Clients([[1], []])
