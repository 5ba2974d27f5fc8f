"""Pointwise calls, norms, softmaxes and losses as few kernels, compiled by inductor."""
