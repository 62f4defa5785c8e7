"""Who listens where, and who is reached."""

import socket

import pytest

from llama_mp.ports import Ear, own_address, unreached


def test_who_listens_is_reached_and_who_does_not_is_named() -> None:
    ears = [Ear(), Ear()]
    places = [(ear.host, ear.port) for ear in ears]
    assert unreached(places, 5.0) == {}
    ears[1].close()
    assert list(unreached(places, 5.0)) == [1]
    assert "refused" in unreached(places, 5.0)[1]
    ears[0].close()


def test_a_place_that_swallows_connections_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        place = full.getsockname()
        with socket.create_connection(place):  # the one that it has room for
            assert unreached([place], 0.3) == {0: "timed out"}


def test_the_address_is_that_of_the_named_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert own_address() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "absent0")
    with pytest.raises(OSError, match="no address on the interface absent0 of GLOO_SOCKET_IFNAME"):
        Ear()


@pytest.mark.parametrize("address", ["192.0.2.1", None])  # of another machine (RFC 5737); of none
def test_a_name_that_does_not_stand_for_this_machine_is_as_good_as_none(
    monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    def by_name(name: str) -> str:
        if address is None:
            raise socket.gaierror("no such name")
        return address

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostbyname", by_name)
    assert own_address() == "127.0.0.1"
