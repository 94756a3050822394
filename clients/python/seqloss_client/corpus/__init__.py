"""Whole corpora: what `seqloss-client score` reads, asks for and writes.

Data flows one way: `lines` or `parquet` -> `readers` (blocks of pairs) -> `asking` (the service)
-> `formats` (bytes) -> `output` (files that survive a kill).
"""
