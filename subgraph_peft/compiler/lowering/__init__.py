"""An equation into nodes: at every use of a weight, at results, in front of sequences."""
