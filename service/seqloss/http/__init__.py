"""The wire: JSON in, problem documents out."""
