"""The networks are the published ones, and what is made of them computes the same."""

from __future__ import annotations

import pytest

from bench.cases import OURS
from bench.collapse_cases import BATCHES, BEFORE, CAPTURE, COLLAPSE, FX_FUSE, Making, Running, ready
from bench.networks import NETWORKS, Network
from bench.rows import document, network_rows
from bench.tables import markdown

NAMED = {network.name: network for network in NETWORKS}
# Before and after. The first are the counts of torchvision and of PyTorch's DCGAN tutorial, where
# there are such; after, each BatchNorm has become a bias.
PARAMETERS = {
    "cryptonets": (130 + 6_300 + 125_100 + 1_010, 130 + 84_600 + 1_010),
    "repvgg_stage": (324_672, 9 * 48 * 96 + 96 + 3 * (9 * 96 * 96 + 96)),
    # 13.52 k weights say the authors; the biases, and before them those of the PReLUs.
    "sesr_m5": (320_708, 96 + 13_520 + 6 * 16 + 4),
    "resnet18": (11_689_512, 11_689_512 - 4_800),
    # 17,056 channels with a BatchNorm; two of these go into the next layer, of 16 and 320 channels.
    "mobilenet_v2": (3_504_872, 3_504_872 - 17_056 - 16 - 320),
    "dcgan": (3_576_704, 3_576_704 - 960),
}
# Convolutions with a BatchNorm behind them are all that torch's fuse knows.
FOLDED_BY_TORCH = {"repvgg_stage", "resnet18", "mobilenet_v2"}


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_networks_are_the_published_ones(network: Network) -> None:
    counts = ready(network).facts["parameters"]
    assert (counts["before"], counts["after"]) == PARAMETERS[network.name]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_everyone_computes_the_same(network: Network) -> None:
    case = Running(network, BATCHES[0])
    running = [name for name in case.entrants if case.skip_reason(name) is None]
    assert (FX_FUSE in running) == (network.name in FOLDED_BY_TORCH)
    for entrant in running:
        case.check(case.call(entrant, case.inputs())(), case.inputs())


def test_what_is_made_is_the_network() -> None:
    case = Making(NAMED["cryptonets"])
    counts = case.facts["parameters"]
    for entrant, which in ((OURS, "after"), (CAPTURE, "before")):
        made = case.call(entrant, case.inputs())()
        assert sum(t.numel() for t in made) == counts[which]
        case.check(made, case.inputs())
    with pytest.raises(AssertionError, match="other parameters"):
        case.check(made[1:], case.inputs())


def test_groups_of_a_network_make_one_row() -> None:
    network = NAMED["cryptonets"]
    groups = [
        (Making(network).facts, {OURS: 0.012, CAPTURE: 0.05}),
        (Running(network, 1).facts, {OURS: 1e-4, BEFORE: 2e-4}),
        (Running(network, 64).facts, {OURS: 4e-4, BEFORE: 2e-3, FX_FUSE: 1e-3}),
    ]
    (row,) = network_rows(groups)
    assert (row["merge_ms"], row["capture_ms"]) == (12, 50)
    assert row["latency_ms"]["1"] == {"after": 0.1, BEFORE: 0.2}
    assert (row["fused"], row["declined"], row["refused"]) == (1, 0, 0)
    # 2 x the products of the convolutions and Linears, alone in torch's count
    first, last = 25 * 5 * 13**2, 1000
    middle = {"before": 125 * 50 * 5**2 + 125_000, "after": 84_500}
    products = {name: first + last + between for name, between in middle.items()}
    assert row["mflop"] == {name: pytest.approx(2e-6 * n) for name, n in products.items()}
    # conv, square, pool, conv, pool, flatten, Linear, square, Linear; after, flatten and one Linear
    assert row["operations"] == {"before": 9, "after": 6}
    main, _ = markdown(document("cpu", [], {}, **{COLLAPSE: [row]}))
    assert "132,540 -> 85,740" in main
    assert "| cryptonets | 1 | 0.200 | 0.100 | - | 2.00x | - |" in main
    assert "| cryptonets | 64 | 2.00 | 0.400 | 1.00 | 5.00x | 2.50x |" in main
