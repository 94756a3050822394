"""From requests to batches: which pairs go together, and how they become one."""
