"""Benchmarks of ``linfuse_ext`` against the other ways of doing the same (see NOTES.md)."""
