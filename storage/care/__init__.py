"""Care of an archive: verify, repair, clean and compact.

In: an Archive. Out: a report of its damage; an archive without damage, without unused files, with fewer parts.
Imports: storage.archive, storage.parts, storage.vectors.
"""
