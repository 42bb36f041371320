"""Care of an archive: verify, repair, clean and compact.

In: an Archive. Out: what is damaged, and an archive without it.
Imports: storage.archive, storage.parts, storage.vectors.
"""
