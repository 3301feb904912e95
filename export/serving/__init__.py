"""What runs such files: bound sessions, adapters at run time, decoders, generation."""
