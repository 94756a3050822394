"""Which pairs of a request can be scored, and what is wrong with the others.

All of it happens on the CPU, over flat arrays, before anything is queued: on a GPU an id out of
range poisons the whole process, and a wrong number is worse than none.
"""
