"""Placement: the same for everybody, spread over failure domains, within the caps, whoever has which node_id."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckptd.erasure import Group, explain, group_of, groups, losses_tolerated, plan_groups
from ckptd.errors import InvalidRequest
from ckptd.model import LARGEST_GROUP, Geometry, Roster, RosterEntry

wishes = st.one_of(
    st.just("auto"), st.builds(lambda k, m: f"{k}+{m}", st.integers(1, 20), st.integers(1, 6)), st.just("200+55")
)
caps = st.one_of(st.just(""), st.builds(lambda k, m: f"{k}+{m}", st.integers(1, 12), st.integers(1, 4)))


def no_labels(node: int) -> Mapping[str, str]:
    return {}


def roster(
    nodes: int,
    protect: str = "auto",
    labels: Callable[[int], Mapping[str, str]] = no_labels,
    cap: Callable[[int], str] = lambda node: "",
    ranks: int = 1,
) -> Roster:
    """``nodes`` of ``ranks`` ranks each, named n0, n1, ... in the order of their lowest ranks."""
    entries = tuple(
        RosterEntry(rank, f"n{rank // ranks}", "a:1", 7, tuple(labels(rank // ranks).items()), cap(rank // ranks))
        for rank in range(nodes * ranks)
    )
    return Roster(1, 5, 1 << 16, entries, protect)


def places(group: Group) -> list[int]:
    return [int(node_id[1:]) for node_id in group.members]


def shapes(planned: tuple[Group, ...]) -> list[str]:
    return [str(group.geometry) for group in planned]


def check(wanted: Roster, planned: tuple[Group, ...]) -> None:
    """What holds for every plan."""
    members = [node_id for group in planned for node_id in group.members]
    assert len(members) == len(set(members))
    assert set(members) <= set(wanted.nodes)
    assert [group.members[0] for group in planned] == sorted(
        (group.members[0] for group in planned), key=lambda node_id: int(node_id[1:])
    )
    for group in planned:
        assert places(group) == sorted(places(group))
        assert 1 <= group.tolerance < group.n <= LARGEST_GROUP
        for cap in filter(None, (wanted.nodes[node_id].protect_max for node_id in group.members)):
            k, m = Geometry.parse(cap)
            assert group.tolerance <= m
            assert group.tolerance * k <= m * group.geometry.k


def check_even(labels: Sequence[Mapping[str, str]], planned: tuple[Group, ...]) -> None:
    """Every group has its fair share of every domain, rounded up or down."""
    held = [Counter(domain for place in places(group) for domain in labels[place].items()) for group in planned]
    for domain, size in Counter(domain for node in labels for domain in node.items()).items():
        shares = [domains.get(domain, 0) for domains in held]
        assert size // len(planned) <= min(shares) <= max(shares) <= -(-size // len(planned)), (domain, shares)


# --- sizes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("nodes", "protect", "expected"),
    [
        (0, "auto", []),
        (1, "auto", []),
        (1, "4+2", []),
        (8, "off", []),
        (2, "auto", ["1+1"]),
        (3, "auto", ["2+1"]),
        (4, "auto", ["2+2"]),
        (19, "auto", ["17+2"]),
        (20, "auto", ["8+2", "8+2"]),
        (29, "auto", ["13+2", "12+2"]),
        (30, "auto", ["8+2", "8+2", "8+2"]),
        (2, "2+2", ["1+1"]),
        (3, "2+5", ["1+2"]),
        (5, "4+2", ["3+2"]),
        (11, "4+2", ["9+2"]),
        (12, "4+2", ["4+2", "4+2"]),
        (13, "4+2", ["5+2", "4+2"]),
        (300, "250+5", ["145+5", "145+5"]),
        (255, "250+5", ["250+5"]),
        (256, "250+5", ["123+5", "123+5"]),
    ],
)
def test_the_wish_and_the_number_of_nodes_fix_the_groups(nodes: int, protect: str, expected: list[str]) -> None:
    assert sorted(shapes(plan_groups(roster(nodes, protect))), reverse=True) == sorted(expected, reverse=True)


@pytest.mark.parametrize("protect", ["auto", "4+2", "1+1", "8+3", "250+5"])
def test_from_2_to_300_nodes_every_node_is_in_one_group_of_nearly_equal_size(protect: str) -> None:
    for nodes in range(2, 301):
        wanted = roster(nodes, protect)
        planned = plan_groups(wanted)
        check(wanted, planned)
        sizes = [group.n for group in planned]
        assert sum(sizes) == nodes
        assert max(sizes) - min(sizes) <= 1
        wish = Geometry.parse(protect) if protect != "auto" else Geometry(8, 2) if nodes > 3 else Geometry(9, 1)
        assert {group.tolerance for group in planned} == {min(wish.m, nodes - 1)}
        assert len(planned) == max(1, nodes // sum(wish), -(-nodes // 255))
        assert protect != "auto" or nodes < 20 or 10 <= min(sizes) <= max(sizes) <= 15


def test_ranks_without_a_daemon_are_in_no_group_and_ranks_of_a_node_count_once() -> None:
    wanted = roster(4, "2+2", ranks=2)
    entries = tuple(replace(entry, node_id="") if entry.rank in (0, 4, 5) else entry for entry in wanted.entries)
    (group,) = plan_groups(replace(wanted, entries=entries))
    assert group.members == ("n0", "n1", "n3")
    assert group.tolerance == 2


@pytest.mark.parametrize("protect", ["", "2", "0+1", "250+6", "on"])
def test_a_wish_that_is_no_geometry_is_refused(protect: str) -> None:
    with pytest.raises(InvalidRequest):
        plan_groups(roster(4, protect))


# --- caps ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("nodes", "protect", "cap", "expected"),
    [
        (6, "4+2", "4+1", ["5+1"]),
        (12, "4+2", "4+1", ["5+1", "5+1"]),
        (12, "4+2", "8+1", ["11+1"]),
        (18, "2+1", "8+1", ["8+1", "8+1"]),
        (12, "4+2", "4+4", ["4+2", "4+2"]),
        (12, "2+2", "8+2", ["10+2"]),
        (20, "2+2", "4+1", ["4+1"] * 4),
        (5, "3+2", "2+1", ["4+1"]),
        (5, "3+2", "8+4", ["4+1"]),
        (2, "1+1", "4+2", []),
        (3, "1+1", "4+2", ["2+1"]),
    ],
)
def test_a_cap_bounds_the_tolerance_and_the_share_of_memory(
    nodes: int, protect: str, cap: str, expected: list[str]
) -> None:
    wanted = roster(nodes, protect, cap=lambda node: cap if node == nodes - 1 else "")
    assert shapes(plan_groups(wanted)) == expected


# --- domains ------------------------------------------------------------------------------------------------------
@given(st.lists(st.integers(0, 18), min_size=2, max_size=60), wishes, st.booleans())
@settings(max_examples=200)
def test_domains_and_domains_in_them_are_dealt_evenly(racks: list[int], protect: str, is_nested: bool) -> None:
    labels = [{"rack": f"r{rack}"} | ({"zone": f"z{rack // 4}"} if is_nested else {}) for rack in racks]
    wanted = roster(len(racks), protect, labels=lambda node: labels[node])
    planned = plan_groups(wanted)
    check(wanted, planned)
    assert sum(group.n for group in planned) == len(racks)
    assert max(group.n for group in planned) - min(group.n for group in planned) <= 1
    check_even(labels, planned)


@given(
    st.lists(st.dictionaries(st.sampled_from("xyz"), st.sampled_from("abcde")), min_size=2, max_size=60),
    st.sampled_from(["1+1", "2+1", "2+2", "6+2"]),
)
@settings(max_examples=100)
def test_groups_are_of_nearly_equal_size_however_domains_cross(labels: list[dict[str, str]], protect: str) -> None:
    wanted = roster(len(labels), protect, labels=lambda node: labels[node])
    planned = plan_groups(wanted)
    check(wanted, planned)
    assert max(group.n for group in planned) - min(group.n for group in planned) <= 1


@given(st.lists(st.text("abc ", min_size=3, max_size=3), min_size=2), st.integers(1, 9))
@example([" bc", " c ", "cad", "bee", "cc ", "  c", "  c"], 1)  # of nodes alike, one makes the last larger group
@settings(max_examples=300)
def test_every_node_goes_where_a_comparison_of_all_groups_sends_it(nodes: list[str], k: int) -> None:
    labels = [{name: value for name, value in zip("xyz", node, strict=True) if value != " "} for node in nodes]
    wanted = roster(len(labels), f"{k}+1", lambda node: labels[node])
    sizes = Counter(domain for node in labels for domain in node.items())
    planned = plan_groups(wanted)
    count = len(planned)
    full, larger = divmod(len(labels), count)
    expected: list[list[int]] = [[] for _ in range(count)]
    for node in groups._domain_by_domain(groups._nodes(wanted), sizes):
        room = full + (sum(len(group) > full for group in expected) < larger)
        held = [[sum(domain in labels[n].items() for n in group) for domain in node.domains] for group in expected]
        fair = [-(-sizes[domain] // count) for domain in node.domains]
        _, _, _, at = min(
            (sum(h >= f for h, f in zip(held[at], fair, strict=True)), sum(held[at]), len(group), at)
            for at, group in enumerate(expected)
            if len(group) < room
        )
        expected[at].append(node.place)
    assert [places(group) for group in planned] == sorted(sorted(group) for group in expected)


@pytest.mark.parametrize(
    ("size", "nodes"),
    [
        (3, "au av bv cv cu au"),  # a group is avoided first for what an even deal forbids,
        (2, "bv bv bu av cu bu"),  # then for what it holds already
        (2, "a b c b a c"),  # domains of one size are dealt one after the other,
        (3, "au hw dv dv bu dv"),  # the coarsest label first
    ],
)
def test_an_even_deal_is_found(size: int, nodes: str) -> None:
    labels = [dict(zip(("rack", "zone"), node, strict=False)) for node in nodes.split()]
    planned = plan_groups(roster(len(labels), f"{size - 1}+1", labels=lambda node: labels[node]))
    check_even(labels, planned)


def test_domains_in_domains_are_both_spread() -> None:
    labels = [{"rack": f"r{node // 3}", "power": f"p{node // 12}", "switch": f"s{node // 6}"} for node in range(48)]
    planned = plan_groups(roster(48, "6+2", labels=lambda node: labels[node]))
    assert len(planned) == 6
    for key, most in (("rack", 1), ("switch", 1), ("power", 2)):
        for group in planned:
            assert max(Counter(labels[place][key] for place in places(group)).values()) <= most, key


def test_domains_that_cross_are_both_spread_where_it_can_be() -> None:
    labels = [{"rack": f"r{node % 10}", "power": f"p{node // 10}"} for node in range(20)]
    planned = plan_groups(roster(20, "auto", labels=lambda node: labels[node]))
    for group in planned:
        assert max(Counter(labels[place]["rack"] for place in places(group)).values()) == 1
        assert set(Counter(labels[place]["power"] for place in places(group)).values()) == {5}


def test_nodes_without_a_label_share_no_domain() -> None:
    planned = plan_groups(roster(12, "2+1", labels=lambda node: {"rack": "r"} if node < 4 else {}))
    assert [sum(place < 4 for place in places(group)) for group in planned] == [1, 1, 1, 1]
    assert {group.n for group in planned} == {3}


@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), wishes)
@settings(max_examples=100)
def test_a_group_stays_in_one_network(networks: list[int], protect: str) -> None:
    wanted = roster(len(networks), protect, labels=lambda node: {"nic": f"ib{networks[node]}"})
    planned = plan_groups(wanted)
    check(wanted, planned)
    assert sum(group.n for group in planned) == len(networks)
    sizes = Counter(networks)
    for group in planned:
        inside = {networks[place] for place in places(group)}
        assert len({network for network in inside if sizes[network] > 1}) <= 1


def test_a_node_alone_in_its_network_joins_the_smallest_other() -> None:
    networks = "aaaabbbcbaa"
    planned = plan_groups(roster(11, "auto", labels=lambda node: {"nic": networks[node]}))
    assert [places(group) for group in planned] == [[0, 1, 2, 3, 9, 10], [4, 5, 6, 7, 8]]
    pairs = plan_groups(roster(4, "auto", labels=lambda node: {"nic": f"own{node}"}))
    assert [places(group) for group in pairs] == [[0, 1], [2, 3]]


def test_networks_are_planned_each_with_its_own_tolerance() -> None:
    planned = plan_groups(roster(9, "auto", labels=lambda node: {"nic": "a" if node < 3 else "b"}))
    assert shapes(planned) == ["2+1", "4+2"]


# --- who has which name -------------------------------------------------------------------------------------------
label_maps = st.dictionaries(
    st.sampled_from(["rack", "nic", "switch", "power"]), st.sampled_from(["a", "b", "c", "d"]), max_size=4
)


@given(st.lists(st.tuples(label_maps, caps), min_size=1, max_size=60), wishes, st.integers(0, 2**32))
@settings(max_examples=150)
def test_nodes_that_replace_others_take_their_positions(
    nodes: list[tuple[dict[str, str], str]], protect: str, seed: int
) -> None:
    choose = random.Random(seed)
    wanted = roster(len(nodes), protect, lambda node: nodes[node][0], lambda node: nodes[node][1], ranks=2)
    names = {node_id: f"{choose.random()}" if choose.random() < 0.5 else node_id for node_id in wanted.nodes}
    entries = tuple(
        replace(entry, node_id=names[entry.node_id], address=f"b:{choose.random()}", nonce=choose.getrandbits(64))
        for entry in wanted.entries
    )
    planned = plan_groups(wanted)
    check(wanted, planned)
    renamed = plan_groups(replace(wanted, entries=entries, version=2))
    assert renamed == tuple(
        Group(group.tolerance, tuple(names[node_id] for node_id in group.members)) for group in planned
    )


@given(st.lists(label_maps, min_size=2, max_size=40), wishes, st.integers(0, 2**32))
@settings(max_examples=50)
def test_the_order_of_entries_and_of_labels_does_not_matter(
    labels: list[dict[str, str]], protect: str, seed: int
) -> None:
    wanted = roster(len(labels), protect, lambda node: labels[node], ranks=3)
    shuffled = [replace(entry, domains=entry.domains[::-1]) for entry in wanted.entries]
    random.Random(seed).shuffle(shuffled)
    assert plan_groups(replace(wanted, entries=tuple(shuffled))) == plan_groups(wanted)


def test_ten_thousand_ranks_are_placed_quickly() -> None:
    wanted = roster(1250, "auto", labels=lambda node: {"rack": f"r{node // 16}", "power": f"p{node // 64}"}, ranks=8)
    planned = plan_groups(wanted)
    check(wanted, planned)
    assert len(planned) == 125


@pytest.mark.parametrize("protect", ["auto", "1+1", "4+2", "14+2"])
@pytest.mark.parametrize("widths", [{}, {"rack": 16}, {"row": 128, "rack": 16}], ids=lambda widths: "+".join(widths))
def test_ten_thousand_nodes_are_placed_with_a_few_calls_a_node_however_many_groups(
    protect: str, widths: Mapping[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = list(range(10_000))
    random.Random(3).shuffle(nodes)
    labels = [{label: f"{label}{node // width}" for label, width in widths.items()} for node in nodes]
    wanted = roster(len(nodes), protect, lambda node: labels[node])
    calls, compared, costs = 0, 0, groups._costs

    def count_call(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    def count_comparison(*arguments):
        nonlocal compared
        compared += 1
        return costs(*arguments)

    monkeypatch.setattr(groups, "_costs", count_comparison)
    before = sys.getprofile()
    sys.setprofile(count_call)
    try:
        planned = plan_groups(wanted)
    finally:
        sys.setprofile(before)
    assert calls < 60 * len(nodes)
    assert compared <= max(1, len({node.get("rack") for node in labels})) + 1
    check(wanted, planned)
    check_even(labels, planned)
    assert sum(group.n for group in planned) == len(nodes)
    assert max(group.n for group in planned) - min(group.n for group in planned) <= 1


# --- what is said of it -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("nodes", "protect", "cap", "expected"),
    [
        (2, "2+2", "", "2+2 asked, 2 nodes: tolerance 1"),
        (1, "auto", "", "auto asked, 1 node: no parity"),
        (4, "6+2", "", "6+2 asked, 4 nodes: a group of 4"),
        (12, "4+2", "8+1", "4+2 asked, 12 nodes, at most 8+1: tolerance 1"),
        (8, "auto", "8+1", "auto asked, 8 nodes, at most 8+1: no parity"),
        (9, "auto", "8+1", "auto asked, 9 nodes, at most 8+1: tolerance 1"),
        (2, "auto", "", None),
        (8, "auto", "", None),
        (6, "4+2", "8+4", None),
        (13, "4+2", "", None),
        (1, "off", "", None),
        (0, "auto", "", None),
    ],
)
def test_a_wish_that_could_not_be_met_is_explained(nodes: int, protect: str, cap: str, expected: str | None) -> None:
    assert explain(roster(nodes, protect, cap=lambda node: cap)) == expected


def test_nodes_left_without_parity_are_counted() -> None:
    wanted = roster(
        9, "2+1", lambda node: {"nic": "a" if node < 3 else "b"}, cap=lambda node: "5+1" if node == 0 else ""
    )
    assert explain(wanted) == "2+1 asked, 9 nodes, at most 5+1: no parity for 3 of them"
    assert shapes(plan_groups(wanted)) == ["2+1", "2+1"]


def test_losses_are_counted_by_the_group_that_bears_the_fewest() -> None:
    groups = (Group(2, ("a", "b", "c", "d")), Group(1, ("e", "f", "g")))
    assert losses_tolerated((), {"a"}) == 0
    assert losses_tolerated(groups, ()) == 1
    assert losses_tolerated(groups, {"a"}) == 1
    assert losses_tolerated(groups, {"a", "b", "stranger"}) == 0
    assert losses_tolerated(groups, ["e", "e"]) == 0
    assert losses_tolerated(groups, {"e", "f", "g"}) == -2


def test_a_node_finds_its_group_and_position() -> None:
    groups = (Group(2, ("a", "b", "c", "d")), Group(1, ("e", "f", "g")))
    found = group_of(groups, "f")
    assert found is groups[1]
    assert (found.position("f"), found.n, found.geometry) == (1, 3, Geometry(2, 1))
    assert group_of(groups, "z") is None
    with pytest.raises(ValueError):
        found.position("a")
