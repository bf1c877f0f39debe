"""Two models of one shape: what differs between them, and that as an adapter."""
