"""A captured model: its module, its sites, selectors, the kernels of its attention."""
