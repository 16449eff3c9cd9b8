"""Mathematics of row statistics on [N] vectors, independent of devices and operators."""
