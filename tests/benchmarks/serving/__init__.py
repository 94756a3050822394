"""How the service behaves: its own cost, its padding, and what it gives to whom under load.

`make bench-serving` runs it, and `make bench-serving BENCH_ARGS=--help` lists its arguments.
"""
