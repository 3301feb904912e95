"""What a method is: tensors and an equation, its text, its registry, its catalogue."""
