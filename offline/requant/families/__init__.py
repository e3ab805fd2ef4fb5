"""What the blocks of related models consist of, as data; ``architectures`` says which models they are."""
