"""The archive: Delta tables of videos and frames, claims of running jobs, and the commits that change them.

In: VideoRow, and Receipt of each part that was written. Out: an Archive at one version, its rows and frame references.
Imports: storage.parts.
"""
