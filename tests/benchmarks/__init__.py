"""How fast seqloss computes losses, beside transformers, CTranslate2 and what the machine can do.

`make bench` runs it, and `make bench BENCH_ARGS=--help` lists its arguments.
"""
