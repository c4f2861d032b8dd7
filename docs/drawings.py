"""Draws the pictures of the documentation: `python docs/drawings.py [images]`.

Each function returns the drawing of one rule, computed with the package: what is called a
difference was measured. The names of the functions are those of the files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from rule_drawings import convolutions, modes, norms, representations, transposed
from rule_drawings.strip import Strip

IMAGES = Path(__file__).parent / "images"
DRAWINGS: dict[str, list[Callable[[], Strip]]] = {
    "rules": [
        convolutions.no_padding_behind,
        convolutions.pointwise_first,
        convolutions.pointwise_bias,
        convolutions.padding_between,
        convolutions.full_first,
        modes.circular,
        modes.repeating,
        modes.always_a_matrix,
        norms.norm_behind,
        norms.norm_before,
        norms.pooling,
        transposed.cut_between,
        transposed.uneven_bias,
        transposed.mixed,
    ],
    "representations": [representations.one_matrix, representations.choice],
}


def draw(images: Path) -> None:
    """Writes all pictures, each to the folder of its kind."""
    for kind, drawings in DRAWINGS.items():
        (images / kind).mkdir(exist_ok=True)
        for make in drawings:
            make().save(images / kind / f"{make.__name__}.svg")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES)
