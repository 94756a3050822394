"""How much faster two workers are than one, on a Ray of this machine's own."""
