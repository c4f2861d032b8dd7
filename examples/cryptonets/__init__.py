"""The parts of the demo `examples/digits.py`, one file for each thing it does."""
