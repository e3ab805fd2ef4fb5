"""Linear layers whose weights and inputs are int8: one interface, several implementations, one dispatch."""
