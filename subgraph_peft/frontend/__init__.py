"""Model to program: capture, graphs of other tools, the normal form, why a model is refused."""
