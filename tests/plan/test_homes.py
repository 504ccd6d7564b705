"""Where the parts of a parameter server live, and who is asked for them."""

from hypothesis import given
from hypothesis import strategies as st

from unisono.plan.homes import Homes
from unisono.plan.hosts import Hosts

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=5)


@given(SIZES, st.integers(0, 3), st.integers(1, 40))
def test_every_server_is_reached_by_everyone_who_computes(sizes: list[int], serving: int, servers: int) -> None:
    """Itself, or through a worker that does; whoever is asked knows by how many."""
    serving = min(serving, min(sizes) - 1)
    homes = Homes(Hosts(tuple(sizes)), max(servers, len(sizes)), serving)
    place, everyone = homes.hosts.place, range(homes.hosts.size)
    assert sorted(server for host in range(len(sizes)) for server in homes.on(host)) == list(range(homes.servers))
    assert all(homes.on(host) for host in range(len(sizes)))
    assert len(homes.computing) == homes.hosts.size - serving * len(sizes)
    for rank in homes.computing:
        direct = {host for host in range(len(sizes)) if homes.reaches(rank, host)}
        asked = [place(other)[0] for other in homes.asked(rank)]
        assert sorted([*direct, *asked]) == list(range(len(sizes)))
        assert asked == sorted(asked)
        assert all(homes.reaches(other, place(other)[0]) for other in homes.asked(rank))
    asking = [(rank, other) for rank in everyone for other in homes.asked(rank)]
    assert sorted(asking) == sorted((rank, other) for other in everyone for rank in homes.askers(other))
    for rank in everyone:
        own = place(rank)[0]
        hosts = [place(other)[0] for other in homes.peers(rank)]
        assert hosts == ([h for h in range(len(sizes)) if h != own] if homes.reaches(rank, own) else [])


@given(st.integers(2, 6), st.integers(2, 4))
def test_those_who_ask_a_host_ask_different_workers(workers: int, hosts: int) -> None:
    homes = Homes(Hosts((workers,) * hosts), hosts)
    assert all(len(homes.askers(rank)) == hosts - 1 for rank in range(homes.hosts.size))
