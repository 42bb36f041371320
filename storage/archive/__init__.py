"""The archive: Delta tables of videos and frames, claims of running jobs, and the commits that change them.

In: the VideoRow of a video and the Receipts of its parts. Out: an Archive at one version, its rows and its frames.
Imports: storage.parts.
"""
