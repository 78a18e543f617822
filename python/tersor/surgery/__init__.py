"""Structured pruning of a whole checkpoint: heads, channels and blocks (shrink), the hidden width
(slicing), experts of a mixture (experts). A folder in, a smaller ordinary folder out; the
arithmetic of one block is in tersor.pruning."""
