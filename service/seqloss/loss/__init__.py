"""From hidden states to losses: `head` (Torch) makes terms, `reduce` (NumPy) makes scores."""
