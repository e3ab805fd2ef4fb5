"""Which entries of a matrix go to the sparse part: each function is pure and returns a mask."""
