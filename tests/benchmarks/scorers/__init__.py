"""The ways to score pairs; each module has a `make` that returns a `benchmarks.scoring.Scorer`."""
