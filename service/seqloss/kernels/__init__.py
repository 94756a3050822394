"""Kernels for CPUs with AVX2 or AVX-512: C++ that is compiled where it runs, once.

cpu/          the kernels: products of packed weights, norms, attention, the loss head
build.py      compiles them into a folder of the user's
functions.py  their functions, as Python calls them
modules.py    a model's modules that compute with them
"""
