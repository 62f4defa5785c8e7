"""Shares of a machine's cores: on machines that are not here, and on this one."""

import os
from pathlib import Path

import pytest
import shared_jobs as jobs
from ranks import Ranks

from llama_mp.pinning import Place, read_places, shares

PLAIN = {cpu: Place(0, cpu) for cpu in range(8)}
# As the kernel numbers them where cores have two CPUs each: 0 .. 7, then their siblings 8 .. 15; two nodes of 4 cores.
LARGE = {cpu: Place(cpu % 8 // 4, cpu % 8) for cpu in range(16)}
EVEN_ODD = {cpu: Place(cpu % 2, cpu) for cpu in range(8)}  # nodes that take turns


def of_all(
    places: dict[int, Place], num_ranks: int, *, num_threads: int = 1, num_cores: int | None = None
) -> list[list[int]] | None:
    mask = sorted(places)
    return shares([mask] * num_ranks, places, num_cores=num_cores or len(mask), num_threads=num_threads)


@pytest.mark.parametrize(
    ("places", "num_ranks", "expected"),
    [
        (PLAIN, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (PLAIN, 3, [[0, 1], [2, 3, 4], [5, 6, 7]]),
        (PLAIN, 8, [[cpu] for cpu in range(8)]),
        (LARGE, 2, [[0, 8, 1, 9, 2, 10, 3, 11], [4, 12, 5, 13, 6, 14, 7, 15]]),
        (LARGE, 4, [[0, 8, 1, 9], [2, 10, 3, 11], [4, 12, 5, 13], [6, 14, 7, 15]]),
        (LARGE, 8, [[core, core + 8] for core in range(8)]),
        (LARGE, 16, [[cpu] for core in range(8) for cpu in (core, core + 8)]),
        (EVEN_ODD, 2, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (EVEN_ODD, 4, [[0, 2], [4, 6], [1, 3], [5, 7]]),
    ],
)
def test_neighbours_on_whole_cores_of_one_node(
    places: dict[int, Place], num_ranks: int, expected: list[list[int]]
) -> None:
    assert of_all(places, num_ranks) == expected


@pytest.mark.parametrize("num_ranks", range(1, 17))
def test_every_cpu_is_taken_once_and_cores_are_whole_where_there_are_enough(num_ranks: int) -> None:
    found = of_all(LARGE, num_ranks)
    assert sorted(cpu for share in found for cpu in share) == sorted(LARGE)
    assert all(found)
    if num_ranks <= 8:
        owners = [{rank for rank, share in enumerate(found) if {core, core + 8} & set(share)} for core in range(8)]
        assert all(len(owner) == 1 for owner in owners)


def test_only_what_the_ranks_may_run_on_is_shared() -> None:
    assert shares([[1, 5, 6, 9]] * 2, LARGE, num_cores=4, num_threads=2) == [[1, 9], [5, 6]]


def test_left_alone_when_ranks_outnumber_the_cores() -> None:
    assert of_all(PLAIN, 9) is None


def test_left_alone_when_somebody_gave_each_rank_its_own() -> None:
    assert shares([[0, 1], [2, 3]], PLAIN, num_cores=2, num_threads=1) is None


def test_left_alone_when_a_quota_allows_less_than_the_mask() -> None:
    assert of_all(PLAIN, 2, num_cores=7) is None
    assert of_all(PLAIN, 2, num_cores=8) is not None


def test_left_alone_when_threads_outnumber_the_smallest_share() -> None:
    assert of_all(PLAIN, 3, num_threads=2) is not None
    assert of_all(PLAIN, 3, num_threads=3) is None


def test_places_are_read_from_sys(tmp_path: Path) -> None:
    for cpu, (node, siblings) in enumerate([(0, "0,2\n"), (1, "1,3\n"), (0, "0,2\n"), (1, "1,3\n"), (0, "4-5\n")]):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / f"node{node}").symlink_to(tmp_path)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(siblings)
    (tmp_path / "cpu6").mkdir()
    found = read_places([0, 1, 2, 3, 4, 6, 7], tmp_path)
    expected = {0: Place(0, 0), 1: Place(1, 1), 2: Place(0, 0), 3: Place(1, 1), 4: Place(0, 4)}
    assert found == expected | {6: Place(0, 6), 7: Place(0, 7)}


def test_this_machine_is_described() -> None:
    cpus = os.sched_getaffinity(0)
    places = read_places(cpus)
    assert set(places) == cpus
    assert all(place.core <= cpu for cpu, place in places.items())


def test_ranks_of_a_world_keep_to_their_shares_until_it_is_closed(ranks: Ranks) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    expected = shares([cpus] * 2, read_places(cpus), num_cores=jobs.parallel.cores_at_hand(), num_threads=1)
    for rank, (within, after, known) in enumerate(ranks.run(2, jobs.cpus)):
        assert {tuple(mask) for mask in within} == {tuple(sorted(expected[rank]) if expected else cpus)}
        assert {tuple(mask) for mask in after} == {tuple(cpus)}
        assert known == jobs.parallel.cores_at_hand()
