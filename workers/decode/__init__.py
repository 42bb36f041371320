"""Decoding in a process of its own, without network and files: probe, sample, decode, cut.

In: an open file and a Segment. Out: FrameBatch after FrameBatch, with exact times; what is damaged is told.
Imports: workers.models, workers.sources.
"""
