"""From base and adapter to merged weights: the arithmetic, the plan, the blocks."""
