"""The vector index: search keys of all frames of an archive, found by similarity.

In: an Archive. Out: the frames nearest to a query, with their scores.
Imports: storage.archive, storage.parts.
"""
