"""The fused step's parts: where a row is in the batch, the operations between the matrices, the matrices."""
