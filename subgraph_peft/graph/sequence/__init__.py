"""What a graph says of its sequences: attention and its masks as formulas, padding, embedded tokens."""
