"""The mathematics of rows of logits, on [N] vectors: no device, no operator."""
