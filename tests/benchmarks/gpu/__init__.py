"""What seqloss makes of an NVIDIA GPU: products, the loss head, bulk throughput and latency.

`python -m benchmarks.gpu --help` says how to run it; without a GPU there is `--dry-run-cpu`.
"""
