"""Planned steps with fused kernels, beside inductor and beside planned steps without."""
