"""The native transformer: packed, without padding, for the families that it has a weight map of."""
