"""Trains a network that can read encrypted digits, then makes two of its layers one.

A convolution and the Linear behind it, with only a flatten between them, are one affine map. So one
Linear computes the same with fewer multiplications, fewer parameters and one level of encryption
less. The demo measures that on real handwritten digits, prints two tables and draws two pictures:

    python examples/digits.py            # about half a minute on two cores
    python examples/digits.py --quick    # few epochs and hardly any timing
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

try:
    import torch
    from cryptonets.data import load_digits
    from cryptonets.matrix_picture import draw_matrix
    from cryptonets.measure import Agreement, measure_agreement, measure_networks, measure_ways
    from cryptonets.network import cryptonet, with_middle
    from cryptonets.report import networks_table, ways_table
    from cryptonets.times_picture import draw_times
    from cryptonets.training import train
    from rich.console import Console
    from torch import Tensor, nn

    import linfuse_ext
except ModuleNotFoundError as missing:
    name = (missing.name or "").partition(".")[0]
    install = {
        "linfuse_ext": ".",
        "matplotlib": "matplotlib",
        "rich": "rich",
        "sklearn": "scikit-learn",
        "torch": "torch",
    }
    if name not in install:
        raise
    raise SystemExit(f"The demo needs {name}; type: pip install {install[name]}") from None

MIDDLE = (13, 13)  # spatial size of what enters the second convolution


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, fuses, measures, prints and draws."""
    options = parse(arguments)
    options.images.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    console = Console()
    digits = load_digits(options.seed)

    # Two linear layers with nothing between them ...
    conv = nn.Conv2d(5, 50, kernel_size=5, stride=2)  # [N, 5, 13, 13] -> [N, 50, 5, 5]
    linear = nn.Linear(1250, 100)  # [N, 1250] -> [N, 100]
    network = cryptonet(conv, nn.Flatten(), linear)
    train(network, digits, epochs=4 if options.quick else 60, console=console)

    # ... become one.
    fused = linfuse_ext.fuse_conv_linear(conv, linear, MIDDLE)  # [N, 845] -> [N, 100]
    fused_network = with_middle(network, nn.Flatten(), fused)

    seconds = 0.02 if options.quick else 2.0  # for each thing that is timed
    networks = measure_networks(
        {"before": network, "after": fused_network}, digits, seconds=seconds
    )
    float32 = measure_agreement(network, fused_network, digits.test_images)
    float64 = agreement_in_float64(network, conv, linear, digits.test_images)
    ways = measure_ways(conv, linear, MIDDLE, seconds=seconds)

    for name, facts in networks.items():
        console.print(f"\n{name + ':':8}{facts.layers}", end="")
    console.print("\n")
    console.print(networks_table(networks["before"], networks["after"], float32, float64))
    console.print(
        "Homomorphic encryption spends a level on each multiplication in a row. One\n"
        "level less means smaller ciphertexts: all that is left to do gets faster.\n",
        style="dim",
    )
    console.print(ways_table(ways))
    console.print("Error: largest difference from the layer made in float64.\n", style="dim")

    draw_matrix(conv, linear, fused, MIDDLE, options.images / "matrix.png")
    draw_times(ways, networks, options.threads, options.images / "times.png")
    numbers = {
        "networks": networks,
        "agreement": {"float32": float32, "float64": float64},
        "ways": ways,
    }
    (options.images / "numbers.json").write_text(json.dumps(numbers, default=asdict, indent=2))
    console.print(f"Pictures and numbers: {options.images}", soft_wrap=True)


def agreement_in_float64(
    network: nn.Sequential, conv: nn.Conv2d, linear: nn.Linear, images: Tensor
) -> Agreement:
    """Fuses and compares once more in float64: what differs shrinks with the rounding."""
    network, conv, linear = deepcopy((network, conv, linear))  # the two stay layers of the network
    network.double()
    fused = linfuse_ext.fuse_conv_linear(conv, linear, MIDDLE)
    return measure_agreement(network, with_middle(network, nn.Flatten(), fused), images.double())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Trains, makes two layers one, and compares.")
    parser.add_argument("--quick", action="store_true", help="few epochs, hardly any timing")
    parser.add_argument("--seed", type=int, default=0, help="for split and training")
    # Layers as small as these gain little from more threads, and on a busy machine they lose a lot.
    parser.add_argument("--threads", type=int, default=1, help="for torch (default: %(default)s)")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        default=Path(__file__).parent / "output",
        help="for matrix.png, times.png and numbers.json (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads must be positive, got {options.threads}")
    return options


if __name__ == "__main__":
    main()
