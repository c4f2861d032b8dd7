"""The ops on sharded tensors, DTensors: importing this package registers how they are sharded.

    import linfuse_ext as lf
    import linfuse_ext.distributed

Whoever has a Linear too large for one card has it sharded already, by FSDP2 (fully_shard) or by
tensor parallelism (parallelize_module). The ops then work on the shards where they are: torch's
DTensor picks the rule, moves what the rule wants elsewhere, and calls the op on each rank's shards.

| op | sharded operand | result | moved, where the others are replicated |
|---|---|---|---|
| fuse_conv_linear | Linear weight `Shard(0)` (and its bias) | `Shard(0)` | nothing |
| fuse_conv_linear | Linear weight `Shard(1)`, in whole output channels | `Partial` | nothing |
| fuse_conv_linear | the same, in whole groups | weight `Shard(1)`, bias `Partial` | nothing |
| fuse_linear_conv | Linear weight `Shard(1)` | weight `Shard(1)`, bias replicated | nothing |
| fuse_linear_conv | convolution's weight over its output channels | `Shard(0)` | nothing |
| conv_to_affine | convolution's weight over its output channels | `Shard(0)` | nothing |
| fuse_conv_conv | second weight `Shard(0)`, neither with groups | `Shard(0)` | nothing |
| all others, and conv_to_csr | any | replicated | what is sharded is gathered |

- *Output channels* are axis 0 of a convolution's weight, axis 1 of a transposed one's. *In whole
  output channels* means that their number is a multiple of the number of ranks, and that the
  convolution has no groups. *In whole groups* means that the number of groups is; no rank then
  reads input channels of another (through `functional`). Columns of a Linear that are cut
  elsewhere are moved so that rows are sharded instead.
- Rows and columns of a Linear (`Shard(0)` of fuse_conv_linear, `Shard(1)` of fuse_linear_conv) may
  be cut unevenly, and a rank may have none.
- `functional.conv_to_affine` has each rank make its own rows of the matrix for every sharding of
  the weight, every number of channels and groups. Where the weight is not cut as the matrix is, it
  is gathered, which is small beside the matrix.
- A result that is `Partial` counts the biases once. torch makes it of a replicated one by a
  division by the number of ranks, which rounds where that is no power of two.
- The adjoints have the rules that belong to these: gradients of a sharded operand are sharded as
  it is, or `Partial`.
- FSDP2 and tensor parallelism together (a mesh of two axes) go by the rule of each axis.

`functional` wants all operands as DTensors of one mesh, or none. A rank outside of the mesh makes
nothing, and has an empty part of the result. The functions on layers take a layer without DTensors,
as tensor parallelism leaves those outside its plan, for a replicated one, and gather one of another
mesh than the Linear's, or else the larger layer's.

torch's registration remembers how a call is sharded by its tensors and some of its arguments only:
without what registration.py adds, a second call with another `input_size` would get the shape of
the first.
"""

from .layers import fully_shard_again
from .own_parts import register_own_parts
from .registration import register_rules

__all__ = ["fully_shard_again"]

register_rules()
register_own_parts()
