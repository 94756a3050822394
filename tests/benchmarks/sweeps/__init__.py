"""How the cost of a token depends on how many pairs there are, how long they are, and what else.

`make bench-sweeps` runs it, and `make bench-sweeps BENCH_ARGS=--help` lists its arguments.
"""
