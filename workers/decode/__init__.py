"""Decoding, in a process that can open no file and reach no network: probe, sample, decode, cut.

In: an open file and a Segment. Out: batches of frames with exact times, and the damage that was found.
Imports: workers.sources.
"""
