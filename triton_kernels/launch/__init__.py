"""From a call to launches of the kernels."""
