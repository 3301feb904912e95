"""The zoo's plain torch models, written as users write them: torch's own layers, weights by hand, ways to call."""

from tests.zoo import layers, structure, weights

ENTRIES = layers.ENTRIES + weights.ENTRIES + structure.ENTRIES
