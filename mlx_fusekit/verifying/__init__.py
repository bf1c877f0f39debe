"""How close a fused model is to base and adapter."""
