"""Engines turn batches into token terms on a device."""
