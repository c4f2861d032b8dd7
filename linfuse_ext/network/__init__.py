"""A whole network: every stretch of affine operations found, merged where exact and worth it.

- capture: model -> a graph of ATen operations, by torch.export
- constants: which values of the graph depend on no input, and what they are
- operations, readers: node of the graph -> affine maps of one sample (table READERS)
- maps: the algebra of affine maps
- alignment: convolutions on a common grid of taps
- rules: (second, first) -> one map (table RULES)
- joins: sums and concatenations of several maps -> one map
- costs: operations and parameters of every form
- stretches: which nodes can become one: single source, nothing inside is used elsewhere
- nets: a link of a stretch -> maps
- planning: which neighbours to merge, by cost
- modules, naming: where a node is from, and what things are called
- rewriting: the merged layers, and the network with them
- measuring: how far a merged layer is from what it replaces
- report: what was done, and why the rest was not
- collapse: all of it in one call
"""
