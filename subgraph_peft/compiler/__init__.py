"""Program and method to program: places, starting values, laws, op forms, lowering, fold, costs."""
