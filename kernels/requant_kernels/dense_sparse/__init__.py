"""y = x (dense + sparse)^T + bias: one interface, several implementations, one dispatch."""
