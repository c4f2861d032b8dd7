"""Trains a network that can read encrypted digits, then collapses it.

Between two activations a network is one affine map, however many layers it has there. In the
network of the CryptoNets paper these are a pool, a convolution, a pool and a Linear. One Linear
computes the same with fewer multiplications, fewer parameters and one level of encryption less, and
one call finds and makes it. The demo measures that on real handwritten digits, prints tables and
draws two pictures:

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
    from cryptonets.network import cryptonet
    from cryptonets.report import collapse_table, layers_table, networks_table, ways_table
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
    """Trains, collapses, measures, prints and draws."""
    options = parse(arguments)
    options.images.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    console = Console()
    digits = load_digits(options.seed)

    # A pool, a convolution, a pool and a Linear with nothing between them ...
    network = cryptonet()
    train(network, digits, epochs=4 if options.quick else 60, console=console)

    # ... become one Linear. Which ones they are, nobody has to say.
    collapsed = linfuse_ext.collapse(network, digits.test_images)

    seconds = 0.02 if options.quick else 2.0  # for each thing that is timed
    networks = measure_networks(
        {"before": network, "after": collapsed.model}, digits, seconds=seconds
    )
    float32 = measure_agreement(network, collapsed.model, digits.test_images)
    float64 = agreement_in_float64(network, digits.test_images)

    console.print()
    console.print(layers_table(networks))
    console.print()
    console.print(collapse_table(collapsed.report))
    console.print()
    console.print(networks_table(networks["before"], networks["after"], float32, float64))
    console.print(
        "Homomorphic encryption spends a level on each multiplication in a row; a pool\n"
        "only adds. One level less means smaller ciphertexts: all that is left to do gets\n"
        "faster.\n",
        style="dim",
    )

    # Without pools the middle is the pair that the PyTorch forum asked about, and by hand there is
    # more than one way to merge it.
    conv, linear = network.conv2, network.hidden
    ways = measure_ways(conv, linear, MIDDLE, seconds=seconds)
    console.print(ways_table(ways))
    console.print("Error: largest difference from the layer made in float64.\n", style="dim")

    fused = linfuse_ext.fuse_conv_linear(conv, linear, MIDDLE)  # [N, 845] -> [N, 100]
    draw_matrix(conv, linear, fused, MIDDLE, options.images / "matrix.png")
    draw_times(ways, networks, options.threads, options.images / "times.png")
    numbers = {
        "networks": networks,
        "collapse": json.loads(collapsed.report.to_json()),
        "agreement": {"float32": float32, "float64": float64},
        "ways": ways,
    }
    (options.images / "numbers.json").write_text(json.dumps(numbers, default=asdict, indent=2))
    console.print(f"Pictures and numbers: {options.images}", soft_wrap=True)


def agreement_in_float64(network: nn.Sequential, images: Tensor) -> Agreement:
    """Collapses and compares once more in float64: what differs shrinks with the rounding."""
    network, images = deepcopy(network).double(), images.double()
    return measure_agreement(network, linfuse_ext.collapse(network, images).model, images)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Trains, collapses, and compares.")
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
