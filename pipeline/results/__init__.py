"""Results beside the archive: files of moments, contact sheets, cut clips, lists of videos, and their text and JSON.

In: Moments and an Archive. Out: files and rows.
Imports: nothing.
"""
