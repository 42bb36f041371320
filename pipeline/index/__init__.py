"""Indexing: sources to the committed, searchable archive.

In: folders, files and manifests. Out: published videos in an Archive, and an IndexResult.
Imports: pipeline.ask, pipeline.cluster.
"""
